"""Which rows become validation and test: pure functions from codes, groups or times to row numbers.

Exact (the counts are what the fractions say, class by class by largest remainder), stable (rows keep their order, one class's draw does not
depend on another's), and a function of the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune_cli.randomness import generator

Parts = tuple[np.ndarray, ...]
"""Row numbers of the remainder and of each fraction, ascending."""


def sizes(n: int, fractions: Sequence[float]) -> list[int]:
    """Rows of each fraction of ``n``: rounded, at least one, as long as one is left."""
    wanted = [max(1, int(np.floor(n * fraction + 0.5))) for fraction in fractions]
    while sum(wanted) >= n and max(wanted) > 1:
        wanted[int(np.argmax(wanted))] -= 1
    return wanted


def seats(counts: np.ndarray, total: int, room: np.ndarray) -> np.ndarray:
    """``total`` seats for classes of ``counts`` rows, in proportion, by largest remainder, none beyond its ``room``."""
    quota = counts * (total / max(1, counts.sum()))
    given: np.ndarray = np.minimum(np.floor(quota + 1e-9).astype(np.int64), room)
    order = np.argsort(-(quota - np.floor(quota + 1e-9)), kind="stable")
    while given.sum() < total and (given < room).any():
        for c in order:
            if given.sum() == total:
                break
            given[c] += given[c] < room[c]
    return given


def stratified(labels: Sequence[str], fractions: Sequence[float], seed: int) -> Parts:
    """Each class in its share; a class of one row, and at least one row of every class, stays in the remainder."""
    names = sorted(set(labels))
    code_of = {name: code for code, name in enumerate(names)}
    codes = np.fromiter((code_of[label] for label in labels), np.int64, len(labels))
    counts = np.bincount(codes, minlength=len(names))
    totals, room = sizes(len(codes), fractions), counts - 1
    part_of = np.zeros(len(codes), np.int8)
    order = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    shuffled = [generator(seed, f"split/{name}").permutation(order[starts[c] : starts[c + 1]]) for c, name in enumerate(names)]
    used = np.zeros(len(names), np.int64)
    for part, total in enumerate(totals, 1):
        given = seats(counts, total, room - used)
        for c, number in enumerate(given):
            part_of[shuffled[c][used[c] : used[c] + number]] = part
        used += given
    return _parts(part_of, len(totals))


def shuffled(n: int, fractions: Sequence[float], seed: int) -> Parts:
    """Rows at random."""
    order, part_of, start = generator(seed, "split").permutation(n), np.zeros(n, np.int8), 0
    for part, size in enumerate(sizes(n, fractions), 1):
        part_of[order[start : start + size]] = part
        start += size
    return _parts(part_of, len(fractions))


def grouped(groups: np.ndarray, fractions: Sequence[float], seed: int) -> Parts:
    """Whole groups at random, each taken while it brings its part closer to its size; ``groups`` are codes from 0."""
    counts = np.bincount(groups)
    order = generator(seed, "split/groups").permutation(len(counts))
    part_of_group = np.zeros(len(counts), np.int8)
    for part, size in enumerate(sizes(len(groups), fractions), 1):
        have = 0
        for group in order:
            closer = abs(have + counts[group] - size) < abs(have - size)
            if part_of_group[group] == 0 and closer and (part_of_group == 0).sum() > 1:
                part_of_group[group] = part
                have += int(counts[group])
        if not have:  # every group is larger than twice the part: the smallest will do
            free = [g for g in order if part_of_group[g] == 0]
            if len(free) > 1:
                part_of_group[min(free, key=lambda g: counts[g])] = part
    return _parts(part_of_group[groups], len(fractions))


def by_time(times: np.ndarray, fractions: Sequence[float]) -> Parts:
    """The latest rows for the last fraction, those before for the one before it; equal times go by file order."""
    order = np.argsort(times, kind="stable")
    part_of, end = np.zeros(len(times), np.int8), len(times)
    wanted = sizes(len(times), fractions)
    for part in range(len(wanted), 0, -1):
        part_of[order[end - wanted[part - 1] : end]] = part
        end -= wanted[part - 1]
    return _parts(part_of, len(fractions))


def _parts(part_of: np.ndarray, parts: int) -> Parts:
    return tuple(np.flatnonzero(part_of == part) for part in range(parts + 1))
