"""What reaches the screen and the log: plain lines, no terminal escapes from data, no death by a broken stderr."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_cli import console


@pytest.fixture(autouse=True)
def _no_log() -> object:
    yield
    console.detach()


def test_data_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("a\x1b[2Jb\r\x07\x9b31m\u202ec")
    console.table("t\x1b]0;x\x07", ["x\x1b"], [["\x1b[1mrow\nsecond"]])
    out, err = capsys.readouterr()
    assert out == ""
    assert not [c for c in err if ord(c) < 32 and c != "\n"]
    assert "\x9b" not in err and "\u202e" not in err
    assert "row second" in err or "[1mrow second" in err


def test_a_table_lines_up_wide_characters_and_numbers() -> None:
    lines = console.layout("splits", ["split", "rows"], [["train", 6920], ["测试", 12], ["x", None]]).splitlines()
    assert lines == ["splits", "  split   rows", "  train  6,920", "  测试      12", "  x          -"]
    assert console.cell(0.5) == "0.5000" and console.cell(True) == "True" and console.cell(1234567) == "1,234,567"


def test_progress_speaks_at_once_then_every_few_seconds_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.Progress(100) as bar:
        for step in range(1, 101):
            clock[0] += 0.2
            bar.update(step, epoch=step / 100, loss=0.5 if step == 1 else None, lr=1e-4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/100  epoch 0.01  loss 0.5000  lr 0.0001")
    assert lines[-1].startswith("step 100/100") and "left" not in lines[-1]
    assert len(lines) == 5  # 20 seconds: at once, three times on the way, at the end
    assert "loss 0.5000" in lines[2]


def test_progress_says_where_it_was_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), console.Progress(100, start=10) as bar:
        bar.update(11)
        bar.update(17)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines()[-1].startswith("step 17/100")


def test_a_resumed_run_estimates_from_its_own_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.Progress(100, start=90) as bar:
        clock[0] = 5.0
        bar.update(95)
    assert "left 0:05" in capsys.readouterr().err


def test_the_log_holds_what_was_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    console.attach(log)
    console.say("one 世界")
    console.warn("two")
    console.table("three", ["a"], [[1]])
    with console.working("four"):
        pass
    console.detach()
    console.say("not logged")
    assert log.read_text(encoding="utf-8").splitlines() == ["one 世界", "warning: two", "three", "  a", "  1", "four …"]
    assert "not logged" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_missing_or_closed_stderr_is_ignored(stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is raised, and the log goes on."""
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    console.attach(tmp_path / "log.txt")
    console.say("x")
    with console.Progress(2) as bar:
        bar.update(1)
    console.say("y")
    console.detach()
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines() == ["x", "step 1/2  left 0:00", "y"]


def _child(code: str, stderr: int) -> subprocess.CompletedProcess[bytes]:
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1", "TERM": "xterm", "COLUMNS": "120"}
    return subprocess.run([sys.executable, "-c", code], stderr=stderr, stdout=subprocess.PIPE, env=env, timeout=60, check=False)


def test_a_broken_pipe_does_not_end_a_run() -> None:
    read, write = os.pipe()
    os.close(read)
    done = _child("from finetune_cli import console\nfor i in range(9): console.say('x' * 9999)\nprint('alive', flush=True)", write)
    os.close(write)
    assert done.stdout == b"alive\n"


def test_rich_is_imported_only_on_a_terminal() -> None:
    code = "import sys\nfrom finetune_cli import console\nconsole.say('x')\nconsole.table('t', ['a'], [[1]])\nprint('rich' in sys.modules)"
    assert _child(code, subprocess.DEVNULL).stdout == b"False\n"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_terminal_gets_a_live_bar_and_stdout_stays_clean() -> None:
    master, slave = os.openpty()
    code = (
        "from finetune_cli import console\nfrom contextlib import ExitStack\n"
        "with console.Progress(4) as bar:\n"
        "    for i in range(1, 5):\n        bar.update(i, loss=0.25)\n"
        "        with console.working('scoring'): console.say('[bold]said\\x1b[2J')\n"
        "print('result')"
    )
    done = _child(code, slave)
    os.close(slave)
    seen = b""
    while chunk := _read(master):
        seen += chunk
    os.close(master)
    assert done.returncode == 0 and done.stdout == b"result\n"
    assert b"4/4" in seen and b"loss 0.2500" in seen and b"[bold]said[2J" in seen


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end of a pseudo-terminal is closed
        return b""


HEADERS = ["split", "rows", "labels", "tokens", "unknown tokens", "leaked"]
ROWS = [
    ["train", "1,476", "negative 492, neutral 492", "37,656", "0.0%", "-"],
    ["test", "432", "negative 144, neutral 144", "11,813", "0.0%", "0"],
]


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("count", [2, 20])
def test_a_table_on_a_narrow_terminal_cuts_no_value(width: int, count: int) -> None:
    rows = [ROWS[i % 2] for i in range(count)]
    lines = console.narrow(HEADERS, rows, width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for value in [*HEADERS, *(value for row in rows for value in row)]:
        assert all(word in words for word in value.split()), value


def test_a_table_without_header_keeps_paths_whole() -> None:
    path = "/a/path/longer/than/the/terminal/is/wide"
    lines = console.narrow(["", ""], [["run", path], ["batch", "16 rows an update, at most 768 tokens"]], 36)
    assert any(line.endswith(path) for line in lines)
    assert lines[-2:] == ["  batch  16 rows an update, at most", "         768 tokens"]


def test_a_reading_says_which_step_it_is_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.Progress(188) as bar:
        bar.update(93, 1.0, loss=0.5)
        clock[0] = 9.0
        bar.update(98, 98 / 93)
        bar.update(188, 2.02, loss=0.4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 93/188  epoch 1.00  loss 0.5000")
    assert lines[1].startswith("step 98/188  epoch 1.05  (step 93: loss 0.5000)")
    assert lines[2] == "step 188/188  epoch 2.02  loss 0.4000"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
@pytest.mark.parametrize("columns", [80, 160])
def test_a_terminal_of_any_width_shows_whole_words(columns: int) -> None:
    master, slave = os.openpty()
    code = (
        f"import os\nos.environ['COLUMNS'] = '{columns}'\nfrom finetune_cli import console\nconsole.say('stratified by label ' * 9)\n"
        "with console.Progress(186) as bar:\n    bar.update(7, 0.1, 1.05, 2e-4, 261, 6718, 700)\n"
    )
    _child(code, slave)
    os.close(slave)
    seen = b""
    while chunk := _read(master):
        seen += chunk
    os.close(master)
    text = seen.decode().replace("\r", "")
    assert text.count("stratified by label") + text.count("stratified\nby label") + text.count("stratified by\nlabel") == 9
    assert "…" not in text and "loss 1.0500" in text and ("700 MB" in text.split("step 7")[0]) == (columns == 160)
