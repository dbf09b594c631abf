"""What must not change a run's bits does not; and the negative control: without any one field of the resume state they do change.

A run killed after step N is made by winding one back that was not: later checkpoints and everything after training are taken away, the
records of later steps stay, as a kill leaves them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from ran import Ran, labelled_rows, write_rows

from finetune_cli import checkpoint
from finetune_cli.engine import environment, loop
from finetune_cli.engine.loop import State, Trainer
from finetune_cli.errors import Stopped

pytestmark = pytest.mark.sampled(12)

MEMORY = 5e5
"""Bytes that are said to be free: a batch goes through in several micro-batches."""
TINY = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.heads=2", "model.shape.intermediate=64"]
TINY += ["train.batch_size=8", "optimizer.lr=3e-3", "device=cpu", "device.threads=1"]
LONG = ["train.steps=12", "train.save_every=1", "train.keep=20", "train.log_every=4", "train.eval_every=6"]
PATIENT = ["train.steps=20", "train.save_every=1", "train.keep=20", "train.log_every=1", "train.eval_every=2"]
PATIENT += ["train.patience=2", "train.monitor=accuracy", "optimizer.lr=1e-6"]


def sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def weights(run: Path) -> str:
    return sha(run / "checkpoints/last/model.safetensors")


def digest(run: Path) -> dict[str, str]:
    """Weights, optimizer, records, which checkpoints are best and last, and which step the report calls the best."""
    files = ("metrics.jsonl", "model/model.safetensors", "checkpoints/last/model.safetensors", "checkpoints/last/state.safetensors")
    told = {name: sha(run / name) for name in files} | {name: os.readlink(run / "checkpoints" / name) for name in ("best", "last")}
    (best,) = (line for line in (run / "report/report.md").read_text().splitlines() if "best checkpoint" in line)
    return told | {"best": best}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Keys that name 32 rows to train on, 8 to validate and 8 to test."""
    home = tmp_path_factory.mktemp("data")
    splits = (("train", 32, 0), ("validation", 8, 100), ("test", 8, 200))
    return [f"data.{name}={write_rows(home / f'{name}.csv', labelled_rows(count, shift=shift))}" for name, count, shift in splits]


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "free_memory", lambda device: MEMORY)


# -- what changes nothing ------------------------------------------------------------------------------------------------------------

SAME: dict[str, tuple[list[str], dict[str, str]]] = {
    "saving": (["train.save_every=1", "train.keep=5"], {}),
    "scoring": (["train.eval_every=1"], {}),
    "logging": (["train.log_every=5"], {}),
    "all three": (["train.save_every=4", "train.eval_every=3", "train.log_every=2"], {}),
    "the time zone": ([], {"TZ": "Pacific/Auckland"}),
    "another name": (["run.name=größe"], {}),
}
BASE = ["train.steps=6", "train.save_every=6", "train.eval_every=6", "train.log_every=1"]


@pytest.fixture(scope="module")
def usual(data: list[str], forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the weights of a run with the usual settings."""
    home = tmp_path_factory.mktemp("usual")
    process = forks.start("train", *data, *TINY, *BASE, "run.dir=run", cwd=home)
    assert process.wait(120) == 0
    return weights(home / "run")


@pytest.mark.parametrize("what", SAME)
def test_it_changes_no_weight(what: str, usual: str, data: list[str], ftune: Callable[..., Ran], tmp_path: Path) -> None:
    options, env = SAME[what]
    (tmp_path / "elsewhere").mkdir()
    ran = ftune("train", *data, *TINY, *BASE, *options, cwd=tmp_path / "elsewhere", env=env).ok()
    assert weights(ran.run) == usual


@pytest.mark.slow
def test_another_interpreter_changes_no_weight(usual: str, data: list[str], ftune: Callable[..., Ran]) -> None:
    """Seeds of hashes, language and time zone; what a new process reads at its start."""
    env = {"PYTHONHASHSEED": "12345", "LANG": "C", "LC_ALL": "C", "TZ": "Asia/Kolkata", "COLUMNS": "40"}
    assert weights(ftune("train", *data, *TINY, *BASE, fresh=True, env=env).ok().run) == usual


def test_other_data_or_another_seed_does_change_them(usual: str, data: list[str], ftune: Callable[..., Ran]) -> None:
    """The digest can tell runs apart."""
    assert weights(ftune("train", *data, *TINY, *BASE, "train.seed=2").ok().run) != usual


# -- runs that are wound back --------------------------------------------------------------------------------------------------------

Inside = Callable[..., Ran]


class Wound:
    """A finished run and copies of it as they were after a step."""

    def __init__(self, whole: Path) -> None:
        self.whole = whole
        self.expected = digest(whole)

    def back(self, copy: Path, step: int) -> Path:
        """As if killed after ``step`` had been saved (0: before the first checkpoint)."""
        shutil.copytree(self.whole, copy, symlinks=True)
        for name in ("model", "eval", "report"):
            shutil.rmtree(copy / name)
        (copy / "metrics.json").unlink()
        status = json.loads((copy / "status.json").read_text())
        (copy / "status.json").write_text(json.dumps({**status, "state": "running"}))
        for path in copy.glob("checkpoints/step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        for name in ("best", "last"):  # a start puts them right
            (copy / "checkpoints" / name).unlink()
        return copy


@pytest.fixture(scope="module")
def made() -> dict[str, Wound]:
    return {}


@pytest.fixture
def wound(
    made: dict[str, Wound],
    data: list[str],
    ftune_inside: Inside,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Wound]:
    """``wound("long")`` or ``wound("patient")``: that run, made once."""

    def get(name: str) -> Wound:
        if name not in made:
            run = tmp_path_factory.mktemp(name) / "whole"
            ftune_inside("train", *data, *TINY, *{"long": LONG, "patient": PATIENT}[name], f"run.dir={run}").ok()
            made[name] = Wound(run)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "step"), [("long", 0), ("long", 6), ("long", 11), ("patient", 4), ("patient", 6)])
def test_a_resume_is_exact_also_with_less_memory_free(
    name: str, step: int, wound: Callable[[str], Wound], ftune_inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of the run is kept, even by one that was killed before its first checkpoint."""
    run = wound(name)
    copy = run.back(tmp_path / "copy", step)
    monkeypatch.setattr(environment, "free_memory", lambda device: MEMORY / 2)
    ftune_inside("train", f"resume={copy}").ok()
    assert digest(copy) == run.expected
    last = max(path.name for path in run.whole.glob("checkpoints/step-*"))
    for file in (run.whole / "checkpoints" / last).iterdir():
        if file.name not in ("config.yaml", "manifest.json"):  # they tell where the run is
            assert file.read_bytes() == (copy / "checkpoints" / last / file.name).read_bytes(), file.name
    tokenizer = json.loads((copy / "model/tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & tokenizer.keys()


def test_less_memory_from_the_start_is_another_plan(
    wound: Callable[[str], Wound], data: list[str], ftune_inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above holds against."""
    whole = wound("long").whole
    monkeypatch.setattr(environment, "free_memory", lambda device: MEMORY / 2)
    assert weights(ftune_inside("train", *data, *TINY, *LONG).ok().run) != weights(whole)


# -- the negative control ------------------------------------------------------------------------------------------------------------


def drop(field: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({field: getattr(State(), field)})


def drop_moments(kind: str) -> Callable[[dict[str, Any]], None]:
    """Without one kind of tensor of the optimizer, which begins anew with zeros."""

    def change(state: dict[str, Any]) -> None:
        found = 0
        for moments in tree(state["optimizer"]):
            if kind in moments:
                moments[kind] = moments[kind] * 0
                found += 1
        assert found

    return change


def tree(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from tree(child)
    elif isinstance(value, list):
        for child in value:
            yield from tree(child)


def halve_plan(state: dict[str, Any]) -> None:
    state["plan"]["micro_tokens"] //= 2


RETURN = {"scheduled", "good", "returns", "left_out"}
ABLATED: dict[str, tuple[str, int, Callable[[dict[str, Any]], None]]] = {
    "step": ("long", 6, drop("step")),
    "loss_sum": ("long", 6, drop("loss_sum")),
    "loss_steps": ("long", 6, drop("loss_steps")),
    "metrics_bytes": ("long", 6, drop("metrics_bytes")),
    "plan": ("long", 6, halve_plan),
    "best": ("patient", 4, drop("best")),
    "best_step": ("patient", 4, drop("best_step")),
    "misses": ("patient", 4, drop("misses")),
    "finished": ("patient", 6, drop("finished")),
    "optimizer: exp_avg": ("long", 6, drop_moments("exp_avg")),
    "optimizer: exp_avg_sq": ("long", 6, drop_moments("exp_avg_sq")),
    "optimizer: step": ("long", 6, drop_moments("step")),
}


@pytest.mark.parametrize("field", ABLATED)
def test_without_any_field_the_run_is_another(
    field: str, wound: Callable[[str], Wound], ftune_inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, step, change = ABLATED[field]
    run = wound(name)
    copy, real = run.back(tmp_path / "copy", step), checkpoint.load_state

    def without(directory: Path) -> dict[str, Any]:
        state = real(directory)
        change(state)
        return state

    monkeypatch.setattr(checkpoint, "load_state", without)
    ran = ftune_inside("train", f"resume={copy}")
    assert ran.code in (2, 6) or digest(copy) != run.expected


def test_weights_of_an_earlier_step_are_another_run(
    wound: Callable[[str], Wound], ftune_inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = wound("long"), checkpoint.load_model
    copy = run.back(tmp_path / "copy", 6)
    monkeypatch.setattr(checkpoint, "load_model", lambda path, *more, **how: real(path.with_name("step-00000005"), *more, **how))
    assert "weights differ" in ftune_inside("train", f"resume={copy}").fails(6)[0]


@pytest.mark.parametrize("dropped", [False, True])
def test_a_step_whose_scoring_was_cut_short_is_scored_once(
    dropped: bool, wound: Callable[[str], Wound], data: list[str], ftune_inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``closed`` says that the step's record is still to be made; without it, it would be lost."""
    run = wound("long")
    stopped, real = tmp_path / "stopped", checkpoint.load_state

    def cut_short(trainer: Trainer, rows: Any) -> Any:
        raise Stopped("stopped by SIGTERM", where="SIGTERM", fix="go on")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "scores", cut_short)
        assert ftune_inside("train", *data, *TINY, *LONG, f"run.dir={stopped}").code == 75
    state = real(stopped / "checkpoints/last")
    assert state["step"] == 6 and not state["closed"]
    if dropped:
        monkeypatch.setattr(checkpoint, "load_state", lambda directory: {**real(directory), "closed": True})
    ftune_inside("train", f"resume={stopped}").ok()
    assert (digest(stopped) == run.expected) is not dropped


def test_every_field_of_the_resume_state_has_its_control(wound: Callable[[str], Wound]) -> None:
    """A field that is added needs a run that is another without it."""
    state = checkpoint.load_state(wound("long").whole / "checkpoints/last")
    assert set(state) == set(State.__slots__) | {"optimizer", "next_rows"}  # the last is a promise, and is compared (test_verified_resume)
    elsewhere = {"closed", "recent", "first_loss", "spikes", *RETURN}  # the test above; what is about spikes is in test_numbers
    elsewhere.add("metrics_sha256")  # a promise too
    assert {name for name in ABLATED if ":" not in name} | elsewhere == set(State.__slots__)
    kinds = {kind for moments in tree(state["optimizer"]) for kind, value in moments.items() if hasattr(value, "dtype")}
    assert kinds == {name.partition(": ")[2] for name in ABLATED if ":" in name}
