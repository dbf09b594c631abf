"""The saved form of a config: one YAML text that is enough to run again, and back through the same schema.

References to the environment (``${oc.env:NAME}``) stay references, so that no secret is written; everything else is resolved. Paths are
absolute, so that the text means the same in every directory.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune_cli import __version__
from finetune_cli.config.judge import judge, together
from finetune_cli.config.options import Tasks, options_of, plain, sections
from finetune_cli.config.schema import SCHEMAS
from finetune_cli.errors import UserError
from finetune_cli.storage import read_regular

LONGEST, MOST_BRACKETS = 1 << 20, 5_000
"""Characters of a saved config, and brackets in it: parsing takes the square of their number."""
_REFERENCE = re.compile(r"\$\{([^{}:]+)\}")
_notes = logging.getLogger("finetune_cli.config")


def dump(config: Any, references: Mapping[str, str] | None = None) -> str:
    """A config object (or nested dict) as YAML; ``references`` are dotted keys whose text stays unresolved."""
    values = _escaped(plain(config))
    for key, text in (references or {}).items():
        _put(values, key, text)
    return f"# ftune {__version__}\n" + OmegaConf.to_yaml(OmegaConf.create(values))


def load(path: Path, verb: str = "train", *, tasks: Tasks) -> Any:
    """The config object saved in a file. Keys that this version does not know are dropped with a warning.

    Raises UserError where the file is not a config, or holds values that the schema refuses.
    """
    config, problems = judge(SCHEMAS[verb], read(path, verb, tasks), tasks=tasks, where=lambda key: f"{path}: {key}", complete=False)
    if problems:
        raise together(problems)
    return config


def read(path: Path, verb: str, tasks: Tasks) -> dict[str, Any]:
    """The values in a saved config, resolved, without the keys that this version of the verb does not know."""
    try:
        values = OmegaConf.to_container(_tree(path), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the saved config cannot be resolved: {error}", where=str(path), fix="set what it refers to") from error
    assert isinstance(values, dict)
    drop_unknown(values, path, verb, tasks)
    return {str(key): value for key, value in values.items()}


def unresolved(path: Path, verb: str, tasks: Tasks) -> DictConfig:
    """The saved config as a tree whose references are kept, without the keys that this version of the verb does not know."""
    tree = _tree(path)
    values = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(values, dict)
    drop_unknown(values, path, verb, tasks)
    return OmegaConf.create(values)


def _tree(path: Path) -> DictConfig:
    try:
        text = read_regular(path).decode("utf-8")
        if len(text) > LONGEST or text.count("[") + text.count("{") > MOST_BRACKETS:
            raise ValueError("it is larger than what ftune writes, or nested more deeply")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it holds YAML aliases, which ftune does not write")
        tree = OmegaConf.load(io.StringIO(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        what = f"the saved config cannot be read: {' '.join(str(error).split())}"
        raise UserError(what, where=str(path), fix="restore the file or name another run") from error
    if not isinstance(tree, DictConfig) or "task" not in tree:
        raise UserError("the saved config holds no options", where=str(path), fix="name a run made by ftune train")
    return tree


def drop_unknown(values: dict[Any, Any], path: Path, verb: str, tasks: Tasks) -> None:
    """Take out, with a warning, every key that the verb does not know: another version wrote it."""
    table = options_of(verb, tasks)
    inner = sections(table)

    def walk(node: dict[Any, Any], prefix: str) -> None:
        for name in list(node):
            key = f"{prefix}{name}"
            if key in inner and isinstance(node[name], dict):
                walk(node[name], key + ".")
            elif key in inner:
                what = f"the section '{key}' of the saved config is {node[name]!r}, and no options"
                raise UserError(what, where=f"{path}: {key}", fix="restore the file or name another run")
            elif key not in table:
                del node[name]
                _notes.warning("warning: %s: the key '%s' is unknown to ftune %s and was dropped", path, key, __version__)

    walk(values, "")


def references(tree: DictConfig) -> dict[str, str]:
    """Dotted key to raw text of every value that comes from the environment, directly or through another key."""
    raw = dict(_raw(OmegaConf.to_container(tree, resolve=False), ""))
    tainted = {key: text for key, text in raw.items() if "${oc.env:" in text}
    while True:
        more = {key: text for key, text in raw.items() if key not in tainted and any(name in tainted for name in _REFERENCE.findall(text))}
        if not more:
            return tainted
        tainted |= more


def _raw(node: Any, prefix: str) -> list[tuple[str, str]]:
    if isinstance(node, dict):
        return [pair for key, item in node.items() for pair in _raw(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(node, list):
        return [pair for index, item in enumerate(node) for pair in _raw(item, f"{prefix}[{index}]")]
    return [(prefix, node)] if isinstance(node, str) and "${" in node else []


def escaped_at(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The values with one key's text made literal."""
    return values | {key: _escaped(values[key])}


def _escaped(node: Any) -> Any:
    """Literal ``${`` would be read back as a reference."""
    if isinstance(node, dict):
        return {key: _escaped(item) for key, item in node.items()}
    if isinstance(node, list):
        return [_escaped(item) for item in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node


def _put(values: dict[str, Any], key: str, text: str) -> None:
    *outer, last = re.findall(r"[^.\[\]]+", key)
    node: Any = values
    for name in outer:
        node = node[int(name) if isinstance(node, list) else name]
    node[int(last) if isinstance(node, list) else last] = text
