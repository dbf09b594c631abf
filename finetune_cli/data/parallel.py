"""Two text files that belong together, line to line: texts in one, what answers them in the other (``data.parallel=en:de``).

Parallel corpora come as ``train.en`` and ``train.de``, ``train.source`` and ``train.target``, ``src-train.txt`` and ``tgt-train.txt``: one
part of the name tells the sides apart. Both files are read as plain text, every line a row, so that line n of one is line n of the other.
"""

from __future__ import annotations

import dataclasses
import os
import re

import pyarrow as pa

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.encoding import Text, open_bytes
from finetune_cli.data.plain_text import read_text, text_column
from finetune_cli.data.rows import Rows, concat, count, packed
from finetune_cli.data.sources import File, Hub, missing, shown
from finetune_cli.errors import UserError


def partnered(places: list[File | Hub], rule: str | None, *, key: str) -> list[File | Hub]:
    """Every file with its partner by ``FROM:TO``; the places as they are without a rule."""
    return places if rule is None else [_with_partner(place, rule, key) for place in places]


def _with_partner(place: File | Hub, rule: str, key: str) -> File:
    if isinstance(place, Hub):
        raise missing(place.id, place.id, key)
    one, _, other = rule.partition(":")
    folder, name = os.path.split(place.path)
    parts = list(re.finditer(rf"(?<![^\W_]){re.escape(one)}(?![^\W_])", name))
    if not parts:
        raise UserError(
            f"{place.name} has no {one!r} in its name to put {other!r} in its place",
            where=f"data.parallel={rule}",
            fix=f"name files such as train.{one}, or data.parallel=null where texts and answers stand in one file",
        )
    path = os.path.join(folder, name[: parts[-1].start()] + other + name[parts[-1].end() :])
    if not os.path.isfile(path):
        raise UserError(
            f"{place.name} has no partner: there is no {shown(path)}",
            where=f"data.parallel={rule}",
            fix="give both files, line to line",
        )
    return dataclasses.replace(place, partner=File(path, shown(path)))


def read_parallel(file: File, partner: File, config: DataConfig, notes: list[str]) -> Rows:
    """The rows of two files: their texts and, as label, the line of the partner that answers each."""
    label = config.label if isinstance(config.label, str) else "label"
    if config.pattern:
        raise UserError("data.pattern and data.parallel are both set", where="data.pattern", fix="keep one of them")
    if label == text_column(config):
        raise UserError(f"{label!r} is both text and label", where="data.label", fix="leave data.text and data.label out")
    texts, answers = _read(file, config), _read(partner, dataclasses.replace(config, text=label))
    if len(texts) != len(answers):
        longer, shorter = (file, partner) if len(texts) > len(answers) else (partner, file)
        raise UserError(
            f"{file.name} has {count(len(texts), 'line')}, {partner.name} has {count(len(answers), 'line')}: they must match line to line",
            where=f"{longer.name}:{min(len(texts), len(answers)) + 1} has no line beside it in {shorter.name}",
            fix="make both files from the same rows",
        )
    notes.append(f"line n of {file.name} is answered by line n of {partner.name} (data.parallel)")
    table = pa.table([texts.table.column(0), answers.table.column(0)], names=[text_column(config), label])
    return Rows(table, texts.files, texts.file_of, texts.line_of, texts.row_of)


def _read(file: File, config: DataConfig) -> Rows:
    text = Text(open_bytes(file.path, file.name), file.name, config.encoding)
    return packed(concat(list(read_text(text, config))))
