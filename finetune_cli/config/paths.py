"""Which values mean paths, and their absolute form: a relative path means the directory the user stands in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from finetune_cli.config.options import Option

DATA_ENDINGS = (
    *(".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".txt", ".gz", ".zst"),
    *(".conll", ".bio", ".iob", ".iob2", ".iobes", ".bioes", ".bmes", ".bilou"),
)
"""Endings that make a value a path even where no such file is found."""


def is_path(text: str) -> bool:
    """Whether a value can only be a path: by how it starts, by a data ending, or because it is a glob."""
    starts = text.startswith(("/", "./", "../", "~/")) or text in (".", "..", "~")
    return starts or text.lower().endswith(DATA_ENDINGS) or any(sign in text for sign in "*?[")


def absolute(option: Option, value: Any, base: Path) -> Any:
    """A value of a path option, made absolute where it means a path; hub ids, ``corpus:`` and ``hub:`` names stay."""
    if not option.is_path or value in (None, "", "-", "auto", "latest", "???"):
        return value
    if isinstance(value, (list, tuple)):
        return [absolute(option, item, base) for item in value]
    if not isinstance(value, str) or re.match(r"(corpus|hub):|[A-Za-z][\w+.-]+://", value):
        return value
    always = option.key.startswith("run.") or option.key == "output"
    expanded = os.path.expanduser(value)
    if always or is_path(value) or os.path.lexists(base / expanded):
        return os.path.normpath(base / expanded)
    return value
