"""What a user can be told: every expected end of a command, with its place, its remedy and its exit code.

An error is three lines: what was found, where it stands, how to mend it. Anything else that is raised is a bug of ours (exit 1).
"""

from __future__ import annotations

import re
import shlex
import signal
from enum import IntEnum

from finetune_cli.said import sayable

NAMED = re.compile(r"(\w[\w.]*=)RUN((?:/[\w/…-]+)?)")
"""How a fix speaks of a run whose place it does not know: ``resume=RUN``."""

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask to stop: Ctrl-C first, then the preemptions."""


class Exit(IntEnum):
    """Exit codes of every verb."""

    DONE = 0
    BUG = 1
    USER = 2
    EXPECTATION = 3
    DIVERGED = 4
    MACHINE = 5
    SELF_CHECK = 6
    PREEMPTED = 75
    INTERRUPTED = 130
    PIPE_CLOSED = 141


class FtuneError(Exception):
    """An end that ftune foresees.

    ``what`` was found, ``where`` (``file:line``, row, column or key; empty if nowhere), ``fix`` says how to mend it.
    """

    code: Exit = Exit.USER

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def of_run(self, run: str | None) -> None:
        """Let the fix name the run that it speaks of as RUN; None: nothing is left of it to go on with."""
        if run is None:
            self.fix = self.fix.replace("go on with resume=RUN", "run the same command again").partition("; last good checkpoint")[0]
        else:
            self.fix = NAMED.sub(lambda found: shlex.quote(f"{found[1]}{run}{found[2]}"), self.fix)

    def lines(self) -> list[str]:
        """At most three lines; line breaks inside a part are folded, so that data cannot add a line, nor steer the terminal."""
        parts = {"error": self.what, "where": self.where, "fix": self.fix}
        return [f"{name}: {sayable(' '.join(text.split()))}" for name, text in parts.items() if text]


class UserError(FtuneError):
    """The command, config, data or checkpoint is not usable as given."""


class ExpectationFailed(FtuneError):
    """A stated expectation on a metric does not hold."""

    code = Exit.EXPECTATION


class Diverged(FtuneError):
    """Loss, gradients or weights are not finite any more; the weights were not touched by it."""

    code = Exit.DIVERGED


class MachineError(FtuneError):
    """Out of disk, out of memory even for one row, a device or worker lost."""

    code = Exit.MACHINE


class SelfCheckFailed(FtuneError):
    """What was written does not do what was measured."""

    code = Exit.SELF_CHECK


class Stopped(FtuneError):
    """A signal asked to stop; the run was saved first."""

    code = Exit.PREEMPTED


class Interrupted(Stopped):
    """Ctrl-C."""

    code = Exit.INTERRUPTED
