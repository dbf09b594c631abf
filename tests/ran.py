"""How a command of the tests ended; apart from ``conftest.py``, so that tests can import it by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


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
