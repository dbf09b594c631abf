"""Damage to any byte of a checkpoint: detected, with the file named; and what a run does that finds its newest one damaged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crew import Crew
from figures import Figure
from kills import checks_of, signalled
from subject import Subject, faults

from finetune_cli.storage import REAL, Store

KINDS = ("flip", "cut", "zeros", "append", "remove")
BLOCK = 64


def damaged(data: bytes, draw: random.Random) -> tuple[str, bytes | None]:
    """(kind, bytes that are not ``data``; None: no file)."""
    while True:
        kind, at = draw.choice(KINDS), draw.randrange(len(data) + 1)
        if kind == "remove":
            return kind, None
        if kind == "flip" and at < len(data):
            new = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif kind == "cut":
            new = data[:at]
        elif kind == "append":
            new = data + draw.randbytes(draw.randint(1, 40))
        else:
            new = data[:at] + bytes(len(data[at : at + BLOCK])) + data[at + BLOCK :]
        if new != data:
            return kind, new


def spoil(file: Path, draw: random.Random) -> tuple[str, bytes]:
    """Damage a file; (kind, the bytes it had)."""
    whole = file.read_bytes()
    kind, new = damaged(whole, draw)
    if new is None:
        file.unlink()
    else:
        file.write_bytes(new)
    return kind, whole


def damages(count: int, *, steps: int, seed: int, crew: Crew) -> Figure:
    """Random damage to a random file of a random checkpoint of a real run, then made good again."""

    def work(home: Path, quota: Sequence[int]) -> dict[str, Any]:
        figure, draw, subject = Figure(name=""), random.Random(f"{seed} damage {home.name}"), Subject(home, steps)
        subject.fresh().train()
        store = Store(subject.run / "checkpoints", REAL)
        for _ in quota:
            checkpoint = store.root / draw.choice(store.steps())
            file = draw.choice(sorted(checkpoint.iterdir()))
            kind, whole = spoil(file, draw)
            told = store.verify(checkpoint)
            file.write_bytes(whole)
            figure.notes[kind] += 1
            good = told is not None and file.name in told and "\n" not in told
            figure.trial(f"{kind} of {checkpoint.name}/{file.name}", [] if good else [f"told: {told}"])
        wrong = [f"not whole again: {name}" for name in store.steps() if store.verify(store.root / name) is not None]
        figure.bad += wrong
        return figure.part()

    return Figure.joined("damaged bytes of a checkpoint, detected and named", count, crew.share(range(count), work))


def damaged_newest(count: int, *, steps: int, seed: int, crew: Crew) -> Figure:
    """A run is killed, its newest checkpoint damaged; the same command names it, goes on from the one before, and ends the same."""

    places = checks_of(steps, crew)

    def work(home: Path, quota: Sequence[int]) -> dict[str, Any]:
        figure, draw, subject = Figure(name=""), random.Random(f"{seed} newest {home.name}"), Subject(home, steps)
        reference, _ = subject.reference()
        for _ in quota:
            names: list[str] = []
            while len(names) < 2:
                at = draw.randint(1, places)  # drawn here: what a fork draws is lost with it
                subject.fresh().train(before=lambda: signalled(at, 9))  # noqa: B023
                names = Store(subject.run / "checkpoints", REAL).steps()
            file = draw.choice(sorted((subject.run / "checkpoints" / names[-1]).iterdir()))
            kind, _whole = spoil(file, draw)
            ended = subject.train()
            told = f"warning: {names[-1]} is damaged ({file.name}"
            wrong = [] if told in ended.err else [f"not told: {told}"]
            if ended.resumed != int(names[-2][5:]):
                wrong.append(f"went on from step {ended.resumed}, not from {names[-2]}")
            wrong += [fault for fault in faults(subject, ended, reference) if ".corrupt-" not in fault]
            figure.trial(f"{kind} of {names[-1]}/{file.name}", wrong)
        return figure.part()

    return Figure.joined("a damaged newest checkpoint: named, passed over, made again", count, crew.share(range(count), work))
