"""What a run must survive without being killed: errors of the disk at every call, limits of the system, signals that ask to stop."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crew import Crew
from enemies import Failing, take_over
from figures import Figure
from kills import at_checks, calls_of, checks_of, lost, signalled, spread
from mounts import mount, unmount
from subject import Ended, Subject, faults

from finetune_cli.errors import Exit
from finetune_cli.storage import REAL, Store

FOREVER = 10**6
ERRORS = [(errno.ENOSPC, FOREVER), (errno.EDQUOT, FOREVER), (errno.EROFS, FOREVER), (errno.EIO, FOREVER), (errno.EIO, 1)]
"""(error, calls that fail in a row)"""


def told_well(ended: Ended, subject: Subject, *names: str) -> list[str]:
    """Whether a run that was not finished says so as it must: exit 5 and three lines; 2 where no run could be begun at all."""
    if ended.code == Exit.DONE:
        return []
    begun = (subject.run / "config.yaml").exists()
    if ended.code != Exit.MACHINE and not (ended.code == Exit.USER and not begun):
        return [f"exit {ended.code}: {ended.told}"]
    last = ended.err.strip().splitlines()[-3:]
    wrong = [] if [line.split(":")[0] for line in last] == ["error", "where", "fix"] else [f"not three lines: {ended.told}"]
    if names and not any(name in ended.err for name in names):
        wrong.append(f"the cause is not named: {ended.told}")
    return wrong


def errors_at_calls(*, steps: int, most: int | None, crew: Crew) -> Figure:
    """Every file-system call of a run fails, for ever or once; then the disk is mended and the same command goes on.

    After EDQUOT and EROFS, which end a run as ENOSPC does, three in four are only looked at.
    """

    def work(home: Path, places: Sequence[Any]) -> dict[str, Any]:
        figure, subject = Figure(name=""), Subject(home, steps)
        reference, _ = subject.reference()
        for at, code, times in places:
            subject.fresh()
            name = errno.errorcode[code]
            ended = subject.train(before=lambda: take_over(Failing(at, code, times, commits=subject.commits)))  # noqa: B023
            wrong, kept = told_well(ended, subject, name), subject.committed()
            figure.notes[f"{name} exit {ended.code}"] += 1
            if ended.code and (code in (errno.ENOSPC, errno.EIO) or at % 4 == 0):
                ended = subject.train()
                wrong += lost(kept, ended)
                figure.notes["gone on with to the end"] += 1
            wrong += _last_good(subject, kept) if ended.code else faults(subject, ended, reference)
            figure.trial(f"{name} at call {at}, {times} times", wrong)
        return figure.part()

    places = [[at, code, times] for at in spread(calls_of(steps, crew), most) for code, times in ERRORS]
    return Figure.joined("ENOSPC, EDQUOT, EROFS, EIO at every file-system call", len(places), crew.share(places, work))


def _last_good(subject: Subject, committed: int) -> list[str]:
    """The fault of a run that was ended by an error and has lost a committed checkpoint."""
    newest, bad = Store(subject.run / "checkpoints", REAL).newest()
    there = int(newest.name[5:]) if newest else 0
    return [f"damaged: {name}" for name, _ in bad] + ([f"{committed} was committed, {there} is there"] if there < committed else [])


def file_size_limits(*, steps: int, count: int, crew: Crew) -> Figure:
    """``ulimit -f`` at sizes from nothing to the largest file of the run: an error that no layer of ours has made up."""

    def work(home: Path, shares: Sequence[float]) -> dict[str, Any]:
        figure, subject = Figure(name=""), Subject(home, steps)
        reference, _ = subject.reference()
        subject.fresh().train()
        largest = max(path.stat().st_size for path in subject.run.rglob("*") if path.is_file())
        for share in shares:
            subject.fresh()
            limit = int(largest * share)
            ended = subject.train(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # noqa: B023
            wrong = told_well(ended, subject, "EFBIG", "File too large", "file size")
            figure.notes[f"exit {ended.code}"] += 1
            if ended.code:
                ended = subject.train()
            figure.trial(f"at most {limit} bytes a file", wrong + faults(subject, ended, reference))
        return figure.part()

    shares = [i / count for i in range(1, count)]
    return Figure.joined("file size limits (no injection)", len(shares), crew.share(shares, work))


def graceful_stops(*, steps: int, most: int | None, crew: Crew) -> Figure:
    """SIGTERM in every micro-batch, batch of an evaluation and part of the end; then the same command goes on."""

    def work(home: Path, places: Sequence[int]) -> dict[str, Any]:
        figure, subject = Figure(name=""), Subject(home, steps)
        reference, _ = subject.reference()
        for at in places:
            subject.fresh()
            ended = subject.train(before=lambda: signalled(at, signal.SIGTERM))  # noqa: B023
            wrong = [] if ended.code == Exit.PREEMPTED else [f"exit {ended.code}, not {int(Exit.PREEMPTED)}: {ended.told}"]
            saved = ended.err.rpartition("saved step ")[2].split()
            kept = int(saved[0]) if "saved step " in ended.err else 0
            figure.notes["stopped in training" if "saved step " in ended.err else "stopped before or after training"] += 1
            if ended.out != (f"{subject.run}\n" if subject.run.exists() else ""):
                wrong.append(f"stdout is {ended.out!r}")
            ended = subject.train()
            if kept and ended.resumed != kept:
                wrong.append(f"went on from step {ended.resumed}, though step {kept} was saved")
            figure.trial(f"SIGTERM at place {at}", wrong + faults(subject, ended, reference))
        return figure.part()

    places = spread(checks_of(steps, crew), most)
    return Figure.joined("SIGTERM in every micro-batch, evaluation and part of the end", len(places), crew.share(places, work))


FULL = "a real disk (tmpfs) that is full from some moment on"
LEFT = (0, 5_000, 50_000, 250_000)
"""Bytes that are still free when a disk is filled."""


def full_disks(*, steps: int, most: int | None, crew: Crew) -> Figure:
    """A real disk (tmpfs) that others fill while the run goes on, but for a few bytes; then they tidy up and the same command goes on."""

    def work(home: Path, places: Sequence[Any]) -> dict[str, Any]:
        figure, subject = Figure(name=""), Subject(home, steps, place="disk/run")
        mount(home / "disk", "16m")
        reference, _ = subject.reference()
        for at, left in places:
            subject.fresh()
            ballast = home / "disk" / "ballast"
            ended = subject.train(before=lambda: at_checks(lambda count: _fill(ballast, left) if count == at else None))  # noqa: B023
            ballast.unlink(missing_ok=True)
            wrong = told_well(ended, subject, "ENOSPC", "will not suffice")
            figure.notes[f"exit {ended.code}"] += 1
            if ended.code:
                ended = subject.train()
            figure.trial(f"{left} bytes free from place {at} on", wrong + faults(subject, ended, reference))
        unmount(home / "disk")
        return figure.part()

    places = [[at, left] for at in spread(checks_of(steps, crew), most) for left in LEFT]
    return Figure.joined(FULL, len(places), crew.share(places, work))


def _fill(ballast: Path, left: int) -> None:
    """Take what is free on the disk of ``ballast`` but for ``left`` bytes."""
    free = os.statvfs(ballast.parent)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_bsize - left, 1))
