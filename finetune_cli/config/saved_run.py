"""``ckpt=RUN`` and ``resume=RUN`` as a config group: choosing "option RUN" answers with the run's own saved config.

So Hydra itself does the merge, and overrides, ``--cfg job``, completion and sweeps over runs need no special case.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf

from finetune_cli.config import saved
from finetune_cli.config.judge import Problem
from finetune_cli.config.options import Tasks
from finetune_cli.storage import parsed

CARRIED = {
    "ckpt": ("task", "data"),
    "resume": ("task", "model", "data", "optimizer", "device", "train", "run", "expect", "offline"),
}
"""What a saved config gives to the verb that names it: a scored run brings what its rows are, a resumed one everything."""
SCHEME = "ftune-run"


class Found(Protocol):
    """What the search for a checkpoint answers; ``config`` is None for a model that ftune did not train."""

    @property
    def weights(self) -> Path: ...
    @property
    def run(self) -> Path | None: ...
    @property
    def config(self) -> Path | None: ...


def address(group: str, *, without: frozenset[str], root: str, search: str) -> str:
    """The search-path entry of the group; sections in ``without`` are chosen anew by the user. It travels to a sweep's workers as text.

    ``search`` says what is looked for: a checkpoint (``ckpt``), or a run that may have none yet (``resume``, ``replay``).
    """
    carried = [name for name in CARRIED[group] if name not in without]
    return f"{SCHEME}://{json.dumps({'group': group, 'carried': carried, 'root': root, 'search': search})}"


class SavedRun(ConfigSource):  # type: ignore[misc]  # Hydra is not typed
    """Hydra names the parameters of these methods, so they keep its names."""

    find: ClassVar[Callable[[str, str, str], Found]]
    """(search, name, root of the runs) to its files; given by the command line, because it lives on a floor above."""
    tasks: ClassVar[Callable[[], Tasks]]
    """The tasks there are; given likewise."""
    recognise: ClassVar[Callable[[Mapping[str, Any]], str]]
    """config.json of a plain model to the name of its task; given likewise."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    @property
    def _group(self) -> str:
        return str(json.loads(self.path)["group"])

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.rstrip("/") in ("", self._group)

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith(f"{self._group}/") and config_path not in (f"{self._group}/None", f"{self._group}/???")

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The latest runs, for completion."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [self._group]
        if results_filter == ObjectType.GROUP:
            return []
        folders = Path(json.loads(self.path)["root"]).glob("*/config.yaml")
        return [str(path.parent) for path in sorted(folders)[-10:]]

    def load_config(self, config_path: str) -> ConfigResult:
        wish, name = json.loads(self.path), config_path.removeprefix(f"{self._group}/")
        values = _values(wish, name, type(self))
        return ConfigResult(self.provider, self.full_path(), values, {"package": "_global_"})


def _values(wish: dict[str, Any], name: str, known: type[SavedRun]) -> DictConfig:
    found = known.find(wish["search"], name, wish["root"])
    if found.config is not None:
        tree = _tree(found.config, known.tasks())
        values: dict[str, Any] = {section: tree[section] for section in wish["carried"] if section in tree}
    else:
        values = {"task": {"name": known.recognise(_model_config(found.weights))}} if "task" in wish["carried"] else {}
    here = os.path.expanduser(name)
    if name == "latest" and not os.path.lexists(name):
        values[wish["group"]] = str(found.run or found.weights)
    else:
        values[wish["group"]] = os.path.abspath(here) if os.path.lexists(here) else name
    return OmegaConf.create(saved.escaped_at(values, wish["group"]))


def another_task(place: str, overrides: Sequence[str]) -> Problem | None:
    """What is wrong where a command line goes on with a run (``place`` is an ``address``) and names another task than it trains."""
    named = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    wish = json.loads(place.removeprefix(f"{SCHEME}://"))
    if wish["group"] != "resume" or not {"resume", "task"} <= named.keys():
        return None
    config = SavedRun.find(wish["search"], named["resume"].strip("\"'"), wish["root"]).config
    trained = _tree(config, SavedRun.tasks()).get("task", {}).get("name") if config else None
    if trained in (None, named["task"]):
        return None
    fix = f"leave task out, or start a new run from its weights: ftune train model.path=RUN task={named['task']} …"
    return Problem(f"the run trains {trained}, which a resume cannot change", f"command line: task={named['task']}", fix)


@functools.lru_cache(maxsize=32)
def _read(path: Path, _changed: int, tasks: tuple[tuple[str, type], ...]) -> DictConfig:
    return saved.unresolved(path, "train", dict(tasks))


def _tree(path: Path, tasks: Tasks) -> dict[str, Any]:
    """The saved config as nested values with their references; read once, however often Hydra asks."""
    values = OmegaConf.to_container(_read(path, path.stat().st_mtime_ns, tuple(tasks.items())), resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _model_config(model: Path) -> dict[str, Any]:
    """config.json of a plain Hugging Face model; empty where it is not at hand."""
    try:
        config = parsed((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
