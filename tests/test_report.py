"""The report says the same in both forms, shows everything it was given, and nothing from data can become markup."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from finetune_cli.report import Report, document, model_card, page, write
from finetune_cli.report.content import best_step, decimals, learning_curves, standings, verdict
from finetune_cli.report.markdown import fenced, words
from finetune_cli.report.plots import curve, reliability, scatter, thinned
from finetune_cli.report.wording import cell, clean, cut
from finetune_cli.tasks.sections import Bars, Curve, Examples, Heatmap, Reliability, Scatter, Series, Table

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "'><img src=x onerror=alert(1)>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "</svg><img src=x onerror=alert(1)>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</pre><iframe src=javascript:alert(1)>",
    "</td></tr></table><h1>",
    "</text><a xlink:href='javascript:alert(1)'>x</a>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    '" style="background:url(https://evil.example/x)',
    "x; background: url(https://evil.example/x)",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>click</a>",
    "<body onload=alert(1)>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<base href=https://evil.example/>",
    "<object data=https://evil.example/x>",
    "<embed src=https://evil.example/x>",
    "<form action=https://evil.example><input type=submit>",
    "<details open ontoggle=alert(1)>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<!--<img src=x onerror=alert(1)>-->",
    "--><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?xml version='1.0'?><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "{{ 7 * 7 }}{% for x in [] %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "\u202e<script>alert(1)</script>\u2066",
    "<\udc80script>\ud83d",
    "\u2028<iframe srcdoc='<script>alert(1)</script>'>",
    "![x](https://evil.example/x.png) [y](javascript:alert(1)) <https://evil.example>",
    "\n\n# head\n\n```\n~~~\n| a | b |\n---\n<script>",
]
LENGTH = max(map(len, PAYLOADS))


def entry(value: float | None, low: float | None = None, high: float | None = None, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 200, **more}


def report_of(text: str) -> Report:
    """A report that carries a text in every field that data, config or paths reach."""
    few, two = [f"{text} {i}" for i in range(3)], [f"{text} a", f"{text} b"]
    history = [{"step": s, "train/loss": 1 / s, f"validation/{text}": 0.5, "validation/accuracy": s / 99} for s in range(1, 30)]
    sections: list[Any] = [
        Table(text, two, [[text, 0.25], [None, math.nan]], text),
        Examples(text, ["row", text, "text"], [[1, text, text * 3]], text),
        Heatmap(text, few, few, [[3, 1, 0], [0, 4, 0], [0, 0, 0]], text, f"{text} c", text),
        Curve(text, text, f"{text} y", [Series(text, [1, 2], [0.5, 0.2]), Series(f"{text} 2", [1], [1])], text),
        Bars(text, text, text, few, [0.1, math.nan, 0.3], [1, 2, 3], text),
        Scatter(text, text, text, [1, 2, 3], [1, 2, 4], diagonal=True, note=text),
        Reliability(text, [0.2, 0.9], [0.1, 0.95], [10, 20], text),
    ]
    return Report(
        title=text,
        run=text,
        summary=[(text, text)],
        scores={text: {"accuracy": entry(0.8, 0.7, 0.9), text: entry(0.5), "roc_auc": entry(None, note=text)}},
        baselines={text: {text: {"accuracy": 0.5}, f"{text} 2": {"accuracy": 0.6}}},
        history=history,
        timing=[{"step": 1, "train/samples_per_second": 10.0}],
        sections=sections,
        data_table=Table(text, [text, "rows"], [[text, 12]], text),
        config_yaml=f"data:\n  train: {text}\n",
        environment={text: text},
        monitor="accuracy",
        notes=[text],
    )


class Skeleton(HTMLParser):
    """Elements with the names of their attributes, and the values of those that could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.values: dict[str, set[str]] = {}
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(sorted(name for name, _ in attrs))))
        for name, value in attrs:
            self.values.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def skeleton(html: str) -> Skeleton:
    parsed = Skeleton()
    parsed.feed(html)
    parsed.close()
    return parsed


@pytest.fixture(scope="module")
def harmless() -> Skeleton:
    return skeleton(page(report_of("x" * LENGTH)))


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_payload_makes_an_element_or_attribute(payload: str, harmless: Skeleton) -> None:
    html = page(report_of(payload.ljust(LENGTH, "x")))
    found = skeleton(html)
    assert found.elements == harmless.elements
    assert not any(name.startswith("on") for name in found.values) and "src" not in found.values
    assert all(re.fullmatch(r"#[a-z]+", value) for value in found.values["href"])
    assert all(re.fullmatch(r"[-a-z0-9.,%:;()]+|left:[\d.]+%;right:calc\(100% - [\d.]+%\)", value) for value in found.values["style"])
    assert found.values["http-equiv"] == {"Content-Security-Policy"}
    html.encode("utf-8", "replace").decode()
    shown = clean(payload)
    assert any(shown in text for text in found.texts), "the text itself is there to read"


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_payload_makes_markdown(payload: str) -> None:
    plain, found = document(report_of("x" * LENGTH)), document(report_of(payload.ljust(LENGTH, "x")))
    outside = [re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", text) for text in (plain, found)]
    for sign in (r"(?<!\\)!\[", r"(?<!\\)\]\(", r"<[a-zA-Z!/?]", r"(?m)^#{1,6} ", r"(?m)^(```|~~~)", r"(?<!\\)\|"):
        assert len(re.findall(sign, outside[1])) == len(re.findall(sign, outside[0])), sign


def test_policy_forbids_all_but_own_styles_and_nothing_is_loaded() -> None:
    html = page(report_of("text"))
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert "<script" not in html and "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    assert html.startswith("<!doctype html>") and html.index("Content-Security-Policy") < html.index("<style>")


def sample() -> Report:
    history = [{"step": s, "epoch": s / 100, "train/loss": 1 / s, "train/lr": 1e-5 * s} for s in range(10, 301, 10)]
    for record, accuracy in zip(history[9::10], (0.7, 0.9123, 0.85), strict=True):
        record |= {"validation/accuracy": accuracy, "validation/loss": 1 - accuracy}
    names = ["negative", "积极", "neutral or mixed"]
    return Report(
        title="2026-11-22_0331-sentiment",
        run="runs/my run",
        summary=[("task", "text-classification")],
        scores={
            "validation": {"loss": entry(0.2), "accuracy": entry(0.9123, 0.88, 0.94)},
            "test": {"loss": entry(0.31), "accuracy": entry(0.8765, 0.8501, 0.9012), "roc_auc": entry(None, note="no row has the label b")},
        },
        baselines={"test": {"majority": {"accuracy": 0.3333}, "TF-IDF": {"accuracy": 0.7071}}},
        history=history,
        timing=[{"step": s, "train/samples_per_second": 400.0 + s} for s in range(10, 301, 10)],
        sections=[
            Table("Scores per class", ["label", "F1", "rows"], [[name, 0.5 + i / 10, 1234] for i, name in enumerate(names)]),
            Heatmap("Confusion", names, names, [[70, 3, 7], [2, 81, 0], [9, 4, 60]]),
            Reliability("Calibration", [0.5, 0.9], [0.4321, 0.95], [40, 160]),
            Bars("Error by length", "tokens", "error rate", ["1-9", "10-20"], [0.1111, 0.2222], [90, 110]),
            Examples("Worst errors", ["row", "true", "predicted", "text"], [[7, "negative", "积极", "long " * 400]]),
        ],
        config_yaml="task:\n  name: text-classification\n",
        environment={"torch": "2.13"},
    )


def test_both_forms_hold_the_same_numbers() -> None:
    text, html = document(sample()), page(sample())
    scored = ("0.8765", "0.8501 – 0.9012", "0.3333", "0.7071", "0.9123", "0.8800 – 0.9400")
    for number in (*scored, "0.5000", "0.7000", "1,234", "81", "0.1111", "0.4321"):
        assert number in text and number in html, number
    numbers = {n for n in re.findall(r"\d\.\d{4}(?!\d)", " ".join(skeleton(html).texts))}
    assert numbers <= set(re.findall(r"\d\.\d{4}", text)), numbers - set(re.findall(r"\d\.\d{4}", text))
    assert "no row has the label" in text and "no row has the label" in html


def test_the_headline_is_the_model_beside_the_baselines() -> None:
    report = sample()
    assert report.split == "test" and report.headline == "accuracy"
    assert [(s.name, s.value) for s in standings(report)] == [("this model", 0.8765), ("TF-IDF", 0.7071), ("majority", 0.3333)]
    assert verdict(report).startswith("Clearly better than the best baseline, TF-IDF")


@pytest.mark.parametrize(
    ("metric", "model", "free", "said"),
    [
        ("accuracy", entry(0.80, 0.75, 0.85), 0.78, "inside the interval"),
        ("accuracy", entry(0.70, 0.65, 0.75), 0.78, "No better"),
        ("accuracy", entry(0.90, None, None), 0.78, "by 0.1200"),
        ("rmse", entry(0.5, 0.4, 0.6), 0.9, "Clearly better"),
        ("rmse", entry(0.5, 0.4, 0.95), 0.9, "inside the interval"),
        ("rmse", entry(1.5, 1.4, 1.6), 0.9, "No better"),
    ],
)
def test_the_verdict_is_honest(metric: str, model: dict[str, Any], free: float, said: str) -> None:
    scores, baselines = {"test": {metric: model}}, {"test": {"mean": {metric: free}}}
    assert said in verdict(Report(title="", run="", summary=[], scores=scores, baselines=baselines))


def test_learning_curves_and_the_best_step() -> None:
    report = sample()
    assert best_step(report) == 200
    assert [plot.title for plot in learning_curves(report)] == ["Loss", "Validation metrics", "Learning rate", "Throughput"]
    assert "200 (best)" in document(report)
    history = [{"step": step, "validation/rmse": value} for step, value in ((1, 2.0), (2, 1.0), (3, None))]
    assert best_step(Report(title="", run="", summary=[], scores={"test": {"rmse": entry(1.0)}}, history=history)) == 2


def test_nothing_to_show_is_no_error() -> None:
    empty = Report(title="t", run="r", summary=[], scores={})
    assert "What next" in page(empty) and "What next" in document(empty)
    sections = [
        Curve("c", "x", "y", [Series("s", [1.0], [math.nan])]),
        Curve("flat", "x", "y", [Series("s", [3.0, 3.0], [0.0, 0.0])]),
        Scatter("s", "x", "y", [], []),
        Reliability("r", [], [], []),
        Heatmap("h", [], [], []),
        Bars("b", "x", "y", [], []),
        Examples("e", ["a"], []),
    ]
    undefined = Report(title="t", run="r", summary=[], scores={"test": {"mae": entry(None)}}, sections=sections)
    html = page(undefined)
    assert "not defined" in html and not re.search(r"(?i)\b(nan|inf)\b", html) and document(undefined)


def test_a_large_report_is_small_and_quick(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(60)]
    history = [{"step": s, "train/loss": 1 + math.sin(s), "train/lr": 1e-5, "validation/accuracy": 0.5} for s in range(20_000)]
    report = Report(
        title="big",
        run="run",
        summary=[],
        scores={"test": {"accuracy": entry(0.5, 0.4, 0.6)}},
        history=history,
        timing=[{"step": s, "train/samples_per_second": 1.0 * s} for s in range(20_000)],
        sections=[
            Heatmap("Confusion", names, names, [[i * j % 97 for j in range(60)] for i in range(60)]),
            Scatter("points", "x", "y", [float(i) for i in range(2000)], [math.sin(i) for i in range(2000)]),
            Examples("Worst", ["row", "text"], [[i, "word " * 5000] for i in range(50)]),
        ],
    )
    start = time.process_time()
    write(tmp_path / "report", report)
    assert time.process_time() - start < 3
    assert sum(f.stat().st_size for f in (tmp_path / "report").iterdir()) < 1_000_000


def test_of_a_huge_matrix_the_largest_errors_are_listed() -> None:
    names = [f"class {i}" for i in range(150)]
    counts = [[0] * 150 for _ in range(150)]
    counts[3][140], counts[3][3], counts[7][8] = 17, 100, 5
    matrix = Heatmap("Confusion", names, names, counts)
    report = Report(title="t", run="r", summary=[], scores={"test": {"mcc": entry(0.5)}}, sections=[matrix])
    html, text = page(report), document(report)
    assert len(html) < 60_000 and html.index("class 140") < html.index("class 8")
    assert "| class 3 | class 140 | 17 | 0.1453 |" in text and "| class 7 | class 8 | 5 | 1.0000 |" in text


def test_the_same_report_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, sample())
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == ["index.html", "report.md"]
    for name in ("index.html", "report.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_long_texts_are_cut_and_the_rest_counted() -> None:
    assert "more characters" in page(sample()) and "long " * 200 not in page(sample())
    assert cut("x" * 200, 10) == "x" * 10 + "… (190 more characters)"


def test_cells() -> None:
    assert [cell(v) for v in (None, math.nan, True, 12345)] == ["–", "–", "yes", "12,345"]
    assert [cell(v) for v in (0.5, 123.456, 1e-9, 3e9)] == ["0.5000", "123.46", "1.00e-09", "3.00e+09"]
    assert clean("a\x1b[31mb\u202ec\ud800\n") == "a\ufffd[31mb\ufffdc\ufffd\n"


def plots_of(text: str) -> list[ElementTree.Element]:
    """One of each kind, with every colour."""
    lines = Curve(text, text, text, [Series(f"{text} {i}", [1, 2, 30], [0.5, 0.2, i]) for i in range(7)])
    points = Scatter(text, text, text, [1, 2], [3, 4], diagonal=True)
    bins = Reliability(text, [0.2, 0.9], [0.1, 0.95], [10, 20])
    return [ElementTree.fromstring(svg) for svg in (curve(lines, mark=(2, text)), scatter(points), reliability(bins))]


ENDS = [(0, 1), (0.2, 0.9), (-5, 3), (1e-6, 9e-5), (10, 20_000), (0.9991, 0.9992), (3, 3), (0, 0)]


@pytest.mark.parametrize(("low", "high"), ENDS)
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    drawn = ElementTree.fromstring(curve(Curve("c", "name", "y", [Series("s", [low, high], [low, high])])))
    labels = [text for text in drawn.iterfind("text") if text.text != "name"]
    for anchor in ("middle", "end"):  # x axis, y axis
        values = [float((text.text or "").replace(",", "")) for text in labels if text.get("text-anchor") == anchor]
        start = 0.0 if anchor == "end" and 0 <= low < 0.3 * high else low
        room = max(abs(low) / 2, 1) if low == high else 0.0501 * (high - low)
        assert 2 <= len(set(values)) == len(values) <= 8 and all(start - room <= value <= high + room for value in values)


def test_plots_take_colours_and_fonts_from_the_page_and_have_no_ids() -> None:
    drawn = [node for plot in plots_of("text") for node in plot.iter()]
    assert {node.tag for node in drawn} == {"svg", "path", "text", "title"}
    allowed = {"d", "x", "y", "style", "transform", "text-anchor", "viewBox", "role", "aria-label"}
    assert {name for node in drawn for name in node.attrib} == allowed
    paints = set(re.findall(r"(?:fill|stroke):([^;]+)", ";".join(node.get("style", "") for node in drawn)))
    names = {"soft", "line", "card", "mild", *(f"c{i}" for i in range(1, 7))}
    assert paints == {"none", *(f"var(--{name})" for name in names)}
    themes = re.findall(r":root \{([^}]*)\}", page(sample()).partition("@media screen")[0])
    assert len(themes) == 2 and all(f"--{name}:" in theme for name in names for theme in themes)


LABELS = ["$x_1^2$ costs 5$", r"$\frac{1}{", "标签 \U0001f600 ไทย العربية", "#000001", "fill: #000002; x", "a\nb\tc", "&amp; <b>", "tip:x"]


@pytest.mark.parametrize("label", LABELS)
def test_labels_are_shown_as_they_are(label: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines, points, _ = plots_of(label)
    shown = " ".join(label.split())
    for plot in (lines, points):
        assert shown in [text.text for text in plot.iterfind("text")]
    assert next(lines.iterfind("path/title")).text == f"{shown} 0 0.5000 at 1"


def test_the_settings_of_the_users_matplotlib_change_nothing() -> None:
    import matplotlib

    plain = page(report_of("$x$"))
    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "path", "axes.grid": False, "lines.linewidth": 9, "savefig.dpi": 300}):
        assert page(report_of("$x$")) == plain
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, finetune_cli.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_thinning_keeps_ends_and_means() -> None:
    line = thinned(Series("s", list(range(10_000)), [1.0] * 9_999 + [5.0]))
    assert len(line.x) <= 500 and line.y[0] == 1.0 and (line.x[-1], line.y[-1]) == (9_999, 5.0)


def test_fences_cannot_be_ended_from_inside() -> None:
    assert fenced("a\n````\nb", "yaml").splitlines()[0] == "`````yaml"
    assert words("- a") == "\\- a" and words("12. a") == "12\\. a" and words("# a") == "\\# a" and words("a\nb") == "a b"
    assert words("f1_macro 0.9123 (a)") == "f1_macro 0.9123 (a)" and words("_a_ **b**") == "\\_a\\_ \\*\\*b\\*\\*"


def card(text: str) -> str:
    return model_card(
        name=text,
        task="text-classification",
        pipeline="text-classification",
        auto_class="AutoModelForSequenceClassification",
        base=text,
        facts=[("labels", text)],
        rows={"train": 960, "test": 240},
        files={"train": {text: "ab" * 32}},
        scores={"test": {"loss": entry(0.3), "accuracy": entry(0.8765, 0.85, 0.9), "f1_macro": entry(0.8), "roc_auc": entry(None)}},
        hyperparameters={"learning rate": "5e-05"},
        versions={"torch": "2.13"},
    )


def test_the_model_card_is_what_the_hub_reads() -> None:
    text = card("2026-11-22_0331-sentiment-minilm")
    _, front, body = text.split("---\n", 2)
    told = yaml.safe_load(front)
    assert (told["library_name"], told["pipeline_tag"]) == ("transformers", "text-classification")
    assert told["metrics"] == ["accuracy", "f1"]
    assert told["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.8765}]
    for part in ("0.8765", "0.8500 – 0.9000", "960", "ab" * 32, "5e-05", 'pipeline("text-classification"', "## Limits"):
        assert part in body, part


@pytest.mark.parametrize("payload", [*PAYLOADS, "---\nlibrary_name: evil\n---", "a: b # c", "- x", "", "null", "&a *b", "\u0085x"])
def test_no_payload_changes_the_front_matter(payload: str) -> None:
    text = card(payload)
    text.encode("utf-8")
    _, front, _ = text.split("---\n", 2)
    told = yaml.safe_load(front)
    assert set(told) == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}
    assert told["model-index"][0]["name"] == json.loads(json.dumps(clean(payload)))


def test_a_model_without_pipeline_or_scores_has_a_card() -> None:
    text = model_card(
        name="n",
        task="text-regression",
        pipeline=None,
        auto_class="AutoModelForSequenceClassification",
        base="b",
        facts=[],
        rows={"train": 5},
        files={},
        scores={},
        hyperparameters={},
        versions={},
    )
    assert "pipeline_tag" not in text and "AutoModelForSequenceClassification.from_pretrained" in text and "not scored" in text


def test_what_next_survives_a_move() -> None:
    report = Report(title="t", run="RUN", summary=[], scores={})
    assert [command for _, command in report.commands] == ["ftune eval RUN data.test=FILE", "ftune predict RUN input=FILE"]
    assert all("RUN being the directory" in why for why, _ in report.commands)
    model = Report(title="t", run="/my models/a", summary=[], scores={})
    assert model.commands[0][1] == "ftune eval '/my models/a' data.test=FILE"


def test_lines_that_lie_on_each_other_are_drawn_once() -> None:
    names = ("validation/accuracy", "validation/f1_micro")
    history = [{"step": s, **dict.fromkeys(names, 0.5 + s / 9), "validation/mcc": s / 9} for s in (1, 2)]
    report = Report(title="t", run="RUN", summary=[], scores={}, history=history, monitor="accuracy")
    (drawn,) = [plot for plot in learning_curves(report) if plot.title == "Validation metrics"]
    assert [series.name for series in drawn.series] == ["accuracy", "mcc"]


def test_rounding_is_zero() -> None:
    assert decimals(4e-17) == decimals(-4e-17) == decimals(0.0) == "0.0000" and decimals(3e-8) == "3.00e-08"
