"""How fast training is: the only thing in a run that is not a function of its config, data and plan."""

from __future__ import annotations

import time

import numpy as np

from finetune_cli import console
from finetune_cli.engine.trainer import Trainer


class Clock:
    """Throughput of the updates alone (scoring and saving are left out), kept apart from everything deterministic."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.rows = self.tokens = 0
        self.busy = 0.0
        self.started = self.last = time.perf_counter()

    def count(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self.stop()
        self.rows += len(rows)
        self.tokens += int(lengths[rows].sum())

    def stop(self) -> None:
        """Add the time since the last look."""
        now = time.perf_counter()
        self.busy += now - self.last
        self.last = now

    def rates(self) -> dict[str, float]:
        busy = max(self.busy, 1e-9)
        return {
            "train/samples_per_second": round(self.rows / busy, 2),
            "train/tokens_per_second": round(self.tokens / busy, 1),
            "memory_mb": round(self.trainer.device.memory_mb(), 1),
        }

    def show(self, progress: console.Progress, record: dict[str, float]) -> None:
        rates, step = self.rates(), self.trainer.state.step
        progress.update(
            step,
            step / self.trainer.timetable.per_epoch,
            record["train/loss"],
            record["train/lr"],
            rates["train/samples_per_second"],
            rates["train/tokens_per_second"],
            rates["memory_mb"],
        )

    def record(self) -> None:
        seconds = round(time.perf_counter() - self.started, 3)
        self.trainer.run.record_time(self.trainer.state.step, {"seconds": seconds, **self.rates()})
        self.rows = self.tokens = 0
        self.busy = 0.0

    def go_on(self) -> None:
        """Scoring and saving are over."""
        self.last = time.perf_counter()
