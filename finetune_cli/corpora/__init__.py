"""The corpora that travel with the package, addressed as ``corpus:NAME/FILE``; README.md beside this file says how they were made."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from finetune_cli.errors import UserError

SCHEME = "corpus:"
_HERE = Path(__file__).parent


def names() -> list[str]:
    """Every ``NAME/FILE`` there is."""
    return sorted(path.relative_to(_HERE).as_posix() for path in _HERE.glob("*/*.jsonl"))


def path(name: str) -> Path:
    """The file of ``NAME/FILE``, with or without the scheme; nothing outside the shipped files can be named."""
    wanted, known = name.removeprefix(SCHEME), names()
    if wanted in known:
        return _HERE / wanted
    near = [n for n in known if n.startswith(wanted.rstrip("/") + "/")] or get_close_matches(wanted, known, n=3, cutoff=0.5) or known
    raise UserError(f"there is no shipped corpus file {wanted!r}", where=name, fix="use " + " or ".join(SCHEME + n for n in near[:6]))
