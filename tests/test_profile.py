"""``device.profile=true``: the parts sum to the update, the trace loads, the report shows the table, and the weights are the same."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ran import Ran

from finetune_cli.engine import profile
from finetune_cli.engine.profile import DATA, PARTS, STEP, STEPS, UPDATE, Profiled, part_of

OPTIONS = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.batch_size=8", "train.eval_every=4", "device.threads=1"]


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(profile.SIDES, "cpu", 64)


@pytest.fixture
def train(ftune_inside: Callable[..., Ran], corpus: Callable[..., Any]) -> Callable[..., Ran]:
    files = corpus(train=48)
    return lambda *more: ftune_inside("train", *files.keys, *OPTIONS, "device=cpu", *more)


def weights(ran: Ran) -> str:
    found = hashlib.sha256((ran.run / "metrics.jsonl").read_bytes())
    for name in ("model.safetensors", "state.safetensors"):
        found.update((ran.run / "checkpoints" / "last" / name).read_bytes())
    return found.hexdigest()


def test_the_parts_sum_to_the_update_and_nothing_changes(train: Callable[..., Ran]) -> None:
    ran = train("device.profile=true", "run.dir=looked").ok()
    found = Profiled(**json.loads((ran.run / "profile" / "parts.json").read_text()))
    assert tuple(found.parts) == PARTS and found.steps == STEPS
    assert sum(found.parts.values()) == pytest.approx(found.seconds) and all(taken >= 0 for taken in found.parts.values())
    for name in ("matrix products", "attention", "dropout and norm", "optimizer", "data"):
        assert found.parts[name] > 0, name
    assert found.operations > 1e5 and found.peak > 1e6
    with gzip.open(ran.run / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    assert names.count(STEP) == names.count(UPDATE) == names.count(DATA) == STEPS and "aten::mm" in names
    for told in (ran.err, (ran.run / "report" / "report.md").read_text(), (ran.run / "report" / "index.html").read_text()):
        assert "matrix products" in told and "other, waiting" in told
    assert weights(ran) == weights(train("run.dir=plain").ok())
    assert not (ran.run.parent / "plain" / "profile").exists()


def test_a_run_too_short_to_look_at_says_so(train: Callable[..., Ran]) -> None:
    ran = train("device.profile=true", "train.steps=3").ok()
    assert "nothing was profiled" in ran.err and not (ran.run / "profile").exists()


def test_a_short_run_is_looked_at_as_far_as_it_goes(train: Callable[..., Ran]) -> None:
    ran = train("device.profile=true", "train.steps=5").ok()
    assert json.loads((ran.run / "profile" / "parts.json").read_text())["steps"] == 2


def test_only_training_has_it(ftune_inside: Callable[..., Ran]) -> None:
    told = ftune_inside("predict", "ckpt=somewhere", "device.profile=true").fails()
    assert "device.profile" in told[0]


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mm"], "matrix products"),
        (["aten::addmm", "aten::linear"], "matrix products"),
        (["aten::copy_", "autograd::engine::evaluate_function: AddmmBackward0"], "other operators"),
        (["aten::mm", UPDATE], "optimizer"),
        (["aten::index", DATA], "data"),
        (["aten::bmm"], "attention"),
        (["aten::mul", "aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["aten::_log_softmax"], "other operators"),
        (["aten::native_layer_norm_backward"], "dropout and norm"),
        (["aten::where", "_KeepBackward"], "dropout and norm"),
    ],
)
def test_an_operator_belongs_to_what_called_it(names: list[str], part: str) -> None:
    event = None
    for name in reversed(names):
        event = SimpleNamespace(name=name, cpu_parent=event)
    assert part_of(event) == part
