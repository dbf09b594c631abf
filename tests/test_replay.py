"""``ftune replay`` finds the row that made an update go bad, and where in the model, and changes nothing else in the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import poison
import pytest
import torch
from ran import Ran

from finetune_cli.commands.replay import _sentence
from finetune_cli.engine.replay import Finding, halved
from finetune_cli.tasks import get

Ftune = Callable[..., Ran]


def files(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.is_symlink()}


def test_the_row_and_the_module_of_a_loss_that_is_not_finite(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 7 of a run with a checkpoint at 4: two updates are made again, the third is taken apart."""
    poison.poison(monkeypatch)
    _, run = poison.train(ftune_inside, tmp_path)
    before = files(run)
    ran = ftune_inside("replay", run).ok()
    found = ran.json
    assert (found["step"], found["from"], found["reproduced"], found["loss"], found["recorded_loss"]) == (7, 4, True, "nan", "nan")
    (row,) = found["rows"]
    assert row["row"] == poison.ROW and row["text"].endswith(poison.SIGN) and found["other_rows_too"] is False
    place = found["place"]
    assert (place["pass"], place["module"], place["kind"]) == ("forward", "bert.embeddings.LayerNorm", "LayerNorm")
    assert place["input_was_finite"] is True and "LayerNorm" in place["operator"]
    assert f"row {poison.ROW}" in ran.err and "bert.embeddings.LayerNorm" in ran.err
    after = files(run)
    assert json.loads(after.pop("crash/replay.json")) == found and after == before
    well = ftune_inside("replay", run / "checkpoints/step-00000004", "step=6").ok()
    assert well.json["reproduced"] is False and well.json["rows"] == [] and well.json["same_loss"] is True
    assert "nothing is wrong" in well.err
    earlier = ftune_inside("replay", run, "step=8").ok().json
    assert earlier["step"] == 7, "the first update that is not finite is the one to look at"


def test_a_gradient_that_is_not_finite(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of nought is finite, its slope is not; the run dies in its first update, before any checkpoint."""
    task = get("text-classification")
    real = task.label_loss

    def steep(self: Any, outputs: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {name: value + torch.sqrt(outputs.logits.sum() * 0) * 0 for name, value in real(self, outputs, batch).items()}

    monkeypatch.setattr(task, "label_loss", steep)
    _, run = poison.train(ftune_inside, tmp_path)
    found = ftune_inside("replay", run).ok().json
    assert (found["step"], found["from"], found["reproduced"], found["other_rows_too"]) == (1, 0, True, True)
    assert found["place"]["pass"] == "backward" and found["place"]["operator"] == "SqrtBackward0"
    assert math.isfinite(found["loss"]) and found["gradient_norm"] == "nan"


def test_an_infinite_gradient_has_an_operator_too(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope of a root at nought is infinite, and comes to the weights as an infinity or, two added up, as NaN of another operator."""
    task = get("text-classification")
    real = task.label_loss

    def steep(self: Any, outputs: Any, batch: Any) -> dict[str, torch.Tensor]:
        nought = (outputs.logits - outputs.logits.detach()).sum()
        return {name: value + torch.sqrt(nought) for name, value in real(self, outputs, batch).items()}

    monkeypatch.setattr(task, "label_loss", steep)
    _, run = poison.train(ftune_inside, tmp_path)
    ran = ftune_inside("replay", run).ok()
    assert ran.json["place"]["pass"] == "backward" and ran.json["place"]["operator"] == "SqrtBackward0"
    assert "first in the backward pass, SqrtBackward0" in ran.err


def test_what_cannot_be_replayed_is_said(ftune_inside: Ftune, tmp_path: Path) -> None:
    _, run = poison.train(ftune_inside, tmp_path)
    assert "no crash" in ftune_inside("replay", run).fails(2)[0]
    assert "8 steps" in ftune_inside("replay", run, "step=9").fails(2)[0]
    assert "no run" in ftune_inside("replay", run / "model", "step=1").fails(2)[0]
    assert "needs a run" in ftune_inside("replay").fails(2)[0]
    assert not (run / "crash").exists()


def test_a_place_without_a_name_is_left_out() -> None:
    """An overflow of the norm alone has no operator that returned nan, nor a parameter."""
    finding = Finding(1, 0.5, math.inf, "the gradient norm is inf", np.arange(1), False, {"pass": "backward", "operator": None})
    assert _sentence(finding, "row 1") == "step 1: the gradient norm is inf; rows: row 1; first in the backward pass"
    named = replace(finding, place={"pass": "loss", "operator": "LogBackward0"})
    assert _sentence(named, "row 1").endswith("; first in the loss, LogBackward0")


def test_halving_finds_one_or_those_that_are_bad_only_together() -> None:
    rows = np.arange(13)
    for bad in rows:
        assert list(halved(rows, lambda part, bad=bad: bad in part)) == [bad]
    assert {1, 2} <= set(halved(rows, lambda part: {1, 2} <= set(part.tolist()))) < set(rows)
    together = halved(rows, lambda part: {1, 12} <= set(part.tolist()))
    assert list(together) == list(rows)
