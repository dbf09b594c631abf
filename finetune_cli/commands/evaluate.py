"""``ftune eval``: scores a checkpoint on a labelled split; the metrics go to stdout, everything else into ``eval/NAME``."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from functools import partial

from finetune_cli import console, report
from finetune_cli.config import DataConfig, EvalConfig, Invocation, Split
from finetune_cli.data import Splits, load_splits
from finetune_cli.data.splits import fraction
from finetune_cli.engine import environment, expectations, learnt, scoring, together
from finetune_cli.engine.inference import Labelled
from finetune_cli.engine.opened import Opened, evaluation_name, file_stem
from finetune_cli.engine.preparation import warn_if_cut
from finetune_cli.engine.scoring import Scored
from finetune_cli.engine.signals import stoppable
from finetune_cli.engine.together import worked_at
from finetune_cli.errors import UserError
from finetune_cli.run import Run, new_evaluation_dir
from finetune_cli.storage import REAL, disk_trouble
from finetune_cli.world import follow_if_outside


def run(config: EvalConfig, invocation: Invocation) -> float | None:
    """Score, print ``{split: {metric: …}}``, write the evaluation. Returns the task's own metric."""
    follow_if_outside(together.__name__)
    with stoppable() as stop, worked_at(config, stop) as (opened, world):
        expected = expectations.read(config.expect, opened.task.metric_names())
        splits, split = _read(config, opened, invocation.user_set)
        _refuse_unread(opened.data, split, invocation.typed)
        warnings = [*splits.warnings, *learnt.judge(opened, splits, split)]
        for warning in warnings:
            console.warn(warning)
        rows = splits.rows[split]
        targets = opened.task.read_targets(opened.data, rows, splits.roles)
        examples = opened.encoder.split(rows, splits.roles, splits.sources[split])
        warn_if_cut(split, examples, len(rows), opened.encoder.max_length)
        stop.check()
        data = world.share(Labelled(examples, targets))
        with console.working(f"scoring {len(rows)} rows"):
            scored = scoring.score(
                opened.task,
                opened.model,
                data,
                rows,
                splits.roles,
                seed=opened.seed,
                layout=opened.layout,
                plan=opened.plan,
                device=opened.device,
                world=world,
            )
        name = evaluation_name(opened, file_stem(rows.files))
        home = opened.found.run
        directory = Run.open(home).evaluation_dir(name) if home else new_evaluation_dir(name)
        with disk_trouble(REAL, "writing the scores", directory, fix="mend the disk or free space on it, then run it again"):
            scoring.write(directory, split, scored, opened.task, rows, splits.roles)
            report.write(
                directory,
                report.Report(
                    title=f"{directory.name} of {home.name if home else opened.found.weights}",
                    run="RUN" if home else str(opened.found.weights),
                    summary=[("task", opened.task.name), *opened.task.told_facts(), ("rows", f"{len(rows)} of {', '.join(rows.files)}")],
                    scores={split: scored.score},
                    baselines={},
                    history=[],
                    timing=[],
                    sections=scored.sections,
                    data_table=None,
                    config_yaml=invocation.config_yaml,
                    environment=environment.versions(),
                    notes=warnings,
                ),
            )
        _show(split, scored)
        console.say(f"written: {directory}")
        expectations.judge(expected, split, scored.score)
        value: float | None = scored.score[opened.task.monitor]["value"]
        return value


def _read(config: EvalConfig, opened: Opened, user_set: Collection[str]) -> tuple[Splits, str]:
    """The split to score: the one asked for or named, else test where it is labelled, else validation. Only what is needed is read."""
    there = [name for name in ("test", "validation") if getattr(opened.data, name) is not None]
    named = [name for name in there if f"data.{name}" in user_set]  # rows that the user gave are scored, or it is an error
    wanted = [config.split.value] if config.split != Split.auto else named or there
    for name in wanted:
        with console.working(f"reading {name}"):
            splits = load_splits(
                opened.data,
                seed=opened.seed,
                offline=config.offline,
                only=(name,),
                labelled=opened.task.labelled,
                stratify=opened.task.stratified,
                arrange=partial(opened.task.arrange_split, opened.task.config),
                say=console.say,
            )
        for note in splits.notes:
            console.say(note)
        if name in splits.labelled:
            return splits, name
    told = " or ".join(wanted) or "test or validation"
    raise UserError(
        f"there are no labelled {told} rows",
        where=f"data.{(wanted or ['test'])[0]}",
        fix="data.test=FILE with a label column; data.label=COLUMN names it",
    )


def _refuse_unread(data: DataConfig, split: str, typed: Collection[str]) -> None:
    """Raise UserError for typed rows, or a number of training rows, that the split which is scored does not come from."""
    shares = [name for name in ("validation", "test") if fraction(getattr(data, name), f"data.{name}") is not None]
    read = {split, "train", *shares} if split in shares else {split, *shares} if split == "train" else {split}
    unread = {f"data.{name}": name for name in ("train", "validation", "test") if name not in read}
    unread |= {} if split == "train" else {"data.max_rows": "train", "data.rows_per_label": "train"}
    for key, other in unread.items():
        if any(word.lstrip("+").startswith(f"{key}=") for word in typed):
            raise UserError(f"{key} is about {other} rows, and {split} rows are scored", where=key, fix=f"leave it out, or split={other}")


def _show(split: str, scored: Scored) -> None:
    """JSON where a program reads, a table where a person does."""
    if sys.stdout.isatty():
        headers, rows = scoring.table_rows(scored.score)
        print(console.layout(split, headers, rows), flush=True)
    else:
        print(json.dumps({split: scored.score}), flush=True)
