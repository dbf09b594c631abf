"""Columns: as named, else where there is one reading, else an error that lists them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import Roles, Rows, find_roles
from finetune_cli.data.rows import of_table


def rows(*columns: str) -> Rows:
    return of_table(pa.table({name: ["x"] for name in columns}), "a.csv", [2])


@pytest.mark.parametrize(
    ("columns", "want"),
    [
        (["text", "label"], Roles("text", None, ("label",))),
        (["sentence", "label"], Roles("sentence", None, ("label",))),
        (["label", "review"], Roles("review", None, ("label",))),
        (["text", "label", "kind", "stars", "aspects"], Roles("text", None, ("label",))),
        (["id", "Text", "Label "], Roles("Text", None, ("Label ",))),
        (["Class Index", "Description"], Roles("Description", None, ("Class Index",))),
        (["index", "genre", "sentence1", "sentence2", "score"], Roles("sentence1", "sentence2", ("score",))),
        (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], Roles("#1 String", "#2 String", ("Quality",))),
        (["premise", "hypothesis", "label"], Roles("premise", "hypothesis", ("label",))),
        (["utterances", "intent"], Roles("utterances", None, ("intent",))),
        (["text", "polarity_of_it"], Roles("text", None, ("polarity_of_it",))),
        (["评论", "标签"], Roles("评论", None, ("标签",))),
    ],
)
def test_one_reading(columns: list[str], want: Roles) -> None:
    found, notes = find_roles(rows(*columns), DataConfig(), labelled=True)
    assert found == want and len(notes) == 2


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        (["Class Index", "Title", "Description"], "'Title' or 'Description'"),
        (["text", "score", "rating"], "'score' or 'rating'"),
        (["a", "b"], "'a', 'b'"),
        (["text", "a", "b"], "label? The columns are 'text', 'a', 'b'"),
    ],
)
def test_several_readings_are_an_error_that_lists_the_columns(refused: Any, columns: list[str], what: str) -> None:
    assert what in refused(find_roles, rows(*columns), DataConfig(), labelled=True).what


def test_named_columns() -> None:
    config = DataConfig(text=["Title", "Description"], label="Class Index")
    found, notes = find_roles(rows("Class Index", "Title", "Description"), config, labelled=True)
    assert found == Roles("Title", "Description", ("Class Index",)) and not notes
    found, _ = find_roles(rows("0", "1", "2"), DataConfig(text=0, label=[1, 2]), labelled=True)
    assert found == Roles("0", None, ("1", "2"))
    found, _ = find_roles(rows("a", "b", "c"), DataConfig(text="a", text_pair="b", label="c"), labelled=False)
    assert found == Roles("a", "b", ())


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"text": "texts"}, "data.text"),
        ({"label": "Label"}, "data.label"),
        ({"text": "text", "text_pair": "nope"}, "data.text_pair"),
        ({"text_pair": "text"}, "data.text_pair"),
        ({"text": ["text", "label", "id"]}, "data.text"),
        ({"text": ["text", "text"]}, "data.text"),
        ({"text": "label", "label": "label"}, "data.label"),
        ({"label": ["label", "label"]}, "data.label"),
    ],
)
def test_columns_that_cannot_be(refused: Any, config: dict[str, Any], key: str) -> None:
    assert key in refused(find_roles, rows("id", "text", "label"), DataConfig(**config), labelled=True).where


def test_the_nearest_name_is_offered(refused: Any) -> None:
    assert "data.label='Label '" in refused(find_roles, rows("text", "Label "), DataConfig(label="label"), labelled=True).fix
    assert "column1" in refused(find_roles, rows("column1", "column2"), DataConfig(text="text"), labelled=True).fix


def test_without_labels_one_column_is_the_text() -> None:
    assert find_roles(rows("whatever"), DataConfig(), labelled=False)[0] == Roles("whatever", None, ())


def test_a_task_on_one_text_takes_no_pair(refused: Any) -> None:
    assert find_roles(rows("text", "text_pair", "label"), DataConfig(), labelled=True, pairs=False)[0].text_pair is None
    refused(find_roles, rows("a", "b", "label"), DataConfig(text=["a", "b"]), labelled=True, pairs=False)


def test_a_field_of_an_object_is_a_column() -> None:
    nested = of_table(pa.table({"doc": [{"body": "x", "id": 1}], "label": ["a"]}), "a.jsonl", [1])
    assert nested.has("doc.body") and not nested.has("doc.nope") and not nested.has("label.x")
    assert find_roles(nested, DataConfig(text="doc.body"), labelled=True)[0].text == "doc.body"
    assert nested.column("doc.body").to_pylist() == ["x"]
