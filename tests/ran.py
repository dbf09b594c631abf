"""What tests import by name: how a command ended, and easy rows to learn from (``conftest.py`` itself cannot be imported safely)."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(p.stem for p in (ROOT / "configs" / "exp").glob("*.yaml"))


def few(examples: int) -> settings:
    """How often Hypothesis tries: so many times, or as many as a profile of thousands says (``--hypothesis-profile=thorough``)."""
    profile = settings.default.max_examples if settings.default is not None else 0
    return settings(
        max_examples=profile if profile > 1_000 else examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def one_a_task() -> list[str]:
    """For each task one of its shipped experiments, for what takes long and depends on the task alone."""
    named = {}
    for name in reversed(EXPERIMENTS):
        text = (ROOT / "configs" / "exp" / f"{name}.yaml").read_text(encoding="utf-8")
        task = re.search(r"override /task: (\S+)", text)
        named[task[1] if task else "text-classification"] = name
    return sorted(named.values())


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """stdout as JSON Lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def json(self) -> dict[str, Any]:
        """stdout as one JSON object."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def run(self) -> Path:
        """The run directory that ``train`` printed."""
        (line,) = self.out.splitlines()
        return Path(line)

    def ok(self) -> Ran:
        """Itself, if the command succeeded."""
        assert self.code == 0, f"exit {self.code}\n{self.err}"
        return self

    def fails(self, code: int = 2) -> list[str]:
        """The three lines of an expected error: no traceback, at most error, where and fix."""
        assert self.code == code, f"exit {self.code}, not {code}\n{self.err}"
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
        assert first is not None, self.err
        told = lines[first:]
        assert [line.split(":")[0] for line in told] in (["error"], ["error", "where"], ["error", "fix"], ["error", "where", "fix"]), (
            self.err
        )
        return told


THINGS = ["soup", "chair", "train", "phone", "novel", "garden", "coat", "lamp"]
WORDS = {
    "negative": ["awful", "broken", "dull", "rude", "dirty", "late"],
    "positive": ["lovely", "sturdy", "clever", "kind", "clean", "quick"],
    "neutral": ["grey", "square", "usual", "middling", "standard", "plain"],
}


def labelled_rows(count: int, labels: Sequence[str] = ("negative", "positive"), *, shift: int = 0) -> list[dict[str, Any]]:
    """``count`` different easy rows of text, label, stars and topics; another ``shift`` gives other rows."""
    rows = []
    for i in range(shift, shift + count):
        label, thing = labels[i % len(labels)], THINGS[(i // len(labels)) % len(THINGS)]
        words = WORDS[label]
        text = f"the {thing} number {i} was {words[i % 6]} and {words[(i // 6) % 6]}" + " indeed" * (i % 5)
        stars = {"negative": 1.0, "neutral": 3.0, "positive": 5.0}[label] + 0.1 * (i % 3)
        rows.append({"text": text, "label": label, "stars": stars, "topics": sorted({thing, THINGS[i % len(THINGS)]})})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The rows as JSON Lines, CSV or TSV, by the ending of the name; lists are left out of CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path
    columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerows([columns, *([row[c] for c in columns] for row in rows)])
    return path
