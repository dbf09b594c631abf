"""Parts of the report that a task contributes: plain data, no drawing.

A task says what there is to see; ``report`` alone decides how it looks, so a new task never touches the report and the report
never learns a task's name. Texts are given whole and raw: the report cuts and escapes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float | bool | None
"""A number is printed to a sensible length and set flush right; None is a dash."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of short cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows of data to read, such as the worst errors; the texts are long, the other cells short."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Heatmap:
    """A matrix, such as the confusion of true labels (rows) with predicted ones (columns)."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    """[rows][columns]; each cell is coloured by its share of its row."""
    row_label: str = "true"
    column_label: str = "predicted"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Curve:
    """Lines over a common axis."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    from_zero: bool = False
    """Whether the y axis starts at zero."""


@dataclass(frozen=True, slots=True)
class Bars:
    """One value per named group, such as the error rate by length; ``counts`` says how many rows stand behind each."""

    title: str
    x_label: str
    y_label: str
    names: Sequence[str]
    values: Sequence[float]
    counts: Sequence[int] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points, such as predictions against targets; ``diagonal`` draws the line of equality."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    y: Sequence[float]
    diagonal: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reliability:
    """How often a prediction was right against how sure it was, in bins of confidence; empty bins are left out."""

    title: str
    confidence: Sequence[float]
    accuracy: Sequence[float]
    counts: Sequence[int]
    note: str = ""


Section = Table | Examples | Heatmap | Curve | Bars | Scatter | Reliability
