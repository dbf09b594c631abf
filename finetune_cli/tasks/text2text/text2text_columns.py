"""Columns of source and target texts: as named, else by names that people give them; several columns or lists are several references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_cli.config.schema import DataConfig
    from finetune_cli.data import Roles, Rows

SOURCES = ("text", "source", "src", "input", "document", "article", "dialogue", "dialog", "question", "sentence", "content", "原文")
TARGETS = ("target", "tgt", "label", "summary", "highlights", "translation", "output", "reference", "references", "response", "answer")
"""Names of columns by which sources and targets are known."""
SAMPLE = 500
"""Targets looked at to see how words are set apart."""


def arrange(rows: Rows, data: DataConfig, references: Any, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
    """The rows with their references as lists of texts in one column, in place of the column that ``data.label`` names.

    ``references`` stand in for it where a split has all of them.
    """
    from finetune_cli.data import NoColumn, Roles, find_roles, gather_references
    from finetune_cli.data.roles import require

    notes: list[str] = []
    others = _listed(references)
    there = bool(others) and all(rows.has(name) for name in others)
    named = _listed(data.label)
    if data.text is None and (found := _by_name(rows, SOURCES, {*named, *others})):
        data = replace(data, text=found)
        notes.append(f"text: column {found!r}, by its name")
    if not labelled:
        return rows, *_with_notes(find_roles(rows, data, labelled=False, pairs=False), notes)
    if not named and (found := _by_name(rows, TARGETS, {str(data.text), *others})):
        named = [found]
        notes.append(f"label: column {found!r}, by its name")
    if not named and not there:
        roles, more = find_roles(rows, data, labelled=True, pairs=False)  # the only column left, or an error that lists them
        named, notes, data = list(roles.labels), [*notes, *more], replace(data, text=roles.text)
    if not there:
        for name in named:
            require(rows, "data.label", name)
    used = others if there else named
    if data.text is None:
        rest = [name for name in rows.columns if name not in used]
        if len(rest) != 1:
            raise NoColumn(
                f"which column is the text? The columns are {', '.join(map(repr, rows.columns))}",
                where=f"{rows.files[0]}, data.text",
                fix="data.text=COLUMN data.label=COLUMN",
            )
        data = replace(data, text=rest[0])
        notes.append(f"text: column {rest[0]!r}, the only one left")
    roles, more = find_roles(rows, replace(data, label=used), labelled=True, pairs=False)
    label = " or ".join(named) or "references"
    found_by = {"text": roles.text, "text_pair": None, "label": named[0] if len(named) == 1 else named or None}
    if there:
        notes.append(f"references: {', '.join(map(repr, others))} (task.references)")
    return _with_column(rows, label, gather_references(rows, used)), Roles(roles.text, None, (label,), found_by), [*notes, *more]


def words_of(rows: Rows, roles: Roles) -> str:
    """sacrebleu's tokenizer for these targets: 13a, or zh or char where words are not set apart by spaces."""
    from finetune_cli.baselines import spaceless
    from finetune_cli.data import References

    some = References(rows.slice(0, SAMPLE).column(roles.labels[0]))
    texts = [text for several in some for text in several]
    if not spaceless(texts):
        return "13a"
    letters = "".join(texts)
    return "zh" if sum("\u4e00" <= letter <= "\u9fff" for letter in letters) > 0.5 * sum(map(str.isalpha, letters)) else "char"


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(name) for name in value] if isinstance(value, (list, tuple)) else [str(value)]


def _by_name(rows: Rows, names: Sequence[str], taken: set[str]) -> str | None:
    """The one column that has one of the names, or None."""
    from finetune_cli.data.header import plain

    hits = [column for column in rows.columns if plain(column) in names and column not in taken]
    return hits[0] if len(hits) == 1 else None


def _with_notes(found: tuple[Roles, list[str]], notes: list[str]) -> tuple[Roles, list[str]]:
    return found[0], [*notes, *found[1]]


def _with_column(rows: Rows, name: str, cells: Any) -> Rows:
    """The rows with a column added, or put in place of one of that name."""
    table = rows.table
    at = table.schema.get_field_index(name)
    return replace(rows, table=table.append_column(name, cells) if at < 0 else table.set_column(at, name, cells))
