"""How long until ftune answers, and how long until it trains? Seconds by the clock and of processor time, each in a fresh process.

    python scripts/bench/startup.py --data DIR     prints Markdown, writes scripts/results/startup.json
    python scripts/bench/startup.py --imports      which modules the commands import, the slowest first (writes nothing)
    python scripts/bench/startup.py --smoke        seconds, on shipped rows: shows that it works, measures nothing

The first step is seen by a hook of torch on every optimizer, the same on both sides (``first_step.py``): from the start of the process
to the moment at which the first update is made, with reading and tokenising every row, loading the model, forward and backward before it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import peers
import processes
import public_sets
import speed

HOOK = str(Path(__file__).with_name("first_step.py"))
ANSWERS: dict[str, tuple[list[str], int]] = {
    "ftune --help": (["--help"], 0),
    "ftune --version": (["--version"], 0),
    "ftune train optimizer.lrr=1 (a config error)": (["train", "+exp=smoke", "optimizer.lrr=1"], 2),
    "ftune train (nothing said)": (["train"], 2),
}
"""What is typed to what it is and its exit code."""
STEPS = {"trainer": "Trainer: first step", "trainer_best": "Trainer, best flags: first step", "ftune": "ftune train: first step"}


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    if given.imports:
        show_imports(given)
        return
    work = speed.work_of(given)
    steps = harness.without_trainer(list(STEPS), smoke=given.smoke)
    runs = []
    for number, what in harness.interleaved(given.rounds, [*ANSWERS, *steps]):
        found = answer(what) if what in ANSWERS else first_step(what, work)
        runs.append({"what": what, "round": number, **found})
    report(given, work, runs)


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "startup", rounds=7)
    speed.add_options(parser)
    parser.add_argument("--imports", action="store_true", help="where the time of the imports goes, module by module")
    parser.add_argument("--top", type=int, default=25, help="of --imports: how many modules are shown")
    return harness.settle(parser.parse_args(typed), rows=32)


def answer(what: str) -> dict[str, float]:
    """Seconds of a command that only answers."""
    typed, code = ANSWERS[what]
    ended = processes.ftune(*typed, expect=code)
    return {"wall_seconds": ended.wall_seconds, "cpu_seconds": ended.cpu_seconds}


def program(side: str, work: speed.Work) -> list[str]:
    """What trains, as python runs it."""
    if side == "ftune":
        return ["-m", "finetune_cli", "train", *work.overrides(), f"run.root={work.folder / 'runs'}"]
    return processes.job_command(__file__, "train", {"variant": side, **work.told()})[1:]


def first_step(side: str, work: speed.Work) -> dict[str, float]:
    """Seconds from the start of a process to its first update."""
    with tempfile.TemporaryDirectory(prefix="ftune-step-") as folder:
        file = Path(folder) / "step.json"
        began = time.monotonic()
        ended = processes.run([sys.executable, HOOK, str(file), *program(side, work)], env={"FTUNE_CACHE": folder})
        if not file.exists():
            sys.exit(f"{side} made no step that torch's optimizers know of:\n{ended.err}")
        step = json.loads(file.read_text(encoding="utf-8"))
    return {"wall_seconds": step["clock"] - began, "cpu_seconds": step["cpu_seconds"]}


def show_imports(given: argparse.Namespace) -> None:
    """``-X importtime`` of --help, of a config error and of training up to its first step."""
    work = speed.work_of(given)
    with tempfile.TemporaryDirectory(prefix="ftune-step-") as folder:
        commands = {
            "ftune --help": (["-m", "finetune_cli", "--help"], 0),
            "a config error": (["-m", "finetune_cli", "train", "+exp=smoke", "optimizer.lrr=1"], 2),
            "ftune train to its first step": ([HOOK, str(Path(folder) / "step.json"), *program("ftune", work)], 0),
        }
        for told, (command, code) in commands.items():
            ended = processes.run([sys.executable, "-X", "importtime", *command], expect=code, env={"FTUNE_CACHE": folder})
            rows = slowest(ended.err, given.top)
            print(f"### {told}\n\n{harness.readme_tables.markdown(['module', 'with what it imports, ms', 'alone, ms'], rows)}\n")


def slowest(written: str, most: int) -> list[list[str]]:
    """The lines of ``-X importtime`` with the largest sums."""
    found = re.findall(r"^import time:\s+(\d+) \|\s+(\d+) \| *(\S+)", written, re.MULTILINE)
    ordered = sorted(found, key=lambda line: -int(line[1]))[:most]
    return [[name, f"{int(total) / 1000:,.1f}", f"{int(own) / 1000:,.1f}"] for own, total, name in ordered]


def report(given: argparse.Namespace, work: speed.Work, runs: list[dict[str, Any]]) -> None:
    """Medians; of the first step also the ratio."""
    table = []
    own = harness.values(runs, "wall_seconds", what="ftune")
    for what in [*ANSWERS, *STEPS]:
        wall, cpu = (harness.values(runs, figure, what=what) for figure in ("wall_seconds", "cpu_seconds"))
        if wall:
            share = harness.ratio(own, wall) if what in STEPS and what != "ftune" else ""
            table.append([STEPS.get(what, what), harness.told(wall, ".2f"), harness.told(cpu, ".2f"), share])
    caption = (
        f"Medians (lowest to highest) of {given.rounds} interleaved rounds, each in a fresh process, files in the page cache. "
        f"First steps: {speed.told_work(given, work)}; every row is tokenised before it."
    )
    columns: Sequence[str] = ["what", "seconds", "processor seconds", "ftune takes"]
    harness.finish(given, caption, columns, table, runs)


def train_job(variant: str, train: str, start: str, device: str, **_: Any) -> dict[str, Any]:
    """Trainer as its user writes it, up to the hook."""
    return peers.trainer(
        public_sets.read(Path(train)),
        [],
        labels=2,
        seed=speed.SEED,
        recipe=peers.Recipe(),
        device=device,
        best_flags=variant == "trainer_best",
        start=Path(start),
    )


if __name__ == "__main__":
    processes.begin(main, {"train": train_job})
