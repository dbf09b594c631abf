"""Does a run survive whatever ends it? Kills, full disks, power losses, damage and signals, all on real ``ftune train`` runs.

    python scripts/reliability             the full size; one Markdown table, scripts/results/reliability.json; exit 1 if a figure is bad
    python scripts/reliability --short     the same in small, in under two minutes; writes no file unless --output names one

A tiny model is trained over and over as forks of one process that has imported everything. What it must leave is told by runs that nobody
disturbs: every file that does not tell the time must be equal to the byte.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHORT: dict[str, Any] = {"kills": 6, "calls": 3, "checks": 2, "errors": 1, "limits": 2, "full": 1, "damages": 200, "newest": 1}
SHORT |= {"stops": 3, "every": 50, "whole_every": 10, "steps": 3, "table": False}
FULL: dict[str, Any] = {
    "kills": 1000,
    "calls": None,
    "checks": None,
    "errors": None,
    "limits": 40,
    "full": None,
    "damages": 3000,
    "newest": 40,
}
FULL |= {"stops": None, "every": 1, "whole_every": 25, "steps": 10, "table": True}
CALL_STEPS = 3
"""Updates, and saves, of the runs whose every call is met."""


def main() -> int:
    given = arguments()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from figures import table
    from forked import SAFE, Forks
    from mounts import own_mounts

    if not SAFE:
        print("this needs Linux and torch: runs are forks of one process", file=sys.stderr)
        return 2
    began, may_mount = time.monotonic(), own_mounts()
    output = given.output and Path(given.output).absolute()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="ftune-reliability-") as folder:
        os.environ["FTUNE_CACHE"] = f"{folder}/cache"
        forks = Forks(allowed=True)
        try:
            from subject import warm

            warm(forks)
            figures, syncs = measured(given, SHORT if given.short else FULL, Path(folder), may_mount=may_mount)
        finally:
            forks.end()
    good = all(figure.good for figure in figures)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "size": "short" if given.short else "full",
        "seed": given.seed,
        "seconds": round(time.monotonic() - began),
        "good": good,
        **machine(given.cores),
        "figures": [figure.saved() for figure in figures],
        "syncs": syncs,
    }
    if output or not (given.short or given.only):
        (output or ROOT / "scripts" / "results" / "reliability.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    for figure in figures:
        for bad in figure.bad[:10]:
            print(f"bad: {figure.name}: {bad}", file=sys.stderr)
    return 0 if good else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a small sample of everything")
    parser.add_argument("--only", help="some of the parts, by the beginning of their names: kills,stops,power,…")
    parser.add_argument("--seed", type=int, default=1, help="of random times, damages and choices")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--output", help="where the JSON goes")
    return parser.parse_args()


def measured(given: argparse.Namespace, size: dict[str, Any], folder: Path, *, may_mount: bool) -> tuple[list[Any], list[dict[str, Any]]]:
    """Every figure, in the order of the table; and the table of syncs."""
    from crew import Crew
    from damage import damaged_newest, damages
    from kills import kills_at_calls, kills_at_checks, random_kills
    from power import power_losses, syncs_left_out
    from tables import tables
    from troubles import errors_at_calls, file_size_limits, full_disks, graceful_stops

    crew, seed, syncs = Crew(given.cores, folder), given.seed, []

    def table_of_syncs() -> Any:
        figure, rows = syncs_left_out(steps=CALL_STEPS, crew=crew)
        syncs.extend(rows)
        return figure

    few = {"steps": CALL_STEPS, "crew": crew}
    parts: dict[str, Callable[[], Any]] = {
        **({"tables": lambda: tables(given.cores)} if size["table"] else {}),
        "kills": lambda: random_kills(size["kills"], steps=size["steps"], seed=seed, crew=crew),
        "calls": lambda: kills_at_calls(most=size["calls"], **few),
        "checks": lambda: kills_at_checks(most=size["checks"], **few),
        "stops": lambda: graceful_stops(steps=size["steps"], most=size["stops"], crew=crew),
        "power": lambda: power_losses(every=size["every"], whole_every=size["whole_every"], **few),
        **({"syncs": table_of_syncs} if size["table"] else {}),
        "errors": lambda: errors_at_calls(most=size["errors"], **few),
        **({"full": lambda: full_disks(most=size["full"], **few)} if may_mount else {}),
        "limits": lambda: file_size_limits(count=size["limits"], **few),
        "damages": lambda: damages(size["damages"], seed=seed, **few),
        "newest": lambda: damaged_newest(size["newest"], seed=seed, **few),
    }
    wanted = tuple(given.only.split(",")) if given.only else ("",)
    figures = []
    for name, part in parts.items():
        if name.startswith(wanted):
            began = time.monotonic()
            found = part()
            for figure in found if isinstance(found, list) else [found]:
                figure.seconds = time.monotonic() - began
                print(f"{figure.name}: {figure.done}, {len(figure.bad)} bad ({figure.seconds:.0f} s)", file=sys.stderr, flush=True)
                figures.append(figure)
    return figures, syncs


def machine(cores: int) -> dict[str, Any]:
    """What it ran on and with."""
    from finetune_cli.engine import environment

    return {"commit": environment.git_commit(), "versions": environment.versions(), "hardware": {**environment.hardware(), "used": cores}}


if __name__ == "__main__":
    sys.exit(main())
