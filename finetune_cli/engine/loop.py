"""The training loop: the only one. ``fit`` says in plain sight when it logs, scores, saves and stops; ``Trainer.step`` is one update.

A run is a function of its config, data and plan: order and dropout are keyed by the step, the learning rate is computed from it, and
what remains (moments, running sums, best score, patience) is the checkpoint's state. So a run killed anywhere and resumed is the same run.
"""

from __future__ import annotations

from finetune_cli import console
from finetune_cli.engine import numbers
from finetune_cli.engine.clock import Clock
from finetune_cli.engine.optimizer import learning_rate
from finetune_cli.engine.timetable import State, Timetable
from finetune_cli.engine.trainer import Trainer
from finetune_cli.errors import Diverged, Stopped

__all__ = ["State", "Timetable", "Trainer", "close_step", "fit"]


def fit(trainer: Trainer) -> None:
    """Train to the end of the timetable, or until patience runs out. A signal saves and raises Stopped.

    Checkpoints are written in the background; when this returns or raises, none is being written any more.
    """
    t, state = trainer.timetable, trainer.state
    clock = Clock(trainer)
    with console.Progress(t.total, start=state.step) as progress, trainer.saver.finishing(), trainer.ahead, trainer.profile:
        try:
            if not state.closed or (t.total == 0 and not state.finished):
                close_step(trainer, clock, progress)
            while state.step < t.total and not state.finished:
                trainer.saver.look()
                with trainer.profile.update():
                    trainer.step()
                trainer.make_room()
                clock.count(trainer.rows_of(state.step - 1), trainer.lengths)
                progress.update(state.step, state.step / t.per_epoch)
                trainer.testify(read=trainer.updater.host_looks or t.due(state.step, t.log))
                close_step(trainer, clock, progress)
            trainer.finish_saves()
        except Stopped:
            trainer.updater.drop_gradients()
            trainer.save_where_stopped()
            trainer.finish_saves()
            console.warn(f"saved step {state.step}")
            raise
        except Diverged:
            trainer.updater.drop_gradients()
            raise


def close_step(trainer: Trainer, clock: Clock, progress: console.Progress) -> None:
    """What happens after an update: log, score, record, save, stop early. Done again as a whole where a resume finds it undone."""
    t, state = trainer.timetable, trainer.state
    record: dict[str, float] = {}
    best = trainer.validation is None
    log, score = t.due(state.step, t.log), t.due(state.step, t.score) and trainer.validation is not None
    scores: dict[str, float] = {}
    if log:
        trainer.updater.raise_if_bad()
        if state.loss_steps:
            record["train/loss"] = float(trainer.loss) / state.loss_steps
            record["train/lr"] = learning_rate(trainer.optimizer, state.step - 1, t.total)
        clock.stop()  # the device has caught up: reading the loss waited for it
        if state.loss_steps:
            clock.show(progress, record)
            if numbers.judge(trainer, record["train/loss"]):
                trainer.go_back()
                progress.phase("")
                clock.go_on()
                return
    if score:
        assert trainer.validation is not None
        trainer.updater.raise_if_bad()
        progress.phase("scoring validation rows")
        scores = trainer.scores(trainer.validation)
        best = trainer.is_best(scores)
        name = trainer.config.monitor or trainer.task.monitor
        console.say(f"step {state.step}: validation {name} {scores[name]:.4f}{', the best so far' * best}")
    if log:
        if state.loss_steps:
            numbers.note(state, record["train/loss"])
        state.good = state.scheduled
        trainer.loss.zero_()
        state.loss_steps = 0
    record |= {f"validation/{name}": value for name, value in scores.items()}
    if record and trainer.world.leads:
        trainer.run.record(state.step, {"epoch": round(state.step / t.per_epoch, 6), **record})
        clock.record()
    patience = trainer.config.patience
    if score and patience is not None and state.misses >= patience:
        state.finished = True
        console.say(f"stopped at step {state.step}: {patience} scorings without a better {trainer.config.monitor or trainer.task.monitor}")
    state.finished = state.finished or state.step == t.total
    if score and state.finished:
        numbers.refuse_no_best(trainer, scores["loss"])
    state.closed = True
    if t.due(state.step, t.save):
        state.scheduled = state.step
        state.good = state.step if log else state.good
    if t.due(state.step, t.save) or (score and best) or state.finished:
        progress.phase("saving")
        trainer.save(best=best)
    if log and trainer.world.leads:
        trainer.run.set_status("running", step=state.step)
    progress.phase("")
    clock.go_on()
