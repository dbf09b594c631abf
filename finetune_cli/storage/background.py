"""Work beside the main thread, one piece at a time: what fails there is kept, and raised where the main thread asks."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """One thread at most, and none once ``join`` has returned: nothing is lost, and nothing is left at the end of a process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin ``work`` as soon as what was begun before has ended; raises what that raised instead."""
        self.join()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  (whatever it is, the main thread must hear of it)
                self._error = error

        self._thread = threading.Thread(target=run, name=self.name)
        self._thread.start()

    def look(self) -> None:
        """Raise what the work raised, if it has ended so; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.join()

    def join(self) -> None:
        """Wait for the work, and raise what it raised: once."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
