"""What is a test for each of its cases: bad inputs, traps, secrets, numbers. The tests run in full, and their cases are counted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from figures import Figure

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "bad inputs: exit 2 in three lines that name the place, within 2 s (config, data) or 5 s (model, checkpoint)": (
        "test_bad_inputs",
        "test_a_bad_input_is_told",
    ),
    "data that other readers bend in silence: kept exact or refused": ("data.", "test_"),
    "traps in runs, models and configs of strangers: none springs": ("test_hostile", "test_a_trap"),
    "ways for a secret into a run, a crash or a screen: none is open": ("test_secrets", "test_"),
    "numbers that are not finite, jumps of the loss: never a checkpoint, never the best": ("test_numbers", "test_"),
    "NaN in an update: exit 4, its rows named, the last good checkpoint kept": ("test_exit_codes", "test_4"),
}
"""Name of a figure to (module, or folder with a dot; beginning of the tests' names)."""


def tables(cores: int) -> list[Figure]:
    """One figure for each table, a trial for each case."""
    places = [f"tests/{place[:-1]}" if place.endswith(".") else f"tests/{place}.py" for place, _ in TABLES.values()]
    with tempfile.TemporaryDirectory(prefix="ftune-tables-") as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(cores), "--thorough", f"--junitxml={report}", *places]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"the tests did not run: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))  # of our own making
    return [_figure(name, cases, *where) for name, where in TABLES.items()]


def _figure(name: str, cases: list[ElementTree.Element], place: str, start: str) -> Figure:
    figure = Figure(name=name)
    for case in cases:
        module, test = case.get("classname", "").removeprefix("tests."), case.get("name", "")
        there = module == place or place.endswith(".") and module.startswith(place)
        if there and test.startswith(start) and case.find("skipped") is None:
            wrong = [told.get("message", "failed") for kind in ("failure", "error") for told in case.findall(kind)]
            figure.trial(f"{module}::{test}", wrong)
    figure.wanted = max(figure.done, 1)
    return figure
