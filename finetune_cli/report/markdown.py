"""The report as text, with the same numbers. Data can neither make markup nor load anything: every mark that means something is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from finetune_cli import metrics
from finetune_cli.report.content import Report, best_step, interval, learning_curves, most_confused, score_table, verdict
from finetune_cli.report.wording import LONGEST_TEXT, cell, clean, is_number
from finetune_cli.tasks.sections import Bars, Cell, Curve, Examples, Heatmap, Reliability, Scatter, Section, Table

_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|^[-+=#]")
"""What could be markup where it stands: emphasis, code, links, tables, formulas, and at the start of a line headings and lists."""
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
_MOST_STEPS = 30
_MOST_COLUMNS = 24


def document(report: Report) -> str:
    """The whole text report."""
    parts = [f"# {words(report.title)}", *_headline(report), *(f"> {words(note)}" for note in report.notes)]
    parts += [bullets(report.summary)]
    if report.scores:
        parts += ["## Scores", _table(score_table(report))]
    curves = learning_curves(report)
    if curves:
        parts += ["## Learning", _learning(report, curves)]
    if report.sections:
        parts += [f"## A closer look at {words(report.split)}", *(_section(section) for section in report.sections)]
    if report.data_table:
        parts += ["## Data", _table(report.data_table)]
    parts += ["## This run"]
    parts += ["### Config", fenced(report.config_yaml, "yaml")] if report.config_yaml else []
    parts += ["### Environment", bullets(report.environment.items())] if report.environment else []
    parts += ["## What next", *(f"{words(why)}:\n\n{fenced(command, 'sh')}" for why, command in report.commands)]
    return "\n\n".join(part for part in parts if part) + "\n"


def words(text: str) -> str:
    """One line of text in which nothing is markup."""
    line = " ".join(clean(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _NUMBERED.sub(r"\1\\\2", _MARKS.sub(r"\\\g<0>", line))


def fenced(text: str, language: str) -> str:
    """A block of code that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{clean(text).rstrip()}\n{fence}"


def bullets(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they are."""
    return "\n".join(f"- {words(name)}: {words(text)}" for name, text in pairs)


def grid(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, longest: int = 160) -> str:
    """A table; columns of numbers are set flush right."""
    if not rows:
        return "None."
    right = [all(is_number(row[c]) for row in rows) for c in range(len(columns))]
    lines = [[words(name) for name in columns], ["---:" if r else "---" for r in right]]
    lines += [[words(cell(value, longest)) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _headline(report: Report) -> list[str]:
    entry = report.scores.get(report.split, {}).get(report.headline)
    if not entry:
        return []
    span = interval(entry)
    known = f" (95 % interval {span})" if span else ""
    score = f"{words(metrics.title(report.headline))} on {words(report.split)}: {words(cell(entry['value']))}"
    text = f"**{score}**{known}, {entry['n']:,} rows."
    return [" ".join(filter(None, [text, words(verdict(report))]))]


def _section(section: Section) -> str:
    listed = isinstance(section, Heatmap) and len(section.columns) > _MOST_COLUMNS
    return "\n\n".join(filter(None, [f"### {words(section.title)}", _body(section), "" if listed else words(section.note)]))


def _body(section: Section) -> str:
    if isinstance(section, (Table, Examples)):
        return grid(section.columns, section.rows, longest=LONGEST_TEXT if isinstance(section, Examples) else 160)
    if isinstance(section, Heatmap):
        return _heatmap(section)
    if isinstance(section, Bars):
        counted = [*([section.y_label]), *(["rows"] if section.counts else [])]
        columns = [section.names, section.values, *([section.counts] if section.counts else [])]
        return grid([section.x_label, *counted], list(zip(*columns, strict=True)))
    if isinstance(section, Reliability):
        bins = list(zip(section.confidence, section.accuracy, section.counts, strict=True))
        return grid(["mean probability", "share that was right", "rows"], bins)
    if isinstance(section, Scatter):
        return f"{len(section.x):,} points; the plot is in index.html."
    return grid(["line", "points", "first", "last"], [[s.name, len(s.x), s.y[0], s.y[-1]] for s in section.series if s.y])


def _heatmap(section: Heatmap) -> str:
    if len(section.columns) > _MOST_COLUMNS:
        return _table(most_confused(section))
    counts = [[int(v) if float(v).is_integer() else float(v) for v in values] for values in section.values]
    rows = [[name, *values] for name, values in zip(section.rows, counts, strict=True)]
    return grid([f"{section.row_label} \\ {section.column_label}", *section.columns], rows)


def _table(table: Table) -> str:
    return "\n\n".join(filter(None, [grid(table.columns, table.rows), words(table.note)]))


def _learning(report: Report, curves: Sequence[Curve]) -> str:
    """The scorings as a table, or where there are none, the losses; long runs are thinned."""
    plots = [plot for plot in curves if plot.title == "Loss" or plot.title.startswith("Validation")]
    lines = [line for plot in plots for line in plot.series if not line.name.endswith(", smoothed")]
    at = {line.name: dict(zip(line.x, line.y, strict=True)) for line in lines}
    scored = sorted({x for line in lines if line.name != "train" for x in line.x}) or sorted({x for line in lines for x in line.x})
    kept = scored[:: -(-len(scored) // _MOST_STEPS)] if scored else []
    kept = [*kept, scored[-1]] if scored and kept[-1] != scored[-1] else kept
    best = best_step(report)
    rows = [[f"{x:,.10g}{' (best)' if x == best else ''}", *(at[line.name].get(x) for line in lines)] for x in kept]
    names = {"train": "train loss", "validation": "validation loss"}
    return grid(["step", *(names.get(line.name, line.name) for line in lines)], rows)
