"""The report as one page: the template gets cells that are ready to print, autoescape does the rest."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from markupsafe import Markup

from finetune_cli import metrics
from finetune_cli.report import plots
from finetune_cli.report.content import (
    Report,
    best_step,
    decimals,
    interval,
    learning_curves,
    lower_is_better,
    most_confused,
    score_table,
    standings,
    verdict,
)
from finetune_cli.report.wording import LONGEST_TEXT, cell, clean, cut, is_number
from finetune_cli.tasks.sections import Bars, Cell, Curve, Examples, Heatmap, Reliability, Scatter, Section, Table

Shown = dict[str, Any]
"""One card of the page, as the template reads it."""

_WIDE_MATRIX = 7
"""From this many columns a matrix takes the whole width."""
_OTHERS = 6
"""So many further scores stand in the headline of a report without baselines."""
_SHORT = 28
"""A cell of at most so many characters is not broken over lines."""
_WIDEST_MATRIX = 64
"""Beyond this many columns only the largest errors of a matrix are listed."""
_ROOM = 90
"""Characters that the names of a wide matrix's columns may take; longer ones are turned."""


def page(report: Report) -> str:
    """The whole page, deterministic."""
    step = best_step(report)
    mark = None if step is None else (step, "best")
    html: str = _template().render(
        report=report,
        headline=_headline(report),
        scores=_table(score_table(report), marks=False),
        curves=_arranged([_curve(plot, mark if _is_scored(plot) else None) for plot in learning_curves(report)]),
        sections=_arranged([_section(section) for section in report.sections]),
        data=_table(report.data_table) if report.data_table else None,
    )
    return html


def _is_scored(plot: Curve) -> bool:
    """Whether a curve shows what the best checkpoint was chosen among."""
    return plot.title.startswith(("Loss", "Validation"))


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("finetune_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else clean(value),
    )
    return environment.get_template("index.html.j2")


def _headline(report: Report) -> Shown:
    """The first score beside the baselines; bars from zero to the largest value."""
    entry = report.scores.get(report.split, {}).get(report.headline, {})
    found = standings(report)
    top = max([1.0 if 0 <= s.value <= 1 else abs(s.value) * 1.1 for s in found] + [s.high or 0.0 for s in found], default=1.0)
    bars = [
        {
            "name": s.name,
            "value": decimals(s.value),
            "width": _share(s.value, top),
            "low": None if s.low is None else _share(s.low, top),
            "high": None if s.high is None else _share(s.high, top),
        }
        for s in found
    ]
    value = entry.get("value")
    return {
        "metric": metrics.title(report.headline) if report.headline else "",
        "value": cell(value) if value is not None else "not defined",
        "interval": interval(entry),
        "n": entry.get("n"),
        "lower": lower_is_better(report.headline),
        "bars": bars if len(bars) > 1 else [],
        "verdict": verdict(report),
        "others": [
            {"name": metrics.title(name), "value": cell(other["value"]), "interval": interval(other)}
            for name, other in report.scores.get(report.split, {}).items()
            if name not in ("loss", report.headline) and other["value"] is not None
        ][:_OTHERS],
    }


def _share(value: float, top: float) -> str:
    """A width; nothing for what is not a number."""
    if not math.isfinite(value):
        return "0%"
    return f"{max(0.0, min(1.0, value / top)) * 100:.2f}%"


def _arranged(cards: list[Shown]) -> list[Shown]:
    """Wide tables first, then the plots in two columns without a hole, then what is to be read."""
    read = [card for card in cards if card["kind"] == "examples"]
    wide = [card for card in cards if card["wide"] and card["kind"] != "examples"]
    narrow = [card for card in cards if not card["wide"]]
    tall = next((card for card in narrow if card.get("tall")), None)
    if len(narrow) % 2 and len(narrow) > 1 and tall:
        narrow.remove(tall)
        narrow.insert(1, tall | {"span": True})
    elif len(narrow) % 2:
        narrow[-1] = narrow[-1] | {"wide": narrow[-1]["kind"] == "bars"}
    return [*wide, *narrow, *read]


def _section(section: Section) -> Shown:
    """The card of one section."""
    if isinstance(section, Table):
        return _table(section)
    if isinstance(section, Examples):
        return _table(section, longest=LONGEST_TEXT, marks=False) | {"kind": "examples"}
    if isinstance(section, Heatmap):
        return _heatmap(section) if len(section.columns) <= _WIDEST_MATRIX else _table(most_confused(section))
    if isinstance(section, Bars):
        return _bars(section)
    if isinstance(section, Curve):
        return _curve(section, None)
    return _drawn(section)


def _table(table: Table | Examples, *, longest: int = 160, marks: bool = True) -> Shown:
    """Cells as strings with their alignment; a column of shares between 0 and 1 gets a quiet bar in each cell."""
    rows = [list(row) for row in table.rows]
    columns = [[row[c] for row in rows] for c in range(len(table.columns))]
    numeric = [bool(column) and all(is_number(value) for value in column) for column in columns]
    shares = [marks and _are_shares(column) for column in columns]
    return {
        "kind": "table",
        "title": table.title,
        "note": _sentence(table.note),
        "columns": [{"name": cut(clean(name)), "number": n} for name, n in zip(table.columns, numeric, strict=True)],
        "rows": [
            [
                {
                    "text": cell(value, longest),
                    "number": n,
                    "long": isinstance(value, str) and len(value) > _SHORT,
                    "share": f"{float(value) * 100:.1f}%" if s and isinstance(value, float) and math.isfinite(value) else None,
                }
                for value, n, s in zip(row, numeric, shares, strict=True)
            ]
            for row in rows
        ],
        "wide": True,
    }


def _are_shares(column: Sequence[Cell]) -> bool:
    numbers = [value for value in column if isinstance(value, float) and math.isfinite(value)]
    return bool(numbers) and len(numbers) > 1 and all(0 <= value <= 1 for value in numbers)


def _heatmap(section: Heatmap) -> Shown:
    """A table whose cells are shaded by their share of the row; the diagonal, where rows and columns are the same, in another colour."""
    square = list(section.rows) == list(section.columns)
    names = [cut(clean(name), 40) for name in section.columns]
    wide = len(names) >= _WIDE_MATRIX
    rows = []
    for i, (name, values) in enumerate(zip(section.rows, section.values, strict=True)):
        total = sum(values)
        cells = [_heat(value, value / total if total > 0 else 0.0, square and i == j) for j, value in enumerate(values)]
        rows.append({"name": cut(clean(name), 40), "cells": cells, "total": cell(_whole(total))})
    return {
        "kind": "heatmap",
        "title": section.title,
        "note": _sentence(section.note),
        "columns": names,
        "rows": rows,
        "row_label": section.row_label,
        "column_label": section.column_label,
        "tilted": sum(max(4, _width(name)) for name in names) > (_ROOM if wide else _ROOM // 3),
        "upright": any(_width(name) > len(name) for name in names),
        "small": len(names) > 16,
        "wide": wide,
    }


def _heat(value: float, share: float, right: bool) -> Shown:
    return {
        "text": cell(_whole(value)) if value else "",
        "tip": f"{share * 100:.1f} %",
        "share": f"{share:.3f}",
        "class": ("right" if right else "wrong") + (" deep" if share > 0.6 else ""),
    }


def _width(text: str) -> int:
    """Columns that a text takes; Chinese, Japanese and Korean letters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _bars(section: Bars) -> Shown:
    """Horizontal bars, names of any length and script at their left."""
    top = max([v for v in section.values if math.isfinite(v)], default=0.0) or 1.0
    counts: Sequence[int | None] = section.counts or [None] * len(section.names)
    bars = [
        {"name": cut(clean(name), 60), "value": cell(float(value)), "width": _share(value, top).removesuffix("%"), "count": count}
        for name, value, count in zip(section.names, section.values, counts, strict=True)
    ]
    shown = {"kind": "bars", "title": section.title, "note": _sentence(section.note), "bars": bars, "wide": False}
    return shown | {"x_label": section.x_label, "y_label": section.y_label, "counted": bool(section.counts)}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if not text or text.endswith(".") else ".")


def _curve(plot: Curve, mark: tuple[float, str] | None) -> Shown:
    keys = [
        {"name": clean(line.name), "colour": colour, "faint": any(o.name == f"{line.name}, smoothed" for o in plot.series)}
        for line, colour in zip(plot.series, plots.colours(plot), strict=True)
    ]
    shown = {"kind": "plot", "title": plot.title, "note": _sentence(plot.note), "svg": plots.curve(plot, mark=mark), "wide": False}
    return shown | ({"legend": keys} if len(keys) > 1 else {"y_label": plot.y_label} if plot.y_label != plot.title.lower() else {})


def _drawn(section: Reliability | Scatter) -> Shown:
    svg = plots.reliability(section) if isinstance(section, Reliability) else plots.scatter(section)
    note = _sentence(section.note)
    if isinstance(section, Reliability):
        note += " On the dashed line probabilities are honest; points below it are too sure. Grey: how the rows are spread."
    y_label = "share that was right" if isinstance(section, Reliability) else section.y_label
    return {"kind": "plot", "title": section.title, "note": note, "svg": svg, "y_label": y_label, "wide": False, "tall": True}
