"""The split table: what is in the data and what is wrong with it, counted before the first step, and the gates that it must pass.

Texts are compared by 64-bit hashes of their lower-case form with single spaces, in NumPy: a million rows are eight megabytes, not a dict.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.label_audit import judge_cells, judge_labels
from finetune_cli.data.labels import texts
from finetune_cli.data.roles import Roles
from finetune_cli.data.rows import BATCH, Rows, count, listed
from finetune_cli.data.splits import Splits
from finetune_cli.errors import UserError

HEADERS = ("split", "rows", "labels", "tokens", "longest", "cut", "lost", "unknown", "empty", "duplicate", "conflicting", "leaked")
EXAMPLES = 3
MOJIBAKE = "[ÃÂ][\u0080-\u00bf]|â€[\u0099\u009c\u009d™œ˜“”]|ï¿½"
"""UTF-8 that was read as cp1252 and written again."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens after cutting, the longest row before, rows cut, tokens lost by it, tokens the tokenizer does not know."""

    tokens: int = 0
    longest: int = 0
    cut_rows: int = 0
    lost: int = 0
    unknown: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.tokens + other.tokens,
            max(self.longest, other.longest),
            self.cut_rows + other.cut_rows,
            self.lost + other.lost,
            self.unknown + other.unknown,
        )


@dataclass(frozen=True, slots=True)
class SplitRow:
    """One split in numbers. ``conflicting``: rows whose text has another label elsewhere in it; ``leaked``: rows that train has too."""

    rows: int
    labels: dict[str, int] | None
    tokens: TokenCounts | None
    empty: int
    duplicate: int
    conflicting: int | None
    leaked: int | None


@dataclass(frozen=True, slots=True)
class SplitTable:
    """Every split in numbers, and what is worth a warning."""

    splits: dict[str, SplitRow]
    warnings: tuple[str, ...]

    @property
    def headers(self) -> tuple[str, ...]:
        return HEADERS

    @property
    def cells(self) -> list[tuple[object, ...]]:
        """A row a split, in the order of ``headers``; None where nothing was counted."""
        return [_cells(name, row) for name, row in self.splits.items()]


def _cells(name: str, row: SplitRow) -> tuple[object, ...]:
    t = row.tokens
    tokens: tuple[object, ...] = (None,) * 5
    if t is not None:
        tokens = (t.tokens, t.longest, t.cut_rows, t.lost, f"{share(t.unknown, t.tokens):.1%}")
    return (name, row.rows, _told_labels(row.labels), *tokens, row.empty, row.duplicate, row.conflicting, row.leaked)


def _told_labels(labels: dict[str, int] | None) -> str | None:
    if not labels:
        return None
    if len(labels) <= 6:
        return ", ".join(f"{name} {number:,}" for name, number in labels.items())
    least, most = min(labels.values()), max(labels.values())
    return f"{len(labels)} labels, {least:,} {f'to {most:,} ' if most > least else ''}rows each"


def share(part: int, whole: int) -> float:
    """Part of the whole; 0 of nothing."""
    return part / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class _Fingerprints:
    """[N] hashes of the texts, and which rows have an empty text."""

    hashes: np.ndarray
    empty: np.ndarray

    @property
    def filled(self) -> np.ndarray:
        hashes: np.ndarray = self.hashes[~self.empty]
        return hashes


def _fingerprints(rows: Rows, roles: Roles) -> _Fingerprints:
    parts, empty = [], []
    for chunk in rows.chunks(BATCH):
        found = [_hashed(texts(chunk, column)) for column in (roles.text, roles.text_pair) if column]
        parts.append(found[0][0] if len(found) == 1 else found[0][0] * np.int64(1_000_003) ^ found[1][0])
        empty.append(np.logical_or.reduce([e for _, e in found]))
    if not parts:
        return _Fingerprints(np.zeros(0, np.int64), np.zeros(0, bool))
    return _Fingerprints(np.concatenate(parts), np.concatenate(empty))


def _hashed(cells: list[str]) -> tuple[np.ndarray, np.ndarray]:
    plain = [" ".join(cell.casefold().split()) for cell in cells]
    return np.fromiter(map(hash, plain), np.int64, len(plain)), np.fromiter((not p for p in plain), bool, len(plain))


def audit(
    splits: Splits, config: DataConfig, labels: Mapping[str, Sequence[Sequence[str]]], tokens: Mapping[str, TokenCounts]
) -> SplitTable:
    """Count everything, then judge it by the gates ``data.max_*``. ``labels``: the labels of every row, for the splits that have some."""
    prints = {name: _fingerprints(rows, splits.roles) for name, rows in splits.rows.items()}
    warnings = list(splits.warnings)
    table = {}
    for name, rows in splits.rows.items():
        own, cells = prints[name], labels.get(name)
        conflicting = _conflicting(own, cells) if cells is not None else None
        leaked = _leaked(own, prints["train"]) if name != "train" and "train" in prints else None
        table[name] = SplitRow(
            rows=len(rows),
            labels=_label_counts(cells),
            tokens=tokens.get(name),
            empty=int(own.empty.sum()),
            duplicate=len(own.filled) - len(np.unique(own.filled)),
            conflicting=None if conflicting is None else len(conflicting),
            leaked=None if leaked is None else len(leaked),
        )
        warnings += _text_warnings(name, rows, splits.roles, own)
        if conflicting is not None and len(conflicting) and cells is not None:
            warnings.append(_told_conflicts(name, rows, own, cells, conflicting))
        if leaked is not None and len(leaked):
            warnings.append(_told_leaks(name, splits.rows, own, prints["train"], leaked))
    warnings += _shared(splits.rows, prints) + judge_labels(splits, labels) + judge_cells(splits, config, labels)
    made = SplitTable(table, tuple(warnings))
    found = problems(made, config)
    if found:
        raise _worst(found, warnings)
    return made


def _worst(found: list[UserError], warnings: list[str]) -> UserError:
    """The first problem, with the places that its own warning names, and the others in a word."""
    first = found[0]
    sign = {"data.max_conflicts": "another label", "data.max_leaked": "are in train"}.get(first.where)
    split = first.what.partition(":")[0]
    places = [w for w in warnings if sign and sign in w and w.startswith(f"{split}:")]
    more = "".join(f"; also: {other.what}" for other in found[1:])
    fix = "; ".join(dict.fromkeys(error.fix for error in found))
    return UserError(first.what + more, where=first.where + (f" ({places[0]})" if places else ""), fix=fix)


def _label_counts(cells: Sequence[Sequence[str]] | None) -> dict[str, int] | None:
    if cells is None:
        return None
    counted = Counter(label for cell in cells for label in cell)
    return dict(sorted(counted.items()))


def _conflicting(own: _Fingerprints, cells: Sequence[Sequence[str]]) -> np.ndarray:
    """Rows whose text has another set of labels in another row."""
    label_of = np.fromiter((hash(tuple(sorted(cell))) for cell in cells), np.int64, len(cells))
    at = np.flatnonzero(~own.empty)
    if not len(at):
        return at
    groups = np.unique(own.hashes[at], return_inverse=True)[1]
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    low = np.minimum.reduceat(label_of[at][order], starts)
    high = np.maximum.reduceat(label_of[at][order], starts)
    mixed: np.ndarray = at[(low != high)[groups]]
    return mixed


def _leaked(own: _Fingerprints, train: _Fingerprints) -> np.ndarray:
    found: np.ndarray = np.flatnonzero(np.isin(own.hashes, np.unique(train.filled)) & ~own.empty)
    return found


def _told_conflicts(name: str, rows: Rows, own: _Fingerprints, cells: Sequence[Sequence[str]], at: np.ndarray) -> str:
    """How many, and the first three texts with the places and labels of two of their rows."""
    examples = []
    for code in dict.fromkeys(own.hashes[at].tolist()):
        same = at[own.hashes[at] == code]
        first = int(same[0])
        other = next(int(i) for i in same if sorted(cells[int(i)]) != sorted(cells[first]))
        examples.append(f"{rows.place(first)} {'+'.join(cells[first]) or 'none'} = {rows.place(other)} {'+'.join(cells[other]) or 'none'}")
        if len(examples) == EXAMPLES:
            break
    return f"{name}: {count(len(at), 'row')} of {len(rows):,} have a text that has another label elsewhere (first: {listed(examples)})"


def _told_leaks(name: str, rows: dict[str, Rows], own: _Fingerprints, train: _Fingerprints, at: np.ndarray) -> str:
    pairs = []
    for i in at[:EXAMPLES]:
        match = np.flatnonzero((train.hashes == own.hashes[i]) & ~train.empty)
        pairs.append(f"{rows[name].place(int(i))} = {rows['train'].place(int(match[0]))}")
    return f"{name}: {len(at):,} of {len(own.hashes):,} texts are in train (first: {listed(pairs)})"


def _shared(rows: dict[str, Rows], prints: dict[str, _Fingerprints]) -> list[str]:
    if "validation" not in prints or "test" not in prints:
        return []
    at = _leaked(prints["test"], prints["validation"])
    return (
        [f"test: {len(at):,} of {len(rows['test']):,} texts are in validation (first: {rows['test'].place(int(at[0]))})"] if len(at) else []
    )


def _text_warnings(name: str, rows: Rows, roles: Roles, own: _Fingerprints) -> list[str]:
    """Duplicates, empty texts, and texts that were decoded wrongly before they came here."""
    found = []
    duplicate = len(own.filled) - len(np.unique(own.filled))
    if duplicate and name == "train":
        found.append(f"train: {count(duplicate, 'row')} of {len(rows):,} repeat an earlier text")
    if own.empty.any():
        at = np.flatnonzero(own.empty)
        found.append(f"{name}: {count(len(at), 'row')} with an empty text (first: {rows.where(int(at[0]))})")
    for column in filter(None, (roles.text, roles.text_pair)):
        for what, form in (("U+FFFD, a character that was lost", "\ufffd"), ("UTF-8 that was decoded twice, such as 'Ã©'", MOJIBAKE)):
            at = np.flatnonzero(np.asarray(pc.match_substring_regex(rows.column(column), form)))
            if len(at):
                found.append(f"{name}: {count(len(at), 'text')} in {column!r} with {what} (first: {rows.where(int(at[0]))})")
    return found


def problems(table: SplitTable, config: DataConfig) -> list[UserError]:
    """The gates that the data does not pass, with the numbers and the key that moves each: so far that every split passes."""
    found: list[_Closed] = []
    for name, row in table.splits.items():
        tokens, n = row.tokens, row.rows
        if tokens is not None and name == "train":
            _gate(found, "data.max_truncated", config.max_truncated, tokens.cut_rows, n, f"{name}: %s rows are cut at data.max_length")
        if tokens is not None:
            _gate(
                found,
                "data.max_unknown",
                config.max_unknown,
                tokens.unknown,
                tokens.tokens,
                f"{name}: %s tokens are unknown to the tokenizer",
            )
        _gate(found, "data.max_empty", config.max_empty, row.empty, n, f"{name}: %s texts are empty")
        if row.conflicting is not None and name == "train":
            _gate(
                found,
                "data.max_conflicts",
                config.max_conflicts,
                row.conflicting,
                n,
                f"{name}: %s rows have a text that has another label elsewhere",
            )
        if row.leaked is not None:
            _gate(found, "data.max_leaked", config.max_leaked, row.leaked, n, f"{name}: %s texts are in train")
    enough = {key: math.ceil(max(gate.share for gate in found if gate.key == key) * 1000) / 1000 for key in {gate.key for gate in found}}
    return [UserError(gate.what, where=gate.key, fix=f"{REMEDIES[gate.key]}, or {gate.key}={enough[gate.key]:g}") for gate in found]


REMEDIES = {
    "data.max_truncated": "raise data.max_length, shorten the texts",
    "data.max_unknown": "choose a model for this language (model=tiny learns its own tokens)",
    "data.max_empty": "remove the rows",
    "data.max_conflicts": "mend the labels",
    "data.max_leaked": "remove them from one side",
}


@dataclass(frozen=True, slots=True)
class _Closed:
    """A gate that a split does not pass: its key, what is wrong, and the share that is."""

    key: str
    what: str
    share: float


def _gate(found: list[_Closed], key: str, limit: float, part: int, whole: int, what: str) -> None:
    if share(part, whole) > limit:
        told = f"{part:,} of {whole:,} ({share(part, whole):.1%})"
        found.append(_Closed(key, what % told + f"; at most {limit:.1%} may be", share(part, whole)))
