"""The options as a flat table: dotted key to type, default and meaning, read from the dataclasses of the schema.

The command line, the judge of a config, the saved form and the help all walk this one table.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any

from finetune_cli.config.schema import SCHEMAS, TaskConfig

Tasks = Mapping[str, type[TaskConfig]]
"""Name of a task to the dataclass of its options."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its dotted key, its type without ``None``, whether null is allowed, its default and what ``option(...)`` says."""

    key: str
    kind: Any
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def is_path(self) -> bool:
        return bool(self.metadata.get("path"))

    @property
    def form(self) -> str:
        """Name of the form that the values of an ``Any`` option have."""
        return str(self.metadata.get("form", ""))

    @property
    def is_text(self) -> bool:
        """Whether a value is text, which the command line takes as it stands."""
        return self.kind is str or self.form in ("rows", "columns", "column", "names", "checkpoint")

    @property
    def type_name(self) -> str:
        """The type in words, for help."""
        return _in_words(self.kind) + (" or null" if self.optional and self.kind is not Any else "")


def _in_words(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(str(member.value) for member in kind)
    if typing.get_origin(kind) is list:
        return f"list of {_in_words(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return f"{_in_words(typing.get_args(kind)[1])} by name"
    return {str: "text", int: "integer", float: "number", bool: "true | false"}.get(kind, "value")


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, Any, bool, Any, Mapping[str, Any]], ...]:
    """(name, type without None, nullable, default, metadata) of each field of an options class."""
    hints = typing.get_type_hints(cls)
    found = []
    for f in fields(cls):
        hint = hints[f.name]
        optional = hint is Any
        if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
            inner = [kind for kind in typing.get_args(hint) if kind is not NoneType]
            optional, hint = len(inner) < len(typing.get_args(hint)), inner[0]
        default = f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None
        found.append((f.name, hint, optional, default, f.metadata))
    return tuple(found)


def options(cls: type, prefix: str = "", *, task: type[TaskConfig] = TaskConfig) -> dict[str, Option]:
    """Every option of an options class by dotted key, in the order of the schema; ``task`` stands in for the section ``task``."""
    table: dict[str, Option] = {}
    for name, kind, optional, default, metadata in _fields(cls):
        key = prefix + name
        if isinstance(kind, type) and is_dataclass(kind):
            table |= options(task if kind is TaskConfig else kind, key + ".", task=task)
        else:
            table[key] = Option(key, kind, optional, default, metadata)
    return table


def options_of(verb: str, tasks: Tasks) -> dict[str, Option]:
    """Every option that the verb has with any task."""
    table = options(SCHEMAS[verb])
    for task in tasks.values():
        table |= options(task, "task.")
    return table


def sections(table: Mapping[str, Option]) -> set[str]:
    """The sections of a table: ``train`` of ``train.epochs``."""
    return {key.rpartition(".")[0] for key in table if "." in key}


def build(cls: type, values: Mapping[str, Any], prefix: str = "", *, task: type[TaskConfig] = TaskConfig) -> Any:
    """The options class filled from a flat table of judged values; what is absent keeps its default."""
    arguments = {}
    for name, kind, *_ in _fields(cls):
        key = prefix + name
        if isinstance(kind, type) and is_dataclass(kind):
            arguments[name] = build(task if kind is TaskConfig else kind, values, key + ".", task=task)
        elif key in values:
            arguments[name] = values[key]
    return cls(**arguments)


def plain(value: Any) -> Any:
    """A config object as nested dicts, lists and scalars; enums by value."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def near(key: str, names: list[str]) -> list[str]:
    """Up to three names that a mistyped key may mean: the same last part first, then the same letters."""
    leaf = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    alike = difflib.get_close_matches(key, names, 2, 0.7 if len(key) > 4 else 0.6)
    leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
    parts = [leaves[hit] for hit in difflib.get_close_matches(leaf, list(leaves), 1, 0.75)]
    return list(dict.fromkeys([*same, *alike, *parts]))[:3]
