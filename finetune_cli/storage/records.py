"""JSON as ftune writes it: the same value gives the same bytes, NaN is null, and a sealed record carries its own checksum."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: NaN and infinities become null, NumPy scalars numbers, tuples lists, paths text."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (Path, bytes)):
        return os.fsdecode(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    raise TypeError(f"not a JSON value: {type(value).__name__}")


def _encode(value: Any, **options: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **options).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json.dumps(value, ensure_ascii=True, allow_nan=False, **options).encode()


def json_bytes(value: Any) -> bytes:
    """Readable JSON in a file of its own; NaN is null."""
    return _encode(plain(value), indent=2) + b"\n"


def json_line(value: Any) -> bytes:
    """One line of JSON; NaN is null; the same value gives the same bytes."""
    return _encode(plain(value)) + b"\n"


def parsed(raw: bytes | str) -> Any:
    """The value in a JSON text that anybody may have written; ``ValueError`` for whatever is wrong with it."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_number(value: Any) -> bool:
    """Whether a value of such a text is a number to reckon with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


SEAL = re.compile(rb'(\{.*),\n "seal": "([0-9a-f]{64})"\n\}\n', re.DOTALL)


def seal(record: dict[str, Any]) -> bytes:
    """JSON whose last line is the sha256 of all before it: a damaged or half-written record cannot pass. NaN is null."""
    if "seal" in record or not record:
        raise ValueError("a sealed record has content and no key 'seal'")
    body = _encode(plain(record), sort_keys=True, indent=1).removesuffix(b"\n}")
    return body + b',\n "seal": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def unseal(raw: bytes) -> dict[str, Any]:
    """The record of ``seal``; ``ValueError`` if a single byte differs."""
    found = SEAL.fullmatch(raw)
    if found is None or hashlib.sha256(found[1]).hexdigest().encode() != found[2]:
        raise ValueError("damaged: its own checksum does not match")
    record = parsed(raw)
    record.pop("seal")
    return cast(dict[str, Any], record)
