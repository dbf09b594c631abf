"""``ftune VERB --help`` and the README's table of options, both made from the schema.

The text under each option in the source is its help; it is read with ``ast``, so that it stands in one place only.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from finetune_cli.config.files import configs_dir, groups_in
from finetune_cli.config.grammar import flags
from finetune_cli.config.judge import shown
from finetune_cli.config.options import Option, Tasks, options, options_of, plain
from finetune_cli.config.schema import SCHEMAS, TaskConfig, condition_parts

FLAGS = """\
  -m, --multirun          a job for every combination of values: train.seed=1,2,3 (in runs/sweeps/ID/N)
  --cfg job               show the composed config and stop; -p SECTION shows one section
  --info defaults-tree    show which YAML files are composed
  --config-dir DIR        add a folder of your own groups and experiments
  --config-path DIR       the same, and DIR wins over ftune's own
  --hydra-help            flags and groups of Hydra itself
"""
USAGE = {
    "train": "ftune train [key=value ...] [+exp=NAME] [flags]",
    "check": "ftune check [key=value ...] [+exp=NAME] [flags]",
    "eval": "ftune eval RUN [key=value ...] [flags]",
    "replay": "ftune replay RUN [step=N] [flags]",
    "predict": "ftune predict RUN [input=FILE] [key=value ...] [flags]",
}


def documented(cls: type) -> dict[str, str]:
    """Field to the text under it, for one options class and what it inherits."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        body = _classes(inspect.getfile(base))[base.__name__]
        for statement, below in itertools.pairwise(body):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


@functools.cache
def _classes(file: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def meanings(cls: type, prefix: str = "") -> dict[str, str]:
    """Dotted key to its help, for an options class and its sections."""
    hints, docs = typing.get_type_hints(cls), documented(cls)
    found: dict[str, str] = {}
    for f in fields(cls):
        kind = hints[f.name]
        if isinstance(kind, type) and is_dataclass(kind):
            found |= meanings(kind, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = docs.get(f.name, "")
    return found


def help_text(verb: str, summary: str, tasks: Tasks, arguments: list[str]) -> str:
    """Everything that can be set for a verb."""
    folder = flags(arguments).get("--config-dir") or flags(arguments).get("--config-path")
    folders = [configs_dir(), *([Path(folder).expanduser()] if folder else [])]
    table = options_of(verb, tasks)
    width = min(shutil.get_terminal_size((110, 24)).columns, 130)
    parts = [f"usage: {USAGE[verb]}\n\n{summary[0].upper()}{summary[1:]}.\n", _groups(verb, folders, table, tasks)]
    parts.append("Options (key, default, meaning)\n" + "\n".join(_options(verb, tasks, width)) + "\n")
    parts.append("Flags\n" + FLAGS)
    return "\n".join(parts)


def _groups(verb: str, folders: list[Path], table: dict[str, Option], tasks: Tasks) -> str:
    groups = groups_in(folders)
    here = {key.split(".")[0] for key in table}
    ours = {key.split(".")[0] for schema in SCHEMAS.values() for key in options(schema)}
    rows = [f"  task       {', '.join(tasks)}"]
    rows += [f"  {name:10} {', '.join(choices)}" for name, choices in groups.items() if name in here or name not in ours | {"exp"}]
    text = "Groups (choose with GROUP=NAME)\n" + "\n".join(rows) + "\n"
    if verb in ("train", "check"):
        rows = [f"  {name:14} {_first_comment(folders, name)}".rstrip() for name in groups.get("exp", [])]
        text += "\nExperiments (add with +exp=NAME)\n" + "\n".join(rows) + "\n"
    return text


def _first_comment(folders: list[Path], experiment: str) -> str:
    """What an experiment's file says of itself: its first comment that is no ``# @package``."""
    path = next(path for folder in folders if (path := folder / "exp" / f"{experiment}.yaml").is_file())
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line), "")


def _options(verb: str, tasks: Tasks, width: int) -> Iterator[str]:
    section = None
    for key, option, meaning in _ordered(SCHEMAS[verb], tasks):
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            yield ""
        text = meaning.replace("``", "")
        head = f"  {key} = {default_text(option)}"
        yield from _row(head, text + _bounds(option), width)


def _ordered(schema: type, tasks: Tasks) -> Iterator[tuple[str, Option, str]]:
    """(key, option, meaning) in the order of the schema; those of tasks where the section ``task`` stands."""
    texts = meanings(schema)
    for key, option in options(schema).items():
        yield key, option, texts.get(key, "")
        if key == "task.name":
            yield from _of_tasks(tasks)


def _of_tasks(tasks: Tasks) -> Iterator[tuple[str, Option, str]]:
    """The tasks' own options and which tasks have them; a key that means something else to another task comes once for each meaning."""
    shared = documented(TaskConfig)
    found: dict[str, dict[str, tuple[Option, list[str]]]] = {}
    for task, cls in tasks.items():
        texts = meanings(cls, "task.")
        for key, option in options(cls, "task.").items():
            if key.removeprefix("task.") not in shared:
                found.setdefault(key, {}).setdefault(texts[key], (option, []))[1].append(task)
    for key, by_meaning in found.items():
        for text, (option, owners) in by_meaning.items():
            yield key, option, f"({', '.join(owners)}) {text}"


def default_text(option: Option) -> str:
    """The default as one would write it."""
    value = plain(option.default)
    if value == "???":
        return "(required)" if option.key == "ckpt" else "(chosen by task=)"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else shown(value)


def _bounds(option: Option) -> str:
    """Choices, range and condition in words."""
    notes = []
    if "|" in option.type_name and "false" not in option.type_name:
        notes.append(option.type_name.removesuffix(" or null"))
    names = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
    numbers = [f"{word} {option.metadata[key]}" for key, word in names.items() if option.metadata.get(key) is not None]
    notes += [", ".join(numbers)] if numbers else []
    if option.metadata.get("applies"):
        key, sign, values = condition_parts(option.metadata["applies"])
        notes.append(f"only with {key}{': ' if sign == '=' else ' above '}{values.replace('|', ', ')}")
    return f" [{'; '.join(notes)}]" if notes else ""


def _row(head: str, text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, max(width - 42, 30)) or [""]
    if len(head) <= 40:
        return [f"{head:42}{lines[0]}".rstrip(), *(" " * 42 + line for line in lines[1:])]
    return [head, *(" " * 42 + line for line in lines)]


def options_table(tasks: Tasks) -> str:
    """Every option of every verb as a Markdown table, for the README."""
    rows: dict[tuple[str, str], tuple[Option, str, list[str]]] = {}
    for verb, schema in SCHEMAS.items():
        for key, option, text in _ordered(schema, tasks):
            one = (key, text if key.startswith("task.") else "")
            rows.setdefault(one, (option, text, []))[2].append(verb)
    lines = ["| option | type | default | verbs | meaning |", "|---|---|---|---|---|"]
    for (key, _), (option, text, verbs) in rows.items():
        cells = [f"`{key}`", option.type_name, f"`{default_text(option)}`", ", ".join(verbs), (text + _bounds(option)).replace("``", "`")]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
