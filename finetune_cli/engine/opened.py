"""A model to be used, not trained: found, verified, loaded with the task, columns, length and plan that training saved beside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from finetune_cli import checkpoint, console, device, models, packing, tasks
from finetune_cli.batching import BatchPlan
from finetune_cli.checkpoint import Knowledge
from finetune_cli.config import DataConfig, DeviceConfig, ModelConfig, Order, TaskConfig
from finetune_cli.device import DevicePlan
from finetune_cli.engine.preparation import Encoder, longest_input
from finetune_cli.errors import UserError
from finetune_cli.packing import Packed
from finetune_cli.run import Found, find, near_run
from finetune_cli.tasks.base import Layout, Task

INFERENCE_TOKENS = 4096
SEED = 42


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded model with everything needed to run it on rows."""

    found: Found
    task: Task[Any]
    model: nn.Module
    data: DataConfig
    encoder: Encoder
    layout: Layout
    plan: BatchPlan
    device: DevicePlan
    seed: int


def open_model(
    ckpt: Any, *, root: str, task: TaskConfig, data: DataConfig, where: DeviceConfig, offline: bool, local_rank: int = 0
) -> Opened:
    """Find and load ``ckpt``. Raises UserError where it is no usable model. ``local_rank``: which process of its machine this is."""
    if isinstance(ckpt, (list, tuple)):
        raise UserError("several checkpoints at once are not supported yet", where="ckpt", fix="name one checkpoint, or sweep: -m ckpt=A,B")
    found, source, offline = _located(str(ckpt), root=root, offline=offline)
    known = None if source.hub else Knowledge.read(found.weights)
    if known is not None and found.checkpoint is None:
        checkpoint.verify_weights(found.weights)
    if found.kind == "run" and found.checkpoint is None:
        console.say("the run has no checkpoints: what it exported, model/, is used")
    _refuse_another(known, task)
    config = ModelConfig(path=source.name)
    model_config = models.load_config(source, config, offline=offline)
    plan = device.find(where, known.plan["device"] if known else None).of(local_rank)
    plan.apply()
    tokenizer = models.load_tokenizer(source, config, offline=offline)
    with checkpoint.interpreting(found.weights):
        opened_task = _task(task, known, model_config, tokenizer)
        batches = BatchPlan(**known.plan["batches"]) if known else _plan()
    models.check_vocabulary(tokenizer, model_config, source.name)
    with console.working("loading the model"):
        if source.hub:
            model = _trained_on_hub(source, config, opened_task, model_config, offline=offline)
        else:
            model, _ = checkpoint.load_model(found.weights, opened_task, offline=offline, device=plan.device.type)
    opened_task.adjust(model)
    limit = models.length_limit(model_config, tokenizer)
    if data.max_length is None and known is not None:
        data = replace(data, max_length=known.max_length)
    length = longest_input(data, limit)
    model = model.to(plan.device)
    layout, _ = packing.layout(model, pad_id=tokenizer.pad_token_id or 0, limit=length, device=plan)
    batches = replace(batches, packed=isinstance(layout, Packed))
    told = found.run or (found.weights if not source.hub else source.name)
    console.say(
        f"model: {told}"
        + (f" ({found.checkpoint})" if found.checkpoint else "")
        + f" on {plan.device}, {plan.precision} ({plan.reasons['precision']})"
    )
    return Opened(
        found=found,
        task=opened_task,
        model=model,
        data=with_columns(data, known),
        encoder=Encoder(opened_task, tokenizer, length, data),
        layout=layout,
        plan=batches,
        device=plan,
        seed=known.seed if known else SEED,
    )


def _located(ckpt: str, *, root: str, offline: bool) -> tuple[Found, models.Source, bool]:
    """(where a model is, the same as a source, whether the network must be left alone); the hub is asked once, aloud."""
    found = find(ckpt, root=root)
    source = models.Source(str(found.weights), None, f"{found.kind} {found.weights}", hub=found.kind == "hub")
    if source.hub:
        named, near = ckpt.startswith("hub:"), near_run(source.name, root=root)
        here = "" if named else f"there is no run or model directory {source.name} here, nor {Path(root) / source.name}"
        offline = models.ask_hub(source, offline=offline, key="ckpt", here=here, near="" if named else str(near or ""))
    return found, source, offline


def _refuse_another(known: Knowledge | None, task: TaskConfig) -> None:
    """Raise UserError for a task that a checkpoint was not trained for."""
    if known is not None and known.task != task.name:
        what, fix = f"the checkpoint was trained for {known.task}", f"leave task out, or task={known.task}"
        raise UserError(what, where=f"task={task.name}", fix=fix)


def _task(config: TaskConfig, known: Knowledge | None, model_config: Any, tokenizer: Any) -> Task[Any]:
    """The task as training left it. Raises ValueError where what it knows is not what the model's config says."""
    kind = tasks.get(config.name)
    task = kind(config, known.facts if known else kind.facts_of(model_config), tokenizer)
    task.refuse_misfits(training=False)
    task.told_facts()
    task.configure(wanted := copy.deepcopy(model_config))
    if known and wanted.num_labels != model_config.num_labels:
        raise ValueError(f"{wanted.num_labels} labels for a head of {model_config.num_labels}")
    if known and wanted.id2label != model_config.id2label:
        said, held = (", ".join(map(str, named.id2label.values())) for named in (wanted, model_config))
        raise ValueError(f"its labels are {said}, those of config.json {held}")
    return task


def _trained_on_hub(source: models.Source, config: ModelConfig, task: Task[Any], model_config: Any, *, offline: bool) -> nn.Module:
    """A hub model with its head. Raises UserError where it has none of this task's."""
    model, new = models.load(source, config, task, model_config, seed=SEED, offline=offline)
    if new:
        raise UserError(
            f"the hub model has no trained head ({new[0]} is missing)",
            where="ckpt",
            fix="fine-tune it first: ftune train model.path=NAME",
        )
    return model


def _plan() -> BatchPlan:
    return BatchPlan(
        batch_size=1, micro_tokens=INFERENCE_TOKENS, inference_tokens=INFERENCE_TOKENS, order=Order.buckets.value, whole=False, reasons={}
    )


def with_columns(data: DataConfig, known: Knowledge | None) -> DataConfig:
    """The columns of training, where the user names none."""
    if known is None:
        return data
    filled: dict[str, Any] = {}
    if data.text is None:
        filled["text"] = known.columns["text"]
        if data.text_pair is None:
            filled["text_pair"] = known.columns["text_pair"]
    if data.label is None:
        filled["label"] = known.columns["label"]
    return replace(data, **filled)


def evaluation_name(opened: Opened, stem: str) -> str:
    """Name of a new evaluation: the file's stem, and the checkpoint where it is not the best."""
    checkpoint_name = opened.found.checkpoint if opened.found.kind == "checkpoint" else None
    return f"{stem}-{checkpoint_name}" if checkpoint_name else stem


def file_stem(files: tuple[str, ...]) -> str:
    """Stem of the first file of a split."""
    return Path(files[0]).name.partition(".")[0] if files else "rows"
