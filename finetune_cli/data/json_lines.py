"""JSON Lines and JSON arrays of objects, read strictly: duplicate keys, NaN and bad lines are named with line and column.

Values keep their JSON types; a key that changes its type inside a file is an error, one that a row lacks is null there. Arrays are parsed
one object at a time, so a file is never a tree of Python objects.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from finetune_cli.data.encoding import Text
from finetune_cli.data.rows import BATCH, BYTES, Rows, count, listed, of_table
from finetune_cli.data.sources import SPLIT_WORDS
from finetune_cli.errors import UserError


class _Refused(ValueError):
    """Valid for Python's parser, but not JSON that means one thing."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Refused(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return made


def _constant(name: str) -> Any:
    raise _Refused(f"{name} is not JSON; write null or a number")


def _fix(text: Text) -> str:
    return "every line is one JSON object" + ("; for plain text that begins with a brace: format=text" if text.pipe else "")


ROW_KEYS = ("data", "rows", "examples", "items", "records", "instances", "samples", "dataset", "results", *SPLIT_WORDS)
"""Keys under which people keep a list of all rows."""
DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def read_json_lines(text: Text, notes: list[str]) -> Iterator[Rows]:
    """One object a line, in chunks."""
    if text.empty and not text.pipe:
        raise UserError(f"{text.name} is empty (0 bytes)", where=text.name, fix="check how the file was written")
    objects: list[dict[str, Any]] = []
    lines: list[int] = []
    row, blank, limit = 1, 0, BYTES
    for number, line in enumerate(text.lines(), 1):
        if not line.strip():
            blank += 1
            continue
        objects.append(_object(line, text, number, row + len(objects)))
        lines.append(number)
        if len(objects) >= BATCH or text.characters > limit or (text.pipe and not text.ready()):
            yield table_of(objects, lines, text.name, row)
            row, limit, objects, lines = row + len(objects), text.characters + BYTES, [], []
    if objects:
        if row == 1 and len(objects) == 1 and (inside := [key for key in ROW_KEYS if _is_rows(objects[0].get(key))]):
            raise _wrapped(inside, f"{text.name}:{lines[0]}")
        yield table_of(objects, lines, text.name, row)
        row += len(objects)
    if row == 1 and not text.pipe:
        raise UserError(f"{text.name} has no rows", where=text.name, fix="check how the file was written")
    if blank:
        notes.append(f"{text.name}: {count(blank, 'blank line')} skipped")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _wrapped(keys: Sequence[str], where: str) -> UserError:
    """The file is one object around the rows."""
    inside = " and ".join(f"key {key!r}" for key in keys)
    fix = f"write that list alone ([{{...}}, ...]; jq .{keys[0]} does), or one JSON object a line" + (
        ", a file a split" if keys[1:] else ""
    )
    return UserError(f"the file is one JSON object, and the rows are a list in its {inside}", where=where, fix=fix)


def _object(line: str, text: Text, number: int, row: int) -> dict[str, Any]:
    content = line.rstrip("\r\n")
    try:
        value = DECODER.decode(content)
    except json.JSONDecodeError as error:
        cut = text.open_end and error.pos >= len(content.rstrip()) - 1 or text.open_end and "Unterminated" in error.msg
        what = f"{_cause(error)}{': the file ends in the middle of a row' if cut else ''}"
        if number == 1 and content.lstrip().startswith("["):
            raise UserError("the file is one JSON array, not JSON Lines", where=f"{text.name}:1", fix="data.format=json") from None
        raise UserError(what, where=f"{text.name}:{number}:{error.colno}, row {row}", fix=_fix(text)) from None
    except (_Refused, RecursionError) as error:
        raise UserError(_refusal(error), where=f"{text.name}:{number}, row {row}", fix=_fix(text)) from None
    if not isinstance(value, dict):
        fix = "data.format=json" if isinstance(value, list) else "every line is one JSON object"
        raise UserError(f"the line is {_json_kind(value)}, not an object", where=f"{text.name}:{number}, row {row}", fix=fix)
    return value


def _refusal(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the object is nested too deeply"
    return str(error) if isinstance(error, _Refused) else "a number has too many digits"


def _cause(error: json.JSONDecodeError) -> str:
    """json's message in the form people search for; ``Extra data`` says what it is."""
    return "a second value after the object" if error.msg == "Extra data" else error.msg[:1].lower() + error.msg[1:]


def looks_like_lines(head: str) -> bool:
    """Whether text that begins with ``{`` is JSON Lines: its first line is an object by itself."""
    first = head.lstrip().partition("\n")[0]
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def looks_like_list(line: str) -> bool:
    """Whether a line is a JSON list of texts or objects by itself."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(value, (str, dict)) for value in found)


def read_json_array(text: Text) -> Iterator[Rows]:
    """The objects of one JSON array, in chunks."""
    if text.empty:
        raise UserError(f"{text.name} is empty (0 bytes)", where=text.name, fix="check how the file was written")
    objects: list[dict[str, Any]] = []
    lines: list[int] = []
    row, limit = 1, BYTES
    for value, line in _elements(text):
        if not isinstance(value, dict):
            raise UserError(
                f"element {row + len(objects)} is {_json_kind(value)}, not an object",
                where=f"{text.name}:{line}, row {row + len(objects)}",
                fix='a list of objects is read: [{"text": ..., "label": ...}, ...]'
                + ("; for plain text: format=text" if text.pipe else ""),
            )
        objects.append(value)
        lines.append(line)
        if len(objects) >= BATCH or text.characters > limit:
            yield table_of(objects, lines, text.name, row)
            row, limit, objects, lines = row + len(objects), text.characters + BYTES, [], []
    if objects:
        yield table_of(objects, lines, text.name, row)
        row += len(objects)
    if row == 1:
        raise UserError(f"{text.name} has no rows", where=text.name, fix="check how the file was written")


class _Window:
    """The part of the text that is not yet parsed, and the line it begins in."""

    def __init__(self, text: Text) -> None:
        self.blocks, self.name, self.ended = text.blocks(), text.name, False
        self.buffer, self.at, self.line, self.left = "", 0, 1, 0
        self.newlines = io.IncrementalNewlineDecoder(None, translate=True)

    def more(self) -> bool:
        """Drops what is parsed and at least doubles the rest; False at the end of the file."""
        if self.ended:
            return False
        parts, wanted = [self.buffer[self.at :]], max(1, len(self.buffer) - self.at)
        size = 0
        while size < wanted:
            block = next(self.blocks, None)
            if block is None:
                self.ended = True
                break
            parts.append(self.newlines.decode(block))
            size += len(parts[-1])
        if not size:
            return False
        self.left = self._column(self.at) - 1
        self.buffer, self.at = "".join(parts), 0
        return True

    def _column(self, at: int) -> int:
        """From 1; ``left`` characters of the first line were dropped already."""
        newline = self.buffer.rfind("\n", 0, at)
        return at - newline if newline >= 0 else self.left + at + 1

    def step(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def skip_space(self) -> str:
        """The next character that is not white space, or nothing at the end."""
        while True:
            rest = self.buffer[self.at : self.at + 4096]
            stripped = rest.lstrip(" \t\r\n")
            self.step(self.at + len(rest) - len(stripped))
            if stripped:
                return stripped[0]
            if self.at >= len(self.buffer) and not self.more():
                return ""

    def error(self, what: str, at: int | None = None, fix: str = "") -> UserError:
        at = self.at if at is None else at
        line = self.line + self.buffer.count("\n", self.at, at)
        return UserError(
            what,
            where=f"{self.name}:{line}:{self._column(at)}",
            fix=fix or "the file is a list of objects; one object a line: data.format=jsonl",
        )


def _elements(text: Text) -> Iterator[tuple[Any, int]]:
    """Each element of the array, and the line it begins in."""
    window = _Window(text)
    first = window.skip_space()
    if first == "{" and (inside := re.findall(rf'"({"|".join(ROW_KEYS)})"\s*:\s*\[\s*\{{', text.head)):
        raise _wrapped(list(dict.fromkeys(inside)), f"{window.name}:{window.line}")
    if first != "[":
        raise window.error("the file is not a list of objects")
    window.step(window.at + 1)
    if window.skip_space() != "]":
        while True:
            window.skip_space()
            line = window.line
            yield _element(window), line
            mark = window.skip_space()
            if mark == "]":
                break
            if mark != ",":
                raise window.error("the file ends inside the list" if not mark else "expecting ',' or ']' after the object")
            window.step(window.at + 1)
    window.step(window.at + 1)
    if window.skip_space():
        raise window.error("a second value after the list")


def _element(window: _Window) -> Any:
    while True:
        try:
            value, end = DECODER.raw_decode(window.buffer, window.at)
        except json.JSONDecodeError as error:
            if window.more():
                continue
            cut = ": the file ends inside the list" if error.pos >= len(window.buffer) - 1 else ""
            raise window.error(_cause(error) + cut, error.pos) from None
        except (_Refused, RecursionError) as error:
            raise window.error(_refusal(error)) from None
        if end == len(window.buffer) and window.more():  # a number may go on in the next block
            continue
        window.step(end)
        return value


def _json_kind(value: Any) -> str:
    kinds = ((type(None), "null"), (bool, "true or false"), (str, "a text"), (int, "a whole number"), (float, "a number"), (list, "a list"))
    return next((name for of, name in kinds if isinstance(value, of)), "an object")


def table_of(objects: list[dict[str, Any]], lines: Sequence[int], name: str, first_row: int) -> Rows:
    """Objects as Arrow columns, in the order in which keys first occur; a key without a type of its own is an error with its line."""
    keys: dict[str, None] = dict.fromkeys(key for made in objects for key in made) if _uneven(objects) else dict.fromkeys(objects[0])
    columns = [_column(key, objects, lines, name, first_row) for key in keys]
    if not columns:
        raise UserError(
            "the object has no keys", where=f"{name}:{lines[0]}, row {first_row}", fix='for example {"text": "...", "label": "..."}'
        )
    return of_table(pa.table(columns, names=list(keys)), name, np.array(lines, np.int64), first_row)


def _uneven(objects: list[dict[str, Any]]) -> bool:
    keys = objects[0].keys()
    return any(made.keys() != keys for made in objects)


def _column(key: str, objects: list[dict[str, Any]], lines: Sequence[int], name: str, first_row: int) -> pa.Array:
    values = [made.get(key) for made in objects]
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
        if (tuples := _tuples(values)) is not None:
            return tuples
        at, what, fix = _odd_value(values, str(error))
        raise UserError(f"{key!r} {what}", where=f"{name}:{lines[at]}, row {first_row + at}", fix=fix.format(repr(key))) from None


def _tuples(values: list[Any]) -> pa.Array | None:
    """Lists of lists that hold unlike things, such as ``[[0, 5, "PER"]]``, as lists of objects with keys 0, 1, 2; else None."""
    inner = [item for value in values if isinstance(value, list) for item in value]
    shapes = {len(item) if isinstance(item, list) else -1 for item in inner}
    if len(shapes) != 1 or shapes & {-1, 0} or any(value is not None and not isinstance(value, list) for value in values):
        return None
    keys = [str(i) for i in range(shapes.pop())]
    made = [None if value is None else [dict(zip(keys, item, strict=True)) for item in value] for value in values]
    try:
        return pa.array(made)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return None


def _odd_value(values: list[Any], cause: str) -> tuple[int, str, str]:
    """The first value that does not go with those before it, why, and how to mend it, with ``{}`` for the key."""
    wanted, one_type = "", "write {} with one type in every row"
    for i, value in enumerate(values):
        if value is None:
            continue
        found = _json_kind(value).replace("a whole number", "a number")
        wanted = wanted or found
        if found != wanted:
            return i, f"is {found} here, but {wanted} in the rows before", one_type
    for i, value in enumerate(values):
        try:
            pa.array([value])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            if isinstance(value, int):
                digits = len(str(abs(value)))
                return i, f"is a whole number of {digits} digits, more than 64 bits hold", "shorten it, or write {} as text in every row"
            return i, f"cannot be stored: {_json_kind(value)} out of range or of mixed content", one_type
        except UnicodeEncodeError:
            return i, "holds half of a surrogate pair, which is no character", "write the character itself, or both halves, in {}"
    low, high = 0, len(values)
    while high - low > 1:  # the shortest head that fails ends with the odd value
        middle = (low + high) // 2
        try:
            pa.array(values[:middle])
            low = middle
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            high = middle
    return high - 1, f"does not go with the rows before: {listed([cause.splitlines()[0]])}", one_type
