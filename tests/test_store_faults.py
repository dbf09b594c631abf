"""A small run is killed, starved and cut off from power at every single file-system call; it must go on as if nothing had been.

``train`` below is a training run in miniature: it records, saves, exports and finishes through ``Run`` and ``Store`` as the real one does.
Three enemies replace the file system: one kills the process before or inside a call, one raises from a call on, one records all calls so
that every disk state which a power loss may leave can be built.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import Call, Recorder, crash_states, lay_out
from enemies import Enemy, Failing, Killer, Quick

from finetune_cli.config.schema import RunConfig
from finetune_cli.errors import FtuneError, MachineError
from finetune_cli.run import Run
from finetune_cli.storage import REAL, FileSystem, Store

STEPS, EVERY, BEST = 6, 2, 4


def weights(step: int) -> bytes:
    return bytes([step]) * 3000


def train(path: Path, fs: FileSystem, acknowledge: Callable[[int], None] = lambda step: None) -> None:
    """Starts the run at ``path`` or goes on with it."""
    run = Run.open(path, fs=fs, keep=0) if Run.exists(path) else Run.create(RunConfig(dir=str(path)), name="mini", fs=fs)
    try:
        run.lock()
        if not Run.exists(path):
            run.write_manifest({"seed": 1})
            run.write_config("train: {}\n")
        assert run.manifest() == {"seed": 1}
        newest, bad = run.store.newest()
        assert not bad
        meta = run.store.read_manifest(newest)["meta"] if newest else {"step": 0, "metrics": 0}
        run.cut_metrics(meta["metrics"])
        run.reserve(1000)
        for step in range(meta["step"] + 1, STEPS + 1):
            run.record(step, {"train/loss": 1 / step})
            run.set_status("running", step=step)
            if step % EVERY == 0:
                files: dict[str, Any] = {"model.bin": lambda handle, step=step: handle.write(weights(step)), "state.json": b"%d" % step}
                run.store.save(step, files, best=step == BEST, meta={"step": step, "metrics": run.metrics_bytes()})
                acknowledge(step)
        best = run.store.best()
        assert best is not None
        run.write_model({"model.bin": best / "model.bin", "README.md": b"card"})
        (run.evaluation_dir("test", own=True) / "metrics.json").write_bytes(b"{}")
        run.write_metrics({"test": {"accuracy": 1.0}})
        run.set_status("done", step=STEPS, code=0)
        acknowledge(STEPS + 1)
    finally:
        run.close()


def content(path: Path) -> dict[str, bytes | str]:
    """All that a run holds, but for the clock's."""
    found: dict[str, bytes | str] = {}
    for entry in sorted(path.rglob("*")):
        if entry.is_symlink():
            found[str(entry.relative_to(path))] = os.readlink(entry)
        elif entry.is_file() and entry.name not in (".lock", "status.json"):
            found[str(entry.relative_to(path))] = entry.read_bytes()
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes | str], int]:
    """(what an undisturbed run leaves, how many calls it makes)."""
    path, fs = tmp_path_factory.mktemp("reference") / "run", Enemy()
    train(path, fs)
    found = content(path)
    assert found["checkpoints/best"] == f"step-{BEST:08d}" and found["checkpoints/last"] == f"step-{STEPS:08d}"
    assert len(found["metrics.jsonl"].splitlines()) == STEPS  # type: ignore[union-attr]
    return found, fs.count


# -- kill ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_a_kill_at_any_call_changes_nothing(
    tmp_path: Path, reference: tuple[dict[str, bytes | str], int], inside: bool, request: pytest.FixtureRequest
) -> None:
    """At every one with --thorough; else the places before and inside take turns."""
    expected, calls = reference
    assert calls > 80
    places = range(1, calls + 1) if request.config.getoption("--thorough") else range(1 + inside, calls + 1, 2)
    for at in places:
        path = tmp_path / str(at)
        acknowledged = _killed(lambda say, path=path, at=at: train(path, Killer(at, inside), say))
        before = Store(path / "checkpoints", REAL).newest()[0]
        assert acknowledged <= STEPS, f"call {at} was not reached"
        assert (int(before.name[5:]) if before else 0) >= acknowledged, f"call {at}: a checkpoint was lost"
        train(path, Quick())
        assert content(path) == expected, f"call {at}"
        shutil.rmtree(path)


def _killed(body: Callable[[Callable[[int], None]], None]) -> int:
    """The last number that ``body`` acknowledged in a forked child before it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            body(lambda step: os.write(writer, bytes([step])) and None)
        finally:
            os._exit(9)
    os.close(writer)
    said = os.read(reader, 100)
    while more := os.read(reader, 100):
        said += more
    os.close(reader)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the child ended with {status} after {list(said)}"
    return said[-1] if said else 0


# -- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("code", "times"), [(errno.ENOSPC, 10**6), (errno.EROFS, 10**6), (errno.EIO, 1), (errno.EIO, 10**6)])
def test_an_error_at_any_call_is_told_and_loses_nothing(
    tmp_path: Path, reference: tuple[dict[str, bytes | str], int], code: int, times: int
) -> None:
    expected, calls = reference
    told = 0
    for at in range(1, calls + 1):
        path, said = tmp_path / str(at), [0]
        try:
            train(path, Failing(at, code, times), said.append)
        except FtuneError as error:
            told += 1
            assert isinstance(error, MachineError) or not (path / "config.yaml").exists(), error.lines()
            assert errno.errorcode[code] in error.what
            assert len(error.lines()) == 3
        newest, bad = Store(path / "checkpoints", REAL).newest()
        assert not bad
        assert (int(newest.name[5:]) if newest else 0) >= min(said[-1], STEPS), f"call {at}: a checkpoint was lost"
        train(path, Quick())
        assert content(path) == expected, f"call {at}"
        shutil.rmtree(path)
    assert told > (20 if times == 1 else calls - 10)


def test_a_passing_fault_is_retried(tmp_path: Path) -> None:
    for at in range(1, 20):
        store = Store(tmp_path / f"checkpoints-{at}", Failing(at, errno.EIO, 2))
        saved = store.save(1, {"model.bin": weights(1)}, best=True, meta={})
        assert store.verify(saved) is None


def test_a_full_disk_names_what_is_needed_and_the_last_good_step(tmp_path: Path) -> None:
    class Full(Quick):
        room = 10**9

        def free(self, path: Path) -> int:
            return self.room

    fs = Full()
    store = Store(tmp_path / "checkpoints", fs)
    store.save(300, {"model.bin": weights(3)}, best=True, meta={})
    fs.room = 2000
    with pytest.raises(MachineError) as caught:
        store.save(400, {"model.bin": lambda handle: handle.write(weights(4)) and None}, best=True, meta={})
    text = " ".join(caught.value.lines())
    assert "step 400" in text and "ENOSPC" in text and "needs 3.3 kB" in text and "2.0 kB free" in text and "step-00000300" in text
    assert store.steps() == ["step-00000300"] and not list((tmp_path / "checkpoints").glob(".tmp*"))
    with pytest.raises(MachineError, match="will not suffice"):
        store.preflight(1000)
    fs.room = 3301
    store.preflight(1000)


# -- power loss ----------------------------------------------------------------------------------------------------------------------


def recorded(path: Path) -> list[Call]:
    """The calls of eight saves with their records in between; with an ``acknowledge`` after each save."""
    path.mkdir()
    fs = Recorder(path)
    run = Run(path, fs=fs, keep=1)
    for step in range(1, 9):
        run.record(step, {"loss": 1 / step})
        meta = {"metrics": run.metrics_bytes()}
        run.store.save(step, {"model.bin": weights(step)}, best=step == 2, meta=meta)
        fs.calls.append(("acknowledge", step))
    return fs.calls


def losses(tmp_path: Path, skip: Callable[[str, str], bool], *, enough: int = 10**9) -> tuple[int, int]:
    """(crash states seen, those in which an acknowledged checkpoint or its records are lost); ``skip`` leaves out calls."""
    calls = [call for call in recorded(tmp_path / "run") if call[0] == "acknowledge" or not skip(call[0], "/".join(call[1]))]
    records = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    states = lost = 0
    for _, acknowledged, state in crash_states(calls):
        path = tmp_path / "after"
        lay_out(path, state)
        states += 1
        lost += not _recovers(Run(path, fs=Quick()), acknowledged, records)
        shutil.rmtree(path)
        if lost >= enough:
            break
    return states, lost


def _recovers(run: Run, acknowledged: int, records: bytes) -> bool:
    """Whether the acknowledged state is there; a state that is taken for good must be right, and going on must work."""
    run.store.sweep()
    newest, _ = run.store.newest()
    step = int(newest.name[5:]) if newest else 0
    if newest:
        assert (newest / "model.bin").read_bytes() == weights(step), "a corrupt checkpoint was taken for good"
        offset = run.store.read_manifest(newest)["meta"]["metrics"]
        path = run.path / "metrics.jsonl"
        if not path.exists() or path.read_bytes()[:offset] != records[:offset]:
            return False
    if acknowledged >= 2 and (run.store.best() is None or run.store.verify(run.store.best()) is not None):  # type: ignore[arg-type]
        return False
    saved = run.store.save(step + 1, {"model.bin": b"next"}, best=False, meta={})
    assert run.store.newest()[0] == saved
    return step >= acknowledged


def test_a_power_loss_loses_nothing_acknowledged(tmp_path: Path) -> None:
    states, lost = losses(tmp_path, lambda name, path: False)
    assert states > 150 and lost == 0


CARELESS: dict[str, Callable[[str, str], bool]] = {
    "data files": lambda name, path: name == "fsync" and path.endswith("/model.bin"),
    "manifest": lambda name, path: name == "fsync" and path.endswith("/manifest.json"),
    "records": lambda name, path: name == "fsync" and path == "metrics.jsonl",
    "names in the new checkpoint": lambda name, path: name == "fsync_dir" and path.startswith("checkpoints/.tmp-"),
    "names of checkpoints": lambda name, path: name == "fsync_dir" and path == "checkpoints",
    "names in the run": lambda name, path: name == "fsync_dir" and path == "",
}


@pytest.mark.parametrize("left_out", CARELESS)
def test_each_sync_carries_weight(tmp_path: Path, left_out: str) -> None:
    assert losses(tmp_path, CARELESS[left_out], enough=1)[1] == 1


# -- damage --------------------------------------------------------------------------------------------------------------------------


def test_every_random_damage_is_detected(tmp_path: Path) -> None:
    store, draw = Store(tmp_path / "checkpoints", Quick()), random.Random(3)
    files = {"model.bin": draw.randbytes(5000), "state.json": json.dumps(list(range(300))).encode(), "empty": b""}
    good = store.save(1, files, best=True, meta={"metric": 0.5, "text": "größe"})
    whole = {entry.name: entry.read_bytes() for entry in good.iterdir()}
    for trial in range(600):
        name = draw.choice([*whole, "manifest.json"])
        (good / name).write_bytes(damaged(whole[name], draw))
        fault = store.verify(good)
        assert fault and "\n" not in fault, f"trial {trial}: damage of {name} passed"
        assert store.newest()[0] is None
        (good / name).write_bytes(whole[name])
    assert store.verify(good) is None


def damaged(data: bytes, draw: random.Random) -> bytes:
    while True:
        at, out = draw.randrange(len(data) + 1), io.BytesIO(data)
        kind = draw.choice(["flip", "truncate", "zero", "append"])
        if kind == "truncate":
            out.truncate(at)
        elif kind == "append":
            out.seek(0, os.SEEK_END)
            out.write(draw.randbytes(draw.randint(1, 40)))
        elif data:
            out.seek(min(at, len(data) - 1))
            block = data[out.tell() : out.tell() + (1 if kind == "flip" else 64)]
            out.write(bytes([block[0] ^ (1 << draw.randrange(8))]) if kind == "flip" else bytes(len(block)))
        if out.getvalue() != data:
            return out.getvalue()
