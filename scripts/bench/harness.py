"""What every benchmark does alike: options, interleaved rounds, medians with their spread, a caption that says on what, and the files.

A result is ``scripts/results/NAME.json`` with caption, columns, table (cells as they are shown), machine and every single run. A smoke
run is small, shows that all works, and writes below its work directory only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "scripts")) if path not in sys.path]

import peers  # noqa: E402
import readme_tables  # noqa: E402

RESULTS = ROOT / "scripts" / "results"
USUAL_SHAPE = "minilm"
Runs = list[dict[str, Any]]


def parser(doc: str | None, name: str, *, rounds: int = 3) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    found.add_argument("--work", default=f"bench/{name}", help="where rows, models and runs go")
    found.add_argument("--output", default=str(RESULTS / f"{name}.json"))
    found.add_argument("--smoke", action="store_true", help="seconds, on shipped or few rows: shows that it works, measures nothing")
    return found


def settle(given: argparse.Namespace, **smoke: Any) -> argparse.Namespace:
    """The options as they are meant: what a smoke run changes, a whole path for the work, a file of its own for another shape."""
    given.work = str(Path(given.work).resolve())
    if (shape := getattr(given, "shape", USUAL_SHAPE)) != USUAL_SHAPE and Path(given.output).parent == RESULTS:
        given.output = str(RESULTS / f"{Path(given.output).stem}_{shape}.json")
    if given.smoke:
        vars(given).update({"rounds": 1, **smoke})
        given.output = str(Path(given.work) / f"smoke-{Path(given.output).name}")
    return given


def interleaved(rounds: int, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Every job once, then all again; said on stderr."""
    for number in range(1, rounds + 1):
        for one in jobs:
            told = " ".join(map(str, one)) if isinstance(one, tuple) else one
            print(f"round {number}/{rounds}: {told}", file=sys.stderr, flush=True)
            yield number, one


def values(runs: Iterable[dict[str, Any]], figure: str, **where: Any) -> list[float]:
    """A figure of the runs that are these."""
    return [run[figure] for run in runs if all(run.get(k) == v for k, v in where.items()) and run.get(figure) is not None]


def told(found: Sequence[float], form: str = ",.1f") -> str:
    """Median, with the lowest and the highest where there are several: ``126.1 (121.9 to 128.0)``."""
    if not found:
        return ""
    median = format(statistics.median(found), form)
    low, high = format(min(found), form), format(max(found), form)
    return median if low == high else f"{median} ({low} to {high})"


def ratio(own: Sequence[float], other: Sequence[float]) -> str:
    """``own`` divided by ``other``, of their medians."""
    return f"{statistics.median(own) / statistics.median(other):.2f}×" if own and other else ""


def without_trainer(wanted: Sequence[str], *, smoke: bool) -> list[str]:
    """The variants that can run here: Trainer needs accelerate. What is left out is said."""
    from importlib.util import find_spec

    if find_spec("accelerate") is not None:
        return list(wanted)
    left_out = [v for v in wanted if v.startswith("trainer")]
    if left_out and not smoke:
        sys.exit('Trainer needs accelerate: pip install ".[bench]"')
    print(f"left out, accelerate is not installed: {', '.join(left_out)}", file=sys.stderr)
    return [v for v in wanted if v not in left_out]


def on_what(given: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """(sentence for the caption, the same as a table) of versions and hardware."""
    where = peers.machine(given.device)
    line = f"transformers {where['transformers']}, torch {where['torch']}, Python {where['python']}, {where['hardware']}."
    return line, where


def finish(
    given: argparse.Namespace, caption: str, columns: Sequence[str], table: Sequence[Sequence[str]], runs: Runs, **more: Any
) -> None:
    """Markdown on stdout, everything in the JSON file. ``more``: lines to draw, say."""
    line, where = on_what(given)
    smoke = "Smoke run, not a measurement: " if given.smoke else ""
    result = {"caption": f"{smoke}{caption} {line}", "columns": columns, "table": table, "machine": where, "runs": runs, **more}
    print(readme_tables.as_made(result))
    peers.save(Path(given.output), result)
