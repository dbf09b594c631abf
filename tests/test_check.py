"""``ftune check`` looks at all that a run needs, says what the run would be, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from ran import Ran, labelled_rows, one_a_task, write_rows

pytestmark = pytest.mark.sampled(4)

Ftune = Callable[..., Ran]
TINY = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "device=cpu"]


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    """Training and test rows, and the options that name them."""
    write_rows(tmp_path / "train.csv", labelled_rows(60))
    write_rows(tmp_path / "test.csv", labelled_rows(20, shift=60))
    return ["data.train=train.csv", "data.test=test.csv", "data.text=text", "data.label=label"]


def test_it_says_what_the_run_will_be_and_leaves_nothing(ftune_inside: Ftune, rows: list[str], tmp_path: Path) -> None:
    """Files, rows, plan and steps are those of the run that is started afterwards with the same words."""
    before = sorted(tmp_path.rglob("*"))
    found = ftune_inside("check", *rows, *TINY, "train.epochs=2").ok().json
    assert sorted(tmp_path.rglob("*")) == before
    run = ftune_inside("train", *rows, *TINY, "train.epochs=2").ok().run
    manifest = json.loads((run / "manifest.json").read_text())
    assert found["ready"] is True and found["files"] == manifest["files"] and found["facts"] == manifest["facts"]
    assert {name: split["rows"] for name, split in found["splits"].items()} == manifest["rows"]
    assert found["plan"] == manifest["plan"] and found["parameters"] == manifest["parameters"]
    assert found["steps"]["total"] == json.loads((run / "status.json").read_text())["step"]
    assert found["disk"]["needed_bytes"] > sum(p.stat().st_size for p in (run / "model").iterdir()) / 2


def test_the_ledger_is_a_file_where_one_is_named(ftune_inside: Ftune, rows: list[str], tmp_path: Path) -> None:
    ran = ftune_inside("check", *rows, *TINY, "ledger=found.json", "data.label_delimiter=;").ok()
    assert ran.out == "" and "; 1 warning; " in ran.err
    ledger = json.loads((tmp_path / "found.json").read_text())
    assert ledger["splits"]["train"]["labels"] == {"negative": 27, "positive": 27} and len(ledger["files"]["test"]) == 1
    (tmp_path / "link.json").symlink_to("found.json")
    ftune_inside("check", *rows, *TINY, "train.seed=7", "ledger=link.json").ok()  # a ledger may be renewed, through a link too
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "found.json").read_text())["seed"] == 7
    told = ftune_inside("check", *rows, *TINY, "ledger=no/where.json").fails()
    assert told[1].startswith("where: ledger=") and told[1].endswith("no/where.json")


def test_ctrl_c_at_its_last_work_is_obeyed(ftune_inside: Ftune, rows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``ftune check … && ftune train …`` must not go on."""
    monkeypatch.setattr("finetune_cli.commands.check.rehearse", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    ran = ftune_inside("check", *rows, *TINY)
    assert ran.code == 130 and not ran.out and "can start" not in ran.err


def test_a_sweep_has_a_ledger_a_job(ftune_inside: Ftune, rows: list[str], tmp_path: Path) -> None:
    ftune_inside("check", "-m", *rows, *TINY, "train.seed=1,2", "ledger='found-${train.seed}.json'").ok()
    assert [json.loads((tmp_path / f"found-{seed}.json").read_text())["seed"] for seed in (1, 2)] == [1, 2]


@pytest.mark.parametrize("name", one_a_task())
def test_every_task_is_checked(name: str, ftune_inside: Ftune, tmp_path: Path) -> None:
    found = ftune_inside("check", f"+exp={name}", *TINY, "data.max_rows=96", "train.batch_size=16").ok().json
    assert found["splits"]["train"]["rows"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["data.train=absent.csv"], "no such file"),
        (["data.label=nothing"], "nothing"),
        (["optimizer.lrr=1"], "unknown key"),
        (["resume=auto"], "only ftune train has it"),
        (["device=cuda", "device.index=999"], "CUDA"),
        (["train.monitor=bleu"], "no metric"),
        (["optimizer.warmup=500"], "warmup"),
        (["run.dir=train.csv"], "train.csv"),
        (["model.path=./absent"], "absent"),
    ],
)
def test_what_would_stop_a_run_stops_the_check(keys: list[str], told: str, ftune_inside: Ftune, rows: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert told in "\n".join(ftune_inside("check", *rows, *TINY, *keys).fails())
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_among_no_gpus_is_refused(ftune_inside: Ftune, rows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device.index" in ftune_inside("check", *rows, *TINY[:-1], "device.index=0").fails()[0]


def test_a_ledger_that_does_not_fit_is_the_machines_fault(
    ftune_inside: Ftune, rows: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(self: object, file: object, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finetune_cli.storage.system.FileSystem.write", full)
    told = ftune_inside("check", *rows, *TINY, "ledger=found.json").fails(5)
    assert "writing the ledger: disk full" in told[0] and "ledger=" in told[-1] and "found.json" not in {p.name for p in tmp_path.iterdir()}


def test_a_full_disk_is_told_before_training(ftune_inside: Ftune, rows: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("finetune_cli.storage.system.FileSystem.free", lambda self, folder: 1000)
    assert "the disk will not suffice" in ftune_inside("check", *rows, *TINY).fails(5)[0]
    assert not (tmp_path / "runs").exists()
