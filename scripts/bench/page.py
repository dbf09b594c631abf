"""All measured results on one page, and their tables.

    python scripts/bench/page.py            draws scripts/bench/results.svg, prints the tables of scripts/results as Markdown
    python scripts/bench/page.py --smoke    draws made-up figures of every kind below --work: shows that it works

README.md gets the same tables by ``python scripts/readme_tables.py``. A result whose file is not there has no panel.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkpoint_stall
import harness
import speed
import startup

Result = dict[str, Any]
OWN, OTHER, LINE = "#1f5fa8", "#b8bfc7", ["#1f5fa8", "#d2691e", "#3a8f3a", "#7a5195"]
PAGE = Path(__file__).with_name("results.svg")


def main(typed: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(harness.RESULTS), help="folder of the JSON files")
    parser.add_argument("--output", default=str(PAGE))
    parser.add_argument("--work", default="bench/page")
    parser.add_argument("--smoke", action="store_true", help="made-up figures, and nothing written beside --work")
    given = parser.parse_args(typed)
    if given.smoke:
        given.results, given.output = made_up(Path(given.work)), str(Path(given.work) / "results.svg")
    folder = Path(given.results)
    draw(folder, Path(given.output))
    tables = [*harness.readme_tables.RESULTS, *harness.readme_tables.BENCHMARKS]
    print(harness.readme_tables.measured(folder, tables))


def draw(folder: Path, output: Path) -> None:
    """One panel for each kind of result that is there; text stays text, so that the file is small and can be searched."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json") if file.stem in FILES}
    panels = [(title, form, found[name]) for name, title, form in PANELS if name in found and found[name].get("runs")]
    look = {"svg.fonttype": "none", "svg.hashsalt": "ftune", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(look):
        lines = max(1, -(-len(panels) // 2))
        figure, axes = pyplot.subplots(lines, 2, figsize=(11, 2.9 * lines), layout="constrained", squeeze=False)
        for place, panel in zip(axes.flat, [*panels, *[None] * (2 * lines - len(panels))], strict=True):
            if panel is None:
                place.set_axis_off()
                continue
            title, form, result = panel
            form(place, result)
            place.set_title(title, loc="left", fontweight="bold")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata={"Date": None})
        pyplot.close(figure)


def bars(place: Any, names: Sequence[str], values: Sequence[list[float]], form: str) -> None:
    """Medians side by side, with the lowest and highest of the rounds; ftune's own stand out."""
    medians = [statistics.median(v) for v in values]
    spread = [[m - min(v) for m, v in zip(medians, values, strict=True)], [max(v) - m for m, v in zip(medians, values, strict=True)]]
    colours = [OWN if name.startswith("ftune") else OTHER for name in names]
    places = range(len(names), 0, -1)
    place.barh(places, medians, xerr=spread, color=colours, ecolor="#555555", height=0.7)
    place.set_yticks(list(places), names)
    for at, median, value in zip(places, medians, values, strict=True):
        place.annotate(format(median, form), (max(value), at), xytext=(4, 0), textcoords="offset points", va="center")
    place.margins(x=0.15)


def of_kind(figure: str, kind: str, form: str) -> Callable[[Any, Result], None]:
    """Bars of what ``speed.py`` and ``memory.py`` measured of ``train`` or ``predict``."""

    def draw_it(place: Any, result: Result) -> None:
        there = {v: harness.values(result["runs"], figure, kind=kind, variant=v) for v in speed.KINDS[kind]}
        named = {v: speed.KINDS[kind][v].partition(":")[0] for v in there if there[v]}
        bars(place, list(named.values()), [there[v] for v in named], form)

    return draw_it


def starts(place: Any, result: Result) -> None:
    there = {what: harness.values(result["runs"], "wall_seconds", what=what) for what in [*startup.ANSWERS, *startup.STEPS]}
    names = [what for what in there if there[what]]
    bars(place, [startup.STEPS.get(what, what).partition(" (")[0] for what in names], [there[what] for what in names], ".2f")


def by(figures: dict[str, str], over: str, axis: str, *, log: bool = True, **where: Any) -> Callable[[Any, Result], None]:
    """Lines of some figures of the runs over another one."""

    def draw_it(place: Any, result: Result) -> None:
        at = sorted({run[over] for run in result["runs"]})
        for colour, (figure, told) in zip(LINE, figures.items(), strict=False):
            line(place, at, [harness.values(result["runs"], figure, **{over: x}, **where) for x in at], told, colour)
        finished(place, axis, log=log)

    return draw_it


def grouped(figure: str, group: str, over: str, axis: str) -> Callable[[Any, Result], None]:
    """A line of one figure for each group of runs."""

    def draw_it(place: Any, result: Result) -> None:
        at = sorted({run[over] for run in result["runs"]})
        for colour, name in zip(LINE, dict.fromkeys(run[group] for run in result["runs"]), strict=False):
            line(place, at, [harness.values(result["runs"], figure, **{over: x, group: name}) for x in at], name, colour)
        place.set_ylim(bottom=0)
        place.set_xscale("log", base=2)
        place.set_xticks(at, list(map(str, at)))
        finished(place, axis, log=False)

    return draw_it


def line(place: Any, at: Sequence[float], values: Sequence[list[float]], told: str, colour: str) -> None:
    there = [(x, statistics.median(v)) for x, v in zip(at, values, strict=True) if v]
    if there:
        place.plot(*zip(*there, strict=True), "o-", color=colour, label=told, markersize=3.5)


def finished(place: Any, axis: str, *, log: bool) -> None:
    if log:
        place.set_xscale("log")
        place.set_yscale("log")
    place.set_xlabel(axis)
    place.grid(alpha=0.25)
    place.legend(frameon=False)


def stalls(place: Any, result: Result) -> None:
    of = {
        variant: [ms for run in result["runs"] if run["variant"] == variant for ms in run["stalls"]]
        for variant in checkpoint_stall.VARIANTS
    }
    bars(place, ["ftune" if variant == "background" else variant for variant in of], list(of.values()), ",.0f")


def sides(figure: str, form: str) -> Callable[[Any, Result], None]:
    """Bars of every variant of a result."""

    def draw_it(place: Any, result: Result) -> None:
        names = list(dict.fromkeys(run["variant"] for run in result["runs"]))
        bars(place, names, [harness.values(result["runs"], figure, variant=name) for name in names], form)

    return draw_it


def shares(place: Any, result: Result) -> None:
    """Of each work on the GPU, how many times as fast as its peers ftune is."""
    found: dict[str, list[float]] = {}
    for work in dict.fromkeys(run["work"] for run in result["runs"]):
        own = harness.values(result["runs"], "rows_per_second", work=work, variant="ftune")
        for variant in dict.fromkeys(run["variant"] for run in result["runs"] if run["work"] == work):
            other = harness.values(result["runs"], "rows_per_second", work=work, variant=variant)
            if variant != "ftune" and own and other:
                found[f"{work}: {variant}"] = [statistics.median(own) / value for value in other]
    bars(place, list(found), list(found.values()), ".2f")
    place.axvline(1, color="#555555", linewidth=0.8)


PANELS: Sequence[tuple[str, str, Callable[[Any, Result], None]]] = (
    ("speed", "Training MiniLM, rows/s", of_kind("samples_per_second", "train", ",.0f")),
    ("speed", "Predicting with MiniLM, rows/s", of_kind("samples_per_second", "predict", ",.0f")),
    ("speed_base", "Training BERT-base's shape, rows/s", of_kind("samples_per_second", "train", ",.1f")),
    ("memory", "Peak memory of training, MB", of_kind("tree_mb", "train", ",.0f")),
    ("memory", "Peak memory of predicting, MB", of_kind("tree_mb", "predict", ",.0f")),
    ("startup", "From the start of the process, s", starts),
    ("tokenising", "Tokenising, rows/s", sides("rows_per_second", ",.0f")),
    ("checkpoint_stall", "A checkpoint holds training, ms", stalls),
    (
        "scaling_data",
        "Rows per second, by the number of rows",
        by(
            {
                "reading_rows_per_second": "reading",
                "tokenising_rows_per_second": "tokenising",
                "predict_rows_per_second": "predict",
            },
            "rows",
            "rows",
        ),
    ),
    ("scaling_data", "Peak memory in MB, by the number of rows", by({"train_mb": "training", "predict_mb": "predict"}, "rows", "rows")),
    ("scaling_length", "Training, real tokens/s", grouped("tokens_per_second", "layout", "length", "tokens of the longest row")),
    ("scaling_processes", "Training on several processes, rows/s", grouped("samples_per_second", "mode", "asked", "processes")),
    ("task_peers", "Beside libraries of one task, rows/s", sides("rows_per_second", ",.1f")),
    ("gpu", "On a GPU: ftune is faster by", shares),
)
"""Name of the result, title of the panel, how it is drawn."""
FILES = tuple(dict.fromkeys(name for name, _, _ in PANELS))


def made_up(folder: Path) -> str:
    """Results of every kind with figures that mean nothing, to see what the page looks like."""
    two = [{"value": n} for n in (1, 2)]
    kinds = [{"kind": k, "variant": v} for k in speed.KINDS for v in speed.KINDS[k]]
    runs: dict[str, list[Result]] = {
        "speed": [{**k, "samples_per_second": 10.0 + 9 * i + r["value"]} for r in two for i, k in enumerate(kinds)],
        "memory": [{**k, "tree_mb": 400.0 + 9 * i + r["value"]} for r in two for i, k in enumerate(kinds)],
        "startup": [{"what": w, "wall_seconds": 0.1 * r["value"]} for r in two for w in [*startup.ANSWERS, *startup.STEPS]],
        "checkpoint_stall": [{"variant": v, "stalls": [90.0, 100.0 * r["value"]]} for r in two for v in checkpoint_stall.VARIANTS],
        "tokenising": [{"variant": v, "rows_per_second": 1000.0 * r["value"]} for r in two for v in ("map", "ftune")],
        "scaling_data": [
            {
                "rows": n,
                "reading_rows_per_second": 9e5,
                "tokenising_rows_per_second": 1e5,
                "predict_rows_per_second": 1e4,
                "train_mb": 500 + n / 1e4,
                "predict_mb": 400.0,
            }
            for n in (1000, 10000)
        ],
        "scaling_length": [{"length": n, "layout": w, "tokens_per_second": 1e4 / n} for n in (16, 32) for w in ("padded", "packed")],
        "scaling_processes": [{"mode": m, "asked": n, "samples_per_second": 99.0 * n} for n in (1, 2) for m in ("strong", "weak")],
        "gpu": [{"work": "base", "variant": v, "rows_per_second": 100.0 * i} for i, v in enumerate(("trainer", "ftune"), 1)],
    }
    runs["speed_base"], runs["task_peers"] = runs["speed"], runs["tokenising"]
    for name, of in runs.items():
        harness.peers.save(folder / f"{name}.json", {"caption": "Made up.", "columns": ["figure"], "table": [["none"]], "runs": of})
    return str(folder)


if __name__ == "__main__":
    main()
