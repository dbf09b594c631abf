"""The fork server of the tests: a fork ends and writes as a new interpreter does, and leaves nothing to the next one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import forked
import pytest
from forked import Forked, Forks, Server
from ran import labelled_rows, write_rows

pytestmark = pytest.mark.skipif(not forked.SAFE, reason="forks are not safe here")
SMALL = ["data.train=rows.csv", "model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.steps=2", "device=cpu"]
PIPES: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
PIPES["text"] = True


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.csv", labelled_rows(48))
    return tmp_path


def both(forks: Forks, *args: str, **options: Any) -> list[subprocess.Popen[bytes]]:
    """The same command in a fork and in a new interpreter."""
    started = [forks.start(*args, fresh=fresh, **options) for fresh in (False, True)]
    assert [type(process) for process in started] == [Forked, subprocess.Popen]
    return started


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["train", "--help"], 0),
        ([*SMALL[:2], "--cfg", "job"], 2),
        (["train", *SMALL, "--cfg", "job"], 0),
        (["train", "data.train=none.csv"], 2),
        (["predict", "nowhere"], 2),
    ],
)
def test_a_fork_ends_and_writes_as_an_interpreter(args: list[str], code: int, forks: Forks, home: Path) -> None:
    ends = []
    for process in both(forks, *args, cwd=home, **PIPES):
        ends.append((*process.communicate("", timeout=60), process.returncode))
    assert ends[0] == ends[1] and ends[0][2] == code and any(ends[0][:2])


@pytest.mark.thorough
def test_a_whole_run_is_the_same_to_the_byte(forks: Forks, home: Path) -> None:
    """Its reload check too, which one of the two makes in a fork of the other server."""
    ends = []
    for name, process in zip(("fork", "true"), both(forks, "train", *SMALL, "run.dir=run", cwd=home, **PIPES), strict=True):
        out, err = process.communicate("", timeout=120)
        assert process.returncode == 0, err
        (home / "run").rename(home / name)
        weights, lines = (home / name / "model/model.safetensors").read_bytes(), (home / name / "metrics.jsonl").read_text()
        ends.append((out, weights, lines))
        assert "plain transformers gives the same logits" in (home / name / "log.txt").read_text()
    assert ends[0] == ends[1]


def test_a_crash_is_the_same(forks: Forks, home: Path) -> None:
    """Help that cannot be written: the machine's fault, here with its traceback."""
    ends = []
    with open("/dev/full", "w") as full:
        for process in both(forks, "train", "--help", cwd=home, env={"HYDRA_FULL_ERROR": "1"}, **{**PIPES, "stdout": full}):
            ends.append((process.communicate("", timeout=60)[1], process.returncode))  # type: ignore[arg-type]
    assert ends[0] == ends[1] and ends[0][1] == 5 and "Traceback" in str(ends[0][0]) and "No space left" in str(ends[0][0])


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 75)])
def test_a_signal_ends_both_alike(name: str, code: int, forks: Forks, home: Path) -> None:
    for process in both(forks, "train", *SMALL, "train.steps=99999", cwd=home, **PIPES):
        assert process.poll() is None and process.stderr is not None
        assert process.stderr.readline() and process.poll() is None
        process.send_signal(getattr(signal, name))
        process.communicate("", timeout=60)  # type: ignore[arg-type]
        assert process.returncode == process.poll() == code


def test_nothing_is_left_to_the_next_fork(forks: Forks, home: Path) -> None:
    """Directory, environment, arguments and Hydra's own globals of one command are unknown to the next."""
    other = home / "other"
    other.mkdir()
    args = ["train", "data.train=rows.csv", "data.label=${oc.env:SEEN,unseen}", "--cfg", "job", "--resolve"]

    def seen(cwd: Path, *more: str, **env: str) -> tuple[str, str]:
        process = forks.start(*args, *more, cwd=cwd, env=env, **PIPES)
        assert isinstance(process, Forked)
        return process.communicate("", timeout=60)  # type: ignore[return-value]

    first = seen(home)
    second = seen(other, "train.epochs=9", SEEN="by the second")
    assert "unseen" in first[0] and "by the second" in second[0] and "epochs: 9" in second[0]
    assert seen(home) == first


def test_what_only_an_interpreter_reads_gets_one(forks: Forks, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONHASHSEED", "OMP_NUM_THREADS", "TRANSFORMERS_CACHE"):
        process = forks.start("--version", env={name: "7"}, cwd=home, **PIPES)
        assert not isinstance(process, Forked) and process.communicate("", timeout=60)[0].startswith("ftune")  # type: ignore[arg-type]
    monkeypatch.setattr(forks, "allowed", False)
    process = forks.start("--version", cwd=home, **PIPES)
    assert not isinstance(process, Forked) and process.wait(60) == 0
    assert forks.reloading() is subprocess


def test_a_reload_check_has_no_ftune(forks: Forks, tmp_path: Path) -> None:
    program = tmp_path / "reload_check.py"
    code = "import sys; print(*[name for name in ('finetune_cli', 'hydra', 'torch', 'transformers') if name in sys.modules])"
    program.write_text(code)
    env = dict(forks.server("reload").settled)  # whatever other tests did to this process's own
    process = forks.reloading().Popen([sys.executable, "-I", str(program)], env=env, **PIPES)
    assert isinstance(process, Forked)
    assert process.communicate("", timeout=60) == ("torch transformers\n", "")
    program.write_text("raise SystemExit('does not load')")
    process = forks.reloading().Popen([sys.executable, "-I", str(program)], env=env, **PIPES)
    assert process.communicate("", timeout=60) == ("", "does not load\n") and process.returncode == 1


def test_a_gone_server_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "here"))
        listener.listen()
        threading.Thread(target=lambda: listener.accept()[0].close()).start()
        with pytest.raises(OSError):
            Forked(Server(str(tmp_path / "here"), {}), ["ftune"], **PIPES)
