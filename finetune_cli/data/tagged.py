"""Rows with marked names, in whatever form they came, as words with tags.

Three forms are read: a list of words beside a list of tags (CoNLL columns are that), a text beside a list of spans in characters, and a
list of words beside a list of spans in words. What comes out is always the same: a text, the places of its words, and a tag a word in
IOB2. Where a tag or a span cannot stand as it is, the policy says whether that is an error or is mended and counted.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import tags
from finetune_cli.data.header import plain
from finetune_cli.data.labels import canonical, names_in, texts
from finetune_cli.data.roles import NoColumn, Roles, find_roles, require
from finetune_cli.data.rows import Rows, count, kind, listed
from finetune_cli.data.tags import Scheme, Span, TagError
from finetune_cli.data.words import Place, cut, join
from finetune_cli.errors import UserError

TEXT, STARTS, ENDS = "(text)", "(word starts)", "(word ends)"
"""Columns that are made: the text, joined where it came as words, and the places of its words in characters."""
NO_TYPE = "ENTITY"
"""The type of a name that is marked without one."""
WORD_NAMES = ("tokens", "words", "token", "word")
MARK_NAMES = (("ner tags", "entities", "spans", "ents", "ner"), ("tags", "labels", "label", "annotations", "tag"))
_START = ("start", "start_offset", "begin", "from", "0")
_END = ("end", "end_offset", "stop", "to", "1")
_TYPE = ("label", "type", "entity", "entity_type", "entity_group", "class", "tag", "2")


class Policy(StrEnum):
    """What happens to a tag that may not stand where it does, and to a span that does not begin and end with words."""

    auto = "auto"
    strict = "strict"
    repair = "repair"


@dataclass(frozen=True, slots=True)
class Reading:
    """How marks are read. ``scheme`` None recognises it; ``inclusive``: a span's end is its last character, not the one behind it."""

    scheme: Scheme | None = None
    policy: Policy = Policy.auto
    inclusive: bool = False


def arrange(rows: Rows, config: DataConfig, reading: Reading, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
    """The rows with their text, the places of their words and, if ``labelled``, their tags; the columns, and notes on what was found."""
    notes: list[str] = []
    source = _text_column(rows, config, notes)
    label = _label_column(rows, config, source, notes) if labelled else None
    in_words = came_as_words(rows, source)
    if in_words:
        joined = [join(row) for row in _word_lists(rows, source)]
        text, places = [t for t, _ in joined], [p for _, p in joined]
        rows = _with(rows, TEXT, pa.array(text, pa.string()))
    else:
        text = texts(rows, source)
        places = [cut(row) for row in text]
        rows = _with(rows, TEXT, rows.column(source))
    rows = _with(rows, STARTS, _lists([[start for start, _ in row] for row in places], pa.int32()))
    rows = _with(rows, ENDS, _lists([[end for _, end in row] for row in places], pa.int32()))
    found_by = {"text": source, "text_pair": None, "label": label}
    made: tuple[str, ...] = ()
    if label is not None:
        marks = _Marks(rows, config, reading, label, text, places, in_words=in_words)
        rows = _with(rows, name := f"{label} (tags)", _lists(marks.read(), pa.string()))
        made = (name,)
        notes += marks.notes
    return rows, Roles(TEXT, None, made, found_by), notes


def came_as_words(rows: Rows, source: str) -> bool:
    """Whether the user's column holds lists of words, and not texts."""
    return _is_list(rows.column(source).type)


def _with(rows: Rows, name: str, column: pa.Array | pa.ChunkedArray) -> Rows:
    return replace(rows, table=rows.table.append_column(name, column))


def _lists(cells: Sequence[Sequence[Any] | None], of: pa.DataType) -> pa.Array:
    ends = np.zeros(len(cells) + 1, np.int32)
    np.cumsum([len(cell or ()) for cell in cells], out=ends[1:])
    flat = pa.array([value for cell in cells for value in cell or ()], of)
    missing = [cell is None for cell in cells]
    return pa.ListArray.from_arrays(pa.array(ends), flat, mask=pa.array(missing) if any(missing) else None)


# -- columns -------------------------------------------------------------------------------------
def _is_list(of: pa.DataType) -> bool:
    return bool(pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_fixed_size_list(of))


def _text_column(rows: Rows, config: DataConfig, notes: list[str]) -> str:
    """The column of the text or of the words: as the config says, else the first of CoNLL columns, a list by its name, or a text by its."""
    if config.text is None and config.text_pair is None:
        if rows.word_files:
            notes.append(f"words: column {rows.columns[0]!r}, the first")
            return rows.columns[0]
        lists = [name for name in rows.columns if plain(name) in WORD_NAMES and _is_list(rows.column(name).type)]
        if len(lists) == 1:
            notes.append(f"words: column {lists[0]!r}, by its name")
            return lists[0]
    roles, found = find_roles(rows, replace(config, label=None), labelled=False, pairs=False)
    notes += found
    return roles.text


def _label_column(rows: Rows, config: DataConfig, source: str, notes: list[str]) -> str:
    """The column of the tags or spans."""
    if config.label is not None:
        names = [config.label] if isinstance(config.label, str) else list(config.label)
        if len(names) != 1:
            raise UserError("tags or spans stand in one column", where="data.label", fix="data.label=COLUMN")
        require(rows, "data.label", names[0])
        if names[0] == source:
            raise UserError(f"column {source!r} is both text and label", where="data.label", fix="data.label=COLUMN")
        return str(names[0])
    if rows.word_files:
        if rows.columns[-1] != source:
            notes.append(f"tags: column {rows.columns[-1]!r}, the last")
            return rows.columns[-1]
        raise NoColumn(f"the words have no tags: the only column is {source!r}", where=rows.where(0), fix="write the tag behind each word")
    for tier in MARK_NAMES:
        hits = [name for name in rows.columns if plain(name) in tier and name != source and _is_list(rows.column(name).type)]
        if len(hits) == 1:
            notes.append(f"tags or spans: column {hits[0]!r}, by its name")
            return hits[0]
        if hits:
            break
    raise NoColumn(
        f"which column holds the tags or spans? The columns are {listed(map(repr, rows.columns))}",
        where=f"{rows.files[0]}, data.label",
        fix="data.label=COLUMN, of lists",
    )


def _word_lists(rows: Rows, source: str) -> list[list[str]]:
    cells: list[list[str]] = rows.column(source).to_pylist()
    for at, words in enumerate(cells):
        if words is None:
            raise UserError(f"{source!r} is null, not a list of words", where=rows.where(at), fix="write the words, or drop the row")
        odd = next((i for i, word in enumerate(words) if not isinstance(word, str)), None)
        if odd is not None:
            raise UserError(f"{words[odd]!r} in {source!r} is not a word", where=rows.where(at, odd), fix="write every word as text")
    return cells


# -- marks ---------------------------------------------------------------------------------------
class _Marks:
    """Reads the tags or spans of every row into IOB2 and counts what had to be mended."""

    def __init__(
        self,
        rows: Rows,
        config: DataConfig,
        reading: Reading,
        label: str,
        text: Sequence[str],
        places: Sequence[Sequence[Place]],
        *,
        in_words: bool,
    ) -> None:
        self.rows, self.reading, self.label, self.text, self.places, self.in_words = rows, reading, label, text, places, in_words
        self.notes: list[str] = []
        self.mended: list[str] = []
        self.names = None if config.label_names is None else names_in(config.label_names)

    def read(self) -> list[list[str] | None]:
        """A list of IOB2 tags a row; None for a row that has no cell."""
        of = self.rows.column(self.label).type
        if not _is_list(of):
            raise UserError(
                f"{self.label!r} is {kind(of)}; expected a list of tags, one a word, or of spans",
                where=self.rows.where(0),
                fix='for example ["B-PER", "O"], or [{"start": 0, "end": 5, "label": "PER"}]',
            )
        item = of.value_type
        spans = pa.types.is_struct(item) or _is_list(item) or (pa.types.is_null(item) and not self.in_words)
        cells = self.rows.column(self.label).to_pylist()
        read = self._spans(cells, item) if spans else self._tags(cells)
        if self.mended:
            what = "span" if spans else "misplaced tag"
            how = "set to whole words, or left out under a longer one" if spans else "read as conlleval does"
            self.notes.append(f"{count(len(self.mended), what)} {how} (first: {self.mended[0]})")
        lengths = map(len, self.places)
        return [None if found is None else self._written(at, found, n) for at, (found, n) in enumerate(zip(read, lengths, strict=True))]

    def _written(self, at: int, found: list[Span], words: int) -> list[str]:
        named = [(start, end, name or NO_TYPE) for start, end, name in found]
        try:
            return tags.write(named, words)
        except ValueError as error:
            raise UserError(
                f"{error}; words have one tag each", where=self.rows.where(at), fix="mark flat spans, or task.tags=repair keeps the longest"
            ) from None

    # tags
    def _tags(self, cells: list[list[Any] | None]) -> list[list[Span] | None]:
        if self.reading.inclusive:
            raise UserError(
                "task.spans_end is set, but the rows have tags, no spans", where="task.spans_end", fix="task.spans_end=exclusive"
            )
        named = [None if cell is None else [self._name(value, at, i) for i, value in enumerate(cell)] for at, cell in enumerate(cells)]
        for at, (row, places) in enumerate(zip(named, self.places, strict=True)):
            if row is not None and len(row) != len(places):
                raise self._unlike(at, row)
        scheme = self.reading.scheme or tags.recognise(row for row in named if row is not None)
        how = "as told" if self.reading.scheme else "recognised"
        self.notes.append(f"tags: {scheme.value} ({how}) in {self.label!r}; the model's labels are iob2")
        return [None if row is None else self._entities(at, row, scheme) for at, row in enumerate(named)]

    def _unlike(self, at: int, row: list[str]) -> UserError:
        words = len(self.places[at])
        if not self.in_words:
            return UserError(
                f"{self.label!r} holds tags, but the text is one string, not a list of words",
                where=self.rows.where(at),
                fix="data.text=COLUMN with the words",
            )
        return UserError(f"{count(words, 'word')} but {count(len(row), 'tag')}", where=self.rows.where(at), fix="write one tag a word")

    def _name(self, value: Any, at: int, word: int) -> str:
        """A tag or type as text; a number by its name in ``data.label_names``."""
        if isinstance(value, str):
            return value.strip()
        if value is None or isinstance(value, (list, dict)):
            raise UserError(f"{self.label!r} holds {value!r}, no tag", where=self.rows.where(at, word), fix="write every tag as text")
        if self.names is None:
            raise UserError(
                f"{self.label!r} holds numbers ({canonical(value)})", where=self.rows.where(at, word), fix="data.label_names=[O,B-PER,...]"
            )
        if not isinstance(value, int) or not 0 <= value < len(self.names):
            raise UserError(
                f"{value!r} has no name: {count(len(self.names), 'name')} count from 0",
                where=self.rows.where(at, word),
                fix="data.label_names",
            )
        return self.names[value]

    def _entities(self, at: int, row: list[str], scheme: Scheme) -> list[Span]:
        try:
            found = tags.spans(row, scheme, strict=self.reading.policy is Policy.strict)
            for position, message in tags.invalid(row, scheme):
                self.mended.append(f"{self.rows.where(at, position)}: {message}")
            return found
        except TagError as error:
            known = self.reading.scheme is not None
            fix = "mend the tag, or task.scheme=auto" if known else "mend the tag, or name the scheme: task.scheme=iobes"
            if self.reading.policy is Policy.strict:
                fix += ", or task.tags=repair"
            message = error.message.partition(": ")[2]
            raise UserError(message, where=self.rows.where(at, error.position), fix=fix) from None

    # spans
    def _spans(self, cells: list[list[Any] | None], item: pa.DataType) -> list[list[Span] | None]:
        if self.reading.scheme is not None:
            raise UserError("task.scheme is set, but the rows have spans, no tags", where="task.scheme", fix="task.scheme=auto")
        keys = self._keys(item)
        made = []
        for at, cell in enumerate(cells):
            found = None if cell is None else [self._span(at, span, keys) for span in cell]
            made.append(self._flat(at, found) if found and self.reading.policy is Policy.repair else found)
        return made

    def _keys(self, item: pa.DataType) -> tuple[Any, Any, Any]:
        """Where start, end and type stand in a span."""
        if not pa.types.is_struct(item):
            return 0, 1, 2
        fields = {item.field(i).name: item.field(i).type for i in range(item.num_fields)}
        if set(fields) == {"0", "1", "2"}:
            numbers = [name for name, of in fields.items() if pa.types.is_integer(of)]
            rest = [name for name in fields if name not in numbers]
            return (*numbers, *rest) if len(numbers) == 2 else ("0", "1", "2")
        keys = [next((name for name in names if name in fields), None) for names in (_START, _END, _TYPE)]
        if None in keys:
            lacking = [what for what, key in zip(("start", "end", "label"), keys, strict=True) if key is None]
            raise UserError(
                f"a span in {self.label!r} has {listed(map(repr, fields))}, but no {' and no '.join(lacking)}",
                where=self.rows.where(0),
                fix='for example [{"start": 0, "end": 5, "label": "PER"}]',
            )
        return keys[0], keys[1], keys[2]

    def _span(self, at: int, span: Any, keys: tuple[Any, Any, Any]) -> Span:
        """One span in words."""
        where = self.rows.where(at)
        if span is None or (isinstance(span, list) and len(span) != 3):
            raise UserError(f"{span!r} in {self.label!r} is no span", where=where, fix='for example [0, 5, "PER"]')
        start, end = span[keys[0]], span[keys[1]]
        if not isinstance(start, int) or not isinstance(end, int):
            raise UserError(f"a span goes from {start!r} to {end!r}; expected whole numbers", where=where, fix="write offsets as numbers")
        name = self._name(span[keys[2]], at, 0) if span[keys[2]] is not None else ""
        end += self.reading.inclusive
        size = len(self.places[at]) if self.in_words else len(self.text[at])
        unit = "word" if self.in_words else "character"
        if not 0 <= start < end <= size:
            what = "is empty" if start >= end else f"leaves the text of {count(size, unit)}"
            fix = "task.spans_end=inclusive where the end is the last one, or mend the row"
            raise UserError(f"the {name} span {start} to {end} {what}", where=where, fix=fix if start == end else "mend the offsets")
        if isinstance(span, dict) and isinstance(said := span.get("text"), str) and not self.in_words and said != self.text[at][start:end]:
            other = "exclusive" if self.reading.inclusive else "inclusive"
            raise UserError(
                f"the span {start} to {end} says {said!r}, but {self.text[at][start:end]!r} stands there",
                where=where,
                fix=f"task.spans_end={other}, or mend the row",
            )
        return (start, end, name) if self.in_words else self._whole_words(at, start, end, name)

    def _whole_words(self, at: int, start: int, end: int, name: str) -> Span:
        """A span of characters in words."""
        places = self.places[at]
        inside = range(bisect_right(places, start, key=itemgetter(1)), bisect_left(places, end, key=itemgetter(0)))
        if inside and places[inside[0]][0] == start and places[inside[-1]][1] == end:
            return inside[0], inside[-1] + 1, name
        told = f"the {name} span {start} to {end} ({self.text[at][start:end]!r})"
        other = "exclusive" if self.reading.inclusive else "inclusive"
        fix = f"mend the offsets, or task.spans_end={other}, or task.tags=repair"
        if not inside:
            raise UserError(f"{told} covers no word", where=self.rows.where(at), fix="mend the offsets")
        if self.reading.policy is not Policy.repair:
            words = [self.text[at][places[i][0] : places[i][1]] for i in (inside[0], inside[-1])]
            cut_off = next(
                (w for i, w in zip((inside[0], inside[-1]), words, strict=True) if not start <= places[i][0] < places[i][1] <= end), None
            )
            what = f"cuts the word {cut_off!r}" if cut_off else "begins or ends beside a word"
            raise UserError(f"{told} {what}", where=self.rows.where(at), fix=fix)
        self.mended.append(f"{self.rows.where(at)}: {start} to {end}")
        return inside[0], inside[-1] + 1, name

    def _flat(self, at: int, found: Iterable[Span]) -> list[Span]:
        """Spans without those that a longer one overlaps."""
        kept: list[Span] = []
        for span in sorted(set(found), key=lambda s: (s[0] - s[1], s)):
            if any(span[0] < end and start < span[1] for start, end, _ in kept):
                self.mended.append(f"{self.rows.where(at)}: words {span[0] + 1} to {span[1]}")
            else:
                kept.append(span)
        return sorted(kept)
