"""Whether the other processes are alive: each gives a sign of life every second, and one that stays silent is lost.

A stopped process (SIGSTOP, a dead machine) gives no sign at all. A hung one gives signs, but its work does not go on while others wait for
it. Time is counted in this process's own seconds, so that a whole job that was suspended and woken up is not taken for a dead one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from finetune_cli.errors import Exit

TICK = 1.0
"""Seconds between two signs of life."""
SILENT = 25
"""Ticks without a sign after which a process is lost."""
HUNG = 45
"""Ticks in which a process that others wait for does nothing; at least three times its longest work so far."""
HUNG_AT_FIRST = 600
"""The same before its first piece of work is done: a device may be warming up."""


@dataclass(slots=True)
class _Seen:
    """What was last read of a process: its sign, its count of finished pieces of work, and for how many ticks they have not changed."""

    sign: str = ""
    beats: int = -1
    silent: int = 0
    idle: int = 0
    longest: int = 0


class Watch(threading.Thread):
    """Gives this process's signs of life and reads those of the others: the leader all, a follower the leader's."""

    def __init__(self, store: Any, *, rank: int, size: int) -> None:
        super().__init__(name="ftune watch", daemon=True)
        self.store, self.rank, self.size = store, rank, size
        self.waiting = self.patient = False
        self.verdict: str | None = None
        """How a process was lost, once one is."""
        self.leader_stops: str | None = None
        """The signal that the leader has got."""
        self._beats = self._ticks = 0
        self._over = threading.Event()
        self._seen = {other: _Seen() for other in (range(1, size) if rank == 0 else [0])}
        self._sign()

    def beat(self) -> None:
        """A piece of work is done."""
        self._beats += 1

    def stop(self) -> None:
        """No more watching."""
        self._over.set()

    def run(self) -> None:
        """Until ``stop``; a follower that has lost its leader ends here, whatever it is doing."""
        while not self._over.wait(TICK):
            try:
                self.look()
            except Exception:  # noqa: BLE001  # the store is gone, and with it the leader
                if self._over.is_set() or self.rank == 0:
                    return
                os._exit(Exit.MACHINE)

    def look(self) -> None:
        """One tick: give a sign, read those of the others, act on a process that is lost."""
        self._sign()
        if self.rank and self.leader_stops is None and self.store.check(["stop"]):
            self.leader_stops = self.store.get("stop").decode()
        for other, seen in self._seen.items():
            if not self.store.check([f"life/{other}"]):
                continue
            told = self._judged(other, seen, self.store.get(f"life/{other}").decode())
            if told is not None:
                self._end(other, told)
                return

    def _sign(self) -> None:
        self._ticks += 1
        state = "patient" if self.patient else "waiting" if self.waiting else "working"
        self.store.set(f"life/{self.rank}", f"{self._ticks} {self._beats} {state}")

    def _judged(self, other: int, seen: _Seen, sign: str) -> str | None:
        """How ``other`` is lost, if it is."""
        _, beats, state = sign.split()
        seen.silent = 0 if sign != seen.sign else seen.silent + 1
        if int(beats) != seen.beats or state != "working":
            if seen.beats > 0:
                seen.longest = max(seen.longest, seen.idle)
            seen.beats, seen.idle = int(beats), 0
        elif self.waiting:
            seen.idle += 1
        seen.sign = sign
        if seen.silent >= SILENT:
            return f"process {other} of {self.size} has given no sign of life for {SILENT * TICK:.0f} s"
        limit = max(HUNG, 3 * seen.longest) if seen.beats > 2 else HUNG_AT_FIRST
        if self.rank == 0 and seen.idle >= limit:
            return f"process {other} of {self.size} hangs: the others have waited {limit * TICK:.0f} s for it"
        return None

    def _end(self, other: int, told: str) -> None:
        """Make sure that a lost process is dead, so that whoever waits for it learns of it."""
        if self.rank:
            os._exit(Exit.MACHINE)
        self.verdict = told
        host, pid = self.store.get(f"pid/{other}").decode().rsplit(" ", 1)
        if host == socket.gethostname():
            os.kill(int(pid), signal.SIGKILL)
            self._over.set()
        else:  # out of reach, and whoever waits for it cannot be woken
            os.write(2, f"error: {told}\nwhere: {host}\nfix: look after that machine, then resume\n".encode())
            os._exit(Exit.MACHINE)

    def said_at_the_end(self, seconds: float = 3.0) -> tuple[int, dict[str, Any]] | None:
        """(rank, what it said) of a process that ended with a word; a dying one gets a moment to say it."""
        until = time.monotonic() + seconds
        while self.verdict is None:
            for other in self._seen:
                if self.store.check([f"end/{other}"]):
                    said: dict[str, Any] = json.loads(self.store.get(f"end/{other}"))
                    return other, said
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        return None
