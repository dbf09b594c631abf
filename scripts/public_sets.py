"""Public data sets as JSON Lines, for the comparisons: read here by a few plain lines of Python, independent of ftune's own readers.

The directory given by ``--data`` or ``FTUNE_DATA`` holds one folder per set with the files as they are published. Both sides of a
comparison get the same files of training and test rows; where a set is large, the same rows are drawn from it by a fixed seed.
"""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DRAW_SEED = 20261123


@dataclass(frozen=True)
class PublicSet:
    """How to read one set, and how it is scored."""

    title: str
    read: Callable[[Path], tuple[list[Row], list[Row]]]
    metrics: tuple[str, ...]
    labels: int

    @property
    def regression(self) -> bool:
        return self.labels == 1


def _tab(path: Path) -> list[list[str]]:
    """Fields of a TSV in which a double quote is plain text."""
    text = path.read_text(encoding="utf-8-sig")
    return [line.split("\t") for line in text.split("\n") if line]


def _sst2(folder: Path) -> tuple[list[Row], list[Row]]:
    train, dev = ([{"text": r[0].strip(), "label": int(r[1])} for r in _tab(folder / name)[1:]] for name in ("train.tsv", "dev.tsv"))
    return train, dev  # the published test file has no labels


def _sst2_sentences(folder: Path) -> tuple[list[Row], list[Row]]:
    train, test = ([{"text": r[0], "label": int(r[1])} for r in _tab(folder / name)] for name in ("train.tsv", "test.tsv"))
    return train, test


def _ag_news(folder: Path) -> tuple[list[Row], list[Row]]:
    def read(name: str) -> list[Row]:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))[1:]
        return [{"text": f"{title}. {body}", "label": int(number) - 1} for number, title, body in rows]

    return read("train.csv"), read("test.csv")


def _mrpc(folder: Path) -> tuple[list[Row], list[Row]]:
    def read(name: str) -> list[Row]:
        return [{"text": r[3], "text_pair": r[4], "label": int(r[0])} for r in _tab(folder / name)[1:]]

    return read("train.tsv"), read("msr_paraphrase_test.txt")


def _stsb(folder: Path) -> tuple[list[Row], list[Row]]:
    train = [{"text": r[7], "text_pair": r[8], "label": float(r[9])} for r in _tab(folder / "train.tsv")[1:]]
    test = [{"text": r[5], "text_pair": r[6], "label": float(r[4])} for r in _tab(folder / "original_sts-test.tsv")]
    return train, test


SETS = {
    "sst2_sentences": PublicSet("SST-2, whole sentences", _sst2_sentences, ("accuracy",), 2),
    "sst2": PublicSet("SST-2, phrases (dev)", _sst2, ("accuracy",), 2),
    "ag_news": PublicSet("AG News", _ag_news, ("accuracy",), 4),
    "mrpc": PublicSet("MRPC", _mrpc, ("f1", "accuracy"), 2),
    "stsb": PublicSet("STS-B", _stsb, ("spearman", "pearson"), 1),
}


def data_directory(given: str | None) -> Path:
    """Where the sets are, or the end of the script with a line that says what is missing."""
    found = given or os.environ.get("FTUNE_DATA")
    if not found or not Path(found).is_dir():
        sys.exit(
            f"give the directory of the public sets: --data DIR or FTUNE_DATA=DIR (now: {found or 'neither'}); it holds {', '.join(SETS)}"
        )
    return Path(found)


def drawn(rows: list[Row], most: int | None) -> list[Row]:
    """At most so many rows, always the same ones, in their own order."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[i] for i in sorted(random.Random(DRAW_SEED).sample(range(len(rows)), most))]


def prepare(name: str, data: Path, folder: Path, most: int | None, most_test: int | None = None) -> tuple[Path, Path]:
    """``train.jsonl`` and ``test.jsonl`` of a set (at most so many rows each; None: all), written below ``folder``."""
    train, test = SETS[name].read(data / name)
    return write(folder / f"{name}-train.jsonl", drawn(train, most)), write(folder / f"{name}-test.jsonl", drawn(test, most_test))


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(path)
    return path


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
