"""The split table, its warnings and its gates."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import SplitTable, TokenCounts, audit, label_cells, load_splits

LENIENT = {"max_leaked": 1.0, "max_conflicts": 1.0, "max_empty": 1.0, "max_unknown": 1.0, "max_truncated": 1.0}


def judged(write: Any, train: list[str], test: list[str], tokens: dict[str, TokenCounts] | None = None, **options: Any) -> SplitTable:
    write("train.csv", "text,label\n" + "".join(line + "\n" for line in train))
    write("test.csv", "text,label\n" + "".join(line + "\n" for line in test))
    config = DataConfig(train="train.csv", validation=None, test="test.csv" if test else None, **options)
    splits = load_splits(config, seed=1)
    cells = {name: label_cells(splits.rows[name], splits.roles, config) for name in splits.labelled}
    return audit(splits, config, cells, tokens or {})


TRAIN = [f"text {i},{'ab'[i % 2]}" for i in range(100)]
TEST = [f"other {i},{'ab'[i % 2]}" for i in range(50)]


def test_clean_data_has_no_warning(write: Any) -> None:
    table = judged(write, TRAIN, TEST)
    assert table.warnings == ()
    row = table.splits["train"]
    assert (row.rows, row.labels, row.empty, row.duplicate, row.conflicting, row.leaked) == (100, {"a": 50, "b": 50}, 0, 0, 0, None)
    assert table.splits["test"].leaked == 0
    assert len(table.cells) == 2 and all(len(cells) == len(table.headers) for cells in table.cells)


def test_everything_wrong_is_counted(write: Any) -> None:
    train = [*TRAIN, "text 3,b", "TEXT   4 ,a", "text 5,a", ",a", "cafÃ© good,a", "lost \ufffd,a"]
    test = [*TEST, "text 1,b", " Text  2,a"]
    table = judged(write, train, test, **LENIENT)
    row, other = table.splits["train"], table.splits["test"]
    assert (row.duplicate, row.empty, row.conflicting) == (3, 1, 2)
    assert other.leaked == 2
    said = "\n".join(table.warnings)
    assert "test: 2 of 52 texts are in train (first: test.csv:52 = train.csv:3; test.csv:53 = train.csv:4)" in said
    assert "train: 2 rows of 106 have a text that has another label elsewhere (first: train.csv:7 b = train.csv:104 a)" in said
    assert "repeat an earlier text" in said and "decoded twice" in said and "U+FFFD" in said and "train.csv:105, row 104" in said


@pytest.mark.parametrize(
    ("train", "test", "key", "what"),
    [
        ([*TRAIN, *["text 1,a", "text 3,a", "text 5,a", "text 7,a"]], TEST, "data.max_conflicts", "8 of 104 (7.7%)"),
        (TRAIN, [*TEST, *TRAIN[:5]], "data.max_leaked", "test: 5 of 55 (9.1%) texts are in train"),
        ([*TRAIN, ",a", " ,b"], TEST, "data.max_empty", "train: 2 of 102 (2.0%)"),
    ],
)
def test_gates(write: Any, refused: Any, train: list[str], test: list[str], key: str, what: str) -> None:
    error = refused(judged, write, train, test)
    assert what in error.what and error.where.startswith(key) and f"{key}=0." in error.fix
    limit = float(error.fix.rpartition("=")[2])
    judged(write, train, test, **{key.removeprefix("data."): limit})


def test_the_fix_of_a_gate_opens_it_for_every_split(write: Any, refused: Any) -> None:
    train = [*TRAIN[:98], ",a", "  ,b", "text 1,a"]
    test = [*TEST[:8], ",a", ",b"]
    error = refused(judged, write, train, test, max_conflicts=0.001)
    assert "data.max_empty=0.2" in error.fix and "data.max_empty=0.0" not in error.fix
    options = dict(re.findall(r"data\.(\w+)=([\d.]+)", error.fix))
    assert set(options) == {"max_empty", "max_conflicts"}
    judged(write, train, test, **{name: float(value) for name, value in options.items()})


def test_gates_on_tokens(write: Any, refused: Any) -> None:
    counts = {"train": TokenCounts(tokens=1000, longest=900, cut_rows=20, lost=400, unknown=650), "test": TokenCounts(tokens=10)}
    error = refused(judged, write, TRAIN, TEST, counts)
    assert "20 of 100 (20.0%) rows are cut" in error.what and "also: train: 650 of 1,000 (65.0%) tokens are unknown" in error.what
    table = judged(write, TRAIN, TEST, counts, **LENIENT)
    assert table.cells[0][3:8] == (1000, 900, 20, 400, "65.0%")


def test_token_counts_add_up() -> None:
    assert TokenCounts(1, 5, 2, 3, 4) + TokenCounts(10, 4, 20, 30, 40) == TokenCounts(11, 5, 22, 33, 44)


def test_a_label_that_only_test_has_is_refused_with_its_line(write: Any, refused: Any) -> None:
    error = refused(judged, write, TRAIN, [*TEST, "x,A", "y,zz"])
    assert "label 'A' of test is not in train" in error.what and error.where == "test.csv:52, row 51" and "'a'" in error.fix


def test_labels_that_look_alike(write: Any) -> None:
    table = judged(write, [*TRAIN, "x,café", "y,cafe\u0301", "z,A", "w,A"], TEST)
    said = "\n".join(table.warnings)
    assert "'a' (75 rows) and 'A' (2 rows)" in said and "café" in said and "with one row" in said


@pytest.mark.parametrize("other", ["neg\u200b", "n\u0435g", "\ufeffneg", "ne\u00adg", "NEG", "\u039deg"])
def test_labels_that_are_drawn_alike(write: Any, other: str) -> None:
    """Nothing invisible and no letter of another alphabet passes; what is drawn like ASCII is shown with escapes."""
    table = judged(write, [f"{label} {i},{label}" for i in range(20) for label in ("neg", "pos")] + [f"x,{other}", f"y,{other}"], [])
    (said,) = [warning for warning in table.warnings if "alike" in warning]
    assert "'neg' (20 rows)" in said and ascii(other) in said and "pos" not in said


def test_space_around_labels_is_told(write: Any) -> None:
    table = judged(write, [*TRAIN, "x, a", "y,b ", "z,a"], [*TEST, "x1,\ta"], **LENIENT)
    assert "train: 2 labels have space around them, which is taken off (first: train.csv:102, row 101)" in table.warnings
    assert "test: 1 label has space around it, which is taken off (first: test.csv:52, row 51)" in table.warnings
    assert table.splits["train"].labels == {"a": 52, "b": 51}


def test_a_delimiter_that_parts_no_label_is_told(write: Any) -> None:
    assert any("data.label_delimiter=';' stands in no label" in w for w in judged(write, TRAIN, TEST, label_delimiter=";").warnings)
    assert judged(write, [*TRAIN, "x,a; b"], TEST, label_delimiter=";").warnings == ()


def test_ids_taken_for_labels(write: Any, refused: Any) -> None:
    assert "looks like an id" in refused(judged, write, [f"t{i},id{i}" for i in range(40)], TEST).what
    assert "text-regression" in refused(judged, write, [f"t{i},{i}.5" for i in range(40)], TEST).fix
    judged(write, ["a,x", "b,y", "c,z"], ["d,x"])


def test_pairs_leak_only_as_pairs(write: Any) -> None:
    write("train.csv", "sentence1,sentence2,label\na,b,1\nc,d,0\n")
    write("test.csv", "sentence1,sentence2,label\na,d,1\nb,a,0\nA, B,1\n")
    config = DataConfig(train="train.csv", validation=None, test="test.csv", **LENIENT)  # type: ignore[arg-type]
    splits = load_splits(config, seed=1)
    table = audit(splits, config, {}, {})
    assert table.splits["test"].leaked == 1 and table.splits["train"].conflicting is None


def test_labels_that_are_the_same_number_or_read_like_none_are_told() -> None:
    from collections import Counter

    from finetune_cli.data.label_audit import _near_twins

    told = _near_twins({"train": Counter({"1": 5, "1.0": 4, "01": 1, "NA": 3, "none": 2, "2": 9, "nan": 1})})
    assert "'1' (5 rows) and '1.0' (4 rows) and '01' (1 rows)" in told[-1] and len(told) == 2
    assert "'NA' (3 rows)" in told[0] and "'none' (2 rows)" in told[0] and "'nan'" in told[0] and "'2'" not in told[0]
    assert _near_twins({"train": Counter({"1": 1, "2": 1, "inf": 1})}) == []


def test_many_labels_of_one_size() -> None:
    from finetune_cli.data.audit import _told_labels

    assert _told_labels({str(i): 1000 for i in range(10)}) == "10 labels, 1,000 rows each"
    assert _told_labels({str(i): 1000 + i for i in range(10)}) == "10 labels, 1,000 to 1,009 rows each"
