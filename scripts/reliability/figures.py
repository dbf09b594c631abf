"""One figure of the table: what was done how often, and what was bad about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Figure:
    """``done`` of ``wanted`` trials, ``bad`` ones with their causes; ``notes`` are counts worth telling."""

    name: str
    wanted: int = 0
    done: int = 0
    bad: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether all that was wanted was done and nothing was bad."""
        return self.done >= self.wanted > 0 and not self.bad

    def trial(self, what: str, faults: Iterable[str]) -> None:
        """Count a trial; any fault makes it bad."""
        self.done += 1
        if found := "; ".join(faults):
            self.bad.append(f"{what}: {found}")

    def saved(self) -> dict[str, Any]:
        """JSON form; of many bad ones the first twenty."""
        return {
            "name": self.name,
            "wanted": self.wanted,
            "done": self.done,
            "bad": len(self.bad),
            "first_bad": self.bad[:20],
            "notes": dict(sorted(self.notes.items())),
            "seconds": round(self.seconds, 1),
        }

    @classmethod
    def joined(cls, name: str, wanted: int, parts: Iterable[dict[str, Any]]) -> Figure:
        """The figures of several workers (``part()``) as one."""
        whole = cls(name=name, wanted=wanted)
        for part in parts:
            whole.done += part["done"]
            whole.bad += part["bad"]
            whole.notes.update(part["notes"])
        return whole

    def part(self) -> dict[str, Any]:
        """JSON form for ``joined``."""
        return {"done": self.done, "bad": self.bad, "notes": dict(self.notes)}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown, with what they were measured on."""
    lines = ["| what | done | bad |", "|---|---:|---:|"]
    lines += [f"| {figure['name']} | {figure['done']:,} | {figure['bad']:,} |" for figure in result["figures"]]
    if result["syncs"]:
        lines += ["", "| sync left out | states it adds | of them lose something | why not |", "|---|---:|---:|---|"]
        lines += [f"| {row['sync']} | {row['states']:,} | {row['lost']:,} | {row['covered']} |" for row in result["syncs"]]
    v, h = result["versions"], result["hardware"]
    told = f"{result['size']} size in {result['seconds']} s, {result['date']}, commit {(result['commit'] or 'none')[:8]}, {h['used']} cores"
    return "\n".join([*lines, "", f"{told} ({h['cpu']}), ftune {v['ftune']}, torch {v['torch']}, transformers {v['transformers']}"])
