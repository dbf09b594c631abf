"""Where predictions go: the form by the name, whole or absent."""

from __future__ import annotations

import gzip
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from ran import Ran

from finetune_cli.commands.predict import sink
from finetune_cli.data.encoding import open_bytes
from finetune_cli.errors import UserError


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL.GZ", "a.jsonl.zst", "a.out", "a"])
def test_answers_are_packed_as_the_name_says(name: str, tmp_path: Path) -> None:
    with sink(str(tmp_path / name)) as out:
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
    with pytest.raises(KeyError), sink(str(tmp_path / name)) as out:
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process to kill here")
def test_what_a_killed_prediction_left_is_gone_with_the_next(tmp_path: Path) -> None:
    place, other = tmp_path / "a[1].jsonl", tmp_path / ".b.jsonl.unfinished-elsewhere-1"
    other.write_bytes(b"of another file")
    if not (pid := os.fork()):
        with sink(str(place)) as out:
            out.write(b"one\n")
            out.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (left,) = tmp_path.glob(".a*")
    alive = left.with_name(left.name.replace(str(pid), str(os.getppid())))
    alive.write_bytes(b"of a prediction that goes on")
    written(place)
    assert sorted(tmp_path.iterdir()) == sorted([alive, other, place])


# not replaced ----------------------------------------------------------------------------------------------------------------


def written(place: Path) -> None:
    """Two windows into a place, as predict writes them."""
    with sink(str(place)) as out:
        for window in (b"one\n", b"two\n"):
            out.write(window)
            out.flush()


def test_a_link_stays_a_link_and_its_target_gets_the_answers(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name, before in (("there.jsonl", b"old"), ("absent.jsonl", None)):
        link = tmp_path / name
        link.symlink_to(folder / name)
        if before is not None:
            (folder / name).write_bytes(before)
        written(link)
        assert link.is_symlink() and (folder / name).read_bytes() == b"one\ntwo\n"
    assert sorted(p.name for p in folder.iterdir()) == ["absent.jsonl", "there.jsonl"]


def test_a_pipe_is_written_through_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    handle = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # a reader is there
    written(pipe)
    read = os.read(handle, 100)
    os.close(handle)
    assert read == b"one\ntwo\n" and pipe.is_fifo()


def test_a_pipe_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="nobody reads"):
        written(tmp_path / "pipe")


def test_a_reader_that_leaves_is_no_error_of_the_machine(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    handle = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BrokenPipeError), sink(str(tmp_path / "pipe")) as out:
        os.close(handle)
        out.write(b"one\n")
        out.flush()


def test_a_device_is_written_through(tmp_path: Path) -> None:
    """A terminal: nothing is lost where the test fails, because its folder can hold no other file."""
    ours, terminal = os.openpty()
    written(Path(os.ttyname(terminal)))
    read = b""
    while read.count(b"\n") < 2:  # The kernel hands a terminal's lines over in its own time.
        read += os.read(ours, 100)
    assert read.replace(b"\r\n", b"\n") == b"one\ntwo\n"
    os.close(ours)
    os.close(terminal)


def test_an_open_handle_is_appended_to(tmp_path: Path) -> None:
    """``output=/dev/stdout`` of a command whose output goes into a file: what stands there stays."""
    with open(tmp_path / "all.txt", "wb", buffering=0) as file:
        file.write(b"zero\n")
        written(Path(f"/dev/fd/{file.fileno()}"))
    assert (tmp_path / "all.txt").read_bytes() == b"zero\none\ntwo\n"
