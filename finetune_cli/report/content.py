"""What a report says, before anyone decides how it looks: the data, and what is derived from it for both forms."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.metrics import DIRECTIONS, Entry, better
from finetune_cli.tasks.sections import Curve, Heatmap, Section, Series, Table

_SHOWN = ("accuracy", "f1", "f1_macro", "f1_micro", "mcc", "roc_auc", "pr_auc", "entity_f1", "r2", "pearson", "spearman")
"""Metrics between 0 and 1, higher better, that share one plot."""
_MOST_LINES = 4
_MOST_PAIRS = 40
_SMOOTH_FROM = 24
"""Logged losses from which a smoothed line is drawn over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Scores are ``{split: {metric: entry}}``, baselines ``{split: {name: {metric: value}}}``, history and timing the run's records."""

    title: str
    run: str
    summary: Sequence[tuple[str, str]]
    scores: Mapping[str, Mapping[str, Entry]]
    baselines: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    timing: Sequence[Mapping[str, Any]] = ()
    sections: Sequence[Section] = ()
    data_table: Table | None = None
    config_yaml: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    monitor: str = ""
    """The metric that picked the best checkpoint, shown first; empty: the first score that is not the loss."""
    notes: Sequence[str] = ()
    """What the reader must know, such as warnings."""

    @property
    def split(self) -> str:
        """The split that the headline speaks of."""
        return next((name for name in ("test", "validation") if name in self.scores), next(iter(self.scores), ""))

    @property
    def headline(self) -> str:
        """The metric that the headline speaks of."""
        scored = self.scores.get(self.split, {})
        if self.monitor in scored:
            return self.monitor
        return next((name for name in scored if name != "loss"), "")

    @property
    def commands(self) -> list[tuple[str, str]]:
        """What to run next: (why, command)."""
        run = shlex.quote(self.run)
        told = ", RUN being the directory of the run" if self.run == "RUN" else ""
        return [
            (f"Score other labelled rows{told}", f"ftune eval {run} data.test=FILE"),
            (f"Label new texts{told}", f"ftune predict {run} input=FILE"),
        ]


@dataclass(frozen=True, slots=True)
class Standing:
    """One line of the headline's comparison; None where not known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def standings(report: Report) -> list[Standing]:
    """The headline's score and that of each baseline on the same rows, the model first."""
    scored = report.scores.get(report.split, {}).get(report.headline)
    if scored is None or scored["value"] is None:
        return []
    free = {name: values.get(report.headline, math.nan) for name, values in report.baselines.get(report.split, {}).items()}
    found = [Standing(name, value) for name, value in free.items() if math.isfinite(value)]
    return [Standing("this model", scored["value"], scored["low"], scored["high"]), *found[::-1]]


def lower_is_better(metric: str) -> bool:
    """Whether a metric falls as a model improves; one that nobody knows does not."""
    try:
        return better(metric) == "min"
    except KeyError:
        return False


def verdict(report: Report) -> str:
    """One sentence: is the model better than what is free?"""
    found = standings(report)
    if len(found) < 2:
        return ""
    higher = not lower_is_better(report.headline)
    model, rest = found[0], found[1:]
    best = max(rest, key=lambda s: s.value if higher else -s.value)
    gain = model.value - best.value if higher else best.value - model.value
    edge = model.low if higher else model.high
    if gain <= 0:
        return f"No better than the baseline {best.name}."
    if edge is None:
        return f"Better than the best baseline, {best.name}, by {gain:.4f}."
    if (edge > best.value) if higher else (edge < best.value):
        return f"Clearly better than the best baseline, {best.name}: by {gain:.4f}, and the whole interval lies on the better side."
    return f"Better than the best baseline, {best.name}, by {gain:.4f}, but its score lies inside the interval."


def score_table(report: Report) -> Table:
    """Every metric on every split with its interval, the baselines beside it."""
    main = report.split
    splits = [main, *(name for name in report.scores if name != main)] if main else []
    free = report.baselines.get(main, {})
    metrics = list(dict.fromkeys(metric for split in splits for metric in report.scores[split]))
    if report.headline in metrics:
        metrics = [report.headline, *(m for m in metrics if m != report.headline)]
    columns = ["metric", *(part for split in splits for part in (split, "95 % interval")), *free]
    rows = []
    for metric in metrics:
        cells: list[Any] = [f"{metric} {'↓' if lower_is_better(metric) else '↑'}"]
        for split in splits:
            entry = report.scores[split].get(metric, {})
            cells += [entry.get("value"), interval(entry)]
        rows.append([*cells, *(values.get(metric) for values in free.values())])
    sizes = {split: max((e["n"] for e in report.scores[split].values()), default=0) for split in splits}
    counted = "; ".join(f"{split}: {n:,} rows" for split, n in sizes.items())
    return Table("Scores", columns, rows, " ".join(filter(None, [f"{counted}." if counted else "", *_remarks(report, splits)])))


def _remarks(report: Report, splits: Sequence[str]) -> list[str]:
    """How the intervals were found, and why a score is missing."""
    if not splits:
        return []
    entries = [(split, metric, entry) for split in splits for metric, entry in report.scores[split].items()]
    fewer = sorted({f"{metric} {entry['resamples']}" for _, metric, entry in entries if "resamples" in entry})
    remarks = ["Intervals: bootstrap over rows, 1,000 resamples" + (f" ({', '.join(fewer)})." if fewer else ".")]
    missing: dict[tuple[str, str], list[str]] = {}
    for split, metric, entry in entries:
        if entry["value"] is None and entry.get("note"):
            missing.setdefault((split, entry["note"]), []).append(metric)
    return remarks + [f"{split}: {', '.join(names)} not defined, {note}." for (split, note), names in missing.items()]


def most_confused(section: Heatmap) -> Table:
    """The largest cells off the diagonal, for a matrix too large to look at."""
    found = [
        (value, value / sum(values), name, other)
        for name, values in zip(section.rows, section.values, strict=True)
        for other, value in zip(section.columns, values, strict=True)
        if name != other and value > 0
    ]
    largest = sorted(found, key=lambda pair: (-pair[0], -pair[1]))[:_MOST_PAIRS]
    columns = [section.row_label, section.column_label, "rows", "share of the row"]
    rows = [[name, other, int(value) if float(value).is_integer() else value, share] for value, share, name, other in largest]
    note = f"The {len(rows)} largest of {len(section.rows):,} by {len(section.columns):,} cells. {section.note}".strip()
    return Table(section.title, columns, rows, note)


def interval(entry: Mapping[str, Any]) -> str | None:
    """``0.8900 – 0.9300``, or None where there is none."""
    low, high = entry.get("low"), entry.get("high")
    return None if low is None or high is None else f"{decimals(low)} – {decimals(high)}"


def decimals(value: float) -> str:
    """A number to the length that tables have: four decimals, fewer where there are many digits before them."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size < 1e-12:  # rounding
        size = value = 0.0
    if size and (size < 0.0001 or size >= 1e7):
        return f"{value:.2e}"
    return f"{value:,.{4 if size < 10 else 2 if size < 1000 else 1}f}"


def best_step(report: Report) -> float | None:
    """The step whose validation score of the monitored metric was best."""
    metric = report.monitor or report.headline
    points = [(r["step"], value) for r in report.history if (value := _finite(r.get(f"validation/{metric}"))) is not None]
    if not points:
        return None
    sign = -1 if lower_is_better(metric) else 1
    return float(max(points, key=lambda p: (sign * p[1], -p[0]))[0])


def learning_curves(report: Report) -> list[Curve]:
    """Loss, validation metrics, learning rate and throughput over steps; those that the run recorded."""
    losses = _series(report.history, "train/loss", "train")
    smooth = [_smoothed(losses)] if losses and len(losses.x) >= _SMOOTH_FROM else []
    loss_lines = [s for s in (losses, *smooth, _series(report.history, "validation/loss", "validation")) if s]
    seen = {key.partition("/")[2] for record in report.history for key in record if key.startswith("validation/")}
    wanted = [report.monitor or report.headline, *_SHOWN]
    names = [name for name in dict.fromkeys(wanted) if name in seen and DIRECTIONS.get(name) == "max" and name in _SHOWN]
    drawn = [s for name in names if (s := _series(report.history, f"validation/{name}", name))]
    metrics = [s for i, s in enumerate(drawn) if (s.x, s.y) not in [(t.x, t.y) for t in drawn[:i]]][:_MOST_LINES]
    other = wanted[0] if wanted[0] in seen and wanted[0] not in names and wanted[0] != "loss" else ""
    monitored = _series(report.history, f"validation/{other}", other) if other else None
    single = {
        "Learning rate": _series(report.history, "train/lr", "learning rate"),
        "Throughput": _series(report.timing, "train/samples_per_second", "rows per second"),
    }
    curves = [Curve("Loss", "step", "loss", loss_lines)] if loss_lines else []
    curves += [Curve(f"Validation {other}", "step", other, [monitored])] if monitored else []
    curves += [Curve("Validation metrics", "step", "score", metrics)] if metrics else []
    return curves + [Curve(title, "step", line.name, [line], from_zero=True) for title, line in single.items() if line]


def _series(records: Sequence[Mapping[str, Any]], key: str, name: str) -> Series | None:
    points = [(float(r["step"]), value) for r in records if "step" in r and (value := _finite(r.get(key))) is not None]
    return Series(name, [x for x, _ in points], [y for _, y in points]) if points else None


def _smoothed(line: Series) -> Series:
    """Running mean whose memory is a twelfth of the line, free of the start's bias."""
    keep = 1 - min(0.5, 12 / len(line.x))
    total = weight = 0.0
    smooth = []
    for y in line.y:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return Series(f"{line.name}, smoothed", line.x, smooth)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
