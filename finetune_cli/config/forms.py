"""What values look like: conversion to an option's type, and the forms that a type cannot describe.

``convert`` returns the value as its option wants it or raises ``ValueError`` with what was expected, in words.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from finetune_cli.config.options import Option
from finetune_cli.config.schema import COUNT

SHAPE = ("layers", "hidden", "heads", "intermediate", "vocabulary", "positions")
"""Keys of ``model.shape``."""
_EXPECTATION = re.compile(r"\s*(>=|<=|>|<)\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


class PartError(ValueError):
    """What is wrong with one value of several by name: its name, what stands there, what was expected, how to mend it."""

    def __init__(self, name: str, found: Any, expected: str, fix: str) -> None:
        super().__init__(expected)
        self.name, self.found, self.fix = name, found, fix


def convert(value: Any, option: Option) -> Any:
    """``value`` in the option's type and form; ValueError says what was expected."""
    if value is None:
        if option.optional:
            return None
        raise ValueError(f"{_expected(option.kind)}, not null")
    converted = _typed(value, option.kind)
    return FORMS[option.form](converted) if option.form else converted


def _typed(value: Any, kind: Any) -> Any:
    if kind is Any:
        return value
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(value, kind)
    if typing.get_origin(kind) is list:
        return [_typed(item, typing.get_args(kind)[0]) for item in _items(value)]
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise ValueError("values by name, such as {name: value}")
        return {str(key): _typed(item, typing.get_args(kind)[1]) for key, item in value.items()}
    return {str: _text, bool: _boolean, int: _integer, float: _number}[kind](value)


def _member(value: Any, kind: type[Enum]) -> Enum:
    if isinstance(value, kind):
        return value
    for member in kind:
        if member.value == value:
            return member
    raise ValueError("one of " + ", ".join(str(member.value) for member in kind))


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return [value]
    raise ValueError("a list, such as [a, b]")


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("text (in YAML, put quotes around it)")  # noqa: TRY004
    return str(value)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false", "yes", "no", "on", "off"):
        return str(value).lower() in ("true", "yes", "on")
    raise ValueError("true or false")


def _integer(value: Any) -> int:
    number = _number(value, "an integer")
    if not math.isfinite(number) or number != int(number):
        raise ValueError("an integer")
    return int(value) if isinstance(value, int) else int(number)


def _number(value: Any, expected: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(expected)  # noqa: TRY004
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(expected) from None


def _expected(kind: Any) -> str:
    """What a null should have been."""
    try:
        _typed(object(), kind)
    except ValueError as error:
        return str(error)
    return "a value"


def _rows(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, str) and item for item in value):
            return list(value)
        raise ValueError("a list of files, with no list in it")
    if isinstance(value, bool) or not isinstance(value, (str, float, int)) or value == "":
        raise ValueError("a file, directory, glob, list of them, or data set")
    if isinstance(value, str) or 0 < value < 1:
        return value
    raise ValueError("a share above 0 and below 1")


def _columns(value: Any) -> str | list[str]:
    """One column name, or a list of them."""
    if isinstance(value, (list, tuple)):
        names = [_text(item) for item in value]
        if not names or len(set(names)) < len(names):
            raise ValueError("a list of different columns")
        return names
    return _text(value)


def _names(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value:
        return [_text(item) for item in value]
    if isinstance(value, str) and value:
        return value
    raise ValueError("a list of names, or a file with one name a line")


def _checkpoint(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        raise ValueError("one run; an ensemble of several is not supported by this version")  # noqa: TRY004
    return _text(value)


def _steps(value: Any) -> int | str:
    if value == "epoch":
        return "epoch"
    try:
        steps = _integer(value)
    except ValueError:
        raise ValueError("a number of steps, or 'epoch'") from None
    if not 1 <= steps <= COUNT:
        raise ValueError("from 1 to 10^12 steps, or 'epoch'")
    return steps


def _warmup(value: float) -> float:
    if value > 1 and value % 1 != 0:
        raise ValueError("a share below 1, or a whole number of steps")
    return value


def _processes(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    try:
        number = _integer(value)
    except ValueError:
        raise ValueError("a number of processes, or 'auto'") from None
    if not 1 <= number <= 4096:
        raise ValueError("from 1 to 4096 processes, or 'auto'")
    return number


def _automatic(value: Any) -> bool | str:
    if value == "auto" or isinstance(value, bool):
        return value  # type: ignore[no-any-return]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("true, false, or 'auto'")


def _betas(value: list[float]) -> list[float]:
    if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
        raise ValueError("two numbers from 0 to below 1")
    return value


def _threshold(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    try:
        number = _number(value)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise ValueError("a number above 0 and below 1, or 'auto'")
    return number


def _expectations(value: dict[str, Any]) -> dict[str, Any]:
    for metric, text in value.items():
        if not isinstance(text, str) or not _EXPECTATION.fullmatch(text):
            fix = f"expect.{metric}='>=0.8', or with <=, > or < and a number"
            raise PartError(metric, text, "a comparison with a number", fix)
    return value


def _shape(value: dict[str, int]) -> dict[str, int]:
    unknown = [key for key in value if key not in SHAPE]
    if unknown:
        close = difflib.get_close_matches(unknown[0], SHAPE, 1)
        fix = f"did you mean model.shape.{close[0]}?" if close else f"name one of {', '.join(SHAPE)}"
        raise PartError(unknown[0], value[unknown[0]], f"one of the keys {', '.join(SHAPE)}", fix)
    if any(not 1 <= number <= COUNT for number in value.values()):
        raise ValueError("numbers from 1 to 10^12")
    return value


def _targets(value: Any) -> str | list[str]:
    """``auto``, ``all-linear``, or names of layers."""
    if value in ("auto", "all-linear"):
        return str(value)
    names = [value] if isinstance(value, str) else value
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) and name for name in names):
        return list(dict.fromkeys(names))
    raise ValueError("auto, all-linear, or a list of names of layers such as [query, value]")


def _parallel(value: Any) -> str:
    """``FROM:TO``: two different parts of file names."""
    one, _, other = _text(value).partition(":")
    if not re.fullmatch(r"[\w-]+", one) or not re.fullmatch(r"[\w-]+", other) or one == other:
        raise ValueError("two different parts of file names, such as en:de")
    return f"{one}:{other}"


FORMS: dict[str, Callable[[Any], Any]] = {
    "rows": _rows,
    "columns": _columns,
    "names": _names,
    "parallel": _parallel,
    "checkpoint": _checkpoint,
    "steps": _steps,
    "processes": _processes,
    "automatic": _automatic,
    "warmup": _warmup,
    "betas": _betas,
    "threshold": _threshold,
    "expectations": _expectations,
    "shape": _shape,
    "targets": _targets,
}
"""Forms that ``option(form=...)`` may name."""
