"""Numbers that are none never become weights on disk or a best model, and a loss that jumps is said, or ends the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import poison
import pytest
import torch
from ran import Ran

from finetune_cli import checkpoint
from finetune_cli.engine import building
from finetune_cli.engine.numbers import FACTOR, LEAST, spike
from finetune_cli.engine.trainer import Trainer
from finetune_cli.errors import MachineError
from finetune_cli.tasks import get

Ftune = Callable[..., Ran]
TASK = get("text-classification")


def at_step(patch: pytest.MonkeyPatch, step: int, harm: Callable[[Trainer], None]) -> None:
    """Right after update ``step`` something happens to the trainer."""
    real = Trainer.step

    def stepped(self: Trainer) -> None:
        real(self)
        if self.state.step == step:
            harm(self)

    patch.setattr(Trainer, "step", stepped)


def break_weights(trainer: Trainer) -> None:
    """Of a token that no row has: no loss shows it."""
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[4, 0] = math.nan  # type: ignore[operator]


def break_moments(trainer: Trainer) -> None:
    next(iter(trainer.updater.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = math.inf


@pytest.mark.parametrize(("harm", "what"), [(break_weights, "weights hold NaN"), (break_moments, "moments hold NaN or infinity")])
def test_what_is_not_finite_is_never_a_checkpoint(
    harm: Any, what: str, ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 6, harm)
    ran, run = poison.train(ftune_inside, tmp_path)
    error = ran.fails(4)
    assert what in error[0] and "step 8" in error[1] and str(run / "crash") in error[1]
    assert (run / "checkpoints/last").resolve().name == "step-00000004" and not (run / "model").exists()


@pytest.mark.parametrize("loss", [0.5, math.nan])
def test_a_metric_that_is_no_number_is_never_the_best(
    loss: float, ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss the metric is only undefined, and the last checkpoint is taken and said so; without one there is no model to give."""
    real = TASK.label_loss

    def unanswerable(self: Any, outputs: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {name: value * (1.0 if value.requires_grad else loss) for name, value in real(self, outputs, batch).items()}

    found = TASK.metrics
    monkeypatch.setattr(TASK, "label_loss", unanswerable)
    monkeypatch.setattr(TASK, "metrics", lambda self, evaluation: dict.fromkeys(found(self, evaluation), math.nan))
    ran, run = poison.train(ftune_inside, tmp_path, "train.eval_every=4")
    assert ran.err.count("it counts as no improvement") == 2
    if math.isfinite(loss):
        ran.ok()
        assert "was never a number" in (run / "report/report.md").read_text()
    else:
        assert "never finite" in ran.fails(4)[0]
        assert (run / "checkpoints/last").resolve().name == "step-00000004" and not (run / "checkpoints/best").exists()


def test_what_is_a_spike() -> None:
    usual = [1.2, 1.0, 1.0] * 4
    assert spike(FACTOR * 1.01, usual, 2.0) == pytest.approx(FACTOR * 1.01)
    assert spike(FACTOR * 0.99, usual, 2.0) is None
    assert spike(10.0, usual[: LEAST - 1], 2.0) is None, "too little is known"
    assert spike(0.3, [0.01] * 50, 0.7) is None, "thirty times nothing is little"
    assert spike(0.7, [0.01] * 50, 0.7) == pytest.approx(70)
    assert spike(5.0, [-1.0] * 50, 0.7) is None
    noisy = [0.01] * 90 + [0.75] * 10
    assert spike(0.8, noisy, 0.7) is None, "eighty times the median, and as often seen"
    assert spike(1.6, noisy, 0.7) == pytest.approx(160)


def jumps(patch: pytest.MonkeyPatch, step: int) -> None:
    """The loss that update ``step`` reports is fifty times what it is."""
    real = Trainer.backward
    patch.setattr(Trainer, "backward", lambda self: real(self) * (50.0 if self.state.step + 1 == step else 1.0))


def test_a_spike_is_said_and_the_run_goes_on(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed before and resumed says it too, and ends with the same checkpoint to the byte."""
    jumps(monkeypatch, 15)
    whole, run = poison.train(ftune_inside, tmp_path / "whole", "train.steps=16")
    assert "the loss jumped at step 15" in whole.ok().err and whole.err.count("jumped") == 1
    with monkeypatch.context() as patch:
        at_step(patch, 14, lambda trainer: (_ for _ in ()).throw(MachineError("lightning", where="here")))
        poison.train(ftune_inside, tmp_path / "killed", "train.steps=16")[0].fails(5)
    resumed = ftune_inside("train", f"resume={tmp_path / 'killed/run'}").ok()
    assert "the loss jumped at step 15" in resumed.err
    for name in ("metrics.jsonl", "checkpoints/last/state.json", "checkpoints/last/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "killed/run" / name).read_bytes()


def test_a_spike_can_end_the_run_and_be_passed_over(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps(monkeypatch, 15)
    ran, run = poison.train(ftune_inside, tmp_path, "train.steps=16", "train.on_spike=stop")
    error = ran.fails(4)
    assert "the loss jumped at step 15" in error[0] and "train.on_spike=stop" in error[1] and "resume" in error[2]
    assert (run / "checkpoints/last").resolve().name == "step-00000012"
    assert json.loads((run / "status.json").read_text())["state"] == "diverged"
    assert len((run / "crash/updates.jsonl").read_text().splitlines()) == 15
    ftune_inside("train", f"resume={run}", "train.on_spike=warn").fails(2)
    ftune_inside("train", f"resume={run}", "train.on_spike=warn", "resume_allow=[train.on_spike]").ok()


BACK = ("train.steps=16", "train.on_spike=rewind", "train.epochs=3")


def bad_batches(patch: pytest.MonkeyPatch, *places: int) -> None:
    """These batches of the data make the loss jump, whichever update they come in; the first is 0."""
    real = Trainer.backward
    patch.setattr(Trainer, "backward", lambda self: real(self) * (50.0 if self.state.step + self.state.left_out in places else 1.0))


def test_a_spike_is_gone_back_from(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the checkpoint before; on with later rows; the same to the byte after a kill on either side of the return."""
    bad_batches(monkeypatch, 14)
    rows: dict[int, list[int]] = {}
    step = Trainer.step

    def noting(self: Trainer) -> None:
        rows[self.state.step + 1] = self.rows_of(self.state.step).tolist()
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", noting)
        whole, run = poison.train(ftune_inside, tmp_path / "whole", *BACK)
    assert "the loss jumped at step 15" in whole.ok().err and "back to step 12, and on without the rows since then" in whole.err
    trainer_rows = {at: sorted(indices) for at, indices in rows.items()}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", noting)
        rows.clear()
        poison.train(ftune_inside, tmp_path / "plain", "train.steps=19", "train.on_spike=warn", "train.epochs=3")[0].ok()
    assert [trainer_rows[at] for at in range(13, 17)] == [sorted(rows[at + 3]) for at in range(13, 17)]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(1, 17))
    for name, at in (("before", 14), ("after", 13)):
        home, met = tmp_path / name, iter(range(1, 3))
        with monkeypatch.context() as patch:
            times = 1 if name == "before" else 2

            def lightning(trainer: Trainer, met: Any = met, times: int = times) -> None:
                if next(met) == times:
                    raise MachineError("lightning", where="here")

            at_step(patch, at, lightning)
            poison.train(ftune_inside, home, *BACK)[0].fails(5)
        resumed = ftune_inside("train", f"resume={home / 'run'}").ok()
        assert "back to step 12" in resumed.err
        for file in ("metrics.jsonl", "checkpoints/last/state.json", "checkpoints/last/model.safetensors"):
            assert (run / file).read_bytes() == (home / "run" / file).read_bytes(), (name, file)
    ftune_inside("train", f"resume={run}", "train.save_every=3").fails(2)


def test_returns_have_an_end(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        jumps(patch, 15)
        ran, run = poison.train(ftune_inside, tmp_path / "again", *BACK)
    assert "it went back 3 times already" in ran.fails(4)[0] and ran.err.count("back to step 12, and on") == 3
    assert (run / "checkpoints/last").resolve().name == "step-00000012"
    jumps(monkeypatch, 15)
    ran, _ = poison.train(ftune_inside, tmp_path / "none", *BACK, "train.save_every=100")
    assert "there is no checkpoint to go back to yet" in ran.fails(4)[0]


def test_where_a_jump_would_go_back_to_is_kept(ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many best ones come after it; at the end it goes as others do."""
    bad_batches(monkeypatch, 14)
    keys = (*BACK, "train.steps=26", "train.log_every=1", "train.save_every=5", "train.keep=0", "train.eval_every=1")
    ran, run = poison.train(ftune_inside, tmp_path, *keys)
    assert "back to step 10, and on" in ran.ok().err
    assert {path.name for path in (run / "checkpoints").glob("step-*")} <= {
        (run / "checkpoints/best").resolve().name,
        (run / "checkpoints/last").resolve().name,
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("field", "second"), [(None, 20), (None, 19), ("scheduled", 20), ("good", 19), ("returns", 20), ("left_out", 20)])
def test_a_run_that_went_back_resumes_exactly_and_not_without_any_field(
    field: str | None, second: int, ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_batches(monkeypatch, 14, second)  # update 15; after that return, update 17 is batch 19, and 18 is 20
    keys = (*BACK, "train.steps=20")
    with monkeypatch.context() as patch:
        at_step(patch, 17, lambda trainer: (_ for _ in ()).throw(MachineError("lightning", where="here")))
        run = poison.train(ftune_inside, tmp_path / "killed", *keys)[1]
    assert (run / "checkpoints/last").resolve().name == "step-00000016", "saved after the return"
    whole = poison.train(ftune_inside, tmp_path / "whole", *keys)[1]
    if field is not None:
        real = checkpoint.load_state
        monkeypatch.setattr(building.checkpoint, "load_state", lambda path: {k: v for k, v in real(path).items() if k != field})
    ran = ftune_inside("train", f"resume={run}")
    files = ("metrics.jsonl", "checkpoints/last/state.json", "checkpoints/last/model.safetensors")
    same = ran.code == 0 and all((run / file).read_bytes() == (whole / file).read_bytes() for file in files)
    assert same is (field is None), ran.err
