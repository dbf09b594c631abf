"""Public sets for the language tasks: the files that ftune is given, in the sets' own formats, and what both sides do with them.

Each set is cut to the same rows for both sides by the fixed draw of ``public_sets``. ftune reads the files with its own readers; what the
peer reads is read here, by plain lines of Python.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import Recipe
from public_sets import Row, drawn

DOCUMENT_CHARACTERS = 1500
"""A document of Tiny Shakespeare ends with the first speech that goes beyond so many characters."""


@dataclass(frozen=True)
class LanguageSet:
    """One set with its task, its model and the hyperparameters of both sides.

    ``scratch``: the shape of a small model built from scratch; both sides then start from the same weights without dropout, in fp32, and
    see the rows in the same order. Without it: MiniLM, each side as it comes.
    """

    title: str
    task: str
    cut: Callable[[Path, Path, Path, int, int], None]
    """Writes from the set's folder the training file and the test file, with at most so many rows each."""
    names: tuple[str, str]
    """Of these files, as ``data.train`` and ``data.test`` name them."""
    read: Callable[[Path], list[Row]]
    recipe: Recipe
    rows: int
    test_rows: int
    scores: tuple[str, ...]
    options: tuple[str, ...] = ()
    scratch: dict[str, int] | None = None
    most_new_tokens: int = 0
    too_long: str = "cut"

    @property
    def model(self) -> str:
        """What the table calls the model."""
        built = {"token-classification": "BERT", "text-generation": "Llama", "text2text-generation": "T5"}
        return f"small {built[self.task]} from scratch" if self.scratch else "MiniLM"

    @property
    def seeds(self) -> tuple[int, ...]:
        """One where both sides do the same, several where only their spread says what a difference means."""
        return (1,) if self.scratch else (1, 2, 3)

    def overrides(self) -> list[str]:
        """What ftune's command line says of task and hyperparameters."""
        return [f"task={self.task}", *self.recipe.overrides(), *self.options]


# -- CoNLL columns -------------------------------------------------------------------------------
def _cut_columns(source: Path, train: Path, test: Path, rows: int, test_rows: int) -> None:
    """Sentences as they stand, without the marks of documents."""
    for file, most in ((train, rows), (test, test_rows)):
        blocks = (source / file.name).read_text(encoding="utf-8").split("\n\n")
        kept = drawn([block.strip("\n") for block in blocks if block.strip() and not block.startswith("-DOCSTART-")], most)
        _write(file, "\n\n".join(kept) + "\n")


def read_columns(file: Path) -> list[Row]:
    """Words and tags, as IOB2, of each sentence: the first and the last column."""
    sentences = [[line.split() for line in block.split("\n")] for block in file.read_text(encoding="utf-8").strip("\n").split("\n\n")]
    return [{"words": [line[0] for line in s], "tags": iob2([line[-1] for line in s])} for s in sentences]


def iob2(tags: list[str]) -> list[str]:
    """IOB1 or BMES (``M``, ``E`` and ``S`` occur in no IOB scheme) as IOB2."""
    told = []
    for before, tag in zip(["O", *tags], tags, strict=False):
        mark, _, name = tag.partition("-")
        same = before.partition("-")[2] == name
        told.append("O" if mark == "O" else f"{'B' if mark in 'BS' or not same else 'I'}-{name}")
    return told


# -- running text --------------------------------------------------------------------------------
def _cut_shakespeare(source: Path, train: Path, test: Path, rows: int, test_rows: int) -> None:
    """Documents of whole speeches; the test documents are the last tenth of the file."""
    documents: list[str] = [""]
    for speech in (source / "input.txt").read_text(encoding="utf-8").split("\n\n"):
        if len(documents[-1]) > DOCUMENT_CHARACTERS:
            documents.append("")
        documents[-1] += speech + "\n\n"
    made = [{"text": document.strip("\n") + "\n"} for document in documents]
    border = len(made) * 9 // 10
    _lines(train, made[:border][:rows])
    _lines(test, made[border:][:test_rows])


def read_lines(file: Path) -> list[Row]:
    """JSON Lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


WORDS = 30


def _cut_news(source: Path, train: Path, test: Path, rows: int, test_rows: int) -> None:
    """The first words of texts of AG News, one text a line: all fit the model, which ftune would read in windows and the peer would cut."""
    for file, most in ((train, rows), (test, test_rows)):
        with (source / f"{file.stem}.csv").open(encoding="utf-8", newline="") as published:
            found = [f"{title}. {body}" for _, title, body in list(csv.reader(published, strict=True))[1:]]
        _write(file, "".join(" ".join(text.split()[:WORDS]) + "\n" for text in drawn(found, most)))


def _read_text(file: Path) -> list[Row]:
    return [{"text": line} for line in file.read_text(encoding="utf-8").split("\n") if line]


# -- conversations -------------------------------------------------------------------------------
def _cut_list(source: Path, train: Path, test: Path, rows: int, test_rows: int) -> None:
    """One list without a split, called as the training file; the rows that are drawn for test are not trained on."""
    found = json.loads((source / train.name).read_text(encoding="utf-8"))
    held = drawn(found, test_rows)
    _write(train, json.dumps(drawn([row for row in found if row not in held], rows)))
    _write(test, json.dumps(held))


def read_alpaca(file: Path) -> list[Row]:
    """Instruction with input, and output, as a question and its answer."""
    rows = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        asked = row["instruction"] + (f"\n{row['input']}" if row["input"].strip() else "")
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}], "tools": None})
    return rows


def read_glaive(file: Path) -> list[Row]:
    """ShareGPT turns with function calls as messages with tool calls."""

    def message(turn: dict[str, str]) -> dict[str, Any]:
        if turn["from"] == "function_call":
            call = {"type": "function", "function": json.loads(turn["value"])}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"role": {"human": "user", "gpt": "assistant", "observation": "tool"}[turn["from"]], "content": turn["value"]}

    rows = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"] or "[]")]
        rows.append({"messages": [message(turn) for turn in row["conversations"]], "tools": tools or None})
    return rows


# -- pairs of texts ------------------------------------------------------------------------------
def _cut_parallel(source: Path, train: Path, test: Path, rows: int, test_rows: int) -> None:
    """English and German, line by line."""
    for file, most in ((train, rows), (test, test_rows)):
        kept = drawn(_read_parallel(source / file.name), most)
        for key, language in (("text", "en"), ("target", "de")):
            _write(file.with_suffix(f".{language}"), "".join(row[key] + "\n" for row in kept))


def _read_parallel(file: Path) -> list[Row]:
    sides = [file.with_suffix(f".{of}").read_text(encoding="utf-8").split("\n")[:-1] for of in ("en", "de")]
    return [{"text": a, "target": b} for a, b in zip(*sides, strict=True)]


def _cut_dialogues(source: Path, train: Path, test: Path, rows: int, test_rows: int) -> None:
    """Dialogues with one summary each; of the three that a test dialogue has, the first."""
    for file, key, most in ((train, "summary", rows), (test, "summary1", test_rows)):
        found = [{"dialogue": row["dialogue"], "summary": row[key]} for row in read_lines(source / file.name)]
        _lines(file, drawn(found, most))


def _read_dialogues(file: Path) -> list[Row]:
    return [{"text": row["dialogue"], "target": row["summary"]} for row in read_lines(file)]


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="")


def _lines(file: Path, rows: list[Row]) -> None:
    _write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


SMALL = {"layers": 2, "hidden": 128, "heads": 4, "intermediate": 512, "vocabulary": 2000, "positions": 512}
SETS = {
    "cner": LanguageSet(
        "cner (Chinese résumés)", "token-classification", _cut_columns, ("train.char.bmes", "test.char.bmes"), read_columns,
        Recipe(epochs=3.0, batch_size=16, lr=2e-3, warmup=0.0, max_length=256), 600, 300, ("entity F1",), scratch=SMALL,
    ),
    "tinyshakespeare": LanguageSet(
        "Tiny Shakespeare", "text-generation", _cut_shakespeare, ("train.jsonl", "test.jsonl"), read_lines,
        Recipe(epochs=2.0, batch_size=16, lr=2e-3, warmup=0.0, max_length=128), 160, 40, ("bits per byte",),
        options=("task.format=text",), scratch=SMALL,
    ),
    "instruct": LanguageSet(
        "Alpaca, demo rows", "text-generation", _cut_list, ("alpaca_en_demo.json", "test_alpaca.json"), read_alpaca,
        Recipe(batch_size=8, lr=2e-3, warmup=0.0, max_length=256), 200, 60, ("loss of an answer's token",), scratch=SMALL,
    ),
    "chat": LanguageSet(
        "Glaive tool calls, demo rows", "text-generation", _cut_list, ("glaive_toolcall_en_demo.json", "test_glaive.json"), read_glaive,
        Recipe(epochs=2.0, batch_size=8, lr=2e-3, warmup=0.0, max_length=512), 160, 60, ("loss of an answer's token",),
        options=("task.too_long=drop",), scratch=SMALL, too_long="drop",
    ),
    "multi30k": LanguageSet(
        "Multi30k, English to German", "text2text-generation", _cut_parallel, ("train.en", "test_2016_flickr.en"), _read_parallel,
        Recipe(epochs=2.0, batch_size=16, lr=2e-3, warmup=0.0, max_length=64), 1500, 200, ("loss of a token", "chrF"),
        options=("data.parallel=en:de", "task.max_new_tokens=32"), scratch=SMALL, most_new_tokens=32,
    ),
    "dialogsum": LanguageSet(
        "DialogSum", "text2text-generation", _cut_dialogues, ("dialogsum.dev.jsonl", "dialogsum.test.jsonl"), _read_dialogues,
        Recipe(batch_size=8, lr=2e-3, warmup=0.0, max_length=256), 200, 60, ("loss of a token", "ROUGE-L"),
        options=("data.text=dialogue", "data.label=summary", "task.max_new_tokens=40"), scratch=SMALL, most_new_tokens=40,
    ),
    "conll2003": LanguageSet(
        "CoNLL-2003", "token-classification", _cut_columns, ("eng.train", "eng.testb"), read_columns,
        Recipe(batch_size=16, lr=5e-4, max_length=128), 800, 400, ("entity F1",),
    ),
    "ag_news": LanguageSet(
        "AG News, texts", "fill-mask", _cut_news, ("train.txt", "test.txt"), _read_text,
        Recipe(batch_size=16, lr=2e-4, max_length=128), 1200, 300, ("perplexity",),
    ),
}  # fmt: skip
"""Name of the folder below the data directory to set. Warmup is 0 where curves are compared: ftune's first step of warmup has a learning
rate above 0, that of transformers has 0, so that warmups lie one step apart."""
