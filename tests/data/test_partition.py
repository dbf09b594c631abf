"""Which rows become validation and test: exact, stable, seeded."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from finetune_cli.data.partition import by_time, grouped, seats, shuffled, sizes, stratified


def whole(parts: tuple[np.ndarray, ...], n: int) -> None:
    """Every row is in exactly one part, each part in file order."""
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert all((np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fractions", [[0.1], [0.1, 0.2], [0.5], [0.45, 0.45]])
def test_stratified_is_exact(seed: int, fractions: list[float]) -> None:
    draw = random.Random(seed)
    labels = draw.choices("abcdefgh", weights=[50, 30, 10, 5, 2, 2, 1, 1], k=draw.randint(300, 1200)) + ["lonely"]
    parts = stratified(labels, fractions, seed)
    whole(parts, len(labels))
    counts = Counter(labels)
    assert [len(part) for part in parts[1:]] == sizes(len(labels), fractions)
    for part, fraction in zip(parts[1:], fractions, strict=True):
        own = Counter(labels[i] for i in part)
        assert own["lonely"] == 0
        for label, number in counts.items():
            assert number == 1 or abs(own[label] - number * fraction) <= 1.5, f"{label}: {own[label]} of {number}"
    assert {labels[i] for i in parts[0]} == set(labels), "every class stays in train"


def test_the_seed_alone_decides() -> None:
    labels = ["a", "b"] * 200
    same = [stratified(labels, [0.1], 7)[1].tolist() for _ in range(2)]
    assert same[0] == same[1] != stratified(labels, [0.1], 8)[1].tolist()


def test_the_draw_is_the_same_on_every_machine() -> None:
    assert stratified(["a", "b"] * 20, [0.2], 42)[1].tolist() == [0, 9, 11, 12, 13, 15, 16, 30]
    assert shuffled(40, [0.2], 42)[1].tolist() == [20, 22, 24, 25, 30, 32, 35, 37]


def test_a_sorted_file_gives_both_classes_to_both_parts() -> None:
    labels = ["1"] * 400 + ["0"] * 800
    parts = stratified(labels, [0.1], 0)
    assert Counter(labels[i] for i in parts[1]) == {"1": 40, "0": 80}


def test_one_class_does_not_disturb_the_draw_of_another() -> None:
    before = stratified(["a"] * 100, [0.1], 3)[1].tolist()
    after = stratified(["a"] * 100 + ["b"] * 100, [0.1], 3)[1]
    assert [i for i in after if i < 100] == before


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10, 11, 1000])
def test_sizes_leave_rows_on_every_side(n: int) -> None:
    for fraction in (0.01, 0.1, 0.5, 0.9, 0.999):
        (size,) = sizes(n, [fraction])
        assert 1 <= size < n
    assert sizes(1000, [0.1, 0.25]) == [100, 250]


def test_seats_respect_room() -> None:
    given = seats(np.array([10, 1, 1, 1]), 5, np.array([9, 0, 0, 0]))
    assert given.tolist() == [5, 0, 0, 0]
    assert seats(np.array([1, 1]), 1, np.array([0, 0])).tolist() == [0, 0]


def test_shuffled() -> None:
    parts = shuffled(101, [0.1, 0.1], 1)
    whole(parts, 101)
    assert [len(p) for p in parts] == [81, 10, 10]


def test_groups_stay_together() -> None:
    draw = random.Random(0)
    codes = np.array([draw.randrange(60) for _ in range(1000)])
    codes = np.unique(codes, return_inverse=True)[1]
    parts = grouped(codes, [0.1, 0.2], 5)
    whole(parts, 1000)
    owners = [set(codes[part].tolist()) for part in parts]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert abs(len(parts[1]) - 100) <= 20 and abs(len(parts[2]) - 200) <= 20
    assert all((a == b).all() for a, b in zip(parts, grouped(codes, [0.1, 0.2], 5), strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(parts, grouped(codes, [0.1, 0.2], 6), strict=True))


def test_groups_larger_than_the_part() -> None:
    parts = grouped(np.array([0] * 50 + [1] * 30 + [2] * 20), [0.01], 0)
    assert [len(p) for p in parts] == [80, 20]


def test_by_time_takes_the_latest() -> None:
    times = np.array([5.0, 1, 4, 2, 3, 3, 9, 8, 7, 6])
    train, validation, test = by_time(times, [0.2, 0.1])
    assert test.tolist() == [6] and validation.tolist() == [7, 8]
    whole((train, validation, test), 10)
    assert times[train].max() <= times[validation].min() <= times[test].min()
