"""The command ``ftune``: a verb, its arguments, an exit code. Imports nothing heavy; all that composes a config is imported on use.

stdout belongs to results. Every end that ftune foresees is three lines on stderr and its exit code (``errors.Exit``).
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from types import FrameType
from typing import NamedTuple, NoReturn

from finetune_cli import __version__, collector, machine
from finetune_cli.cli.streams import guard, whole
from finetune_cli.errors import STOPS, Exit, FtuneError, MachineError, UserError
from finetune_cli.said import without_secrets


class Verb(NamedTuple):
    """A verb: the module whose ``run(config, invocation)`` does it, and its line in the help."""

    module: str
    summary: str


VERBS = {
    "train": Verb("finetune_cli.commands.train", "fine-tune a model; prints the run directory"),
    "check": Verb("finetune_cli.commands.check", "look at config, data, model, disk and device without training; says what a run would do"),
    "eval": Verb("finetune_cli.commands.evaluate", "score a run or model on labelled rows; prints metrics"),
    "predict": Verb("finetune_cli.commands.predict", "label new rows from a file or standard input; prints JSON Lines"),
    "replay": Verb("finetune_cli.commands.replay", "compute a bad update again and name its row; prints JSON"),
}
HELP = f"""ftune {__version__}: config-driven fine-tuning

usage: ftune VERB [RUN] [key=value ...] [+exp=NAME] [flags]

{chr(10).join(f"  {name:9}{verb.summary}" for name, verb in VERBS.items())}

start here:
  ftune train +exp=sentiment                        train on the shipped reviews, no network needed
  ftune train data.train=my.csv                     train on your own rows
  ftune eval runs/latest                            score what was trained
  ftune predict runs/latest input=new.txt           label new texts

ftune VERB --help lists every option. Shell completion: eval "$(ftune -sc install=bash)"
"""


def entry() -> NoReturn:
    """What the installed command calls."""
    guard()
    collector.rest(until="torch")
    atexit.register(_deaf)
    with _stopped_early():
        try:
            code = main()
            if not code:
                whole()
            sys.stdout.flush()
        except BrokenPipeError:  # ftune train --help | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = int(Exit.PIPE_CLOSED)
        except MachineError as error:  # ftune train --help > /dev/full
            code = tell(error)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's); its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print("ftune: interrupted", file=sys.stderr)
        return int(Exit.INTERRUPTED)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:  # noqa: BLE001  # the last place that can turn a bug into a short message
        return tell(error, debug=os.environ.get("HYDRA_FULL_ERROR") == "1")


def tell(error: Exception, *, debug: bool = False) -> int:
    """Say on stderr how a command ended (of several ranks the first one speaks); its exit code. ``debug`` puts the traceback first."""
    frames = traceback.extract_tb(error.__traceback__)
    known = error if isinstance(error, FtuneError) else machine.fault(error)
    if known is not None:
        lines, code = known.lines(), known.code
    else:
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        fix = "this is a bug of ftune; HYDRA_FULL_ERROR=1 shows the traceback"
        lines, code = UserError(f"{type(error).__name__}: {error}", where=where, fix=fix).lines(), Exit.BUG
    if int(os.environ.get("RANK") or 0) == 0:
        if debug:
            sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
        print("\n".join(lines), file=sys.stderr)
    return int(code)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(HELP)
        return int(Exit.USER)
    verb, *rest = arguments
    if verb in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return int(Exit.DONE)
    if verb in ("--version", "-V") or verb in VERBS and "--version" in rest:
        print("ftune", __version__)
        return int(Exit.DONE)
    if verb in ("-sc", "--shell-completion"):
        return _complete(arguments)
    if verb not in VERBS:
        raise _no_verb(verb)
    if "--help" in rest or "-h" in rest:
        from finetune_cli.config.help import help_text
        from finetune_cli.tasks import task_configs

        sys.stdout.write(help_text(verb, VERBS[verb].summary, task_configs(), rest))
        return int(Exit.DONE)
    from finetune_cli.cli import jobs

    return jobs.start(verb, VERBS[verb].module, rest)


def _no_verb(name: str) -> UserError:
    near = get_close_matches(name, VERBS, 1)
    if near:
        return UserError(f"unknown command '{name}'", where="command line", fix=f"did you mean 'ftune {near[0]}'?")
    return UserError(f"'{name}' is no command; the command comes first", where="command line", fix=f"ftune {' | '.join(VERBS)}")


def _complete(arguments: list[str]) -> int:
    """Shell completion: verbs from here, the rest from Hydra with the verb cut out. Never a traceback into the prompt."""
    from finetune_cli.cli import jobs

    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    try:
        if not any("query" in argument for argument in arguments):
            return jobs.start("train", VERBS["train"].module, ["--shell-completion", *arguments[1:]])
        if len(words) < 2 or len(words) == 2 and not line.endswith(" "):
            print(*[verb for verb in VERBS if verb.startswith((*words, "")[1])])
            return int(Exit.DONE)
        if words[1] in VERBS:
            os.environ["COMP_LINE"] = words[0] + line[line.index(words[1], len(words[0])) + len(words[1]) :]
            return jobs.start(words[1], VERBS[words[1]].module, ["--shell-completion", *arguments[1:]])
    except Exception:  # noqa: BLE001  # anything printed here would land in the user's prompt
        return int(Exit.BUG)
    return int(Exit.DONE)


@contextmanager
def _stopped_early() -> Iterator[None]:
    """Being asked to stop before a verb has put up its own handlers: nothing to save. Exit 75, or 130 after Ctrl-C, and at once: while
    numpy is imported by torch an exception would be lost, and the command would go on.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        interrupted = number == signal.SIGINT
        told = "ftune: interrupted" if interrupted else f"ftune: stopped by {signal.Signals(number).name}"
        os.write(2, f"{told}, with nothing under way\n".encode())
        os._exit(Exit.INTERRUPTED if interrupted else Exit.PREEMPTED)

    free = (signal.SIG_DFL, signal.default_int_handler)
    held = {number: signal.signal(number, stop) for number in STOPS if signal.getsignal(number) in free}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _deaf() -> None:
    """The exit code is decided: a signal during the interpreter's own end would only change it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
