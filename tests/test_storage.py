"""Records, folders, pointers, checkpoints and the lock, on a file system that works."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from finetune_cli.errors import MachineError, UserError
from finetune_cli.storage import (
    REAL,
    FileSystem,
    Lock,
    Store,
    json_bytes,
    json_line,
    make_folders,
    point,
    pointed,
    seal,
    unseal,
    write_folder,
    write_new,
    write_whole,
)


def save(store: Store, step: int, *, best: bool = False, data: bytes = b"weights", meta: dict[str, Any] | None = None) -> Path:
    return store.save(step, {"model.bin": data + b"%d" % step}, best=best, meta=meta or {})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints", REAL)


# -- records -------------------------------------------------------------------------------------------------------------------------


def test_sealed_records_are_json_and_come_back() -> None:
    record = {"b": [1, 2.5, None], "a": {"größe": "情感", "x": 1e-17}, "n": float("nan"), "i": np.int64(3), "f": np.float32(0.5)}
    raw = seal(record)
    assert unseal(raw) == {"b": [1, 2.5, None], "a": {"größe": "情感", "x": 1e-17}, "n": None, "i": 3, "f": 0.5}
    assert json.loads(raw)["a"]["größe"] == "情感"
    assert seal(dict(reversed(record.items()))) == raw


def test_a_seal_covers_every_byte() -> None:
    raw = seal({"step": 1, "text": "a\nb"})
    for at in range(len(raw)):
        for changed in (raw[:at], raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], raw[:at] + b" " + raw[at:]):
            with pytest.raises(ValueError):
                unseal(changed)


def test_json_never_holds_a_bare_nan() -> None:
    value = {"a": float("nan"), "b": [float("inf"), np.float32("nan")], "c": np.array([1.0, np.nan]), "d": Path("x"), "e": {"z", "y"}}
    for raw in (json_bytes(value), json_line(value)):
        assert json.loads(raw) == {"a": None, "b": [None, None], "c": [1.0, None], "d": "x", "e": ["y", "z"]}
    assert json_line(value).count(b"\n") == 1


def test_names_that_are_not_utf8_can_be_written() -> None:
    assert json.loads(json_line({"file": os.fsdecode(b"caf\xe9")})) == {"file": "caf\udce9"}


# -- files and folders ---------------------------------------------------------------------------------------------------------------


def test_a_new_file_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    block = bytes(range(256)) * 4096  # 1 MiB

    def blocks(handle: BinaryIO) -> None:
        handle.writelines(memoryview(block) for _ in range(32))

    tracemalloc.start()
    size, sha = write_new(REAL, tmp_path / "big", blocks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (size, sha) == (32 << 20, hashlib.sha256(block * 32).hexdigest())
    assert (tmp_path / "big").read_bytes() == block * 32
    assert peak < 4 << 20
    assert write_new(REAL, tmp_path / "copy", tmp_path / "big") == (size, sha)
    with pytest.raises(FileExistsError):
        write_new(REAL, tmp_path / "copy", b"")


def test_typed_buffers_can_be_written(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.float32)
    size, _ = write_new(REAL, tmp_path / "a", lambda handle: handle.write(array.data) and None)
    assert size == 4000 and (tmp_path / "a").read_bytes() == array.tobytes()


def test_text_can_be_written_through_the_handle(tmp_path: Path) -> None:
    def text(handle: BinaryIO) -> None:
        wrapper = io.TextIOWrapper(handle, "utf-8")
        wrapper.write("größe")
        wrapper.detach()

    assert write_new(REAL, tmp_path / "a", text)[0] == 7


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    class Broken(FileSystem):
        def write(self, file: BinaryIO, data: memoryview) -> int:
            file.write(data[:2])
            raise OSError(errno.ENOSPC, "disk full")

    path = tmp_path / "status.json"
    write_whole(REAL, path, b"before")
    with pytest.raises(OSError):
        write_whole(Broken(), path, b"after")
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["status.json"]


def test_a_folder_replaces_the_old_one_and_shares_bytes(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 100)
    for note in (b"one", b"two"):
        write_folder(REAL, tmp_path / "model", {"model.bin": tmp_path / "weights", note.decode(): note}, link=True)
    assert sorted(os.listdir(tmp_path / "model")) == ["model.bin", "two"]
    assert sorted(os.listdir(tmp_path)) == ["model", "weights"]
    assert (tmp_path / "model" / "model.bin").samefile(tmp_path / "weights")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/etc/x", ".hidden", "a\\b", "C:x", "a\nb", "nul\0"])
def test_a_file_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        write_folder(REAL, tmp_path / "model", {name: b""})
    assert os.listdir(tmp_path) == []


def test_missing_folders_are_made_and_told(tmp_path: Path) -> None:
    assert make_folders(REAL, tmp_path / "a" / "b") == [tmp_path / "a", tmp_path / "a" / "b"]
    assert make_folders(REAL, tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OSError):
            make_folders(REAL, path)


# -- pointers ------------------------------------------------------------------------------------------------------------------------


class NoLinks(FileSystem):
    """Such as FAT, or Windows without the privilege."""

    def symlink(self, target: str, path: Path) -> None:
        raise OSError(errno.EPERM, "not permitted")

    def link(self, source: Path, path: Path) -> None:
        raise OSError(errno.EPERM, "not permitted")


@pytest.mark.parametrize("fs", [FileSystem(), NoLinks()], ids=["links", "files"])
def test_checkpoints_are_found_with_and_without_links(tmp_path: Path, fs: FileSystem) -> None:
    store = Store(tmp_path / "checkpoints", fs)
    save(store, 1, best=True)
    save(store, 2)
    assert pointed(store.root / "best") == "step-00000001" and pointed(store.root / "last") == "step-00000002"
    assert store.named("best").name == "step-00000001" and store.named("last").name == "step-00000002"
    assert (store.root / "best").is_symlink() == (type(fs) is FileSystem)


def test_a_copy_that_followed_links_still_works(tmp_path: Path, store: Store) -> None:
    save(store, 1, best=True)
    shutil.copytree(store.root, tmp_path / "copy", symlinks=False)
    copy = Store(tmp_path / "copy", REAL)
    assert (copy.root / "best").is_dir() and not (copy.root / "best").is_symlink()
    save(copy, 2, best=True)
    assert os.readlink(copy.root / "best") == "step-00000002"
    assert sorted(os.listdir(copy.root)) == ["best", "last", "step-00000002"]


def test_a_pointer_moves_in_one_step(tmp_path: Path) -> None:
    for target in ("one", "two"):
        point(REAL, tmp_path / "latest", target)
        assert os.readlink(tmp_path / "latest") == target and os.listdir(tmp_path) == ["latest"]
    assert pointed(tmp_path / "none") is None


# -- checkpoints ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "stay"), [(0, [3, 9]), (1, [3, 8, 9]), (3, [3, 6, 7, 8, 9])])
def test_best_last_and_the_newest_others_stay(store: Store, keep: int, stay: list[int]) -> None:
    store.keep = keep
    for step in range(1, 10):
        save(store, step, best=step in (1, 3))
    assert [int(name[5:]) for name in store.steps()] == stay
    assert sorted(set(os.listdir(store.root)) - set(store.steps())) == ["best", "last"]


def test_order_is_by_number_not_by_time_or_text(store: Store) -> None:
    store.keep = 9
    for step in (100_000_000, 99_999_999, 7):
        save(store, step)
    assert [int(name[5:]) for name in store.steps()] == [7, 99_999_999, 100_000_000]
    newest, _ = store.newest()
    assert newest is not None and newest.name == "step-100000000"


def test_meta_and_manifest_come_back(store: Store) -> None:
    path = save(store, 5, best=True, meta={"metrics": 17, "loss": float("nan"), "names": ("a", "b")})
    manifest = store.read_manifest(path)
    assert manifest["meta"] == {"metrics": 17, "loss": None, "names": ["a", "b"]}
    assert manifest["step"] == 5 and manifest["best"] is True and manifest["files"]["model.bin"]["bytes"] == 8


def test_the_same_step_again_is_kept_when_it_is_good(store: Store) -> None:
    path = save(store, 5, best=True, meta={"x": (1, 2)})
    inode = (path / "model.bin").stat().st_ino
    assert save(store, 5, best=True, meta={"x": (1, 2)}) == path
    assert (path / "model.bin").stat().st_ino == inode


def test_the_same_step_again_replaces_a_bad_one_and_keeps_it_aside(store: Store) -> None:
    path = save(store, 5, best=True)
    (path / "model.bin").write_bytes(b"torn")
    assert save(store, 5, best=True) == path
    assert store.verify(path) is None
    (corrupt,) = store.root.glob(".corrupt-*")
    assert (corrupt / "model.bin").read_bytes() == b"torn"


def test_the_same_step_of_another_history_is_replaced(store: Store) -> None:
    save(store, 5, best=True, data=b"old", meta={"config": "a"})
    path = save(store, 5, best=True, data=b"new", meta={"config": "b"})
    assert (path / "model.bin").read_bytes() == b"new5"
    assert sorted(os.listdir(store.root)) == ["best", "last", "step-00000005"]


def test_going_back_sets_later_checkpoints_aside_until_they_are_passed(store: Store) -> None:
    store.keep = 9
    for step in (1, 2, 3):
        save(store, step, best=step == 2)
    assert store.rewind(1) == ["step-00000002", "step-00000003"]
    assert store.steps() == ["step-00000001"] and pointed(store.root / "last") == "step-00000001" and store.best() is None
    save(store, 2, data=b"new")
    assert len(list(store.root.glob(".aside-step-*"))) == 1
    save(store, 3, data=b"new")
    assert not list(store.root.glob(".aside-*"))


def test_after_a_bad_newest_the_run_goes_on_from_an_older_one(store: Store) -> None:
    """Neither retention nor the pointers may prefer the bad one to what is saved from now on."""
    store.keep = 1
    for step in (1, 2, 9):
        save(store, step, best=step != 2)
    (store.root / "step-00000009" / "model.bin").write_bytes(b"bad")
    assert store.newest()[0] == store.root / "step-00000002"
    for step in (3, 4):
        assert save(store, step) == store.newest()[0]
        assert pointed(store.root / "last") == f"step-0000000{step}"
        store.sweep()
        assert store.newest()[0] == store.root / f"step-0000000{step}"
    assert save(store, 9) == store.newest()[0]
    assert len(list(store.root.glob(".corrupt-step-00000009-*"))) == 1


def test_a_damaged_best_is_refused_not_replaced(store: Store) -> None:
    store.keep = 9
    for step in (1, 2, 3):
        save(store, step, best=step < 3)
    (store.root / "step-00000002" / "manifest.json").write_bytes(b"{}")
    store.sweep()
    save(store, 4)
    with pytest.raises(UserError, match=r"damaged: manifest.json is damaged"):
        store.named("best")
    save(store, 5, best=True)
    assert store.named("best").name == "step-00000005"


def test_a_death_between_commit_and_pointer_is_mended(store: Store) -> None:
    save(store, 1, best=True)
    save(store, 2, best=True)
    for name in ("best", "last"):
        (store.root / name).unlink()
        os.symlink("step-00000001", store.root / name)
    (store.root / ".tmp-step-00000003-abc").mkdir()
    (store.root / ".trash-step-00000001-abc").mkdir()
    (store.root / ".tmp-abc").touch()
    store.sweep()
    assert sorted(os.listdir(store.root)) == ["best", "last", "step-00000002"]
    assert os.readlink(store.root / "best") == os.readlink(store.root / "last") == "step-00000002"


def test_a_bad_newest_is_passed_over_and_named(store: Store) -> None:
    store.keep = 9
    paths = [save(store, step) for step in (1, 2, 3, 4)]
    (paths[3] / "manifest.json").unlink()
    (paths[2] / "model.bin").write_bytes(b"w")
    newest, bad = store.newest()
    assert newest == paths[1]
    assert bad == [
        ("step-00000004", "manifest.json is missing (the save did not finish)"),
        ("step-00000003", "model.bin has 1 bytes, the manifest says 8"),
    ]


def test_a_named_checkpoint_is_that_one_or_none(store: Store) -> None:
    store.keep = 9
    save(store, 400)
    bad = save(store, 500)
    (bad / "model.bin").write_bytes(b"weights")
    assert store.named("400") == store.named("step-00000400")
    with pytest.raises(UserError, match=r"damaged: model.bin has 7 bytes") as caught:
        store.named("500")
    assert "step-00000400" in caught.value.fix
    for name in ("600", "../checkpoints/step-00000400", "best", "", "x"):
        with pytest.raises(UserError, match="no checkpoint"):
            store.named(name)


def test_causes_are_plain(tmp_path: Path, store: Store) -> None:
    path = save(store, 1)
    good = (path / "manifest.json").read_bytes()
    digest = unseal(good)["files"]["model.bin"]

    def tampered(path: Path, **changes: Any) -> None:
        (path / "manifest.json").write_bytes(seal({**unseal(good), **changes}))

    tampered(path, format=7)
    assert store.verify(path) == "manifest.json has format 7, this ftune reads 1: upgrade ftune"
    tampered(path, files={"../model.bin": digest})
    assert "not a plain file name" in (store.verify(path) or "")
    tampered(path, files={"other.bin": digest})
    assert store.verify(path) == "other.bin is missing"
    tampered(path, step=2)
    assert store.verify(path) == "manifest.json is that of step 2"
    (path / "manifest.json").write_bytes(seal({"some": "record"}))
    assert store.verify(path) == "manifest.json is not that of a checkpoint"
    (path / "manifest.json").write_bytes(b"\xff" * 50)
    assert "damaged" in (store.verify(path) or "")
    (path / "manifest.json").write_bytes(good)
    (tmp_path / "secret").write_bytes((path / "model.bin").read_bytes())
    (path / "model.bin").unlink()
    os.symlink(tmp_path / "secret", path / "model.bin")
    assert store.verify(path) == "model.bin is a link out of the checkpoint"


def test_a_file_size_limit_is_the_machines_fault(store: Store) -> None:
    resource = pytest.importorskip("resource")
    save(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(MachineError, match="file size limit reached"):
            save(store, 2, data=bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(store.root)) == ["last", "step-00000001"]


# -- lock ----------------------------------------------------------------------------------------------------------------------------


def test_the_second_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    with Lock(tmp_path / ".lock") as lock:
        assert lock.held
        code = "import sys; from pathlib import Path; from finetune_cli.storage import Lock; Lock(Path(sys.argv[1]))"
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], capture_output=True, text=True, check=False)
        assert f"in use by pid {os.getpid()} on " in other.stderr
    Lock(tmp_path / ".lock").release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        Lock(tmp_path / ".lock")
        worker = os.fork()
        if worker == 0:
            os.write(writer, b"%d" % os.getpid())
        signal.pause()
    worker = int(os.read(reader, 20))
    with pytest.raises(UserError):
        Lock(tmp_path / ".lock")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        os.kill(worker, 0)
        Lock(tmp_path / ".lock").release()
    finally:
        os.kill(worker, signal.SIGKILL)
    for handle in (reader, writer):
        os.close(handle)


def test_without_kernel_locks_a_live_holder_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("finetune_cli.storage.lock._acquire", unsupported)
    path = tmp_path / ".lock"
    lock = Lock(path)
    path.write_text(path.read_text().replace(f"pid {os.getpid()} ", f"pid {os.getppid()} "))
    with pytest.raises(UserError, match="in use"):
        Lock(path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path.write_text(path.read_text().replace(f"pid {os.getppid()} ", f"pid {gone.pid} "))
    Lock(path).release()
    lock.release()
