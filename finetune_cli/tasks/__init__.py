"""The tasks, one a file; found by looking, so that adding one edits nothing here.

Every module of this package that defines ``TASK`` is a task; other packages add theirs through the entry-point group ``ftune.tasks``,
whose entries name a Task class. Nobody outside this package names a particular task.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from finetune_cli.config.schema import TaskConfig
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Task


@functools.cache
def tasks() -> dict[str, type[Task[Any]]]:
    """Name to task class, sorted by name. Importing a task's module imports neither torch nor NumPy."""
    found: dict[str, type[Task[Any]]] = {}
    for module in pkgutil.iter_modules(__path__):
        task = getattr(importlib.import_module(f"{__name__}.{module.name}"), "TASK", None)
        if task is not None:
            found[task.name] = task
    for entry in entry_points(group="ftune.tasks"):
        task = entry.load()
        if task.name in found:
            raise UserError(f"the task '{task.name}' is defined twice", where=f"entry point {entry.value}", fix=f"uninstall {entry.dist}")
        found[task.name] = task
    return dict(sorted(found.items()))


def task_configs() -> dict[str, type[TaskConfig]]:
    """Name to the dataclass of the task's options."""
    return {name: task.Config for name, task in tasks().items()}


def recognise(model_config: Mapping[str, Any]) -> str:
    """The task of a plain Hugging Face model, told from its config.json by what the tasks say of themselves (``Task.heads``)."""
    architectures = model_config.get("architectures")
    head = str(architectures[0]) if architectures and isinstance(architectures, list) else ""
    shipped = sorted(tasks().items(), key=lambda named: not named[1].__module__.startswith(f"{__name__}."))
    claims = [(name, task) for name, task in shipped if head.endswith(task.heads) and task.recognises(model_config)]
    if claims:
        return max(claims, key=lambda claim: claim[1].precedence)[0]  # the first of equals
    return next(name for name, task in shipped if task.fallback)


def get(name: str) -> type[Task[Any]]:
    """The task called ``name``."""
    if name not in tasks():
        raise UserError(f"there is no task '{name}'", where="task", fix=f"choose one of {', '.join(tasks())}")
    return tasks()[name]
