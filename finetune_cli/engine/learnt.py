"""Whether the rows to be scored are rows that the run learnt from: their score would be that of a memory."""

from __future__ import annotations

from dataclasses import fields

from finetune_cli.checkpoint import Knowledge
from finetune_cli.config import DataConfig, saved
from finetune_cli.data import Splits
from finetune_cli.data.rows import listed
from finetune_cli.data.splits import fraction
from finetune_cli.engine.opened import Opened, with_columns
from finetune_cli.engine.resume import begun
from finetune_cli.errors import UserError
from finetune_cli.run import Run
from finetune_cli.tasks import task_configs

SHARES = ("validation", "test")
MOVE_NO_ROW = ("train", "text", "text_pair", "rows_per_label")
"""Options, beside the limits ``max_*``, that change nothing about which rows are split off; files are told apart by their sha256."""


def judge(opened: Opened, splits: Splits, split: str) -> list[str]:
    """Warnings. Raises UserError for rows split off training files otherwise than the run split them."""
    found = opened.found
    if found.run is None or split == "train":
        return []
    try:
        trained = begun(Run.open(found.run))[1].get("train", {})
    except UserError as error:
        return [f"whether the run was trained on these rows cannot be told: {error.what}"]
    own = splits.sources[split]
    known = [name for name, digest in own.items() if digest in trained.values()]
    if fraction(getattr(opened.data, split), split) is None:
        told = "a file" if len(known) == 1 else "files"
        return [f"the run was trained on {listed(known)}, {told} to be scored: the score is that of rows learnt by heart"] if known else []
    if not known:
        stale = [name for name in own if name in trained]
        return [f"{listed(stale)} changed since the run was trained on it: rows split off it may have been learnt"] if stale else []
    moved = [] if list(own.values()) == list(trained.values()) else ["train"]
    if found.config is not None:
        before = saved.load(found.config, tasks=task_configs()).data
        moved += _moved(with_columns(before, Knowledge.read(found.weights)), opened.data)
    if moved:
        raise UserError(
            f"{split} would be split off {listed(known)}, and the run was trained on rows of it: it was split otherwise",
            where=", ".join(f"data.{name}" for name in moved),
            fix=f"data.{split}=FILE with rows that it has not seen",
        )
    return []


def _moved(before: DataConfig, now: DataConfig) -> list[str]:
    """Options that part the rows otherwise than before."""

    def value(data: DataConfig, name: str) -> object:
        return fraction(getattr(data, name), name) if name in SHARES else getattr(data, name)

    names = [f.name for f in fields(DataConfig) if f.name not in MOVE_NO_ROW and not f.name.startswith("max_")]
    return [name for name in names if value(before, name) != value(now, name)]
