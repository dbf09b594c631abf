"""token-classification: words to pieces and back, windows, what is learnt, and the figures of other people's scorers on the same output."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from forked import Forks
from ran import ROOT, Ran

from finetune_cli.config.schema import DataConfig, ModelConfig
from finetune_cli.data import Rows, read
from finetune_cli.data.tagged import TEXT, Reading, arrange
from finetune_cli.data.tags import Scheme, spans, write
from finetune_cli.encoded import Examples, Ragged
from finetune_cli.tasks import get
from finetune_cli.tasks.entities.word_pieces import WORD, encode_words, first_pieces, gather_words

Ftune = Callable[..., Ran]
SENTENCES = ["The EU rejects German lamb .", "O'Neill , of Bo-ness , won !", "Tamar in flood is brown"]
SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "device=cpu", "device.threads=1"]
LEARNS = [
    "optimizer.lr=1e-2",
    "train.steps=60",
    "train.order=buckets",
    "train.batch_size=16",
    "data.max_rows=96",
    "train.eval_every=30",
    "model.dropout=0",
]


def sentences(path: Path, rows: Sequence[Sequence[str]]) -> Rows:
    """Lists of words as the task arranges them."""
    path.write_text("".join(json.dumps({"tokens": list(row)}) + "\n" for row in rows))
    return arrange(read(str(path), DataConfig()), DataConfig(), Reading(), labelled=False)[0]


def encoded(rows: Rows, tokenizer: Any, max_length: int = 512, stride: int = 8) -> Examples:
    from finetune_cli.data import Roles

    return encode_words(rows, Roles(TEXT, None, ()), tokenizer, max_length=max_length, stride=stride, first_row=0)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """Tokenizers that read and that write, learnt from the sentences."""
    from finetune_cli.models import train_tokenizer

    return {kind: train_tokenizer(iter(SENTENCES * 3), ModelConfig(), kind) for kind in ("encoder", "decoder")}


# pieces -----------------------------------------------------------------------------------------------------------------------


def test_pieces_are_those_of_the_tokenizer(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizers["encoder"]
    words = [sentence.split() for sentence in SENTENCES]
    found = encoded(sentences(tmp_path / "a.jsonl", words), tokenizer)
    expected = tokenizer(words, is_split_into_words=True)
    for i in range(len(words)):
        ids, numbers = found.columns["input_ids"], found.columns[WORD]
        assert isinstance(ids, Ragged) and isinstance(numbers, Ragged)
        assert ids.sequence(i).tolist() == expected["input_ids"][i]
        assert [None if n < 0 else n for n in numbers.sequence(i).tolist()] == expected.word_ids(i)
    assert found.counts.tokens == sum(map(len, expected["input_ids"])) and found.counts.cut_rows == 0


def test_a_byte_level_tokenizer_sees_the_spaces_of_the_text(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizers["decoder"]
    found = encoded(sentences(tmp_path / "a.jsonl", [["Tamar", "in", "flood", "is", "brown"]]), tokenizer).columns["input_ids"]
    assert isinstance(found, Ragged)
    assert found.sequence(0).tolist() == tokenizer("Tamar in flood is brown")["input_ids"]


def test_a_word_without_a_piece_gets_the_unknown_token(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizers["encoder"]
    found = encoded(sentences(tmp_path / "a.jsonl", [["EU", "\x01", "", "lamb"], []]), tokenizer)
    ids, numbers = found.columns["input_ids"], found.columns[WORD]
    assert isinstance(ids, Ragged) and isinstance(numbers, Ragged)
    assert sorted(set(numbers.sequence(0).tolist())) == [-1, 0, 1, 2, 3]
    assert ids.sequence(0)[np.isin(numbers.sequence(0), [1, 2])].tolist() == [tokenizer.unk_token_id] * 2
    assert ids.sequence(1).tolist() == tokenizer("")["input_ids"]


# windows ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_windows_hold_every_word_and_come_together_again(seed: int, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """Answers that are functions of the word alone are the same with windows and without."""
    draw = np.random.default_rng(seed)
    known = [word for sentence in SENTENCES for word in sentence.split()] + ["rejectsGermanlambflood"]
    rows = sentences(tmp_path / "a.jsonl", [draw.choice(known, int(n)).tolist() for n in (3, 400, 0, 1, 90)])
    tokenizer, limit, stride = tokenizers["encoder"], int(draw.integers(12, 40)), int(draw.integers(0, 20))
    whole, parts = encoded(rows, tokenizer, 100_000), encoded(rows, tokenizer, limit, stride)
    assert len(whole) == 5 and len(parts) > 20
    assert parts.lengths().max() <= limit and parts.counts.cut_rows == parts.counts.lost == 0
    assert parts.counts.tokens == whole.counts.tokens and parts.counts.longest == whole.counts.longest

    def answers(examples: Examples) -> Ragged:
        ids, word = examples.columns["input_ids"], examples.columns[WORD]
        assert isinstance(ids, Ragged) and isinstance(word, Ragged)
        first = first_pieces(word)
        ends = np.concatenate([[0], np.cumsum(first)])[word.offsets]
        return Ragged(np.stack([ids.values[first], word.values[first]], 1), ends)

    expected, _ = gather_words(answers(whole), whole)
    found, about = gather_words(answers(parts), parts)
    assert about.tolist() == list(range(5))
    assert found.offsets.tolist() == expected.offsets.tolist() and (found.values == expected.values).all()


def test_windows_share_what_was_asked_for(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    rows = sentences(tmp_path / "a.jsonl", [["EU"] * 100])
    word = encoded(rows, tokenizers["encoder"], 22, 6).columns[WORD]
    assert isinstance(word, Ragged)
    ends = [(seq.max(initial=-1), seq[seq >= 0].min()) for seq in map(word.sequence, range(len(word)))]
    shared = [int(last) - int(first) + 1 for (last, _), (_, first) in pairwise(ends)]
    assert set(shared[:-1]) == {6} and shared[-1] >= 6 and ends[-1][0] == 99
    assert {len(word.sequence(i)) for i in range(len(word))} == {22}


def test_a_word_takes_the_window_with_most_context() -> None:
    word = Ragged.of([[-1, 0, 1, 2, 3, -1], [-1, 2, 3, 4, 5, -1], [-1, 0, -1]])
    examples = Examples({WORD: word, "input_ids": word}, np.array([7, 7, 9]), None)  # type: ignore[arg-type]
    found, rows = gather_words(Ragged(np.array([10, 11, 12, 13, 22, 23, 24, 25, 30]), np.array([0, 4, 8, 9])), examples)
    assert rows.tolist() == [7, 9] and found.sequence(1).tolist() == [30]
    assert found.sequence(0).tolist() == [10, 11, 12, 23, 24, 25]


def test_only_a_word_longer_than_a_window_is_cut(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    found = encoded(sentences(tmp_path / "a.jsonl", [["EU", "x1" * 200, "lamb"], ["EU"]]), tokenizers["encoder"], 16)
    assert found.counts.cut_rows == 1 and found.counts.lost > 0 and found.lengths().max() == 16
    word = found.columns[WORD]
    assert isinstance(word, Ragged) and {0, 1, 2} <= set(word.values[: word.offsets[-2]].tolist())


# labels -----------------------------------------------------------------------------------------------------------------------


def task_with(**options: Any) -> Any:
    kind = get("token-classification")
    return kind(kind.Config(**options), {"labels": ["O", "B-X", "I-X"], "scheme": "iob2"})


@pytest.mark.parametrize(("pieces", "expected"), [("first", [-1, 1, -1, -1, 2, 0, -1]), ("all", [-1, 1, 2, 2, 2, 0, -1])])
def test_which_pieces_learn(pieces: str, expected: list[int]) -> None:
    from finetune_cli.tasks.entities.entity_rows import Gold
    from finetune_cli.tasks.token_classification import LabelPieces

    word = Ragged.of([[-1, 0, 0, 0, 1, 2, -1]])
    gold = Gold(Ragged.of([[1, 2, 0]]), Ragged.of([[]]), Ragged.of([[]]))
    task = task_with(label_pieces=LabelPieces(pieces))
    from finetune_cli.batching import Padded

    batch = task.collate({"input_ids": word, WORD: word}, gold, Padded({}, 512), key=0)
    assert batch.targets[0, :7].tolist() == expected and set(batch.targets[0, 7:].tolist()) <= {-1}
    assert batch.weights == {"loss": float(sum(label >= 0 for label in expected))}
    assert batch.extra["first"].tolist() == [1, 4, 5] and batch.host["words"].tolist() == [3]


def test_labels_of_another_scheme_are_written_in_it() -> None:
    """A plain model from elsewhere, whose labels are iobes, is scored on the same spans."""
    kind = get("token-classification")
    facts = kind.facts_of(SimpleNamespace(id2label=dict(enumerate(["O", "B-X", "I-X", "E-X", "S-X"]))))
    assert facts["scheme"] == "iobes"
    rows = arrange_words([["a", "b", "c"]], [["B-X", "I-X", "B-X"]])
    gold = kind(kind.Config(), facts).read_targets(DataConfig(), *rows)
    assert [facts["labels"][i] for i in gold.labels.values] == ["B-X", "E-X", "S-X"]


def arrange_words(words: list[list[str]], tags: list[list[str]]) -> tuple[Rows, Any]:
    import pyarrow as pa

    from finetune_cli.data.rows import of_table

    rows = of_table(pa.table({"tokens": words, "tags": tags}), "a.parquet")
    made, roles, _ = arrange(rows, DataConfig(), Reading(), labelled=True)
    return made, roles


# whole runs -------------------------------------------------------------------------------------------------------------------


def conll(folder: Path, name: str, split: str, scheme: Scheme) -> Path:
    """The shipped corpus as CoNLL columns."""
    rows = read(f"corpus:entities/{split}.jsonl", DataConfig())
    made, roles, _ = arrange(rows, DataConfig(), Reading(), labelled=True)
    blocks = []
    for text, starts, ends, tags in zip(*(made.column(c).to_pylist() for c in (roles.text, *made.columns[-3:])), strict=True):
        written = write(spans(tags, Scheme.iob2), len(tags), scheme)
        blocks.append("".join(f"{text[a:b]} X {tag}\n" for a, b, tag in zip(starts, ends, written, strict=True)))
    path = folder / name
    path.write_text("-DOCSTART- X O\n\n" + "\n".join(blocks), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("entities")


@pytest.fixture
def columns_run(home: Path, ftune_inside: Ftune) -> Path:
    """A run on CoNLL columns in IOB1 that has learnt something, made once."""
    run = home / "run"
    if not run.exists():
        files = {"train": "eng.train", "validation": "eng.testa", "test": "eng.testb"}
        keys = [f"data.{split}={conll(home, name, split, Scheme.iob1)}" for split, name in files.items()]
        ftune_inside("train", "task=token-classification", *keys, *SMALL, *LEARNS, "model.shape.positions=3000", f"run.dir={run}").ok()
    return run


def test_the_figures_are_those_of_seqeval(columns_run: Path) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    lines = [json.loads(line) for line in (columns_run / "eval/test/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    made, roles, _ = arrange(read(str(columns_run.parent / "eng.testb"), DataConfig()), DataConfig(), Reading(), labelled=True)
    gold = made.column(roles.labels[0]).to_pylist()
    predicted = [
        write([(*entity["words"], entity["label"]) for entity in line["entities"]], len(tags))
        for line, tags in zip(lines, gold, strict=True)
    ]
    scores = {name: entry["value"] for name, entry in json.loads((columns_run / "metrics.json").read_text())["test"].items()}
    assert scores["entity_f1"] > 0
    assert scores["entity_f1"] == pytest.approx(seqeval.f1_score(gold, predicted), abs=1e-12)
    assert scores["entity_precision"] == pytest.approx(seqeval.precision_score(gold, predicted), abs=1e-12)
    assert scores["entity_recall"] == pytest.approx(seqeval.recall_score(gold, predicted), abs=1e-12)
    assert scores["entity_f1_macro"] == pytest.approx(seqeval.f1_score(gold, predicted, average="macro"), abs=1e-12)
    for line, row in zip(lines, made.column(TEXT).to_pylist(), strict=True):
        assert line["text"] == row
        for entity in line["entities"] + line["target"]:
            assert row[entity["start"] : entity["end"]] == entity.get("text", row[entity["start"] : entity["end"]]) != ""


def test_eval_scores_other_schemes_alike(columns_run: Path, ftune_inside: Ftune) -> None:
    expected = json.loads((columns_run / "metrics.json").read_text())["test"]
    for scheme in (Scheme.iobes, Scheme.bmes):
        path = conll(columns_run.parent, f"test.{scheme.value}", "test", scheme)
        found = ftune_inside("eval", columns_run, f"data.test={path}").ok().json["test"]
        assert found == expected


def test_predict_reads_columns_without_tags_and_numbers_the_sentences(columns_run: Path, ftune_inside: Ftune, tmp_path: Path) -> None:
    text = "Chidi\nmet\nRosalind\n.\n\n-DOCSTART-\n\nThe\nAnvil\n"
    (tmp_path / "words.conll").write_text(text)
    named = ftune_inside("predict", columns_run, "input=words.conll").ok().lines
    piped = ftune_inside("predict", columns_run, "format=conll", stdin=text).ok().lines
    assert named == piped
    assert [(line["row"], line["text"]) for line in named] == [(1, "Chidi met Rosalind ."), (2, "The Anvil")]
    for line in named:
        for entity in line["entities"]:
            first, end = entity["words"]
            assert line["text"][entity["start"] : entity["end"]] == entity["text"] == " ".join(line["text"].split()[first:end])
            assert 0 < entity["score"] <= 1


@pytest.mark.parametrize("bias", [0.0, 100.0])
def test_every_word_of_a_long_row_is_answered(bias: float, columns_run: Path, ftune_inside: Ftune, tmp_path: Path) -> None:
    """Without attention and positions a model answers word by word: windows must not change anything. Biased to B, it marks every word."""
    from safetensors.torch import load_file, save_file

    from finetune_cli.data.words import cut

    alone = tmp_path / "model"
    shutil.copytree(columns_run / "model", alone)
    tensors = load_file(alone / "model.safetensors")
    for name, tensor in tensors.items():
        if "attention.output.dense" in name or "position_embeddings" in name:
            tensor.zero_()
    tensors["classifier.bias"][1] += bias
    save_file(tensors, alone / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((alone / "task.json").read_text())
    (alone / "task.json").write_text(json.dumps({key: value for key, value in told.items() if key != "weights"}))
    corpus = (ROOT / "finetune_cli/corpora/entities/test.jsonl").read_text(encoding="utf-8").splitlines()
    text = " ".join(" ".join(json.loads(line)["text"] for line in corpus).split()[:2000])
    found = []
    for length in (3000, 48):
        ran = ftune_inside("predict", alone, "task=token-classification", f"data.max_length={length}", stdin=text).ok()
        assert "cut" not in ran.err
        found.append(ran.lines[0]["entities"])
    whole, parts = ([(e["label"], e["start"], e["end"]) for e in entities] for entities in found)
    assert whole == parts and len(whole) > 5
    assert [e["score"] for e in found[0]] == pytest.approx([e["score"] for e in found[1]], abs=1e-2)
    if bias:
        assert [place[1:] for place in whole] == cut(text) and len(whole) > 2000


def test_a_long_training_row_is_learnt_in_windows(home: Path, ftune_inside: Ftune, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (ROOT / "finetune_cli/corpora/entities/train.jsonl").read_text().splitlines()]
    text, marks = "", []
    for row in rows[:60]:
        marks += [[len(text) + e["start"], len(text) + e["end"] - 1, e["label"]] for e in row["entities"]]
        text += row["text"] + " "
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"text": text, "label": marks}) + "\n" + json.dumps({"text": "Oslo", "label": [[0, 3, "LOC"]]}) + "\n"
    )
    options = ["data.max_length=64", "train.steps=2", "data.validation=null", "task.spans_end=inclusive", "task.label_pieces=all"]
    ran = ftune_inside("train", "task=token-classification", "data.train=long.jsonl", *SMALL, *options).ok()
    table = next(line for line in ran.err.splitlines() if line.split()[:1] == ["train"])
    assert table.split()[-6] == "0" and "0.0%" in table
    manifest = json.loads((ran.run / "manifest.json").read_text())
    assert manifest["facts"]["labels"][0] == "O" and "B-PER" in manifest["facts"]["labels"]


def test_blank_rows_neither_teach_nor_break(ftune_inside: Ftune, tmp_path: Path) -> None:
    rows = [{"text": "Oslo won", "spans": [[0, 4, "LOC"]]}, {"text": " ", "spans": []}, {"text": "Rome lost", "spans": [[0, 4, "LOC"]]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    options = ["data.max_empty=1", "data.max_leaked=1", "data.validation=0.3", "train.batch_size=1", "train.steps=8"]
    ran = ftune_inside("train", "task=token-classification", "data.train=a.jsonl", *SMALL, *options).ok()
    assert json.loads((ran.run / "metrics.json").read_text())["validation"]["loss"]["value"] is not None


def test_the_report_has_sections_of_its_own(columns_run: Path) -> None:
    text = (columns_run / "report/report.md").read_text(encoding="utf-8")
    for title in ("Scores per type", "Confusion of types", "Worst errors", "Error by length", "gazetteer"):
        assert title in text
    assert (columns_run / "eval/test/confusion.csv").read_text().startswith("true")


def test_the_pipeline_finds_the_same_names(columns_run: Path, ftune_inside: Ftune) -> None:
    transformers = pytest.importorskip("transformers")
    text = "Tamar met Rosalind in Oslo"
    pipe = transformers.pipeline("token-classification", model=str(columns_run / "model"), aggregation_strategy="first", device="cpu")
    theirs = [(found["entity_group"], found["start"], found["end"]) for found in pipe(text)]
    (line,) = ftune_inside("predict", columns_run, "device.precision=fp32", stdin=text).ok().lines
    assert theirs == [(found["label"], found["start"], found["end"]) for found in line["entities"]]


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_end(forks: Forks, tmp_path: Path) -> None:
    keys = ["+exp=entities", *SMALL, "data.max_rows=64", "train.steps=24", "train.save_every=3", "train.eval_every=5", "train.log_every=1"]
    start = partial(forks.start, "train", cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert start(*keys, "run.dir=whole").wait() == 0
    stopped = start(*keys, "run.dir=stopped")
    log = tmp_path / "stopped/metrics.jsonl"
    while stopped.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 6):
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() in (0, 75)
    assert start("resume=stopped").wait() == 0
    for name in ("metrics.jsonl", "model/model.safetensors", "checkpoints/last/state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
