"""The judge: nested values in, a config object and every problem out. It knows nothing of Hydra.

One walk over the schema finds unknown keys, wrong types, numbers out of range, options that do not apply and values that are missing, all
at once, so that a user mends a config in one go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from finetune_cli.config.forms import PartError, convert
from finetune_cli.config.options import Option, Tasks, build, near, options, options_of, sections
from finetune_cli.config.schema import SCHEMAS, Experiment, PredictConfig, TaskConfig, applies, condition_parts, out_of_range
from finetune_cli.errors import UserError

SHOWN = 5
"""Problems that one message names; the rest is counted."""
SECRET_KEY = re.compile(
    r"(^|[._-])((auth|access|hub|hf|api)?_?token|api_?key|pass(word|wd)?|secret(_key)?|access_?key|credentials?)$", re.IGNORECASE
)
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|ghp_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16})\b")
SECRET_FIX = "keep it in an environment variable (HF_TOKEN for the hub); what a config holds is saved in the run"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config."""

    what: str
    where: str = ""
    fix: str = ""


def together(problems: list[Problem]) -> UserError:
    """All problems as one error of three lines: the first leads, the others are folded into the same lines."""
    shown = list(dict.fromkeys(problems))
    rest = f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""

    def fold(parts: list[str]) -> str:
        return "; ".join(dict.fromkeys(part for part in parts if part))

    top = shown[:SHOWN]
    return UserError(fold([p.what for p in top]) + rest, where=fold([p.where for p in top]), fix=fold([p.fix for p in top]))


def judge(
    schema: type,
    values: Mapping[str, Any],
    *,
    tasks: Tasks,
    where: Callable[[str], str] = str,
    user_set: Collection[str] = (),
    complete: bool = True,
    groups: Collection[str] = (),
) -> tuple[Any, list[Problem]]:
    """The config object, and what is wrong with the values (the object is None where anything is).

    ``where`` says where a key was set; ``user_set`` are the keys that must apply; ``complete`` asks for what the verb cannot do without;
    ``groups`` are further names that a mistyped key may mean.
    """
    problems: list[Problem] = []
    task = _task(values, tasks, where, complete, problems)
    table = options(schema, task=task)
    flat = _flat(values, table, schema, tasks, where, groups, problems)
    judged: dict[str, Any] = {}
    for key, value in flat.items():
        if value == "???":
            continue
        try:
            judged[key] = convert(value, table[key])
        except PartError as error:
            part = f"{key}.{error.name}"
            problems.append(Problem(f"{part} is {shown(error.found)}; expected {error}", where(part), error.fix))
            continue
        except ValueError as error:
            problems.append(Problem(f"{key} is {shown(value)}; expected {error}", where(key), _example(table[key], str(error))))
            continue
        expected = out_of_range(judged[key], table[key].metadata)
        if expected:
            problems.append(Problem(f"{key} is {shown(value)}; expected {expected}", where(key), f"set {key} {expected}"))
    everything = {key: option.default for key, option in table.items()} | judged
    problems += _not_applying(table, everything, where, user_set)
    if not issubclass(schema, Experiment):
        problems += _fixed_in_training(table, where, user_set)
    if schema is PredictConfig:
        problems += _of_no_input(table, where, user_set)
    if complete:
        problems += _missing(schema, everything, where)
    problems += _together_wrong(everything, where) + _unknown_allowed(everything, table, where)
    return (None if problems else build(schema, judged, task=task)), problems


def shown(value: Any) -> str:
    """A value in a message, short."""
    text = repr(value.value if isinstance(value, Enum) else value) if value is not None else "null"
    return text if len(text) <= 80 else text[:77] + "..."


def _task(
    values: Mapping[str, Any], tasks: Tasks, where: Callable[[str], str], complete: bool, problems: list[Problem]
) -> type[TaskConfig]:
    section = values.get("task")
    name = section.get("name", "???") if isinstance(section, Mapping) else "???"
    if isinstance(name, str) and name in tasks:
        return tasks[name]
    if name != "???":
        hit = near(str(name), list(tasks))
        fix = f"did you mean task={hit[0]}?" if hit else f"choose one of {', '.join(tasks)}"
        problems.append(Problem(f"there is no task {shown(name)}", where("task.name"), fix))
    elif complete and values.get("ckpt") != "???":
        problems.append(Problem("no task is chosen", where("task"), f"set task= to one of {', '.join(tasks)}"))
    return TaskConfig


def _flat(
    values: Mapping[str, Any],
    table: Mapping[str, Option],
    schema: type,
    tasks: Tasks,
    where: Callable[[str], str],
    groups: Collection[str],
    problems: list[Problem],
) -> dict[str, Any]:
    """Values by dotted key; unknown keys, secrets and ``_target_`` become problems."""
    flat: dict[str, Any] = {}
    inner = sections(table)

    def walk(node: Mapping[Any, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if "." in str(name):
                fix = f"write it nested: {key.replace('.', ': {', 1)}: ...}}" if not prefix else "write it nested"
                problems.append(Problem(f"unknown key '{name}': a dot does not nest in YAML", where(key), fix))
            elif key in table:
                flat[key] = value
                problems.extend(_hostile(key, value, where))
            elif key not in inner and isinstance(value, Mapping) and value and not _names_code(name):
                walk(value, key + ".")
            elif key not in inner:
                problems.append(_hidden(key, value, where) or unknown_key(key, schema, tasks, where(key), groups))
            elif isinstance(value, Mapping):
                walk(value, key + ".")
            elif value is not None:
                names = ", ".join(sorted(other for other in table if other.startswith(key + "."))[:3])
                problems.append(Problem(f"{key} is {shown(value)}; expected a section with {names} …", where(key), f"set keys of {key}"))

    walk(values, "")
    return flat


def _hidden(key: str, value: Any, where: Callable[[str], str]) -> Problem | None:
    """The problem with a key that is not merely unknown."""
    if SECRET_KEY.search(key):
        return Problem(f"{key} looks like a secret", where(key), SECRET_FIX)
    return next(iter(_hostile(key, value, where)), None)


def _hostile(key: str, value: Any, where: Callable[[str], str]) -> list[Problem]:
    """Secrets and ``_target_`` anywhere in a value."""
    leaf = key.rpartition(".")[2]
    if _names_code(leaf):
        return [Problem(f"{key}: a config names no code to run", where(key), f"remove {leaf}")]
    if isinstance(value, Mapping):
        return [p for name, item in value.items() for p in _hostile(f"{key}.{name}", item, where)]
    if isinstance(value, (list, tuple)):
        return [p for item in value for p in _hostile(key, item, where)]
    if isinstance(value, str) and SECRET_VALUE.search(value):
        return [Problem(f"the value of {key} looks like a secret", where(key), SECRET_FIX)]
    return []


def _names_code(name: Any) -> bool:
    """``_target_`` and its like."""
    return str(name).startswith("_") and str(name).endswith("_")


def unknown_key(key: str, schema: type, tasks: Tasks, where: str, groups: Collection[str] = ()) -> Problem:
    """The problem with a key that the verb does not have, naming what it may mean."""
    verb = next(name for name, cls in SCHEMAS.items() if cls is schema)
    table = options_of(verb, tasks)
    owners = [name for name in SCHEMAS if name != verb and (key in (other := options_of(name, tasks)) or key in sections(other))]
    owners = [name for name in owners if name != "check"] or owners  # it has what train has
    what = f"unknown key '{key}'"
    if key.split(".")[0] == "exp":
        return Problem(what, where, "begin the experiment's file with '# @package _global_', and add it with +exp=NAME")
    tasks_with = [name for name, task in tasks.items() if key in options(task, "task.")]
    if key in table and tasks_with:
        listed = " or ".join(tasks_with)
        return Problem(f"{what}: it is an option of task {listed}", where, f"leave it out, or task={' or task='.join(tasks_with)}")
    if owners:
        kept = "; it comes with the run" if "ckpt" in table and owners == ["train"] else ""
        return Problem(f"{what} for ftune {verb}", where, f"leave it out: only ftune {' and '.join(owners)} has it{kept}")
    hits = near(key, [*table, *sections(table), *groups])
    named = ["+exp=NAME" if hit == "exp" else hit for hit in hits]
    return Problem(what, where, f"did you mean {' or '.join(named)}?" if hits else f"ftune {verb} --help lists every key")


def _not_applying(
    table: Mapping[str, Option], values: Mapping[str, Any], where: Callable[[str], str], user_set: Collection[str]
) -> list[Problem]:
    problems = []
    for key, option in table.items():
        condition = option.metadata.get("applies", "")
        if key in user_set and condition and not applies(condition, dict(values)):
            other, sign, allowed = condition_parts(condition)
            needed = f"above {allowed}" if sign == ">" else allowed.replace("|", " or ")
            found = shown(values.get(other))
            problems.append(
                Problem(
                    f"{key} is set but does not apply: it needs {other} to be {needed}, and that is {found}",
                    where(key),
                    f"leave {key} out, or set {other} {needed if sign == '>' else 'to ' + allowed.split('|')[0]}",
                )
            )
    return problems


def _fixed_in_training(table: Mapping[str, Option], where: Callable[[str], str], user_set: Collection[str]) -> list[Problem]:
    return [
        Problem(f"{key} is fixed in training: it comes with the model", where(key), f"leave it out, or ftune train {key}=… anew")
        for key, option in table.items()
        if key in user_set and option.metadata.get("training")
    ]


def _of_no_input(table: Mapping[str, Option], where: Callable[[str], str], user_set: Collection[str]) -> list[Problem]:
    return [
        Problem(f"{key} is about labelled splits, and predict labels its input", where(key), "leave it out; input=FILE names the rows")
        for key, option in table.items()
        if key in user_set and option.metadata.get("splits")
    ]


def _missing(schema: type, values: Mapping[str, Any], where: Callable[[str], str]) -> list[Problem]:
    if values.get("ckpt") == "???":
        verb = next(name for name, cls in SCHEMAS.items() if cls is schema)
        return [Problem(f"ftune {verb} needs a run or a model", "ckpt", f"ftune {verb} runs/latest, or ckpt=RUN")]
    if "data.train" in values and "train.epochs" in values and values["data.train"] is None:
        fix = "try +exp=sentiment, or set data.train=FILE"
        return [Problem("there is nothing to train on: data.train is not set", where("data.train"), fix)]
    return []


def _together_wrong(values: Mapping[str, Any], where: Callable[[str], str]) -> list[Problem]:
    """Options that are each fine but not together."""
    problems = []
    if values.get("resume") == "auto" and values.get("run.dir") is None:
        fix = "name the run's directory with run.dir=DIR"
        problems.append(Problem("resume=auto does not know which run to go on with", where("resume"), fix))
    if values.get("optimizer.nesterov") is True and not values.get("optimizer.momentum"):
        problems.append(Problem("optimizer.nesterov needs momentum", where("optimizer.nesterov"), "set optimizer.momentum=0.9"))
    lr, least = values.get("optimizer.lr"), values.get("optimizer.min_lr")
    if lr is not None and least is not None and least > lr > 0:
        what = f"optimizer.min_lr is {least:g}, above optimizer.lr, {lr:g}: the rate would rise"
        problems.append(Problem(what, where("optimizer.min_lr"), "set optimizer.min_lr below optimizer.lr, such as 0"))
    if values.get("device.name") == "cpu" and values.get("device.precision") == "fp16":
        problems.append(Problem("fp16 training needs CUDA", where("device.precision"), "device.precision=bf16, fp32 or auto"))
    if values.get("device.compile") is True and values.get("device.deterministic") is True:
        what = "compiled layers give the same to rounding, and device.deterministic=true promises the same to the bit"
        problems.append(Problem(what, where("device.compile"), "one of the two"))
    if values.get("model.trust_remote_code") is True and not re.fullmatch(r"[0-9a-f]{40}", str(values.get("model.revision"))):
        fix = "set model.revision to the full 40-digit commit hash that you have read"
        problems.append(Problem("model.trust_remote_code runs code from the hub", where("model.trust_remote_code"), fix))
    return problems


def _unknown_allowed(values: Mapping[str, Any], table: Mapping[str, Option], where: Callable[[str], str]) -> list[Problem]:
    """``resume_allow`` names keys; a mistyped one would allow nothing."""
    problems = []
    for key in values.get("resume_allow") or []:
        if key not in table and key not in sections(table):
            hits = near(key, list(table))
            fix = f"did you mean {' or '.join(hits)}?" if hits else "ftune train --help lists every key"
            problems.append(Problem(f"resume_allow names the unknown key '{key}'", where("resume_allow"), fix))
    return problems


def _example(option: Option, expected: str) -> str:
    default = shown(option.default).strip("'")
    return f"for example {option.key}={default}" if option.default not in (None, "???", {}, []) else f"set {option.key} to {expected}"
