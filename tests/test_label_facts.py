"""Label facts: the loss against its formula, what validation rows settle, and that train, eval, predict and the exported model obey it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ran import Ran, labelled_rows, write_rows
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from finetune_cli import metrics
from finetune_cli.errors import Stopped, UserError
from finetune_cli.tasks.base import Evaluation
from finetune_cli.tasks.labelling import label_loss
from finetune_cli.tasks.labelling.decisions import Decisions
from finetune_cli.tasks.labelling.heads import fold_scale
from finetune_cli.tasks.labelling.labels import LabelLoss, LabelOptions, LabelSet, class_weights
from finetune_cli.tasks.text_classification import TextClassification, TextClassificationConfig

NAMES = ("a", "b", "c", "d")


def labels(multi: bool = False, weights: tuple[float, ...] | None = None, count: int = 4, **decisions: Any) -> LabelSet:
    names = NAMES[:count]
    return LabelSet(names=names, cells=names, multi=multi, weights=weights, decisions=Decisions(**decisions))


def drawn(rows: int, multi: bool, count: int = 4, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and targets drawn from their probabilities."""
    draw = np.random.default_rng(rows + count)
    logits = draw.normal(size=(rows, count)) * scale
    if multi:
        return logits, (draw.random((rows, count)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return logits, np.array([draw.choice(count, p=row) for row in p])


def mean_loss(logits: np.ndarray, targets: np.ndarray, own: LabelSet, options: LabelOptions) -> float:
    found = label_loss.total(torch.tensor(logits, dtype=torch.float32), torch.tensor(targets), own, options)
    return float(found) / label_loss.weight(targets, own)


# the loss ---------------------------------------------------------------------------------------------------------------------

WEIGHTS = (0.5, 3.0, 1.0, 7.0)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("multi", [False, True], ids=["single", "multi"])
def test_focal_loss_is_its_formula(multi: bool, gamma: float, smoothing: float, weights: tuple[float, ...] | None) -> None:
    logits, y = drawn(50, multi)
    w = np.ones(4) if weights is None else np.array(weights)
    if multi:
        p = 1 / (1 + np.exp(-logits))
        soft = y * (1 - smoothing) + smoothing / 2
        cells = soft * w * (1 - p) ** gamma * -np.log(p) + (1 - soft) * p**gamma * -np.log(1 - p)
        expected = cells.sum() / np.where(y > 0, w, 1).sum()
    else:
        p = metrics.probabilities(logits, multi=False)
        soft = np.eye(4)[y] * (1 - smoothing) + smoothing / 4
        expected = (soft * w * (1 - p) ** gamma * -np.log(p)).sum() / w[y].sum()
    options = LabelOptions(loss=LabelLoss.focal, focal_gamma=gamma, label_smoothing=smoothing)
    assert mean_loss(logits, y, labels(multi, weights), options) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("multi", [False, True], ids=["single", "multi"])
def test_gamma_zero_is_torchs_cross_entropy(multi: bool, smoothing: float, weights: tuple[float, ...] | None) -> None:
    logits, y = drawn(50, multi)
    own, given = labels(multi, weights), None if weights is None else torch.tensor(weights)
    found = [
        mean_loss(logits, y, own, LabelOptions(loss=loss, focal_gamma=0.0, label_smoothing=smoothing))
        for loss in (LabelLoss.focal, LabelLoss.cross_entropy)
    ]
    x = torch.tensor(logits, dtype=torch.float32)
    if multi:
        soft = torch.tensor(y) * (1 - smoothing) + smoothing / 2
        total = F.binary_cross_entropy_with_logits(x, soft, pos_weight=given, reduction="sum")
        expected = float(total) / float(np.where(y > 0, weights or np.ones(4), 1).sum())
    else:
        expected = float(F.cross_entropy(x, torch.tensor(y), weight=given, label_smoothing=smoothing))
    assert found == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.parametrize("multi", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("loss", list(LabelLoss))
def test_sums_and_weights_of_parts_add_up(loss: LabelLoss, multi: bool) -> None:
    logits, y = drawn(11, multi)
    own, options = labels(multi, WEIGHTS), LabelOptions(loss=loss, label_smoothing=0.1)
    cuts = [slice(0, 1), slice(1, 4), slice(4, 11)]
    x, t = torch.tensor(logits, dtype=torch.float32), torch.tensor(y)
    parts = sum(float(label_loss.total(x[c], t[c], own, options)) for c in cuts)
    assert parts == pytest.approx(float(label_loss.total(x, t, own, options)), rel=1e-6)
    assert sum(label_loss.weight(y[c], own) for c in cuts) == pytest.approx(label_loss.weight(y, own))


@pytest.mark.parametrize("multi", [False, True], ids=["single", "multi"])
def test_a_model_that_knows_nothing_loses_the_same_whatever_labels_weigh(multi: bool) -> None:
    _, y = drawn(60, multi)
    for weights in (None, WEIGHTS, (100.0, 100.0, 100.0, 100.0)):
        assert mean_loss(np.zeros((60, 4)), y, labels(multi, weights), LabelOptions()) == pytest.approx(np.log(2 if multi else 4), rel=1e-5)


@pytest.mark.parametrize("multi", [False, True], ids=["single", "multi"])
def test_focal_gradients_of_the_surest_answers_are_finite(multi: bool) -> None:
    x = torch.tensor([[300.0, -300.0, 0.0, 5.0], [-300.0, 300.0, 0.0, 5.0]], requires_grad=True)
    y = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]) if multi else torch.tensor([0, 0])
    label_loss.total(x, y, labels(multi), LabelOptions(loss=LabelLoss.focal, focal_gamma=0.5)).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_rows_without_a_label_cost_and_weigh_nothing() -> None:
    logits, y = drawn(20, False)
    some = np.where(np.arange(20) % 3 == 0, -1, y)
    for loss in LabelLoss:
        own, options = labels(weights=WEIGHTS), LabelOptions(loss=loss, label_smoothing=0.1)
        kept = some >= 0
        assert mean_loss(logits, some, own, options) == pytest.approx(mean_loss(logits[kept], y[kept], own, options), rel=1e-6)


def test_automatic_class_weights() -> None:
    single = class_weights("auto", NAMES, [1, 2, 3, 4], 10, multi=False)
    assert single is not None and np.dot(single, [1, 2, 3, 4]) == pytest.approx(10) and single[0] == 4 * single[3]
    multi = class_weights("auto", NAMES, [1, 0, 10, 4], 10, multi=True)
    assert multi == (9.0, 1.0, 1.0, 1.5), "rows without the label for each one with it; 1 where there is nothing to balance"


# what validation rows settle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_has_the_lowest_log_loss(scale: float, multi: bool) -> None:
    logits, y = drawn(400, multi)
    logits = logits * scale
    found = metrics.best_temperature(logits, y, multi=multi)

    def cost(log_t: float) -> float:
        return metrics.quality(metrics.probabilities(logits, multi=multi, temperature=np.exp(log_t)), y, multi=multi)["log_loss"]

    assert np.log(found) == pytest.approx(minimize_scalar(cost, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x, abs=1e-4)
    assert found == metrics.best_temperature(logits.copy(), y.copy(), multi=multi)
    assert found == pytest.approx(scale, rel=0.35), "logits that were drawn calibrated are scaled back"


def test_the_temperature_stays_in_its_bounds() -> None:
    y = np.arange(30) % 3
    assert metrics.best_temperature(np.eye(3)[y], y, multi=False) == pytest.approx(0.05)
    assert metrics.best_temperature(np.eye(3)[(y + 1) % 3], y, multi=False) == pytest.approx(20)
    assert metrics.best_temperature(np.zeros((0, 3)), np.zeros(0, int), multi=False) == 1


def test_the_least_confidence_is_the_lowest_that_reaches_the_precision() -> None:
    draw = np.random.default_rng(7)
    for _ in range(200):
        n = int(draw.integers(1, 30))
        sure, right = draw.integers(1, 9, n) / 10, draw.random(n) < 0.7
        precision = float(draw.choice([0.5, 0.75, 0.9, 1.0]))
        found = metrics.least_confidence(sure, right, precision)
        reaching = [c for c in np.unique(sure) if right[sure >= c].mean() >= precision]
        given = sure >= found.least
        assert found.reached == bool(reaching)
        assert set(sure[given]) == ({s for s in sure if s >= reaching[0]} if reaching else {sure.max()})
        assert (found.precision, found.coverage) == (pytest.approx(right[given].mean()), pytest.approx(given.mean()))


def test_thresholds_and_confidence_are_found_on_calibrated_probabilities() -> None:
    logits, y = drawn(200, True)
    options = LabelOptions(threshold="auto", calibrate=True)
    found = labels(True).settled(logits * 5, y, options)
    p = metrics.probabilities(logits * 5, multi=True, temperature=found.decisions.temperature)
    assert found.decisions.temperature > 2 and found.thresholds(options) == metrics.best_thresholds(p, y).tolist()
    assert np.array_equal(found.probabilities(logits * 5), p)
    logits, y = drawn(200, False, 2)
    options = LabelOptions(threshold="auto", calibrate=True, abstain_precision=0.9)
    found = labels(count=2).settled(logits * 5, y, options)
    answers = found.answers(found.probabilities(logits * 5), options)
    assert answers.given is not None and (answers.labels == y)[answers.given].mean() >= 0.9
    scores = metrics.values(found.measures(found.probabilities(logits * 5), y, options))
    assert scores["coverage"] == found.decisions.reached["coverage"] == answers.given.mean()
    assert scores["answered_accuracy"] == found.decisions.reached["precision"]
    again = found.settled(logits * 5, y, options)
    assert again == found, "what was settled before changes nothing"


@pytest.mark.parametrize("multi", [False, True], ids=["single", "multi"])
def test_calibration_changes_no_answer_and_lowers_the_log_loss(multi: bool) -> None:
    logits, y = drawn(300, multi)
    plain, found = labels(multi), labels(multi).settled(logits * 6, y, LabelOptions(calibrate=True))
    before, after = (metrics.values(own.measures(own.probabilities(logits * 6), y, LabelOptions())) for own in (plain, found))
    assert after["accuracy"] == before["accuracy"] and after["f1_macro"] == before["f1_macro"]
    assert after["log_loss"] < before["log_loss"] and after["ece"] < before["ece"]
    told = found.decisions.quality
    assert told["log_loss"] == pytest.approx([before["log_loss"], after["log_loss"]])
    assert told["ece"] == pytest.approx([before["ece"], after["ece"]])


def test_a_stated_threshold_wins_over_a_saved_one() -> None:
    own = labels(True, tuned=[0.2, 0.3, 0.4, 0.5])
    assert own.thresholds(LabelOptions()) == [0.2, 0.3, 0.4, 0.5] == own.thresholds(LabelOptions(threshold="auto"))
    assert own.thresholds(LabelOptions(threshold=0.3)) == [0.3] * 4
    assert labels(True).thresholds(LabelOptions()) == [0.5] * 4 and labels().thresholds(LabelOptions()) is None
    two = labels(count=2)
    p = np.array([[0.6, 0.4], [0.8, 0.2]])
    assert two.answers(p, LabelOptions(threshold=0.3)).labels.tolist() == [1, 0]
    assert two.answers(p, LabelOptions()).labels.tolist() == [0, 0]


def test_a_precision_that_is_not_reached_leaves_the_surest_answers_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    logits, options = np.array([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), LabelOptions(abstain_precision=0.9)
    found = labels(count=2).settled(logits, np.array([1, 0, 1]), options)
    answers = found.answers(found.probabilities(logits), options)
    assert answers.given is not None and answers.given.tolist() == [True, False, False]
    assert "no confidence reaches" in capsys.readouterr().err
    assert "NOT reached" in dict(found.told(options))["abstaining"]
    found.settled(logits, np.array([1, 0, 1]), options)
    assert capsys.readouterr().err == "", "said once"


def test_withheld_answers_are_null_and_keep_their_probabilities() -> None:
    facts = labels(count=2, least_confidence=0.8, stated_precision=0.9).facts()
    task = TextClassification(TextClassificationConfig(), json.loads(json.dumps(facts)))
    sure, unsure = task.decode({"logits": np.array([[0.0, 3.0], [0.2, 0.0]])}, None, None)  # type: ignore[arg-type]
    assert (sure["label"], sure["abstained"]) == ("b", False)
    assert (unsure["label"], unsure["abstained"]) == (None, True) and unsure["score"] == pytest.approx(0.549834)
    assert set(unsure["probabilities"]) == {"a", "b"}
    assert {"coverage", "answered_accuracy"} <= task.metric_names()
    nothing = replace(labels(count=2), decisions=Decisions(least_confidence=0.99))
    scores = metrics.score(
        lambda rows: nothing.measures(np.full((4, 2), 0.5)[rows], np.array([0, 1, 0, 1])[rows], LabelOptions()), 4, seed=1
    )
    assert scores["coverage"]["value"] == 0
    assert scores["answered_accuracy"]["value"] is None and "no answer" in scores["answered_accuracy"]["note"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_layer_gives_the_calibrated_logits_and_the_same_loss(bias: bool) -> None:
    head = torch.nn.Linear(8, 4, bias=bias)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), head)
    x, y = torch.randn(20, 8), np.arange(20) % 4
    config = TextClassificationConfig(calibrate=True)
    task = TextClassification(config, labels().facts())
    before = model(x).detach()
    facts = task.settle(Evaluation({"logits": before.numpy()}, y, 1, np.arange(20)))
    assert facts is not None
    task = task.knowing(facts)
    folded_facts = task.fold(model)
    assert folded_facts is not None
    folded = task.knowing(folded_facts)
    after = model(x).detach()
    assert np.allclose(task.answers({"logits": before.numpy()}), after.numpy(), atol=1e-6)
    assert np.allclose(folded.labels.probabilities(after.numpy()), task.labels.probabilities(before.numpy()), atol=1e-6)
    batch: Any = SimpleNamespace(targets=torch.tensor(y))
    found = [float(t.loss(SimpleNamespace(logits=z), batch)["loss"]) for t, z in ((task, before), (folded, after))]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert folded.fold(model) is None
    with pytest.raises(IndexError):
        fold_scale(model, np.ones(5))


def test_facts_survive_json() -> None:
    logits, y = drawn(50, False, 2)
    own = labels(count=2, weights=(1.0, 2.0)).settled(logits, y, LabelOptions(threshold="auto", calibrate=True, abstain_precision=0.8))
    assert LabelSet.of(json.loads(json.dumps(own.facts()))) == own


def test_a_checkpoint_from_before_the_first_scoring_is_refused() -> None:
    early = TextClassification(TextClassificationConfig(abstain_precision=0.9), labels().facts())
    early.refuse_misfits(training=True)
    with pytest.raises(UserError, match="before validation rows had settled task.abstain_precision"):
        early.refuse_misfits(training=False)


# whole runs -------------------------------------------------------------------------------------------------------------------

SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "train.batch_size=16"]
SMALL += ["optimizer.lr=3e-3", "device=cpu", "device.threads=1", "device.precision=fp32"]
Ftune = Callable[..., Ran]


def files(home: Path, suffix: str, flip: int = 5) -> list[str]:
    """Keys of small files; every ``flip``-th label is wrong, so that nothing is answered perfectly."""
    keys = []
    for name, count, shift in (("train", 64, 0), ("validation", 40, 64), ("test", 40, 104)):
        rows = labelled_rows(count, shift=shift)
        for i in range(0, count, flip):
            rows[i]["label"] = {"negative": "positive", "positive": "negative"}[rows[i]["label"]]
        keys.append(f"data.{name}={write_rows(home / f'{name}{suffix}', rows)}")
    return keys


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts")


KINDS: dict[str, list[str]] = {
    "single": ["task.threshold=auto", "task.calibrate=true", "task.abstain_precision=0.75", "task.loss=focal", "task.class_weights=auto"],
    "multi": ["data.label=topics", "task.threshold=auto", "task.calibrate=true", "task.class_weights=auto", "task.label_smoothing=0.1"],
}


@pytest.fixture(params=list(KINDS))
def run(request: pytest.FixtureRequest, home: Path, ftune_inside: Ftune) -> Path:
    """A finished run with every option that applies, trained once."""
    where = home / request.param
    if not where.exists():
        given = [*files(home / f"{request.param}-data", ".jsonl"), *KINDS[request.param], *SMALL, "train.epochs=10", f"run.dir={where}"]
        ftune_inside("train", *given).ok()
    return where


def values(score: dict[str, Any]) -> dict[str, Any]:
    return {name: entry["value"] for name, entry in score.items()}


def test_eval_repeats_train_and_the_exported_model_agrees(run: Path, ftune_inside: Ftune, tmp_path: Path) -> None:
    whole = json.loads((run / "metrics.json").read_text())
    for split in ("validation", "test"):
        assert ftune_inside("eval", run, f"split={split}").ok().json[split] == whole[split]
    facts = json.loads((run / "model/task.json").read_text())["facts"]["decisions"]
    assert facts["folded"] and facts["tuned"] and facts["rows"] == 40
    shutil.copytree(run / "model", tmp_path / "alone")
    data = [key for key in KINDS[run.name] if key.startswith(("data.", "task.loss", "task.label_smoothing"))]
    test = next((run.parent / f"{run.name}-data").glob("test*"))
    alone = ftune_inside("eval", tmp_path / "alone", "task=text-classification", f"data.test={test}", *data, "device.precision=fp32")
    assert values(alone.ok().json["test"]) == pytest.approx(values(whole["test"]), abs=1e-4)


def test_predict_obeys_what_was_settled(run: Path, ftune_inside: Ftune) -> None:
    facts = json.loads((run / "checkpoints/best/task.json").read_text())["facts"]
    names, decisions = facts["labels"], facts["decisions"]
    for line in ftune_inside("predict", run, stdin="the soup was lovely\nawful dull chair\n\n").ok().lines[:2]:
        p = line["probabilities"]
        if facts["multi"]:
            clear = [(name, least) for name, least in zip(names, decisions["tuned"], strict=True) if abs(p[name] - least) > 1e-6]
            assert clear and [name in line["labels"] for name, _ in clear] == [p[name] >= least for name, least in clear]
        else:
            answer = names[int(p[names[1]] >= decisions["tuned"][0])]
            assert line["score"] == p[answer] and line["abstained"] == (p[answer] < decisions["least_confidence"])
            assert line["label"] == (None if line["abstained"] else answer)


def test_a_threshold_given_to_eval_and_predict_wins(run: Path, ftune_inside: Ftune) -> None:
    saved = json.loads((run / "metrics.json").read_text())["test"]
    scored = ftune_inside("eval", run, "task.threshold=0.999").ok().json["test"]
    assert scored["recall_macro"]["value"] < saved["recall_macro"]["value"] and scored["loss"] == saved["loss"]
    (line,) = ftune_inside("predict", run, "task.threshold=0.001", stdin="the soup was lovely\n").ok().lines
    if "labels" in line:
        assert len(line["labels"]) == len(line["probabilities"])
    else:
        assert line["score"] == line["probabilities"]["positive"]


def test_plain_transformers_gives_the_calibrated_probabilities(run: Path, ftune_inside: Ftune) -> None:
    import transformers

    (ours,) = ftune_inside("predict", run, stdin="the soup was lovely\n").ok().lines
    pipe = transformers.pipeline("text-classification", model=str(run / "model"), device="cpu", top_k=None)
    (theirs,) = pipe(["the soup was lovely"])
    assert {row["label"]: row["score"] for row in theirs} == pytest.approx(ours["probabilities"], abs=1e-4)


def test_the_report_and_the_card_say_what_was_tuned_and_where(run: Path) -> None:
    for text in ((run / "report/report.md").read_text(), (run / "model/README.md").read_text(), (run / "log.txt").read_text()):
        assert "40 validation rows" in text and "flatters itself" in text and "lowest log loss" in text
    report = (run / "report/report.md").read_text()
    assert "Before and after calibration" in report and "Thresholds" in report
    assert ("Abstaining" in report) == (run.name == "single")


def test_a_run_stopped_between_scorings_resumes_to_the_bit(
    home: Path, ftune_inside: Ftune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from finetune_cli.engine.signals import StopFlag

    given = [*files(home / "stopped-data", ".jsonl"), *KINDS["single"], *SMALL, "train.epochs=2", "train.eval_every=3"]
    whole = ftune_inside("train", *given, f"run.dir={tmp_path / 'whole'}").ok().run
    check = StopFlag.check

    def stop(self: StopFlag) -> None:
        check(self)
        if (tmp_path / "cut/metrics.jsonl").exists() and '"step": 3' in (tmp_path / "cut/metrics.jsonl").read_text():
            raise Stopped("stopped by the test", where="test", fix="none")

    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "check", stop)
        assert ftune_inside("train", *given, f"run.dir={tmp_path / 'cut'}").code == 75
    assert json.loads((tmp_path / "cut/checkpoints/last/task.json").read_text())["facts"]["decisions"]["tuned"]
    ftune_inside("train", f"resume={tmp_path / 'cut'}").ok()
    for name in ("metrics.jsonl", "metrics.json", "model/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("model", "checkpoints/best", "checkpoints/last"):
        facts = [json.loads((run / name / "task.json").read_text())["facts"] for run in (tmp_path / "cut", whole)]
        assert facts[0] == facts[1], name


def test_an_exported_regression_answers_as_the_run_does(ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    """Targets near 100,000, of which bf16 knows every 512th: the scale is in the exported head, so the head computes in fp32."""
    rows = [{"text": f"{'good' if i % 2 else 'bad'} number {i}", "price": 100_000 + 100 * (i % 5)} for i in range(48)]
    write_rows(tmp_path / "rows.jsonl", rows[:32])
    write_rows(tmp_path / "more.jsonl", rows[32:])
    given = ["task=text-regression", "data.train=rows.jsonl", "data.test=more.jsonl", "data.label=price"]
    run = (
        ftune_inside(
            "train", *given, "model=tiny", "model.shape.layers=1", "train.steps=4", "device=cpu", "device.precision=bf16", "run.dir=run"
        )
        .ok()
        .run
    )
    inside = [ftune_inside("predict", place, "input=more.jsonl", "device.precision=bf16").ok().lines for place in (run, run / "model")]
    values = [np.array([line["value"] for line in lines]) for lines in inside]
    assert np.abs(values[0] - values[1]).max() < 0.1
