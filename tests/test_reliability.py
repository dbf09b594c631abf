"""The reliability harness in small; that it would see what is bad; and what it has found so far, each with a test of its own."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import Disk, Recorder
from forked import SAFE
from ran import ROOT, Ran

from finetune_cli import encoded
from finetune_cli.config.schema import RunConfig
from finetune_cli.data import TokenCounts
from finetune_cli.encoded import Examples, Ragged, encode_once
from finetune_cli.errors import MachineError
from finetune_cli.run import Run
from finetune_cli.storage import REAL, Store, disk_trouble

sys.path.insert(0, str(ROOT / "scripts" / "reliability"))

import subject
from figures import Figure
from subject import Ended, Subject

SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.steps=2", "train.batch_size=8", "device=cpu"]


@pytest.mark.slow
@pytest.mark.skipif(not SAFE, reason="needs forks")
def test_the_short_form_is_good(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "reliability"), "--short", "--output", str(output)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["good"] and all(figure["done"] >= figure["wanted"] > 0 and not figure["bad"] for figure in result["figures"])
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(result["figures"]) >= 10
    assert {"date", "commit", "versions", "hardware", "seconds"} <= result.keys()


# -- the harness sees what is bad ----------------------------------------------------------------------------------------------------


def a_run(home: Path) -> Subject:
    """What a finished run of three steps looks like to the harness."""
    run = home / "run"
    for name in ("checkpoints/step-00000003/model.safetensors", "model/model.safetensors", "report/index.html"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_bytes(b"weights")
    for name in ("best", "last"):
        (run / "checkpoints" / name).symlink_to("step-00000003")
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    (run / "status.json").write_text('{"state": "done"}')
    return Subject(home, 3)


GOOD = Ended(0, "", "", 1.0)
BAD: dict[str, Callable[[Path], object]] = {
    "differs: model/model.safetensors": lambda run: (run / "model/model.safetensors").write_bytes(b"others"),
    "differs: metrics.jsonl": lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 3}\n'),
    "a gap or a double": lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n'),
    "left behind: .tmp-x": lambda run: (run / "report/.tmp-x").write_bytes(b""),
    "left behind: .trash-x": lambda run: (run / "checkpoints/.trash-x").mkdir(),
    "differs: last": lambda run: (run / "checkpoints/last").unlink() or (run / "checkpoints/last").symlink_to("step-00000002"),
    "not done": lambda run: (run / "status.json").write_text('{"state": "running"}'),
    "no report": lambda run: (run / "report/index.html").unlink(),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_end_is_seen(fault: str, tmp_path: Path) -> None:
    found = a_run(tmp_path)
    reference = subject.content(found.run)
    assert subject.faults(found, GOOD, reference) == []
    BAD[fault](found.run)
    assert any(fault in told for told in subject.faults(found, GOOD, reference))


def test_a_figure_is_bad_with_one_fault_or_too_few_trials() -> None:
    figure = Figure(name="kills", wanted=2)
    figure.trial("first", [])
    assert not figure.good
    figure.trial("second", [])
    assert figure.good
    figure.trial("third", ["could not be finished"])
    assert not figure.good and Figure.joined("kills", 2, [figure.part()]).bad == ["third: could not be finished"]
    assert not Figure(name="nothing").good


def test_a_start_that_loses_a_checkpoint_is_seen() -> None:
    from kills import lost

    went_on = Ended(0, "", "warning: …\nresuming from step 2 (step-00000002)\n", 1.0)
    assert lost(2, went_on) == [] and lost(3, went_on) and lost(1, GOOD)
    assert lost(3, Ended(0, "", "nothing to do: the run is finished (resume=run)\n", 1.0)) == []


# -- what it has found ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["scoring.write", "report.write", "export.export"])
@pytest.mark.parametrize(("code", "exit_code"), [(errno.ENOSPC, 5), (errno.EROFS, 5), (errno.ENOTDIR, 1)])
def test_a_full_disk_after_training_is_exit_5(
    part: str, code: int, exit_code: int, corpus: Callable[..., Any], ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was exit 1, a bug; any other error of the system still is."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), "here")

    monkeypatch.setattr(f"finetune_cli.engine.finish.{part}", full)
    ran = ftune_inside("train", *corpus(train=16, held_out=4).keys, *SMALL)
    told = ran.fails(exit_code)
    assert exit_code == 1 or errno.errorcode[code] in told[0] and "here" in told[1] and f"resume={ran.run}" in told[2]


def test_a_full_disk_ends_an_evaluation_with_exit_5(
    corpus: Callable[..., Any], ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")

    run = ftune_inside("train", *corpus(train=16, held_out=4).keys, *SMALL).ok().run
    monkeypatch.setattr("finetune_cli.commands.evaluate.report.write", full)
    told = ftune_inside("eval", run).fails(5)
    assert "ENOSPC" in told[0] and "run it again" in told[2]


def test_an_error_of_the_system_that_a_library_in_rust_tells_is_one(tmp_path: Path) -> None:
    """safetensors raises an error of its own for a full disk."""
    with pytest.raises(MachineError, match="ENOSPC"), disk_trouble(REAL, "writing", tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="shape"), disk_trouble(REAL, "writing", tmp_path):
        raise RuntimeError("a bug: shape (3, 4)")


def always_there(fs: Recorder, name: str) -> bool:
    """Whether no power loss after all that was recorded can take a name away."""
    disk = Disk()
    for call in fs.calls:
        disk.do(*call)
    return all(_has(state, name.split("/")) for state in disk.states(random.Random(1)))


def _has(state: Any, parts: list[str]) -> bool:
    return not parts or isinstance(state, dict) and parts[0] in state and _has(state[parts[0]], parts[1:])


def test_a_power_loss_does_not_take_the_folder_of_checkpoints(tmp_path: Path) -> None:
    """It was made outside the layer before the first save, so that nobody synced its name."""
    fs = Recorder(tmp_path)
    store = Store(tmp_path / "checkpoints", fs)
    store.make()
    assert always_there(fs, "checkpoints")
    store.save(1, {"model.bin": b"weights"}, best=True, meta={})
    assert always_there(fs, "checkpoints/step-00000001/model.bin")


def test_a_process_killed_before_it_synced_the_folder_of_checkpoints_is_made_good(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    fs = Recorder(tmp_path)
    Store(tmp_path / "checkpoints", fs).make()
    assert fs.calls == [("fsync_dir", ())]


def test_a_power_loss_does_not_take_the_folder_of_an_evaluation(tmp_path: Path) -> None:
    fs = Recorder(tmp_path)
    run = Run(tmp_path, fs=fs)
    run.evaluation_dir("test", own=True)
    assert always_there(fs, "eval/test")
    run.evaluation_dir("test", own=True)  # a resume makes it again
    assert always_there(fs, "eval/test")


def test_a_report_that_was_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    run = Run.create(RunConfig(dir=str(tmp_path / "run")), name="x")
    run.write_config("a: 1\n")
    run.close()
    (run.report_dir).mkdir()
    (run.report_dir / ".tmp-0123").write_bytes(b"half a page")
    (run.report_dir / "index.html").write_bytes(b"a page")
    again = Run.open(run.path, keep=0)
    again.lock()
    assert [path.name for path in run.report_dir.iterdir()] == ["index.html"]
    again.close()


def test_encoded_rows_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power loss could leave zeros of the right size, which a later run would learn from."""
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path))
    synced: list[str] = []
    monkeypatch.setattr(type(REAL), "fsync", lambda self, path: synced.append(path.name))
    monkeypatch.setattr(type(REAL), "fsync_dir", lambda self, path: synced.append("folder"))
    real = os.rename
    monkeypatch.setattr(encoded.os, "rename", lambda source, path: synced.append("named") or real(source, path))
    examples = Examples({"input_ids": Ragged.of([[1, 2], [3]])}, np.arange(2), TokenCounts())
    found = encode_once(lambda: [examples], "entry")
    names = {path.name for path in (tmp_path / "encoded/entry").iterdir()}
    assert len(found) == 2 and set(synced[:-2]) == names and synced[-2:] == ["folder", "named"]
