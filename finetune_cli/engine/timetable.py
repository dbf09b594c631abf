"""Which steps there are, and what a resume must know of those that are done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.config.schema import TrainSection


@dataclass(slots=True)
class State:
    """Everything a resume needs besides weights and moments. ``closed``: the step's scoring and record are done."""

    step: int = 0
    closed: bool = True
    loss_sum: float = 0.0
    loss_steps: int = 0
    best: float | None = None
    best_step: int = 0
    misses: int = 0
    finished: bool = False
    metrics_bytes: int = 0
    metrics_sha256: str = ""
    """How long metrics.jsonl was, and the hash of its bytes; a resume compares it, where the checkpoint has it."""
    recent: list[float] = field(default_factory=list)
    """The last recorded losses, and the run's first."""
    first_loss: float | None = None
    spikes: int = 0
    scheduled: int = 0
    """The last checkpoint that the timetable asked for, and the last one whose loss was found good: where a jump goes back to."""
    good: int = 0
    returns: int = 0
    left_out: int = 0
    """How often that happened, and how many updates' rows were left out so."""
    plan: dict[str, Any] = field(default_factory=dict)

    def saved(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """How many steps there are and which of them log, score and save."""

    total: int
    per_epoch: int
    log: int
    score: int
    save: int

    @classmethod
    def of(cls, config: TrainSection, rows: int) -> Timetable:
        """From the config and the number of training examples."""
        per_epoch = math.ceil(rows / config.batch_size)
        total = max(1, math.ceil(config.epochs * per_epoch)) if config.steps is None else config.steps

        def every(value: Any) -> int:
            return per_epoch if value == "epoch" else int(value)

        return cls(
            total=total, per_epoch=per_epoch, log=every(config.log_every), score=every(config.eval_every), save=every(config.save_every)
        )

    def saves_early(self, *, scores: bool) -> bool:
        """Whether a checkpoint is written before the last step, after which nobody waits for one."""
        return min(self.save, self.score if scores else self.total) < self.total

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps happens after ``step``; always after the last."""
        return step % every == 0 or step == self.total
