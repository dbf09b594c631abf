"""From options to splits: fractions, files, roles, and what is refused before anything is trained."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import pytest

from finetune_cli.config.choices import RowPolicy
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import label_cells, load_splits


def csv_of(n: int, header: str = "text,label", label: str = "", start: int = 0) -> str:
    return header + "\n" + "".join(f"row {i},{label or 'ab'[i % 2]}\n" for i in range(start, start + n))


def numbers(splits: Any, name: str) -> list[str]:
    texts: list[str] = splits.rows[name].column("text").to_pylist()
    return texts


def test_a_fraction_is_split_off_and_said(write: Any) -> None:
    splits = load_splits(DataConfig(train=write("a.csv", csv_of(200))), seed=1)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"train": 180, "validation": 20}
    assert splits.labelled == {"train", "validation"} and splits.roles.labels == ("label",)
    assert any("20 rows of 200" in note and "stratified" in note for note in splits.notes)
    assert Counter(c[0] for c in label_cells(splits.rows["validation"], splits.roles, DataConfig())) == {"a": 10, "b": 10}
    assert not set(numbers(splits, "train")) & set(numbers(splits, "validation"))
    assert splits.sources["train"] == splits.sources["validation"] and len(splits.sources["train"]["a.csv"]) == 64
    assert splits.rows["validation"].where(0).startswith("a.csv:")


def test_eval_finds_the_rows_that_train_held_out(write: Any) -> None:
    config = DataConfig(train=write("a.csv", csv_of(300)), validation=0.1, test=0.2)
    trained = load_splits(config, seed=5)
    later = load_splits(config, seed=5, only={"test"})
    assert list(later.rows) == ["test"] and numbers(later, "test") == numbers(trained, "test")
    assert numbers(load_splits(config, seed=6, only=["test"]), "test") != numbers(trained, "test")


def test_files_for_every_split(write: Any) -> None:
    config = DataConfig(
        train=write("a.csv", csv_of(20)), validation=write("b.csv", csv_of(4, start=20)), test=write("c.csv", csv_of(6, start=24))
    )
    splits = load_splits(config, seed=1)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"train": 20, "validation": 4, "test": 6}
    assert {name: list(files) for name, files in splits.sources.items()} == {"train": ["a.csv"], "validation": ["b.csv"], "test": ["c.csv"]}
    assert list(load_splits(config, seed=1, only={"validation"}).sources) == ["validation"]


def test_no_validation(write: Any) -> None:
    assert list(load_splits(DataConfig(train=write("a.csv", csv_of(20)), validation=None), seed=1).rows) == ["train"]


def test_a_test_split_without_labels_is_kept_and_not_scored(write: Any) -> None:
    train = write("a.csv", csv_of(20))
    for i, text in enumerate(["id,text\n1,x\n2,y\n", "text,label\nx,\ny,\n"]):
        splits = load_splits(DataConfig(train=train, test=write(f"t{i}.csv", text)), seed=1)
        assert splits.labelled == {"train", "validation"} and len(splits.rows["test"]) == 2
        assert any("no labels" in note for note in splits.notes)
    write("h.jsonl", '{"text": "x", "label": -1}\n{"text": "y", "label": -1}\n')
    assert "test" not in load_splits(DataConfig(train=train, test="h.jsonl"), seed=1).labelled
    alone = load_splits(DataConfig(test="t0.csv", label="label"), seed=1, only={"test"})
    assert not alone.labelled and alone.roles.text == "text"


def test_missing_labels_are_refused_or_dropped_and_counted(write: Any, refused: Any) -> None:
    train = write("a.csv", csv_of(20) + "lost,\nlost too,  \n")
    error = refused(load_splits, DataConfig(train=train), seed=1)
    assert "2 rows of train without a label" in error.what and error.where == "a.csv:22, row 21; a.csv:23, row 22"
    splits = load_splits(DataConfig(train=train, validation=None, missing_labels=RowPolicy.drop), seed=1)
    assert len(splits.rows["train"]) == 20 and any("2 rows without a label dropped" in note for note in splits.notes)
    refused(load_splits, DataConfig(train=write("n.csv", "text,label\na,\nb,\n"), missing_labels=RowPolicy.drop), seed=1)


def test_one_file_for_two_splits_is_refused(write: Any, refused: Any) -> None:
    write("a.csv", csv_of(20))
    write("copy.csv", csv_of(20))
    os.symlink("a.csv", "link.csv")
    for other in ("a.csv", "./a.csv", "link.csv", "copy.csv", ["copy.csv"]):
        assert "learnt by heart" in refused(load_splits, DataConfig(train="a.csv", test=other), seed=1).what
    write("b.csv", csv_of(4, start=50))
    splits = load_splits(DataConfig(train="a.csv", validation="b.csv", test="b.csv"), seed=1)
    assert any("chose the checkpoint" in note for note in splits.notes)


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, 500])
def test_fractions_lie_between_0_and_1(write: Any, refused: Any, value: float) -> None:
    assert refused(load_splits, DataConfig(train=write("a.csv", csv_of(20)), validation=value), seed=1).where == "data.validation"


def test_splits_that_leave_nothing(write: Any, refused: Any) -> None:
    one = write("one.csv", csv_of(1))
    assert "cannot be split" in refused(load_splits, DataConfig(train=one), seed=1).what
    assert len(load_splits(DataConfig(train=one, validation=write("v.csv", csv_of(3, start=5))), seed=1).rows["train"]) == 1
    assert (
        "no row for training" in refused(load_splits, DataConfig(train=write("a.csv", csv_of(20)), validation=0.5, test=0.5), seed=1).what
    )
    assert refused(load_splits, DataConfig(), seed=1).where == "data.train"
    assert refused(load_splits, DataConfig(validation=None), seed=1, only={"validation"}).where == "data.validation"
    few = load_splits(DataConfig(train=write("few.csv", csv_of(3))), seed=1)
    assert {name: len(rows) for name, rows in few.rows.items()} == {"train": 2, "validation": 1}
    alone = write("alone.csv", "text,label\n" + "".join(f"row {i},label {i}\n" for i in range(10)))
    assert len(load_splits(DataConfig(train=alone), seed=1).rows["validation"]) == 1


def test_groups_and_times(write: Any, refused: Any) -> None:
    text = "text,label,user,day\n" + "".join(f"row {i},{'ab'[i % 2]},u{i // 4},2024-{1 + i % 12:02d}-03\n" for i in range(120))
    write("a.csv", text)
    splits = load_splits(DataConfig(train="a.csv", group="user"), seed=1)
    users = {name: set(rows.column("user").to_pylist()) for name, rows in splits.rows.items()}
    assert not users["train"] & users["validation"] and len(splits.rows["validation"]) == 12
    splits = load_splits(DataConfig(train="a.csv", time="day"), seed=1)
    assert min(splits.rows["validation"].column("day").to_pylist()) >= max(splits.rows["train"].column("day").to_pylist())
    assert "both set" in refused(load_splits, DataConfig(train="a.csv", group="user", time="day"), seed=1).what
    assert "'usr'" in refused(load_splits, DataConfig(train="a.csv", group="usr"), seed=1).what
    assert "ISO 8601" in refused(load_splits, DataConfig(train="a.csv", time="user"), seed=1).fix
    write("b.csv", "text,label,user\nx,a,u1\n")
    notes = load_splits(DataConfig(train="a.csv", group="user", test="b.csv"), seed=1).notes
    assert any("1 group of 'user'" in note for note in notes)


def test_max_rows_draws_and_keeps_order(write: Any) -> None:
    config = DataConfig(train=write("a.csv", csv_of(100)), validation=None, max_rows=10)
    splits = load_splits(config, seed=1)
    assert len(splits.rows["train"]) == 10 and (splits.rows["train"].row_of[1:] > splits.rows["train"].row_of[:-1]).all()
    assert numbers(splits, "train") == numbers(load_splits(config, seed=1), "train") != numbers(load_splits(config, seed=2), "train")


def test_rows_of_many_labels_and_numbers_are_split_too(write: Any) -> None:
    lists = "".join(json.dumps({"text": f"row {i}", "label": [[], ["a"], ["a", "b"]][i % 3]}) + "\n" for i in range(90))
    assert len(load_splits(DataConfig(train=write("a.jsonl", lists)), seed=1).rows["validation"]) == 9
    floats = "text,label\n" + "".join(f"row {i},{i / 7}\n" for i in range(90))
    splits = load_splits(DataConfig(train=write("b.csv", floats)), seed=1)
    assert len(splits.rows["validation"]) == 9 and any("at random" in note for note in splits.notes)
    assert any("at random" in note for note in load_splits(DataConfig(train="b.csv"), seed=1, stratify=False).notes)


def test_a_test_file_with_another_header(write: Any, refused: Any) -> None:
    train = write("a.tsv", csv_of(20, "sentence,label").replace(",", "\t"))
    splits = load_splits(DataConfig(train=train, test=write("t.tsv", "index\tsentence\n0\tx\n")), seed=1)
    assert splits.roles.text == "sentence" and len(splits.rows["test"]) == 1
    error = refused(load_splits, DataConfig(train=train, test=write("u.tsv", "index\tSentence\n0\tx\n")), seed=1)
    assert "no column 'sentence'" in error.what and "'Sentence'" in error.fix and "u.tsv" in error.where
    error = refused(load_splits, DataConfig(train=train, validation=write("v.tsv", "sentence\tlable\nx\ta\n")), seed=1)
    assert "'label'" in error.what and "data.label" in error.where
