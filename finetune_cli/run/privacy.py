"""Keeps secrets out of what a run writes down."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

SECRET_NAME = re.compile(
    r"(?:^|[._-])(?:token|secret|passw(?:or)?d|(?:api|access|private)_?key|credentials?)(?:$|[._-])",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|AKIA)[A-Za-z0-9_-]{6,}")
URL_USER = re.compile(r"(\w+://)[^/@\s]+@")
HIDDEN = "***"


def command_line(argv: Sequence[str]) -> str:
    """The words as typed into a shell, secrets replaced."""
    return shlex.join(hide(word) for word in argv)


def hide(word: str) -> str:
    """``word`` without passwords in URLs, known forms of tokens, values of keys named like a secret, and secrets of the environment."""
    key, sign, _ = word.partition("=")
    if sign and SECRET_NAME.search(key) and "/" not in key:
        return f"{key}={HIDDEN}"
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            word = word.replace(value, HIDDEN)
    return URL_USER.sub(rf"\1{HIDDEN}@", SECRET_VALUE.sub(HIDDEN, word))
