"""Stated expectations on metrics, such as ``expect.accuracy='>=0.8'``: read before anything runs, judged on the final scores."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_cli.errors import ExpectationFailed, UserError

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
FORM = re.compile(r"\s*(>=|<=|>|<)?\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True, slots=True)
class Expectation:
    """``metric`` must stand in this relation to ``bound``."""

    metric: str
    relation: str
    bound: float


def read(given: Mapping[str, Any], metrics: Collection[str]) -> list[Expectation]:
    """Parse and check the names. A bare number means at least. Raises UserError."""
    expectations = []
    for metric, text in given.items():
        form = FORM.fullmatch(str(text))
        if form is None:
            raise UserError(f"the expectation {text!r} cannot be read", where=f"expect.{metric}", fix=f"expect.{metric}='>=0.8'")
        if metric not in metrics:
            raise UserError(f"this task has no metric '{metric}'", where=f"expect.{metric}", fix=f"one of {', '.join(sorted(metrics))}")
        expectations.append(Expectation(metric, form[1] or ">=", float(form[2])))
    return expectations


def judge(expectations: list[Expectation], split: str, score: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ExpectationFailed naming every expectation that the scores do not meet; an undefined metric meets none."""
    missed = []
    for e in expectations:
        value = score.get(e.metric, {}).get("value")
        if value is None or not OPERATORS[e.relation](value, e.bound):
            missed.append(f"{split} {e.metric} is {'undefined' if value is None else f'{value:.4f}'}, expected {e.relation} {e.bound:g}")
    if missed:
        raise ExpectationFailed("; ".join(missed), where="expect", fix="train better, or state what you expect anew")
