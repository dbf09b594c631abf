"""Entity metrics equal seqeval's and conlleval's on noisy tags, and on resamples what they are on the rows written out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_cli.data.tags import Scheme, Span, spans
from finetune_cli.metrics import score, values
from finetune_cli.metrics.entities import EntityRow, counts, entities, measures, per_row, report

Rows = list[list[Span]]
SEEDS = range(30)
NAMES = ["entity_f1", "entity_precision", "entity_recall", "entity_f1_macro", "entity_partial_f1"]


def noisy_tags(seed: int, letters: str = "BI") -> tuple[list[list[str]], list[list[str]]]:
    """Gold and predicted tags of some rows, agreeing now more and now less; anything may follow anything."""
    rng = np.random.default_rng(seed)
    alphabet = ["O", *(f"{letter}-{name}" for letter in letters for name in ("PER", "LOC", "art-music"))]
    gold, predicted = [], []
    for _ in range(int(rng.integers(1, 12))):
        true = rng.choice(alphabet, int(rng.integers(1, 15)))
        guess = np.where(rng.random(len(true)) < rng.random(), true, rng.choice(alphabet, len(true)))
        gold.append(true.tolist())
        predicted.append(guess.tolist())
    return gold, predicted


def read(rows: Sequence[Sequence[str]], scheme: Scheme = Scheme.iob2) -> Rows:
    return [spans(tags, scheme) for tags in rows]


def noisy(seed: int) -> tuple[Rows, Rows]:
    gold, predicted = noisy_tags(seed)
    return read(gold), read(predicted)


def conlleval(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, tuple[int, int, int]]:
    """(right, found, in the corpus) of each type as CoNLL's script finds them: word by word, no span ever made.

    Both columns run as one stream, rows parted by O. A chunk starts at B, at I after O, and at any change of type; it ends before
    a start or O. While a pair of chunks began together and neither ended alone it is right until both end together.
    """
    right, found, there = Counter[str](), Counter[str](), Counter[str]()
    pairs = [pair for true, guess in zip(gold, predicted, strict=True) for pair in [*zip(true, guess, strict=True), ("O", "O")]]
    last, together = ("O", "O"), False
    for pair in pairs:
        starts = [now[0] == "B" or (now[0] == "I" and (old == "O" or old[2:] != now[2:])) for old, now in zip(last, pair, strict=True)]
        ends = [old != "O" and (now == "O" or start) for old, now, start in zip(last, pair, starts, strict=True)]
        if together and any(ends):
            right[last[0][2:]] += all(ends)
            together = False
        there[pair[0][2:]] += starts[0]
        found[pair[1][2:]] += starts[1]
        together |= all(starts) and pair[0][2:] == pair[1][2:]
        last = pair
    return {name: (right[name], found[name], there[name]) for name in sorted(there | found) if name}


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_are_those_of_conlleval(seed: int) -> None:
    gold, predicted = noisy_tags(seed)
    assert counts(read(gold), read(predicted)) == conlleval(gold, predicted)


def test_one_conlleval_stream_by_hand() -> None:
    gold, predicted = [["B-A", "I-A", "O", "I-B", "I-A"]], [["B-A", "I-A", "I-A", "B-B", "B-A"]]
    assert conlleval(gold, predicted) == {"A": (1, 2, 2), "B": (1, 1, 1)}


@pytest.mark.parametrize("letters", ["BI", "BIES"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore")
def test_figures_are_those_of_seqeval(seed: int, letters: str) -> None:
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    tags = noisy_tags(seed, letters)
    scheme = Scheme.iob2 if letters == "BI" else Scheme.iobes
    gold, predicted = (read(rows, scheme) for rows in tags)
    found = entities(gold, predicted)
    for name, theirs in zip(NAMES, (seqeval.f1_score, seqeval.precision_score, seqeval.recall_score), strict=False):
        assert math.isclose(found[name], theirs(*tags, zero_division=0), abs_tol=1e-12)
    precision, recall, f1, support = seqeval.precision_recall_fscore_support(*tags, average=None, zero_division=0)
    rows = report(gold, predicted)
    assert [row.support for row in rows] == support.tolist()
    for column, name in ((precision, "precision"), (recall, "recall"), (f1, "f1")):
        assert np.allclose([getattr(row, name) for row in rows], column)
    in_gold = f1[support > 0]  # seqeval's own mean takes types that are only predicted, too
    assert math.isclose(found["entity_f1_macro"], in_gold.mean() if len(in_gold) else 0.0, abs_tol=1e-12)


def test_by_hand() -> None:
    gold: Rows = [[(0, 2, "PER"), (4, 5, "LOC")], [(1, 4, "ORG")], []]
    predicted: Rows = [[(0, 2, "PER"), (4, 6, "LOC")], [(1, 4, "PER")], [(0, 1, "MISC")]]
    assert counts(gold, predicted) == {"LOC": (0, 1, 1), "MISC": (0, 1, 0), "ORG": (0, 0, 1), "PER": (1, 2, 1)}
    found = entities(gold, predicted)
    assert list(found) == NAMES
    assert found["entity_precision"] == 1 / 4 and found["entity_recall"] == 1 / 3
    assert math.isclose(found["entity_f1"], 2 / 7)
    assert math.isclose(found["entity_f1_macro"], (0 + 0 + 2 / 3) / 3)  # MISC is in no gold span
    assert math.isclose(found["entity_partial_f1"], 2 * 1.5 / 7)
    assert report(gold, predicted)[3] == EntityRow("PER", 0.5, 1.0, 2 / 3, 1, 2)
    assert report(gold, predicted)[1] == EntityRow("MISC", 0.0, 0.0, 0.0, 0, 1)


PARTIAL = [
    # gold, predicted, exact + half the partial
    ([(0, 4, "A")], [(0, 2, "A"), (2, 4, "A")], 0.5),  # a gold span is matched once
    ([(0, 2, "A"), (2, 4, "A")], [(0, 4, "A")], 0.5),  # and so is a prediction
    ([(0, 4, "A")], [(0, 4, "A"), (1, 2, "A")], 1.0),  # exactly if possible
    ([(0, 4, "A")], [(0, 3, "B")], 0.0),  # of its type
    ([(0, 2, "A")], [(2, 4, "A")], 0.0),  # touching is no overlap
    ([(0, 2, "A"), (2, 6, "A")], [(1, 3, "A"), (3, 5, "A")], 1.0),  # from left to right: two pairs
    ([(0, 1, "A"), (0, 5, "B")], [(0, 2, "B"), (0, 2, "A")], 1.0),
]


@pytest.mark.parametrize(("gold", "predicted", "credit"), PARTIAL)
def test_partial_credit(gold: list[Span], predicted: list[Span], credit: float) -> None:
    assert entities([gold], [predicted])["entity_partial_f1"] == 2 * credit / (len(gold) + len(predicted))


@st.composite
def row(draw: st.DrawFn) -> list[Span]:
    cuts = sorted(draw(st.sets(st.integers(0, 10), max_size=8)))
    return [(a, b, draw(st.sampled_from("AB"))) for a, b in pairwise(cuts) if draw(st.booleans())]


def most_pairs(gold: list[Span], predicted: list[Span]) -> int:
    """The largest number of pairs, found by trying all."""
    if not predicted:
        return 0
    (start, end, name), rest = predicted[0], predicted[1:]
    best = most_pairs(gold, rest)
    for at, (begin, stop, other) in enumerate(gold):
        if name == other and start < stop and begin < end:
            best = max(best, 1 + most_pairs(gold[:at] + gold[at + 1 :], rest))
    return best


@settings(max_examples=300, deadline=None)
@given(row(), row())
def test_partial_pairs_are_as_many_as_can_be(gold: list[Span], predicted: list[Span]) -> None:
    exact = set(gold) & set(predicted)
    partial = most_pairs([s for s in gold if s not in exact], [s for s in predicted if s not in exact])
    table = per_row([gold], [predicted])
    assert (int(table.hits.sum()), int(table.partial[0])) == (len(exact), partial)
    found, turned = entities([gold], [predicted]), entities([predicted], [gold])
    assert found["entity_partial_f1"] == turned["entity_partial_f1"] and found["entity_precision"] == turned["entity_recall"]
    assert 0 <= found["entity_f1"] <= found["entity_partial_f1"] <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_resample_is_its_rows_written_out(seed: int) -> None:
    gold, predicted = noisy(seed)
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(gold), len(gold)) for _ in range(20)]
    build = measures(per_row(gold, predicted))
    weights = np.stack([np.bincount(rows, minlength=len(gold)) for rows in draws]).astype(np.float64)
    weighted = build(slice(None)).plain(weights)
    for i, rows in enumerate(draws):
        expected = entities([gold[r] for r in rows], [predicted[r] for r in rows])
        assert values(build(rows)) == pytest.approx(expected, abs=1e-12)
        assert {name: float(weighted[name][i]) for name in weighted} == pytest.approx(expected, abs=1e-12)


def test_nothing_to_count_is_zero_and_no_rows_are_undefined() -> None:
    assert entities([[], []], [[], []]) == dict.fromkeys(NAMES, 0.0)
    assert entities([[]], [[(0, 1, "PER")]]) == dict.fromkeys(NAMES, 0.0)
    assert all(math.isnan(value) for value in entities([], []).values())
    assert counts([], []) == {} and report([[]], [[]]) == []


def test_equal_spans_of_a_row_count_once() -> None:
    assert counts([[(0, 1, "A")]], [[(0, 1, "A"), (0, 1, "A")]]) == {"A": (1, 1, 1)}


def test_rows_must_be_as_many() -> None:
    for gold, predicted in (([[]], []), ([], [[]])):
        with pytest.raises(ValueError):
            per_row(gold, predicted)


def test_intervals_of_many_rows_are_quick_and_hold_the_value() -> None:
    rng = np.random.default_rng(0)
    gold: Rows = [[(0, 2, "PER"), (3, 4, "LOC")][: int(rng.integers(0, 3))] for _ in range(10_000)]
    predicted: Rows = [[(s, e + int(rng.random() < 0.2), name) for s, e, name in row] for row in gold]
    start = time.perf_counter()
    found = score(measures(per_row(gold, predicted)), len(gold), seed=0)
    assert time.perf_counter() - start < 20
    for name in NAMES:
        entry = found[name]
        assert entry["n"] == 10_000 and entry["low"] < entry["value"] < entry["high"], name
    assert abs(found["entity_f1"]["value"] - 0.8) < 0.02 and abs(found["entity_partial_f1"]["value"] - 0.9) < 0.02
