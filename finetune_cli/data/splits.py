"""Train, validation and test as rows: read, split off where a fraction is asked for, and free of rows nobody can use.

A fraction is a function of the files, the options and the seed, so ``eval`` finds the very rows that ``train`` held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finetune_cli.config.choices import DataFormat, RowPolicy
from finetune_cli.config.schema import DataConfig
from finetune_cli.data.grouping import group_codes, shared_groups, times
from finetune_cli.data.labels import has_several_labels, label_cells, missing
from finetune_cli.data.parallel import partnered
from finetune_cli.data.partition import Parts, by_time, grouped, shuffled, stratified
from finetune_cli.data.readers import Say, format_of, read_places
from finetune_cli.data.roles import NoColumn, Roles, find_roles, require
from finetune_cli.data.rows import Caution, Rows, count
from finetune_cli.data.sources import File, Hub, resolve, sha256
from finetune_cli.errors import UserError
from finetune_cli.randomness import generator

NAMES = ("train", "validation", "test")
_DELIMITED = frozenset({DataFormat.csv, DataFormat.tsv})
READ_BY = {
    **dict.fromkeys(("delimiter", "quoting", "header", "extra_fields"), _DELIMITED),
    "columns": _DELIMITED | {DataFormat.conll},
    "pattern": frozenset({DataFormat.text}),
    "encoding": _DELIMITED | {DataFormat.json, DataFormat.jsonl, DataFormat.text, DataFormat.conll},
}
"""Options that only some formats read."""


class Arrange(Protocol):
    """Finds the columns of some rows, or makes a task's own out of them; the notes say what was inferred. NoColumn where one is missing."""

    def __call__(self, rows: Rows, config: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]: ...


def by_columns(rows: Rows, config: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
    """The rows as they are: one text or a pair in columns, and labels in columns."""
    return rows, *find_roles(rows, config, labelled=labelled)


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows by split, their columns, what was decided on the way, SHA-256 of every file, which splits carry labels, the formats read."""

    rows: dict[str, Rows]
    roles: Roles
    notes: tuple[str, ...]
    sources: dict[str, dict[str, str]]
    labelled: frozenset[str]
    formats: frozenset[DataFormat] = frozenset()
    warnings: tuple[str, ...] = ()
    """What was decided on the way and may not be what the user meant."""

    def refuse_unread(self, keys: Collection[str]) -> None:
        """Raise UserError for an option that the user set and that no file of these formats reads."""
        for name, formats in READ_BY.items():
            if f"data.{name}" in keys and self.formats and not self.formats & formats:
                found = ", ".join(sorted(f.value for f in self.formats))
                reads = ", ".join(sorted(f.value for f in formats))
                raise UserError(
                    f"data.{name} is set, but only {reads} files are read by it",
                    where=f"data.{name}",
                    fix=f"drop it: the files are {found}",
                )


def load_splits(
    config: DataConfig,
    *,
    seed: int,
    labelled: bool = True,
    offline: bool = False,
    only: Collection[str] | None = None,
    stratify: bool = True,
    arrange: Arrange = by_columns,
    say: Say | None = None,
) -> Splits:
    """Everything from ``data.train``, ``data.validation`` and ``data.test`` to splits; ``only`` leaves out what is not needed.

    ``labelled`` is False where rows need no label apart from their text, ``stratify`` for tasks whose labels are numbers; ``arrange`` finds
    the columns or makes them; ``say`` hears of a download before it begins.
    """
    loading = _Loading(config, seed, labelled, offline, stratify, arrange, say)
    wanted = [name for name in NAMES if only is None or name in only]
    given = {name: getattr(config, name) for name in NAMES}
    fractions = {name: f for name in ("validation", "test") if (f := fraction(given[name], f"data.{name}")) is not None}
    needed = [name for name in NAMES if name not in fractions and given[name] is not None and name in wanted]
    if any(name in fractions for name in wanted) and "train" not in needed:
        needed.insert(0, "train")
    if given["train"] is None and (only is None or "train" in wanted or "train" in needed):
        raise UserError("data.train is not set", where="data.train", fix="data.train=FILE")
    if not needed:
        named = " and ".join(f"data.{name}" for name in wanted)
        raise UserError(f"there are no rows: {named} is not set", where=named, fix=f"data.{wanted[-1]}=FILE")
    loading.read_all({name: given[name] for name in needed})
    if fractions and "train" in loading.rows:
        loading.split_off(fractions)
    if "train" in loading.rows:
        loading.cap_train()
    return loading.done(wanted)


def fraction(value: Any, key: str) -> float | None:
    """``value`` if it is a number that splits train, None if it names files or nothing."""
    if isinstance(value, str) and re.fullmatch(r"\s*0?\.\d+\s*", value) and not os.path.exists(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 < value < 1:
        raise UserError(
            f"{key} is {value}; a fraction lies between 0 and 1", where=key, fix=f"{key}=0.1, {key}=FILE, or {key}=null for none"
        )
    return float(value)


class _Loading:
    """The steps of ``load_splits`` and what they find."""

    def __init__(
        self, config: DataConfig, seed: int, labelled: bool, offline: bool, stratify: bool, arrange: Arrange, say: Say | None
    ) -> None:
        self.config, self.seed, self.labelled, self.offline, self.say = config, seed, labelled, offline, say
        self.stratify, self.arrange = stratify, arrange
        self.rows: dict[str, Rows] = {}
        self.sources: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []
        self.roles: Roles | None = None
        self.carry: set[str] = set()
        self.formats: set[DataFormat] = set()

    def read_all(self, given: dict[str, Any]) -> None:
        places = {
            name: partnered(resolve(value, key=f"data.{name}", split=name, notes=self.notes), self.config.parallel, key=f"data.{name}")
            for name, value in given.items()
        }
        _refuse_same_path(places)
        for name, found in places.items():
            files = [file for p in found if isinstance(p, File) for file in (p, p.partner) if file is not None]
            before = [(os.stat(p.path).st_size, os.stat(p.path).st_mtime_ns) for p in files]
            self.sources[name] = {p.name: sha256(p.path, p.name) for p in files}
            self.formats |= {format_of(p, self._config(), self.config.format, []) for p in found if isinstance(p, File)}
            rows = read_places(found, self._config(), offline=self.offline, notes=self.notes, say=self.say)
            if before != [(os.stat(p.path).st_size, os.stat(p.path).st_mtime_ns) for p in files]:
                raise UserError("a file changed while it was read", where=f"data.{name}", fix="wait until it is written, then start again")
            self.sources[name] |= {p.name: table_digest(rows, p.name) for p in found if isinstance(p, Hub)}
            self.rows[name] = self._with_roles(name, rows)
        _refuse_same_bytes(self.sources, self.notes)

    def _config(self) -> DataConfig:
        """The options, with the columns that the first split was found to have asked for in the others."""
        return self.config if self.roles is None else dataclasses.replace(self.config, **self.roles.options)

    def _with_roles(self, name: str, rows: Rows) -> Rows:
        """Finds the columns in the first split and checks them in the others; settles rows without a label."""
        rows, roles, notes = self._arranged(name, rows)
        self.notes += notes
        if self.roles is None:
            self.roles = roles
        if not self.labelled:
            self.carry.add(name)
            return rows
        if not roles.labels:
            self.notes.append(f"{name} carries no labels: it is not scored")
            return rows
        return self._settle_missing(name, rows)

    def _arranged(self, name: str, rows: Rows) -> tuple[Rows, Roles, list[str]]:
        """The rows with their columns found; a test split may have no label column."""
        config = self._config()
        if name != "test" or not self.labelled:
            return self.arrange(rows, config, labelled=self.labelled)
        try:
            return self.arrange(rows, config, labelled=True)
        except NoColumn:
            return self.arrange(rows, config, labelled=False)

    def _settle_missing(self, name: str, rows: Rows) -> Rows:
        """Rows without a label: an error, dropped and counted, or a test split that has none at all."""
        assert self.roles is not None
        bad = np.flatnonzero(missing(rows, self.roles, self.config))
        if name == "test" and (len(bad) == len(rows) or _all_minus_one(rows, self.roles)):
            self.notes.append("test carries no labels (every cell is empty or -1): it is not scored")
            return rows
        self.carry.add(name)
        if not len(bad):
            return rows
        label = self.roles.options["label"]
        column = " or ".join(map(repr, label if isinstance(label, list) else [label]))
        if self.config.missing_labels is RowPolicy.error or len(bad) == len(rows):
            raise UserError(
                f"{count(len(bad), 'row')} of {name} without a label in column {column}",
                where=rows.named(bad),
                fix="complete the rows, or data.missing_labels=drop" if len(bad) < len(rows) else "data.label=COLUMN",
            )
        self.notes.append(f"{name}: {count(len(bad), 'row')} without a label dropped (first: {rows.where(int(bad[0]))})")
        return rows.take(np.setdiff1d(np.arange(len(rows)), bad))

    def split_off(self, fractions: dict[str, float]) -> None:
        """Takes validation and test rows out of train."""
        rows, names, shares = self.rows["train"], list(fractions), list(fractions.values())
        if sum(shares) >= 1:
            raise UserError(
                f"{' and '.join(f'data.{n}' for n in names)} leave no row for training", where=f"data.{names[0]}", fix="smaller fractions"
            )
        if len(rows) <= len(names):
            raise UserError(
                f"{count(len(rows), 'row')} cannot be split into {1 + len(names)} parts",
                where=", ".join(rows.files[:1]),
                fix=f"give more rows, or {' '.join(f'data.{n}=FILE' for n in names)}, or data.validation=null",
            )
        parts, how = self._parts(rows, shares)
        empty = [name for name, part in zip(names, parts[1:], strict=True) if not len(part)]
        if empty:
            raise UserError(
                f"data.{empty[0]}={fractions[empty[0]]} of {count(len(rows), 'row')} ({how}) leaves no row",
                where=f"data.{empty[0]}",
                fix=f"data.{empty[0]}=FILE",
            )
        for name, part in zip(names, parts[1:], strict=True):
            self.rows[name] = rows.take(part)
            self.notes.append(
                f"{name}: {count(len(part), 'row')} of {len(rows):,} split off train (data.{name}={fractions[name]:g}, {how})"
            )
            self.sources[name] = self.sources["train"]
            if "train" in self.carry:
                self.carry.add(name)
        self.rows["train"] = rows.take(parts[0])

    def _parts(self, rows: Rows, shares: list[float]) -> tuple[Parts, str]:
        config = self.config
        if config.group and config.time:
            raise UserError("data.group and data.time are both set", where="data.time", fix="keep one of them")
        if config.group:
            require(rows, "data.group", config.group)
            codes = group_codes(rows, config.group)
            if len(np.unique(codes)) <= len(shares):
                raise UserError(
                    f"column {config.group!r} has too few groups to split", where="data.group", fix="name another column, or give files"
                )
            return grouped(codes, shares, self.seed), f"whole groups of {config.group!r}, seed {self.seed}"
        if config.time:
            require(rows, "data.time", config.time)
            return by_time(times(rows, config.time), shares), f"the latest by {config.time!r}"
        labels = self._strata(rows) if self.labelled and self.stratify else None
        if labels is None:
            return shuffled(len(rows), shares, self.seed), f"at random, seed {self.seed}"
        return stratified(labels, shares, self.seed), f"stratified by label, seed {self.seed}"

    def _strata(self, rows: Rows) -> list[str] | None:
        """A class for each row, its rarest label where it has several; None where labels look continuous."""
        assert self.roles is not None
        if len(self.roles.labels) > 1 and not has_several_labels(rows, self.roles, self.config):
            return None
        cells = label_cells(rows, self.roles, self.config)
        frequency: dict[str, int] = {}
        for cell in cells:
            for label in cell:
                frequency[label] = frequency.get(label, 0) + 1
        if len(frequency) > max(2, len(rows) // 2):
            return None
        return [min(cell, key=lambda label: (frequency[label], label)) if cell else "" for cell in cells]

    def cap_train(self) -> None:
        """Draws ``data.rows_per_label`` training rows of each label, and of what there is at most ``data.max_rows``."""
        if self.config.rows_per_label is not None:
            self._draw_per_label(self.config.rows_per_label)
        rows, most = self.rows["train"], self.config.max_rows
        if most is not None and len(rows) > most:
            drawn = np.sort(generator(self.seed, "max_rows").permutation(len(rows))[:most])
            self.rows["train"] = rows.take(drawn)
            self.notes.append(f"train: {most:,} of {count(len(rows), 'row')} (data.max_rows, drawn by seed {self.seed})")

    def _draw_per_label(self, number: int) -> None:
        """So many training rows of each label; rows with several count as of their rarest. Raises UserError where a label has too few."""
        rows = self.rows["train"]
        strata = self._strata(rows) if self.labelled and self.stratify and "train" in self.carry else None
        if strata is None:
            raise UserError(
                "rows are drawn for each label, and these rows have no labels to draw by",
                where="data.rows_per_label",
                fix="leave data.rows_per_label out, or data.max_rows=N for any N rows",
            )
        held = {name: np.flatnonzero(np.array([label == name for label in strata])) for name in sorted(set(strata))}
        few = {name: len(places) for name, places in held.items() if len(places) < number}
        if few:
            told = ", ".join(f"{name!r} has {have}" for name, have in list(few.items())[:5])
            raise UserError(
                f"data.rows_per_label is {number}, but {told} training {'row' if set(few.values()) == {1} else 'rows'}",
                where="data.rows_per_label",
                fix=f"data.rows_per_label={min(few.values())}, or more rows of {', '.join(map(repr, list(few)[:5]))}",
            )
        drawn = [places[generator(self.seed, f"rows_per_label/{name}").permutation(len(places))[:number]] for name, places in held.items()]
        self.rows["train"] = rows.take(np.sort(np.concatenate(drawn)))
        how = f"data.rows_per_label, drawn by seed {self.seed}"
        self.notes.append(f"train: {number} rows of each of {len(held)} labels, of {count(len(rows), 'row')} ({how})")

    def done(self, wanted: list[str]) -> Splits:
        assert self.roles is not None
        rows = {name: self.rows[name] for name in NAMES if name in self.rows and name in wanted}
        if self.config.group and "train" in rows:
            self.notes += shared_groups(rows, self.config.group)
        told = list(dict.fromkeys(self.notes))
        return Splits(
            rows,
            self.roles,
            tuple(note for note in told if not isinstance(note, Caution)),
            self.sources,
            frozenset(self.carry & set(rows)),
            frozenset(self.formats),
            tuple(note for note in told if isinstance(note, Caution)),
        )


def table_digest(rows: Rows, name: str) -> str:
    """SHA-256 of the rows of one hub dataset, which has no file here."""
    digest = hashlib.sha256()
    for batch in rows.take(np.flatnonzero(rows.file_of == rows.files.index(name))).table.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()


def _all_minus_one(rows: Rows, roles: Roles) -> bool:
    """The hub's way to say that test labels are hidden."""
    if len(roles.labels) != 1:
        return False
    cells = rows.column(roles.labels[0])
    return bool(pa.types.is_integer(cells.type) and pc.all(pc.equal(cells, -1)).as_py())


def _refuse_same_path(places: dict[str, list[File | Hub]]) -> None:
    """D33: one file for two splits, under whatever name."""
    seen: dict[str, tuple[str, str]] = {}
    for split, found in places.items():
        for place in found:
            real = os.path.realpath(place.path) if isinstance(place, File) else place.name
            if real in seen and seen[real][0] != split and "train" in (seen[real][0], split):
                raise _same(place.name, seen[real][0], split)
            seen.setdefault(real, (split, place.name))


def _refuse_same_bytes(sources: dict[str, dict[str, str]], notes: list[str]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for split, files in sources.items():
        for name, digest in files.items():
            if digest in seen and seen[digest][0] != split:
                if "train" in (seen[digest][0], split):
                    raise _same(name, seen[digest][0], split)
                notes.append(f"{name} is both {seen[digest][0]} and {split}: the {split} score is of the rows that chose the checkpoint")
            seen.setdefault(digest, (split, name))


def _same(name: str, one: str, other: str) -> UserError:
    return UserError(
        f"{name} is given as {one} and as {other}: the score would be that of rows learnt by heart",
        where=f"data.{other}",
        fix=f"data.{other}=0.1 splits rows off",
    )
