"""Set the tables of README.md: options from the schema, results from the JSON files that the comparisons wrote.

python scripts/readme_tables.py            write them
python scripts/readme_tables.py --check    exit 1 where README.md does not hold them (a test runs this)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell would end it, so it is escaped."""
    cells = [[str(c).replace("|", "\\|") for c in row] for row in rows]
    return "\n".join(["| " + " | ".join(row) + " |" for row in [list(headers), ["---"] * len(headers), *cells]])


def between(page: str, name: str, content: str) -> str:
    """The page with ``content`` between the markers ``name:begin`` and ``name:end``."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"README.md needs the markers {name}:begin and {name}:end exactly once")
    return pattern.sub(lambda found: found[1] + (content.strip() + "\n" if content.strip() else "") + found[2], page)


def comparison(result: dict[str, Any]) -> str:
    """Scores of ftune and Trainer on the same rows and hyperparameters."""
    rows = [
        [r["name"], r["metric"], f"{r['rows']:,}", r["trainer"], r["ftune"], r["difference"], "yes" if r["within_spread"] else "no"]
        for r in result["table"]
    ]
    head = ["data", "test metric", "training rows", "Trainer", "ftune", "difference", "within the spread of seeds"]
    return f"{result['caption']}\n\n{markdown(head, rows)}"


def language_comparison(result: dict[str, Any]) -> str:
    """Scores of ftune and Trainer on the language tasks."""
    rows = [
        [
            r["name"],
            r["task"],
            r["model"],
            f"{r['rows']:,} × {r['epochs']:g}",
            r["seconds"],
            r["metric"],
            r["ftune"],
            r["trainer"],
            r["difference"] + (", beyond the spread of seeds" if r["within_spread"] is False else ""),
            r["curves_apart"] or "",
        ]
        for r in result["table"]
    ]
    head = ["data", "task", "model", "rows × epochs", "seconds", "test score", "ftune", "Trainer", "difference", "curves apart by"]
    return f"{result['caption']}\n\n{markdown(head, rows)}"


def speed(result: dict[str, Any]) -> str:
    """Rows per second and wall time, side by side."""
    if "columns" in result:
        return as_made(result)
    rows = [[r["what"], r["variant"], r["samples_per_second"], r["wall_seconds"], r["against"]] for r in result["table"]]
    return f"{result['caption']}\n\n{markdown(['work', 'variant', 'rows/s', 'whole process, s', 'ftune is faster by'], rows)}"


def as_made(result: dict[str, Any]) -> str:
    """A table that its script made cell by cell."""
    return f"{result['caption']}\n\n{markdown(result['columns'], result['table'])}"


Tables = Sequence[tuple[str, str, Callable[[dict[str, Any]], str]]]
RESULTS: Tables = (
    ("compare_trainer", "Scores against Trainer", comparison),
    ("compare_language", "The language tasks against Trainer", language_comparison),
    ("few_shot", "Few labels", as_made),
    ("adapt_then_classify", "Fill-mask before a classifier", as_made),
    ("speed", "Speed", speed),
)
"""Name of the result file, heading of its table, and how that is made."""
BENCHMARKS: Tables = (
    ("speed_base", "Speed, BERT-base's shape", speed),
    ("memory", "Memory", as_made),
    ("memory_base", "Memory, BERT-base's shape", as_made),
    ("startup", "Start-up", as_made),
    ("checkpoint_stall", "Checkpoints beside training", as_made),
    ("tokenising", "Tokenising", as_made),
    ("scaling_data", "From a thousand rows to millions", as_made),
    ("scaling_length", "Length of the rows", as_made),
    ("scaling_processes", "Processes", as_made),
    ("task_peers", "Libraries of one task", as_made),
    ("gpu", "On a GPU", as_made),
)
"""What ``scripts/bench`` measures besides speed; set where README.md has the markers ``benchmarks``."""


def measured(folder: Path, tables: Tables) -> str:
    """Those of the tables whose result file lies in the folder."""
    parts = []
    for name, heading, form in tables:
        file = folder / f"{name}.json"
        if file.exists():
            parts.append(f"### {heading}\n\n{form(json.loads(file.read_text(encoding='utf-8')))}")
    return "\n\n".join(parts)


def benchmarks(root: Path) -> str:
    """The picture of all results, where it was drawn, and the tables of ``BENCHMARKS``."""
    picture = ["![All benchmarks on one page](scripts/bench/results.svg)"] if (root / "scripts" / "bench" / "results.svg").exists() else []
    return "\n\n".join([*picture, *filter(None, [measured(root / "scripts" / "results", BENCHMARKS)])])


def reliability(file: Path) -> str:
    """What ``make reliability`` found, where it was run."""
    sys.path.insert(0, str(ROOT / "scripts" / "reliability"))
    from figures import table

    return table(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the tables are not these")
    check = parser.parse_args().check
    from finetune_cli.config.help import options_table
    from finetune_cli.tasks import task_configs

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    new = between(between(page, "options", options_table(task_configs())), "results", measured(ROOT / "scripts" / "results", RESULTS))
    new = between(
        between(new, "benchmarks", benchmarks(ROOT)), "reliability", reliability(ROOT / "scripts" / "results" / "reliability.json")
    )
    if check:
        print("README.md is up to date" if new == page else "README.md is out of date: run python scripts/readme_tables.py")
        return int(new != page)
    (ROOT / "README.md").write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
