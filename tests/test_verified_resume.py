"""A resume computes again what the checkpoint says of itself, and refuses a state that is not the one that was saved."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks
from ran import Ran, labelled_rows, one_a_task, write_rows

from finetune_cli import checkpoint
from finetune_cli.engine import trainer as trainers
from finetune_cli.engine.optimizer import Updater
from finetune_cli.engine.trainer import Trainer
from finetune_cli.errors import MachineError
from finetune_cli.run import Run
from finetune_cli.tasks import get

pytestmark = pytest.mark.sampled(8)

SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.steps=10", "train.batch_size=8", "train.save_every=4"]
SMALL += ["train.log_every=1", "device=cpu", "device.threads=1", "device.precision=fp32", "train.eval_every=100"]


NO_NUMBERS = b"".join(b'{"step": 5, "loss": "%s", "grounds": {}}\n' % loss for loss in (b"zz", b"0x1p99999", b"nan", b"inf"))


@dataclass(frozen=True)
class Dead:
    """A run that a fault ended in its sixth update: its last checkpoint is that of step 4, and step 5's loss is on record."""

    run: Path
    keys: list[str]
    ftune: Callable[..., Ran]

    def resume(self, *more: str) -> Ran:
        return self.ftune("train", f"resume={self.run}", *more)

    def files(self) -> dict[str, bytes]:
        """Everything but the log."""
        found = {str(p): p.read_bytes() for p in self.run.rglob("*") if p.is_file() and p.name not in ("log.txt", ".lock")}
        assert len(found) > 8
        return found


@contextmanager
def die_in(step: int) -> Iterator[None]:
    """Within the context the machine fails in the update that would end in ``step``."""
    real = Trainer.backward

    def failing(self: Trainer) -> torch.Tensor:
        if self.state.step + 1 == step:
            raise MachineError("lightning", where="here")
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "backward", failing)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(where the run that every test copies is made once, the keys of its data)."""
    home, keys = tmp_path_factory.mktemp("made"), []
    for shift, name in ((0, "train"), (48, "validation"), (64, "test")):
        path = write_rows(home / "data" / f"{name}.csv", labelled_rows(48 if name == "train" else 16, shift=shift))
        keys.append(f"data.{name}={path}")
    return home, keys


@pytest.fixture
def dead(ftune_inside: Callable[..., Ran], made: tuple[Path, list[str]], tmp_path: Path) -> Dead:
    home, keys = made[0], [*made[1], *SMALL]
    if not (home / "dead").is_dir():
        with die_in(6):
            ftune_inside("train", *keys, f"run.dir={home / 'dead'}").fails(5)
    shutil.copytree(home / "dead", tmp_path / "dead", symlinks=True)
    return Dead(tmp_path / "dead", keys, ftune_inside)


def told(ran: Ran) -> str:
    (line,) = [line for line in ran.err.splitlines() if "resumed state verified" in line]
    return line


def test_what_is_verified_is_said_and_the_run_is_the_same(dead: Dead, tmp_path: Path) -> None:
    resumed = dead.resume().ok()
    assert "weights and moments (sha256), rows of the next 2 updates, loss of step 5 (to the bit)" in told(resumed)
    whole = dead.ftune("train", *dead.keys, f"run.dir={tmp_path / 'whole'}").ok()
    for name in (
        "metrics.jsonl",
        "checkpoints/last/model.safetensors",
        "checkpoints/last/state.safetensors",
        "checkpoints/last/state.json",
    ):
        assert (dead.run / name).read_bytes() == (whole.run / name).read_bytes(), name


@pytest.mark.parametrize("how", ["line ends", "a number", "none on record"])
def test_records_that_are_not_those_of_the_checkpoint(dead: Dead, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that fits is not enough: lines would be cut, or those of another run be taken for this one's."""
    record = dead.run / "metrics.jsonl"
    kept = record.read_bytes()
    record.write_bytes(kept.replace(b"\n", b"\r\n") if how == "line ends" else kept.replace(b'"step": 1', b'"step": 7', 1))
    if how == "none on record":  # an older ftune's checkpoint
        real = checkpoint.load_state
        monkeypatch.setattr(checkpoint, "load_state", lambda path: {k: v for k, v in real(path).items() if k != "metrics_sha256"})
        dead.resume().ok()
        return
    before = dead.files()
    error = dead.resume().fails(2)
    assert "metrics.jsonl" in error[0] and "sha256" in error[0] and error[1].endswith("metrics.jsonl") and "copy" in error[2]
    assert dead.files() == before
    record.write_bytes(kept)
    dead.resume().ok()


@pytest.mark.parametrize("key", ["optimizer.lr", "train.steps", "train.eval_every", "train.batch_size", "device.threads", "a line"])
def test_a_config_that_was_edited_by_hand(dead: Dead, key: str) -> None:
    """What a resume composes from must be what the run began with: an edit is no override that was asked for."""
    path = dead.run / "config.yaml"
    kept = path.read_text()
    name = "eval_every" if key == "a line" else key.rpartition(".")[2]
    edited = re.sub(rf"(?m)^  {name}: .*\n", "" if key == "a line" else f"  {name}: 3\n", kept)
    assert edited != kept
    path.write_text(edited)
    before = dead.files()
    error = dead.resume().fails(2)
    assert f".{name} was " in error[0] and "by hand" in error[0] and "config.yaml" in error[1] and "step-00000004" in error[2]
    assert dead.files() == before
    path.write_text(f"{kept}# a remark\n")
    dead.resume().ok()


def test_a_config_that_was_edited_before_the_first_checkpoint(dead: Dead) -> None:
    shutil.rmtree(dead.run / "checkpoints")
    path = dead.run / "config.yaml"
    kept = path.read_text()
    path.write_text(kept.replace("  seed: ", "  seed: 1"))
    assert "by hand" in dead.resume().fails(2)[0]
    path.write_text(kept)
    dead.resume().ok()


def test_a_section_that_is_none_is_refused_and_not_dropped(dead: Dead) -> None:
    path = dead.run / "config.yaml"
    path.write_text(re.sub(r"(?m)^optimizer:\n(  .*\n)+", "optimizer: 5\n", path.read_text()))
    error = dead.resume().fails(2)
    assert "the section 'optimizer' of the saved config is 5" in error[0] and "config.yaml: optimizer" in error[1]


@pytest.mark.parametrize("verb", [["train", "resume="], ["eval", "ckpt="]])
def test_a_run_without_its_config_is_told_so(dead: Dead, verb: list[str]) -> None:
    (dead.run / "config.yaml").unlink()
    error = dead.ftune(verb[0], f"{verb[1]}{dead.run}").fails(2)
    assert "no config.yaml" in error[0] and "dead" in error[1] and "checkpoints/step-" in error[2]


def test_other_threads_are_named_though_the_loss_is_equal(dead: Dead) -> None:
    assert "loss of step 5 (equal, with other threads" in told(dead.resume("device.threads=2").ok())


def test_the_hash_of_the_records_is_that_of_the_file_after_every_cut(dead: Dead) -> None:
    run = Run.open(dead.run, keep=0)
    record = dead.run / "metrics.jsonl"
    first = record.read_bytes().index(b"\n") + 1
    for size in (record.stat().st_size, first):
        assert run.metrics_sha256(size) == hashlib.sha256(record.read_bytes()[:size]).hexdigest()
    run.metrics_sha256(record.stat().st_size)
    run.cut_metrics(first)
    run.record(9, {"train/loss": 0.123456789, "train/lr": 1.0})
    run.record(10, {"train/loss": 0.987654321, "train/lr": 1.0, "epoch": 1.0})
    assert run.metrics_sha256(run.metrics_bytes()) == hashlib.sha256(record.read_bytes()).hexdigest()


def test_without_a_loss_on_record_none_is_compared(dead: Dead) -> None:
    (dead.run / "witness.jsonl").unlink()
    assert told(dead.resume().ok()).endswith("weights and moments (sha256), rows of the next 2 updates")


def test_weights_that_change_while_loaded(dead: Dead, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.load_model

    def careless(*args: Any, **how: Any) -> Any:
        model, adapter = real(*args, **how)
        with torch.no_grad():
            model.classifier.weight[0, 0] += 1e-6
        return model, adapter

    before = dead.files()
    monkeypatch.setattr(checkpoint, "load_model", careless)
    error = dead.resume().fails(6)
    assert "weights differ" in error[0] and "classifier.weight" in error[0] and "step-00000004" in error[1]
    assert dead.files() == before
    assert json.loads((dead.run / "status.json").read_text())["exit_code"] == 5


def test_moments_that_are_lost(dead: Dead, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dead.files()
    monkeypatch.setattr(Updater, "load", lambda self, saved: None)
    assert "moments differ" in dead.resume().fails(6)[0]
    assert dead.files() == before


@pytest.mark.parametrize("what", ["order", "tokens"])
def test_other_rows(dead: Dead, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dead.files()
    if what == "order":
        real = trainers.epoch_order
        monkeypatch.setattr(trainers, "epoch_order", lambda *args, **how: real(*args, **how)[::-1])
    else:
        made = Trainer.__post_init__

        def altered(self: Trainer) -> None:
            made(self)
            ids = self.train.examples.columns["input_ids"]
            self.train.examples.columns["input_ids"] = type(ids)(ids.values[::-1].copy(), ids.offsets)

        monkeypatch.setattr(Trainer, "__post_init__", altered)
    error = dead.resume().fails(6)
    assert "other rows" in error[0] and "update 5" in error[0]
    assert dead.files() == before


def test_another_loss(dead: Dead, monkeypatch: pytest.MonkeyPatch) -> None:
    before, task = dead.files(), get("text-classification")
    real = task.loss
    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", lambda self, outputs, batch: {k: v * 1.001 for k, v in real(self, outputs, batch).items()})
        error = dead.resume().fails(6)
    assert "another loss: step 5 gives" in error[0]
    assert dead.files() == before
    dead.resume().ok()


def test_another_plan_is_compared_nearly_and_said(dead: Dead) -> None:
    line = told(dead.resume("device.precision=bf16").ok())
    assert "loss of step 5 (nearly" in line and "other precision" in line


def test_keys_that_may_differ_leave_rows_and_loss_out(dead: Dead) -> None:
    line = told(dead.resume("train.seed=7", "resume_allow=[train.seed]").ok())
    assert line.endswith("weights and moments (sha256); rows and loss are not compared, since train.seed may differ")


@pytest.mark.parametrize("left", [b"\x00\x00\x00\n[1]\n{}\nnull\n{", b'{"step": 5, "loss": 1}\n', NO_NUMBERS])
def test_a_record_that_a_power_loss_spoilt_is_no_reason_to_stop(left: bytes, dead: Dead) -> None:
    (dead.run / "witness.jsonl").write_bytes(left)
    run = Run.open(dead.run, keep=0)
    assert run.witness(5) is None
    run.cut_witness(5)
    run.record_witness(9, {"loss": "0x1p0", "grounds": {}})
    assert (dead.run / "witness.jsonl").read_bytes().count(b"\n") == 1 and run.witness(9) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_several_processes_verify_alike(forks: Forks, made: tuple[Path, list[str]], tmp_path: Path) -> None:
    keys = [*made[1], *SMALL, "device.processes=2", "device.threads=2", "train.steps=200", "train.keep=99", f"run.dir={tmp_path / 'two'}"]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = forks.start("train", *keys, cwd=tmp_path, **pipes)
    until, record = time.monotonic() + 120, tmp_path / "two/metrics.jsonl"
    while not record.exists() or record.read_bytes().count(b"\n") < 10:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    for processes, expected in (
        (1, "not the loss of step 5 (other processes than when it was recorded)"),
        (2, "loss of step 5 (to the bit)"),
    ):
        shutil.copytree(tmp_path / "two", tmp_path / str(processes), symlinks=True)
        start = tmp_path / str(processes) / "checkpoints/step-00000004"
        more = ("train.steps=8", "resume_allow=[train.steps]", f"device.processes={processes}")
        with forks.start("train", f"resume={start}", *more, cwd=tmp_path, **pipes) as process:
            _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        assert expected in err.decode() and "died without a word after step" in err.decode()


def test_a_loss_on_record_is_that_of_its_own_history(dead: Dead) -> None:
    """Another learning rate makes another checkpoint of step 8; what was on record of the old one is gone."""
    other = ("train.keep=9", "optimizer.lr=1e-2", "resume_allow=[optimizer.lr]")
    with die_in(10):
        dead.resume("train.keep=9").fails(5)
    with die_in(9):
        error = dead.ftune("train", f"resume={dead.run / 'checkpoints/step-00000004'}", *other).fails(5)
    assert "lightning" in error[0]
    assert [json.loads(line)["step"] for line in (dead.run / "witness.jsonl").read_text().splitlines()] == [5, 5, 5]
    assert told(dead.resume(*other).ok()).endswith("weights and moments (sha256), rows of the next 2 updates")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*one_a_task(), "sentiment_lora"])
def test_every_task_comes_back_as_it_was_saved(name: str, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    keys = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "data.max_rows=96"]
    keys += ["train.steps=4", "train.save_every=2", "train.batch_size=16", "device=cpu", "device.threads=1", f"run.dir={tmp_path / 'run'}"]
    with die_in(4):
        ftune_inside("train", f"+exp={name}", *keys).fails(5)
    assert "rows of the next 2 updates, loss of step 3 (to the bit)" in told(ftune_inside("train", f"resume={tmp_path / 'run'}").ok())
