"""How much memory does ftune take beside Hugging Face's Trainer, on the same rows? Whole commands, from start to end.

    python scripts/bench/memory.py --data DIR      SST-2 whole sentences; prints Markdown, writes scripts/results/memory.json
    python scripts/bench/memory.py --shape base --rows 320 --only train
    python scripts/bench/memory.py --smoke         seconds, on shipped rows: shows that it works, measures nothing

The processes are those of ``speed.py``, watched. ``whole tree``: the most that all processes of a command held at one time, as the sum
of their proportional set sizes, sampled about ten times a second. ``largest process``: the high-water mark of resident memory of its
largest process, shared pages included. ftune's commands also prove that the model reloads, in a process of its own, which is in the tree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import harness
import speed


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    work = speed.work_of(given)
    kinds = [kind for kind in speed.KINDS if given.only in (None, kind)]
    jobs = [(kind, variant) for kind in kinds for variant in speed.chosen(given, kind) if variant != "tutorial"]
    if "predict" in kinds:
        speed.prepare_predict(work)
    runs = []
    for number, (kind, variant) in harness.interleaved(given.rounds, jobs):
        ended, _ = speed.measured(kind, variant, work, watch=True)
        if ended.memory is None:
            sys.exit("this system does not tell the memory of a process: /proc/PID/smaps_rollup is Linux's")
        runs.append({"kind": kind, "variant": variant, "round": number, **ended.took})
    report(given, work, runs)


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "memory")
    speed.add_options(parser)
    parser.add_argument("--only", choices=list(speed.KINDS))
    return harness.settle(parser.parse_args(typed), rows=32)


def report(given: argparse.Namespace, work: speed.Work, runs: list[dict[str, Any]]) -> None:
    """Medians, and ftune's as a share of each peer's."""
    table = []
    for kind, variants in speed.KINDS.items():
        own = harness.values(runs, "tree_mb", kind=kind, variant="ftune")
        for variant, told in variants.items():
            tree, process, number = (harness.values(runs, f, kind=kind, variant=variant) for f in ("tree_mb", "process_mb", "processes"))
            if tree:
                share = "" if variant == "ftune" else harness.ratio(own, tree)
                table.append([kind, told, harness.told(tree, ",.0f"), harness.told(process, ",.0f"), harness.told(number, ".0f"), share])
    caption = (
        f"{speed.told_work(given, work)}. Peak memory in MB (2^20 bytes) of whole commands, medians (lowest to highest) of {given.rounds} "
        "interleaved rounds: proportional shares summed over all processes of the command, and the resident set of the largest."
    )
    columns = ["work", "variant", "whole tree, MB", "largest process, MB", "processes at the peak", "ftune takes"]
    harness.finish(given, caption, columns, table, runs)


if __name__ == "__main__":
    main()
