"""Reading back what a run wrote, also after a death in the middle of a line."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from finetune_cli.errors import UserError
from finetune_cli.storage import FileSystem, parsed, read_regular


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def read(path: Path, *, start: int = 0, size: int = -1) -> bytes:
    """A file's bytes, or ``size`` of them from ``start`` on; none where there is no file."""
    try:
        return read_regular(path, start=start, size=size)
    except FileNotFoundError:
        return b""


def object(path: Path) -> dict[str, Any]:
    try:
        found = parsed(read_regular(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a last line without its end is not there yet."""
    records = []
    for number, line in enumerate(read(path).split(b"\n")[:-1], 1):
        try:
            records.append(dict(parsed(line)))
        except (ValueError, TypeError) as error:
            raise UserError("not a record of JSON", where=f"{path}:{number}", fix="copy the file back from a backup") from error
    return records


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The same of a file that is no authority: what is not a record is passed over."""
    records = []
    for line in read(path).split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, TypeError):
            records.append(dict(parsed(line)))
    return records


def hex_number(value: Any) -> bool:
    """Whether a value of such a file is a number in hex to reckon with."""
    try:
        return math.isfinite(float.fromhex(value))
    except (ValueError, TypeError, OverflowError):
        return False


def drop_torn_line(fs: FileSystem, path: Path) -> None:
    """Cuts a last line that a death left without its end, so that the next record starts on a line of its own."""
    data = read(path)
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        fs.truncate(path, whole)
