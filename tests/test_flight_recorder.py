"""What a run leaves behind of a bad end: the last updates and, where numbers went bad, the very rows; and what that costs before."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import poison
import pytest
import torch
from ran import Ran

from finetune_cli.engine.flight import Recorder, block_of
from finetune_cli.engine.optimizer import Updater
from finetune_cli.engine.trainer import Trainer
from finetune_cli.errors import MachineError

Ftune = Callable[..., Ran]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_that_go_bad_name_step_rows_and_the_folder(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison.poison(monkeypatch)
    ran, run = poison.train(ftune_inside, tmp_path)
    error = ran.fails(4)
    summary = json.loads((run / "crash/crash.json").read_text())
    step = summary["step"]
    assert f"not finite at step {step}" in error[0] and f"step {step}, rows data/train.csv:" in error[1]
    assert str(run / "crash") in error[1]
    assert summary["exit_code"] == 4 and summary["loss"] == "nan" and summary["gradient_norm"] == "nan"
    updates, rows = lines(run / "crash/updates.jsonl"), lines(run / "crash/rows.jsonl")
    assert [update["step"] for update in updates] == list(range(1, step + 1))
    (numbers,) = updates[-1]["rows"].values()
    assert sorted(numbers) == sorted(row["row"] for row in rows) and poison.ROW in numbers and len(numbers) == 8
    (bad,) = [row for row in rows if row["row"] == poison.ROW]
    assert bad["text"].endswith(poison.SIGN) and bad["line"] == poison.ROW + 1
    assert bad["sha256"] == hashlib.sha256(bad["text"].encode()).hexdigest()
    good = [update for update in updates if update["step"] < step]
    metrics = {line["step"]: line["train/loss"] for line in lines(run / "metrics.jsonl")}
    assert good and all(metrics[update["step"]] == update["loss"] for update in good)
    for update in good:
        assert update["gradient_norm"] ** 2 == pytest.approx(sum(norm**2 for norm in update["blocks"].values()))
        assert update["seconds"] > 0 and update["memory_mb"] > 1 and "bert.encoder.layer.0" in update["blocks"]
    assert step == 7 and (run / "checkpoints/last").resolve().name == "step-00000004"


@pytest.mark.parametrize(("error", "code"), [(MachineError("lightning", where="here"), 5), (ZeroDivisionError("oh"), 1)])
def test_any_bad_end_is_recorded(error: Exception, code: int, ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.backward

    def failing(self: Trainer) -> torch.Tensor:
        if self.state.step == 3:
            raise error
        return real(self)

    monkeypatch.setattr(Trainer, "backward", failing)
    ran, run = poison.train(ftune_inside, tmp_path)
    ran.fails(code)
    updates = lines(run / "crash/updates.jsonl")
    assert [update["step"] for update in updates] == [1, 2, 3, 4]
    assert updates[3]["loss"] is None and updates[3]["seconds"] is None and updates[2]["loss"] is not None
    assert json.loads((run / "crash/crash.json").read_text())["exit_code"] == code and (run / "crash/rows.jsonl").is_file()


def test_a_stop_is_no_crash(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    real = Trainer.step

    def stopped(self: Trainer) -> None:
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    monkeypatch.setattr(Trainer, "step", stopped)
    ran, run = poison.train(ftune_inside, tmp_path)
    ran.fails(75)
    assert not (run / "crash").exists()


def test_the_norm_is_torchs_to_the_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(37, 11), torch.nn.LayerNorm(11), torch.nn.Linear(11, 3))
    updater = Updater.__new__(Updater)
    updater.first_bad = torch.zeros(())
    for seed in range(5):
        torch.manual_seed(seed)
        model(torch.randn(8, 37)).square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert updater._norm(list(range(len(gradients))), gradients) == torch.nn.utils.get_total_norm(gradients)


def test_the_ring_keeps_the_last_ones_up_to_the_bad_one() -> None:
    recorder = Recorder(lambda: 1.0, 10)
    for step in range(1, 201):
        recorder.end(recorder.begin(step, np.arange(4), 0.1))
    assert len(recorder.updates) == 60
    assert [update.step for update in recorder.until(None)] == list(range(151, 201))
    assert [update.step for update in recorder.until(195)] == list(range(146, 196))


def test_recording_costs_microseconds() -> None:
    """An update of the smallest model takes milliseconds."""
    from finetune_cli.config import DeviceConfig, DeviceName
    from finetune_cli.device import find

    recorder, rows, loss = Recorder(find(DeviceConfig(name=DeviceName.cpu)).memory_mb, 10), np.arange(32), torch.zeros(())
    began = time.thread_time()
    for step in range(2000):
        noted = recorder.begin(step, rows, 1e-3)
        noted.loss = loss
        noted.norms = None
        recorder.end(noted)
    assert (time.thread_time() - began) / 2000 < 1e-4


def test_blocks() -> None:
    assert block_of("bert.encoder.layer.11.attention.self.query.weight") == "bert.encoder.layer.11"
    assert block_of("bert.embeddings.word_embeddings.weight") == "bert.embeddings"
    assert block_of("classifier.weight") == "classifier" and block_of("scale") == "scale"
