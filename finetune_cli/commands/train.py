"""``ftune train``: from a config to a run directory whose path is the only thing on stdout."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from finetune_cli import adapters, batching, checkpoint, console, device, metrics, models, packing, pooling, tasks
from finetune_cli.adapters import Adapter
from finetune_cli.checkpoint import Knowledge, Saver
from finetune_cli.config import Invocation, Pooling, TrainConfig, saved
from finetune_cli.data import Splits, audit, load_splits
from finetune_cli.device import DevicePlan
from finetune_cli.encoded import Examples
from finetune_cli.engine import environment, expectations, resume
from finetune_cli.engine.expectations import Expectation
from finetune_cli.engine.finish import finish
from finetune_cli.engine.inference import Labelled
from finetune_cli.engine.loop import Timetable, Trainer, fit
from finetune_cli.engine.optimizer import warmup_steps
from finetune_cli.engine.preparation import Encoder, labelled, longest_input, training_texts
from finetune_cli.engine.resume import Resumed
from finetune_cli.engine.signals import StopFlag, stoppable
from finetune_cli.errors import Diverged, Exit, FtuneError, Interrupted, Stopped, UserError
from finetune_cli.packing import Packed
from finetune_cli.run import Run, State
from finetune_cli.tasks.base import Task
from finetune_cli.tasks.sections import Table


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
    table: Any
    device: DevicePlan
    expectations: list[Expectation]
    ledger: Table | None


def run(config: TrainConfig, invocation: Invocation) -> float | None:
    """Train, and print the run directory whenever there is one. Returns the monitored score, for sweepers."""
    with stoppable() as stop:
        where = resume.wanted(config)
        resumed = resume.open_run(where, keep=config.train.keep) if where else None
        if resumed is not None and resumed.finished:
            resume.refuse_changes(resumed.run, config)
            console.say(f"nothing to do: the run is finished (resume={resumed.run.path})")
            print(resumed.run.path, flush=True)
            return None
        directory = resumed.run if resumed else Run.create(config.run, name=_name(config, invocation), keep=config.train.keep)
        console.attach(directory.log_path)
        try:
            return _within(config, invocation, directory, resumed, stop)
        finally:
            console.detach()
            directory.close()


def _within(config: TrainConfig, invocation: Invocation, directory: Run, resumed: Resumed | None, stop: StopFlag) -> float | None:
    """The run itself, inside its directory: whatever ends it is written into status.json."""
    began = False
    trainer: Trainer | None = None
    try:
        prepared = _prepare(config, invocation.user_set, resumed, stop)
        trainer = _trainer(config, invocation, prepared, directory, resumed, stop)
        began = True
        fit(trainer)
        value = finish(trainer, config, prepared.splits, prepared.table, prepared.data, prepared.expectations, prepared.ledger)
        _close(directory, "done", trainer.state.step, Exit.DONE)
        directory.link_latest()
        return value
    except FtuneError as error:
        if not began:
            if resumed is None:
                directory.abandon()  # nothing is lost: no step was made
            began = resumed is not None and error.code != Exit.USER  # what was to be gone on with stays as it was
            raise
        _close(directory, _state_of(error), trainer.state.step if trainer else 0, error.code)
        if error.code == Exit.EXPECTATION:
            directory.link_latest()
        began = True
        raise
    except BaseException:
        began = True
        directory.write_error(traceback.format_exc())
        _close(directory, "failed", trainer.state.step if trainer else 0, Exit.BUG)
        raise
    finally:
        if began:
            print(directory.path, flush=True)


def _state_of(error: FtuneError) -> State:
    if error.code == Exit.EXPECTATION:
        return "done"
    if isinstance(error, Interrupted):
        return "stopped"
    if isinstance(error, Stopped):
        return "preempted"
    return "diverged" if isinstance(error, Diverged) else "failed"


def _close(directory: Run, state: State, step: int, code: int) -> None:
    directory.set_status(state, step=step, code=int(code))


def _name(config: TrainConfig, invocation: Invocation) -> str:
    """What was trained, on what: ``sentiment-minilm``."""
    model = (config.model.path or "scratch").rstrip("/").rpartition("/")[2]
    return f"{invocation.experiment or config.task.name}-{model}"


def _prepare(config: TrainConfig, user_set: frozenset[str], resumed: Resumed | None, stop: StopFlag) -> Prepared:
    """Read and check the data, choose device and model, encode: all that can go wrong before a model is loaded."""
    known = Knowledge.read(resumed.checkpoint) if resumed and resumed.checkpoint else None
    plan = device.find(config.device, known.plan["device"] if known else None)
    adapters.check(config.model, plan.device.type)
    kind = tasks.get(config.task.name)
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
    stop.check()
    facts = known.facts if known else kind.learn(config.task, config.data, splits.rows["train"], splits.roles)
    task = kind(config.task, facts)
    expected = _check_options(config, task, splits)
    source = None if known else models.locate(config.model, offline=config.offline)  # a checkpoint needs no other model
    plan.apply()
    if source is not None:
        console.say(f"model: {source.told}")
    if config.model.trust_remote_code:
        console.warn(f"the model's own code runs on this machine, as of commit {config.model.revision}")
    if config.model.pickled_weights:
        console.warn("pickled weights are accepted (loaded with weights_only)")
    tokenizer, model_config, limit = _reader(config, resumed, source, splits)
    task = task.reading_with(tokenizer)
    if model_config is not None and known is None:
        adapters.check_targets(config.model, task, model_config)
    max_length = longest_input(config.data, limit)
    encoder = Encoder(task, tokenizer, max_length, config.data)
    examples = {}
    for name, rows in splits.rows.items():
        stop.check()
        with console.working(f"tokenising {name}"):
            examples[name] = encoder.split(rows, splits.roles, splits.sources[name])
    cells = {name: task.label_cells(config.data, splits.rows[name], splits.roles) for name in splits.labelled}
    table = audit(splits, config.data, {k: v for k, v in cells.items() if v is not None}, {k: v.counts for k, v in examples.items()})
    console.table("data", table.headers, table.cells)
    for warning in table.warnings:
        console.warn(warning)
    ledger = _say_supervision(task, examples, splits)
    return Prepared(
        splits=splits,
        task=task,
        tokenizer=tokenizer,
        source=source,
        model_config=model_config,
        max_length=max_length,
        data=labelled(task, config.data, splits, examples),
        table=table,
        device=plan,
        expectations=expected,
        ledger=ledger,
    )


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


def _model(config: TrainConfig, p: Prepared, resumed: Resumed | None, directory: Run) -> tuple[nn.Module, Adapter | None]:
    """The model with this run's head, and its adapter if any: from the checkpoint, from pretrained weights, or from scratch."""
    where = p.device.device.type
    if resumed and resumed.checkpoint:
        model, adapter = checkpoint.load_model(resumed.checkpoint, p.task, offline=config.offline, device=where)
    else:
        model, new, drawn = _fresh(config, p, where)
        changed = config.model.pooling != Pooling.own or drawn != new
        source = None if changed else p.source  # a base that is no longer what its name says is kept in the run
        adapter = adapters.attach(model, config.model, source=source, new=new, kept=directory.base_dir, seed=config.train.seed)
    if config.model.gradient_checkpointing:
        models.checkpoint_gradients(model)
    return model, adapter


def _fresh(config: TrainConfig, p: Prepared, where: str) -> tuple[nn.Module, list[str], list[str]]:
    """A model before its first step, the names of what its source did not have, and of those what stays as the seed drew it."""
    if p.source is None:
        model, new = models.build(config.model, p.task, p.tokenizer, seed=config.train.seed), list[str]()
    else:
        held = adapters.loading(config.model, p.task, p.model_config, where)
        with console.working("loading the model"):
            model, new = models.load(
                p.source, config.model, p.task, p.model_config, seed=config.train.seed, offline=config.offline, held=held
            )
    known = p.task.prepare(model)
    drawn = [name for name in new if name not in known]
    if known:
        console.say(f"set by the task before the first step: {', '.join(known)}")
    if p.source is not None:
        console.say(f"new in the model, drawn from the seed: {', '.join(drawn) or 'nothing'}")
    random = drawn if p.source is not None else ["all weights"]
    if config.train.steps == 0 and random and p.task.fitting_head() is None:
        console.warn(f"train.steps=0 trains nothing, and this stays random: {', '.join(random)}; the answers mean nothing")
    return model, new, drawn


def _trainer(config: TrainConfig, invocation: Invocation, p: Prepared, directory: Run, resumed: Resumed | None, stop: StopFlag) -> Trainer:
    """Model, plan and run directory put together; everything that is said before step 1."""
    train = p.data["train"]
    timetable = Timetable.of(config.train, len(train.examples))
    warmup = warmup_steps(config.optimizer, timetable.total)
    model, adapter = _model(config, p, resumed, directory)
    model = model if adapter and adapter.base.is_quantised else model.to(p.device.device)
    state = checkpoint.load_state(resumed.checkpoint) if resumed and resumed.checkpoint else None
    saved_plan = state["plan"] if state else None
    layout, layout_told = packing.layout(
        model,
        pad_id=p.tokenizer.pad_token_id or 0,
        limit=p.max_length,
        device=p.device,
        saved=saved_plan["packed"] if saved_plan else None,
    )
    p.task.adjust(model)
    packed = isinstance(layout, Packed)
    if saved_plan and saved_plan["packed"] != packed:
        console.warn(f"the run was packed and goes on {layout_told}: the same to rounding, not to the bit")
    plan = batching.find(
        config.train.batch_size,
        config.train.order,
        train.examples.lengths(),
        memory_bytes=environment.free_memory(p.device.device),
        bytes_per_token=models.activation_bytes(model.config, kept=not config.model.gradient_checkpointing),
        whole=p.task.rows_interact,
        packed=packed,
        layout=layout_told,
        saved=saved_plan,
    )
    plans = {"device": p.device.saved(), "batches": plan.saved()}
    knowledge = Knowledge(
        task=p.task.name, facts=p.task.facts, columns=p.splits.roles.options, max_length=p.max_length, seed=config.train.seed, plan=plans
    )
    if resumed:
        resume.compare(saved.load(directory.config_path, tasks=tasks.task_configs()), config)
        resume.compare_files(directory.manifest()["files"], p.splits.sources, config.resume_allow)
    else:
        weights = sum(t.numel() * t.element_size() for t in model.parameters())
        trained = sum(t.numel() * t.element_size() for t in model.parameters() if t.requires_grad)
        directory.write_manifest(_manifest(config, p, plans, model, adapter))
        directory.store.preflight(3 * trained, other_bytes=weights)
        directory.reserve(weights)
        directory.write_config(invocation.config_yaml)  # with it the run exists
    if adapter and p.source is None and not (resumed and resumed.checkpoint):
        _keep_base(directory, model, p.tokenizer)
    directory.write_command(["ftune", *invocation.typed])
    directory.set_status("running", step=state["step"] if state else 0)
    trainer = Trainer(
        task=p.task,
        model=model,
        train=train,
        validation=p.data.get("validation"),
        config=config.train,
        optimizer=config.optimizer,
        timetable=timetable,
        plan=plan,
        device=p.device,
        layout=layout,
        run=directory,
        saver=Saver(directory.store, knowledge, p.tokenizer, invocation.config_yaml, adapter),
        check=stop.check,
    )
    if state:
        trainer.restore(state)
        console.say(f"resuming from step {state['step']} ({resumed.checkpoint.name if resumed and resumed.checkpoint else ''})")
    elif resumed:
        directory.cut_metrics(0)  # it was stopped before its first checkpoint: every step is made again
    _say_plan(config, p, trainer, warmup)
    return trainer


def _keep_base(directory: Run, model: nn.Module, tokenizer: Any) -> None:
    """Write what an adapter stands on into the run, where no name leads to it."""
    plain = copy.deepcopy(model).cpu()
    adapters.bare(plain)
    with tempfile.TemporaryDirectory(prefix=".tmp-base-", dir=directory.path) as staging:
        checkpoint.write_model(Path(staging), plain, tokenizer)
        directory.write_base({p.name: p for p in Path(staging).iterdir()})


def _manifest(config: TrainConfig, p: Prepared, plans: dict[str, Any], model: nn.Module, adapter: Adapter | None) -> dict[str, Any]:
    """What proves the run: versions, hardware, plan with reasons, seed, files with sha256, facts."""
    trainable, everything = models.parameters(model)
    return {
        "versions": environment.versions(),
        "git": environment.git_commit(),
        "hardware": environment.hardware(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "plan": plans,
        "seed": config.train.seed,
        "files": p.splits.sources,
        "rows": {name: len(rows) for name, rows in p.splits.rows.items()},
        "task": p.task.name,
        "facts": p.task.facts,
        "model": {**asdict(p.source), "revision": getattr(p.model_config, "_commit_hash", None) or p.source.revision}
        if p.source
        else {"name": None, "told": "built from model.shape", "revision": None, "hub": False},
        "parameters": {"trainable": trainable, "all": everything},
        **({"adapter": {"config": adapter.config, "base": asdict(adapter.base)}} if adapter else {}),
    }


def _say_plan(config: TrainConfig, p: Prepared, trainer: Trainer, warmup: int) -> None:
    """The first screen: what will run, on what, and why."""
    trainable, everything = models.parameters(trainer.model)
    t, plan, d, adapter = trainer.timetable, trainer.plan, p.device, trainer.saver.adapter
    monitor = config.train.monitor or p.task.monitor
    direction = "higher" if metrics.better(monitor) == "max" else "lower"
    lines = [
        ("device", f"{d.device} ({d.reasons['device']}), {d.threads} threads ({d.reasons['threads']})"),
        ("precision", f"{d.precision} ({d.reasons['precision']})"),
        ("parameters", f"{trainable:,} trainable of {everything:,}"),
        *([("adapter", adapter.told), ("base", f"{adapter.base.told}, sha256 {adapter.base.sha256[:12]}…")] if adapter else []),
        *((name, text) for name, text in p.task.told_facts()),
        ("batch", f"{plan.batch_size} rows an update, at most {plan.micro_tokens:,} tokens at a time ({plan.reasons['micro_tokens']})"),
        ("order", f"{plan.order} ({plan.reasons['order']})"),
        ("layout", plan.reasons["layout"]),
        (
            "steps",
            f"{t.total} ({t.per_epoch} an epoch), {warmup} of warmup, {config.optimizer.schedule.value} from {config.optimizer.lr:g}",
        ),
        ("longest input", f"{p.max_length} tokens"),
        (
            "monitor",
            f"validation {monitor}, {direction} is better" if trainer.validation else "no validation rows: the last checkpoint is the best",
        ),
        ("run", str(trainer.run.path)),
    ]
    console.table("plan", ["", ""], lines)
