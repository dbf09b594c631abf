"""What a run's numbers must not do: a loss that jumps, a best model of numbers that are none.

A jump is far above what was recorded before, and no mere noise around a loss that is nearly learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from finetune_cli import console
from finetune_cli.config.choices import OnSpike
from finetune_cli.engine.timetable import State
from finetune_cli.errors import Diverged

if TYPE_CHECKING:
    from finetune_cli.engine.trainer import Trainer

FACTOR = 3.0
"""A recorded loss that many times the median of those before is a spike."""
WINDOW = 100
"""Recorded losses that are looked back at."""
LEAST = 10
"""Recorded losses before which nothing is judged."""
SHARE = 0.5
"""A spike is at least this share of the run's first recorded loss: near zero, many times the median is still nothing."""
NOISE, BEYOND = 0.95, 2.0
"""And it is so many times that quantile of those before: one wrong label in a small batch makes a loss that comes again and again."""
WARNINGS = 5
"""After so many a run warns no more."""
RETURNS = 3
"""After so many returns the next jump ends the run."""


def spike(loss: float, before: Sequence[float], first: float | None) -> float | None:
    """How many times the median of ``before`` a recorded loss is, where that is a spike; ``first`` is the run's first one."""
    if len(before) < LEAST or first is None:
        return None
    usual, noise = median(before), sorted(before)[int(NOISE * len(before))]
    return loss / usual if usual > 0 and loss > max(FACTOR * usual, BEYOND * noise, SHARE * first) else None


def judge(trainer: Trainer, loss: float) -> bool:
    """Whether to go back because of a loss that is to be recorded; warns of a spike, or raises Diverged, as the config says."""
    state, choice = trainer.state, trainer.config.on_spike
    times = spike(loss, state.recent, state.first_loss)
    if times is None:
        return False
    what = f"the loss jumped at step {state.step}: {loss:.4g} is {times:.3g} times the median of the last {len(state.recent)} recorded"
    if choice == OnSpike.rewind and state.good and state.returns < RETURNS:
        console.warn(f"{what}: back to step {state.good}, and on without the rows since then")
        return True
    if choice != OnSpike.warn:
        if choice == OnSpike.rewind:
            what += f"; it went back {RETURNS} times already" if state.good else "; there is no checkpoint to go back to yet"
        raise Diverged(
            what,
            where=f"step {state.step}, train.on_spike={choice}",
            fix="a smaller optimizer.lr or a longer optimizer.warmup; resume with train.on_spike=warn resume_allow=[train.on_spike]",
        )
    if state.spikes < WARNINGS:
        console.warn(what + (" (no more of these are shown)" if state.spikes == WARNINGS - 1 else ""))
    return False


def note(state: State, loss: float) -> None:
    """Remember a recorded loss: once the step's scoring is done, which a stop may make a resume do again."""
    state.spikes += spike(loss, state.recent, state.first_loss) is not None
    state.recent = [*state.recent, loss][-WINDOW:]
    state.first_loss = loss if state.first_loss is None else state.first_loss


def refuse_no_best(trainer: Trainer, loss: float) -> None:
    """Raise Diverged where training ends, no scoring gave a number and the last validation ``loss`` is none either."""
    name = trainer.config.monitor or trainer.task.monitor
    if trainer.state.best is None and not math.isfinite(loss):
        raise Diverged(
            f"validation {name} was never finite, nor is the loss ({loss}): there is no best model",
            where=f"step {trainer.state.step}",
            fix="a smaller optimizer.lr, or device.precision=fp32; and look for rows of validation that no model can answer",
        )
