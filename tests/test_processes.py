"""Several processes are one run: the gradient, the scores and the answers of one process, and an end in time when one of them is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ran import ROOT, Ran, labelled_rows, one_a_task, write_rows
from safetensors.torch import load_file

from finetune_cli.engine import trial
from finetune_cli.engine.signals import StopFlag
from finetune_cli.errors import Stopped
from finetune_cli.world import Alone, Group, watch
from finetune_cli.world.watch import Watch

Ftune = Callable[..., Ran]
SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "model.dropout=0"]
SHORT = [*SMALL, "device=cpu", "device.precision=fp32", "train.batch_size=8", "train.epochs=4", "train.save_every=2", "train.log_every=1"]
ROWS = ["data.train=train.csv", "data.text=text", "data.label=label"]
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


# -- the mathematics -----------------------------------------------------------------------------
class Dealt(Alone):
    """One of several processes, without the others: it takes its part, and the batch's weights are told to it."""

    def __init__(self, rank: int, size: int, weights: dict[str, float]) -> None:
        super().__init__(Alone)  # type: ignore[arg-type]  # nobody asks it to stop
        self.rank, self.size, self.weights = rank, size, weights

    def check(self) -> None:
        return

    def part(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return Group.part(self, rows, lengths)  # type: ignore[arg-type]

    def totals(self, weights: dict[str, float]) -> dict[str, float]:
        return self.weights or weights


def gradients(trainer: Any, world: Alone) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of this world's part of the third batch, which takes as many passes as the plan says."""
    trainer.world, trainer._totals = world, (-1, {})
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.gradients(world.part(trainer.rows_of(2), trainer.lengths))
    return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", one_a_task())
def test_a_batch_dealt_out_has_the_gradient_of_the_batch(
    name: str, ftune_inside: Ftune, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """For every task: the sum over 2 and over 3 processes, and over small passes, is what one pass gives."""
    compared: list[str] = []

    def compare(trainer: Any) -> None:
        compared.append("interact" if trainer.task.rows_interact else "apart")
        if not trainer.task.rows_interact:
            whole = gradients(trainer, Dealt(0, 1, {}))
            weights, plan = trainer._totals[1], trainer.plan
            widest = int(trainer.lengths[trainer.rows_of(2)].max())
            for size, micro in ((1, widest), (2, plan.micro_tokens), (3, 2 * widest)):
                trainer.plan = type(plan)(**{**plan.saved(), "micro_tokens": micro})
                parts = [gradients(trainer, Dealt(rank, size, weights)) for rank in range(size)]
                torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0], rtol=1e-5, atol=1e-6)
                for key, gradient in whole[1].items():
                    summed = sum(part[key] for _, part in parts if key in part)
                    torch.testing.assert_close(summed, gradient, rtol=2e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
        raise Stopped("seen enough", where="test")

    monkeypatch.setattr("finetune_cli.commands.train.fit", compare)
    small = [*SMALL, "data.max_rows=96", "train.batch_size=16", "device.precision=fp32", f"device={device}"]
    ran = ftune_inside("train", f"+exp={name}", "train.steps=3", *small)
    assert ran.code == 75 and len(compared) == 1, ran.err
    if compared == ["interact"]:
        ran = ftune_inside("train", f"+exp={name}", "train.steps=3", *small, "device.processes=2", "run.dir=two")
        assert "compared with each other" in ran.fails()[0]


# -- one or several on a CPU ---------------------------------------------------------------------
@pytest.mark.parametrize("faster", [True, False])
def test_a_long_run_tries_several_and_keeps_what_is_faster(
    faster: bool, home: Path, ftune_inside: Ftune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trial changes nothing but the plan: the run is to the byte that of so many processes."""
    keys = [f"data.train={home / 'train.csv'}", "data.text=text", "data.label=label", *SHORT, "device.threads=2", "train.steps=2"]
    asked = ftune_inside("train", *keys, f"device.processes={1 + faster}", "run.dir=asked").ok()
    monkeypatch.setattr(trial, "LEAST_UPDATES", 1)
    monkeypatch.setattr(trial, "WORTH", 0.0)
    monkeypatch.setattr(trial, "GAIN", 0.0 if faster else 1e9)
    tried = ftune_inside("train", *keys, "run.dir=tried").ok()
    plans = [json.loads((tmp_path / name / "manifest.json").read_text())["plan"]["device"] for name in ("asked", "tried")]
    assert plans[1]["processes"] == 1 + faster == plans[0]["processes"]
    assert re.search(r"tried: an update takes \S+ s in 2 processes, \S+ s in one", tried.err) and "tried" not in asked.err
    assert plans[1]["reasons"]["processes"] in tried.err
    same = [(tmp_path / name / "checkpoints" / "last" / "model.safetensors").read_bytes() for name in ("asked", "tried")]
    assert same[0] == same[1]


def test_a_short_run_tries_nothing(home: Path, ftune_inside: Ftune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "seconds", None)
    keys = [f"data.train={home / 'train.csv'}", "data.text=text", "data.label=label", *SHORT, "device.threads=2"]
    assert "tried" not in ftune_inside("train", *keys).ok().err


# -- whole runs ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows that are easy to learn."""
    home = tmp_path_factory.mktemp("processes")
    write_rows(home / "train.csv", labelled_rows(60))
    write_rows(home / "test.csv", labelled_rows(21, shift=60))
    return home


def started(forks: Any, home: Path, name: str, *more: str) -> Any:
    return forks.start(
        "train",
        "data.train=train.csv",
        "data.text=text",
        "data.label=label",
        "data.test=test.csv",
        *SHORT,
        f"run.dir={name}",
        *more,
        cwd=home,
        **QUIET,
    )


def ended(process: Any, code: int = 0) -> str:
    """What a command said, once it has ended with ``code``."""
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit {process.returncode}\n{err.decode()}"
    return str(err.decode())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / "model.safetensors")


def alike(one: Path, two: Path) -> None:
    """The same run but for rounding."""
    there = weights(two)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, there[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for ours, theirs in zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5) for key in ours)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def one(home: Path, forks: Any) -> Path:
    """The run of one process."""
    ended(started(forks, home, "one"))
    return home / "one"


@pytest.fixture(scope="module")
def two(home: Path, forks: Any) -> Path:
    """The same of two."""
    assert "processes" in ended(started(forks, home, "two", "device.processes=2"))
    return home / "two"


def test_two_processes_train_the_run_of_one(one: Path, two: Path) -> None:
    alike(one, two)
    plan = json.loads((two / "manifest.json").read_text())["plan"]["device"]
    assert plan["processes"] == 2 and plan["reasons"]["processes"] == "asked for"
    assert lines(two / "eval/test/predictions.jsonl") and (two / "report/index.html").exists()


def test_scores_and_answers_of_two_processes_are_those_of_one(two: Path, ftune_inside: Ftune, home: Path) -> None:
    """No row is counted twice and none is lost; order is kept, from a file and from a pipe."""
    text = "".join(json.dumps({"text": f"row {i} " + "good " * (i % 7)}) + "\n" for i in range(50))
    (home / "asked.jsonl").write_text(text)
    for verb, *more in (("eval",), ("predict", "input=asked.jsonl"), ("predict",)):
        found = [
            ftune_inside(verb, two, *more, f"device.processes={n}", "device=cpu", cwd=home, stdin=text if len(more) == 0 else b"").ok()
            for n in (1, 2)
        ]
        told = [ran.json["test"] if verb == "eval" else ran.lines for ran in found]
        if verb == "eval":
            assert all(told[0][key]["n"] == told[1][key]["n"] for key in told[0])
            assert all(told[0][key]["value"] == pytest.approx(told[1][key]["value"], abs=1e-5) for key in told[0])
        else:
            assert [row["row"] for row in told[1]] == list(range(1, 51))
            for ours, theirs in zip(*told, strict=True):
                assert ours["text"] == theirs["text"] and ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


def steps_done(run: Path, wanted: int) -> None:
    """Wait until so many steps are on record."""
    until = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or len(lines(run / "metrics.jsonl")) < wanted:
        assert time.monotonic() < until, "it does not train"
        time.sleep(0.05)


def follower_of(process: Any) -> int:
    """The process that a run has started for a part of its rows."""
    for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{line}/cmdline").read_bytes():
            return int(line)
    raise AssertionError("there is no second process")


LONG = ["train.epochs=200", "train.save_every=2", "train.eval_every=1000"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_lost_process_ends_the_run_and_the_run_goes_on_with_another_number(home: Path, forks: Any, one: Path) -> None:
    """Exit 5, three lines, within seconds; what is on disk is whole, and one process trains on to the same end."""
    process = started(forks, home, "lost", "device.processes=2", "train.epochs=50")
    steps_done(home / "lost", 4)
    os.kill(follower_of(process), signal.SIGKILL)
    began = time.monotonic()
    err = ended(process, 5)
    assert time.monotonic() - began < 30
    assert "error: process 1 of 2 was lost (signal 9: SIGKILL)" in err and "resume=" in err and "Traceback" not in err
    status = json.loads((home / "lost/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert len(lines(home / "lost/crash/updates.jsonl")) >= 4
    process = started(forks, home, "whole", "train.epochs=50")
    ended(process)
    ended(forks.start("train", "resume=lost", "device.processes=1", cwd=home, **QUIET))
    alike(home / "whole", home / "lost")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_signal_stops_all_at_one_step_and_the_run_goes_on(home: Path, forks: Any) -> None:
    process = started(forks, home, "stopped", "device.processes=2", *LONG)
    steps_done(home / "stopped", 3)
    follower = follower_of(process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in ended(process, 75)
    assert not Path(f"/proc/{follower}").exists()
    status = json.loads((home / "stopped/status.json").read_text())
    assert status["state"] == "preempted" and (home / "stopped/checkpoints/last").resolve().name == f"step-{status['step']:08}"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 5), (signal.SIGINT, 130)])
def test_an_end_while_the_processes_meet(home: Path, number: int, code: int) -> None:
    """A second process that dies while it starts, or Ctrl-C in the terminal, which both processes get: neither waits for the other."""
    command = [sys.executable, "-m", "finetune_cli", "train", *ROWS, *SHORT, "device.processes=2", "run.dir=met"]
    process = subprocess.Popen(command, cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, **QUIET)  # type: ignore[call-overload]
    until, follower = time.monotonic() + 90, None
    while follower is None:
        assert time.monotonic() < until, "no second process"
        with suppress(AssertionError, OSError):
            follower = follower_of(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        os.kill(follower, number)
    _, err = process.communicate(timeout=60)
    told = err.decode()
    assert process.returncode == code and "Traceback" not in told, told
    assert "process 1 of 2 was lost" in told if code == 5 else "interrupted" in told


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_followers_end_with_their_leader(home: Path, forks: Any) -> None:
    process = started(forks, home, "orphan", "device.processes=2", *LONG)
    steps_done(home / "orphan", 2)
    follower = follower_of(process)
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while Path(f"/proc/{follower}").exists():
        assert time.monotonic() < until, "a process works for nobody"
        time.sleep(0.1)


def test_torchrun_trains_the_same(home: Path, two: Path) -> None:
    """The processes may also be started from outside; one path on stdout, and nothing of the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["train", *ROWS, "data.test=test.csv", *SHORT, "run.dir=outside"]
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "finetune_cli", *command],
            cwd=home,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONPATH": str(ROOT),
            },
            **QUIET,  # type: ignore[call-overload]
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=240) for process in others]
    assert [process.returncode for process in others] == [0, 0], told[0][1].decode() + told[1][1].decode()
    assert told[0][0].decode().strip() == str(home / "outside") and not told[1][0]
    assert (home / "outside/metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


def test_a_bug_in_another_process_is_told_with_its_traceback(home: Path, forks: Any) -> None:
    """The module that fails is this test's own; only a follower imports it."""
    (home / "sitecustomize.py").write_text(
        "import multiprocessing, sys\n"
        "if 'spawn_main' in ' '.join(sys.orig_argv):\n"
        "    import finetune_cli.engine.loop as loop\n"
        "    def broken(*args): raise ZeroDivisionError('a bug of the test')\n"
        "    loop.Trainer.step = broken\n"
    )
    try:
        env = {"PYTHONPATH": os.pathsep.join([str(home), str(ROOT)])}
        process = started_with(forks, home, env, "broken", "device.processes=2")
        err = ended(process, 1)
    finally:
        (home / "sitecustomize.py").unlink()
    assert "process 1 of 2 failed" in err
    assert "ZeroDivisionError: a bug of the test" in (home / "broken/error.txt").read_text()


def started_with(forks: Any, home: Path, env: dict[str, str], name: str, *more: str) -> Any:
    return forks.start(
        "train",
        "data.train=train.csv",
        "data.text=text",
        "data.label=label",
        *SHORT,
        f"run.dir={name}",
        *more,
        cwd=home,
        env=env,
        fresh=True,
        **QUIET,
    )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["device.processes=0"], "from 1 to 4096"),
        (["device.processes=many"], "a number of processes, or 'auto'"),
        (["device.processes=9", "train.batch_size=8"], "9 processes for the 8 rows"),
    ],
)
def test_processes_that_cannot_be(keys: list[str], told: str, home: Path, ftune_inside: Ftune) -> None:
    ran = ftune_inside("train", *ROWS, *SMALL, "device=cpu", *keys, "run.dir=none", cwd=home)
    assert told in "\n".join(ran.fails()) and not (home / "none").exists()


# -- the watch -----------------------------------------------------------------------------------
class Board:
    """In place of the store that the processes share."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {"pid/1": "elsewhere 1"}

    def set(self, name: str, value: str) -> None:
        self.notes[name] = value

    def get(self, name: str) -> bytes:
        return self.notes[name].encode()

    def check(self, names: list[str]) -> bool:
        return all(name in self.notes for name in names)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watch, Watch, list[str]]]:
    """The watches of a leader and of its follower on one board, and whom the leader has found lost."""
    board, lost = Board(), []
    leader, follower = Watch(board, rank=0, size=2), Watch(board, rank=1, size=2)
    monkeypatch.setattr(leader, "_end", lambda other, told: lost.append(told))
    monkeypatch.setattr(follower, "_end", lambda other, told: lost.append(f"leader: {told}"))
    yield leader, follower, lost


def test_a_process_that_gives_no_sign_is_lost(watched: tuple[Watch, Watch, list[str]]) -> None:
    leader, _, lost = watched
    for _ in range(watch.SILENT):
        leader.look()
        assert not lost
    leader.look()
    assert "no sign of life" in lost[0]


def test_a_process_that_others_wait_for_in_vain_is_lost(watched: tuple[Watch, Watch, list[str]]) -> None:
    """Within a minute, once it has shown how long its work takes; a slow one gets three times its longest work."""
    leader, follower, lost = watched
    for _ in range(4):
        follower.beat(), follower.look(), leader.look()
    leader.waiting = True
    for _ in range(watch.HUNG - 1):
        follower.look(), leader.look()
    assert not lost
    follower.look(), leader.look()
    assert len(lost) == 1 and "hangs" in lost[0] and watch.HUNG * watch.TICK < 60


def test_a_process_that_works_waits_or_asks_for_patience_is_not_lost(watched: tuple[Watch, Watch, list[str]]) -> None:
    leader, follower, lost = watched
    for state in ("working", "waiting", "patient"):
        leader.waiting = True
        follower.waiting, follower.patient = state == "waiting", state == "patient"
        for tick in range(3 * watch.HUNG):
            if state == "working" and tick % 20 == 0:
                follower.beat()
            follower.look(), leader.look()
    assert not lost


def test_a_signal_during_the_exchange_waits_for_the_next_one() -> None:
    """No other process knows of it yet: it stops nobody now, and is not forgotten."""
    world = object.__new__(Group)
    world.stop = StopFlag()

    def exchanged(note: dict[str, Any]) -> list[dict[str, Any]]:
        world.stop.name = "SIGTERM"  # while the others' notes are awaited
        return [note, {"weights": {"loss": 2.0}, "stop": None}]

    world._notes = exchanged  # type: ignore[method-assign]
    assert world.totals({"loss": 1.0}) == {"loss": 3.0}
    with pytest.raises(Stopped, match="SIGTERM"):
        world.totals({"loss": 1.0})


def test_a_follower_learns_of_its_leaders_signal(watched: tuple[Watch, Watch, list[str]]) -> None:
    leader, follower, _ = watched
    follower.look()
    assert follower.leader_stops is None
    leader.store.set("stop", "SIGTERM")
    follower.look()
    assert follower.leader_stops == "SIGTERM"
