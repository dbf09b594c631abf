"""``ftune train``: from a config to a run directory whose path is the only thing on stdout."""

from __future__ import annotations

import copy
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from finetune_cli import adapters, checkpoint, console, machine, metrics, models, tasks
from finetune_cli.adapters import Adapter
from finetune_cli.config import Invocation, TrainConfig, saved
from finetune_cli.engine import building, environment, flight, resume, trial, verify
from finetune_cli.engine.finish import attend, finish
from finetune_cli.engine.loop import Trainer, fit
from finetune_cli.engine.optimizer import warmup_steps
from finetune_cli.engine.prepared import Prepared, prepare
from finetune_cli.engine.rehearsal import rehearse
from finetune_cli.engine.resume import Resumed
from finetune_cli.engine.signals import StopFlag, stoppable
from finetune_cli.engine.together import gathered
from finetune_cli.errors import Diverged, Exit, FtuneError, Interrupted, MachineError, Stopped
from finetune_cli.run import Run, State
from finetune_cli.storage import disk_trouble
from finetune_cli.world import Alone, Group, follow_if_outside


def run(config: TrainConfig, invocation: Invocation) -> float | None:
    """Train, and print the run directory whenever there is one. Returns the monitored score, for sweepers."""
    follow_if_outside(__name__)
    with stoppable() as stop:
        where = resume.wanted(config)
        if where is not None:
            resume.refuse_another_place(where, config, invocation.user_set)
        resumed = resume.open_run(where, keep=config.train.keep) if where else None
        if resumed is not None and resumed.finished:
            resume.refuse_changes(resumed.run, config)
            console.say(f"nothing to do: the run is finished (resume={resumed.run.path})")
            print(resumed.run.path, flush=True)
            return None
        if resumed is not None:
            stop.began(resumed.run.path)
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
    prepared: Prepared | None = None
    world = Alone(stop)
    try:
        with machine.faults():
            if resumed is not None:
                resume.refuse_edits(directory, resumed.checkpoint)
                resume.compare(saved.load(directory.config_path, tasks=tasks.task_configs()), config)
            prepared = prepare(config, invocation.user_set, resumed, stop)
            if resumed is None:
                prepared = replace(prepared, device=trial.chosen(config, prepared, directory, stop))
            if prepared.device.compiled:
                models.make_room_for_compiled()
            world = gathered(prepared.device, stop, __name__)
            world.share(Common(config, prepared.for_others(), directory.path, resumed.checkpoint if resumed else None))
            trainer = building.assembled(config, prepared, directory, resumed, world, config_yaml=invocation.config_yaml)
            rehearse(trainer, config.device.memory_budget)
            _begin(config, invocation, prepared, trainer, resumed, stop)
            began = True
            with disk_trouble(directory.fs, "writing the run", directory.path, any_cause=False):
                fit(trainer)
                stop.trained()
                value = finish(trainer, config, prepared.splits, prepared.table, prepared.data, prepared.expectations, prepared.ledger)
        _close(directory, "done", trainer.state.step, Exit.DONE)
        directory.link_latest()
        return value
    except FtuneError as error:
        error.of_run(str(directory.path) if began or resumed else None)
        if not began:
            if resumed is None:
                directory.abandon()  # nothing is lost: no step was made
            began = resumed is not None and error.code != Exit.USER  # what was to be gone on with stays as it was
            raise
        _record_crash(trainer, prepared, directory, error)
        _close(directory, _state_of(error), trainer.state.step if trainer else 0, error.code)
        if error.code == Exit.EXPECTATION:
            directory.link_latest()
        began = True
        if isinstance(error, Stopped) and stop.all_saved:
            console.warn("the training is done, its report is not: resume makes it")
        raise
    except BaseException as error:
        began = True
        directory.write_error(traceback.format_exc())
        _record_crash(trainer, prepared, directory, error)
        _close(directory, "failed", trainer.state.step if trainer else 0, Exit.BUG)
        raise
    finally:
        world.abandon()
        stop.said()
        if began and directory.path.is_dir():
            with suppress(MachineError) if sys.exc_info()[0] else nullcontext():  # a full stdout does not hide what ended the run
                print(directory.path, flush=True)


def _record_crash(trainer: Trainer | None, prepared: Prepared | None, directory: Run, error: BaseException) -> None:
    """What the flight recorder knows of a bad end; nothing that goes wrong here hides what went wrong before."""
    if trainer is None or prepared is None or not isinstance(error, Exception):
        return
    try:
        flight.crash(trainer, directory, prepared.splits.rows["train"], prepared.splits.roles, error)
    except Exception as trouble:  # noqa: BLE001  # a device that is lost may raise anything
        console.warn(f"the flight recorder could not be read: {trouble}")


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


@dataclass(frozen=True, slots=True)
class Common:
    """What every process of a run is given by the one that leads."""

    config: TrainConfig
    prepared: Prepared
    run: Path
    checkpoint: Path | None


def follow(world: Group) -> None:
    """What a process does that does not lead: its share of every batch and every scoring."""
    common: Common = world.share(cast(Common, None))
    prepared = replace(common.prepared, device=common.prepared.device.of(world.local_rank))
    directory = Run(common.run)
    resumed = Resumed(directory, common.checkpoint, finished=False) if common.checkpoint else None
    trainer = building.assembled(common.config, prepared, directory, resumed, world)
    rehearse(trainer, common.config.device.memory_budget)
    if common.checkpoint:
        verify.confirm(trainer, common.checkpoint)
    fit(trainer)
    attend(trainer, prepared.data)


def _begin(config: TrainConfig, invocation: Invocation, p: Prepared, trainer: Trainer, resumed: Resumed | None, stop: StopFlag) -> None:
    """Refuse what cannot be gone on with, make the directory a run, and say everything that is said before step 1."""
    directory, start = trainer.run, resumed.checkpoint if resumed else None
    adapter = trainer.saver.adapter
    if resumed:
        before = saved.load(directory.config_path, tasks=tasks.task_configs())
        resume.compare_files(resume.begun(directory)[1], p.splits.sources, config.resume_allow)
        if start:
            directory.check_metrics(trainer.state.metrics_bytes, trainer.state.metrics_sha256)
            changed = [text.split(" was ")[0] for text in resume.changes(before, config, allowed=())]
            verify.confirm(trainer, start, [*changed, *(key for key in config.resume_allow if key.startswith("data."))])
    else:
        _write_first(directory, invocation, _manifest(config, p, trainer.saver.knowledge.plan, trainer.model, adapter), trainer)
    if adapter and p.source is None and not start:
        _keep_base(directory, trainer.model, p.tokenizer)
    stop.began(directory.path)
    directory.store.make()
    directory.write_command(["ftune", *invocation.typed])
    directory.set_status("running", step=trainer.state.step)
    if start:
        directory.cut_metrics(trainer.state.metrics_bytes)
        directory.cut_witness(trainer.state.step + 1)
        console.say(f"resuming from step {trainer.state.step} ({start.name})")
    elif resumed:
        directory.cut_witness(0)
        directory.cut_metrics(0)  # it was stopped before its first checkpoint: every step is made again
    _say_plan(config, p, trainer)


def _write_first(directory: Run, invocation: Invocation, manifest: dict[str, Any], trainer: Trainer) -> None:
    """Write what makes a directory a run, once there is room for its checkpoints."""
    directory.write_manifest(manifest | {"config_sha256": directory.config_sha256(invocation.config_yaml)})
    _, _, of_model = trainer.room_on_disk()
    directory.reserve(of_model)
    directory.write_config(invocation.config_yaml)  # with it the run exists


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


def _say_plan(config: TrainConfig, p: Prepared, trainer: Trainer) -> None:
    """The first screen: what will run, on what, and why."""
    trainable, everything = models.parameters(trainer.model)
    t, plan, d, adapter = trainer.timetable, trainer.plan, p.device, trainer.saver.adapter
    warmup = warmup_steps(config.optimizer, t.total)
    monitor = config.train.monitor or p.task.monitor
    direction = "higher" if metrics.better(monitor) == "max" else "lower"
    lines = [
        ("device", f"{d.device} ({d.reasons['device']}), {d.threads} threads ({d.reasons['threads']})"),
        *([("processes", f"{d.processes} ({d.reasons['processes']})")] if d.processes > 1 else []),
        *([("compile", f"the layers, for training ({d.reasons['compile']})")] if d.compiled else []),
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
