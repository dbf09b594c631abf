"""The heaviest batch is tried before step 1, and a budget of memory changes passes and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Ran, labelled_rows, write_rows
from safetensors.torch import load_file

from finetune_cli.engine import rehearsal

Ftune = Callable[..., Ran]
KEYS = ["data.train=train.csv", "data.text=text", "data.label=label", "model=tiny", "model.shape.layers=1", "model.shape.hidden=32"]
KEYS += ["model.dropout=0", "device=cpu", "device.precision=fp32", "train.batch_size=16", "train.epochs=2"]


@pytest.fixture(autouse=True)
def rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", labelled_rows(60))


def test_a_budget_makes_smaller_passes_of_the_same_batches(ftune_inside: Ftune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the heaviest pass takes is read, halved until it fits, told, and saved; weights are the same but for rounding."""
    tried: list[int] = []
    real = rehearsal.heaviest

    def noted(trainer: Any) -> Any:
        part = real(trainer)
        tried.append(int(trainer.lengths[part].sum()))
        assert trainer.state.step == 0 and all(p.grad is None for p in trainer.model.parameters())
        return part

    monkeypatch.setattr(rehearsal, "heaviest", noted)
    monkeypatch.setattr(rehearsal, "_peak", lambda: tried[-1] * 2**20)  # a MiB a token
    whole = ftune_inside("train", *KEYS, "run.dir=whole").ok().run
    assert not tried, "without a budget nothing is tried on a CPU"
    ran = ftune_inside("train", *KEYS, "run.dir=small", "device.memory_budget=0.1").ok()
    assert len(tried) >= 2 and tried == sorted(tried, reverse=True) and tried[-1] <= 102
    assert "does not fit" in ran.err
    saved = load_file(ran.run / "model" / "model.safetensors")
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    state = json.loads((ran.run / "checkpoints/last/state.json").read_text())
    assert "halved" in json.dumps(state["map"]["plan"])


def test_a_budget_that_one_row_exceeds_is_told_before_the_run(ftune_inside: Ftune, tmp_path: Path) -> None:
    told = ftune_inside("train", *KEYS, "run.dir=none", "device.memory_budget=0.05").fails(5)
    assert "a single row" in told[0] and "memory_budget" in told[1] and not (tmp_path / "none").exists()


def test_the_heaviest_pass_is_found(ftune_inside: Ftune, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(trainer: Any, budget: float | None) -> None:
        part = rehearsal.heaviest(trainer)
        cost = trainer.lengths[part].sum()
        seen.append(all(cost >= trainer.lengths[trainer.rows_of(step)].sum() for step in range(trainer.timetable.per_epoch)))

    monkeypatch.setattr("finetune_cli.commands.train.rehearse", look)
    ftune_inside("train", *KEYS, "run.dir=found").ok()
    assert seen == [True]
