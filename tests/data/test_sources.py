"""What a data option may name, and what it may not."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import Caution, read
from finetune_cli.data.sources import File, Hub, resolve

ROWS = "text,label\na,1\n"


@pytest.mark.parametrize("name", ["a b.csv", "a=b,c.csv", "größe.csv", "[x].csv", "it's.csv", "{y}(z).csv", "文.csv", "#h;.csv", "*.csv"])
def test_awkward_names(write: Any, name: str) -> None:
    assert len(read(write(name, ROWS), DataConfig())) == 1


def test_home(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a.csv", ROWS)
    assert len(read("~/a.csv", DataConfig())) == 1


def test_globs_directories_and_lists(write: Any, refused: Any) -> None:
    for name in ("d/b.csv", "d/a.csv", "d/.hidden.csv", "d/_SUCCESS", "d/deep/c.csv"):
        write(name, ROWS)
    assert read("d", DataConfig()).files == ("d/a.csv", "d/b.csv")
    assert read("d/*.csv", DataConfig()).files == ("d/a.csv", "d/b.csv")
    assert read("d/**/*.csv", DataConfig()).files == ("d/a.csv", "d/b.csv", "d/deep/c.csv")
    assert read(["d/b.csv", "d/a.csv"], DataConfig()).files == ("d/b.csv", "d/a.csv")
    assert "nothing matches" in refused(read, "d/*.tsv", DataConfig()).what
    assert "twice" in refused(read, ["d/a.csv", "d"], DataConfig()).what
    assert "empty list" in refused(read, [], DataConfig()).what


def test_what_a_directory_holds_and_is_not_read_is_told(write: Any) -> None:
    for name in ("d/a.csv", "d/sub/b.csv", "d/.git/c.csv", "d/_b.csv", "d/c.xlsx", "d/readme.md", "d/dataset_info.json"):
        write(name, ROWS)
    notes: list[str] = []
    assert [place.name for place in resolve("d", notes=notes)] == ["d/a.csv"]
    assert notes == ["d: 1 folder is not entered (sub); d/**/*.csv reads it", "d: 2 files are not read (_b.csv; c.xlsx)"]
    assert all(isinstance(note, Caution) for note in notes)
    assert [place.name for place in resolve("d/**/*.csv")] == ["d/_b.csv", "d/a.csv", "d/sub/b.csv"]


def test_a_directory_of_splits_gives_the_one_asked_for(write: Any, refused: Any) -> None:
    for name in ("train.csv", "dev.csv", "test-00.csv", "test-01.csv"):
        write(f"d/{name}", ROWS)
    notes: list[str] = []
    assert [p.name for p in resolve("d", split="test", notes=notes)] == ["d/test-00.csv", "d/test-01.csv"]
    assert [p.name for p in resolve("d", split="validation")] == ["d/dev.csv"]
    assert "only" in notes[0]
    os.remove("d/dev.csv")
    assert "no file named for validation" in refused(resolve, "d", split="validation", key="data.validation").what


def test_a_directory_of_several_formats_is_refused(write: Any, refused: Any) -> None:
    write("d/a.csv", ROWS)
    write("d/readme.txt", "read me")
    error = refused(read, "d", DataConfig())
    assert ".csv, .txt" in error.what and "d/*.csv" in error.fix
    write("e/x.bin", "")
    assert "no data file" in refused(read, "e", DataConfig()).what


def test_missing_files_name_what_is_near(write: Any, refused: Any, tmp_path: Path) -> None:
    write("train.csv", ROWS)
    for name in ("trian.csv", "./trian.csv", "~nobody/x.csv", "other/train.csv", "nowhere.jsonl.gz"):
        assert "no such file" in refused(read, name, DataConfig()).what
    error = refused(read, "trian.csv", DataConfig(), key="data.test")
    assert "train.csv" in error.fix and str(tmp_path) in error.where and "data.test" in error.where


def test_what_cannot_be_read_twice_is_refused(write: Any, refused: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    write("a.csv", ROWS)
    assert "a pipe" in refused(read, "pipe.csv", DataConfig()).what
    assert "a device" in refused(read, "/dev/null", DataConfig()).what
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.csv")
        assert "a socket" in refused(read, "s.csv", DataConfig()).what


def test_links(write: Any, refused: Any) -> None:
    write("a.csv", ROWS)
    os.symlink("a.csv", "good.csv")
    os.symlink("gone.csv", "broken.csv")
    assert len(read("good.csv", DataConfig())) == 1
    assert "link to gone.csv" in refused(read, "broken.csv", DataConfig()).what


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights(write: Any, refused: Any) -> None:
    os.chmod(write("a.csv", ROWS), 0)
    assert "cannot be read" in refused(read, "a.csv", DataConfig()).what


@pytest.mark.parametrize("address", ["https://x.org/a.csv", "s3://bucket/a.csv", "hdfs://x/a.csv"])
def test_addresses_are_refused(write: Any, refused: Any, address: str) -> None:
    assert "download" in refused(read, address, DataConfig()).fix


@pytest.mark.parametrize("address", ["file:///etc/passwd", "file://localhost/etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd"])
def test_the_address_of_a_file_is_told_its_path(refused: Any, address: str) -> None:
    assert refused(read, address, DataConfig()).fix == "data.train=/etc/passwd"


@pytest.mark.parametrize("word", ["true", "No", "null", "nan", "-.inf", "-", "12", "1e5"])
def test_words_that_are_values_are_no_data_sets(refused: Any, word: str) -> None:
    assert "no name of a data set" in refused(read, word, DataConfig()).what


@pytest.mark.parametrize("value", [3, True, {"a": 1}, " ", ""])
def test_values_that_name_nothing(write: Any, refused: Any, value: Any) -> None:
    assert refused(read, value, DataConfig()).where == "data.train"


def test_hub_names(write: Any, refused: Any, tmp_path: Path) -> None:
    assert resolve("org/set", split="validation") == [Hub("org/set", None, "validation")]
    assert resolve("hub:a.csv") == [Hub("a.csv", None, "train")]
    assert resolve("glue:sst2:dev") == [Hub("glue", "sst2", "dev")]
    assert resolve("imdb:test", split="train") == [Hub("imdb", None, "test")]
    error = refused(read, "org/set", DataConfig(), offline=True)
    assert "network" in error.what
    (tmp_path / "org").mkdir()
    assert "no such file" in refused(read, "org/set", DataConfig()).what, "a folder of that name is here: it was a path"


def test_the_format_of_a_file_that_its_name_does_not_tell(write: Any, refused: Any) -> None:
    assert len(read(write("a.train", "a\t1\nb\t0\n"), DataConfig(header=False))) == 2
    assert len(read(write("b.train", '{"text": "a"}\n'), DataConfig())) == 1
    assert len(read(write("c.train", '[{"text": "a"}]'), DataConfig())) == 1
    assert "data.format" in refused(read, write("d.train", "some text\n"), DataConfig()).fix


def test_shipped_corpora(write: Any, refused: Any) -> None:
    from finetune_cli import corpora

    name = corpora.names()[0].partition("/")[0]
    own, short = resolve(f"corpus:{name}/train.jsonl")[0], resolve(name, split="train")[0]
    assert isinstance(own, File) and own == short and own.name == f"corpus:{name}/train.jsonl"
    assert resolve(f"corpus:{name}", split="validation")[0].name.endswith("validation.jsonl")
    for bad in ("corpus:nothing/x.jsonl", f"corpus:{name}/../../errors.py", "corpus:/etc/passwd"):
        refused(resolve, bad)


def test_brackets_of_a_folder_that_exists_are_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "d" / "sp ace=ü,x [1]"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("text\na\n")
    (tmp_path / "d" / "sp ace=ü,x 1").mkdir()
    assert [p.name for p in resolve("d/sp ace=ü,x [1]/*.csv")] == ["d/sp ace=ü,x [1]/a.csv"]
    assert [p.name for p in resolve("d/sp*/*.csv")] == ["d/sp ace=ü,x [1]/a.csv"]
