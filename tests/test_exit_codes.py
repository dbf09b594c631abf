"""Every row of the exit-code table that applies, seen from outside or with one thing broken on purpose (75 and 130: test_resume.py)."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Ran

from finetune_cli.errors import MachineError

SMALL = [
    "model=tiny",
    "model.shape.layers=1",
    "model.shape.hidden=32",
    "train.steps=4",
    "train.batch_size=8",
    "train.log_every=1",
    "device=cpu",
]


@pytest.fixture
def train(ftune_inside: Callable[..., Ran], corpus: Callable[..., Any]) -> Callable[..., Ran]:
    """``train("key=value", …)`` on small rows with a small model."""
    keys = corpus(train=48).keys
    return lambda *more, **how: ftune_inside("train", *keys, *SMALL, *more, **how)


def test_0_done_and_3_expectation(train: Callable[..., Ran]) -> None:
    assert train("expect.accuracy='>=0'", fresh_check=True).code == 0
    ran = train("expect.accuracy='>=1.01'", "expect.log_loss='<100'")
    told = ran.fails(3)
    assert "accuracy" in told[0] and "1.01" in told[0] and "log_loss" not in told[0]
    assert json.loads((ran.run / "status.json").read_text())["exit_code"] == 3
    assert (ran.run / "report/index.html").exists() and (ran.run.parent / "latest").resolve() == ran.run


def test_1_a_bug_leaves_its_traceback_in_the_run(train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_cli.engine.loop.Trainer.step", lambda self: 1 / 0)
    ran = train()
    told = ran.fails(1)
    assert "ZeroDivisionError" in told[0]
    assert "ZeroDivisionError" in (ran.run / "error.txt").read_text()
    assert json.loads((ran.run / "status.json").read_text())["state"] == "failed"


def test_2_leaves_no_directory_behind(train: Callable[..., Ran], tmp_path: Path) -> None:
    ran = train("data.label=labl")
    told = ran.fails(2)
    assert "labl" in told[0] and "label" in " ".join(told) and ran.out == ""
    assert not (tmp_path / "runs").exists()


def test_4_divergence_keeps_the_last_good_checkpoint(train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_cli.engine.loop import Trainer

    real = Trainer.batch

    def poisoned(self: Trainer, part: Any) -> Any:
        if self.state.step == 3:
            next(self.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
        return real(self, part)

    monkeypatch.setattr(Trainer, "batch", poisoned)
    ran = train("train.save_every=1", "train.steps=6")
    told = ran.fails(4)
    assert "not finite at step 4" in told[0]
    assert json.loads((ran.run / "status.json").read_text())["state"] == "diverged"
    from safetensors.torch import load_file

    weights = load_file(ran.run / "checkpoints/last/model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())
    assert (ran.run / "checkpoints/last").resolve().name == "step-00000003"


def test_5_no_memory_even_for_one_row(train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("finetune_cli.tasks.base.Task.forward", forward)
    told = train().fails(5)
    assert "single row" in told[0]


def test_5_a_full_disk(train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_cli.storage.files.FileSystem.free", lambda self, path: 1000)
    told = train().fails(5)
    assert "disk" in told[0]


def test_5_keeps_the_run_that_had_begun(train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise MachineError("disk full", where="checkpoints")

    monkeypatch.setattr("finetune_cli.storage.Store.save", save)
    ran = train()
    ran.fails(5)
    assert json.loads((ran.run / "status.json").read_text())["exit_code"] == 5


def test_6_an_export_that_answers_differently(train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_cli.tasks import get

    task = get("text-classification")
    real = task.answers
    monkeypatch.setattr(task, "answers", lambda self, outputs: real(self, outputs) + 0.01)
    told = train(fresh_check=True).fails(6)
    assert "answers differently" in told[0]


def test_an_expectation_on_an_unknown_metric_is_an_error_before_training(train: Callable[..., Ran], tmp_path: Path) -> None:
    told = train("expect.acuracy='>=0.5'").fails(2)
    assert "accuracy" in told[-1]
    told = train("train.monitor=f2").fails(2)
    assert "f2" in told[0] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_torch_imports_numpy_is_not_lost(number: int, code: int, tmp_path: Path) -> None:
    """Torch clears an exception that is raised there, and with it the stop."""
    script = f"""
import os, sys
class Asking:
    def find_spec(self, name, *_):
        if name == "numpy":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Asking())
sys.argv = ["ftune", "train", "+exp=smoke", "train.steps=1", "run.dir=run"]
from finetune_cli.cli import entry
entry()
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert ended.returncode == code and b"Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
