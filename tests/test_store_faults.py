"""A small run is killed, starved and cut off from power at every single file-system call; it must go on as if nothing had been.

``train`` below is a training run in miniature: it records, saves, exports and finishes through ``Run`` and ``Store`` as the real one does.
Three enemies replace the file system: one kills the process before or inside a call, one raises from a call on, one records all calls so
that every disk state which a power loss may leave can be built.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.config.schema import RunConfig
from finetune_cli.errors import FtuneError, MachineError
from finetune_cli.run import Run
from finetune_cli.storage import REAL, FileSystem, Store

CALLS = (
    *("mkdir", "create", "write", "append", "truncate", "allocate", "fsync", "fsync_dir"),
    *("rename", "replace", "link", "symlink", "unlink", "rmtree"),
)
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


class Quick(FileSystem):
    """Without waiting for a real disk."""

    def fsync(self, path: Path) -> None:
        assert path.exists()

    def fsync_dir(self, path: Path) -> None:
        assert path.is_dir()

    def wait(self, seconds: float) -> None:
        pass


class Enemy(Quick):
    """Counts the calls and does something at the ``at``-th, counted from 1."""

    def __init__(self, at: int = 0) -> None:
        self.count, self.at = 0, at

    def meet(self, name: str, arguments: tuple[Any, ...]) -> None:
        pass


def _counted(name: str) -> Callable[..., Any]:
    def call(self: Enemy, *arguments: Any) -> Any:
        self.count += 1
        self.meet(name, arguments)
        return getattr(Quick, name)(self, *arguments)

    return call


for _name in CALLS:
    setattr(Enemy, _name, _counted(_name))


def half(name: str, arguments: tuple[Any, ...]) -> None:
    """What a call has done when it is interrupted in the middle."""
    if name == "write":
        file, data = arguments
        file.write(data[: len(data) // 2])
    elif name == "append":
        REAL.append(arguments[0], arguments[1][: len(arguments[1]) // 2])
    elif name == "rmtree":
        for entry in sorted(arguments[0].iterdir())[::2]:
            entry.unlink()
    else:
        getattr(Quick, name)(Quick(), *arguments)


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


class Killer(Enemy):
    def __init__(self, at: int, inside: bool) -> None:
        super().__init__(at)
        self.inside = inside

    def meet(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.count == self.at:
            with contextlib.suppress(OSError):  # such as unlink of what is not there
                if self.inside:
                    half(name, arguments)
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_a_kill_at_any_call_changes_nothing(tmp_path: Path, reference: tuple[dict[str, bytes | str], int], inside: bool) -> None:
    expected, calls = reference
    assert calls > 80
    for at in range(1, calls + 1):
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


class Failing(Enemy):
    """Fails at the ``at``-th call and ``times - 1`` more; a write fails half way."""

    def __init__(self, at: int, code: int, times: int) -> None:
        super().__init__(at)
        self.code, self.times = code, times

    def meet(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.at <= self.count < self.at + self.times:
            if name in ("write", "append"):
                half(name, arguments)
            raise OSError(self.code, os.strerror(self.code), str(arguments[0]))


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


class Recorder(Quick):
    """Does and notes every call; ``skip`` leaves out syncs, as a careless change would."""

    def __init__(self, root: Path, skip: Callable[[str, Path], bool] = lambda name, path: False) -> None:
        self.root, self.skip = root, skip
        self.calls: list[tuple[Any, ...]] = []

    def note(self, name: str, path: Path, *more: Any) -> None:
        self.calls.append((name, path.relative_to(self.root).parts, *more))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.note("mkdir", path)

    def create(self, path: Path) -> Any:
        self.note("create", path)
        return super().create(path)

    def write(self, file: Any, data: memoryview) -> int:
        self.note("append", Path(file.name), bytes(data))
        return super().write(file, data)

    def append(self, path: Path, data: bytes) -> None:
        if not path.exists():
            self.note("create", path)
        self.note("append", path, data)
        super().append(path, data)

    def fsync(self, path: Path) -> None:
        if not self.skip("fsync", path):
            self.note("fsync", path)

    def fsync_dir(self, path: Path) -> None:
        if not self.skip("fsync_dir", path):
            self.note("fsync_dir", path)

    def rename(self, source: Path, path: Path) -> None:
        super().rename(source, path)
        self.note("move", path, source.name)

    def replace(self, source: Path, path: Path) -> None:
        super().replace(source, path)
        self.note("move", path, source.name)

    def symlink(self, target: str, path: Path) -> None:
        super().symlink(target, path)
        self.note("symlink", path, target)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.note("remove", path)

    def rmtree(self, path: Path) -> None:
        for entry in path.iterdir():
            self.note("remove", entry)
        super().rmtree(path)
        self.note("remove", path)


class File:
    """Bytes as written, and as they surely are on the disk."""

    def __init__(self) -> None:
        self.data, self.durable = b"", b""


class Folder:
    """Names as surely on the disk, and changes that may or may not have got there, in order."""

    def __init__(self) -> None:
        self.durable: dict[str, Any] = {}
        self.pending: list[dict[str, Any]] = []

    def names(self, arrived: int | None = None) -> dict[str, Any]:
        found = dict(self.durable)
        for change in self.pending[:arrived]:
            found.update(change)
        return {name: node for name, node in found.items() if node is not None}


class Disk:
    """What a POSIX file system owes us: data after fsync of the file, names after fsync of their folder, names of a folder in order."""

    def __init__(self) -> None:
        self.root = Folder()

    def at(self, parts: tuple[str, ...]) -> Any:
        node: Any = self.root
        for part in parts:
            node = node.names()[part]
        return node

    def do(self, name: str, parts: tuple[str, ...], more: Any = None) -> None:
        if name == "append":
            self.at(parts).data += more
        elif name == "fsync":
            self.at(parts).durable = self.at(parts).data
        elif name == "fsync_dir":
            folder = self.at(parts)
            folder.durable, folder.pending = folder.names(), []
        else:
            folder, last = self.at(parts[:-1]), parts[-1]
            made = {"mkdir": Folder, "create": File, "symlink": lambda: more, "remove": lambda: None}
            change = {more: None, last: self.at((*parts[:-1], more))} if name == "move" else {last: made[name]()}
            folder.pending.append(change)

    def folders(self, node: Folder | None = None) -> Iterator[Folder]:
        """The folders that some crash state may show."""
        node = node or self.root
        yield node
        children = {id(n): n for change in [node.durable, *node.pending] for n in change.values() if isinstance(n, Folder)}
        for child in children.values():
            yield from self.folders(child)

    def state(self, arrived: dict[int, int], data: str, node: Folder | None = None) -> dict[str, Any]:
        """One crash state: ``arrived`` changes per folder, un-synced ``data`` full, half or lost."""
        node = node or self.root
        found: dict[str, Any] = {}
        for name, child in node.names(arrived.get(id(node), 0)).items():
            if isinstance(child, Folder):
                found[name] = self.state(arrived, data, child)
            elif isinstance(child, str):
                found[name] = child
            else:
                lost = len(child.data) - len(child.durable)
                found[name] = child.data[: len(child.durable) + {"full": lost, "half": lost // 2, "lost": 0}[data]]
        return found


def lay_out(path: Path, state: dict[str, Any]) -> None:
    path.mkdir()
    for name, child in state.items():
        if isinstance(child, dict):
            lay_out(path / name, child)
        elif isinstance(child, str):
            os.symlink(child, path / name)
        else:
            (path / name).write_bytes(child)


def crash_states(calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(last acknowledged step, what is on the disk) for every prefix of the calls, each state once."""
    disk, acknowledged, draw = Disk(), 0, random.Random(7)
    seen: set[str] = set()
    for call in calls:
        if call[0] == "acknowledge":
            acknowledged = call[1]
        else:
            disk.do(*call)
        sizes = {id(folder): len(folder.pending) for folder in disk.folders()}
        choices = [{}, sizes, *({**sizes, key: 0} for key in sizes)]
        choices += [{key: draw.randint(0, size) for key, size in sizes.items()} for _ in range(4)]
        unique = [dict(items) for items in {tuple(sorted(choice.items())) for choice in choices}]
        for arrived, data in itertools.product(unique, ("full", "half", "lost")):
            state = disk.state(arrived, data)
            if (key := repr((acknowledged, state))) not in seen:
                seen.add(key)
                yield acknowledged, state


def recorded(path: Path, skip: Callable[[str, Path], bool]) -> list[tuple[Any, ...]]:
    """The calls of eight saves with their records in between; with an ``acknowledge`` after each save."""
    path.mkdir()
    fs = Recorder(path, skip)
    run = Run(path, fs=fs, keep=1)
    for step in range(1, 9):
        run.record(step, {"loss": 1 / step})
        meta = {"metrics": run.metrics_bytes()}
        run.store.save(step, {"model.bin": weights(step)}, best=step == 2, meta=meta)
        fs.calls.append(("acknowledge", step))
    return fs.calls


def losses(tmp_path: Path, skip: Callable[[str, Path], bool], *, enough: int = 10**9) -> tuple[int, int]:
    """(crash states seen, those in which an acknowledged checkpoint or its records are lost)."""
    calls = recorded(tmp_path / "run", skip)
    records = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    states = lost = 0
    for acknowledged, state in crash_states(calls):
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


CARELESS: dict[str, Callable[[str, Path], bool]] = {
    "data files": lambda name, path: name == "fsync" and path.name == "model.bin",
    "manifest": lambda name, path: name == "fsync" and path.name == "manifest.json",
    "records": lambda name, path: name == "fsync" and path.name == "metrics.jsonl",
    "names in the new checkpoint": lambda name, path: name == "fsync_dir" and path.name.startswith(".tmp-"),
    "names of checkpoints": lambda name, path: name == "fsync_dir" and path.name == "checkpoints",
    "names in the run": lambda name, path: name == "fsync_dir" and path.name == "run",
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
