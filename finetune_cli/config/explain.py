"""Hydra's own errors in three lines. What the judge cannot see is left to Hydra: groups, defaults lists, the grammar of overrides."""

from __future__ import annotations

import json
import re
import traceback
from pathlib import Path

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from finetune_cli.config.compose import Place
from finetune_cli.config.files import not_yaml
from finetune_cli.config.grammar import no_choice
from finetune_cli.config.judge import Problem, together
from finetune_cli.errors import FtuneError, UserError

_IN = r"(?:In '(?P<file>[^']*)': )?"


def explain(error: BaseException, place: Place) -> FtuneError | None:
    """The user's mistake behind an error raised by Hydra; None where it is a bug."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, FtuneError):
            return link
        if isinstance(link, UnicodeDecodeError):
            what = f"not UTF-8: {link.reason} at byte {link.start}"
            return UserError(what, where=_undecodable(place), fix="save the file as UTF-8")
        if isinstance(link, yaml.YAMLError):
            return not_yaml(getattr(getattr(link, "problem_mark", None) or link, "name", "") or "YAML", link)
    if isinstance(error, RecursionError) and _from_hydra(error):
        return UserError("the config is nested too deeply", where=_endless(place), fix="look for what contains itself")
    if isinstance(error, (HydraException, OmegaConfBaseException)) or isinstance(error, (ValueError, OSError)) and _from_hydra(error):
        return _told(" ".join(str(link) for link in chain[:1]), chain, place)
    return None


def _from_hydra(error: BaseException) -> bool:
    """Hydra throws bare ValueErrors for bad command lines: was it Hydra that raised, and not our code under it?"""
    names = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    deepest = {package: max((i for i, parts in enumerate(names) if package in parts), default=-1) for package in ("hydra", "finetune_cli")}
    return deepest["hydra"] > deepest["finetune_cli"]


def _told(text: str, chain: list[BaseException], place: Place) -> UserError:
    text = re.sub(r"\n(Config search path:.*|See https://hydra\S* for details)", "", text, flags=re.DOTALL)
    for told in (_no_option, _no_match, _several_values, _list_for_section):
        problem = told(text, place)
        if problem:
            return together([problem])
    causes = [str(link) for link in chain[1:] if str(link) not in text]
    found = re.match(_IN, text) if text.startswith("In ") else re.search(r"\bin '(?P<file>[^']+)'", text)
    where = _file(found["file"], place) if found and found["file"] else "command line"
    return UserError(" ".join([text, *causes[:1]]), where=where, fix=f"ftune {place.verb} --help shows what can be set")


def _no_option(text: str, place: Place) -> Problem | None:
    """A name that a group does not have."""
    options = r"(?:\s+Available options in '[^']*':\n(?P<options>.*))?"
    found = re.match(_IN + r"Could not (?:find|load) '(?P<group>[^']+)/(?P<name>[^/']+)'\.?" + options, text, re.DOTALL)
    if not found:
        return None
    chosen = re.compile(rf"^\s*-?\s*(override\s+)?/?{re.escape(found['group'])}(@\S+)?\s*:\s*['\"]?{re.escape(found['name'])}\b")
    where = _line(chosen, place) or f"command line: {found['group']}={found['name']}"
    return no_choice(found["group"], found["name"], (found["options"] or "").split(), where)


def _no_match(text: str, place: Place) -> Problem | None:
    """A group that the defaults do not name."""
    found = re.match(_IN + r"Could not override '(?P<key>[^']+)'", text)
    if not found:
        return None
    key, where = found["key"], _file(found["file"], place) if found["file"] else f"command line: {found['key']}="
    if "@" in key:
        fix = "begin the experiment's file with '# @package _global_' and write 'override /model: …', with the slash"
        return Problem(f"'{key}' is no config group", where, fix)
    return Problem(f"'{key}' is not among the groups that ftune {place.verb} starts from", where, f"add it with a plus: +{key}=…")


def _several_values(text: str, _place: Place) -> Problem | None:
    found = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(\+\+)?(?P<setting>[^']*)'", text)
    if not found:
        return None
    setting = found["setting"]
    return Problem(f"{setting} has several values", f"command line: {setting}", "add -m (--multirun) for a job per value")


def _list_for_section(text: str, place: Place) -> Problem | None:
    found = re.match(_IN + r"\w+ raised while composing config:\s+Cannot merge DictConfig with ListConfig", text)
    if not found or not found["file"]:
        return None
    path = _file(found["file"], place)
    top = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader) if Path(path).is_file() else None
    pairs = top.value if isinstance(top, yaml.MappingNode) else []
    lists = [key for key, value in pairs if isinstance(value, yaml.SequenceNode) and key.value != "defaults"]
    where, what = (f"{path}:{lists[0].start_mark.line + 1}", lists[0].value) if lists else (path, "a section")
    return Problem(f"{what} is a list; expected a section of keys", where, f"write keys below {what}, each as key: value")


def _endless(place: Place) -> str:
    """The YAML file that holds something which contains itself."""
    for path in _reachable(place):
        try:
            json.dumps(yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")), default=str, skipkeys=True)
        except (ValueError, RecursionError):
            return str(path)
        except yaml.YAMLError:
            continue
    return "YAML or command line"


def _line(pattern: re.Pattern[str], place: Place) -> str:
    """``file:line`` of the first line of any YAML file in reach that matches."""
    for path in _reachable(place):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                return f"{path}:{number}"
    return ""


def _undecodable(place: Place) -> str:
    for path in _reachable(place):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return str(path)
    return "YAML"


def _reachable(place: Place) -> list[Path]:
    return [path for _, folder in reversed(place.folders) for path in sorted(Path(folder).rglob("*.yaml"))]


def _file(config: str, place: Place) -> str:
    """The file of a config name such as ``exp/sentiment``."""
    paths = (Path(folder) / f"{config}.yaml" for _, folder in place.folders)
    return str(next((path for path in paths if path.is_file()), config))
