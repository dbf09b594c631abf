"""Run a program until its first optimizer step, write when that was, and end it there.

    python scripts/bench/first_step.py FILE -m finetune_cli train …
    python scripts/bench/first_step.py FILE SCRIPT.py …

The moment is seen by a hook of torch on every optimizer, set when torch is imported: the same for every program, which knows nothing of it.
FILE gets the system's monotonic clock (which is one for all processes) and the seconds of processor time that the process has used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import runpy
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

WATCHED = "torch.optim.optimizer"


def main() -> None:
    file, program, *rest = sys.argv[1:]
    finder = Finder(Path(file))
    if WATCHED in sys.modules:
        finder.set_hook(sys.modules[WATCHED])
    else:
        sys.meta_path.insert(0, finder)
    if program == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [program, *rest], str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


class Finder(importlib.abc.MetaPathFinder):
    """Sets the hook as soon as torch's optimizers are imported."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.set_hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def set_hook(self, optimizer: ModuleType) -> None:
        optimizer.register_optimizer_step_post_hook(self.stepped)

    def stepped(self, *_: Any) -> None:
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.file.write_text(json.dumps({"clock": time.monotonic(), "cpu_seconds": time.process_time()}), encoding="utf-8")
        os._exit(0)


if __name__ == "__main__":
    main()
