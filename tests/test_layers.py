"""The floors: an import only goes down, and the heavy or composed libraries stay in the rooms that own them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "finetune_cli"
FLOORS = [
    "said collector",
    "errors",
    "config storage machine randomness",
    "device world run metrics baselines data encoded word_table console corpora",
    "tasks",
    "models adapters pooling packing batching snapshot",
    "checkpoint",
    "engine report",
    "commands",
    "cli",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
OUTSIDE = {"__init__", "__main__", "reload_check"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Every module that a file imports, anywhere in it, ``from x import y`` as ``x.y``; not what only type checkers see."""
    names = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        child for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    if here in OUTSIDE:
        return
    assert here in FLOOR, f"{here} stands on no floor"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "finetune_cli" and len(parts) > 1 and parts[1] in FLOOR:
            assert FLOOR[parts[1]] <= FLOOR[here], f"{here} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[parts[1]]})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_hydra_stays_with_the_config(path: Path) -> None:
    if room(path) in ("config", "cli"):
        return
    assert not [n for n in imported(path) if n.split(".")[0] in ("hydra", "omegaconf")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_outside_tasks_imports_a_task(path: Path) -> None:
    if room(path) == "tasks":
        return
    allowed = {"base", "sections", "tasks", "task_configs", "get", "recognise"}
    for name in imported(path):
        if name.startswith("finetune_cli.tasks."):
            assert name.split(".")[2] in allowed, name


def test_nobody_outside_tasks_names_a_task() -> None:
    from finetune_cli.tasks import tasks

    named = {
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value}"
        for path in FILES
        if room(path) != "tasks"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in tasks()
    }
    assert not named


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_pickle_and_nothing_evaluated(path: Path) -> None:
    banned = {"pickle", "joblib", "shelve", "dill", "cloudpickle", "marshal"}
    assert not [n for n in imported(path) if n.split(".")[0] in banned]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "yaml.load", "hydra.utils.instantiate", "instantiate"), called
            assert not any(k.arg == "allow_pickle" and getattr(k.value, "value", False) for k in node.keywords), called


def test_every_option_is_read() -> None:
    """An option that nothing reads would be a lie; reading is an attribute access by its name outside the schema."""
    from finetune_cli.config.schema import SCHEMAS, TaskConfig, leaves
    from finetune_cli.tasks import task_configs

    read: set[str] = set()
    for path in FILES:
        if path.name == "schema.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
                read |= {n.value for n in ast.walk(node.args[1]) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    read |= {"validation", "test", "train"}  # read by the name of the split
    wanted = {key for schema in SCHEMAS.values() for key, _, _ in leaves(schema())}
    wanted |= {
        f"task.{name}"
        for task in task_configs().values()
        for name in task.__dataclass_fields__
        if name not in TaskConfig.__dataclass_fields__
    }
    assert sorted(key for key in wanted if key.rpartition(".")[2] not in read) == []
