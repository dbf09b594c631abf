"""Micro-batches made ahead: the same run to the bit, through memory that runs out, stops, and facts that change."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ran import Ran

from finetune_cli.batching import BatchPlan
from finetune_cli.engine import trainer as engine_trainer
from finetune_cli.engine.ahead import Ahead, Update
from finetune_cli.engine.loop import Trainer
from finetune_cli.errors import Stopped
from finetune_cli.tasks.base import Batch, Task

OPTIONS = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.epochs=3", "train.batch_size=8", "train.log_every=1"]
OPTIONS += ["train.eval_every=4", "train.save_every=2", "device.threads=1", "device=cpu"]
PLAN = BatchPlan(batch_size=2, micro_tokens=8, inference_tokens=8, order="shuffled", whole=False, reasons={})


def digest(run: Path) -> str:
    found = hashlib.sha256((run / "metrics.jsonl").read_bytes())
    for name in ("checkpoints/last/model.safetensors", "checkpoints/last/state.safetensors"):
        found.update((run / name).read_bytes())
    return found.hexdigest()


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    """No test leaves a thread of ours."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps whose batches had been made ahead, on a CPU too."""
    steps: list[int] = []
    real = Ahead.take

    def take(self: Ahead, update: Update) -> list[Batch] | None:
        made = real(self, update)
        if made is not None:
            steps.append(update.step)
        return made

    monkeypatch.setattr(engine_trainer, "helps", lambda device: True)
    monkeypatch.setattr(Ahead, "take", take)
    return steps


@pytest.mark.parametrize("task", [[], ["task=fill-mask"]], ids=["labels", "masks drawn by key"])
def test_the_run_is_the_same_to_the_bit(
    task: list[str], used: list[int], ftune_inside: Callable[..., Ran], corpus: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 updates over three epochs: each but the first was made ahead."""
    files = corpus(train=48)
    keys = [*(files.keys[:2] if task else files.keys), *OPTIONS, *task]
    ahead = digest(ftune_inside("train", *keys, "run.dir=ahead").ok().run)
    assert used == list(range(1, 18))
    monkeypatch.setattr(engine_trainer, "helps", lambda device: False)
    assert digest(ftune_inside("train", *keys, "run.dir=now").ok().run) == ahead and len(used) == 17


def test_memory_that_runs_out_takes_batches_of_the_new_plan(
    used: list[int], ftune_inside: Callable[..., Ran], corpus: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches made under the plan of before are thrown away; what is trained is what is trained without them."""
    real, keys = Task.forward, [*corpus(train=48).keys, *OPTIONS, "train.eval_every=18"]

    def forward(self: Any, model: Any, batch: Batch) -> Any:
        if model.training and batch.targets is not None and len(batch.targets) > 4:
            raise torch.OutOfMemoryError("no room")
        return real(self, model, batch)

    monkeypatch.setattr(Task, "forward", forward)
    one = ftune_inside("train", *keys, "run.dir=one").ok()
    assert "out of memory" in one.err and len(used) > 10
    monkeypatch.setattr(engine_trainer, "helps", lambda device: False)
    assert digest(ftune_inside("train", *keys, "run.dir=two").ok().run) == digest(one.run)


def test_a_stop_and_a_resume_are_exact(
    used: list[int], ftune_inside: Callable[..., Ran], corpus: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, looks = [*corpus(train=48).keys, *OPTIONS], [0]
    whole = digest(ftune_inside("train", *keys, "run.dir=whole").ok().run)
    real = Trainer.step

    def step(self: Trainer) -> None:
        looks[0] += 1
        if looks[0] == 8:
            raise Stopped("stopped", where="test")
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert ftune_inside("train", *keys, "run.dir=stopped").code == 75
    assert digest(ftune_inside("train", "resume=stopped").ok().run) == whole


def test_only_the_very_update_is_given() -> None:
    task: Any = object()
    made: list[int] = []
    ahead = Ahead(lambda update: [made.append(update.step)] and [Batch({}, None)])  # type: ignore[func-returns-value]
    first = Update(1, np.array([4, 2]), PLAN, task)
    with ahead:
        for other in (
            Update(2, first.rows, PLAN, task),
            Update(1, np.array([4, 3]), PLAN, task),
            Update(1, first.rows, PLAN.halved(), task),
            Update(1, first.rows, PLAN, object()),  # type: ignore[arg-type]
        ):
            ahead.begin(lambda: first)
            assert ahead.take(other) is None and ahead.take(first) is None
        ahead.begin(lambda: first)
        assert ahead.take(Update(1, np.array([4, 2]), PLAN, task)) is not None
        ahead.begin(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        with pytest.raises(ZeroDivisionError):
            ahead.take(first)
        ahead.begin(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert made == [1] * 5
