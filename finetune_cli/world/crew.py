"""How followers come to be: started by the leader on its own machine, or by ``torchrun`` (or Slurm) beside it."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from finetune_cli import console
from finetune_cli.errors import STOPS, Exit, FtuneError, UserError
from finetune_cli.world.alone import Stopping
from finetune_cli.world.group import Group, Lost

JOIN_SECONDS = 20.0
"""How long the leader waits for followers that have nothing left to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among those that were started from outside."""

    rank: int
    size: int
    local_rank: int


class Unhurried:
    """The signals of a follower: none; the leader is asked to stop and tells the others."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.advice = ""

    def check(self) -> None:
        """Raise where the leader has been asked to stop."""
        if self.name is not None:
            raise Lost


class Crew:
    """Followers that this process has started; each of them calls ``module.follow(world)``."""

    def __init__(self, size: int, module: str) -> None:
        self.size = size
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody is on another machine
        self.store = _own_store()
        spawn = multiprocessing.get_context("spawn")
        self.processes = [
            spawn.Process(target=_follow, args=(self.store.port, rank, size, module), name=f"ftune {rank}") for rank in range(1, size)
        ]
        with _signals_held():  # a follower begins with them held, until it can leave them to the leader
            for process in self.processes:
                process.start()

    def lead(self, stop: Stopping) -> Group:
        """Meet the followers."""
        try:
            return Group(stop, rank=0, size=self.size, local_rank=0, store=self.store, crew=self)
        except BaseException:
            self.kill()
            raise

    def join(self) -> None:
        """Wait for the followers' end."""
        until = time.monotonic() + JOIN_SECONDS
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every follower that is still there."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join(JOIN_SECONDS)

    def told(self, *, patience: float = 1.0) -> str | None:
        """How a follower ended that said nothing; each gets ``patience`` seconds to be gone."""
        for rank, process in enumerate(self.processes, 1):
            process.join(patience)
            code = process.exitcode
            if code is not None and code < 0:
                return f"process {rank} of {self.size} was lost (signal {-code}: {signal.Signals(-code).name})"
            if code:
                return f"process {rank} of {self.size} ended by itself (exit code {code})"
        return None


def _own_store() -> TCPStore:
    """A store that only this machine reaches: torch's own socket would listen on every network, and what comes through is unpickled."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        port = listening.getsockname()[1]
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def _follow(port: int, rank: int, size: int, module: str) -> None:
    """The life of a follower that the leader started."""
    _leave_signals_to(signal.SIG_IGN)
    _release_signals()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever reads the leader's stdout must see it end with the leader
    console.mute()
    try:
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    except Exception:  # noqa: BLE001  # the leader is gone already
        os._exit(Exit.MACHINE)
    code = _following(module, rank=rank, size=size, local_rank=rank, store=store)
    os._exit(code)  # nothing of ours is left to do, and nothing else may be waited for


def follow_if_outside(module: str) -> None:
    """Does not return in a follower that was started beside the leader: this is its life. Until they meet a signal ends it; then the
    leader is asked.
    """
    place = outside()
    if place is None or place.rank == 0:
        return
    console.mute()
    _leave_signals_to(signal.SIG_DFL)
    raise SystemExit(_following(module, rank=place.rank, size=place.size, local_rank=place.local_rank, store=_store(place)))


def lead_outside(place: Place, stop: Stopping) -> Group:
    """Meet the followers that were started beside this process."""
    return Group(stop, rank=0, size=place.size, local_rank=place.local_rank, store=_store(place))


def _store(place: Place) -> Store:
    store, _, _ = next(iter(rendezvous("env://", place.rank, place.size)))
    return PrefixStore("ftune", store)


def _leave_signals_to(whom: signal.Handlers) -> None:
    for number in STOPS:
        signal.signal(number, whom)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that ask to stop wait for the end of the block; in processes that it starts, until ``_release_signals``."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        _release_signals()


def _release_signals() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _following(module: str, *, rank: int, size: int, local_rank: int, store: Store) -> int:
    """Do what a verb's followers do; the exit code. Every end but the common one is told to the leader, which speaks for all."""
    try:
        world = Group(Unhurried(), rank=rank, size=size, local_rank=local_rank, store=store)
        _leave_signals_to(signal.SIG_IGN)
        importlib.import_module(module).follow(world)
    except Lost as error:
        return int(error.code or 0)
    except FtuneError as error:
        said = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
        code = error.code
    except BaseException as error:  # noqa: BLE001  # a bug, which the leader reports
        said, code = {"traceback": "".join(traceback.format_exception(error))}, Exit.BUG
    else:
        return int(Exit.DONE)
    with contextlib.suppress(RuntimeError):  # the leader may be gone
        store.set(f"end/{rank}", json.dumps(said))
    return int(code)


def outside() -> Place | None:
    """The place that ``torchrun`` (or whoever sets its variables) gave this process; None where it was started alone."""
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return None
    told = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    if not all(number.isdigit() for number in told):
        raise UserError(f"the processes are not numbered: {told}", where="RANK, WORLD_SIZE, LOCAL_RANK", fix="start them with torchrun")
    rank, size, local = map(int, told)
    return Place(rank, size, local) if size > 1 else None
