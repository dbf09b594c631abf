"""Weak and strong scaling of ``ftune train`` over processes.

    python scripts/bench/scaling.py processes --data DIR          device.processes=1,2,... as many as there are cores
    python scripts/bench/scaling.py processes --data DIR --launcher torchrun

Strong: the same rows and the same batch of 32, shared by more processes. Weak: 32 rows of a batch, and a share of the rows, for each
process. rows/s is the loop alone, as the run's timing.jsonl says; memory is that of the whole tree, in proportional shares.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import harness
import peers
import processes
import public_sets
import speed

MODES = {"strong": "strong: one batch of 32", "weak": "weak: 32 rows of a batch each"}


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    if not can_be_asked():
        print("this ftune has no option device.processes: there is nothing to measure, and nothing is written")
        return
    work = speed.work_of(given)
    counts = [int(count) for count in given.counts.split(",")]
    runs = []
    for number, (mode, count) in harness.interleaved(given.rounds, [(mode, count) for mode in MODES for count in counts]):
        runs.append({"mode": mode, "asked": count, "round": number, **train(work, mode, count, given.launcher)})
    report(given, counts, runs, work)


def can_be_asked() -> bool:
    """Whether ftune has the option at all."""
    from finetune_cli.config.schema import DeviceConfig

    return any(option.name == "processes" for option in fields(DeviceConfig))


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "scaling_processes")
    speed.add_options(parser)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    powers = sorted({cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})
    parser.add_argument("--counts", default=",".join(map(str, powers)), help="numbers of processes, with commas, 1 first")
    parser.add_argument("--launcher", default="own", choices=["own", "torchrun"], help="device.processes=N, or torchrun around ftune")
    return harness.settle(parser.parse_args(typed), rows=32, counts="1,2")


def train(work: speed.Work, mode: str, count: int, launcher: str) -> dict[str, Any]:
    """One ``ftune train`` on so many processes; its rate and memory."""
    share = count if mode == "weak" else 1
    rows = public_sets.read(work.train)
    file = public_sets.write(work.folder / "rows" / f"times-{share}.jsonl", rows * share)
    keys = [key for key in work.overrides() if not key.startswith(("data.train=", "data.test=", "train.batch_size="))]
    keys += [f"data.train={file.resolve()}", "data.test=null", f"train.batch_size={peers.Recipe().batch_size * share}"]
    keys += [f"run.root={work.folder / 'runs'}"]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "finetune_cli", "train", *keys]
        ended = processes.run(command, watch=True, env={"FTUNE_CACHE": str(work.folder / "cache")})
    else:
        ended = processes.ftune("train", *keys, f"device.processes={count}", watch=True)
    run = Path(ended.out.strip().splitlines()[-1])
    seconds = json.loads((run / "timing.jsonl").read_text(encoding="utf-8").splitlines()[-1])["seconds"]
    return {"samples_per_second": len(rows) * share * work.recipe.epochs / seconds, **ended.took}


def report(given: argparse.Namespace, counts: Sequence[int], runs: harness.Runs, work: speed.Work) -> None:
    """A line for each mode and number of processes, and how much of a perfect speed-up it is."""
    table = []
    for mode, told in MODES.items():
        one = harness.values(runs, "samples_per_second", mode=mode, asked=counts[0])
        for count in counts:
            rate = harness.values(runs, "samples_per_second", mode=mode, asked=count)
            memory = harness.values(runs, "tree_mb", mode=mode, asked=count)
            share = harness.statistics.median(rate) / harness.statistics.median(one) / (count / counts[0])
            table.append([told, str(count), harness.told(rate), harness.ratio(rate, one), f"{share:.0%}", harness.told(memory, ",.0f")])
    caption = (
        f"{speed.told_work(given, work)}; started by {'torchrun' if given.launcher == 'torchrun' else 'device.processes'}; "
        f"medians (lowest to highest) of {given.rounds} interleaved rounds."
    )
    columns = ["scaling", "processes", "rows/s", "speed-up", "of a perfect one", "whole tree, MB"]
    harness.finish(given, caption, columns, table, runs)


if __name__ == "__main__":
    processes.begin(main, {})
