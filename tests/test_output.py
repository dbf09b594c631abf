"""Where predictions go: the form by the name, whole or absent."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from ran import Ran

from finetune_cli.commands.predict import sink
from finetune_cli.data.encoding import open_bytes


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL.GZ", "a.jsonl.zst", "a.out", "a"])
def test_answers_are_packed_as_the_name_says(name: str, tmp_path: Path) -> None:
    with sink(str(tmp_path / name), io.BytesIO()) as out:
        for window in (b"one\n", b"two\n"):
            out.write(window)
            out.flush()
    assert open_bytes(str(tmp_path / name), name).read() == b"one\ntwo\n"
    packed = (tmp_path / name).read_bytes()
    if name.lower().endswith(".gz"):
        assert gzip.decompress(packed) == b"one\ntwo\n"
    elif not name.endswith(".zst"):
        assert packed == b"one\ntwo\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_finished_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyError), sink(str(tmp_path / name), io.BytesIO()) as out:
        out.write(b"one\n")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.csv", "out.tsv.gz", "out.parquet", "out.json", "OUT.CSV"])
def test_a_name_of_another_format_is_refused_before_anything_is_read(name: str, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["BertForSequenceClassification"], "model_type": "bert"}')
    error, where, fix = ftune_inside("predict", model, "input=nowhere.txt", f"output={name}").fails()
    assert "JSON Lines" in error and name in where and ".jsonl.gz" in fix
