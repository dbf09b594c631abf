"""SIGKILL: at random times, before and inside every file-system call, at every place where the run looks for signals."""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crew import Crew
from enemies import COMMIT, Enemy, Killer, take_over
from figures import Figure
from subject import Before, Ended, Subject, faults

from finetune_cli.engine.signals import StopFlag
from finetune_cli.storage import REAL, FileSystem

KILLED = -signal.SIGKILL


class Noting(FileSystem):
    """The real file system; what gets the name of a checkpoint is noted outside of it."""

    def __init__(self, commits: Path) -> None:
        self.commits = commits

    def rename(self, source: Path, path: Path) -> None:
        super().rename(source, path)
        if COMMIT.fullmatch(path.name):
            with open(self.commits, "a", encoding="ascii") as file:
                file.write(f"{int(path.name[5:])}\n")


def landed(subject: Subject) -> str:
    """Where a kill hit, told by what lies about."""
    run = subject.run
    if not (run / "config.yaml").exists():
        return "before the run"
    names = [path.name for path in run.glob("checkpoints/*") if path.name.startswith(".")]
    for start, told in ((".tmp-s", "in a save"), (".tmp-", "in a pointer"), (".trash-", "in a prune")):
        if any(name.startswith(start) for name in names):
            return told
    if not list(run.glob("checkpoints/step-*")):
        return "before the first checkpoint"
    return "after training" if (run / "eval").exists() else "between saves"


def random_kills(count: int, *, steps: int, seed: int, crew: Crew) -> Figure:
    """Runs that are killed at a time drawn from the whole length of a run, started again and killed again, until ``count`` kills hit."""

    def work(home: Path, quota: Sequence[int]) -> dict[str, Any]:
        figure, draw = Figure(name=""), random.Random(f"{seed} {home.name}")
        subject = Subject(home, steps)
        reference, length = subject.reference()
        while figure.done < len(quota):
            subject.fresh()
            kept, ended = 0, subject.train(before=noting(subject), kill_after=draw.uniform(0, length))
            while ended.code == KILLED:
                figure.trial("kill", lost(kept, ended) if ended.resumed else [])
                figure.notes[landed(subject)] += 1
                kept = subject.committed()
                ended = subject.train(before=noting(subject), kill_after=draw.uniform(0, 1.5 * length))  # one in three may end
            figure.notes["runs"] += 1
            figure.bad += [f"after {figure.done} kills: {fault}" for fault in faults(subject, ended, reference) + lost(kept, ended)]
        return figure.part()

    return Figure.joined("random SIGKILLs, a save every step", count, crew.share(range(count), work))


def noting(subject: Subject) -> Before:
    """In the fork: the real file system, which notes every checkpoint that gets its name."""
    return lambda: take_over(Noting(subject.commits))


def lost(committed: int, ended: Ended) -> list[str]:
    """The fault of a start that went on from an earlier step than one that had been committed."""
    if "nothing to do: the run is finished" in ended.err:
        return []
    return [f"went on from step {ended.resumed}, though {committed} was committed"] if ended.resumed < committed else []


def trials(
    name: str, places: Sequence[Any], hit: Callable[[Subject, Any], Before], *, steps: int, crew: Crew, reached: bool = True
) -> Figure:
    """One killed run for each place, gone on with once; a place that is not reached is a fault unless threads decide on it."""

    def work(home: Path, mine: Sequence[Any]) -> dict[str, Any]:
        figure = Figure(name="")
        subject = Subject(home, steps)
        reference, _ = subject.reference()
        for place in mine:
            subject.fresh()
            ended = subject.train(before=hit(subject, place))
            if ended.code == KILLED:
                figure.notes[landed(subject)] += 1
                committed = subject.committed()
                ended = subject.train()
                figure.trial(str(place), faults(subject, ended, reference) + lost(committed, ended))
            else:
                figure.notes["not reached"] += 1
                figure.trial(str(place), ["not reached"] if reached else faults(subject, ended, reference))
        return figure.part()

    return Figure.joined(name, len(places), crew.share(places, work))


def kills_at_calls(*, steps: int, most: int | None, crew: Crew) -> Figure:
    """Every file-system call of a run, killed before it and in its middle (a torn write)."""
    places = [[at, inside] for at in spread(calls_of(steps, crew), most) for inside in (False, True)]

    def hit(subject: Subject, place: Any) -> Before:
        return lambda: take_over(Killer(*place, commits=subject.commits))

    return trials("SIGKILL before and inside every file-system call", places, hit, steps=steps, crew=crew, reached=False)


def kills_at_checks(*, steps: int, most: int | None, crew: Crew) -> Figure:
    """Every micro-batch, batch of an evaluation and part of the end."""

    def hit(subject: Subject, place: Any) -> Before:
        return lambda: signalled(place, signal.SIGKILL)

    places = spread(checks_of(steps, crew), most)
    return trials("SIGKILL in every micro-batch, evaluation and part of the end", places, hit, steps=steps, crew=crew)


def signalled(at: int, number: int) -> None:
    """In a fork: from now on this process gets a signal as it looks for signals the ``at``-th time."""
    at_checks(lambda count: os.kill(os.getpid(), number) if count == at else None)


def at_checks(meet: Callable[[int], None]) -> None:
    """In a fork: ``meet(n)`` as this process looks for signals the n-th time."""
    real, count = StopFlag.check, itertools.count(1)

    def check(flag: StopFlag) -> None:
        meet(next(count))
        real(flag)

    StopFlag.check = check  # type: ignore[method-assign]


@functools.cache
def calls_of(steps: int, crew: Crew) -> int:
    """How many file-system calls an undisturbed run makes."""

    def before(told: Path) -> Callable[[], None]:
        take_over(Enemy())
        return lambda: told.write_text(str(REAL.__dict__["count"])) and None

    return _counted(steps, crew, before)


@functools.cache
def checks_of(steps: int, crew: Crew) -> int:
    """How often an undisturbed run looks for signals."""

    def before(told: Path) -> None:
        at_checks(lambda count: told.write_text(str(count)) and None)

    return _counted(steps, crew, before)


def _counted(steps: int, crew: Crew, before: Callable[[Path], Callable[[], None] | None]) -> int:
    def work(home: Path, _: Sequence[int]) -> int:
        Subject(home, steps).fresh().train(before=lambda: before(home / "count.txt"))
        return int((home / "count.txt").read_text())

    return int(crew.share([0], work)[0])


def spread(count: int, most: int | None) -> list[int]:
    """1 … ``count``, or ``most`` of them, evenly."""
    if most is None or most >= count:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})
