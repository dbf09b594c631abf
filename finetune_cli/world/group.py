"""Several processes over ``torch.distributed``: NCCL between GPUs, gloo between CPUs and for everything small.

The gradient is summed once an update, after all micro-batches, over one flat buffer; losses are divided by the weights of the whole batch
before, so that the sum is the gradient of the batch however its rows are dealt out.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store

from finetune_cli import errors
from finetune_cli.errors import Exit, FtuneError, MachineError
from finetune_cli.world.alone import Alone, Stopping
from finetune_cli.world.watch import Watch

if TYPE_CHECKING:
    from finetune_cli.world.crew import Crew

T = TypeVar("T")

FOREVER = timedelta(days=30)
"""Collectives do not time out by themselves: the watch knows a slow process from a lost one."""
NOTE_BYTES = 1024
"""Room for what one process tells the others at each update."""


LONG = b"long"
"""In place of a note that has no room."""


class Lost(SystemExit):
    """A follower has lost its leader: there is nobody to tell."""

    def __init__(self) -> None:
        super().__init__(int(Exit.MACHINE))


class Group(Alone):
    """A world of several processes."""

    def __init__(self, stop: Stopping, *, rank: int, size: int, local_rank: int, store: Store, crew: Crew | None = None) -> None:
        super().__init__(stop)
        self.rank, self.size, self.local_rank, self.store, self.crew = rank, size, local_rank, store, crew
        self.device = torch.device("cpu")
        self._slots: _Slots | None = None
        self._untrained: frozenset[int] = frozenset()
        store.set(f"pid/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self.watch = Watch(store.clone(), rank=rank, size=size)  # type: ignore[attr-defined]
        self.watch.start()
        with self._meeting():
            try:
                self._wait_for_all()
            except BaseException:
                self.watch.stop()
                raise
            dist.init_process_group("gloo", store=PrefixStore("group", store), rank=rank, world_size=size, timeout=FOREVER)
        self._cpu: Any = dist.group.WORLD
        self._fast = self._cpu

    def _wait_for_all(self) -> None:
        """Until every process has come. What follows waits beyond the reach of signals, and for a process that has died on the way."""
        everybody = [f"pid/{rank}" for rank in range(self.size)]
        while not self.store.check(everybody):
            self.stop.check()
            if self.crew is not None and (how := self.crew.told(patience=0.0)) is not None:
                raise MachineError(how, where=f"device.processes={self.size}", fix=self.stop.advice)
            time.sleep(0.02)

    def on(self, device: torch.device) -> None:
        """Gradients and weights will be on ``device``; every process says so with its own."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            with self._meeting():
                self._fast = dist.new_group(backend="nccl", timeout=FOREVER)

    # -- stopping ------------------------------------------------------------------------------
    def check(self) -> None:
        """A sign of life; whether to stop is agreed on once an update, in ``totals``."""
        self.watch.beat()

    def pause(self) -> None:
        """Raise if a signal has come to this process or to the leader; ``infer`` tells the others."""
        self.watch.beat()
        if self.stop.name is None and not self.leads:
            self.stop.name = self.watch.leader_stops
        elif self.leads and self.stop.name is not None:
            self.store.set("stop", self.stop.name)
        self.stop.check()

    # -- exchanges -----------------------------------------------------------------------------
    def part(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Every ``size``-th row, counted from the longest, so that every process gets as many tokens."""
        return rows[np.argsort(-lengths[rows], kind="stable")][self.rank :: self.size]

    def totals(self, weights: dict[str, float]) -> dict[str, float]:
        """Sums over all processes, by name. Raises in every process alike where a signal has come to one."""
        notes = self._notes({"weights": weights, "stop": self.stop.name})
        agreed = next((note["stop"] for note in notes if note["stop"]), None)
        if agreed is not None:  # else a signal that came during the exchange waits for the next one: no other process knows of it
            self.stop.name = agreed
            self.stop.check()
        found: dict[str, float] = {}
        for note in notes:
            for name, weight in note["weights"].items():
                found[name] = found.get(name, 0.0) + weight
        return found

    def _notes(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        """Everybody's note, by rank: one exchange of a fixed size, a second one only where a note is long."""
        text = json.dumps(note).encode()
        if len(text) > NOTE_BYTES:
            text = LONG
        mine = torch.frombuffer(bytearray(text.ljust(NOTE_BYTES)), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with self._meeting():
            dist.all_gather(every, mine, group=self._cpu)
        told = [bytes(part.numpy()).strip() for part in every]
        return self.gather(note) if LONG in told else [json.loads(part) for part in told]

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Add up the gradients of all processes, in place; returns the sum of their losses, [].

        A parameter that has no gradient in one process counts as 0 there; one that has none in any process at the first update is left
        alone, as one process would leave it.
        """
        if self._slots is None:
            without = frozenset(i for i, p in enumerate(parameters) if p.grad is None)
            self._untrained = frozenset.intersection(*self.gather(without))
            trained = [p for i, p in enumerate(parameters) if i not in self._untrained]
            self._slots = _Slots(trained, self.device)
        late = next((i for i in self._untrained if parameters[i].grad is not None), None)
        if late is not None:
            raise MachineError(
                "a weight got its first gradient in the middle of training, which several processes cannot agree on",
                where=f"device.processes={self.size}",
                fix="device.processes=1",
            )
        slots = self._slots
        slots.fill(loss)
        with self._meeting():
            dist.all_reduce(slots.flat, group=self._fast)
        return slots.hand_out()

    def share(self, value: T) -> T:
        """The leader's value, to everybody."""
        box: list[Any] = [value if self.leads else None]
        with self._meeting():
            dist.broadcast_object_list(box, src=0, group=self._cpu, device=torch.device("cpu"))
        shared: T = box[0]
        return shared

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, to everybody."""
        found: list[Any] = [None] * self.size
        with self._meeting():
            dist.all_gather_object(found, value, group=self._cpu)
        return found

    def same(self, model: nn.Module) -> None:
        """Give everybody the leader's weights and buffers."""
        with torch.no_grad(), self._meeting():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.uint8, torch.int8, torch.bool):
                    whole = tensor.data.contiguous()
                    dist.broadcast(whole, src=0, group=self._fast if whole.device.type == self.device.type else self._cpu)
                    if whole.data_ptr() != tensor.data_ptr():
                        tensor.data.copy_(whole)

    # -- the end -------------------------------------------------------------------------------
    @contextmanager
    def patience(self) -> Iterator[None]:
        """The others wait for what happens in the block, however long it takes."""
        self.watch.patient = True
        try:
            yield
        finally:
            self.watch.patient = False
            self.watch.beat()

    def close(self) -> None:
        """The common work is done: the leader goes on alone."""
        self.share("done")
        self.watch.stop()
        dist.destroy_process_group()
        if self.crew is not None:
            self.crew.join()

    def abandon(self) -> None:
        """The common work has failed: nobody goes on, and nobody waits."""
        self.watch.stop()
        if self.crew is not None:
            self.crew.kill()

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """A block in which the processes wait for each other; a process that does not come is told as what happened to it."""
        self.watch.waiting = True
        try:
            yield
        except FtuneError:
            raise
        except RuntimeError as error:
            raise self._told(error) from error
        finally:
            self.watch.waiting = False
            self.watch.beat()

    def _told(self, error: RuntimeError) -> BaseException:
        """Why the others are not there: what one of them said, how it ended, or what the network says."""
        if not self.leads:
            return Lost()
        self.watch.stop()
        end = self.watch.said_at_the_end()
        if end is not None:
            rank, said = end
            kind = getattr(errors, said.get("kind", ""), None)
            if isinstance(kind, type) and issubclass(kind, FtuneError):
                return kind(said["what"], where=said["where"], fix=said["fix"])
            return RuntimeError(f"process {rank} of {self.size} failed:\n{said.get('traceback', '')}")
        how = self.watch.verdict or (self.crew.told() if self.crew is not None else None)
        if how is None:
            how = f"the processes lost touch: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return MachineError(how, where=f"device.processes={self.size}", fix=self.stop.advice)


class _Slots:
    """One flat buffer for the gradients of all trained parameters and, at its end, the loss."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes) + 1, dtype=torch.float32, device=device)
        *parts, self.loss = torch.split(self.flat, [*sizes, 1])
        self.views = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def fill(self, loss: Tensor) -> None:
        """Copy gradients and loss into the buffer."""
        there = [(view, p.grad) for view, p in zip(self.views, self.parameters, strict=True) if p.grad is not None]
        for view, p in zip(self.views, self.parameters, strict=True):
            if p.grad is None:
                view.zero_()
        if there:
            torch._foreach_copy_([view for view, _ in there], [gradient for _, gradient in there])
        self.loss.fill_(0.0).add_(loss)

    def hand_out(self) -> Tensor:
        """Let every parameter's gradient be its part of the buffer; returns the summed loss, []."""
        for view, p in zip(self.views, self.parameters, strict=True):
            p.grad = view if p.dtype == view.dtype else view.to(p.dtype)
        summed: Tensor = self.loss[0].clone()
        return summed
