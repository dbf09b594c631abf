"""Work shared among the cores: each worker is a fork that takes every so-many-th piece; what it finds comes back as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def shared(pieces: Sequence[Any], work: Callable[[Path, Sequence[Any]], Any], *, cores: int) -> list[Any]:
    """``work(home, pieces)`` in ``cores`` forks, each with a folder of its own; the results. A worker that fails ends all."""
    with tempfile.TemporaryDirectory(prefix="ftune-reliability-") as folder:
        children = {}
        for number in range(cores):
            file = Path(folder) / f"{number}.json"
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    home = Path(folder) / str(number)
                    home.mkdir()
                    file.write_text(json.dumps(work(home, pieces[number::cores])), encoding="utf-8")
                    code = 0
                except BaseException:  # noqa: BLE001  # nothing may go on in the fork
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children[child] = file
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        if failed:
            raise RuntimeError("a worker of the harness failed; it said why above")
        return [json.loads(file.read_text(encoding="utf-8")) for file in children.values()]
