"""A model's score on a labelled split, with everything that is written down about it. Train and eval both come through here."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import nn

from finetune_cli.batching import BatchPlan
from finetune_cli.data import Roles, Rows, texts
from finetune_cli.device import DevicePlan
from finetune_cli.engine.inference import Labelled, infer
from finetune_cli.errors import UserError
from finetune_cli.said import STEERING
from finetune_cli.storage import REAL, json_bytes, write_whole
from finetune_cli.tasks.base import Evaluation, Layout, Score, Task
from finetune_cli.tasks.sections import Heatmap, Section
from finetune_cli.world import Alone

CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores with intervals, the report's sections, and what is needed to write the predictions down."""

    score: Score
    sections: list[Section]
    evaluation: Evaluation


def score(
    task: Task[Any],
    model: nn.Module,
    data: Labelled,
    rows: Rows,
    roles: Roles,
    *,
    seed: int,
    layout: Layout,
    plan: BatchPlan,
    device: DevicePlan,
    world: Alone,
) -> Scored:
    """Run the model over a labelled split and score it. Raises UserError where the split carries no labels."""
    if data.targets is None:
        raise UserError(
            "these rows carry no labels to score against",
            where=rows.files[0],
            fix="ftune predict labels them; data.label=COLUMN names labels",
        )
    inferred = infer(task, model, data, layout=layout, plan=plan, device=device, check=world.pause, world=world)
    evaluation = Evaluation(inferred.outputs, data.targets, seed, inferred.rows)
    loss = inferred.loss if inferred.loss is not None and math.isfinite(inferred.loss) else None
    entries: Score = {"loss": {"value": loss, "low": None, "high": None, "n": len(rows)}, **task.score(evaluation)}
    lengths = np.bincount(data.examples.row, data.examples.lengths(), len(rows)).astype(np.int64)
    found = task.sections(evaluation, rows, roles, lengths=lengths[inferred.rows])
    return Scored(entries, found, evaluation)


_ESCAPED = {code: f"\\u{code:04x}" for code in STEERING if code > ord("~")}


def json_text(value: Any) -> str:
    """One line of JSON that stays one line for every reader and steers no terminal: line separators and control characters are escaped."""
    return json.dumps(value, ensure_ascii=False, default=str).translate(_ESCAPED)


def write(directory: Path, split: str, scored: Scored, task: Task[Any], rows: Rows, roles: Roles) -> None:
    """``metrics.json``, ``predictions.jsonl`` and, where the task has one, ``confusion.csv`` (of several: numbered, with their titles)."""
    write_whole(REAL, directory / "metrics.json", json_bytes({split: scored.score}))

    def predictions(file: BinaryIO) -> None:
        decoded = task.decode(scored.evaluation.outputs, rows, roles)
        about = scored.evaluation.rows
        for start in range(0, len(about), CHUNK):
            some = about[start : start + CHUNK]
            for row, text in zip(some.tolist(), texts(rows.take(some), roles.text), strict=True):
                answer = {"row": row + 1, "text": text, **next(decoded)}
                if task.labelled:
                    answer["target"] = task.told(scored.evaluation.targets[row])
                file.write((json_text(answer) + "\n").encode("utf-8", "surrogatepass"))

    write_whole(REAL, directory / "predictions.jsonl", predictions)
    maps = [section for section in scored.sections if isinstance(section, Heatmap)]
    for number, section in enumerate(maps, 1):
        name, title = ("confusion.csv", "") if len(maps) == 1 else (f"confusion-{number}.csv", f"{section.title}: ")
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow([f"{title}{section.row_label} \\ {section.column_label}", *section.columns])
        writer.writerows([label, *values] for label, values in zip(section.rows, section.values, strict=True))
        write_whole(REAL, directory / name, table.getvalue().encode())


def table_rows(scores: Score, baselines: dict[str, dict[str, float]] | None = None) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a score table, the baselines beside it."""
    names = list(baselines or {})
    rows = []
    for metric, entry in scores.items():
        value, low, high = entry["value"], entry["low"], entry["high"]
        interval = "" if low is None or high is None else f"{low:.4f} – {high:.4f}"
        beside = [f"{baselines[n][metric]:.4f}" if baselines and metric in baselines[n] else "" for n in names]
        rows.append([metric, "undefined" if value is None else f"{value:.4f}", interval, *beside])
    return ["metric", "score", "95 % interval", *names], rows
