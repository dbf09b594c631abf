"""Multi-task classification: several label columns on one encoder, each with its own loss, scores and label facts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ran import THINGS, Ran, labelled_rows, write_rows
from torch.nn import functional as F

from finetune_cli import metrics
from finetune_cli.config.choices import RowPolicy
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import read
from finetune_cli.errors import UserError
from finetune_cli.metrics import better
from finetune_cli.tasks.base import Evaluation
from finetune_cli.tasks.labelling.label_columns import LABELS
from finetune_cli.tasks.labelling.labels import LabelSet
from finetune_cli.tasks.multi_task_classification import MultiTaskClassification, MultiTaskClassificationConfig

Ftune = Callable[..., Ran]
FACTS = {
    "columns": {
        "mood": LabelSet(names=("bad", "good"), cells=("bad", "good"), weights=(1.0, 3.0)).facts(),
        "kind": LabelSet(names=("x", "y", "z"), cells=("x", "y", "z")).facts(),
    }
}
TARGETS = np.array([[0, 2], [1, -1], [1, 0], [-1, 1], [0, 1], [1, 2]])


def task(**options: Any) -> MultiTaskClassification:
    return MultiTaskClassification(MultiTaskClassificationConfig(**options), FACTS)


def logits(rows: int = 6) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(rows, 5)).astype(np.float32) * 2


class AsIs:
    """A layout that lays nothing out."""

    def lay(self, columns: Any) -> dict[str, Any]:
        return {}


def arranged(path: Path, config: DataConfig) -> tuple[Any, Any, list[str]]:
    return MultiTaskClassification.arrange(MultiTaskClassificationConfig(), read(str(path), config), config, labelled=True)


# loss and scores --------------------------------------------------------------------------------------------------------------


def test_each_column_has_a_loss_divided_by_what_its_own_rows_weigh() -> None:
    own, x = task(), torch.tensor(logits())
    batch = own.collate({}, TARGETS, AsIs(), key=0)
    sums = own.loss(SimpleNamespace(logits=x), batch)
    found = {name: float(value) / batch.weights[name] for name, value in sums.items()}
    mood, kind = (torch.tensor(TARGETS[:, j]) for j in (0, 1))
    assert found["mood"] == pytest.approx(float(F.cross_entropy(x[:, :2], mood, weight=torch.tensor([1.0, 3.0]), ignore_index=-1)))
    assert found["kind"] == pytest.approx(float(F.cross_entropy(x[:, 2:], kind, ignore_index=-1)))
    assert batch.weights == {"mood": 2 * 1 + 3 * 3, "kind": 5}


def test_scores_of_a_column_are_those_of_the_rows_that_have_its_label() -> None:
    own, x = task(), logits()
    evaluation = Evaluation({"logits": x}, TARGETS, 1, np.arange(6))
    found = own.metrics(evaluation)
    for j, (name, part) in enumerate({"mood": x[:, :2], "kind": x[:, 2:]}.items()):
        there = TARGETS[:, j] >= 0
        alone = metrics.classification(metrics.probabilities(part[there], multi=False), TARGETS[there, j], own.columns[name].names)
        assert {metric: found[f"{name}/{metric}"] for metric in alone} == pytest.approx(alone, nan_ok=True)
    for metric in ("accuracy", "f1_macro"):
        assert found[metric] == pytest.approx((found[f"mood/{metric}"] + found[f"kind/{metric}"]) / 2)
    assert set(found) | {"loss"} == own.metric_names() and own.monitor in found
    score = own.score(evaluation)
    assert (score["mood/accuracy"]["n"], score["accuracy"]["n"]) == (5, 6)
    assert {name: entry["value"] for name, entry in score.items() if entry["value"] is not None} == pytest.approx(
        {name: value for name, value in found.items() if np.isfinite(value)}
    )
    assert all(better(name) == ("min" if name.endswith(("loss", "ece", "brier")) else "max") for name in own.metric_names())


def test_a_column_that_no_row_has_is_undefined_and_spoils_no_other() -> None:
    own, targets = task(), np.where([[True, False]] * 6, TARGETS, -1)
    found = own.metrics(Evaluation({"logits": logits()}, targets, 1, np.arange(6)))
    assert np.isfinite(found["mood/accuracy"]) and np.isnan(found["kind/accuracy"]) and np.isnan(found["accuracy"])
    batch = own.collate({}, targets, AsIs(), key=0)
    assert batch.weights["kind"] == 0 and float(own.loss(SimpleNamespace(logits=torch.tensor(logits())), batch)["kind"]) == 0


def test_every_column_is_calibrated_and_folded_by_itself() -> None:
    own = task(calibrate=True, threshold="auto", abstain_precision=0.95)
    rng = np.random.default_rng(0)
    targets = np.stack([rng.integers(0, 2, 200), rng.integers(0, 3, 200)], 1)
    x = rng.normal(size=(200, 5)) * np.array([9, 9, 1, 1, 1])
    x[np.arange(200), targets[:, 0]] += 9
    x[np.arange(200), 2 + targets[:, 1]] += 1
    facts = own.settle(Evaluation({"logits": x}, targets, 1, np.arange(200)))
    assert facts is not None
    settled = own.knowing(facts)
    mood, kind = settled.columns["mood"].decisions, settled.columns["kind"].decisions
    assert mood.temperature > 3 * kind.temperature and mood.tuned is not None and kind.tuned is None
    head = torch.nn.Linear(5, 5, bias=False)
    torch.nn.init.eye_(head.weight)
    folded_facts = settled.fold(head)
    assert folded_facts is not None
    after = head(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    assert np.allclose(after, settled.answers({"logits": x}), atol=1e-5)
    one, other = (list(t.decode({"logits": z}, None, None)) for t, z in ((settled, x), (settled.knowing(folded_facts), after)))  # type: ignore[arg-type]
    assert [row["labels"] for row in one] == [row["labels"] for row in other]
    assert any(row["abstained"]["mood"] for row in one) and all((row["labels"]["mood"] is None) == row["abstained"]["mood"] for row in one)


# rows -------------------------------------------------------------------------------------------------------------------------


def test_labels_stand_in_one_column_and_missing_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,mood,kind\na,good,1\nb,,2\nc,bad,\nd,,\n")
    config = DataConfig(train=str(path), label=["mood", "kind"], text="text", missing_labels=RowPolicy.drop)
    rows, roles, notes = arranged(path, config)
    assert rows.column(LABELS).to_pylist() == [["mood=good", "kind=1"], ["kind=2"], ["mood=bad"], None]
    assert roles.options == {"text": "text", "text_pair": None, "label": ["mood", "kind"]}
    assert "1 in 'mood', 1 in 'kind'" in notes[-1]
    facts = MultiTaskClassification.learn(MultiTaskClassificationConfig(class_weights="auto"), config, rows.take([0, 1, 2]), roles)
    own = MultiTaskClassification(MultiTaskClassificationConfig(), facts)
    assert list(own.head()["id2label"].values()) == ["mood=bad", "mood=good", "kind=1", "kind=2"]
    assert own.read_targets(config, rows.take([0, 1, 2]), roles).tolist() == [[1, 0], [-1, 1], [0, -1]]
    assert own.told(np.array([-1, 1])) == {"mood": None, "kind": "2"}
    with pytest.raises(UserError, match="some columns only") as error:
        arranged(path, DataConfig(train=str(path), label=["mood", "kind"], text="text"))
    assert "rows.csv:3" in str(error.value.where)


def test_facts_are_read_from_a_plain_config() -> None:
    plain = SimpleNamespace(id2label=task().head()["id2label"])
    found = MultiTaskClassification.facts_of(plain)["columns"]
    assert {column: facts["labels"] for column, facts in found.items()} == {"mood": ["bad", "good"], "kind": ["x", "y", "z"]}


# whole runs -------------------------------------------------------------------------------------------------------------------

SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "train.batch_size=16"]
SMALL += ["optimizer.lr=3e-3", "model.dropout=0", "train.epochs=25", "train.eval_every=50", "train.save_every=100", "device=cpu"]
SMALL += ["device.threads=1", "device.precision=fp32", "task=multi-task-classification", "data.label=[label,thing]"]


def with_things(count: int, shift: int) -> list[dict[str, Any]]:
    """Rows whose text tells both labels; every seventh lacks one of them."""
    rows = labelled_rows(count, shift=shift)
    for i, row in enumerate(rows):
        n, thing = next((n, thing) for n, thing in enumerate(THINGS) if thing in row["text"])
        row["text"] += f", this {thing}, that {thing}"
        row["thing"] = ("indoors", "outdoors", "worn")[n % 3]
        row["label" if i % 2 else "thing"] = row["label" if i % 2 else "thing"] if i % 7 else None
    return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("multitask")


@pytest.fixture
def run(home: Path, ftune_inside: Ftune) -> Path:
    """A finished run on rows of which some lack a label, with every option that applies."""
    where = home / "run"
    if not where.exists():
        keys = [
            f"data.{name}={write_rows(home / f'{name}.jsonl', with_things(count, shift))}"
            for name, count, shift in (("train", 112, 0), ("validation", 48, 112), ("test", 48, 160))
        ]
        options = ["data.missing_labels=drop", "task.calibrate=true", "task.threshold=auto", "task.class_weights=auto"]
        ftune_inside("train", *keys, *options, *SMALL, f"run.dir={where}").ok()
    return where


def test_it_learns_and_every_row_counts_where_it_can(run: Path, ftune_inside: Ftune) -> None:
    whole = json.loads((run / "metrics.json").read_text())
    assert whole["test"]["accuracy"]["value"] > 0.6, "by chance it is 0.42"
    assert whole["test"]["thing/accuracy"]["n"] < whole["test"]["accuracy"]["n"] == 48
    for split in ("test", "validation"):
        assert ftune_inside("eval", run, f"split={split}").ok().json[split] == whole[split]
    log = (run / "log.txt").read_text()
    for name in ("train", "validation", "test"):
        assert f"{name}.jsonl: labels that are missing are left out" in log


def test_predictions_and_plain_transformers_agree(run: Path, ftune_inside: Ftune) -> None:
    import transformers

    (line,) = ftune_inside("predict", run, stdin="the soup number 3 was lovely and kind\n").ok().lines
    assert set(line) == {"row", "text", "labels", "scores", "probabilities"}
    assert set(line["labels"]) == set(line["probabilities"]) == {"label", "thing"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    with torch.inference_mode():
        (found,) = model(**tokenizer(line["text"], return_tensors="pt")).logits
    for column, told in line["probabilities"].items():
        chosen = [i for i, name in model.config.id2label.items() if name.startswith(f"{column}=")]
        assert [model.config.id2label[i] for i in chosen] == [f"{column}={name}" for name in told]
        assert found[chosen].softmax(-1).tolist() == pytest.approx(list(told.values()), abs=1e-4)
        assert line["scores"][column] == told[line["labels"][column]]


def test_the_report_and_the_files_tell_the_columns_apart(run: Path) -> None:
    report = (run / "report/report.md").read_text()
    for column in ("label", "thing"):
        assert f"{column}: Scores per class" in report and f"{column}: Before and after calibration" in report
        assert f"{column}/accuracy" in report
    heads = [(run / f"eval/test/confusion-{number}.csv").read_text().splitlines()[0] for number in (1, 2)]
    assert heads[0].startswith("label: Confusion") and heads[1].startswith("thing: Confusion")
    answers = [json.loads(line) for line in (run / "eval/test/predictions.jsonl").read_text().splitlines()]
    assert any(row["target"]["thing"] is None for row in answers) and all(row["labels"]["thing"] for row in answers)
