"""Everything that stands before the model is built: data read and checked, device and model chosen, rows encoded.

All that can go wrong with them goes wrong here, before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune_cli import adapters, checkpoint, console, device, models, pooling, tasks
from finetune_cli.checkpoint import Knowledge
from finetune_cli.config import TrainConfig
from finetune_cli.data import Splits, SplitTable, audit, load_splits
from finetune_cli.device import DevicePlan
from finetune_cli.encoded import Examples
from finetune_cli.engine import expectations
from finetune_cli.engine.expectations import Expectation
from finetune_cli.engine.inference import Labelled
from finetune_cli.engine.optimizer import refuse_missing
from finetune_cli.engine.preparation import Encoder, labelled, longest_input, training_texts
from finetune_cli.engine.resume import Resumed
from finetune_cli.engine.resume import begun as began_with
from finetune_cli.engine.signals import StopFlag
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Task
from finetune_cli.tasks.sections import Table
from finetune_cli.world import outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything that stands before the model is built."""

    splits: Splits
    task: Task[Any]
    tokenizer: Any
    source: models.Source | None
    model_config: Any
    max_length: int
    data: dict[str, Labelled]
    table: SplitTable
    device: DevicePlan
    expectations: list[Expectation]
    ledger: Table | None
    begun: dict[str, Any] | None
    """The plan that a run which goes on began with."""

    def for_others(self) -> Prepared:
        """What the other processes need of it: no rows, nothing to judge, nothing to show."""
        return replace(self, splits=replace(self.splits, rows={}, notes=()), expectations=[], ledger=None)


def prepare(config: TrainConfig, user_set: frozenset[str], resumed: Resumed | None, stop: StopFlag) -> Prepared:
    """Read and check the data, choose device and model, encode. Raises UserError for what cannot be used as given."""
    known = Knowledge.read(resumed.checkpoint) if resumed and resumed.checkpoint else None
    begun = known.plan if known else began_with(resumed.run)[0] if resumed else None
    plan = device.find(config.device, begun["device"] if begun else None, goes_on=True)
    adapters.check(config.model, plan.device.type)
    kind = tasks.get(config.task.name)
    splits = _read(config, kind, user_set)
    stop.check()
    task = kind(config.task, known.facts if known else kind.learn(config.task, config.data, splits.rows["train"], splits.roles))
    expected = _check_options(config, task, splits)
    plan = _processes(config, task, plan)
    source = None if known else models.locate(config.model, offline=config.offline)  # a checkpoint needs no other model
    if source is not None and source.hub:
        models.ask_hub(source, offline=config.offline, key="model.path")
    elif source is not None:
        checkpoint.verify_weights(Path(source.name))
    plan.apply()
    _say_source(config, source)
    tokenizer, model_config, limit = _reader(config, resumed, source, splits)
    task = task.reading_with(tokenizer)
    if model_config is not None and known is None:
        adapters.check_targets(config.model, task, model_config)
    max_length = longest_input(config.data, limit)
    examples = _encode(Encoder(task, tokenizer, max_length, config.data), splits, stop)
    table = _count(config, task, splits, examples)
    return Prepared(
        splits=splits,
        task=task,
        tokenizer=tokenizer,
        source=source,
        model_config=model_config,
        max_length=max_length,
        table=table,
        ledger=_say_supervision(task, examples, splits),
        begun=begun,
        data=labelled(task, config.data, splits, examples),
        device=plan,
        expectations=expected,
    )


def _processes(config: TrainConfig, task: Task[Any], plan: DevicePlan) -> DevicePlan:
    """As many processes as the task and the batch allow. Raises UserError where more were asked for."""
    if plan.processes == 1:
        return plan
    asked = outside() is not None or config.device.processes != "auto"
    where = f"device.processes={plan.processes}"
    if task.rows_interact:
        if asked:
            raise UserError(
                "rows of a batch are compared with each other here, so that a batch cannot be shared between processes",
                where=where,
                fix="device.processes=1",
            )
        return plan.split(1, "rows of a batch are compared with each other")
    if plan.processes > config.train.batch_size:
        if asked:
            raise UserError(
                f"there are {plan.processes} processes for the {config.train.batch_size} rows of a batch",
                where=where,
                fix=f"device.processes={config.train.batch_size} or less, or a larger train.batch_size",
            )
        return plan.split(config.train.batch_size, "one a row of a batch")
    return plan


def _read(config: TrainConfig, kind: type[Task[Any]], user_set: frozenset[str]) -> Splits:
    """The rows of every split, in the form that the task reads; what was inferred is said."""
    with console.working("reading the data"):
        splits = load_splits(
            config.data,
            seed=config.train.seed,
            labelled=kind.labelled,
            offline=config.offline,
            stratify=kind.stratified,
            arrange=partial(kind.arrange_split, config.task),
            say=console.say,
        )
    for note in splits.notes:
        console.say(note)
    splits.refuse_unread(user_set)
    return splits


def _say_source(config: TrainConfig, source: models.Source | None) -> None:
    """Where the model comes from, and what it may do here."""
    if source is not None:
        console.say(f"model: {source.told}")
    if config.model.trust_remote_code:
        console.warn(f"the model's own code runs on this machine, as of commit {config.model.revision}")
    if config.model.pickled_weights:
        console.warn("pickled weights are accepted (loaded with weights_only)")


def _encode(encoder: Encoder, splits: Splits, stop: StopFlag) -> dict[str, Examples]:
    examples = {}
    for name, rows in splits.rows.items():
        stop.check()
        with console.working(f"tokenising {name}"):
            examples[name] = encoder.split(rows, splits.roles, splits.sources[name])
    return examples


def _count(config: TrainConfig, task: Task[Any], splits: Splits, examples: dict[str, Examples]) -> SplitTable:
    """The table of the splits, judged and shown."""
    cells = {name: task.label_cells(config.data, splits.rows[name], splits.roles) for name in splits.labelled}
    table = audit(splits, config.data, {k: v for k, v in cells.items() if v is not None}, {k: v.counts for k, v in examples.items()})
    console.table("data", table.headers, table.cells)
    for warning in table.warnings:
        console.warn(warning)
    return table


def _say_supervision(task: Task[Any], examples: dict[str, Examples], splits: Splits) -> Table | None:
    """What is learnt from, in numbers and in a few examples, where that is more than a label a row."""
    ledger = task.ledger(examples, splits.rows)
    if ledger is not None:
        console.table(ledger.title.lower(), ledger.columns, ledger.rows)
        if ledger.note:
            console.say(ledger.note)
    for shown in task.shown(examples["train"], splits.rows["train"]):
        console.marked(shown.title, shown.pieces)
    return ledger


def _check_options(config: TrainConfig, task: Task[Any], splits: Splits) -> list[Expectation]:
    """Options that only the task and the data can judge."""
    task.refuse_misfits(training=True)
    refuse_missing(config.optimizer)
    names = task.metric_names()
    monitor = config.train.monitor
    if monitor is not None and monitor not in names:
        raise UserError(f"this task has no metric '{monitor}'", where="train.monitor", fix=f"one of {', '.join(sorted(names))}")
    if "validation" not in splits.labelled:
        watching = [key for key, value in (("train.monitor", monitor), ("train.patience", config.train.patience)) if value is not None]
        for key in watching + task.needs_validation(config.task):
            raise UserError(f"{key} needs validation rows, and there are none", where=key, fix="data.validation=0.1, or a file")
    if config.expect and not splits.labelled & {"validation", "test"}:
        raise UserError(
            "an expectation needs labelled test or validation rows", where="expect", fix="data.test=FILE or data.validation=0.1"
        )
    return expectations.read(config.expect, names)


def _reader(config: TrainConfig, resumed: Resumed | None, source: models.Source | None, splits: Splits) -> tuple[Any, Any, int]:
    """(tokenizer, transformers config or None, longest input) of the checkpoint, of the named model, or learnt from the training texts."""
    kind = tasks.get(config.task.name)
    if resumed and resumed.checkpoint:
        source = models.Source(str(resumed.checkpoint), None, "")
    model_config = None if source is None else models.load_config(source, config.model, offline=config.offline)
    pooling.refuse_unknown(config.model, auto_class=kind.auto_class, model_type=models.family(model_config, kind.architecture))
    if source is not None:
        tokenizer = models.load_tokenizer(source, config.model, offline=config.offline)
        models.check_vocabulary(tokenizer, model_config, source.name)
        return tokenizer, model_config, models.length_limit(model_config, tokenizer)
    with console.working("learning a vocabulary from the training texts"):
        tokenizer = models.train_tokenizer(training_texts(kind, splits.rows["train"], splits.roles), config.model, kind.architecture)
    return tokenizer, None, int(tokenizer.model_max_length)
