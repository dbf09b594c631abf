"""From a verb's arguments to its call: judge the whole command first, then let Hydra run it, once or as a sweep.

``Job`` is what Hydra calls, in this process or in a launcher's worker; importing this module connects the config to the floors above it.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from finetune_cli import collector
from finetune_cli.cli import tell
from finetune_cli.config import Invocation, saved_run
from finetune_cli.config.compose import Composed, Place, compose, composer, judged, read_line, register
from finetune_cli.config.explain import explain
from finetune_cli.config.files import configs_dir
from finetune_cli.config.grammar import ACTIONS, CommandLine, hidden_files, quote
from finetune_cli.config.judge import Problem, together
from finetune_cli.errors import Exit, UserError
from finetune_cli.tasks import recognise, task_configs


@functools.cache
def _found(search: str, name: str, root: str) -> saved_run.Found:
    """The files of a run or model. Hydra composes a config several times; a checkpoint is searched and verified once.

    A run to go on with, or to replay, may have no checkpoint yet, or a damaged one: only its config is asked for here.
    """
    from finetune_cli.run import Found, Run, find  # only where a run is named: a config error answers sooner

    if search == "ckpt":
        return find(name, root=root)
    given = Path(name).expanduser().absolute()
    for folder in (given, given.parent.parent):
        if Run.exists(folder):
            return Found(weights=given, run=folder, config=Run.open(folder).config_path, kind="run", checkpoint=None)
    try:
        found = find(name, root=root)
    except UserError as error:
        raise UserError(error.what, where=f"command line: {search}={name}", fix=error.fix) from error
    if found.run is None or found.config is None:
        raise UserError(f"{search}={name} is no run", where=f"command line: {search}", fix="name a directory that ftune train made")
    return found


saved_run.SavedRun.find = staticmethod(_found)
saved_run.SavedRun.tasks = staticmethod(task_configs)
saved_run.SavedRun.recognise = staticmethod(recognise)


_STOPS = (Exit.PREEMPTED, Exit.INTERRUPTED, Exit.PIPE_CLOSED)


class JobFailed(Exception):
    """A job of a sweep failed in another process; it said why there."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class Job:
    """One call of the verb with a composed config. Its errors are printed here; a sweep goes on after them."""

    place: Place
    module: str
    typed: tuple[str, ...]
    debug: bool
    """Whether the user asked for tracebacks."""
    process: int = field(default_factory=os.getpid)
    codes: list[int] = field(default_factory=list)
    """Exit codes of the jobs that ran in the process that started them."""

    def __call__(self, config: DictConfig) -> float | None:
        score, code = self._guarded(config)
        if code in _STOPS:  # no further job of a sweep either
            raise SystemExit(code)
        if os.getpid() == self.process:
            self.codes.append(code)
        elif code:
            raise JobFailed(code)
        return score

    def _guarded(self, config: DictConfig) -> tuple[float | None, int]:
        try:
            return self._run(config), int(Exit.DONE)
        except BrokenPipeError:
            return None, int(Exit.PIPE_CLOSED)
        except SystemExit as error:
            return None, error.code if isinstance(error.code, int) else int(error.code is not None)
        except Exception as error:  # noqa: BLE001  # a bug in a verb is one short message too, whatever it is
            return None, tell(error, debug=self.debug)

    def _run(self, config: DictConfig) -> float | None:
        settings = HydraConfig.get()
        os.chdir(settings.runtime.cwd)
        composed = self._judged(config, settings)
        swept = settings.mode == RunMode.MULTIRUN
        sweep_dir = str(settings.runtime.output_dir) if swept else None
        invocation = Invocation(
            verb=self.place.verb,
            typed=self.typed,
            experiment=composed.experiment,
            user_set=composed.user_set,
            multirun=swept,
            sweep_dir=sweep_dir,
            config_yaml=composed.config_yaml,
        )
        verb = importlib.import_module(self.module)
        collector.wake()
        result = verb.run(composed.config, invocation)
        sys.stdout.flush()
        return result if isinstance(result, float) else None

    def _judged(self, config: DictConfig, settings: DictConfig) -> Composed:
        tree = config.copy()
        OmegaConf.set_struct(tree, False)
        if settings.mode == RunMode.MULTIRUN and self.place.verb == "train":
            OmegaConf.update(tree, "run.dir", str(settings.runtime.output_dir))
        tree["hydra"] = settings
        composed, problems = judged(GlobalHydra.instance().hydra, self.place, tree, task_configs())
        if composed is None:
            raise together(problems)
        return composed


def start(verb: str, module: str, arguments: list[str]) -> int:
    """Run a verb's command line; its exit code. Raises FtuneError for what is wrong before a job begins."""
    _found.cache_clear()
    tasks = task_configs()
    line, place = read_line(verb, arguments, tasks)
    register(place, tasks)
    if line.multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep cannot run under torchrun", where="command line: --multirun", fix="start one torchrun per setting")
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
    with _hydra_raises(), composer(place) as composing:
        try:
            sweep = _check(line, place, composing)
        except Exception as error:
            raise _understood(error, place, line) from error
        _say_hidden(place)
        job = Job(place, module, (verb, *arguments), debug)
        try:
            return _launch(line, place, job, sweep, composing)
        except JobFailed as error:
            return error.code
        except Exception as error:
            failed = next((code for code in job.codes if code), None)
            if failed is not None:
                return failed  # a sweeper that gives up after a job that has said why
            raise _understood(error, place, line) from error


def _understood(error: Exception, place: Place, line: CommandLine) -> Exception:
    """The user's mistake behind Hydra's error, with the other mistakes found so far; else the error itself."""
    told = explain(error, place)
    if told is None:
        return error
    if not line.problems or not isinstance(told, UserError) or told is error:
        return told
    return together([*line.problems, Problem(told.what, told.where, told.fix)])


def _check(line: CommandLine, place: Place, composing: Hydra) -> Path | None:
    """Judge every job of the command before anything is made; the sweep's directory if it is a sweep."""
    if any(flag in line.flags for flag in ("--hydra-help", "--shell-completion")):
        return None
    showing = any(flag in line.flags for flag in ("--cfg", "--info"))
    root, problems, configs = "runs", list(line.problems), []
    for overrides in _jobs(line, composing):
        composed, found = compose(composing, place, overrides, task_configs(), complete=not showing and not line.problems)
        problems += found
        root = composed.config.run.root if composed else root
        configs += [composed.config] if composed else []
    if line.multirun and line.value("run.dir") is not None and place.verb == "train":
        fix = "leave it out: a sweep's jobs are in runs/sweeps/ID/N (hydra.sweep.dir moves them)"
        problems.append(Problem("run.dir names one directory, and a sweep has many runs", "command line: run.dir", fix))
    if line.multirun:
        problems += _written_twice(configs, drawn=len(configs) == 1 or line.value("hydra/sweeper") is not None)
    if problems:
        raise together(problems)
    return Path(root).expanduser().absolute() / "sweeps" if line.multirun else None


def _written_twice(configs: list[Any], *, drawn: bool) -> list[Problem]:
    """Files that more than one job would write (``drawn``: the sweeper or YAML makes more jobs than the command line tells)."""
    problems = []
    for key in ("output", "ledger"):
        named = [os.path.realpath(name) for config in configs if (name := getattr(config, key, None)) is not None]
        if len(set(named)) < len(named) or (named and drawn):
            what = f"{key} names one file, and several jobs of the sweep would write it: only the last would be left"
            fix = f"name it by the keys that are swept, such as {key}='out-${{data.max_length}}.jsonl', or start each job alone"
            problems.append(Problem(what, f"command line: {key}", fix))
    return problems


def _jobs(line: CommandLine, composing: Hydra) -> list[list[str]]:
    """The overrides of every job. Of a sweeper that draws its values, one job without them."""
    if not line.multirun:
        return [line.overrides]
    swept, fixed = [], []
    for override in OverridesParser.create(config_loader=composing.config_loader).parse_overrides(line.overrides):
        if override.is_sweep_override() and override.is_discrete_sweep():
            key = override.get_key_element()
            swept.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():
            fixed.append(str(override.input_line))
    return [[*fixed, *point] for point in itertools.product(*swept)]


def _launch(line: CommandLine, place: Place, job: Job, sweeps: Path | None, composing: Hydra) -> int:
    """Hand over to Hydra: one job as it was composed, anything else to Hydra's own command line."""
    if not composing.config_loader.sweeps and not any(flag in line.flags for flag in (*ACTIONS, "--hydra-help")):
        composing.run(place.config_name, job, line.overrides)
        return next((code for code in job.codes if code), int(Exit.DONE))
    GlobalHydra.instance().clear()
    arguments, directory = line.arguments(), None
    if sweeps is not None and line.value("hydra.sweep.dir") is None:
        directory = _new_directory(sweeps)
        arguments.append(f"hydra.sweep.dir={quote(str(directory))}")
    sys.argv = ["ftune" if "--shell-completion" in line.flags else f"ftune {place.verb}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=place.folders[0][1], config_name=place.config_name)(job)()
    finally:
        if directory is not None:
            _prune(directory)
    return next((code for code in job.codes if code), int(Exit.DONE))


def _new_directory(sweeps: Path) -> Path:
    """``sweeps/2026-11-22_0331``, or with ``-2`` …: never one that another sweep has."""
    stamp = f"{datetime.now():%Y-%m-%d_%H%M}"
    for number in itertools.count(1):
        path = sweeps / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            what = f"cannot make the sweep's directory: {error.strerror}"
            raise UserError(what, where=str(path), fix="choose another run.root") from error
        return path
    raise AssertionError("counting does not end")


def _prune(directory: Path) -> None:
    """Take away what a sweep left empty: jobs that made no run, and a sweep without any."""
    for path in [*directory.iterdir()] if directory.is_dir() else []:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if directory.is_dir() and {path.name for path in directory.iterdir()} <= {"multirun.yaml"}:
        (directory / "multirun.yaml").unlink(missing_ok=True)
        for folder in (directory, directory.parent, directory.parent.parent):
            if not any(folder.iterdir()):
                folder.rmdir()


def _say_hidden(place: Place) -> None:
    for provider, folder in place.folders:
        for path in hidden_files(Path(folder), configs_dir()) if provider == "command-line" else []:
            print(f"warning: {path} is hidden by ftune's own; rename it, or use --config-path", file=sys.stderr)


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra raise to us instead of printing and leaving with 1; put back what it changes."""
    root, argv, full = logging.getLogger(), sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    handlers, level, here = root.handlers[:], root.level, os.getcwd()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.raiseExceptions = False  # a stdout that is full is told once, at the end (``streams.whole``)
    try:
        yield
    finally:
        sys.argv, root.handlers[:], root.level, logging.raiseExceptions = argv, handlers, level, True
        GlobalHydra.instance().clear()
        os.chdir(here)
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full
