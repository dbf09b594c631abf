"""Cells to texts, labels and targets, by one rule, with the line of every odd one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import Roles, Rows, has_several_labels, label_cells, label_names, missing, read, targets, texts
from finetune_cli.data.rows import of_table

ROLES = Roles("text", None, ("label",))


def rows(values: Any, name: str = "label") -> Rows:
    return of_table(pa.table({name: values}), "a.csv", list(range(2, len(values) + 2)))


@pytest.mark.parametrize(
    ("values", "want"),
    [
        (["pos", " neg ", "NA", "no", "1.0", "01"], ["pos", "neg", "NA", "no", "1.0", "01"]),
        ([1, 0, -1], ["1", "0", "-1"]),
        ([1.0, 2.5, 1e20], ["1", "2.5", "100000000000000000000"]),
        ([True, False], ["true", "false"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    ],
)
def test_a_cell_is_a_label_by_one_rule(values: Any, want: list[str]) -> None:
    assert label_cells(rows(values), ROLES, DataConfig()) == [[label] for label in want]


def test_equal_cells_share_one_list() -> None:
    cells = label_cells(rows(["a", "b"] * 1000), ROLES, DataConfig())
    assert len({id(cell) for cell in cells}) == 2


def test_several_labels_in_a_cell() -> None:
    lists = rows([["a", "b"], [], ["b", "b"], None, ["c"]])
    assert label_cells(lists, ROLES, DataConfig()) == [["a", "b"], [], ["b"], [], ["c"]]
    assert missing(lists, ROLES, DataConfig()).tolist() == [False, False, False, True, False]
    config = DataConfig(label_delimiter="|")
    split = rows(["a|b", "", " c | a ", "a||a"])
    assert label_cells(split, ROLES, config) == [["a", "b"], [], ["c", "a"], ["a"]]
    assert not missing(split, ROLES, config).any() and missing(split, ROLES, DataConfig()).tolist() == [False, True, False, False]
    assert has_several_labels(lists, ROLES, DataConfig()) and has_several_labels(split, ROLES, config)
    assert not has_several_labels(split, ROLES, DataConfig())


def test_lists_of_numbers_and_lists_that_are_none(refused: Any) -> None:
    assert label_cells(rows([[1, 2], [3]]), ROLES, DataConfig()) == [["1", "2"], ["3"]]
    for bad in ([["a"], ["b", None]], [["a"], [""]], [[["a"]]]):
        refused(label_cells, rows(bad), ROLES, DataConfig())


def test_columns_of_zeros_and_ones(refused: Any) -> None:
    roles = Roles("text", None, ("price", "service"))
    table = of_table(pa.table({"price": ["1", "0", "1"], "service": [True, False, False]}), "a.csv", [2, 3, 4])
    assert label_cells(table, roles, DataConfig()) == [["price", "service"], [], ["price"]]
    assert has_several_labels(table, roles, DataConfig())
    odd = of_table(pa.table({"price": ["1", "yes", ""], "service": [1, 0, 0]}), "a.csv", [2, 3, 4])
    error = refused(label_cells, odd, roles, DataConfig())
    assert "'yes'" in error.what and error.where == "a.csv:3, row 2; a.csv:4, row 3"
    assert not has_several_labels(odd, roles, DataConfig())


def test_missing_labels() -> None:
    assert missing(rows(["a", "", "  ", None]), ROLES, DataConfig()).tolist() == [False, True, True, True]
    assert missing(rows([1.0, float("nan"), None]), ROLES, DataConfig()).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "a whole number"), (2.5, "a number"), (True, "true/false"), (["a"], "a list"), (None, "null"), ({"x": "y"}, "an object")],
)
def test_a_text_that_is_none(write: Any, refused: Any, value: Any, kind: str) -> None:
    found = read(write("a.jsonl", json.dumps({"text": value, "label": 1}) + "\n"), DataConfig())
    error = refused(texts, found, "text")
    assert kind in error.what and error.where == "a.jsonl:1, row 1"


def test_null_among_texts_and_an_object_with_a_way_out(refused: Any) -> None:
    error = refused(texts, rows(["a", None, "b", None], "text"), "text")
    assert error.where == "a.csv:3, row 2" and "a.csv:5, row 4" in error.what
    assert "data.text=text.body" in refused(texts, rows([{"body": "x"}], "text"), "text").fix


# -- targets ---------------------------------------------------------------------------------------
def test_targets_of_several_columns_and_types() -> None:
    table = of_table(pa.table({"a": ["1", " -2.5 ", "+1e3", ".5"], "b": [1, 2, 3, 4]}), "a.csv", [2, 3, 4, 5])
    found = targets(table, Roles("text", None, ("a", "b")))
    assert found.dtype == np.float64 and found.tolist() == [[1, 1], [-2.5, 2], [1000, 3], [0.5, 4]]


@pytest.mark.parametrize("bad", ["1,5", "nan", "inf", "-Infinity", "", "x", "1_000", "0x10", "1e999", "٣", "1.5.2", "--1"])
def test_targets_that_are_no_number(refused: Any, bad: str) -> None:
    error = refused(targets, rows(["1", bad, "2", bad]), ROLES)
    assert repr(bad) in error.what and error.where == "a.csv:3, row 2; a.csv:5, row 4"
    assert ("comma" in error.fix) == (bad == "1,5")


@pytest.mark.parametrize("values", [["1.5", "1e308", "-1e308"], [1.5, 1e308, -1e308], [1.5, 1e37, 2.0]], ids=str)
def test_targets_that_float32_cannot_hold(refused: Any, values: list[Any]) -> None:
    error = refused(targets, rows(values), ROLES)
    assert f"'label' is {float(values[1]):g}" in error.what and error.where.startswith("a.csv:3, row 2")
    assert targets(rows([1e36, -1e36]), ROLES).std() == 1e36


@pytest.mark.parametrize(
    ("values", "what", "where"),
    [
        ([1.0, None], "is None", "a.csv:3, row 2"),
        ([1.0, float("nan")], "is nan", "a.csv:3, row 2"),
        ([float("inf"), 1.0], "is inf", "a.csv:2, row 1"),
        ([True, False], "is true/false", "a.csv:2, row 1"),
        ([["a"], ["b"]], "is a list", "a.csv:2, row 1"),
    ],
)
def test_typed_targets_that_are_no_number(refused: Any, values: Any, what: str, where: str) -> None:
    error = refused(targets, rows(values), ROLES)
    assert what in error.what and error.where == where


# -- names -----------------------------------------------------------------------------------------
def test_names_of_numbered_labels(write: Any, refused: Any) -> None:
    names = ["World", "Sports", "Business"]
    assert label_names(DataConfig(), ["0"]) == {}
    assert label_names(DataConfig(label_names=names), ["0", "2"]) == {"0": "World", "1": "Sports", "2": "Business"}
    assert label_names(DataConfig(label_names=names), ["1", "3"]) == {"1": "World", "2": "Sports", "3": "Business"}
    assert label_names(DataConfig(label_names=names), ["World", "Sports"]) == {}
    write("class.txt", "World\r\nSports\nBusiness")
    assert label_names(DataConfig(label_names="class.txt"), ["0"])["2"] == "Business"
    assert "'4'" in refused(label_names, DataConfig(label_names=names), ["1", "4"]).what
    assert "'x'" in refused(label_names, DataConfig(label_names=names), ["1", "x"]).what
    for bad in (["a", "a"], [], ["a", ""], write("bad.txt", "a\n\nb\n"), "gone.txt"):
        refused(label_names, DataConfig(label_names=bad), ["0"])
