"""What may be said and written down: text without what steers a terminal, and without secrets."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from functools import cache

SECRET_NAME = re.compile(
    r"(?:^|[._-])(?:token|secret|\w*passw(?:or)?d|passphrase|(?:api|access|private|secret)_?key|credentials?|pat)(?:$|[._-])|[._-]pwd$",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|AKIA)[A-Za-z0-9_-]{6,}")
URL_USER = re.compile(r"(\w+://)[^/@\s]+@")
URL_KEY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|sig|signature|passw(?:or)?d|credential)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)
HIDDEN = "***"

_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
STEERING: dict[int, str | None] = {
    **dict.fromkeys([*range(0x20), 0x7F, *range(0x80, 0xA0), *_BIDI]),
    **dict.fromkeys([0x2028, 0x2029], " "),
    ord("\n"): "\n",
    ord("\t"): " ",
}


def plain(text: object) -> str:
    """The text without control characters and direction marks; line breaks stay, tabs become spaces."""
    return str(text).translate(STEERING)


def sayable(text: object) -> str:
    """The text as a person at a terminal, or a log, may be given it."""
    return plain(without_secrets(str(text)))


def command_line(argv: Sequence[str]) -> str:
    """The words as typed into a shell, secrets replaced."""
    return shlex.join(hide(word) for word in argv)


@cache
def names_secret(name: str) -> bool:
    """Whether a key or variable is named like something that nobody else may know."""
    return SECRET_NAME.search(name) is not None


def hide(word: str) -> str:
    """One word of a command without secrets; that is also the value of a key named like a secret."""
    key, sign, _ = word.partition("=")
    if sign and "/" not in key and names_secret(key):
        return f"{key}={HIDDEN}"
    return without_secrets(word)


def without_secrets(text: str) -> str:
    """The text without passwords and keys in URLs, known forms of tokens, and the values of variables named like a secret."""
    for name, value in os.environ.items():
        if len(value) >= 8 and names_secret(name):
            text = text.replace(value, HIDDEN)
    return URL_KEY.sub(rf"\1{HIDDEN}", URL_USER.sub(rf"\1{HIDDEN}@", SECRET_VALUE.sub(HIDDEN, text)))
