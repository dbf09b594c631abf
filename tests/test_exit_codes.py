"""Every row of the exit-code table that applies, seen from outside or with one thing broken on purpose (75 and 130: test_resume.py)."""

from __future__ import annotations

import builtins
import errno
import json
import math
import shlex
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
    monkeypatch.setattr("finetune_cli.storage.system.FileSystem.free", lambda self, path: 1000)
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


def in_a_shell(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in a new interpreter, its streams sent where the shell's words say."""
    command = ["bash", "-c", f"exec {shlex.quote(sys.executable)} -m finetune_cli {words}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


STREAMS = [
    ("--version", "> /dev/full", 5, "standard output"),
    ("train --help", "> /dev/full", 5, "standard output"),
    ("train +exp=smoke --cfg job", "> /dev/full", 5, "standard output"),
    ("train --info all", "> /dev/full", 5, "standard output"),
    ("--version", ">&- 2>&- <&-", 0, ""),
    ("trani", "2> /dev/full", 2, ""),
    ("trani", "2>&-", 2, ""),
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(("words", "streams", "code", "where"), STREAMS)
def test_streams_that_are_full_or_closed(words: str, streams: str, code: int, where: str, tmp_path: Path) -> None:
    """No bug of ours, and nothing on another stream than meant."""
    ran = in_a_shell(f"{words} {streams}", tmp_path)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert (f"where: {where}" in ran.stderr) if where else not ran.stderr


def test_the_run_goes_on_with_all_streams_closed(corpus: Callable[..., Any], tmp_path: Path) -> None:
    """None of its files lies on 0, 1 or 2; answers that would go nowhere are refused."""
    rows, run = corpus(train=48), tmp_path / "run"
    assert in_a_shell(" ".join(["train", *rows.keys, *SMALL, "run.dir=run", ">&- 2>&- <&-"]), tmp_path).returncode == 0
    assert json.loads((run / "status.json").read_text())["state"] == "done" and "report:" in (run / "log.txt").read_text()
    ran = in_a_shell(f"predict run input={rows.test} >&-", tmp_path)
    assert ran.returncode == 2 and "where: standard output" in ran.stderr


def test_5_a_result_that_cannot_be_written_hides_no_other_end(
    train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*words: Any, **how: Any) -> None:
        if how.get("file") is None:
            raise MachineError("the result cannot be written")
        builtins.print(*words, **how)

    monkeypatch.setattr("finetune_cli.commands.train.print", full, raising=False)
    assert "cannot be written" in train("run.dir=done").fails(5)[0]
    assert json.loads((tmp_path / "done/status.json").read_text())["exit_code"] == 0
    assert "expect" in " ".join(train("expect.accuracy='>=1.01'").fails(3))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_5_memory_or_disk_that_ran_out(
    error: Exception, train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the first step nothing is left; afterwards the run says how it ended."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("finetune_cli.commands.train.prepare", fail)
        train("run.dir=early").fails(5)
        assert not (tmp_path / "early").exists()
    monkeypatch.setattr("finetune_cli.commands.train.finish", fail)
    ran = train("run.dir=late")
    told = ran.fails(5)
    assert "bug" not in " ".join(told)
    status = json.loads((ran.run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)


def test_the_fix_names_the_run_or_none(train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to go on with a run that is not there."""
    full = OSError(errno.EFBIG, "File too large")
    with monkeypatch.context() as patch:
        patch.setattr("finetune_cli.storage.system.FileSystem.write", lambda *_: (_ for _ in ()).throw(full))
        told = train("run.dir=early").fails(5)
        assert "run the same command again" in told[-1] and "resume" not in told[-1]
    patched = "finetune_cli.storage.Store._save"
    monkeypatch.setattr(patched, lambda *_, **__: (_ for _ in ()).throw(full))
    ran = train("run.dir=with spaces")
    assert f"'resume={ran.run}'; last good checkpoint" in ran.fails(5)[-1]
