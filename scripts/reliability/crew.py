"""Work shared among the cores: each worker is a fork that takes every so-many-th piece; what it finds comes back as JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Crew:
    """``cores`` workers at a time; the n-th always works in ``folder/n``."""

    cores: int
    folder: Path

    def share(self, pieces: Sequence[Any], work: Callable[[Path, Sequence[Any]], Any]) -> list[Any]:
        """``work(home, its pieces)`` in every worker that gets a piece; what they return. A worker that fails ends all."""
        children = {}
        for number in range(min(self.cores, len(pieces))):
            home, result = self.folder / str(number), self.folder / f"{number}-result.json"
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    home.mkdir(exist_ok=True)
                    result.write_text(json.dumps(work(home, pieces[number :: self.cores])), encoding="utf-8")
                    code = 0
                except BaseException:  # noqa: BLE001  # nothing may go on in the fork
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children[child] = result
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        if failed:
            raise RuntimeError("a worker of the harness failed; it said why above")
        return [json.loads(file.read_text(encoding="utf-8")) for file in children.values()]
