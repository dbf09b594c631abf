"""A run with one row whose numbers go bad: a sign that no other row has, with an embedding that overflows in the first LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Ran, labelled_rows, write_rows

from finetune_cli import models

SIGN, ROW = "☃", 38
SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.steps=8", "train.batch_size=8", "train.save_every=4"]
SMALL += ["train.log_every=1", "device=cpu", "device.threads=1", "device.precision=fp32", "train.eval_every=100", "train.seed=1"]


def keys(home: Path) -> list[str]:
    """64 rows in ``home``; data row 38 of train holds the sign."""
    found = []
    for name, count, shift in (("train", 64, 0), ("validation", 16, 64)):
        rows = labelled_rows(count, shift=shift)
        if name == "train":
            rows[ROW - 1]["text"] += f" {SIGN}"
        found.append(f"data.{name}={write_rows(home / 'data' / f'{name}.csv', rows)}")
    return [*found, *SMALL]


def poison(patch: pytest.MonkeyPatch) -> None:
    """Models that are built give that sign numbers that are finite, and whose differences are not."""
    real = models.build

    def build(config: Any, task: Any, tokenizer: Any, **how: Any) -> Any:
        model = real(config, task, tokenizer, **how)
        place = tokenizer.convert_tokens_to_ids(SIGN)
        assert place != tokenizer.unk_token_id
        with torch.no_grad():
            row = model.get_input_embeddings().weight[place]
            row.fill_(3e38)
            row[::2] *= -1
        return model

    patch.setattr(models, "build", build)


def train(ftune: Callable[..., Ran], home: Path, *more: str) -> tuple[Ran, Path]:
    """(how the training ended, its run directory)."""
    return ftune("train", *keys(home), f"run.dir={home / 'run'}", *more), home / "run"
