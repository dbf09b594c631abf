"""The inference loop: the only one. Evaluation while training, ``eval`` and ``predict`` all come through here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune_cli import console, models
from finetune_cli.batching import BatchPlan, inference_batches, padded
from finetune_cli.device import DevicePlan, no_room_for_one_row, out_of_memory
from finetune_cli.encoded import Examples, Ragged, Targets
from finetune_cli.errors import Interrupted, Stopped
from finetune_cli.tasks.base import Flat, Layout, Outputs, Task
from finetune_cli.world import Alone

CREW = 8
"""Batches that a CPU works at side by side at most; more of them would wait for the interpreter."""
FLUSH = 32
"""Batches whose outputs stay on the device before they are copied back together."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Examples of a split and, where it is labelled, their targets."""

    examples: Examples
    targets: Targets | None


@dataclass(frozen=True, slots=True)
class Inferred:
    """Outputs answer by answer, the row that each is about, and the mean loss where there were targets."""

    outputs: Outputs
    rows: np.ndarray
    loss: float | None


Result = tuple[dict[str, Tensor | Flat], dict[str, Tensor], dict[str, float]]
"""Of one batch: outputs, loss sums, loss weights."""


def infer(
    task: Task[Any],
    model: nn.Module,
    data: Labelled,
    *,
    layout: Layout,
    plan: BatchPlan,
    device: DevicePlan,
    check: Callable[[], None],
    world: Alone | None = None,
) -> Inferred:
    """Run every example once, longest first, and put the outputs back in order. ``check`` is called between batches and may raise.

    In a ``world`` of several processes each runs its share, and all get everything; a Stopped in one is raised in all.
    """
    was_training = model.training
    model.eval()
    lengths = data.examples.lengths()
    collector = _Collector(len(lengths))

    def run(indices: np.ndarray) -> list[tuple[np.ndarray, Result]]:
        try:
            return [(indices, _batch(task, model, data, indices, layout, device))]
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(indices) == 1:
                raise no_room_for_one_row(int(lengths[indices[0]]), device) from error
            console.warn(f"out of memory with {len(indices)} rows of {padded(int(lengths[indices[0]]))} tokens: trying half as many")
        half = len(indices) // 2
        return [*run(indices[:half]), *run(indices[half:])]

    threads = device.own_threads
    crew = min(threads, CREW) if device.device.type == "cpu" else 1
    batches = inference_batches(lengths, plan=plan, crew=crew * (world.size if world else 1))
    stopped: Stopped | None = None
    try:
        try:
            mine = batches[world.rank :: world.size] if world else batches
            answers = _in_order(run, mine, check, crew=crew, join=partial(_join, device, threads // crew))
            ready = models.ready_products(model, device.device, device.dtype)
            # the other weights are cast once for all batches: the last to leave drops the casts
            with ready, device.autocast(), closing(answers):
                for done in answers:
                    for indices, (outputs, sums, weights) in done:
                        collector.add(indices, outputs, sums, weights)
        except Stopped as error:
            stopped = error
        if world is not None and world.size > 1:
            stopped = collector.meet(world, stopped)
        if stopped is not None:
            raise stopped
        outputs, loss = collector.result()
        return Inferred(*task.gather(outputs, data.examples), loss)
    finally:
        if crew > 1:
            torch.set_num_threads(threads)
        model.train(was_training)


def _in_order(
    run: Callable[[np.ndarray], list[tuple[np.ndarray, Result]]],
    batches: list[np.ndarray],
    check: Callable[[], None],
    *,
    crew: int,
    join: Callable[[], None],
) -> Generator[list[tuple[np.ndarray, Result]]]:
    """Results of batches in their order. A ``crew``, each of whom begins with ``join``, works at several batches at once, so that no
    operator waits for every core.
    """
    if min(crew, len(batches)) < 2:
        for batch in batches:
            check()
            yield run(batch)
        return
    with ThreadPoolExecutor(crew, "infer", initializer=join) as pool:
        waiting: deque[Future[list[tuple[np.ndarray, Result]]]] = deque()
        try:
            for batch in batches:
                check()
                waiting.append(pool.submit(run, batch))
                if len(waiting) > crew:
                    yield waiting.popleft().result()
            while waiting:
                check()
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _join(device: DevicePlan, threads: int) -> None:
    """Begin as one of a crew. Its autocast ends with its thread: the casts are everybody's, and whoever left it would drop them all."""
    torch.set_num_threads(threads)
    device.autocast().__enter__()


@torch.inference_mode()
def _batch(task: Task[Any], model: nn.Module, data: Labelled, indices: np.ndarray, layout: Layout, device: DevicePlan) -> Result:
    """What a batch gives, under the autocast of whoever calls."""
    examples = data.examples.take(indices)
    targets = None if data.targets is None else data.targets[examples.row]
    batch = task.collate(examples.columns, targets, layout, key=0).to(device.device)
    outputs, sums = task.infer(model, batch)
    return outputs, sums, batch.weights


class _Collector:
    """Outputs of batches in any order, kept on the device for a while and then put in place on the host."""

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.outputs: Outputs = {}
        self.flat: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.waiting: list[tuple[np.ndarray, dict[str, Tensor | Flat], dict[str, Tensor]]] = []
        self.placed: list[np.ndarray] = []
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, indices: np.ndarray, outputs: dict[str, Tensor | Flat], sums: dict[str, Tensor], weights: dict[str, float]) -> None:
        self.waiting.append((indices, outputs, sums))
        for name, weight in weights.items():
            self.weights[name] = self.weights.get(name, 0.0) + weight
        if len(self.waiting) >= FLUSH:
            self.flush()

    def flush(self) -> None:
        for indices, outputs, sums in self.waiting:
            self.placed.append(indices)
            for name, output in outputs.items():
                if isinstance(output, Flat):
                    self.flat.setdefault(name, []).append((indices, output.values.cpu().numpy(), output.lengths))
                    continue
                array = output.cpu().numpy()
                if name not in self.outputs:
                    self.outputs[name] = np.empty((self.examples, *array.shape[1:]), array.dtype)
                self.outputs[name][indices] = array
            for name, value in sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.waiting.clear()

    def meet(self, world: Alone, stopped: Stopped | None) -> Stopped | None:
        """Join what every process has; why the first stopped, if one has."""
        self.flush()
        placed = np.concatenate([np.zeros(0, np.int64), *self.placed])
        mine = {name: array[placed] for name, array in self.outputs.items()}
        why = None if stopped is None else (type(stopped).__name__, stopped.what, stopped.where, stopped.fix)
        told = world.gather((why, placed, mine, self.flat, self.sums, self.weights))
        if ends := [end for end, *_ in told if end is not None]:
            name, what, where, fix = ends[0]
            return (Interrupted if name == Interrupted.__name__ else Stopped)(what, where=where, fix=fix)
        self.flat, self.sums, self.weights = {}, {}, {}
        for _, indices, outputs, flat, sums, weights in told:
            for name, array in outputs.items():
                if name not in self.outputs:
                    self.outputs[name] = np.empty((self.examples, *array.shape[1:]), array.dtype)
                self.outputs[name][indices] = array
            for name, parts in flat.items():
                self.flat.setdefault(name, []).extend(parts)
            for total, part in ((self.sums, sums), (self.weights, weights)):
                for name, value in part.items():
                    total[name] = total.get(name, 0.0) + value
        return None

    def result(self) -> tuple[Outputs, float | None]:
        self.flush()
        there = [name for name in self.sums if self.weights[name]]  # a loss that no row has is left out
        loss = sum(self.sums[name] / self.weights[name] for name in there) if there else math.nan if self.sums else None
        return self.outputs | {name: _in_place(parts, self.examples) for name, parts in self.flat.items()}, loss


def _in_place(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], examples: int) -> Ragged:
    """Sequences of batches, each with its (indices, values, lengths), in the order of the examples."""
    order = np.argsort(np.concatenate([indices for indices, _, _ in parts]), kind="stable")
    lengths = np.concatenate([lengths for _, _, lengths in parts])
    offsets = np.zeros(examples + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(np.concatenate([values for _, values, _ in parts]), offsets).take(order)
