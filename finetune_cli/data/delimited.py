"""CSV and TSV, read strictly: no row is lost, shifted, padded or retyped; what does not fit is named with its line.

Cells are text and stay as they are written ("NA", "0045", " pos"). Delimiter and quoting are found where one reading fits the whole file,
and the choice is a note. Rows become Arrow in chunks, so a million of them are never Python objects at once.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Literal

import numpy as np
import pyarrow as pa

from finetune_cli.config.choices import DataFormat, ExtraFields, Quoting
from finetune_cli.config.schema import DataConfig
from finetune_cli.data.encoding import LONGEST_CELL, Text
from finetune_cli.data.header import column_names
from finetune_cli.data.rows import BATCH, BYTES, NAMED, Caution, Rows, count, listed, of_table
from finetune_cli.errors import UserError

DELIMITERS = (",", "\t", ";", "|")
NAMES = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a bar", " ": "a space"}
Quotes = Literal[0, 3]


def read_delimited(text: Text, config: DataConfig, kind: DataFormat, notes: list[str], again: Callable[[], Text] | None) -> Iterator[Rows]:
    """The rows of a CSV or TSV file in chunks. ``again`` opens it a second time, to look at its quotes before a row is read."""
    if text.empty:
        raise UserError(f"{text.name} is empty (0 bytes)", where=text.name, fix="check how the file was written")
    delimiter = found_delimiter(text, config, kind, notes)
    quoted = quotes_wrap(text, delimiter, config, notes, again)
    csv.field_size_limit(LONGEST_CELL)
    yield from _Reader(text, config, delimiter, quoted, notes).chunks()


def head_rows(text: Text, delimiter: str) -> list[list[str]]:
    """The first rows under one delimiter; the last, perhaps cut, is left out. Empty where quoting breaks."""
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text.head[:65_536])[:200]
    if len(text.head) > 65_536 or len(lines) == 200:
        lines = lines[:-1]
    quoting: Quotes = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    try:
        return [row for row in csv.reader(lines, delimiter=delimiter, quoting=quoting) if row]
    except csv.Error:
        return []


def found_delimiter(text: Text, config: DataConfig, kind: DataFormat, notes: list[str]) -> str:
    """The usual delimiter of the format, unless only another one gives every first row the same number of fields."""
    usual = "\t" if kind is DataFormat.tsv else ","
    chosen = _spelled(config.delimiter) if config.delimiter is not None else usual
    widths = {delimiter: {len(row) for row in head_rows(text, delimiter)} for delimiter in (chosen, *DELIMITERS)}
    if len(widths[chosen]) == 1 and widths[chosen] != {1}:
        return chosen
    fitting = [d for d in DELIMITERS if d != chosen and len(widths[d]) == 1 and widths[d] != {1}]
    if not fitting:
        return chosen
    other = max(fitting, key=lambda d: max(widths[d]))
    if config.delimiter is not None and widths[chosen] == {1}:
        first = head_rows(text, chosen)[0][0]
        raise UserError(
            f"one column {first[:60]!r}: the delimiter is probably {NAMES[other]}",
            where=f"{text.name}:1",
            fix="data.delimiter='\\t'" if other == "\t" else f"data.delimiter='{other}'",
        )
    if config.delimiter is not None:
        return chosen
    notes.append(f"{text.name}: the delimiter is {NAMES[other]} (every first row has {max(widths[other])} fields with it)")
    return other


def _spelled(delimiter: str) -> str:
    """``\\t`` and ``tab`` are what a shell user types for a tab."""
    delimiter = {"\\t": "\t", "tab": "\t", "space": " ", "comma": ",", "semicolon": ";"}.get(delimiter, delimiter)
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise UserError(
            f"data.delimiter is {delimiter!r}; expected one character",
            where="data.delimiter",
            fix="data.delimiter=';' or data.delimiter='\\t'",
        )
    return delimiter


def quotes_wrap(text: Text, delimiter: str, config: DataConfig, notes: list[str], again: Callable[[], Text] | None) -> bool:
    """Whether a double quote wraps a field (RFC 4180) rather than being text."""
    if config.quoting is not Quoting.auto:
        return config.quoting is Quoting.csv
    if delimiter != "\t":
        return True
    if again is None:
        return False
    seen, wrap = _judge_quotes(again().lines(), delimiter)
    if seen:
        how = "wrap fields as in CSV (data.quoting=plain keeps them)" if wrap else "are text (data.quoting=csv would let them wrap fields)"
        notes.append(f"{text.name}: double quotes {how}")
    return wrap


def _judge_quotes(lines: Iterable[str], delimiter: str) -> tuple[bool, bool]:
    """(a field begins with a quote, quotes wrap fields).

    They do if every field that begins with one is a well-formed RFC 4180 field and at least one needs it (holds a delimiter, a line break
    or a doubled quote), or if every field of the first line is wrapped.
    """
    inside, size, seen, needed = False, 0, False, False
    for number, line in enumerate(lines):
        if not inside and '"' not in line:
            continue
        at, fields, wrapped = 0, 0, 0
        while True:
            if inside or line.startswith('"', at):
                seen, size = True, size + len(line)
                at, closed, special = _closing(line, at if inside else at + 1, delimiter)
                if at < 0 or size > LONGEST_CELL:
                    return True, False
                needed |= special
                inside = not closed
                if inside:
                    break
                size, wrapped = 0, wrapped + 1
            else:
                found = line.find(delimiter, at)
                at = found if found >= 0 else len(line)
            fields += 1
            if line[at : at + 1] != delimiter:
                break
            at += 1
        needed |= number == 0 and fields > 1 and wrapped == fields
    return seen, seen and needed and not inside


def _closing(line: str, at: int, delimiter: str) -> tuple[int, bool, bool]:
    """From inside a wrapped field: (place behind its closing quote or -1, whether it closes in this line, whether it needed quotes)."""
    start, doubled = at, False
    while True:
        quote = line.find('"', at)
        if quote < 0:
            return len(line), False, True
        if line.startswith('"', quote + 1):
            doubled, at = True, quote + 2
            continue
        rest = line[quote + 1 : quote + 2]
        well = rest in ("", delimiter, "\r", "\n")
        return (quote + 1 if well else -1), True, doubled or delimiter in line[start:quote]


class _Reader:
    """One pass over one file: physical lines to rows, rows to Arrow."""

    def __init__(self, text: Text, config: DataConfig, delimiter: str, quoted: bool, notes: list[str]) -> None:
        self.text, self.config, self.notes, self.quoted, self.delimiter = text, config, notes, quoted, delimiter
        self.source = self._parsed()
        self.blank, self.surplus, self.first_row = 0, 0, 1
        self.names: list[str] = []
        self.header: list[str] | None = None
        self.repeated: list[str] = []
        self.rows: list[list[str]] = []
        self.lines: list[int] = []

    def _parsed(self) -> Iterator[tuple[int, list[str]]]:
        """(first physical line, cells) of every row. Only a line with a quote needs csv, which may then ask for more lines."""
        lines, delimiter, number, quoted = self.text.lines(), self.delimiter, 0, self.quoted
        for line in lines:
            number += 1
            if len(line) > LONGEST_CELL or (quoted and '"' in line):
                reader = csv.reader(
                    chain([line], lines), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True
                )
                try:
                    row = next(reader)
                except csv.Error as error:
                    raise self._broken(number, str(error)) from None
                yield number, row
                number += reader.line_num - 1
            elif content := line.rstrip("\r\n"):
                yield number, content.split(delimiter)
            else:
                self.blank += 1

    def chunks(self) -> Iterator[Rows]:
        line, first = next(self.source, (0, None))
        second = None
        if first is None:
            raise UserError(f"{self.text.name} holds nothing but blank lines", where=self.text.name, fix="check how the file was written")
        if self.text.ready():
            second_line, second = next(self.source, (0, None))
        self.names, header = column_names(first, self.config, f"{self.text.name}:{line}", second)
        if any(not name for name in first) and header:
            self.notes.append(f"{self.text.name}: a column without a name is called by its number")
        if header:
            self.header = first
        else:
            self._keep(first, line)
        if second is not None:
            self._keep(second, second_line)
        full = self._fill()
        while full:
            yield self._chunk()
            full = self._fill()
        if self.rows:
            yield self._chunk()
        self._end()

    def _keep(self, row: list[str], line: int) -> None:
        self.rows.append(row)
        self.lines.append(line)

    def _fill(self) -> bool:
        """Rows until a chunk is full or the input pauses; False at the end of the input."""
        rows, lines, text, pipe = self.rows, self.lines, self.text, self.text.pipe
        limit = text.characters + BYTES
        if pipe and rows and not text.ready():
            return True
        for line, row in self.source:
            rows.append(row)
            lines.append(line)
            if len(rows) >= BATCH or text.characters > limit or (pipe and not text.ready()):
                return True
        return False

    def _chunk(self) -> Rows:
        rows, lines, width = self.rows, self.lines, len(self.names)
        if set(map(len, rows)) != {width}:
            rows = self._fitted(width)
        self.repeated += [f"row {self.first_row + i} in line {lines[i]}" for i, row in enumerate(rows) if row == self.header]
        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        chunk = of_table(pa.table(columns, names=self.names), self.text.name, np.array(lines, np.int64), self.first_row)
        self.first_row += len(rows)
        self.rows.clear()
        self.lines.clear()
        return chunk

    def _fitted(self, width: int) -> list[list[str]]:
        """Rows cut to ``width`` where surplus fields are to be ignored; any other odd row is an error."""
        ignore = self.config.extra_fields is ExtraFields.ignore
        bad = [i for i, row in enumerate(self.rows) if len(row) < width or (len(row) > width and not ignore)]
        if bad:
            raise self._ragged(bad, width)
        self.surplus += sum(len(row) > width for row in self.rows)
        return [row[:width] for row in self.rows]

    def _ragged(self, bad: list[int], width: int) -> UserError:
        sizes = [len(self.rows[i]) for i in bad[:NAMED]]
        more = self._count_ragged(width) if not self.text.pipe else 0
        first, total = bad[0], len(bad) + more
        last = first == len(self.rows) - 1 and self.text.open_end and not more
        what = f"the row has {sizes[0]} field{'s' * (sizes[0] != 1)} where {width} {'are' if width != 1 else 'is'} expected"
        if last and sizes[0] < width:
            what += ": the file ends in the middle of a row"
        elif total > 1:
            others = [f"line {self.lines[i]} ({n})" for i, n in zip(bad[1:NAMED], sizes[1:], strict=False)]
            what += f"; likewise {listed(others, total - 1)}"
        if last and sizes[0] < width:
            fix = "copy the file again, or complete the row"
        elif sizes[0] > width and self.quoted:
            fix = (
                f'put quotes around a text with {NAMES.get(self.delimiter, repr(self.delimiter))}: "good, bad"; or data.extra_fields=ignore'
            )
        elif sizes[0] > width:
            fix = "remove the delimiter inside the text, or data.quoting=csv, or data.extra_fields=ignore"
        else:
            fix = "complete the row, or check data.delimiter and data.quoting"
        return UserError(what, where=f"{self.text.name}:{self.lines[first]}, row {self.first_row + first}", fix=fix)

    def _count_ragged(self, width: int) -> int:
        """Odd rows in the rest of the file, as far as it can be read."""
        ignore = self.config.extra_fields is ExtraFields.ignore
        try:
            return sum(1 for _, row in self.source if len(row) < width or (len(row) > width and not ignore))
        except UserError:
            return 0

    def _broken(self, line: int, cause: str) -> UserError:
        """What csv refuses: a field that is too long, or a quote that is not closed."""
        where = f"{self.text.name}:{line}, row {self.first_row + len(self.rows)}"
        if "field larger" in cause:
            more = "; is a quote left open?" if self.quoted else ""
            fix = "shorten the text, or data.quoting=plain if quotes are text" if self.quoted else "shorten the text"
            return UserError(f"a field has more than {LONGEST_CELL:,} characters{more}", where=where, fix=fix)
        if "unexpected end of data" in cause:
            what, fix = (
                "a quote is opened in this row and never closed: the file ends in the middle of a row",
                "close the quote or copy the file again",
            )
        else:
            what, fix = "a closing quote is followed by more text", 'write a quote inside a quoted field twice ("")'
        return UserError(what, where=where, fix=f"{fix}; if quotes are plain text: data.quoting=plain")

    def _end(self) -> None:
        name = self.text.name
        if self.first_row == 1 and not self.text.pipe:
            raise UserError(f"{name} has a header but no rows", where=f"{name}:1", fix="check how the file was written")
        if self.blank:
            self.notes.append(f"{name}: {count(self.blank, 'blank line')} skipped")
        if self.repeated:
            told = "repeats the header and is" if len(self.repeated) == 1 else "repeat the header and are"
            self.notes.append(Caution(f"{name}: {listed(self.repeated)} {told} read as data"))
        if self.surplus:
            has = "has" if self.surplus == 1 else "have"
            self.notes.append(f"{name}: {count(self.surplus, 'row')} {has} more than {len(self.names)} fields; the surplus is ignored")
