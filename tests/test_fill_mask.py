"""Masked language modelling: masks that depend on the example alone, the head over masked tokens alone, resumes, fills and classifiers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from ran import Ran, labelled_rows, write_rows

from finetune_cli import metrics, models, randomness
from finetune_cli.batching import Padded
from finetune_cli.config.schema import ModelConfig
from finetune_cli.encoded import Ragged
from finetune_cli.tasks.fill_mask import FillMask, FillMaskConfig
from finetune_cli.tasks.masks import masked_head, masking
from finetune_cli.tasks.masks.masking import Masking

Ftune = Callable[..., Ran]

SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "device=cpu"]
TEXTS = [row["text"] for row in labelled_rows(40)]
LONG = " ".join(TEXTS[:9])
PLAIN = Masking(probability=0.15, whole_words=False, random_share=0.1, keep_share=0.1, blocks=False)
WORDS = Masking(probability=0.3, whole_words=True, random_share=0.1, keep_share=0.1, blocks=False)
BLOCKS = Masking(probability=0.15, whole_words=True, random_share=0.1, keep_share=0.1, blocks=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Pieces of words, so that whole words mean something."""
    return models.train_tokenizer(iter(TEXTS), ModelConfig(shape={"vocabulary": 90}), "encoder")


def encoded(texts: list[str], tokenizer: Any, how: Masking, max_length: int = 24, first_row: int = 0) -> Any:
    return masking.encode(texts, tokenizer, how, max_length=max_length, first_row=first_row, asked=False)


# examples ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [PLAIN, WORDS, BLOCKS], ids=["tokens", "words", "blocks"])
def test_no_token_is_lost_and_no_example_too_long(tokenizer: Any, how: Masking) -> None:
    texts = ["", LONG, *TEXTS[:5]]
    examples = encoded(texts, tokenizer, how)
    special = set(tokenizer.all_special_ids)
    found = [i for i in examples.columns["input_ids"].values.tolist() if i not in special]
    assert found == [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert examples.lengths().max() <= 24 and examples.counts.lost == 0
    assert 0 not in examples.row.tolist()  # a row without a text is no example
    for i in range(len(examples)):
        ids = examples.columns["input_ids"].sequence(i)
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id


def test_blocks_are_full_but_for_the_last(tokenizer: Any) -> None:
    lengths = encoded([LONG, *TEXTS], tokenizer, BLOCKS).lengths()
    assert set(lengths[:-1]) == {24}


def test_a_blank_row_that_is_asked_has_an_answer(tokenizer: Any) -> None:
    examples = masking.encode(["", LONG], tokenizer, PLAIN, max_length=24, first_row=7, asked=True)
    assert examples.row[0] == 7 and set(examples.row[1:]) == {8}


# masks ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [PLAIN, WORDS, BLOCKS], ids=["tokens", "words", "blocks"])
def test_masks_are_the_same_however_examples_are_batched(tokenizer: Any, how: Masking) -> None:
    examples = encoded([LONG, *TEXTS], tokenizer, how)
    whole = masking.mask(examples.columns, how, tokenizer, key=5)
    offsets = examples.columns["input_ids"].offsets
    for part in ([3, 1], [2], list(range(len(examples)))[::-1]):
        some = masking.mask(examples.take(np.array(part)).columns, how, tokenizer, key=5)
        expected = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in part])
        assert (some.chosen == whole.chosen[expected]).all() and (some.shown == whole.shown[expected]).all()
    other = masking.mask(examples.columns, how, tokenizer, key=6)
    assert (other.chosen != whole.chosen).any()


@pytest.mark.parametrize("how", [PLAIN, WORDS, BLOCKS], ids=["tokens", "words", "blocks"])
def test_every_example_has_a_mask_and_no_special_token_is_one(tokenizer: Any, how: Masking) -> None:
    odd = ["a", "☃", f"the {tokenizer.mask_token} chair", *TEXTS]  # one token; unknown alone; a mask that stood there before
    examples = encoded(odd, tokenizer, how)
    ids = examples.columns["input_ids"]
    for key in range(30):
        chosen = masking.mask(examples.columns, how, tokenizer, key=key).chosen
        assert (np.add.reduceat(chosen, ids.offsets[:-1]) >= 1).all()
        hidden = set(ids.values[chosen].tolist()) & set(tokenizer.all_special_ids)
        assert hidden <= {tokenizer.unk_token_id}


def test_shares_are_those_of_the_options(tokenizer: Any) -> None:
    examples = encoded(TEXTS, tokenizer, PLAIN, max_length=64)
    ids, may = examples.columns["input_ids"].values, examples.columns["unit"].values >= 0
    made = [masking.mask(examples.columns, PLAIN, tokenizer, key=key) for key in range(200)]
    chosen = np.array([m.chosen for m in made])
    shown = np.array([m.shown for m in made])
    assert chosen.mean(0)[may].mean() == pytest.approx(0.15, abs=0.003)
    assert chosen.mean(0)[may].min() > 0.04  # each token has its turn
    assert (shown == ids)[~chosen].all()
    mask = (shown == tokenizer.mask_token_id)[chosen].mean()
    same = (shown == ids)[chosen].mean()
    assert mask == pytest.approx(0.8, abs=0.02) and same == pytest.approx(0.1, abs=0.02)


def test_whole_words_are_masked_whole(tokenizer: Any) -> None:
    examples = encoded(TEXTS, tokenizer, WORDS, max_length=64)
    units = examples.columns["unit"]
    chosen = masking.mask(examples.columns, WORDS, tokenizer, key=1).chosen
    words = [text.replace("#", "").split() for text in TEXTS]
    several = False
    for i in range(len(examples)):
        unit, mine = units.sequence(i), chosen[units.offsets[i] : units.offsets[i + 1]]
        for word in set(unit[unit >= 0].tolist()):
            assert len(set(mine[unit == word].tolist())) == 1
            several |= int((unit == word).sum()) > 1
        assert len(set(unit[unit >= 0].tolist())) == len(words[i])
    assert several, "the tokenizer must split words for this test"


def test_keyed_numbers_are_uniform_and_stand_alone() -> None:
    a, b = np.meshgrid(np.arange(300), np.arange(40), indexing="ij")
    numbers = randomness.uniform(3, a, b)
    assert numbers.shape == a.shape and 0 <= numbers.min() and numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(1200, abs=170)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.03
    assert randomness.uniform(3, 17, 5)[0] == numbers[17, 5] != randomness.uniform(4, 17, 5)[0]
    assert randomness.uniform(2**62 + 1, -1)[0] != randomness.uniform(2**62, -1)[0]


# the head ------------------------------------------------------------------------------------------------------------------------

SIZE = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TINY: dict[str, dict[str, Any]] = {
    **{name: SIZE | {"max_position_embeddings": 40} for name in masked_head.TOKEN_BY_TOKEN},
    "distilbert": {"vocab_size": 97, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": SIZE | {"embedding_size": 16},
    "albert": SIZE | {"embedding_size": 8},
    "modernbert": SIZE | {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")},
}


@pytest.mark.parametrize("family", sorted(masked_head.TOKEN_BY_TOKEN))
@pytest.mark.parametrize("separate", [True, False], ids=["masked tokens alone", "every token"])
def test_loss_and_gradients_are_those_of_transformers(family: str, separate: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same masked batch, against the labels that transformers' own collator would give."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **TINY[family])
    model = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    task = FillMask(FillMaskConfig(), FillMask.facts_of(None), tokenizer)
    examples = encoded(TEXTS[:6], tokenizer, PLAIN, max_length=30)
    batch = task.collate(examples.columns, np.zeros(6), Padded({"input_ids": tokenizer.pad_token_id}, 30), key=2)
    labels = torch.full(batch.inputs["input_ids"].shape, -100)
    labels.view(-1)[batch.extra["positions"]] = batch.targets
    theirs = model(**batch.inputs, labels=labels)
    theirs.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if not separate:
        monkeypatch.setattr(masked_head, "TOKEN_BY_TOKEN", frozenset())
    logits = task.forward(model, batch)
    assert logits.shape == (batch.weights["loss"], 97)
    loss = task.loss(logits, batch)["loss"] / batch.weights["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if name in expected:
            assert torch.allclose(p.grad, expected[name], atol=1e-6), name


def test_only_masked_tokens_pass_the_head(tokenizer: Any) -> None:
    config = transformers.BertConfig(**SIZE)
    model = transformers.BertForMaskedLM(config).eval()
    seen: list[int] = []
    model.cls.predictions.decoder.register_forward_hook(lambda _, __, out: seen.append(out.numel() // 97))
    inputs = {"input_ids": torch.randint(5, 90, (3, 10))}
    masked_head.logits_at(model, inputs, torch.tensor([1, 14, 29]))
    assert seen == [3]
    assert type(model.bert).__name__ == "BertModel"  # the model is as it was


# metrics -------------------------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_plain_definitions() -> None:
    draw = np.random.default_rng(0)
    logits, true = torch.tensor(draw.normal(size=(200, 30))), torch.tensor(draw.integers(0, 30, 200))
    losses = torch.nn.functional.cross_entropy(logits, true, reduction="none").numpy()
    ranks = (logits >= logits.gather(1, true[:, None])).sum(1).numpy() - 1
    found = metrics.masked(losses, ranks, np.sort(draw.integers(0, 20, 200)), 20)
    assert found["perplexity"] == pytest.approx(np.exp(losses.mean()))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == true).double().mean()))
    assert found["recall_at_5"] == pytest.approx(float((logits.topk(5).indices == true[:, None]).any(1).double().mean()))


def test_a_model_that_knows_nothing_finds_nothing() -> None:
    """Equal logits are no find, whatever order they happen to be in."""

    class Same(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return transformers.modeling_outputs.MaskedLMOutput(logits=torch.zeros(*inputs["input_ids"].shape, 97))

    model = Same()
    model.config, model.base_model_prefix = transformers.PretrainedConfig(), "none"  # type: ignore[assignment]
    tok = models.train_tokenizer(iter(TEXTS), ModelConfig(shape={"vocabulary": 90}), "encoder")
    task = FillMask(FillMaskConfig(), FillMask.facts_of(None), tok)
    examples = encoded(TEXTS[:4], tok, PLAIN)
    batch = task.collate(examples.columns, np.zeros(4), Padded({"input_ids": 0}, 24), key=0)
    outputs, _ = task.infer(model, batch)
    assert (outputs["rank"].values == 96).all()  # type: ignore[union-attr]


def test_tokens_of_blocks_go_to_the_rows_they_stand_in(tokenizer: Any) -> None:
    examples = encoded([LONG, *TEXTS], tokenizer, BLOCKS)
    ids, owner = examples.columns["input_ids"], examples.columns["token_row"]
    chosen = masking.mask(examples.columns, BLOCKS, tokenizer, key=0).chosen
    lengths = np.add.reduceat(chosen, ids.offsets[:-1])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.concatenate([np.flatnonzero(chosen[ids.offsets[i] : ids.offsets[i + 1]]) for i in range(len(ids))])
    true = ids.values[chosen]
    task = FillMask(FillMaskConfig(), FillMask.facts_of(None), tokenizer)
    gathered, rows = task.gather({"place": Ragged(place, offsets), "true": Ragged(true, offsets)}, examples)
    assert (np.diff(rows) > 0).all() and set(rows.tolist()) <= set(range(41))
    assert gathered["true"].lengths().min() >= 1 and gathered["true"].lengths().sum() == chosen.sum()
    for i, row in enumerate(rows.tolist()):
        assert sorted(gathered["true"].sequence(i).tolist()) == sorted(ids.values[chosen & (owner.values == row)].tolist())


# whole runs ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("texts")
    keys = ["task=fill-mask"]
    for name, shift, count in (("train", 0, 48), ("validation", 60, 16), ("test", 80, 16)):
        rows = [{"text": row["text"], "label": row["label"]} for row in labelled_rows(count, shift=shift)]
        keys.append(f"data.{name}={write_rows(home / f'{name}.csv', rows)}")
    return keys


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    """Runs already made in this module."""
    return {}


@pytest.fixture
def whole(runs: dict[str, Path], files: list[str], ftune_inside: Ftune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps, three an epoch, never interrupted."""
    if "whole" not in runs:
        home = tmp_path_factory.mktemp("whole")
        runs["whole"] = ftune_inside("train", *files, *KEYS, *SMALL, f"run.dir={home / 'run'}").ok().run
    return runs["whole"]


KEYS = ["task.whole_words=true", "train.batch_size=16", "train.epochs=3", "train.log_every=1", "train.eval_every=2", "optimizer.lr=3e-3"]


def test_a_run_stopped_inside_an_epoch_goes_on_to_the_bit(
    whole: Path, files: list[str], ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_cli.engine.loop import Trainer
    from finetune_cli.errors import Stopped

    step = Trainer.step

    def until_five(trainer: Trainer) -> None:
        if trainer.state.step == 5:
            raise Stopped("stopped", where="step 5", fix="none")
        step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", until_five)
        stopped = ftune_inside("train", *files, *KEYS, *SMALL, f"run.dir={tmp_path / 'run'}")
    assert stopped.code == 75 and json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 5
    ftune_inside("train", f"resume={tmp_path / 'run'}").ok()
    for name in ("metrics.jsonl", "model/model.safetensors", "checkpoints/last/model.safetensors", "checkpoints/last/state.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def test_masks_do_not_depend_on_the_micro_batch(
    whole: Path, files: list[str], ftune_inside: Ftune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens at a time: the same losses to rounding (no dropout, which is keyed by the pass)."""
    from finetune_cli.engine import building

    keys = [*files, *KEYS, *SMALL, "model.dropout=0", "device.precision=fp32"]
    runs, find = [], building.batching.find
    for name in ("one", "several"):
        if name == "several":
            monkeypatch.setattr(building.batching, "find", lambda *a, **k: find(*a, **{**k, "memory_bytes": 0.0}))
        runs.append(ftune_inside("train", *keys, f"run.dir={tmp_path / name}").ok().run)
    one, several = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
    assert json.loads((runs[1] / "manifest.json").read_text())["plan"]["batches"]["micro_tokens"] < 200
    for a, b in zip(one, several, strict=True):
        assert b == pytest.approx(a, rel=1e-3)


def test_fills_are_those_of_the_pipeline(whole: Path, ftune_inside: Ftune) -> None:
    mask = "[MASK]"
    texts = [f"the {mask} number was late", f"{mask} was clean and {mask} indeed", "nothing to fill", "", "the lamp was ___ and <mask>"]
    ran = ftune_inside("predict", whole, "task.top_k=3", "device.precision=fp32", stdin="\n".join(texts)).ok()
    pipe = transformers.pipeline("fill-mask", model=str(whole / "model"), device="cpu", top_k=3)
    for line, text in zip(ran.lines[:2], texts, strict=False):
        theirs = pipe(text)
        theirs = [theirs] if isinstance(theirs[0], dict) else theirs
        assert [[f["token"] for f in fills] for fills in line["fills"]] == [[t["token_str"] for t in fills] for fills in theirs]
        ours = [f["score"] for fills in line["fills"] for f in fills]
        assert ours == pytest.approx([t["score"] for fills in theirs for t in fills], rel=1e-3)
        pieces = text.split(mask)
        best = [fills[0]["token"] for fills in line["fills"]]
        assert line["filled"] == "".join(a + b for a, b in zip(pieces, [*best, ""], strict=True))
    assert ran.lines[2]["fills"] == [] and ran.lines[2]["filled"] == texts[2]
    assert ran.lines[3]["fills"] is None
    assert len(ran.lines[4]["fills"]) == 2 and "___" not in ran.lines[4]["filled"]
    assert "1 of 5 rows hold no mask" in ran.err and "1 of 5 rows write a mask otherwise" in ran.err


def test_a_long_row_is_filled_in_every_window(whole: Path, ftune_inside: Ftune) -> None:
    text = " ".join(["the lamp was [MASK] and clean"] * 9)
    (line,) = ftune_inside("predict", whole, "data.max_length=16", stdin=text).ok().lines
    assert len(line["fills"]) == 9 and "[MASK]" not in line["filled"] and line["filled"].count(" and clean") == 9


def test_a_score_is_the_same_from_the_model_alone_and_follows_options(whole: Path, ftune_inside: Ftune) -> None:
    before = json.loads((whole / "metrics.json").read_text())["test"]
    files = json.loads((whole / "manifest.json").read_text())["files"]["test"]
    alone = ftune_inside("eval", whole / "model", "task=fill-mask", f"data.test={next(iter(files))}").ok().json["test"]
    assert alone == before  # whole words: told by the model's facts, not by an option
    other = ftune_inside("eval", whole, "task.mask_probability=0.5").ok().json["test"]
    assert other["loss"]["value"] != before["loss"]["value"]


def test_the_report_shows_what_it_should(whole: Path) -> None:
    told = (whole / "report" / "report.md").read_text(encoding="utf-8")
    for title in ("by what was shown", "Loss by frequency", "Loss by length", "Commonest wrong guesses", "Hardest rows"):
        assert title in told
    first = json.loads((whole / "eval/test/predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(first) == {"row", "text", "loss", "masked"} and set(first["masked"][0]) == {"token", "shown", "guess", "score", "rank"}


def test_a_classifier_starts_from_the_run(whole: Path, files: list[str], ftune_inside: Ftune, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    keys = [key for key in files if not key.startswith("task=")]
    options = ["train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "data.text=text", "data.label=label", "device=cpu"]
    ran = ftune_inside("train", *keys, f"model.path={whole}", *options, f"run.dir={tmp_path / 'run'}").ok()
    assert "new in the model, drawn from the seed: " in ran.err and "classifier.weight" in ran.err
    before, after = (load_file(run / "model" / "model.safetensors") for run in (whole, ran.run))
    body = [name for name in after if name.startswith("bert.") and "pooler" not in name]
    assert len(body) > 10 and all(torch.equal(before[name], after[name]) for name in body)


@pytest.mark.parametrize("lines", ["rows", "blocks"])
def test_other_layouts_of_examples_score_alike_in_train_and_eval(lines: str, files: list[str], ftune_inside: Ftune, tmp_path: Path) -> None:
    keys = [f"task.lines={lines}", "data.max_length=12", "train.steps=2", "train.batch_size=8"]
    run = ftune_inside("train", *files, *SMALL, *keys, f"run.dir={tmp_path / 'run'}").ok().run
    assert ftune_inside("eval", run).ok().json["test"] == json.loads((run / "metrics.json").read_text())["test"]
    assert "cut at" not in (run / "log.txt").read_text()


def test_minilm_gets_a_head_tied_to_its_tokens() -> None:
    source = models.locate(ModelConfig(path="minilm"), offline=True)
    assert source is not None
    config = models.load_config(source, ModelConfig(path="minilm"), offline=True)
    task = FillMask(FillMaskConfig(), FillMask.facts_of(None))
    model, new = models.load(source, ModelConfig(path="minilm"), task, config, seed=1, offline=True)
    assert new and all(name.startswith("cls.predictions.") and name != "cls.predictions.decoder.weight" for name in new)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight  # type: ignore[union-attr]
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias  # type: ignore[union-attr]
