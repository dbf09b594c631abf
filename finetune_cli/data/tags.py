"""Tags of named entities: one a word, in six schemes, read into spans and written back.

All schemes say the same with four roles: B begins an entity, I goes on, E ends it, S is an entity of one word. A tag is a letter
for the role, ``-``, and the type (what follows the first dash); a letter alone is an entity without a type, and ``O`` is outside.
``io`` knows I only and may leave it out: ``PER`` is ``I-PER``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

Span = tuple[int, int, str]
"""(start, end, type) in words counted from 0; the end is exclusive."""
_Role = tuple[str, str]
"""A role out of B, I, E, S, O, and a type."""


class Scheme(str, Enum):
    io = "io"
    """Types only: entities of one type that touch run together."""
    iob1 = "iob1"
    """I, and B only where an entity follows another of its type at once (Ramshaw and Marcus 1995, arXiv:cmp-lg/9505040)."""
    iob2 = "iob2"
    """B on the first word of every entity, I on the others (Tjong Kim Sang and Veenstra 1999, arXiv:cs/9907006)."""
    iobes = "iobes"
    bmes = "bmes"
    """iobes with M for I."""
    bilou = "bilou"
    """iobes with L for E and U for S (Ratinov and Roth 2009)."""


_LETTERS: dict[Scheme, dict[str, str]] = {
    Scheme.io: {"I": "I"},
    Scheme.iob1: {"B": "B", "I": "I"},
    Scheme.iob2: {"B": "B", "I": "I"},
    Scheme.iobes: {"B": "B", "I": "I", "E": "E", "S": "S"},
    Scheme.bmes: {"B": "B", "I": "M", "E": "E", "S": "S"},
    Scheme.bilou: {"B": "B", "I": "I", "E": "L", "S": "U"},
}
"""Role to letter."""
_ROLES = {scheme: {letter: role for role, letter in letters.items()} for scheme, letters in _LETTERS.items()}
_PREFIXES = frozenset("BIMESLU")
_OUTSIDE: _Role = ("O", "")


class TagError(ValueError):
    """A word's tag is none of its scheme, or may not stand where it does. ``position`` counts words from 0, the message from 1."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.message, self.position = message, position


def recognise(sequences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme that tags are written in, by the letters that occur: M is bmes, else L or U bilou, else E or S iobes.

    With B and I only it is the one of iob1 and iob2 with fewer misplaced tags (entities that start with I against B that do not
    stand directly after a word of their type: eng.train of CoNLL-2003 is iob1 but for two tags), iob2 if equal. Tags without such
    letters are io; nothing but ``O`` is iob2. A tag that does not fit the others changes nothing here: ``spans`` refuses it.
    """
    letters: set[str] = set()
    not_iob1 = not_iob2 = 0
    for tags in sequences:
        before = _OUTSIDE
        for tag in tags:
            letter, _, name = tag.partition("-")
            if letter not in _PREFIXES:
                before, letter = _OUTSIDE, "O" if letter == "O" else "a bare type"
            else:
                touches = before != _OUTSIDE and before[1] == name
                not_iob2 += letter == "I" and not touches
                not_iob1 += letter == "B" and not touches
                before = letter, name
            letters.add(letter)
    if "M" in letters:
        return Scheme.bmes
    if letters & {"L", "U"}:
        return Scheme.bilou
    if letters & {"E", "S"}:
        return Scheme.iobes
    if letters & {"B", "I"}:
        return Scheme.iob1 if not_iob1 < not_iob2 else Scheme.iob2
    return Scheme.io if "a bare type" in letters else Scheme.iob2


def spans(tags: Sequence[str], scheme: Scheme, *, strict: bool = False) -> list[Span]:
    """The entities of one sequence, in order. A tag that is none of the scheme raises TagError; so does, if ``strict``, a misplaced one.

    Otherwise misplaced tags are read as the evaluation script of CoNLL-2000 and 2003 reads them (``conlleval``; E and S as in
    its successors): B and S always start an entity; I and E do at the start, after O, E and S, and where the type changes; an
    entity goes on until the next one starts, or O. So ``I-PER I-LOC E-LOC E-LOC`` are three.
    """
    roles = _read(tags, scheme)
    found = _spans(roles)
    if strict:
        for position, message in _misplaced(roles, found, scheme):
            raise TagError(f"word {position + 1}: {message}", position)
    return found


def invalid(tags: Sequence[str], scheme: Scheme) -> list[tuple[int, str]]:
    """Misplaced tags, each as (position, what is wrong): those that change where the sequence is read by ``spans`` and written again.

    In ``B-PER O`` of iobes it is the B, which ought to be S. A tag that is none of the scheme raises TagError.
    """
    roles = _read(tags, scheme)
    return _misplaced(roles, _spans(roles), scheme)


def write(spans: Iterable[Span], length: int, scheme: Scheme = Scheme.iob2) -> list[str]:
    """The tags of ``length`` words with these entities, in any order; ``spans`` reads them back.

    Raises ValueError for spans that are empty, overlap or leave the sequence, and for touching ones of one type in io, which merges them.
    """
    return [_tag(role, scheme) for role in _roles(spans, length, scheme)]


def _read(tags: Sequence[str], scheme: Scheme) -> list[_Role]:
    roles = _ROLES[scheme]
    read = []
    for position, tag in enumerate(tags):
        letter, _, name = tag.partition("-")
        if tag == "O":
            read.append(_OUTSIDE)
        elif letter in roles:
            read.append((roles[letter], name))
        elif scheme is Scheme.io and _is_bare(tag):
            read.append(("I", tag))
        else:
            expected = "TYPE" if scheme is Scheme.io else ", ".join(f"{letter}-TYPE" for letter in roles)
            raise TagError(f"word {position + 1}: {tag!r} is no {scheme.value} tag; expected {expected} or O", position)
    return read


def _is_bare(tag: str) -> bool:
    """Whether this is a type on its own: ``art-music`` is, ``B-PER`` and ``O`` are not."""
    letter = tag.partition("-")[0]
    return tag != "" and letter != "O" and letter not in _PREFIXES


def _spans(roles: Sequence[_Role]) -> list[Span]:
    found: list[Span] = []
    first = -1  # of the entity that is open
    before = _OUTSIDE
    for at, (role, name) in enumerate(roles):
        starts = role in ("B", "S") or (role != "O" and (before[0] in ("O", "E", "S") or before[1] != name))
        if first >= 0 and (starts or role == "O"):
            found.append((first, at, before[1]))
            first = -1
        if starts:
            first = at
        before = role, name
    return [*found, (first, len(roles), before[1])] if first >= 0 else found


def _misplaced(roles: Sequence[_Role], found: Sequence[Span], scheme: Scheme) -> list[tuple[int, str]]:
    valid = _roles(found, len(roles), scheme)
    pairs = enumerate(zip(roles, valid, strict=True))
    return [(at, f"{_tag(is_, scheme)} where {scheme.value} expects {_tag(ought, scheme)}") for at, (is_, ought) in pairs if is_ != ought]


def _roles(spans: Iterable[Span], length: int, scheme: Scheme) -> list[_Role]:
    roles = [_OUTSIDE] * length
    last: Span = (0, 0, "")
    for span in sorted(spans):
        start, end, name = span
        if not 0 <= start < end <= length:
            raise ValueError(f"the span {span} does not lie in {length} words")
        if start < last[1]:
            raise ValueError(f"the spans {last} and {span} overlap")
        touches = last[1] > 0 and last[1:] == (start, name)
        if touches and scheme is Scheme.io:
            raise ValueError(f"io cannot tell the spans {last} and {span} apart")
        roles[start:end] = [("I", name)] * (end - start)
        if scheme is not Scheme.io and (touches or scheme is not Scheme.iob1):
            roles[start] = ("B", name)
        if "E" in _LETTERS[scheme]:
            roles[end - 1] = ("E" if end - start > 1 else "S", name)
        last = span
    return roles


def _tag(role: _Role, scheme: Scheme) -> str:
    if role == _OUTSIDE:
        return "O"
    letter, name = _LETTERS[scheme][role[0]], role[1]
    if scheme is Scheme.io and _is_bare(name):
        return name
    return f"{letter}-{name}" if name else letter
