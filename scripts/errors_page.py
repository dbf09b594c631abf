"""A page of errors from tests/bad_inputs/*.yaml: what was wrong, what ftune says, how to mend it; one row for each kind of fault.

    python scripts/errors_page.py > tests/bad_inputs/README.md    # every kind, some minutes of processor time
    python scripts/errors_page.py D10 C01                         # these kinds

Each row is what ftune answered just now: the first case of its kind is laid into an empty folder and run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from forked import Forks  # noqa: E402
from ran import labelled_rows, write_rows  # noqa: E402
from test_bad_inputs import CASES, KINDS, SMALL, prepare  # noqa: E402

HEADINGS = {
    "D": "Data",
    "C": "Config and command line",
    "K": "Checkpoints and models",
    "A": "Adapters",
    "R": "Resume",
    "S": "Security",
    "U": "Eval and predict",
}
OTHER = "Tasks"
INTRODUCTION = """# Errors, and how to mend them

What `ftune` answers to what it cannot use: the first case of each kind. All are in the YAML files beside this page, and a test runs them.
`python scripts/errors_page.py` made it; behind each case is the id of its kind."""
Told = dict[str, str]
"""The three lines of an error: ``error``, ``where``, ``fix``."""


def kinds(wanted: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The first case of each kind, by its id; of ``wanted`` kinds alone where some are named."""
    names = set(wanted)
    found: dict[str, dict[str, Any]] = {}
    for case in CASES:
        if not names or case["id"] in names:
            found.setdefault(case["id"], case)
    return dict(sorted(found.items()))


def answer(case: dict[str, Any], forks: Forks, trained: Callable[[str], Path]) -> Told:
    """What ftune says to a case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = prepare(case, folder, trained)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with forks.start(*arguments, cwd=folder, **pipes) as process:
            _, err = process.communicate(case.get("stdin", "").encode(), timeout=300)
        lines = err.decode("utf-8", "replace").replace(str(folder.resolve()), ".").splitlines()
    told = dict(line.split(": ", 1) for line in lines if line.startswith(("error: ", "where: ", "fix: ")))
    if process.returncode != case.get("exit", 2) or "error" not in told:
        raise SystemExit(f"{case['id']} {case['about']}: exit {process.returncode}, and not the answer that the test asks for")
    return told


def section(cases: Iterable[dict[str, Any]], told: Callable[[dict[str, Any]], Told]) -> str:
    """The page: a table for each group of faults."""
    groups: dict[str, list[str]] = {}
    for case in cases:
        answered = told(case)
        row = [
            f"{case['about']} ({case['id']})",
            f"{answered['error']} — {answered.get('where', '')}".removesuffix(" — "),
            answered.get("fix", ""),
        ]
        group = HEADINGS.get(case["id"][0], OTHER) if re.fullmatch(r"[A-Z]\d\d", case["id"]) else OTHER
        groups.setdefault(group, []).append("| " + " | ".join(map(cell, row)) + " |")
    parts = [INTRODUCTION]
    for name in [*HEADINGS.values(), OTHER]:
        if name in groups:
            parts += ["", f"## {name}", "", "| what was wrong | what ftune says | how to mend it |", "|---|---|---|", *groups[name]]
    return "\n".join(parts) + "\n"


def cell(text: str) -> str:
    """A text inside a Markdown table."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text)


def main() -> None:
    """Run the first case of every kind and print the page."""
    forks, runs = Forks(allowed=True), tempfile.TemporaryDirectory()
    made: dict[str, Path] = {}

    def trained(kind: str) -> Path:
        if kind not in made:
            folder = Path(runs.name) / kind
            for name, count, shift in (("train", 40, 0), ("validation", 12, 40), ("test", 12, 60)):
                rows = [{**row, "other": "a second text", "topics": ";".join(row["topics"])} for row in labelled_rows(count, shift=shift)]
                write_rows(folder / f"{name}.csv", rows)
            keys = [f"data.{name}={name}.csv" for name in ("train", "validation", "test")]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            with forks.start("train", *keys, *SMALL, "run.dir=run", *KINDS[kind], cwd=folder, **quiet) as process:
                process.wait()
            made[kind] = folder / "run"
        return made[kind]

    try:
        sys.stdout.write(section(kinds(sys.argv[1:]).values(), lambda case: answer(case, forks, trained)))
    finally:
        forks.end()
        runs.cleanup()


if __name__ == "__main__":
    main()
