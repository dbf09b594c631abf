"""Killed from outside at any moment and resumed from the command line: the same weights, the same metrics.jsonl."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from ran import ROOT, Ran, labelled_rows, write_rows

from finetune_cli.engine import finish
from finetune_cli.engine.signals import StopFlag, stoppable
from finetune_cli.errors import Interrupted, Stopped

OPTIONS = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.epochs=3", "train.batch_size=8", "train.save_every=2"]
OPTIONS += ["train.eval_every=3", "train.log_every=1", "device.threads=1", "device=cpu"]


def digest(run: Path) -> str:
    found = hashlib.sha256((run / "metrics.jsonl").read_bytes())
    for name in ("model/model.safetensors", "checkpoints/last/model.safetensors", "checkpoints/last/state.safetensors"):
        found.update((run / name).read_bytes())
    return found.hexdigest()


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def start(forks: Forks) -> Start:
    """``start(folder, "key=value", …)``: a train that has begun in that folder."""
    return lambda home, *args: forks.start("train", *args, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until the run has recorded ``step``, or ended."""
    for _ in range(1200):
        try:
            lines = (run / "metrics.jsonl").read_text().splitlines()
        except OSError:
            lines = []
        if any(json.loads(line)["step"] >= step for line in lines) or process.poll() is not None:
            return
        time.sleep(0.02)
    pytest.fail("the run does not start")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, start: Start) -> tuple[list[str], str, Path]:
    """(the keys of a run, its digest, its directory): never interrupted."""
    home, keys = tmp_path_factory.mktemp("reference"), list(OPTIONS)
    for shift, name in ((0, "train"), (80, "validation"), (96, "test")):
        path = write_rows(home / "data" / f"{name}.csv", labelled_rows(80 if name == "train" else 16, shift=shift))
        keys.append(f"data.{name}={path}")
    process = start(home, *keys, "run.dir=whole")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    run = Path(out.decode().strip())
    return keys, digest(run), run


@pytest.mark.parametrize(("name", "code", "state"), [("SIGTERM", 75, "preempted"), ("SIGINT", 130, "stopped")])
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    name: str,
    code: int,
    state: str,
    reference: tuple[list[str], str, Path],
    start: Start,
    ftune: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    keys, expected, _ = reference
    run = tmp_path / "stopped"
    process = start(tmp_path, *keys, f"run.dir={run}")
    wait_for_step(run, 7, process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err.decode()
    assert out.decode() == f"{run}\n" and b"Traceback" not in err
    assert json.loads((run / "status.json").read_text())["state"] == state
    resumed = ftune("train", f"resume={run}", fresh=name == "SIGTERM").ok()  # an interpreter with other hashes, too
    assert resumed.run == run and "resuming from step" in resumed.err
    assert digest(run) == expected


@pytest.mark.parametrize(("name", "code", "part"), [("SIGTERM", 75, "_baselines"), ("SIGINT", 130, "_report"), ("SIGINT", 130, "_card")])
def test_a_signal_after_training_is_obeyed_and_the_report_made_by_resume(
    name: str,
    code: int,
    part: str,
    reference: tuple[list[str], str, Path],
    ftune_inside: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys, expected, whole = reference
    run = tmp_path / "my run"
    real = getattr(finish, part)

    def signalled(*args: Any) -> Any:
        os.kill(os.getpid(), getattr(signal, name))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finish, part, signalled)
        stopped = ftune_inside("train", *keys, f"run.dir={run}")
    assert stopped.code == code and stopped.out == f"{run}\n"
    assert f"{name}: stopping" in stopped.err and "second one stops at once" in stopped.err
    assert f"fix: go on with: ftune train 'resume={run}'" in stopped.err and "its report is not" in stopped.err
    assert json.loads((run / "status.json").read_text())["exit_code"] == code
    resumed = ftune_inside("train", f"resume={run}").ok()
    assert digest(run) == expected and (run / "report/index.html").is_file() and "step 30/30" not in resumed.err
    assert (run / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    assert not [path.name for path in run.rglob(".tmp-*")]


@pytest.mark.parametrize(
    ("signals", "trained", "code"),
    [("SIGINT SIGINT", False, 130), ("SIGTERM SIGTERM", True, 75), ("SIGTERM SIGINT", True, 130), ("SIGTERM SIGTERM", False, 3)],
)
def test_a_second_signal_stops_at_once(signals: str, trained: bool, code: int) -> None:
    """But while training is not saved, only a second Ctrl-C does."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom finetune_cli.engine.signals import stoppable\n"
        f"with stoppable() as stop:\n    stop.began(Path('/a b'))\n    {'stop.trained()' if trained else 'pass'}\n"
        f"    for name in {signals.split()}: os.kill(os.getpid(), getattr(signal, name))\n    sys.exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == code
    assert done.stdout == (b"" if code == 3 else b"/a b\n") and done.stderr.count(b"\n") == (1 if code == 3 else 2)


def test_a_signal_in_the_middle_of_a_line_still_stops(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def reentered(_: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr("finetune_cli.console.say", reentered)
    with stoppable() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.check()
    assert "SIGTERM: stopping" in capfd.readouterr().err


def test_what_to_do_after_a_stop() -> None:
    """Where there is no run to go on with, the same command again."""
    flag = StopFlag()
    flag.name = "SIGINT"
    with pytest.raises(Interrupted) as caught:
        flag.check()
    assert caught.value.fix == "run the same command again"
    flag.began(Path("/runs/a"))
    with pytest.raises(Interrupted) as caught:
        flag.check()
    assert caught.value.fix == "go on with: ftune train resume=/runs/a"


def test_killed_again_and_again_it_still_ends_the_same(reference: tuple[list[str], str, Path], start: Start, tmp_path: Path) -> None:
    keys, expected, _ = reference
    run, draw = tmp_path / "killed", random.Random(3)
    for _ in range(4):
        process = start(tmp_path, *keys, f"run.dir={run}", "resume=auto")
        wait_for_step(run, draw.randrange(1, 28), process)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
    process = start(tmp_path, *keys, f"run.dir={run}", "resume=auto")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    assert out.decode() == f"{run}\n"
    assert digest(run) == expected


def test_a_finished_run_has_nothing_to_do(reference: tuple[list[str], str, Path], ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    run = reference[2]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("log.txt", ".lock")}
    again = ftune_inside("train", f"resume={run}").ok()
    assert again.run == run and "nothing to do" in again.err
    assert before == {p: p.read_bytes() for p in before}
    told = ftune_inside("train", f"resume={run}", "train.epochs=9", "resume_allow=[train.epochs]").fails()
    assert "finished" in told[0] and "model.path=" in told[-1]


def test_changed_keys_and_data_are_refused_by_name(
    start: Start, ftune: Callable[..., Ran], corpus: Callable[..., Any], tmp_path: Path
) -> None:
    files = corpus(train=80)
    keys = [*files.keys, *OPTIONS]
    run = tmp_path / "changed"
    process = start(tmp_path, *keys, f"run.dir={run}")
    wait_for_step(run, 4, process)
    process.terminate()
    process.communicate(timeout=60)
    before = (run / "status.json").read_bytes()
    refused = ftune("train", f"resume={run}", "optimizer.lr=1e-2")
    told = refused.fails()
    assert refused.out == "" and (run / "status.json").read_bytes() == before
    assert "optimizer.lr" in told[0] and "resume_allow=[optimizer.lr]" in told[-1]
    for key, allowed in (
        ("model.dropout=0.3", "model.dropout"),
        ("train.batch_size=4", "train.batch_size"),
        ("train.monitor=loss", "train.monitor"),
    ):
        told = ftune("train", f"resume={run}", key, f"resume_allow=[{allowed}]").fails()
        assert (
            "another experiment" in told[0]
            and told[1] == f"where: {allowed}"
            and "start a new run from its weights: ftune train model.path=/" in told[2]
        )
    told = ftune("train", f"resume={run}", "task=token-classification").fails()
    assert "the run trains text-classification" in told[0]
    told = ftune("train", f"resume={run}", "train.epochs=0.1", "resume_allow=[train.epochs]").fails()
    assert "the run is at step" in told[0]
    files.train.write_text(files.train.read_text().replace("lovely", "loveable"))
    told = ftune("train", f"resume={run}").fails()
    assert "sha256" in told[0] and "data.train" in told[1]
    assert ftune("train", f"resume={run}", "resume_allow=[data.train,optimizer.lr]", "optimizer.lr=1e-2").code == 0
    told_there = (run / "report" / "report.md").read_text()  # beside the config that the run began with
    assert re.search(r"gone on with.*optimizer\.lr was .*, is 0\.01", told_there)
