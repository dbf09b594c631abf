"""Plots as inline SVG: they take colours and fonts from the page, so they are sharp, light or dark, and hold labels of any script.

Every text goes through ``_text``, which cleans and escapes it; every number through ``_n``. Nothing else reaches the markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finetune_cli.report.content import decimals
from finetune_cli.report.wording import clean, cut
from finetune_cli.tasks.sections import Curve, Reliability, Scatter, Series

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 18, 34
_MOST_POINTS = 500
_DOTS = 16
"""Lines of at most so many points show each of them."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def curve(plot: Curve, *, mark: tuple[float, str] | None = None) -> Markup:
    """Lines over a common axis; ``mark`` is an upright line with a word. A line that has a smoothed companion is drawn faintly."""
    lines = [thinned(line) for line in plot.series]
    xs, ys = [x for line in lines for x in line.x], [y for line in lines for y in line.y]
    x = _axis(xs, _LEFT, WIDTH - _RIGHT, tight=True)
    y = _axis([0.0, *ys] if plot.from_zero else ys, HEIGHT - _BOTTOM, _TOP)
    body = [_frame(x, y, plot.x_label, whole=all(float(v).is_integer() for v in xs))]
    if mark is not None and x.low <= mark[0] <= x.high:
        body.append(_mark(x(mark[0]), mark[1]))
    companions = {line.name.removesuffix(", smoothed") for line in lines if line.name.endswith(", smoothed")}
    body += [_line(line, x, y, colour, faint=line.name in companions) for line, colour in zip(lines, colours(plot), strict=True)]
    return _svg(Markup("").join(body), f"{plot.title}: {plot.y_label} over {plot.x_label}")


def colours(plot: Curve) -> list[int]:
    """The colour number of each line; a smoothed line has that of the line it smooths."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(line.name.removesuffix(", smoothed"), len(numbers) % 6 + 1) for line in plot.series]


def reliability(plot: Reliability) -> Markup:
    """Share that was right against confidence, with the diagonal of perfect calibration and the share of rows below."""
    size, foot = 300, 44
    x, y = Axis(0, 1, _LEFT, WIDTH - _RIGHT), Axis(0, 1, size - _BOTTOM, _TOP)
    body = [_frame(x, y, "probability given"), _raw('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>', x(0), y(0), x(1), y(1))]
    total, most = sum(plot.counts), max(plot.counts, default=1)
    for confidence, right, count in zip(plot.confidence, plot.accuracy, plot.counts, strict=True):
        tip = f"said {decimals(confidence)}, right {decimals(right)}, {count:,} of {total:,}"
        tall = foot * count / most
        body.append(_raw('<rect class="count" x="{}" y="{}" width="14" height="{}" rx="1.5"/>', x(confidence) - 7, y(0) - tall, tall))
        body.append(_raw('<line class="gap" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>', x(confidence), y(confidence), y(right)))
        radius = 3 + 4 * math.sqrt(count / most)
        body.append(_dot(1, x(confidence), y(right), radius, tip))
    line = Series("right", plot.confidence, plot.accuracy)
    body.insert(2, _line(line, x, y, 1, dots=False))
    return _svg(Markup("").join(body), plot.title, height=size)


def scatter(plot: Scatter) -> Markup:
    """Points, drawn as one path."""
    size = 330
    pairs = [(a, b) for a, b in zip(plot.x, plot.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    xs, ys = [a for a, _ in pairs], [b for _, b in pairs]
    shared = xs + ys if plot.diagonal else None
    x = _axis(shared or xs, _LEFT, WIDTH - _RIGHT)
    y = _axis(shared or ys, size - _BOTTOM, _TOP)
    body = [_frame(x, y, plot.x_label)]
    if plot.diagonal:
        body.append(_raw('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>', x(x.low), y(x.low), x(x.high), y(x.high)))
    path = "".join(f"M{_n(x(a))} {_n(y(b))}h0" for a, b in pairs)
    faint = "cloud thin" if len(pairs) > 400 else "cloud"
    body.append(Markup('<path class="{} c1" d="{}"/>').format(faint, path))
    return _svg(Markup("").join(body), plot.title, height=size)


def thinned(line: Series) -> Series:
    """At most ``_MOST_POINTS`` points: means of neighbours, the last point kept as it is. What is not a number is left out."""
    pairs = [(a, b) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    step = -(-len(pairs) // _MOST_POINTS)
    if step > 1:
        groups = [pairs[i : i + step] for i in range(0, len(pairs), step)]
        pairs = [(group[-1][0], sum(b for _, b in group) / len(group)) for group in groups[:-1]] + [pairs[-1]]
    return Series(line.name, [a for a, _ in pairs], [b for _, b in pairs])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two ends."""
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((m * size for m in (1, 2, 2.5, 5) if m * size >= raw * 0.999), 10 * size)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _axis(values: Sequence[float], start: float, end: float, *, tight: bool = False) -> Axis:
    """Room for all values; from zero where they lie near it."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.5 or 1.0
        low, high = (low - (0 if low == 0 else pad), high + pad)
    elif not tight:
        pad = 0.05 * (high - low)
        low, high = (0.0 if 0 <= low < 0.3 * high else low - pad), high + pad
    return Axis(low, high, start, end)


def _frame(x: Axis, y: Axis, x_label: str, *, whole: bool = False) -> Markup:
    """Grid, ticks and the name of the x axis."""
    parts = []
    for value in ticks(y.low, y.high, 4):
        parts.append(_raw('<line class="grid" x1="{0}" y1="{2}" x2="{1}" y2="{2}"/>', x.start, x.end, y(value)))
        parts.append(_text(_LEFT - 8, y(value) + 4, _tick(value), "end"))
    for value in ticks(x.low, x.high, 5):
        if not whole or float(value).is_integer():
            parts.append(_raw('<line class="tick" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>', x(value), y.start, y.start + 4))
            parts.append(_text(x(value), y.start + 17, _tick(value), "middle"))
    parts.append(_raw('<line class="base" x1="{}" y1="{}" x2="{}" y2="{}"/>', x.start, y.start, x.end, y.start))
    return Markup("").join([*parts, _text(x.end, y.start + 31, x_label, "end", "name")])


def _line(line: Series, x: Axis, y: Axis, colour: int, *, faint: bool = False, dots: bool = True) -> Markup:
    path = "L".join(f"{_n(x(a))} {_n(y(b))}" for a, b in zip(line.x, line.y, strict=True))
    drawn = Markup('<path class="line{} c{}" d="M{}"/>').format(" faint" if faint else "", colour, path)
    if len(line.x) > _DOTS or faint or not dots:
        return drawn
    points = zip(line.x, line.y, strict=True)
    marks = [_dot(colour, x(a), y(b), 3, f"{line.name} {decimals(b)} at {_tick(a)}") for a, b in points]
    return Markup("").join([drawn, *marks])


def _mark(at: float, word: str) -> Markup:
    left = at > WIDTH * 0.8
    line = _raw('<line class="mark" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>', at, _TOP, HEIGHT - _BOTTOM)
    return line + _text(at, _TOP - 6, word, "end" if left else "middle", "name")


def _svg(body: Markup, title: str, *, height: int = HEIGHT) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(WIDTH, height, clean(title), body)


def _raw(template: str, *numbers: float) -> Markup:
    """A template of ours, filled with numbers alone."""
    return Markup(template.format(*map(_n, numbers)))


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, _n(x), _n(y), anchor, cut(clean(text), 60))


def _dot(colour: int, x: float, y: float, radius: float, tip: str) -> Markup:
    circle = '<circle class="dot c{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>'
    return Markup(circle).format(colour, _n(x), _n(y), _n(radius), clean(tip))


def _tick(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.10g}"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
