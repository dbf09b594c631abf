"""The end of training: score the best checkpoint, export it, prove the export, write the report, judge what was expected."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from finetune_cli import checkpoint, console, metrics, models, randomness, report
from finetune_cli.baselines import CONSTANT
from finetune_cli.checkpoint import Knowledge
from finetune_cli.config import TrainConfig, saved
from finetune_cli.data import Rows, Splits, texts
from finetune_cli.engine import environment, expectations, export, profile, resume, scoring
from finetune_cli.engine.expectations import Expectation
from finetune_cli.engine.export import ReloadCheck
from finetune_cli.engine.inference import Labelled
from finetune_cli.engine.loop import Trainer
from finetune_cli.engine.scoring import Scored
from finetune_cli.run import Run
from finetune_cli.tasks import task_configs
from finetune_cli.tasks.base import Score, Task
from finetune_cli.tasks.sections import Table

BASELINE_ROWS = 20_000
"""Most training rows whose texts are held in memory for the baselines."""


def finish(
    trainer: Trainer,
    config: TrainConfig,
    splits: Splits,
    table: Any,
    data: dict[str, Labelled],
    expected: list[Expectation],
    ledger: Table | None,
) -> float | None:
    """Everything after the last step; returns the monitored score of the best checkpoint on validation.

    A signal stops between its parts: all is saved by then, and a resume does them again.
    """
    run, world = trainer.run, trainer.world
    best = _take_best(trainer)
    task = trainer.task
    names = world.share([name for name in ("validation", "test") if name in data and name in splits.labelled])
    scored: dict[str, Scored] = {name: _score(trainer, splits, data[name], name) for name in names}
    scores: dict[str, Score] = {name: s.score for name, s in scored.items()}
    world.close()
    trainer.check()
    run.write_metrics(scores)
    judged = next((name for name in ("test", "validation") if name in scores), None)
    card = _card(trainer, config, splits, scores)
    trainer.check()
    proved = export.export(run, best, task, trainer.model, trainer.saver, card)
    environment.give_back_memory()
    shown = data.get(judged or "train") or data["train"]
    check = ReloadCheck.start(
        run,
        task,
        proved,
        shown,
        splits.rows[judged or "train"],
        splits.roles,
        layout=trainer.layout if proved is trainer.model else None,
        limit=trainer.saver.knowledge.max_length,
    )
    models.let_go(trainer.model)  # the stranger's process holds one now
    try:
        trainer.check()
        free = _baselines(trainer, splits, data, judged) if judged else {}
        trainer.check()
        _report(trainer, config, splits, table, scored, {judged: free} if judged else {}, [ledger] if ledger is not None else [])
        trainer.check()
        console.say(check.finish())
    except BaseException:
        check.abort()
        raise
    _say_end(run.path, judged, scores, free)
    if judged:
        expectations.judge(expected, judged, scores[judged])
    monitor = config.train.monitor or task.monitor
    if judged:
        _warn_if_nothing_was_learnt(judged, monitor, scores[judged], free)
    entry = scores.get("validation", {}).get(monitor)
    return None if entry is None else entry["value"]


def _take_best(trainer: Trainer) -> Path:
    """Give every process the weights and facts of the best checkpoint; returns where it is."""
    run, world = trainer.run, trainer.world
    trainer.updater.release()
    models.drop_table_gradients(trainer.model)
    best = run.store.best() or run.store.last()
    assert best is not None, "a finished run has a checkpoint"
    known = Knowledge.read(best)
    assert known is not None, "a checkpoint of ours says what it knows"
    trainer.know(world.share(known.facts))
    _say_settled(trainer.task, run)
    if best.name != run.store.last().name:  # type: ignore[union-attr]
        checkpoint.load_weights(best, trainer.task, trainer.model, trainer.saver.adapter)
    world.same(trainer.model)
    return best


def attend(trainer: Trainer, data: dict[str, Labelled]) -> None:
    """What a process that does not lead does of ``finish``: its share of the scoring."""
    world = trainer.world
    trainer.updater.release()
    models.drop_table_gradients(trainer.model)
    trainer.know(world.share({}))
    world.same(trainer.model)
    for name in world.share([""]):
        trainer.infer(trainer.task, data[name], check=world.pause)
    world.close()


def _say_settled(task: Task[Any], run: Run) -> None:
    """Say which facts of the best checkpoint its validation rows settled."""
    before = task.knowing(run.manifest()["facts"]).told_facts()
    for name, text in task.told_facts():
        if (name, text) not in before:
            console.say(f"{name}: {text}")


def _score(trainer: Trainer, splits: Splits, data: Labelled, name: str) -> Scored:
    """Score one split with the best weights and write ``eval/NAME``."""
    rows = splits.rows[name]
    with console.working(f"scoring {name}"):
        scored = scoring.score(
            trainer.task,
            trainer.model,
            data,
            rows,
            splits.roles,
            seed=trainer.config.seed,
            layout=trainer.layout,
            plan=trainer.plan,
            device=trainer.device,
            world=trainer.world,
        )
        scoring.write(trainer.run.evaluation_dir(name, own=True), name, scored, trainer.task, rows, splits.roles)
    return scored


def _baselines(trainer: Trainer, splits: Splits, data: dict[str, Labelled], judged: str) -> dict[str, dict[str, float]]:
    """What majority and TF-IDF reach on the judged split."""
    with console.working("scoring the baselines"):
        train = _texts_and_targets(splits.rows["train"], splits, data["train"], trainer.config.seed)
        test = _texts_and_targets(splits.rows[judged], splits, data[judged], trainer.config.seed, most=None)
        found = trainer.task.baselines(train, test)
    if len(train[0]) < len(splits.rows["train"]):
        return {f"{name} (of {len(train[0]):,} rows)": scores for name, scores in found.items()}
    return found


def _texts_and_targets(rows: Rows, splits: Splits, data: Labelled, seed: int, *, most: int | None = BASELINE_ROWS) -> tuple[list[str], Any]:
    assert data.targets is not None
    if most is not None and len(rows) > most:
        chosen = np.sort(randomness.generator(seed, "baselines").permutation(len(rows))[:most])
    else:
        chosen = np.arange(len(rows))
    some = rows.take(chosen)
    first = texts(some, splits.roles.text)
    if splits.roles.text_pair:
        first = [f"{a} {b}" for a, b in zip(first, texts(some, splits.roles.text_pair), strict=True)]
    return first, data.targets[chosen]


def _card(trainer: Trainer, config: TrainConfig, splits: Splits, scores: dict[str, Score]) -> str:
    manifest = trainer.run.manifest()
    return report.model_card(
        name=trainer.run.path.name,
        task=trainer.task.name,
        pipeline=trainer.task.pipeline,
        auto_class=trainer.task.auto_class,
        base=manifest["model"]["told"],
        facts=trainer.task.told_facts(),
        rows=manifest["rows"],
        files=manifest["files"],
        scores=scores,
        hyperparameters={
            "learning rate": f"{config.optimizer.lr:g}",
            "batch size": str(config.train.batch_size),
            "steps": str(trainer.state.step),
            "optimizer": config.optimizer.name.value,
            "schedule": config.optimizer.schedule.value,
            "precision": trainer.device.precision,
            **({"adapter": trainer.saver.adapter.told} if trainer.saver.adapter else {}),
            "seed": str(config.train.seed),
            "longest input": f"{trainer.saver.knowledge.max_length} tokens",
        },
        versions=environment.versions(),
    )


def _which(trainer: Trainer, monitor: str) -> str:
    """How the exported checkpoint was chosen."""
    if trainer.validation is None:
        return "the last"
    if trainer.state.best is None:
        return f"the last: validation {monitor} was never a number"
    return f"step {trainer.state.best_step} of {trainer.timetable.total}, by validation {monitor}"


def _report(
    trainer: Trainer,
    config: TrainConfig,
    splits: Splits,
    table: Any,
    scored: dict[str, Scored],
    baselines: dict[str, dict[str, dict[str, float]]],
    ledgers: list[Table],
) -> None:
    run = trainer.run
    manifest = run.manifest()
    told = {**manifest["versions"], **{k: str(v) for k, v in manifest["hardware"].items()}}
    shown = next((scored[name] for name in ("test", "validation") if name in scored), None)
    monitor = config.train.monitor or trainer.task.monitor
    summary = [
        ("run", run.path.name),
        ("task", trainer.task.name),
        ("model", manifest["model"]["told"]),
        *trainer.task.told_facts(),
        ("best checkpoint", _which(trainer, monitor)),
        ("device", f"{trainer.device.device}, {trainer.device.precision} ({trainer.device.reasons['precision']})"),
    ]
    if later := resume.changes(saved.load(run.config_path, tasks=task_configs()), config, allowed=()):
        summary.append(("gone on with", "; ".join(later)))  # config.yaml stays what the run began with
    with console.working("writing the report"):
        report.write(
            run.report_dir,
            report.Report(
                title=run.path.name,
                run="RUN",  # a run can be moved
                summary=summary,
                scores={name: s.score for name, s in scored.items()},
                baselines=baselines,
                history=run.history(),
                timing=run.timing(),
                sections=[*ledgers, *profile.tables(run), *(shown.sections if shown else [])],
                data_table=Table("Data", table.headers, table.cells),
                monitor=monitor,
                notes=table.warnings,
                config_yaml=run.config_path.read_text(encoding="utf-8"),
                environment=told,
            ),
        )


def _warn_if_nothing_was_learnt(judged: str, monitor: str, score: Score, free: dict[str, dict[str, float]]) -> None:
    """Say so where the model is no better than the answer that needs no model."""
    if monitor not in score:
        return
    value, sign = score[monitor]["value"], 1.0 if metrics.better(monitor) == "max" else -1.0
    for name, scores in free.items():
        constant = scores.get(monitor)
        if name.startswith(CONSTANT) and constant is not None and sign * value <= sign * constant:
            console.warn(
                f"{judged} {monitor} {value:.4f} is no better than always giving the same answer ({constant:.4f}): "
                "try more train.epochs or another optimizer.lr"
            )


def _say_end(path: Any, judged: str | None, scores: dict[str, Score], free: dict[str, dict[str, float]]) -> None:
    """The last screen: scores beside the baselines, and what to run next."""
    if judged:
        headers, rows = scoring.table_rows(scores[judged], free)
        console.table(judged, headers, rows)
    console.say(f"report: {path}/report/index.html")
    console.say(f"next: ftune eval {shlex.quote(str(path))} data.test=FILE")
    console.say(f"      ftune predict {shlex.quote(str(path))} input=FILE")
