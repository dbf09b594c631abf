"""What every task owes, held by running every shipped experiment: train, eval, predict, reload, with a model of a few thousand weights.

A new task is covered by its experiment alone; nothing here knows a task's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ran import EXPERIMENTS, Ran, labelled_rows, one_a_task, write_rows

SMALL = [
    "model=tiny",
    "data.max_rows=96",
    "train.batch_size=16",
    "run.name=small",
    "model.shape.layers=1",
    "model.shape.hidden=32",
    "model.shape.intermediate=32",
]
FILES = ["config.yaml", "command.txt", "manifest.json", "status.json", "log.txt", "metrics.jsonl", "timing.jsonl", "metrics.json"]
FILES += ["checkpoints/best", "checkpoints/last", "model/config.json", "model/README.md", "model/model.safetensors"]
FILES += ["eval/test/metrics.json", "eval/test/predictions.jsonl", "report/index.html", "report/report.md"]

Ftune = Callable[..., Ran]


@pytest.fixture(scope="module")
def runs() -> dict[str, Ran]:
    """Runs already made in this module, by experiment."""
    return {}


@pytest.fixture(params=EXPERIMENTS)
def trained(
    request: pytest.FixtureRequest, runs: dict[str, Ran], ftune_inside: Ftune, tmp_path_factory: pytest.TempPathFactory, device: str
) -> Ran:
    """Two steps of a shipped experiment with a very small model, whole way to the report."""
    name = request.param
    if name not in runs:
        home = tmp_path_factory.mktemp(name)
        runs[name] = ftune_inside("train", f"+exp={name}", "train.steps=2", *SMALL, f"device={device}", cwd=home)
    return runs[name].ok()


def scored_splits(run: Path) -> list[str]:
    """Test, and validation unless the experiment says that it has none; the run must have scored just these."""
    from finetune_cli.config import saved
    from finetune_cli.tasks import task_configs

    config = saved.load(run / "config.yaml", tasks=task_configs())
    splits = ["test"] if config.data.validation is None else ["test", "validation"]
    assert sorted(json.loads((run / "metrics.json").read_text())) == splits
    return splits


def test_the_run_directory_is_whole(trained: Ran) -> None:
    run = trained.run
    files = [*FILES, *(f"eval/{split}/metrics.json" for split in scored_splits(run))]
    assert run.is_absolute() and [name for name in files if not (run / name).exists()] == []
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 2, 0)
    assert not [p for p in run.rglob("*") if p.name.startswith((".tmp", ".trash", ".reserve"))]
    assert "same logits" in (run / "log.txt").read_text()
    for link in ("best", "last"):
        assert not Path((run / "checkpoints" / link).readlink()).is_absolute()


def test_the_score_of_eval_is_that_of_train(trained: Ran, ftune_inside: Ftune) -> None:
    for split in scored_splits(trained.run):
        ran = ftune_inside("eval", trained.run, f"split={split}").ok()
        assert ran.json[split] == json.loads((trained.run / "metrics.json").read_text())[split]


def test_rows_learnt_by_heart_are_told(ftune_inside: Ftune, tmp_path: Path) -> None:
    """A file of training rows, and a split that the run did not make, are no test of it."""
    write_rows(tmp_path / "in.csv", labelled_rows(40))
    write_rows(tmp_path / "new.csv", labelled_rows(40, shift=40))
    name = ftune_inside("train", "data.train=in.csv", "data.text=text", "data.label=label", "train.steps=2", *SMALL).ok().run
    for keys, heard in (
        (["data.validation=0.10", "data.label=label"], False),
        (["data.test=in.csv"], True),
        (["data.train=new.csv", "data.test=0.5"], False),
    ):
        ran = ftune_inside("eval", name, *keys).ok()
        written = Path(re.findall(r"written: (\S+)", ran.err)[-1])
        assert ["learnt by heart" in text for text in (ran.err, (written / "report.md").read_text())] == [heard, heard], keys
    told = ftune_inside("eval", name, "data.test=0.5").fails()
    assert "trained on rows of it" in told[0] and "data.test" in told[1]
    write_rows(tmp_path / "in.csv", labelled_rows(44))
    assert "in.csv changed since the run was trained on it" in ftune_inside("eval", name).ok().err


def test_predict_keeps_order_and_numbers_and_agrees_with_eval(trained: Ran, ftune_inside: Ftune, tmp_path: Path) -> None:
    expected = [json.loads(line) for line in (trained.run / "eval/test/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = expected[:40]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in expected), encoding="utf-8")
    found = ftune_inside("predict", trained.run, f"input={texts}", "data.text=text").ok().lines
    assert [row["row"] for row in found] == list(range(1, len(expected) + 1))
    assert [row["text"] for row in found] == [row["text"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in set(ours) & set(theirs) - {"row"}:
            assert alike(ours[key], theirs[key]), key


def alike(value: Any, same: Any) -> bool:
    """Equal, but for numbers that may lie 0.02 apart; lists and objects part by part."""
    if isinstance(value, dict) and isinstance(same, dict):
        return value.keys() == same.keys() and all(alike(value[key], same[key]) for key in value)
    if isinstance(value, list) and isinstance(same, list):
        return len(value) == len(same) and all(map(alike, value, same))
    return bool(value == same or (isinstance(value, float) and value == pytest.approx(same, abs=0.02)))


def test_piped_predictions_are_null_for_a_blank_line(trained: Ran, ftune_inside: Ftune) -> None:
    found = ftune_inside("predict", trained.run, stdin="first text\n\nthird text\n").ok().lines
    assert [row["row"] for row in found] == [1, 2, 3]
    assert {value for key, value in found[1].items() if key not in ("row", "text")} == {None}
    assert None not in [value for key, value in found[0].items() if key != "text"]


def test_plain_transformers_loads_the_model(trained: Ran) -> None:
    import torch
    import transformers

    from finetune_cli.tasks import get

    task = get(json.loads((trained.run / "model/task.json").read_text())["task"])
    model = getattr(transformers, task.auto_class).from_pretrained(trained.run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.run / "model")
    inputs = tokenizer("a text", return_tensors="pt")
    if task.architecture == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.inference_mode():
        assert torch.isfinite(model(**inputs).logits).all()
    if task.pipeline:
        pipe = transformers.pipeline(task.pipeline, model=str(trained.run / "model"), device="cpu")
        asked = {"candidate_labels": ["one", "two"]} if task.pipeline == "zero-shot-classification" else {}
        answers = pipe("a text" if task.pipeline != "fill-mask" else f"a {tokenizer.mask_token}", **asked)
        answers = [answers] if asked else answers  # this pipeline gives one dict for one text
        assert isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers)
        if task.pipeline == "text-classification":
            assert answers[0]["label"] in model.config.label2id


def test_the_model_folder_evaluates_and_moves_alone(trained: Ran, ftune_inside: Ftune, tmp_path: Path) -> None:
    """In fp32: what bf16 rounds in a model that has hardly learnt, an adapter apart and one merged round differently."""
    import shutil

    before = ftune_inside("eval", trained.run, "device.precision=fp32").ok().json["test"]
    for source in ("model", "checkpoints/best"):
        alone = tmp_path / source.replace("/", "-")
        shutil.copytree(trained.run / source, alone, symlinks=False)
        extra = [] if (alone / "config.yaml").is_file() else _data_of(trained.run)
        after = ftune_inside("eval", alone, *extra, "device.precision=fp32").ok().json["test"]
        for metric, entry in before.items():
            found = after.get(metric, {}).get("value")
            if found is not None and entry["value"] is not None:  # a correlation with a constant is not defined
                assert found == pytest.approx(entry["value"], abs=1e-3), (source, metric)


def _data_of(run: Path) -> list[str]:
    from finetune_cli.config import saved
    from finetune_cli.tasks import task_configs

    config = saved.load(run / "config.yaml", tasks=task_configs())
    label = config.data.label
    return [f"data.test={config.data.test}", f"task={config.task.name}"] + ([f"data.label={label}"] if label else [])


@pytest.mark.parametrize("name", one_a_task())
def test_training_learns(name: str, ftune_inside: Ftune, tmp_path_factory: pytest.TempPathFactory) -> None:
    """More steps on a few rows: the training loss falls."""
    home = tmp_path_factory.mktemp("learn")
    options = [
        "data.max_rows=32",
        "data.max_unknown=1",
        "train.steps=120",
        "train.log_every=20",
        "train.eval_every=120",
        "optimizer.lr=1e-2",
        "model.dropout=0",
        "data.test=null",
        "data.validation=0.2",
    ]
    run = ftune_inside("train", f"+exp={name}", *SMALL, "data.max_truncated=1", "data.max_leaked=1", *options, cwd=home).ok().run
    losses = [r["train/loss"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "train/loss" in r]
    assert losses[-1] < 0.85 * losses[0]


def test_any_split_of_a_batch_has_the_same_loss(trained: Ran) -> None:
    """Sums and weights of the parts add up to those of the whole: what gradient accumulation stands on.

    Where the rows of a batch make each other's loss there are no parts: the plan never splits a batch, however little memory there is.
    """
    from dataclasses import replace

    import torch

    from finetune_cli.batching import BatchPlan, micro_batches

    task, model, labelled, layout = _opened(trained.run)
    indices = np.arange(min(13, len(labelled.examples)))
    if task.rows_interact:
        plan = json.loads((trained.run / "manifest.json").read_text())["plan"]["batches"]
        tight = replace(BatchPlan(**plan), micro_tokens=1)
        assert [part.tolist() for part in micro_batches(indices, labelled.examples.lengths(), plan=tight)] == [indices.tolist()]
        return

    def sums(parts: list[np.ndarray]) -> dict[str, float]:
        total: dict[str, float] = {}
        weight: dict[str, float] = {}
        for part in parts:
            chosen = labelled.examples.take(part)
            batch = task.collate(chosen.columns, labelled.targets[chosen.row], layout, key=1)
            with torch.no_grad():
                losses = task.loss(task.forward(model, batch), batch)
            for key, value in losses.items():
                total[key] = total.get(key, 0.0) + float(value)
                weight[key] = weight.get(key, 0.0) + batch.weights[key]
        return {key: total[key] / weight[key] for key in total}

    whole = sums([indices])
    for size in (1, 2, 4):
        assert sums([indices[i : i + size] for i in range(0, len(indices), size)]) == pytest.approx(whole, rel=1e-4)


def _opened(run: Path) -> tuple[Any, Any, Any, Any]:
    from finetune_cli.config import saved
    from finetune_cli.data import load_splits
    from finetune_cli.engine.inference import Labelled
    from finetune_cli.engine.opened import open_model
    from finetune_cli.tasks import task_configs

    config = saved.load(run / "config.yaml", tasks=task_configs())
    opened = open_model(str(run), root="runs", task=config.task, data=config.data, where=config.device, offline=True)
    splits = load_splits(
        opened.data,
        seed=opened.seed,
        only=("test",),
        labelled=opened.task.labelled,
        arrange=partial(opened.task.arrange_split, opened.task.config),
    )
    examples = opened.encoder.split(splits.rows["test"], splits.roles, splits.sources["test"])
    targets = opened.task.read_targets(opened.data, splits.rows["test"], splits.roles)
    return opened.task, opened.model.eval(), Labelled(examples, targets), opened.layout
