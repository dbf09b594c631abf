"""One run's pieces put together, and what the loop does with them: an update, a scoring, a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import record_function

from finetune_cli import console, metrics, models, randomness
from finetune_cli.batching import BatchPlan, epoch_order, micro_batches
from finetune_cli.checkpoint import Knowledge, Saver, load_state, load_weights
from finetune_cli.config.choices import OnSpike
from finetune_cli.config.schema import OptimizerConfig, TrainSection
from finetune_cli.device import DevicePlan, no_room_for_one_row, out_of_memory
from finetune_cli.engine import verify
from finetune_cli.engine.ahead import Ahead, Update, helps
from finetune_cli.engine.flight import Recorder
from finetune_cli.engine.inference import Inferred, Labelled, infer
from finetune_cli.engine.objective import plain
from finetune_cli.engine.optimizer import Updater, learning_rate
from finetune_cli.engine.profile import DATA, UPDATE, Profile
from finetune_cli.engine.timetable import State, Timetable
from finetune_cli.errors import UserError
from finetune_cli.run import Run
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Layout, Task
from finetune_cli.world import Alone


@dataclass(slots=True, kw_only=True)
class Trainer:
    """The pieces of one run, built in one visible place (``commands/train.py``) and passed on."""

    task: Task[Any]
    model: nn.Module
    train: Labelled
    validation: Labelled | None
    config: TrainSection
    optimizer: OptimizerConfig
    timetable: Timetable
    plan: BatchPlan
    device: DevicePlan
    layout: Layout
    run: Run
    saver: Saver
    world: Alone
    profile: Profile = field(default_factory=Profile)
    state: State = field(default_factory=State)
    updater: Updater = field(init=False)
    flight: Recorder = field(init=False)
    lengths: np.ndarray = field(init=False)
    ahead: Ahead = field(init=False)
    _epochs: dict[int, list[np.ndarray]] = field(init=False, default_factory=dict)
    loss: torch.Tensor = field(init=False)
    _saved: tuple[int, bool] = field(init=False, default=(-1, True))
    _head_of: int = field(init=False, default=-1)
    _totals: tuple[int, dict[str, float]] = field(init=False, default=(-1, {}))
    promised: list[str] = field(init=False, default_factory=list)
    """What the checkpoint that the run goes on from says of its next rows."""
    _witnessed: tuple[int, torch.Tensor] | None = field(init=False, default=None)
    _has_room: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.updater = Updater(self.model, self.optimizer, clip=self.config.clip, device=self.device.device, scaler=self.device.scaler())
        self.lengths = self.train.examples.lengths()
        self.loss = torch.zeros((), device=self.device.device)
        self.ahead = Ahead(self._batches)
        self.flight = Recorder(self.device.memory_mb, self.timetable.log)

    # -- one update ----------------------------------------------------------------------------
    def rows_of(self, step: int) -> np.ndarray:
        """Indices of the examples of update ``step`` (from 0), behind those that were left out."""
        epoch, place = divmod(step + self.state.left_out, self.timetable.per_epoch)
        order = self._epochs.get(epoch)
        if order is None:
            order = epoch_order(self.lengths, plan=self.plan, seed=self.config.seed, epoch=epoch)
            self._epochs = {**{e: o for e, o in self._epochs.items() if e == epoch - 1}, epoch: order}  # ``ahead`` may be in the next one
        return order[place]

    def step(self) -> None:
        """One update over ``train.batch_size`` rows, in as many micro-batches as the plan says; memory that runs out halves them.

        Of several processes each takes its part of the rows; the update is that of the whole batch.
        """
        lr = learning_rate(self.optimizer, self.state.step, self.timetable.total)
        noted = self.flight.begin(self.state.step + 1, self.rows_of(self.state.step), lr)
        noted.loss = loss = self.backward()
        try:
            with record_function(UPDATE):
                self.updater.update(lr, step=self.state.step + 1, loss=loss)
        finally:
            noted.norms = self.updater.norms
        self.flight.end(noted)
        if self.state.step == self._saved[0]:
            self._witnessed = self.state.step + 1, loss
        self.loss += loss
        self.state.step += 1
        self.state.loss_steps += 1
        self.state.closed = False

    def backward(self) -> torch.Tensor:
        """Gradients of the next update, of all processes; returns the whole batch's loss, [], on the device."""
        rows = self.world.part(self.rows_of(self.state.step), self.lengths)
        while True:
            try:
                return self.world.sum_gradients(self.updater.parameters, self.gradients(rows))
            except Exception as error:
                self.updater.drop_gradients()
                if not out_of_memory(error):
                    raise
                longest = int(self.lengths[rows].max())
                if len(micro_batches(rows, self.lengths, plan=self.plan)) == len(rows) or self.plan.whole:
                    raise no_room_for_one_row(longest, self.device) from error
                self.plan = self.plan.halved()
                console.warn(
                    f"out of memory at step {self.state.step + 1}: {self.plan.micro_tokens} tokens at a time from here on; "
                    f"the batch stays {self.plan.batch_size} rows and the mathematics the same"
                )

    def gradients(self, rows: np.ndarray) -> torch.Tensor:
        """Sum the gradients of this process's rows of one batch; returns their part of its loss, on the device."""
        self.model.train()
        with record_function(DATA):
            batches = self._batches_now(rows)
        weights = self._weights(batches)
        total = torch.zeros((), device=self.device.device)
        for number, batch in enumerate(batches):
            self.world.check()
            torch.manual_seed(randomness.key(self.config.seed, "dropout", self.state.step, number, *filter(None, [self.world.rank])))
            total += self.propagate(batch, weights)
        return total

    def propagate(self, batch: Batch, weights: dict[str, float]) -> torch.Tensor:
        """Add the gradients of one micro-batch, its loss divided by ``weights``; returns that loss, on the device."""
        first = torch.zeros((), device=self.device.device)
        for turn, sums in enumerate(plain(self.task, self.device)(self.model, batch)):
            # rows without anything to learn from weigh 0, and their sum is 0
            loss = torch.stack([value / (weights[name] or 1.0) for name, value in sums.items()]).sum()
            scaler = self.updater.scaler
            torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
            if turn == 0:
                first = loss.detach()
        return first

    def _weights(self, batches: list[Any]) -> dict[str, float]:
        """The loss's denominators: sums over the whole batch, asked of the other processes once an update."""
        if self._totals[0] != self.state.step:
            weights: dict[str, float] = {}
            for batch in batches:
                for name, weight in batch.weights.items():
                    weights[name] = weights.get(name, 0.0) + weight
            self._totals = (self.state.step, self.world.totals(weights))
        return self._totals[1]

    def _batches_now(self, rows: np.ndarray) -> list[Batch]:
        """The micro-batches of this update, on the device; where it pays, those of the next are begun."""
        step, plan, task = self.state.step, self.plan, self.task
        made = self.ahead.take(Update(step, rows, plan, task))
        if made is None:
            made = [self.batch(part).to(self.device.device) for part in micro_batches(rows, self.lengths, plan=plan)]
        if helps(self.device.device) and step + 1 < self.timetable.total:
            self.ahead.begin(lambda: Update(step + 1, self.world.part(self.rows_of(step + 1), self.lengths), plan, task))
        return made

    def _batches(self, update: Update) -> list[Batch]:
        """The micro-batches of any update, on the device: read from any thread."""
        parts = micro_batches(update.rows, self.lengths, plan=update.plan)
        return [self._collated(update.task, update.step, part).to(self.device.device) for part in parts]

    def batch(self, part: np.ndarray) -> Batch:
        """Some examples as a micro-batch of the next update, on the CPU."""
        return self._collated(self.task, self.state.step, part)

    def _collated(self, task: Task[Any], step: int, part: np.ndarray) -> Batch:
        examples = self.train.examples.take(part)
        assert self.train.targets is not None, "training rows are labelled"
        key = randomness.key(self.config.seed, "collate", step)
        return task.collate(examples.columns, self.train.targets[examples.row], self.layout, key=key)

    def next_rows(self) -> list[str]:
        """Digests of the next two updates' rows: their indices, tokens and targets. A checkpoint promises them to the run that goes on."""
        coming = range(self.state.step, min(self.state.step + 2, self.timetable.total))
        return [verify.rows_digest(self.train, self.rows_of(step)) for step in coming]

    def testify(self, *, read: bool) -> None:
        """Put the loss of the first update after a checkpoint on record, once it can be ``read`` without waiting for the device."""
        if self._witnessed is None or not read:
            return
        (step, loss), self._witnessed = self._witnessed, None
        if self.world.leads and math.isfinite(value := float(loss)):
            self.run.record_witness(step, {"loss": value.hex(), "grounds": verify.grounds(self.device, self.plan)})

    def check(self) -> None:
        """Raise if a signal has come to this process."""
        self.world.stop.check()

    # -- scoring and saving --------------------------------------------------------------------
    def settle_head(self) -> None:
        """Let the task fit its head to the training rows as the model sees them now, where gradients do not train it.

        Once a step; a stop does not interrupt it, because what a stop saves needs the head.
        """
        task = self.task.fitting_head()
        if task is None or self._head_of == self.state.step:
            return
        inferred = self.infer(task, self.train, check=self.world.check if self.world.size > 1 else lambda: None)
        task.fit_head(self.model, Evaluation(inferred.outputs, self.train.targets, self.config.seed, inferred.rows))
        self._head_of = self.state.step

    def scores(self, data: Labelled) -> dict[str, float]:
        """Loss and the task's metrics on the validation rows, with the facts that they settle."""
        self.settle_head()
        world, inferred = self.world, self.infer(self.task, data, check=self.world.pause)
        assert data.targets is not None and inferred.loss is not None
        evaluation = Evaluation(inferred.outputs, data.targets, self.config.seed, inferred.rows)
        if (facts := world.share(self.task.settle(evaluation))) is not None:
            self.know(facts)
        return world.share({"loss": inferred.loss, **self.task.metrics(evaluation)})

    def infer(self, task: Task[Any], data: Labelled, *, check: Callable[[], None]) -> Inferred:
        """Run the model as it is over some rows, in every process its share."""
        return infer(task, self.model, data, layout=self.layout, plan=self.plan, device=self.device, check=check, world=self.world)

    def go_by(self, plan: BatchPlan) -> None:
        """Go on with other micro-batches, and say so in every later checkpoint."""
        self.plan, knowledge = plan, self.saver.knowledge
        self.saver = replace(self.saver, knowledge=replace(knowledge, plan={**knowledge.plan, "batches": plan.saved()}))

    def know(self, facts: Facts) -> None:
        """Go on with other facts, which every later checkpoint holds."""
        self.task = self.task.knowing(facts)
        self.saver = replace(self.saver, knowledge=replace(self.saver.knowledge, facts=facts))

    def is_best(self, scores: dict[str, float]) -> bool:
        """Note a scoring: whether it is the best so far. NaN never is, and counts as no improvement."""
        name = self.config.monitor or self.task.monitor
        value = scores[name]
        sign = 1.0 if metrics.better(name) == "max" else -1.0
        if not math.isfinite(value):
            console.warn(f"validation {name} is not finite at step {self.state.step}: it counts as no improvement")
        improved = math.isfinite(value) and (self.state.best is None or sign * value > sign * self.state.best)
        if improved:
            self.state.best, self.state.best_step, self.state.misses = value, self.state.step, 0
        else:
            self.state.misses += 1
        return improved

    def save(self, *, best: bool) -> None:
        """Commit weights and state as of now: in the background, from a copy."""
        self.updater.raise_if_bad()
        self.settle_head()
        if self.world.leads:
            self.state.loss_sum = float(self.loss)
            self.state.metrics_bytes = self.run.metrics_bytes(durable=False)
            self.state.metrics_sha256 = self.run.metrics_sha256(self.state.metrics_bytes)
            self.state.plan = self.plan.saved()
            state = {**self.state.saved(), "optimizer": self.updater.state(), "next_rows": self.next_rows()}
            with self.world.patience():
                held = self.state.good if self._may_go_back and not self.state.finished else 0
                first = self.run.metrics_bytes
                self.saver.save(self.state.step, self.model, state, best=best, last=self.state.finished, first=first, held=held)
        self._saved = (self.state.step, self.state.closed)

    def room_on_disk(self) -> tuple[int, int, int]:
        """Bytes that the run will need, that are free, and that the exported model takes; raises MachineError where they are too few."""
        of_checkpoint, of_model = models.bytes_on_disk(self.model)
        held = of_checkpoint if self._may_go_back else 0
        return *self.run.store.preflight(of_checkpoint, other_bytes=of_model + held), of_model

    @property
    def _may_go_back(self) -> bool:
        return self.config.on_spike == OnSpike.rewind

    def make_room(self) -> None:
        """After the first update the optimizer is as large as it gets: what a copy of it needs is made ready beside the next ones."""
        early = self.timetable.saves_early(scores=self.validation is not None)
        if not self._has_room and self.world.leads and early:
            self.saver.make_room(self.model, {"optimizer": self.updater.state()})
        self._has_room = True

    def finish_saves(self) -> None:
        """Wait until the checkpoint that is being written is whole."""
        with self.world.patience():
            self.saver.join()

    def save_where_stopped(self) -> None:
        """Commit the state between two updates, unless that very state is on disk already (perhaps as the best)."""
        if self._saved != (self.state.step, self.state.closed):
            self.save(best=self.validation is None)

    def go_back(self) -> None:
        """To the last checkpoint whose loss was good, in every process; the rows of the updates since then are left out from here on."""
        state, world = self.state, self.world
        was, returns, left_out, name = state.step, state.returns + 1, state.left_out, f"step-{state.good:08d}"
        self.finish_saves()
        world.gather(name)  # it is whole
        there = self.run.store.named(name)
        known, saved = Knowledge.read(there), load_state(there)
        assert known is not None, "a checkpoint of ours says what it knows"
        load_weights(there, self.task, self.model, self.saver.adapter)
        self.know(known.facts)
        self.restore(saved)
        state.good, state.returns, state.left_out = state.step, returns, left_out + was - state.step
        self._totals, self._head_of, self._witnessed = (-1, {}), -1, None
        if world.leads:
            self.run.store.rewind(state.step)
            self.run.cut_metrics(state.metrics_bytes)
            self.run.cut_witness(state.step)

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; the model's weights are loaded already. Raises ValueError and its like where it does not fit."""
        self.updater.load(saved["optimizer"])
        for name in State.__slots__:
            if name in saved:
                setattr(self.state, name, saved[name])
        self.promised = list(saved.get("next_rows", []))
        self.plan = BatchPlan(**self.state.plan)
        if self.state.step > self.timetable.total:
            told = f"the run is at step {self.state.step} already, and is to end with step {self.timetable.total}"
            raise UserError(told, where="train.steps, train.epochs", fix="more of them, or eval and predict with the run as it is")
        if self.state.step < 0 or self.state.metrics_bytes < 0:
            raise ValueError(f"step {self.state.step} of {self.timetable.total}")
        self.loss.fill_(self.state.loss_sum)
        self._saved = (self.state.step, self.state.closed)
