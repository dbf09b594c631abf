"""Whether the first line of a CSV-like file names its columns: decided by the columns asked for, else by names that people use.

A first row taken for a header is lost, a header taken for a row is a wrong example: where neither reading is sure, it is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.rows import listed
from finetune_cli.errors import UserError

TEXT_NAMES = (
    ("text", "文本"),
    ("sentence", "review", "content", "comment", "document", "body", "message", "tweet", "utterance", "post", "article", "query")
    + ("question", "prompt", "input", "sms", "headline", "title", "description", "abstract", "summary", "review text", "text a")
    + ("内容", "评论", "句子", "标题", "评价"),
)
PAIR_NAMES = (
    ("text", "text pair"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("text a", "text b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("#1 string", "#2 string"),
    ("sentence a", "sentence b"),
    ("question", "sentence"),
    ("query", "passage"),
    ("question", "passage"),
)
LABEL_NAMES = (
    ("label", "标签"),
    ("labels", "class", "category", "target", "类别"),
    ("sentiment", "score", "rating", "stars", "quality", "class index", "topic", "intent", "emotion", "y", "polarity", "similarity")
    + ("gold label",),
)
OTHER_NAMES = ("id", "idx", "index", "guid", "row", "date", "time", "author", "user", "source", "kind", "name", "language", "lang", "split")
KNOWN = {name for tier in (*TEXT_NAMES, *PAIR_NAMES, *LABEL_NAMES, OTHER_NAMES) for name in tier}


def plain(name: str) -> str:
    """A column name as people would compare it: ``Class_Index `` is ``class index``, ``sentence_1`` is ``sentence1``."""
    return re.sub(r"(?<=[^\W\d]) (?=\d)", "", " ".join(re.split(r"[\s_-]+", name.casefold().strip())))


def asked(config: DataConfig) -> list[str]:
    """The columns that the config names."""
    values: list[Any] = [config.text, config.text_pair, config.label, config.group, config.time]
    return [str(name) for value in values if value is not None for name in (value if isinstance(value, (list, tuple)) else [value])]


def column_names(first: Sequence[str], config: DataConfig, where: str, second: Sequence[str] | None = None) -> tuple[list[str], bool]:
    """Names of the columns, and whether ``first`` (the cells of the first line) is the header."""
    header = has_header(first, config, where, second)
    if not header:
        return _given_names(len(first), config, where), False
    names = [name or f"column{i}" for i, name in enumerate(first, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"column name {listed(map(repr, twice))} stands there more than once", where=where, fix="give every column a name of its own"
        )
    return names, True


def has_header(first: Sequence[str], config: DataConfig, where: str, second: Sequence[str] | None = None) -> bool:
    """The decision: what the user said, then the columns asked for, then names that people use; otherwise an error."""
    if config.header is not None:
        if config.header and config.columns:
            raise UserError(
                "data.columns names the columns of files without a header", where="data.columns", fix="drop data.columns or data.header"
            )
        return config.header
    cells, wanted = list(first), asked(config)
    if config.columns and cells == list(config.columns):
        return True
    if any(name in cells for name in wanted):
        return True
    if config.columns or (wanted and all(re.fullmatch(r"column\d+", name) for name in wanted)):
        return False
    found = {plain(cell) for cell in cells}
    sure = {*TEXT_NAMES[0], *LABEL_NAMES[0], *(plain(name) for name in wanted)}
    if found & sure or len(found & KNOWN) >= min(2, len(cells)):
        return True
    raise _undecided(cells, wanted, where, second)


def _given_names(width: int, config: DataConfig, where: str) -> list[str]:
    if not config.columns:
        return [f"column{i}" for i in range(1, width + 1)]
    names = [str(name) for name in config.columns]
    if len(set(names)) < len(names):
        raise UserError(
            f"data.columns names a column twice: {listed(names)}", where="data.columns", fix="give every column a name of its own"
        )
    if len(names) != width and not (len(names) < width and config.extra_fields.value == "ignore"):
        raise UserError(
            f"the line has {width} fields, data.columns names {len(names)}",
            where=where,
            fix="data.columns must name every field in order; surplus ones can be dropped with data.extra_fields=ignore",
        )
    return names


def _undecided(cells: list[str], wanted: list[str], where: str, second: Sequence[str] | None) -> UserError:
    """D04: the first line is neither a known header nor known to be none."""
    shown = listed([repr(cell if len(cell) <= 30 else cell[:30] + "…") for cell in cells])
    expected = f"; expected {listed(map(repr, wanted))}" if wanted else ""
    near = [hit for name in wanted for hit in difflib.get_close_matches(name, cells, n=1, cutoff=0.6)]
    names = _proposed(cells, second, wanted)
    fix = f"No header? data.header=false data.columns=[{','.join(names)}]"
    if len(cells) > 2:
        fix += f", with your own names for the {len(cells)} fields; rows of other lengths: data.extra_fields=ignore"
    if near:
        fix = f"did you mean {near[0]!r}? {fix}"
    else:
        fix += "; else data.header=true and data.text=COLUMN data.label=COLUMN"
    return UserError(f"the columns are {shown}{expected}", where=where, fix=fix)


def _proposed(cells: list[str], second: Sequence[str] | None, wanted: list[str]) -> list[str]:
    """Names to try for a file without header; of two fields the longer is the text, of more nobody knows."""
    if len(cells) > 2:
        return [f"NAME{i}" for i in range(1, len(cells) + 1)]
    rows = [cells, list(second)] if second is not None and len(second) == len(cells) else [cells]
    length = [sum(len(row[i]) for row in rows) for i in range(len(cells))]
    if len(cells) == 1:
        return [wanted[0] if wanted else "text"]
    text, label = (wanted[0], wanted[-1]) if len(wanted) >= 2 else ("text", "label")
    names = [f"column{i}" for i in range(1, len(cells) + 1)]
    names[length.index(max(length))] = text
    shortest = min(range(len(cells)), key=lambda i: (names[i] == text, length[i]))
    names[shortest] = label
    return names
