"""Which column is the text, which the second text, which the label: as the config says, else inferred where there is one reading."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.header import LABEL_NAMES, PAIR_NAMES, TEXT_NAMES, plain
from finetune_cli.data.rows import Rows
from finetune_cli.errors import UserError


class NoColumn(UserError):
    """A column is not there, or cannot be told from the others."""


@dataclass(frozen=True, slots=True)
class Roles:
    """The columns that hold the text, its pair, and the label or targets (empty where rows carry none)."""

    text: str
    text_pair: str | None
    labels: tuple[str, ...]
    found_by: Mapping[str, Any] | None = None
    """The data options that name the user's columns, where a task made columns of its own out of them."""

    @property
    def options(self) -> dict[str, Any]:
        """Data options with which a later reader finds the same columns and infers nothing."""
        if self.found_by is not None:
            return dict(self.found_by)
        label = None if not self.labels else self.labels[0] if len(self.labels) == 1 else list(self.labels)
        return {"text": self.text, "text_pair": self.text_pair, "label": label}


def find_roles(rows: Rows, config: DataConfig, *, labelled: bool, pairs: bool = True) -> tuple[Roles, list[str]]:
    """The roles, and notes on what was inferred and why. ``pairs``: whether the task can take a second text."""
    notes: list[str] = []
    texts = _named_texts(config, pairs)
    labels = _names(config.label, "data.label") if labelled else []
    for key, name in [("data.text", texts[0] if texts else None), ("data.text_pair", texts[1] if len(texts) > 1 else None)]:
        require(rows, key, name)
    for name in labels:
        require(rows, "data.label", name)
    taken = {*texts, *labels, *(name for name in (config.group, config.time) if name)}
    if not texts:
        texts = _infer_texts(rows, taken, labels, labelled, pairs, notes)
        taken |= set(texts)
    if labelled and not labels:
        labels = [_infer_label(rows, taken, notes)]
    twice = set(texts) & set(labels)
    if twice:
        raise UserError(f"column {twice.pop()!r} is both text and label", where="data.label", fix=f"the columns are {_columns(rows)}")
    return Roles(texts[0], texts[1] if len(texts) > 1 else None, tuple(labels)), notes


def _names(value: Any, key: str) -> list[str]:
    if value is None:
        return []
    names = [str(name) for name in (value if isinstance(value, (list, tuple)) else [value])]
    if len(set(names)) < len(names):
        raise UserError(f"{key} names a column twice: {', '.join(names)}", where=key, fix="name every column once")
    return names


def _named_texts(config: DataConfig, pairs: bool) -> list[str]:
    texts = _names(config.text, "data.text")
    if config.text_pair is not None:
        if not texts:
            raise UserError(
                "data.text_pair names the second text, but data.text is not set", where="data.text_pair", fix="data.text=COLUMN"
            )
        texts.append(str(config.text_pair))
    if len(texts) > 2 or len(set(texts)) < len(texts):
        raise UserError(f"the texts are columns {', '.join(texts)}; expected one or two", where="data.text", fix="data.text=[FIRST,SECOND]")
    if len(texts) == 2 and not pairs:
        raise UserError("this task takes one text, not a pair", where="data.text_pair", fix="data.text=COLUMN data.text_pair=null")
    return texts


def _columns(rows: Rows) -> str:
    names = [repr(name) for name in rows.columns]
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def require(rows: Rows, key: str, name: str | None) -> None:
    """An error with the nearest name where ``name`` is no column."""
    if name is None or rows.has(name):
        return
    by_plain = {plain(column): column for column in rows.columns}
    close = difflib.get_close_matches(plain(name), by_plain, n=1, cutoff=0.5)
    fix = f"did you mean {key}={by_plain[close[0]]!r}?" if close else f"{key}=COLUMN"
    if not close and any(column in ("column1", "column2") for column in rows.columns):
        fix = f"{key}=column1, or name the columns with data.columns=[...]"
    raise NoColumn(f"there is no column {name!r}; the columns are {_columns(rows)}", where=f"{rows.files[0]}, {key}", fix=fix)


def _matches(rows: Rows, tier: Sequence[str], taken: set[str]) -> list[str]:
    return [column for column in rows.columns if plain(column) in tier and column not in taken]


def _infer_texts(rows: Rows, taken: set[str], labels: list[str], labelled: bool, pairs: bool, notes: list[str]) -> list[str]:
    free = [column for column in rows.columns if column not in taken]
    if pairs:
        by_plain = {plain(column): column for column in free}
        found = [[by_plain[a], by_plain[b]] for a, b in PAIR_NAMES if a in by_plain and b in by_plain]
        if len(found) == 1:
            notes.append(f"texts: columns {found[0][0]!r} and {found[0][1]!r}, by their names")
            return found[0]
    for tier in TEXT_NAMES:
        hits = _matches(rows, tier, taken)
        if len(hits) == 1:
            notes.append(f"text: column {hits[0]!r}, by its name")
            return hits
        if hits:
            names = ",".join(hits[:2])
            fix = f"data.text={hits[0]}" + (f", or data.text=[{names}] for both" if pairs else "")
            raise NoColumn(
                f"which column is the text? {' or '.join(map(repr, hits))} could be; the columns are {_columns(rows)}",
                where=f"{rows.files[0]}, data.text",
                fix=fix,
            )
    label = labels or ([hit for tier in LABEL_NAMES for hit in _matches(rows, tier, taken)] if labelled else [])
    rest = [column for column in free if column not in label]
    if len(rest) == 1 and (labelled and len(label) == 1 or len(free) == 1):
        notes.append(f"text: column {rest[0]!r}, the only one left")
        return rest
    raise NoColumn(
        f"which column is the text? The columns are {_columns(rows)}", where=f"{rows.files[0]}, data.text", fix=_fix(rows, labelled)
    )


def _infer_label(rows: Rows, taken: set[str], notes: list[str]) -> str:
    for tier in LABEL_NAMES:
        hits = _matches(rows, tier, taken)
        if len(hits) == 1:
            notes.append(f"label: column {hits[0]!r}, by its name")
            return hits[0]
        if hits:
            raise NoColumn(
                f"which column is the label? {' or '.join(map(repr, hits))} could be; the columns are {_columns(rows)}",
                where=f"{rows.files[0]}, data.label",
                fix=f"data.label={hits[0]}",
            )
    rest = [column for column in rows.columns if column not in taken]
    if len(rest) == 1 and len(rows.columns) == 2:
        notes.append(f"label: column {rest[0]!r}, the only one left")
        return rest[0]
    raise NoColumn(
        f"which column is the label? The columns are {_columns(rows)}", where=f"{rows.files[0]}, data.label", fix="data.label=COLUMN"
    )


def _fix(rows: Rows, labelled: bool) -> str:
    if len(rows.columns) == 2 and labelled:
        return f"data.text={rows.columns[0]} data.label={rows.columns[1]}, or the other way round"
    return "data.text=COLUMN" + (" data.label=COLUMN" if labelled else "")
