"""Compiled layers: the model's own answers and gradients to rounding, in training alone; what cannot be compiled, and what is tried."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from forked import Forks
from ran import Ran, labelled_rows, write_rows
from test_device_equality import moved
from test_packing import SMALL, columns, without_dropout
from torch import nn
from torch._dynamo.utils import counters

from finetune_cli import models, packing
from finetune_cli.batching import Padded
from finetune_cli.config import TrainDeviceConfig
from finetune_cli.device import DevicePlan, find
from finetune_cli.engine import trial
from finetune_cli.engine.signals import StopFlag, at_once
from finetune_cli.errors import MachineError, Stopped, UserError
from finetune_cli.models import compiled
from finetune_cli.packing import Packed
from finetune_cli.packing import rows as rows_of_tokens

Ftune = Callable[..., Ran]
compiles = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
DECODER = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """What was compiled here is nobody else's."""
    yield
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


def network(family: str) -> Any:
    torch.manual_seed(3)
    shape = SMALL if family == "Bert" else DECODER
    model = getattr(transformers, f"{family}ForSequenceClassification")(getattr(transformers, f"{family}Config")(**shape))
    without_dropout(model)
    return model


def passes(model: Any, layout: Any) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Logits and gradients of batches of several sizes."""
    for lengths in ([5, 9, 3], [7, 12, 4, 2], [21, 4]):
        model.zero_grad()
        place = next(model.parameters()).device
        inputs = {name: moved(value, place) for name, value in layout.lay(columns(lengths, types=False)).items()}
        logits = model(**inputs).logits
        logits.square().sum().backward()
        yield logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.device
@compiles
@pytest.mark.parametrize(("family", "packed"), [("Bert", True), pytest.param("Bert", False, marks=pytest.mark.thorough), ("Llama", True)])
def test_compiled_layers_are_the_models_own(family: str, packed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is compiled again for a batch of another size, which makes another number of rectangles."""
    monkeypatch.setattr(rows_of_tokens, "WORTH_A_GROUP", 1)
    model = network(family).to(device)
    if packed:
        assert packing.install(model) is None
    layout = Packed({}, 1) if packed else Padded({"input_ids": 0}, 64)
    model.train()
    own = list(passes(model, layout))
    packing.compile_layers(model)
    graphs = []
    for (logits, gradients), (now, those) in zip(own, passes(model, layout), strict=True):
        graphs.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(now, logits, rtol=1e-5, atol=1e-5)
        for one, other in zip(gradients, those, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert len(set(graphs)) == 1


def test_what_scores_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, and in evaluation, layers run as they are; where they train, the compiled ones are asked."""
    asked: list[str] = []
    monkeypatch.setattr(compiled, "_compiled", lambda function: lambda *a, **k: asked.append(function.__name__) or function(*a, **k))
    for packed in (True, False):
        model = network("Bert")
        if packed:
            assert packing.install(model) is None
        models.compile_layers(model)
        inputs = (Packed({}, 1) if packed else Padded({"input_ids": 0}, 64)).lay(columns([4, 9], types=False))
        model.eval()
        model(**inputs)
        model.train()
        with torch.no_grad():
            model(**inputs)
        assert not asked
        model(**inputs).logits.sum().backward()
        assert len(asked) == SMALL["num_hidden_layers"]
        asked.clear()


def test_every_layer_of_every_family_is_found() -> None:
    """The outermost lists of modules: not the parts of a T5 layer, which are lists too."""
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2, vocab_size=20))
    assert [type(layer).__name__ for layer in compiled._layers(t5)] == ["T5Block"] * 6
    assert [type(layer).__name__ for layer in compiled._layers(network("Llama"))] == ["LlamaDecoderLayer"] * 2
    assert not compiled._layers(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.thorough
@compiles
def test_a_compiled_run_is_resumed_compiled(ftune: Ftune, forks: Forks, rows: Path, tmp_path: Path) -> None:
    """The plan says so and is kept; the losses are those of a run without, to rounding; nothing stays behind."""
    keys = [f"data.train={rows}", "data.text=text", "data.label=label", "model=tiny", "model.dropout=0", "model.shape.layers=2"]
    keys += ["device=cpu", "device.precision=fp32", "train.steps=60", "train.log_every=1", "train.save_every=3"]
    plain, run = tmp_path / "plain", tmp_path / "run"
    ftune("train", *keys, f"run.dir={plain}").ok()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = ["train", *keys, "device.compile=true", f"run.dir={run}"]
    with forks.start(*started, cwd=tmp_path, env={"TMPDIR": str(tmp_path)}, fresh=True, **pipes) as process:
        while process.poll() is None and not (run / "checkpoints" / "step-00000009").exists():
            time.sleep(0.01)
        process.kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    assert b"compiling the layers" in err and b"for training (asked for)" in err
    assert json.loads((run / "manifest.json").read_text())["plan"]["device"]["compiled"] is True
    resumed = ftune("train", f"resume={run}", env={"TMPDIR": str(tmp_path)}, fresh=True).ok()
    assert "compiling the layers" in resumed.err and re.search(
        r"resumed state verified: .*, loss of step \d+ \((equal|nearly)", resumed.err
    )
    losses = []
    for there in (plain, run):
        lines = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
        losses.append({line["step"]: line["train/loss"] for line in lines if "train/loss" in line})
    assert losses[0].keys() == losses[1].keys()
    assert all(losses[1][step] == pytest.approx(losses[0][step], rel=1e-4) for step in range(1, 31))
    shutil.rmtree(next(tmp_path.glob("ftune-compiled-*")))  # of the one that was killed; others leave nothing
    assert not [file for there in tmp_path.glob("torchinductor_*") for file in there.rglob("*") if file.is_file()]
    assert not list(tmp_path.glob("ftune-compiled-*"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("compiled") / "train.csv"
    write_rows(file, labelled_rows(60))
    return file


# -- what cannot be compiled ---------------------------------------------------------------------
def test_a_broken_compiler_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def broken(function: Any) -> Any:
        def call(*a: Any, **k: Any) -> Any:
            raise BackendCompilerFailed(lambda: None, RuntimeError("g++ does not run"), None)  # type: ignore[arg-type]

        return call

    monkeypatch.setattr(compiled, "_compiled", broken)
    with pytest.raises(MachineError, match="cannot be compiled here.*g\\+\\+ does not run") as caught:
        models.in_training(len)([])
    assert caught.value.where == "device.compile"


def test_no_compiler_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        find(TrainDeviceConfig(name="cpu", compile=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        find(TrainDeviceConfig(name="cpu", compile=True))
    assert not find(TrainDeviceConfig(name="cpu")).compiled and not find(TrainDeviceConfig(name="cpu", compile=False)).compiled


@compiles
def test_a_compiled_plan_promises_no_bits_and_is_kept() -> None:
    plan = find(TrainDeviceConfig(name="cpu", compile=True))
    assert plan.compiled and not plan.deterministic
    saved = plan.saved()
    assert find(TrainDeviceConfig(name="cpu"), saved, goes_on=True).compiled
    assert not find(TrainDeviceConfig(name="cpu"), saved).compiled
    assert not find(TrainDeviceConfig(name="cpu", compile=False), saved, goes_on=True).compiled


# -- the trial -----------------------------------------------------------------------------------
class Clockwork:
    """A trainer whose updates take as long as it is told, compiled or not."""

    def __init__(self, plain: float, compiled: float | MachineError) -> None:
        self.model, self.times, self.is_compiled = nn.Linear(1, 1), (plain, compiled), False

    def seconds(self, trainer: Any) -> float:
        took = self.times[self.is_compiled]
        if isinstance(took, MachineError):
            raise took
        return took

    def compile(self, model: Any) -> None:
        self.is_compiled = True


@pytest.mark.parametrize(
    ("updates", "plain", "faster", "wanted", "said"),
    [
        (100_000, 0.1, 0.05, True, "tried: an update takes 0.05 s with compiled layers, 0.1 s without"),
        (100_000, 0.1, 0.099, False, "tried"),
        (2_000, 0.1, 0.05, False, "too few to try"),
        (900, 9.0, 1.0, False, "not tried"),
        (100_000, 0.1, MachineError("no compiler"), False, "no compiler"),
    ],
)
def test_a_long_run_on_cuda_tries_compiled_layers(
    updates: int, plain: float, faster: Any, wanted: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clockwork = Clockwork(plain, faster)
    monkeypatch.setattr(trial, "assembled", lambda *a: clockwork)
    monkeypatch.setattr(trial, "seconds", clockwork.seconds)
    monkeypatch.setattr(packing, "compile_layers", clockwork.compile)
    monkeypatch.setattr(trial.Timetable, "of", lambda *a: SimpleNamespace(total=updates))
    plan = on_cuda()
    prepared = Prepared(plan)
    found = trial.chosen(SimpleNamespace(device=TrainDeviceConfig(), train=None), prepared, None, StopFlag())  # type: ignore[arg-type]
    assert found.compiled is wanted and said in found.reasons["compile"] and found.deterministic is False
    if not wanted:
        assert found.precision == plan.precision and found.processes == plan.processes


@pytest.mark.parametrize("config", [{"compile": False}, {"compile": True}, {"deterministic": True}])
def test_what_is_settled_is_not_tried(config: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "assembled", None)
    monkeypatch.setattr(trial.Timetable, "of", lambda *a: SimpleNamespace(total=10**6))
    plan = replace(on_cuda(), deterministic=config.get("deterministic", False))
    settings = SimpleNamespace(device=TrainDeviceConfig(**config), train=None)
    assert trial.chosen(settings, Prepared(plan), None, StopFlag()) is plan  # type: ignore[arg-type]


def on_cuda() -> DevicePlan:
    plan = replace(find(TrainDeviceConfig(name="cpu")), device=torch.device("cuda"), deterministic=False)
    return plan.compiling(False, "not tried")


@dataclass
class Prepared:
    """As much of ``engine.prepared.Prepared`` as the trial reads."""

    device: DevicePlan
    data: Any = field(default_factory=lambda: {"train": SimpleNamespace(examples=[])})


# -- signals -------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs alarms")
def test_a_signal_raises_where_nothing_looks_and_again_where_it_is_caught() -> None:
    stop, caught = StopFlag(), 0
    before = signal.getsignal(signal.SIGALRM)
    with at_once(stop):
        stop.name = "SIGTERM"
        while caught < 2:
            try:
                while True:
                    sum(range(1000))
            except Stopped:
                caught += 1
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(Stopped), at_once(stop):
        raise AssertionError("a signal that came before is obeyed at the door")
