"""From a config to encoded, checked splits: read, learn facts, tokenise once, count what is wrong. All before a model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

from finetune_cli import console, encoded, models
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import Roles, Rows, Splits
from finetune_cli.encoded import Examples
from finetune_cli.engine.inference import Labelled
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Task

CHUNK = 8192
"""Rows tokenised at a time: enough for every core, little enough to be forgotten."""
JUDGED = ("train", "validation", "test")
LENIENT = ("max_truncated", "max_leaked", "max_conflicts", "max_empty", "max_unknown")
"""Options that judge rows but do not change them: no part of the cache key."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """How a task turns rows of one run into examples."""

    task: Task[Any]
    tokenizer: Any
    max_length: int
    data: DataConfig

    def split(self, rows: Rows, roles: Roles, sources: dict[str, str]) -> Examples:
        """The examples of a split, from the cache where it was encoded before."""
        examples = encoded.encode_once(lambda: self.chunks(rows, roles), self._key(rows, roles, sources))
        if not len(examples):
            raise UserError(
                f"no row is left to work on at data.max_length={self.max_length}",
                where=rows.files[0] if rows.files else "data",
                fix="give rows with texts, or raise data.max_length",
            )
        return examples

    def chunks(self, rows: Rows, roles: Roles, *, asked: bool = False) -> Iterator[Examples]:
        """Encode chunk after chunk."""
        start = 0
        for chunk in rows.chunks(CHUNK):
            try:
                yield self.task.encode(chunk, roles, self.tokenizer, max_length=self.max_length, first_row=start, asked=asked)
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of the tokenizers library, in Rust; no Exception
                    raise
                what = f"the tokenizer fails on a text: {error}"
                raise UserError(what, where=rows.where(start), fix="name a model with another tokenizer, or take out odd texts") from error
            start += len(chunk)

    def _key(self, rows: Rows, roles: Roles, sources: dict[str, str]) -> str:
        places = hashlib.blake2b(np.ascontiguousarray(rows.file_of).tobytes(), digest_size=16)
        places.update(np.ascontiguousarray(rows.row_of).tobytes())
        options = {k: v.value if isinstance(v, Enum) else v for k, v in asdict(self.data).items() if k not in LENIENT}
        return encoded.key(
            files=sorted(sources.values()),
            rows=places.hexdigest(),
            roles=roles.options,
            tokenizer=models.tokenizer_digest(self.tokenizer),
            max_length=self.max_length,
            task=[self.task.name, self.task.recipe()],
            options=options,
        )


def longest_input(config: DataConfig, limit: int) -> int:
    """``data.max_length``, or the model's own limit."""
    if config.max_length is None:
        return limit
    if config.max_length > limit:
        raise UserError(
            f"the model reads at most {limit} tokens", where=f"data.max_length={config.max_length}", fix=f"data.max_length={limit} or less"
        )
    return config.max_length


def labelled(task: Task[Any], data: DataConfig, splits: Splits, examples: dict[str, Examples]) -> dict[str, Labelled]:
    """Examples with their targets, for the splits that carry labels."""
    return {
        name: Labelled(examples[name], task.read_targets(data, splits.rows[name], splits.roles) if name in splits.labelled else None)
        for name in examples
    }


def training_texts(kind: type[Task[Any]], rows: Rows, roles: Roles) -> Iterator[str]:
    """Every text of the split that a vocabulary is learnt from, a chunk in memory at a time."""
    for chunk in rows.chunks(CHUNK):
        yield from kind.vocabulary_texts(chunk, roles)


def warn_if_cut(name: str, examples: Examples, rows: int, max_length: int) -> None:
    """Say how much of a split was cut, where anything was."""
    counts = examples.counts
    if counts.cut_rows:
        console.warn(
            f"{name}: {counts.cut_rows} of {rows} rows are cut at {max_length} tokens "
            f"({counts.lost} tokens lost; the longest has {counts.longest})"
        )
