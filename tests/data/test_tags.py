"""Tags become spans and tags again in every scheme, mistakes are read as conlleval reads them, and the scheme is seen from the tags."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_cli.data.tags import Scheme, Span, TagError, invalid, recognise, spans, write

HOME = Path(os.environ.get("FTUNE_DATA", "/nonexistent"))
LETTERS = {"io": "I", "iob1": "BI", "iob2": "BI", "iobes": "BIES", "bmes": "BMES", "bilou": "BILU"}
TYPES = st.one_of(st.sampled_from(["PER", "LOC", "", "art-music", "O", "I", "B-PER", "E"]), st.text(max_size=4))
SCHEMES = st.sampled_from(list(Scheme))
PER, LOC = "PER", "LOC"


@st.composite
def entities(draw: st.DrawFn, *, apart: bool = False, types: st.SearchStrategy[str] = TYPES) -> tuple[list[Span], int]:
    """Spans in order and the number of words; ``apart``: none touches another of its type."""
    found: list[Span] = []
    at = 0
    for _ in range(draw(st.integers(0, 6))):
        start = at + draw(st.integers(0, 2))
        name = draw(types)
        if apart and found and found[-1][1:] == (start, name):
            start += 1
        at = start + draw(st.integers(1, 4))
        found.append((start, at, name))
    return found, at + draw(st.integers(0, 2))


@st.composite
def noisy(draw: st.DrawFn) -> tuple[list[str], Scheme]:
    """Tags in any order, right or wrong, and their scheme."""
    scheme = draw(SCHEMES)
    tag = st.one_of(st.just("O"), st.builds("{}-{}".format, st.sampled_from(list(LETTERS[scheme.value])), st.sampled_from([PER, LOC])))
    return draw(st.lists(tag, max_size=12)), scheme


@settings(deadline=None)
@given(entities(apart=True), SCHEMES)
def test_what_is_written_is_read_back(made: tuple[list[Span], int], scheme: Scheme) -> None:
    found, length = made
    tags = write(reversed(found), length, scheme)
    assert len(tags) == length
    assert spans(tags, scheme) == spans(tags, scheme, strict=True) == found
    assert invalid(tags, scheme) == []


@settings(deadline=None)
@given(entities())
def test_all_but_io_keep_touching_entities_apart(made: tuple[list[Span], int]) -> None:
    found, length = made
    for scheme in set(Scheme) - {Scheme.io}:
        assert spans(write(found, length, scheme), scheme, strict=True) == found


@settings(deadline=None)
@given(entities(apart=True), SCHEMES, SCHEMES)
def test_converting_there_and_back_changes_no_tag(made: tuple[list[Span], int], one: Scheme, other: Scheme) -> None:
    found, length = made
    tags = write(found, length, one)
    there = write(spans(tags, one), length, other)
    assert write(spans(there, other), length, one) == tags


EXAMPLE: list[Span] = [(0, 1, PER), (1, 3, LOC), (3, 4, LOC), (5, 8, PER)]
WRITTEN = {
    Scheme.iob1: "I-PER I-LOC I-LOC B-LOC O I-PER I-PER I-PER O",
    Scheme.iob2: "B-PER B-LOC I-LOC B-LOC O B-PER I-PER I-PER O",
    Scheme.iobes: "S-PER B-LOC E-LOC S-LOC O B-PER I-PER E-PER O",
    Scheme.bmes: "S-PER B-LOC E-LOC S-LOC O B-PER M-PER E-PER O",
    Scheme.bilou: "U-PER B-LOC L-LOC U-LOC O B-PER I-PER L-PER O",
}


@pytest.mark.parametrize("scheme", WRITTEN)
def test_each_scheme_by_hand(scheme: Scheme) -> None:
    assert " ".join(write(EXAMPLE, 9, scheme)) == WRITTEN[scheme]
    assert spans(WRITTEN[scheme].split(), scheme, strict=True) == EXAMPLE


def test_io_by_hand() -> None:
    assert write([(0, 2, PER), (2, 3, LOC), (4, 5, "art-music")], 5, Scheme.io) == ["PER", "PER", "LOC", "O", "art-music"]
    assert spans(["PER", "I-PER", "LOC", "LOC", "O", "LOC"], Scheme.io, strict=True) == [(0, 2, PER), (2, 4, LOC), (5, 6, LOC)]
    odd = [(0, 1, "O"), (1, 2, ""), (2, 3, "B-PER"), (3, 4, "I")]
    assert write(odd, 4, Scheme.io) == ["I-O", "I", "I-B-PER", "I-I"] and spans(write(odd, 4, Scheme.io), Scheme.io) == odd


def test_a_type_is_what_follows_the_first_dash() -> None:
    assert spans(["B-art-music", "I-art-music", "B", "I", "O"], Scheme.iob2, strict=True) == [(0, 2, "art-music"), (2, 4, "")]
    assert spans(["B_PER", "O"], Scheme.io) == [(0, 1, "B_PER")]
    assert spans(["B", "M", "E", "S", "O"], Scheme.bmes, strict=True) == [(0, 3, ""), (3, 4, "")]


@pytest.mark.parametrize(
    "wrong", [[(0, 0, PER)], [(2, 1, PER)], [(-1, 1, PER)], [(2, 4, PER)], [(0, 2, PER), (1, 3, LOC)], [(0, 1, PER)] * 2]
)
@pytest.mark.parametrize("scheme", Scheme)
def test_spans_that_no_tags_can_say(wrong: list[Span], scheme: Scheme) -> None:
    with pytest.raises(ValueError, match="span"):
        write(wrong, 3, scheme)


def test_io_refuses_to_merge() -> None:
    with pytest.raises(ValueError, match="apart"):
        write([(0, 1, PER), (1, 2, PER)], 2, Scheme.io)


REPAIRS = [
    # scheme, tags, spans, misplaced positions
    ("iob2", "I-PER I-PER", [(0, 2, PER)], [0]),  # I at the start
    ("iob2", "O I-PER O", [(1, 2, PER)], [1]),  # I after O
    ("iob2", "B-PER I-LOC I-LOC", [(0, 1, PER), (1, 3, LOC)], [1]),  # the type changes
    ("iob2", "B-PER I-LOC I-PER", [(0, 1, PER), (1, 2, LOC), (2, 3, PER)], [1, 2]),
    ("iob1", "O B-PER", [(1, 2, PER)], [1]),  # B that parts nothing
    ("iob1", "I-LOC B-PER I-PER", [(0, 1, LOC), (1, 3, PER)], [1]),
    ("iob1", "B-PER B-PER", [(0, 1, PER), (1, 2, PER)], [0]),
    ("iobes", "B-PER O", [(0, 1, PER)], [0]),  # not ended
    ("iobes", "B-PER I-PER O", [(0, 2, PER)], [1]),
    ("iobes", "B-PER I-PER", [(0, 2, PER)], [1]),  # not ended by the end
    ("iobes", "B-PER B-PER E-PER", [(0, 1, PER), (1, 3, PER)], [0]),  # B inside
    ("iobes", "B-PER S-PER", [(0, 1, PER), (1, 2, PER)], [0]),  # S inside
    ("iobes", "B-PER I-PER S-PER", [(0, 2, PER), (2, 3, PER)], [1]),
    ("iobes", "E-PER", [(0, 1, PER)], [0]),  # E at the start
    ("iobes", "O I-PER E-PER", [(1, 3, PER)], [1]),  # I after O
    ("iobes", "B-PER E-PER E-PER", [(0, 2, PER), (2, 3, PER)], [2]),  # E after E
    ("iobes", "B-PER E-PER I-PER E-PER", [(0, 2, PER), (2, 4, PER)], [2]),  # I after E
    ("iobes", "S-PER I-PER", [(0, 1, PER), (1, 2, PER)], [1]),  # I after S
    ("iobes", "S-PER E-PER", [(0, 1, PER), (1, 2, PER)], [1]),  # E after S
    ("iobes", "I-PER I-LOC E-LOC E-LOC", [(0, 1, PER), (1, 3, LOC), (3, 4, LOC)], [0, 1, 3]),
    ("bmes", "M-PER E-LOC", [(0, 1, PER), (1, 2, LOC)], [0, 1]),
    ("bmes", "O M-PER M-PER E-PER", [(1, 4, PER)], [1]),
    ("bilou", "L-PER U-PER I-PER L-PER", [(0, 1, PER), (1, 2, PER), (2, 4, PER)], [0, 2]),
    ("iob2", "I B I", [(0, 1, ""), (1, 3, "")], [0]),  # without types
]


@pytest.mark.parametrize(("name", "text", "expected", "positions"), REPAIRS, ids=[f"{name}: {text}" for name, text, _, _ in REPAIRS])
def test_repairs(name: str, text: str, expected: list[Span], positions: list[int]) -> None:
    scheme, tags = Scheme(name), text.split()
    assert spans(tags, scheme) == expected
    wrong = invalid(tags, scheme)
    assert [at for at, _ in wrong] == positions
    assert all(tags[at] in message and name in message for at, message in wrong)
    with pytest.raises(TagError) as caught:
        spans(tags, scheme, strict=True)
    assert caught.value.position == positions[0]
    assert caught.value.message == str(caught.value) == f"word {positions[0] + 1}: {wrong[0][1]}"


def may_follow(before: str, tag: str, scheme: Scheme) -> bool:
    """Each scheme's grammar, said anew: whether two neighbours are valid, ``O`` standing for both ends."""
    canonical = {"M": "I", "L": "E", "U": "S"} if scheme in (Scheme.bmes, Scheme.bilou) else {}
    (one, kind), (two, name) = ((canonical.get(t[0], t[0]), t[2:]) for t in (before, tag))
    goes_on = one in "BI" and kind == name
    if scheme is Scheme.io:
        return True
    if scheme is Scheme.iob1:
        return two != "B" or goes_on
    if scheme is Scheme.iob2:
        return two != "I" or goes_on
    return goes_on if two in "IE" else one not in "BI"


@settings(max_examples=400, deadline=None)
@given(noisy())
def test_strict_is_the_grammar_of_the_scheme(made: tuple[list[str], Scheme]) -> None:
    tags, scheme = made
    valid = all(may_follow(a, b, scheme) for a, b in zip(["O", *tags], [*tags, "O"], strict=True))
    assert (invalid(tags, scheme) == []) == valid
    if valid:
        assert spans(tags, scheme, strict=True) == spans(tags, scheme)
    else:
        with pytest.raises(TagError):
            spans(tags, scheme, strict=True)


@settings(max_examples=400, deadline=None)
@given(noisy())
def test_repaired_tags_are_valid_and_mean_the_same(made: tuple[list[str], Scheme]) -> None:
    tags, scheme = made
    found = spans(tags, scheme)
    repaired = write(found, len(tags), scheme)
    assert spans(repaired, scheme, strict=True) == found
    if scheme is not Scheme.io:
        assert [at for at, _ in invalid(tags, scheme)] == [at for at, (a, b) in enumerate(zip(tags, repaired, strict=True)) if a != b]
    covered = [at for start, end, _ in found for at in range(start, end)]
    assert covered == [at for at, tag in enumerate(tags) if tag != "O"], "no tagged word is lost"


NO_TAGS = ["PER", "X-PER", "", "o", "-PER", "O-PER", "b-PER", "BI-PER", "B_PER"]


@pytest.mark.parametrize("tag", NO_TAGS)
@pytest.mark.parametrize("scheme", sorted(set(Scheme) - {Scheme.io}))
def test_what_is_no_tag_is_named_with_its_place(tag: str, scheme: Scheme) -> None:
    for call in (lambda t: spans(t, scheme), lambda t: spans(t, scheme, strict=True), lambda t: invalid(t, scheme)):
        with pytest.raises(TagError) as caught:
            call(["O", "O", tag, "O"])
        assert caught.value.position == 2
        assert "word 3" in caught.value.message and repr(tag) in caught.value.message and "B-TYPE" in caught.value.message


@pytest.mark.parametrize(
    ("name", "tag"), [("iob2", "E-PER"), ("iob2", "S"), ("iobes", "M-PER"), ("bmes", "I-PER"), ("bilou", "E-PER"), ("io", "B-PER")]
)
def test_letters_of_another_scheme_are_no_tags(name: str, tag: str) -> None:
    with pytest.raises(TagError, match=f"word 1: '{tag}' is no {name} tag"):
        spans([tag], Scheme(name))


RECOGNISED = [
    ("iob2", [""]),
    ("iob2", ["O O", "O"]),
    ("iob2", ["B-PER I-PER O B-LOC", "O"]),
    ("iob2", ["O B-PER", "I-PER O"]),  # neither: a slip in iob2
    ("iob2", ["I-LOC B-PER"]),
    ("iob2", ["B I I B O"]),
    ("iob1", ["O I-PER I-PER", "I-LOC"]),
    ("iob1", ["I-PER B-PER I-PER O"]),
    ("iob1", ["I-PER I-LOC B-LOC"]),
    ("iob1", ["I-PER O I-PER O I-LOC", "O B-LOC I-LOC"]),  # a slip in iob1
    ("iob2", ["B-PER I-PER B-PER"]),
    ("iob2", ["I-PER O", "B-PER O"]),  # a row starts anew
    ("iobes", ["O B-PER I-PER", "E-PER O"]),
    ("iobes", ["B-PER E-PER", "O S-LOC"]),
    ("bmes", ["B-PER E-PER", "B-PER M-PER E-PER S-PER"]),
    ("bmes", ["B M E S"]),
    ("bilou", ["B-PER I-PER L-PER"]),
    ("bilou", ["O U-PER"]),
    ("io", ["O PER PER O"]),
    ("io", ["art-music O"]),
    ("iob1", ["B-PER O I-PER O I-PER"]),  # O parts
    ("iob2", ["O PER O B-PER"]),
]


@pytest.mark.parametrize(("name", "rows"), RECOGNISED, ids=[f"{name}: {' / '.join(rows)}" for name, rows in RECOGNISED])
def test_the_scheme_is_recognised(name: str, rows: list[str]) -> None:
    assert recognise(row.split() for row in rows) is Scheme(name)


@settings(deadline=None)
@given(st.lists(entities(apart=True, types=st.sampled_from([PER, LOC, "art-music"])), min_size=1), SCHEMES)
def test_what_is_written_is_valid_in_the_recognised_scheme(made: list[tuple[list[Span], int]], scheme: Scheme) -> None:
    """Where tags fit several schemes the one recognised may differ, but it says the same."""
    whole: list[Span] = [(0, 3, PER), (3, 4, LOC), (5, 6, LOC)]  # every letter but iob1's B
    rows = [*made, (whole, 6)]
    written = [write(found, length, scheme) for found, length in rows]
    assert recognise(written) is scheme
    assert [spans(tags, recognise(written), strict=True) for tags in written] == [found for found, _ in rows]


def rows_of(path: Path) -> Iterator[list[str]]:
    """The last column of a CoNLL file, sentence by sentence."""
    tags: list[str] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.strip():
            tags.append(line.split()[-1])
        elif tags:
            yield tags
            tags = []


# name, scheme, entities (of CoNLL-2003 by table 2 of Tjong Kim Sang and De Meulder 2003), misplaced tags that the file has
FILES = [
    ("conll2003/eng.train", Scheme.iob1, 23_499, [(10876, 12), (12314, 4)]),
    ("conll2003/eng.testa", Scheme.iob1, 5_942, []),
    ("conll2003/eng.testb", Scheme.iob1, 5_648, []),
    ("cner/train.char.bmes", Scheme.bmes, None, [(1835, 34), (1836, 0), (1892, 41), (1893, 0)]),  # entities cut by a line break
    ("cner/dev.char.bmes", Scheme.bmes, None, []),
    ("cner/test.char.bmes", Scheme.bmes, None, []),
]


@pytest.mark.skipif(not HOME.is_dir(), reason="FTUNE_DATA names no folder")
@pytest.mark.parametrize(("name", "scheme", "total", "misplaced"), FILES, ids=[name for name, *_ in FILES])
def test_real_files(name: str, scheme: Scheme, total: int | None, misplaced: list[tuple[int, int]]) -> None:
    rows = list(rows_of(HOME / name))
    assert recognise(rows) is scheme
    assert [(row, at) for row, tags in enumerate(rows) for at, _ in invalid(tags, scheme)] == misplaced
    found = [spans(tags, scheme) for tags in rows]
    begun = sum(tag[0] in "BS" for tags in rows for tag in tags) + len(misplaced) // 2
    assert sum(map(len, found)) == (begun if total is None else total)
    broken = {row for row, _ in misplaced}
    assert all(spans(tags, scheme, strict=True) == found[row] for row, tags in enumerate(rows) if row not in broken)
    for other in set(Scheme) - {Scheme.io}:
        some = random.Random(0).sample(range(len(rows)), 200)
        assert all(spans(write(found[i], len(rows[i]), other), other, strict=True) == found[i] for i in some)
