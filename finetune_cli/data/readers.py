"""``read`` and ``stream``: any source to rows, whole or as it comes.

The format goes by the name, then by the first bytes; both end in the same strict readers, so a prediction reads a file as training would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from finetune_cli.config.choices import DataFormat
from finetune_cli.config.schema import DataConfig
from finetune_cli.data.columnar import read_arrow, read_parquet
from finetune_cli.data.conll import looks_like_columns, read_conll
from finetune_cli.data.delimited import DELIMITERS, read_delimited
from finetune_cli.data.encoding import Text, open_bytes
from finetune_cli.data.header import KNOWN, asked, plain
from finetune_cli.data.hub import read_hub
from finetune_cli.data.json_lines import looks_like_lines, looks_like_list, read_json_array, read_json_lines
from finetune_cli.data.parallel import partnered, read_parallel
from finetune_cli.data.plain_text import read_pattern, read_text, text_column
from finetune_cli.data.rows import BYTES, CHUNK, Rows, concat, packed
from finetune_cli.data.sources import SUFFIXES, File, Hub, resolve, suffix_of
from finetune_cli.errors import UserError

MAGIC = ((b"PAR1", DataFormat.parquet), (b"ARROW1", DataFormat.arrow))
Say = Callable[[str], None]


def read(
    source: Any,
    config: DataConfig,
    *,
    format: DataFormat | None = None,
    offline: bool = False,
    key: str = "data.train",
    split: str = "train",
    notes: list[str] | None = None,
    say: Say | None = None,
) -> Rows:
    """All rows of a source. ``split`` picks the part of a directory, corpus or hub dataset that has several; ``say`` hears of downloads."""
    notes = [] if notes is None else notes
    places = partnered(resolve(source, key=key, split=split, notes=notes), config.parallel, key=key)
    return read_places(places, config, format=format, offline=offline, notes=notes, say=say)


def read_places(
    places: list[File | Hub],
    config: DataConfig,
    *,
    format: DataFormat | None = None,
    offline: bool = False,
    notes: list[str] | None = None,
    say: Say | None = None,
) -> Rows:
    """All rows of resolved places."""
    notes = [] if notes is None else notes
    parts = [part for place in places for part in _windows(_place_rows(place, config, format, offline, notes, say), lambda: True)]
    if not parts:
        named = ", ".join(place.name for place in places[:5])
        raise UserError(f"{named} holds no row", where=named, fix="give a file with rows")
    return concat(parts)


def stream(
    source: Any,
    config: DataConfig,
    *,
    format: DataFormat,
    offline: bool = False,
    notes: list[str] | None = None,
    say: Say | None = None,
) -> Iterator[Rows]:
    """Rows in chunks as they come, in constant memory; data rows are numbered on over all files.

    ``source`` may be an open byte stream (a pipe): what has come is handed out when it pauses. Under ``auto`` a name tells the format
    before ``config.format`` does, which was said of other files.
    """
    notes = [] if notes is None else notes
    if hasattr(source, "read"):
        yield from _piped(source, config, format, notes)
        return
    row = 1
    for place in resolve(source, key="input", split="test", notes=notes):
        wanted = (
            config.format if format is DataFormat.auto and isinstance(place, File) and suffix_of(place.path) not in SUFFIXES else format
        )
        told = dataclasses.replace(config, format=wanted)
        for part in _windows(_place_rows(place, told, None, offline, notes, say), lambda: True):
            yield dataclasses.replace(part, row_of=np.arange(row, row + len(part), dtype=np.int64))
            row += len(part)


def _windows(parts: Iterator[Rows], ready: Callable[[], bool]) -> Iterator[Rows]:
    """Small batches joined to windows of up to 65,536 rows, or what has come when the input is not ready with more."""
    held: list[Rows] = []
    for part in parts:
        held.append(part)
        full = sum(map(len, held)) >= CHUNK or sum(p.table.nbytes for p in held) > BYTES
        if full or not ready():
            yield packed(concat(held))
            held = []
    if held:
        yield packed(concat(held))


def _place_rows(
    place: File | Hub, config: DataConfig, format: DataFormat | None, offline: bool, notes: list[str], say: Say | None
) -> Iterator[Rows]:
    if isinstance(place, Hub):
        return iter([read_hub(place, offline=offline, say=say)])
    wanted = config.format if format is None or format is DataFormat.auto else format
    return _file_rows(place, config, wanted, notes)


def format_of(file: File, config: DataConfig, wanted: DataFormat, notes: list[str]) -> DataFormat:
    """The format of a file: what the user said, else by its first bytes and its name; a contradiction is an error."""
    if file.partner is not None:
        return DataFormat.text
    head = open_bytes(file.path, file.name)
    magic = _magic(head)
    named = SUFFIXES.get(suffix_of(file.path), DataFormat.auto)
    kind = wanted if wanted is not DataFormat.auto else named
    if magic is not DataFormat.auto and kind not in (magic, DataFormat.auto):
        raise UserError(
            f"{file.name} is a {magic.value} file, not {kind.value}", where=file.name, fix=f"data.format={magic.value}, or rename it"
        )
    kind = magic if kind is DataFormat.auto else kind
    if kind in (DataFormat.parquet, DataFormat.arrow):
        return kind
    return _text_format(Text(open_bytes(file.path, file.name), file.name, config.encoding), config, wanted, kind, notes)


def _file_rows(file: File, config: DataConfig, wanted: DataFormat, notes: list[str]) -> Iterator[Rows]:
    if file.partner is not None:
        yield read_parallel(file, file.partner, config, notes)
        return
    kind = format_of(file, config, wanted, notes)
    if kind is DataFormat.parquet:
        yield from read_parquet(open_bytes(file.path, file.name), file.name)
    elif kind is DataFormat.arrow:
        yield from read_arrow(open_bytes(file.path, file.name), file.name)
    else:

        def again() -> Text:
            return Text(open_bytes(file.path, file.name), file.name, config.encoding)

        text = Text(open_bytes(file.path, file.name), file.name, config.encoding, notes=notes)
        yield from _text_rows(text, config, kind, notes, again)


def _magic(stream: BinaryIO) -> DataFormat:
    from finetune_cli.data.encoding import read_some

    start = read_some(stream, 6, "the file")
    stream.close()
    return next((kind for magic, kind in MAGIC if start.startswith(magic)), DataFormat.auto)


def _text_rows(text: Text, config: DataConfig, kind: DataFormat, notes: list[str], again: Callable[[], Text] | None) -> Iterator[Rows]:
    if kind in (DataFormat.csv, DataFormat.tsv):
        return read_delimited(text, config, kind, notes, again)
    if kind is DataFormat.jsonl:
        return read_json_lines(text, notes)
    if kind is DataFormat.json:
        return read_json_array(text)
    if kind is DataFormat.conll:
        return read_conll(text, config, notes)
    return read_pattern(text, config, notes) if config.pattern else read_text(text, config)


def _text_format(text: Text, config: DataConfig, wanted: DataFormat, named: DataFormat, notes: list[str]) -> DataFormat:
    """The format of a text file, by what the user said, its name, and its first characters."""
    start = text.head.lstrip("\ufeff \t\r\n")[:1]
    if wanted is not DataFormat.auto and wanted is not DataFormat.json:
        return wanted
    if named is DataFormat.json:
        if start == "{" and looks_like_lines(text.head):
            notes.append(f"{text.name}: read as JSON Lines (its first line is an object by itself)")
            return DataFormat.jsonl
        return DataFormat.json
    if named in (DataFormat.csv, DataFormat.jsonl, DataFormat.conll):
        return named
    if not config.pattern and looks_like_columns(text.head):
        if named is not DataFormat.auto:
            notes.append(f"{text.name}: read as CoNLL columns (every line ends in a tag, blank lines part the sentences)")
        return DataFormat.conll
    if named is DataFormat.tsv:
        return named
    if named is DataFormat.text or config.pattern:
        if config.pattern or not tabs_everywhere(text.head):
            return DataFormat.text
        notes.append(f"{text.name}: read as TSV (every line has a tab)")
        return DataFormat.tsv
    if text.empty:
        return DataFormat.text
    if start == "{" and looks_like_lines(text.head):
        return DataFormat.jsonl
    if start == "[":
        return DataFormat.json
    if tabs_everywhere(text.head):
        notes.append(f"{text.name}: read as TSV (every line has a tab)")
        return DataFormat.tsv
    raise UserError(
        f"the format of {text.name} cannot be told from its name", where=text.name, fix="data.format=csv, tsv, jsonl, json, conll or text"
    )


def tabs_everywhere(head: str) -> bool:
    """Whether each of the first lines that are not blank has a tab."""
    lines = [line for line in head.replace("\r", "\n").split("\n")[:1000] if line.strip(" ")]
    return bool(lines) and all("\t" in line for line in (lines[:-1] or lines))


def _piped(source: BinaryIO, config: DataConfig, format: DataFormat, notes: list[str]) -> Iterator[Rows]:
    name = "standard input"
    if format in (DataFormat.parquet, DataFormat.arrow):
        yield from (read_parquet if format is DataFormat.parquet else read_arrow)(source, name)
        return
    text = Text(source, name, config.encoding, pipe=True, notes=notes)
    kind = _piped_format(text, config) if format is DataFormat.auto else format
    if kind in (DataFormat.csv, DataFormat.tsv, DataFormat.json) and format is DataFormat.auto:
        notes.append(f"{name}: read as {kind.value.upper()}, by its first line (format=text: every line is a text)")
    if text.empty:
        return
    yield from _windows(_text_rows(text, config, kind, notes, None), text.ready)


def _piped_format(text: Text, config: DataConfig) -> DataFormat:
    """The format by the first line: JSON, a header with the columns that are looked for, else one text a line."""
    first = text.head.partition("\n")[0].strip()
    if first.startswith("{"):
        return DataFormat.jsonl
    if first == "[" or first.startswith("[{") or looks_like_list(first):
        return DataFormat.json
    wanted = {*asked(config), text_column(config)}
    for delimiter in () if config.header is False else DELIMITERS:
        cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
        known = [cell for cell in cells if cell in wanted or plain(cell) in KNOWN]
        if text_column(config) in cells and len(cells) > 1 and (len(wanted.intersection(cells)) > 1 or known == cells):
            return DataFormat.tsv if delimiter == "\t" else DataFormat.csv
    return DataFormat.text
