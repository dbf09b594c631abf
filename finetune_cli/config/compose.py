"""Composition: a repaired command line and YAML files in, a judged config out. Hydra merges; the judge judges.

Hydra composes plain values (the schema's defaults, YAML, overrides forced with ``++``), because its own typed merge stops at the first
mistake; ``judge`` then finds all of them, and the files and the command line say where each was made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from finetune_cli.config import grammar, saved, saved_run
from finetune_cli.config.files import YamlFile, configs_dir, groups_in, read_lines
from finetune_cli.config.judge import SECRET_KEY, SECRET_VALUE, Problem, judge
from finetune_cli.config.options import Option, Tasks, build, options, options_of, plain
from finetune_cli.config.paths import absolute
from finetune_cli.config.schema import SCHEMAS, leaves
from finetune_cli.errors import UserError
from finetune_cli.said import names_secret


@dataclass(frozen=True, slots=True)
class Place:
    """Where a verb's config is composed from. Picklable: a sweep's workers compose too."""

    verb: str
    config_name: str
    """The primary config: the verb's, or ``resume`` where a run is gone on with."""
    folders: tuple[tuple[str, str], ...]
    """(provider, folder) of the YAML, first wins."""
    run: str
    """Search-path entry of the saved run, or empty."""
    shown: Mapping[str, str]
    """Override to how it was typed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A valid config and how it came about."""

    config: Any
    config_yaml: str
    user_set: frozenset[str]
    experiment: str | None


class FtuneSearchPath(SearchPathPlugin):  # type: ignore[misc]  # Hydra is not typed
    """Adds the user's folders and the saved run. Hydra makes it without arguments, so the place is set on the class."""

    place: ClassVar[Place | None] = None

    def manipulate_search_path(self, search_path: Any) -> None:
        if self.place is None:
            return
        known = {entry.path for entry in search_path.get_path()}
        for provider, folder in self.place.folders:
            if f"file://{folder}" not in known and folder not in known:
                search_path.append(provider, f"file://{folder}")
        if self.place.run:
            search_path.append("ftune", self.place.run)


class YamlFolder(FileConfigSource):  # type: ignore[misc]  # Hydra is not typed
    """Hydra's reader of YAML, which does not find the header of a file that begins with a byte order mark."""

    def load_config(self, config_path: str) -> ConfigResult:
        found = super().load_config(config_path)
        with open(Path(self.path) / self._normalize_file_name(config_path), encoding="utf-8-sig") as file:
            found.header.update(self._get_header_dict(file.read(512)))
        return found


def read_line(verb: str, arguments: list[str], tasks: Tasks) -> tuple[grammar.CommandLine, Place]:
    """Repair the verb's arguments and settle where its config comes from. Raises UserError for flags that cannot be."""
    ours = configs_dir()
    table = options_of(verb, tasks)
    first = grammar.flags(arguments)
    folders = [("main", str(ours))]
    if folder := first.get("--config-path"):
        folders.insert(0, ("main", _folder("--config-path", folder)))
        folders[1] = ("ftune", str(ours))
    if folder := first.get("--config-dir"):
        folders.append(("command-line", _folder("--config-dir", folder)))
    groups: dict[str, Sequence[str]] = dict(groups_in([Path(folder) for _, folder in folders]))
    groups["task"] = [*tasks, *groups.get("task", [])]
    usable = _of_verb(groups, table)
    line = grammar.read(arguments, grammar.Vocabulary(verb, table, usable, [name for name in groups if name not in usable]))
    resumed = verb == "train" and line.value("resume") not in (None, "auto", "null")
    group = "ckpt" if "ckpt" in table else "resume" if resumed else ""
    without = frozenset(t.key for t in line.typed if t.key in ("data", "task") and not resumed)
    search = "replay" if verb == "replay" else group
    run = saved_run.address(group, without=without, root=line.value("run.root") or "runs", search=search) if group else ""
    name = first.get("--config-name") or ("resume" if resumed else verb)
    return line, Place(verb, name, tuple(folders), run, {typed.override: typed.text for typed in line.typed})


def _folder(flag: str, name: str) -> str:
    path = os.path.abspath(os.path.expanduser(name))
    if not os.path.isdir(path):
        raise UserError(f"{flag} {name}: the folder is not found", where="command line", fix="name an existing folder of YAML files")
    return path


def _of_verb(groups: Mapping[str, Sequence[str]], table: Mapping[str, Option]) -> dict[str, Sequence[str]]:
    """Groups that the verb can use: those that fill a section it does not have are unknown keys to it."""
    everywhere = {key.split(".")[0] for schema in SCHEMAS.values() for key in options(schema)}
    here = {key.split(".")[0] for key in table}
    return {name: choices for name, choices in groups.items() if name.split("/")[0] in here or name.split("/")[0] not in everywhere}


def register(place: Place, tasks: Tasks) -> None:
    """Tell Hydra of the schema's defaults, the tasks, the search path and the saved runs."""
    store = ConfigStore.instance()
    for verb, schema in SCHEMAS.items():
        store.store(name=f"{verb}_options", node=plain(build(schema, {})))
    for name, task in tasks.items():
        store.store(group="task", name=name, node=plain(task()))
    FtuneSearchPath.place = place
    OmegaConf.register_new_resolver("oc.env", _variable, replace=True)
    try:
        plugins = Plugins.instance()
    except Exception as error:  # a broken plugin of the environment may raise anything while it is imported
        what = f"a Hydra plugin installed here is broken: {type(error).__name__}: {error}"
        raise UserError(what, where="packages named hydra-…", fix="uninstall or upgrade the plugin") from error
    for plugin in (FtuneSearchPath, saved_run.SavedRun):
        plugins.register(plugin)
    SourcesRegistry.instance().types[YamlFolder.scheme()] = YamlFolder  # registering does not replace


def _variable(name: str, *default: Any) -> Any:
    """``${oc.env:NAME}``. No option needs a secret, and a run or an experiment of a stranger must not be able to ask for one."""
    if names_secret(name):
        raise ValueError(f"the variable {name} is named like a secret, which no config may read")
    return oc.env(name, *default)


class Once(ConfigLoaderImpl):  # type: ignore[misc]  # Hydra is not typed
    """Composes a command line once, which takes 0.1 s: what was judged is what runs. Who asks a third time gets a tree of his own."""

    sweeps = False
    """Whether the last config asks for a sweep."""
    _kept: tuple[Any, DictConfig] | None = None

    def load_configuration(self, config_name: str | None, overrides: list[str], run_mode: RunMode, *more: Any, **named: Any) -> DictConfig:
        line = (config_name, *overrides, run_mode, *more, *named.items())
        if self._kept is not None and self._kept[0] == line:
            kept, self._kept = self._kept[1], None
            return kept
        tree: DictConfig = super().load_configuration(config_name, overrides, run_mode, *more, **named)
        self.sweeps, self._kept = tree.hydra.mode == RunMode.MULTIRUN, (line, tree)
        return tree


@contextmanager
def composer(place: Place) -> Iterator[Hydra]:
    """A Hydra that composes each command line once. One that is already at work is put back afterwards."""
    from hydra import version

    version.setbase("1.3")
    held = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        found = Hydra(place.verb, Once(create_config_search_path(place.folders[0][1])))
        GlobalHydra.instance().initialize(found)
        yield found
    finally:
        GlobalHydra.instance().clear()
        if held is not None:
            GlobalHydra.instance().initialize(held)


def compose(
    hydra: Hydra, place: Place, overrides: Sequence[str], tasks: Tasks, *, complete: bool = True
) -> tuple[Composed | None, list[Problem]]:
    """Compose and judge one config."""
    tree = hydra.compose_config(place.config_name, list(overrides), RunMode.RUN)
    return judged(hydra, place, tree, tasks, complete=complete)


def judged(hydra: Hydra, place: Place, tree: DictConfig, tasks: Tasks, *, complete: bool = True) -> tuple[Composed | None, list[Problem]]:
    """The judged form of what Hydra composed (``tree`` with its ``hydra`` section); the list says what is wrong."""
    raw = _raw(tree.hydra)
    overrides = [*raw["overrides"]["hydra"], *raw["overrides"]["task"]]
    groups = [*groups_in([Path(folder) for _, folder in place.folders]), "task", "ckpt", *(["resume"] if place.run else [])]
    experiment = _experiment(raw["runtime"]["choices"], overrides)
    origins = Origins.of(hydra, place, overrides, groups, experiment)
    if place.run and (problem := saved_run.another_task(place.run, raw["overrides"]["task"])) is not None:
        return None, [problem]
    values = _without_hydra(tree)
    table = options_of(place.verb, tasks)
    user_set = origins.user_set(table)
    resolved, problems = _resolved(values, table, origins.where)
    config, found = judge(
        SCHEMAS[place.verb], resolved, tasks=tasks, where=origins.where, user_set=user_set, complete=complete, groups=groups
    )
    problems += found + _hidden_code(origins) + _of_hydras_runs(origins, place.verb)
    if config is not None and getattr(config, "resume", None) not in (None, "auto") and not place.run:
        problems.append(Problem("resume names a run, which only the command line can", origins.where("resume"), "ftune train resume=RUN"))
    if place.run and getattr(getattr(config, "model", None), "trust_remote_code", False) and "model.trust_remote_code" not in user_set:
        what = "the saved run trusts code from the hub, and only who resumes it can say that again"
        fix = "give model.trust_remote_code=true and model.revision=… once more, after reading that code"
        problems.append(Problem(what, "model.trust_remote_code", fix))
    if problems:
        return None, problems
    _make_absolute(config, table)
    text = saved.dump(config, saved.references(values))
    return Composed(config=config, config_yaml=text, user_set=user_set, experiment=experiment), []


def _experiment(choices: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """The experiment's name; Hydra keeps several of them (``+exp=[a,b]``) only as typed."""
    typed = [override.partition("=")[2] for override in overrides if override.startswith("+exp=")]
    names = [str(choices["exp"])] if choices.get("exp") else typed[-1].strip("[]").split(",") if typed else []
    return "+".join(name.strip() for name in names) or None


def _raw(node: DictConfig) -> dict[str, Any]:
    """Plain values, references kept: an override may hold one to a secret."""
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _without_hydra(tree: DictConfig) -> DictConfig:
    values = tree.copy()
    with open_dict(values):
        values.pop("hydra", None)
    return values


def _make_absolute(config: Any, table: Mapping[str, Option]) -> None:
    """Make relative paths absolute, so that a config means the same in every directory and compares equal to its saved form."""
    here = Path.cwd()
    for key, value, _ in leaves(config):
        *outer, last = key.split(".")
        node = config
        for name in outer:
            node = getattr(node, name)
        setattr(node, last, absolute(table[key], value, here))


def _resolved(values: DictConfig, table: Mapping[str, Option], where: Callable[[str], str]) -> tuple[dict[str, Any], list[Problem]]:
    """Values with every reference resolved; one that cannot be is a problem."""
    try:
        whole = OmegaConf.to_container(values, resolve=True)
    except (OmegaConfBaseException, RecursionError):
        whole, problems = _one_by_one(values, table, where)
    else:
        problems = []
    assert isinstance(whole, dict)
    return {str(key): value for key, value in whole.items()}, problems


def _one_by_one(values: DictConfig, table: Mapping[str, Option], where: Callable[[str], str]) -> tuple[Any, list[Problem]]:
    raw = OmegaConf.to_container(values, resolve=False)
    problems: list[Problem] = []

    def walk(node: Any, prefix: str) -> Any:
        if isinstance(node, dict):
            walked = {key: walk(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in node.items()}
            return {key: item for key, item in walked.items() if item is not _LOST}
        if isinstance(node, list):
            return [item for index, old in enumerate(node) if (item := walk(old, f"{prefix}[{index}]")) is not _LOST]
        if not isinstance(node, str) or "${" not in node:
            return node
        try:
            found = OmegaConf.select(values, prefix)
            return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(_unresolved(prefix, error, where))
            return node if prefix in table and table[prefix].is_text else _LOST

    return walk(raw, ""), problems


_LOST = object()


def _unresolved(key: str, error: Exception, where: Callable[[str], str]) -> Problem:
    told = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).split("\n")[0]).strip('"')
    reason = "it refers to itself" if isinstance(error, RecursionError) else told
    name = re.search(r"Environment variable '([^']+)'", reason)
    if "named like a secret" in reason:
        return Problem(f"{key} cannot be resolved: {reason}", where(key), f"leave {key} out, or use a variable of another name")
    fix = f"export {name[1]}=…, or write a default: ${{oc.env:{name[1]},VALUE}}" if name else f"mend the reference in {key}"
    return Problem(f"{key} cannot be resolved: {reason}", where(key), fix)


def _hidden_code(origins: Origins) -> list[Problem]:
    """``_target_`` in the user's YAML where the judge does not look: under ``hydra``."""
    return [
        Problem(f"{key}: a config names no code to run", file.where(key), "remove it")
        for file in origins.files
        if file.user
        for key in file.lines
        if key.startswith("hydra") and key.endswith("._target_")
    ]


def _of_hydras_runs(origins: Origins, verb: str) -> list[Problem]:
    """Hydra's settings of a single run's folder and name, which ftune keeps itself: they would do nothing, or make an empty folder."""
    own = re.compile(r"hydra\.(run|job|output_subdir)\b")
    typed = {key: f"command line: {text}" for key, text in origins.typed.items() if own.match(key)}
    files = {key: file.where(key) for file in origins.files if file.user for key in file.lines if own.fullmatch(key)}
    name = "run.dir=DIRECTORY and run.name=NAME say where a run goes; or " if verb == "train" else ""
    return [Problem(f"{key} is not Hydra's to say in ftune", where, f"{name}leave it out") for key, where in (files | typed).items()]


@dataclass(frozen=True, slots=True)
class Origins:
    """Who set which key: the command line, or a line of a file."""

    typed: dict[str, str]
    """Key to how it was typed; choices of groups are not in it."""
    chosen: dict[str, str]
    files: tuple[YamlFile, ...]
    """Last wins."""

    @classmethod
    def of(cls, hydra: Hydra, place: Place, overrides: list[str], groups: Sequence[str], experiment: str | None) -> Origins:
        typed: dict[str, str] = {}
        chosen: dict[str, str] = {}
        for override in overrides:
            key = re.sub(r"^[+~]*", "", override.partition("=")[0])
            text = place.shown.get(override, re.sub(r"^\+\+", "", override))
            (chosen if key in groups else typed)[key] = key if SECRET_KEY.search(key) or SECRET_VALUE.search(text) else text
        return cls(typed, chosen, tuple(_files(hydra, place, overrides, experiment)))

    def where(self, key: str) -> str:
        for name, text in self.typed.items():
            if name == key or key.startswith(f"{name}."):
                return f"command line: {text}"
        for file in reversed(self.files):
            if place := file.where(key):
                return place
        return next((f"command line: {text}" for name, text in self.chosen.items() if key.startswith(f"{name}.")), key)

    def user_set(self, table: Mapping[str, Option]) -> frozenset[str]:
        """Options that the user set: typed, or in a file that speaks for the user."""
        named = {*self.typed, *(key for file in self.files if file.user for key in file.lines)}
        return frozenset(key for key in table if key in named or any(name.startswith(f"{key}.") for name in named))


def _files(hydra: Hydra, place: Place, overrides: list[str], experiment: str | None) -> Iterator[YamlFile]:
    """The YAML files that were composed, in order; none where only ftune's own groups were, which are right by test."""
    ours = str(configs_dir())
    if experiment is None and all(folder == ours for _, folder in place.folders):
        return
    for default in hydra.config_loader.compute_defaults_list(place.config_name, overrides, RunMode.RUN).defaults:
        if default.config_path is None or default.config_path.startswith("hydra/"):
            continue
        for _, folder in place.folders:
            path = Path(folder) / f"{default.config_path}.yaml"
            if path.is_file():
                user = folder != ours or default.config_path.startswith("exp/")
                yield read_lines(path, default.package or "", user)
                break
