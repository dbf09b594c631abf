"""Plots as inline SVG: matplotlib draws them, the page gives fonts and colours, so they are sharp, light or dark, and hold any script.

matplotlib is asked for stand-in colours, one for each variable of the page's style. Of what it writes only paths and texts are kept,
rebuilt with the attributes named in ``_inlined``: no ids (two plots cannot clash), no style sheet, no link.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from finetune_cli.report.content import decimals
from finetune_cli.report.wording import clean, cut
from finetune_cli.tasks.sections import Curve, Reliability, Scatter, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 18, 34
_MOST_POINTS = 500
_DOTS = 16
"""Lines of at most so many points show each of them."""
_INKS = {name: f"#{i:06x}" for i, name in enumerate(("soft", "line", "card", "mild", "c1", "c2", "c3", "c4", "c5", "c6"), start=1)}
"""Variables of page.css to the colours that stand for them in matplotlib; not black, which it leaves out."""
_VARIABLES = {colour: f"var(--{name})" for name, colour in _INKS.items()}
_TIP = "tip:"
"""Marks the ids that hold what is shown where the pointer rests on a dot."""
_LOOK = {
    "figure.dpi": 72,  # a point is a pixel
    "figure.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ftune",
    "text.parse_math": False,  # labels come from data: a $ is a $
    "font.size": 11.5,
    "path.simplify": False,
    "path.snap": False,
    "lines.solid_capstyle": "round",
    "lines.markeredgecolor": _INKS["card"],
    "lines.markeredgewidth": 1.5,
    "lines.scale_dashes": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": _INKS["soft"],
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _INKS["line"],
    "grid.linewidth": 1,
    "text.color": _INKS["soft"],
    "xtick.color": _INKS["soft"],
    "xtick.major.width": 0.6,
    "xtick.major.size": 4,
    "xtick.major.pad": 4,
    "ytick.color": _INKS["soft"],
    "ytick.major.size": 0,
    "ytick.major.pad": 8,
}


def curve(plot: Curve, *, mark: tuple[float, str] | None = None) -> Markup:
    """Lines over a common axis; ``mark`` is an upright line with a word. A line that has a smoothed companion is drawn faintly."""
    lines = [thinned(line) for line in plot.series]
    xs, ys = [x for line in lines for x in line.x], [y for line in lines for y in line.y]
    companions = {line.name.removesuffix(", smoothed") for line in lines if line.name.endswith(", smoothed")}
    x, y = _limits(xs, tight=True), _limits([0.0, *ys] if plot.from_zero else ys)
    with _axes(x, y, plot.x_label, whole=all(float(v).is_integer() for v in xs)) as axes:
        if mark is not None and x[0] <= mark[0] <= x[1]:
            _mark(axes, *mark, left=mark[0] > x[0] + 0.75 * (x[1] - x[0]))
        for line, colour in zip(lines, colours(plot), strict=True):
            _line(axes, line, _INKS[f"c{colour}"], faint=line.name in companions)
        return _inlined(axes, f"{plot.title}: {plot.y_label} over {plot.x_label}")


def colours(plot: Curve) -> list[int]:
    """The colour number of each line; a smoothed line has that of the line it smooths."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(line.name.removesuffix(", smoothed"), len(numbers) % 6 + 1) for line in plot.series]


def reliability(plot: Reliability) -> Markup:
    """Share that was right against confidence, with the diagonal of perfect calibration and the share of rows below."""
    total, most = sum(plot.counts), max(plot.counts, default=1)
    with _axes((0, 1), (0, 1), "probability given", height=300) as axes:
        heights = [0.18 * count / most for count in plot.counts]
        axes.bar(plot.confidence, heights, 0.036, color=_INKS["mild"], alpha=0.75)
        _diagonal(axes)
        axes.vlines(plot.confidence, plot.confidence, plot.accuracy, color=_INKS["c2"], linewidth=1.6)
        _line(axes, Series("right", plot.confidence, plot.accuracy), _INKS["c1"], dots=False)
        for confidence, right, count in zip(plot.confidence, plot.accuracy, plot.counts, strict=True):
            tip = f"said {decimals(confidence)}, right {decimals(right)}, {count:,} of {total:,}"
            _dot(axes, confidence, right, _INKS["c1"], tip, radius=3 + 4 * math.sqrt(count / most))
        return _inlined(axes, plot.title)


def scatter(plot: Scatter) -> Markup:
    """Points, drawn as one path of strokes without length: a tenth of the bytes of as many circles."""
    pairs = [(a, b) for a, b in zip(plot.x, plot.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    xs, ys = [a for a, _ in pairs], [b for _, b in pairs]
    shared = xs + ys if plot.diagonal else None
    with _axes(_limits(shared or xs), _limits(shared or ys), plot.x_label, height=330) as axes:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        if plot.diagonal:
            _diagonal(axes)
        if pairs:
            strokes = Path([pair for pair in pairs for _ in range(2)], [Path.MOVETO, Path.LINETO] * len(pairs))
            width, alpha = (3.6, 0.35) if len(pairs) > 400 else (5, 0.5)
            cloud = PathPatch(strokes, fill=False, edgecolor=_INKS["c1"], linewidth=width, capstyle="round", alpha=alpha, zorder=3)
            axes.add_patch(cloud)
        return _inlined(axes, plot.title)


def thinned(line: Series) -> Series:
    """At most ``_MOST_POINTS`` points: means of neighbours, the last point kept as it is. What is not a number is left out."""
    pairs = [(a, b) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    step = -(-len(pairs) // _MOST_POINTS)
    if step > 1:
        groups = [pairs[i : i + step] for i in range(0, len(pairs), step)]
        pairs = [(group[-1][0], sum(b for _, b in group) / len(group)) for group in groups[:-1]] + [pairs[-1]]
    return Series(line.name, [a for a, _ in pairs], [b for _, b in pairs])


def _limits(values: Sequence[float], *, tight: bool = False) -> tuple[float, float]:
    """The ends of an axis with room for all values; from zero where they lie near it."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.5 or 1.0
        return low - (0 if low == 0 else pad), high + pad
    if tight:
        return low, high
    pad = 0.05 * (high - low)
    return 0.0 if 0 <= low < 0.3 * high else low - pad, high + pad


@contextmanager
def _axes(x: tuple[float, float], y: tuple[float, float], x_label: str, *, height: int = HEIGHT, whole: bool = False) -> Iterator[Axes]:
    """Empty axes in our look, whatever the user's matplotlibrc says; draw and inline inside the block."""
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with warnings.catch_warnings(), rc_context():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the browser has the fonts, and it alone sets text
        rcdefaults()
        rcParams.update(_LOOK)
        figure = Figure((WIDTH / 72, height / 72))
        share = (_LEFT / WIDTH, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / WIDTH, 1 - (_TOP + _BOTTOM) / height)
        axes = figure.add_axes(share, xlim=x, ylim=y)
        for axis, about in ((axes.xaxis, 6), (axes.yaxis, 5)):
            axis.set_major_locator(MaxNLocator(about, steps=[1, 2, 2.5, 5, 10], integer=whole and axis is axes.xaxis, min_n_ticks=1))
            axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.patch.set_visible(False)
        figure.text(1 - _RIGHT / WIDTH, 3 / height, _one_line(x_label), ha="right", va="baseline")
        yield axes


def _line(axes: Axes, line: Series, colour: str, *, faint: bool = False, dots: bool = True) -> None:
    axes.plot(line.x, line.y, color=colour, alpha=0.3 if faint else 1, linewidth=1.2 if faint else 2.2)
    if len(line.x) <= _DOTS and dots and not faint:
        for a, b in zip(line.x, line.y, strict=True):
            _dot(axes, a, b, colour, f"{line.name} {decimals(b)} at {_tick(a)}")


def _dot(axes: Axes, x: float, y: float, colour: str, tip: str, *, radius: float = 3) -> None:
    axes.plot([x], [y], "o", color=colour, markersize=2 * radius, gid=_TIP + clean(tip))


def _diagonal(axes: Axes) -> None:
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color=_INKS["soft"], linewidth=1.3, linestyle=(0, (5, 5)))


def _mark(axes: Axes, at: float, word: str, *, left: bool) -> None:
    axes.axvline(at, color=_INKS["soft"], linewidth=1.3, linestyle=(0, (2, 4)))
    place = axes.get_xaxis_transform()
    axes.annotate(_one_line(word), (at, 1), (0, 6), xycoords=place, textcoords="offset points", ha="right" if left else "center")


def _one_line(text: str) -> str:
    return cut(" ".join(clean(text).split()), 60)


def _tick(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.10g}"


def _inlined(axes: Axes, title: str) -> Markup:
    """The drawing as markup of the page."""
    from matplotlib.figure import Figure

    buffer = BytesIO()
    assert isinstance(axes.figure, Figure)
    axes.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = ElementTree.fromstring(buffer.getvalue())
    kept = ElementTree.Element("svg", {"viewBox": drawn.attrib["viewBox"], "role": "img", "aria-label": clean(title)})
    markers = {f"#{node.get('id')}": node for node in drawn.iterfind(".//{*}defs/{*}path")}
    for node, tip in _leaves(drawn):
        style = dict(part.split(": ", 1) for part in node.get("style", "").split("; ") if part)
        if node.tag == "text":
            place = {"x": _short(node.attrib["x"]), "y": _short(node.attrib["y"]), "text-anchor": style["text-anchor"]}
            ElementTree.SubElement(kept, "text", place).text = node.text
            continue
        shape: dict[str, Any] = {"style": ";".join(f"{name}:{_VARIABLES.get(value, value)}" for name, value in style.items())}
        if node.tag == "use":
            shape["transform"] = f"translate({_short(node.attrib['x'])} {_short(node.attrib['y'])})"
            node = markers[node.attrib["{http://www.w3.org/1999/xlink}href"]]
        path = ElementTree.SubElement(kept, "path", {"d": _short(node.attrib["d"])} | shape)
        if tip:
            ElementTree.SubElement(path, "title").text = tip
    return Markup(ElementTree.tostring(kept, encoding="unicode"))


def _leaves(node: ElementTree.Element, tip: str = "") -> Iterator[tuple[ElementTree.Element, str]]:
    """What is drawn, in order, each with the tip of the group around it."""
    for child in node:
        child.tag = child.tag.rpartition("}")[2]
        if child.tag in ("path", "use", "text"):
            yield child, tip
        elif child.tag == "g":
            name = child.get("id", "")
            yield from _leaves(child, name.removeprefix(_TIP) if name.startswith(_TIP) else tip)


def _short(numbers: str) -> str:
    """A path or number to a tenth of a pixel, without spaces that say nothing."""
    rounded = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), numbers)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", rounded).strip()
