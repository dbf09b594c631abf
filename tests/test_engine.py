"""The training core: any split of a batch gives the same gradient, a killed run resumed is the same run, NaN never touches the weights."""

from __future__ import annotations

import copy
import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from finetune_cli import checkpoint, device, models, packing
from finetune_cli.batching import BatchPlan
from finetune_cli.checkpoint import Knowledge, Saver
from finetune_cli.config import DeviceConfig, DeviceName, ModelConfig, OptimizerConfig, OptimizerName, Precision, RunConfig, TrainSection
from finetune_cli.data import TokenCounts
from finetune_cli.encoded import Examples, Ragged
from finetune_cli.engine import finish
from finetune_cli.engine.inference import Labelled, infer
from finetune_cli.engine.loop import Timetable, Trainer, fit
from finetune_cli.engine.optimizer import Updater, groups, learning_rate
from finetune_cli.errors import Diverged, MachineError, Stopped
from finetune_cli.packing import Packed
from finetune_cli.run import Run
from finetune_cli.tasks import get
from finetune_cli.world import Alone

pytestmark = pytest.mark.device
ROWS, BATCH = 45, 8
FACTS = {"labels": ["a", "b", "c"], "cells": ["a", "b", "c"], "multi": False, "weights": None}


def texts() -> Iterator[str]:
    for i in range(200):
        yield f"row {i} says {'yes' if i % 2 else 'no'} to {['red', 'green', 'blue', 'white'][i % 4]} things"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.train_tokenizer(texts(), ModelConfig(shape={"vocabulary": 300}), "encoder")


def examples(count: int, seed: int) -> Labelled:
    draw = np.random.default_rng(seed)
    sequences = [draw.integers(5, 40, draw.integers(3, 30)) for _ in range(count)]
    targets = np.array([int(s.sum()) % 3 for s in sequences])
    return Labelled(Examples({"input_ids": Ragged.of(sequences)}, np.arange(count), TokenCounts()), targets)


def test_a_vocabulary_is_learnt_alike_in_every_process(tokenizer: Any) -> None:
    """tokenizers keeps some of its tables in hash order, which differs from process to process."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_engine import texts; from finetune_cli import models; "
        "from finetune_cli.config import ModelConfig; "
        "print(models.tokenizer_digest(models.train_tokenizer(texts(), ModelConfig(shape={'vocabulary': 300}), 'encoder')))"
    )
    here = Path(__file__).parent
    found = {
        subprocess.run(
            [sys.executable, "-c", program, str(here)], capture_output=True, text=True, check=True, cwd=here.parent
        ).stdout.strip()
        for _ in range(2)
    }
    assert found == {models.tokenizer_digest(tokenizer)}


Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any, device: str) -> Make:
    """``make(name, **changes)``: a trainer of a tiny model in ``tmp_path/name``; an existing run there is gone on with."""

    def build(
        name: str,
        *,
        micro: int = 4096,
        precision: str = "fp32",
        weights: list[float] | None = None,
        check: Callable[[], None] = lambda: None,
        optimizer: OptimizerConfig | None = None,
        model: ModelConfig | None = None,
        packed: bool = True,
        **train: Any,
    ) -> Trainer:
        facts = {**FACTS, "weights": weights}
        task = get("text-classification")(get("text-classification").Config(), facts)
        section = TrainSection(**{"epochs": 3, "batch_size": BATCH, "log_every": 2, "eval_every": 5, "save_every": 3, "seed": 5, **train})
        where = device_plan(device, precision)
        where.apply()
        opened = Run.exists(tmp_path / name)
        run = Run.open(tmp_path / name) if opened else Run.create(RunConfig(dir=str(tmp_path / name)), name=name)
        run.lock()
        if not opened:
            run.write_config("task: {name: text-classification}\n")
            run.set_status("running", step=0)
        run.store.sweep()
        newest, damaged = run.store.newest()
        assert not damaged
        shape = model or ModelConfig(shape={"layers": 2, "hidden": 32, "heads": 2, "intermediate": 64, "positions": 64})
        network = checkpoint.load_model(newest, task)[0] if newest else models.build(shape, task, tokenizer, seed=5)
        data = examples(ROWS, 1)
        network = network.to(where.device)
        layout, _ = packing.layout(network, pad_id=0, limit=64, device=where, saved=packed)
        assert isinstance(layout, Packed) is packed
        limits = {"batch_size": BATCH, "micro_tokens": micro, "inference_tokens": 256}
        plan = BatchPlan(**limits, order="buckets", whole=False, packed=packed, reasons={})
        knowledge = Knowledge(task=task.name, facts=facts, columns={}, max_length=64, seed=5, plan={})
        trainer = Trainer(
            task=task,
            model=network,
            train=data,
            validation=examples(20, 2),
            config=section,
            optimizer=optimizer or OptimizerConfig(lr=3e-3),
            timetable=Timetable.of(section, ROWS),
            plan=plan,
            device=where,
            layout=layout,
            run=run,
            saver=Saver(run.store, knowledge, tokenizer, "task: {}\n"),
            world=Alone(Asked(check)),
        )
        if newest:
            trainer.restore(checkpoint.load_state(newest))
            run.cut_metrics(trainer.state.metrics_bytes)
        return trainer

    return build


def device_plan(name: str, precision: str) -> device.DevicePlan:
    plan = device.find(DeviceConfig(name=DeviceName(name), precision=Precision(precision), threads=1))
    return replace(plan, deterministic=True)


def digest(trainer: Trainer) -> str:
    """Weights, moments and metrics.jsonl of a run, in one hash."""
    found = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        found.update(name.encode() + tensor.cpu().numpy().tobytes())
    for moments in trainer.updater.state()["moments"]:
        for name, value in sorted(moments.items()):
            found.update(name.encode() + value.cpu().numpy().tobytes())
    found.update((trainer.run.path / "metrics.jsonl").read_bytes())
    return found.hexdigest()


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    trainer.state.step = 2
    trainer.gradients(trainer.rows_of(2))
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


NO_DROPOUT = ModelConfig(dropout=0.0, shape={"layers": 2, "hidden": 32, "heads": 2, "intermediate": 64, "positions": 64})


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("micro", [1, 70, 130])
def test_accumulated_gradients_equal_those_of_the_big_batch(make: Make, micro: int, packed: bool, weights: list[float] | None) -> None:
    """In however many parts, packed or padded: the gradient of a batch is that of the padded whole."""
    whole = gradients(make("whole", weights=weights, model=NO_DROPOUT, packed=False))
    parts = make("parts", weights=weights, micro=micro, model=NO_DROPOUT, packed=packed)
    for a, b in zip(whole, gradients(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_ragged_tail_is_normalised_by_its_own_rows(make: Make) -> None:
    trainer = make("tail", model=NO_DROPOUT)
    sizes = [len(trainer.rows_of(step)) for step in range(trainer.timetable.per_epoch)]
    tail = sizes.index(ROWS % BATCH)
    rows = trainer.rows_of(tail)
    batch = trainer.batch(rows)
    trainer.model.train()
    logits = trainer.model(**batch.inputs).logits
    expected = torch.nn.functional.cross_entropy(logits, batch.targets)
    trainer.state.step = tail
    torch.testing.assert_close(trainer.gradients(rows), expected.detach())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_of_one_seed_are_bit_equal(make: Make, precision: str) -> None:
    found = []
    for name in ("one", "two"):
        trainer = make(name, precision=precision, micro=150)
        fit(trainer)
        found.append(digest(trainer))
    assert found[0] == found[1]
    other = make("other", precision=precision, micro=150, seed=6)
    fit(other)
    assert digest(other) != found[0]


class Asked:
    """In place of the flag that signals set: asks ``check``."""

    name, advice = None, ""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check


class Stop:
    """Raises Stopped at the n-th look."""

    def __init__(self, at: int) -> None:
        self.at, self.looks = at, 0

    def __call__(self) -> None:
        self.looks += 1
        if self.looks == self.at:
            raise Stopped("stopped", where="test")


def test_stopped_anywhere_and_resumed_is_the_same_run(make: Make) -> None:
    """A stop at every micro-batch and inside every scoring, each gone on with to the end."""
    counter = Stop(-1)
    reference = make("reference", micro=70, patience=2, check=counter)
    fit(reference)
    expected = digest(reference)
    assert counter.looks > 30
    for at in range(1, counter.looks + 1, 3):
        name = f"stop-{at}"
        trainer = make(name, micro=70, patience=2, check=Stop(at))
        with pytest.raises(Stopped):
            fit(trainer)
        trainer.run.close()
        resumed = make(name, micro=70, patience=2)
        fit(resumed)
        assert digest(resumed) == expected, f"stopped at look {at}"
        resumed.run.close()


def test_saving_scoring_and_logging_change_no_weight(make: Make) -> None:
    def weights(name: str, **changes: Any) -> bytes:
        trainer = make(name, **changes)
        fit(trainer)
        return b"".join(p.detach().cpu().numpy().tobytes() for p in trainer.model.parameters())

    plain = weights("plain")
    assert weights("often", save_every=1, eval_every=1, log_every=1) == plain
    assert weights("seldom", save_every="epoch", eval_every="epoch", log_every="epoch") == plain


def test_early_stopping_stops_and_the_best_is_kept(make: Make) -> None:
    trainer = make("early", patience=1, eval_every=1, monitor="loss", epochs=50)
    fit(trainer)
    assert trainer.state.step < trainer.timetable.total
    history = [r for r in trainer.run.history() if "validation/loss" in r]
    best = min(history, key=lambda r: r["validation/loss"])
    assert trainer.run.store.best().name == f"step-{best['step']:08d}"


@pytest.mark.parametrize("name", list(OptimizerName))
def test_every_optimizer_learns_and_resumes(make: Make, name: OptimizerName) -> None:
    if name == OptimizerName.adamw_8bit:
        pytest.importorskip("bitsandbytes")
    lr = {"sgd": 0.1, "adagrad": 0.03, "adafactor": 0.03}.get(name.value, 3e-3)
    config = OptimizerConfig(name=name, lr=lr, momentum=0.9 if name == OptimizerName.sgd else 0.0)
    reference = make("reference", optimizer=config, epochs=6)
    fit(reference)
    losses = [r["train/loss"] for r in reference.run.history() if "train/loss" in r]
    assert losses[-1] < losses[0]
    stopped = make("stopped", optimizer=config, epochs=6, check=Stop(20))
    with pytest.raises(Stopped):
        fit(stopped)
    stopped.run.close()
    resumed = make("stopped", optimizer=config, epochs=6)
    fit(resumed)
    assert digest(resumed) == digest(reference)


def test_nan_stops_before_the_weights_are_touched(make: Make) -> None:
    trainer = make("nan", save_every=1)
    for _ in range(3):
        trainer.step()
    trainer.state.closed = True
    trainer.save(best=False)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    real = trainer.task.loss
    trainer.task.loss = lambda outputs, batch: {"loss": real(outputs, batch)["loss"] * math.nan}  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="step 4"):
        fit(trainer)
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    assert trainer.run.store.newest()[0].name == "step-00000003"


def test_a_clipped_update_is_torchs(make: Make) -> None:
    """Clipping inside the fused optimizer equals clip_grad_norm_ and a plain step."""
    ours, theirs = make("ours", model=NO_DROPOUT), make("theirs", model=NO_DROPOUT)
    updater = Updater(ours.model, OptimizerConfig(lr=1e-2), clip=0.05, device=torch.device("cpu"), scaler=None)
    plain = torch.optim.AdamW(theirs.model.parameters(), lr=1e-2, weight_decay=0.0)
    for group in updater.optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(3):
        gradients(ours), gradients(theirs)
        norm = updater.update(1e-2, step=1, loss=torch.zeros(()))
        expected = torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 0.05)
        plain.step()
        plain.zero_grad()
        torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_out_of_memory_halves_and_keeps_the_mathematics(make: Make) -> None:
    plain, short = make("plain", model=NO_DROPOUT, epochs=1), make("short", model=NO_DROPOUT, epochs=1)
    real = short.task.forward

    def forward(model: Any, batch: Any) -> Any:
        if batch.inputs["input_ids"].numel() > 70:
            raise torch.OutOfMemoryError("no room")
        return real(model, batch)

    short.task.forward = forward  # type: ignore[method-assign]
    for _ in range(4):
        plain.step(), short.step()
    assert short.plan.micro_tokens < plain.plan.micro_tokens and short.plan.batch_size == BATCH
    for a, b in zip(plain.model.parameters(), short.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    inferred = [
        infer(t.task, t.model, t.validation, layout=t.layout, plan=t.plan, device=t.device, check=t.check).loss for t in (plain, short)
    ]
    assert inferred[0] == pytest.approx(inferred[1], rel=1e-3)


@pytest.mark.parametrize("packed", [True, False])
def test_an_update_never_waits_for_the_device(make: Make, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing between two log steps reads a value back: what an accelerator needs, held on a CPU by refusing every read."""
    trainer = make("waits", micro=70, packed=packed)
    trainer.updater.host_looks = False  # as on CUDA
    trainer.step()

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("an update read a tensor's value")

    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    before = trainer.model.classifier.weight.clone()
    trainer.step()
    monkeypatch.undo()
    assert not torch.equal(before, trainer.model.classifier.weight)


def test_a_bad_update_is_withheld_on_the_device(make: Make) -> None:
    """Where the host does not look, the fused kernel leaves weights alone from the first bad step on, and the host learns of it later."""
    trainer = make("withheld")
    trainer.updater.host_looks = False
    trainer.step()
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    hook = trainer.model.classifier.weight.register_hook(lambda gradient: gradient * math.inf)
    trainer.step()
    hook.remove()
    trainer.step()
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    with pytest.raises(Diverged, match="step 2"):
        trainer.updater.raise_if_bad()


def test_one_row_that_does_not_fit_is_the_machines_fault(make: Make) -> None:
    trainer = make("none")

    def forward(model: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    trainer.task.forward = forward  # type: ignore[method-assign]
    with pytest.raises(MachineError, match="single row"):
        fit(trainer)


def test_batches_side_by_side_give_the_same(make: Make) -> None:
    """Two threads with a batch each: the answers, loss and order of one after the other; memory that runs out and a stop pass through."""
    trainer = make("crew", model=NO_DROPOUT)
    data = examples(300, 3)
    common = {"layout": trainer.layout, "plan": trainer.plan}
    one = infer(trainer.task, trainer.model, data, device=trainer.device, check=trainer.check, **common)
    crew = replace(trainer.device, device=torch.device("cpu"), threads=2)
    if trainer.device.device.type != "cpu":
        return  # an accelerator takes one batch at a time
    real = trainer.task.forward

    def forward(model: Any, batch: Any) -> Any:
        if batch.inputs["input_ids"].numel() > 200:
            raise torch.OutOfMemoryError("no room")
        return real(model, batch)

    for way in (real, forward):
        trainer.task.forward = way  # type: ignore[method-assign]
        two = infer(trainer.task, trainer.model, data, device=crew, check=trainer.check, **common)
        np.testing.assert_allclose(two.outputs["logits"], one.outputs["logits"], atol=1e-5)
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        assert torch.get_num_threads() == 2
    with pytest.raises(Stopped):
        infer(trainer.task, trainer.model, data, device=crew, check=Stop(3), **common)
    torch.set_num_threads(trainer.device.threads)


@pytest.mark.parametrize("packed", [True, False])
def test_order_of_outputs_is_the_order_of_rows(make: Make, packed: bool) -> None:
    """Lengths are shuffled, batches sorted: every output must still belong to its row."""
    trainer = make("order", model=NO_DROPOUT, packed=packed)
    data = examples(60, 3)
    together = infer(
        trainer.task, trainer.model, data, layout=trainer.layout, plan=trainer.plan, device=trainer.device, check=trainer.check
    )
    for i in range(60):
        alone = Labelled(data.examples.take(np.array([i])), None)
        one = infer(
            trainer.task, trainer.model, alone, layout=trainer.layout, plan=trainer.plan, device=trainer.device, check=trainer.check
        )
        np.testing.assert_allclose(together.outputs["logits"][i], one.outputs["logits"][0], atol=1e-5)


@pytest.mark.parametrize("stop", [None, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_casts_of_weights_do_not_outlive_a_scoring(make: Make, threads: int, stop: int | None) -> None:
    """In bf16 weights are cast once for all batches; whether or not they all ended, the next answers are those of the weights of then."""
    trainer = make("casts", precision="bf16")
    data, device = examples(90, 3), replace(trainer.device, threads=threads)

    def answers(model: Any, check: Any = trainer.check) -> np.ndarray:
        found = infer(trainer.task, model, data, layout=trainer.layout, plan=trainer.plan, device=device, check=check)
        return np.asarray(found.outputs["logits"])

    before = answers(trainer.model)
    if stop is not None:
        with pytest.raises(Stopped):
            answers(trainer.model, Stop(stop))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    now, other = answers(trainer.model), answers(copy.deepcopy(trainer.model))
    torch.set_num_threads(trainer.device.threads)
    assert np.array_equal(now, other) and not np.allclose(now, before, rtol=1e-2)


@pytest.mark.parametrize(
    ("schedule", "first", "middle", "last"),
    [("linear", 0.1, 0.505, 0.01), ("cosine", 0.1, 0.505, 0.01), ("constant", 0.1, 1.0, 1.0), ("polynomial", 0.1, 0.2575, 0.01)],
)
def test_schedules(schedule: str, first: float, middle: float, last: float) -> None:
    config = OptimizerConfig(lr=1.0, warmup=10, schedule=schedule, min_lr=0.01, power=2.0)
    rates = [learning_rate(config, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(first) and rates[9] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(middle) and rates[110] == pytest.approx(last, abs=1e-9)
    assert learning_rate(replace(config, schedule="inverse_sqrt"), 39, 110) == pytest.approx(0.5)


def test_norms_and_biases_do_not_decay(make: Make) -> None:
    decayed, rest = make("groups").updater.optimizer.param_groups
    assert decayed["weight_decay"] == 0.01 and all(p.ndim > 1 for p in decayed["params"])
    assert rest["weight_decay"] == 0.0 and all(p.ndim == 1 for p in rest["params"])


def test_a_table_of_biases_does_not_decay() -> None:
    config = transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    decayed, rest = groups(model, 0.01)
    tables = {id(p) for name, p in model.named_parameters() if name.endswith("relative_attention_bias.weight")}
    assert len(tables) == 2 and tables <= {id(p) for p in rest["params"]} and not tables & {id(p) for p in decayed["params"]}


@pytest.mark.parametrize(
    ("metric", "value", "constant", "told"),
    [("accuracy", 0.5, 0.5, True), ("accuracy", 0.6, 0.5, False), ("rmse", 1.2, 1.1, True), ("rmse", 1.0, 1.1, False)],
)
def test_a_model_that_learnt_nothing_is_told_so(
    metric: str, value: float, constant: float, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    free = {"majority" if metric == "accuracy" else "mean": {metric: constant}, "TF-IDF + logistic regression": {metric: value}}
    finish._warn_if_nothing_was_learnt("test", metric, {metric: {"value": value}}, free)
    assert ("no better than always giving the same answer" in capsys.readouterr().err) is told
