"""text2text-generation: the loss of the model's own code, texts that depend on their row alone, metrics of the libraries, columns and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ran import Ran

from finetune_cli import metrics
from finetune_cli.batching import Padded
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import NoColumn, References, gather_references
from finetune_cli.data.rows import of_table
from finetune_cli.encoded import Ragged
from finetune_cli.errors import UserError
from finetune_cli.models import never_wait
from finetune_cli.tasks import seq2seq
from finetune_cli.tasks.text2text_generation import Text2TextGeneration, Text2TextGenerationConfig, Tokenize

Ftune = Callable[..., Ran]
VOCABULARY = 60


def t5(**more: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    config = T5Config(**sizes, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, **more)
    return T5ForConditionalGeneration(config).eval()


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    halves = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = BartConfig(vocab_size=VOCABULARY, d_model=16, max_position_embeddings=64, init_std=0.5, forced_eos_token_id=None, **halves)
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_(std=0.1)
    return model


def foreign() -> Any:
    """A model whose family we do not know: it goes its own way to its logits."""
    model = t5()
    model.config.model_type = "unheard-of"
    return model


MODELS = {
    "T5, tied": lambda: t5(),
    "T5, untied and gated": lambda: t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "BART": bart,
    "another": foreign,
}


def a_task(**options: Any) -> Text2TextGeneration:
    facts = {"prefix": "", "target_length": None, "tokenize": "13a", "generation": {}}
    return Text2TextGeneration(Text2TextGenerationConfig(**options), facts)


def columns(rows: int = 7, *, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    sources, labels = ([draw.integers(5, VOCABULARY, n) for n in draw.integers(1, 12, rows)] for _ in range(2))
    return {"input_ids": Ragged.of(sources), "labels": Ragged.of(labels), "place": np.arange(1, rows + 1)}


def batch_of(task: Text2TextGeneration, every: dict[str, Any], indices: Any, *, asked: bool = False) -> Any:
    from finetune_cli.encoded import take

    some = take(every, np.asarray(indices))
    return task.collate(some, None if asked else References(_cells([["x"]] * len(indices))), Padded({"input_ids": 0}, 64), key=0)


def _cells(several: list[list[str] | None]) -> Any:
    import pyarrow as pa

    return pa.chunked_array([pa.array(several, pa.list_(pa.string()))])


# the loss ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", list(MODELS))
@pytest.mark.parametrize("at_once", [1 << 24, VOCABULARY * 5])
def test_loss_and_gradients_are_those_of_the_model_itself(how: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any split of the batch and any number of chunks; the model's own loss is a mean over the target tokens."""
    monkeypatch.setattr(seq2seq, "LOGITS_AT_ONCE", at_once)
    model, every, task = MODELS[how](), columns(), a_task()
    whole = batch_of(task, every, range(7))
    model(**whole.inputs).loss.backward()
    theirs = model(**whole.inputs).loss.item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for parts in ([range(7)], [range(3), range(3, 7)], [[i] for i in range(7)]):
        model.zero_grad()
        total = 0.0
        for part in parts:
            batch = batch_of(task, every, list(part))
            loss = task.loss(task.forward(model, batch), batch)["loss"] / whole.weights["loss"]
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(theirs, rel=1e-5)
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, gradients[name], atol=1e-6), name


def test_label_smoothing_is_that_of_the_trainer() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    model, task = t5(), a_task(label_smoothing=0.2)
    batch = batch_of(task, columns(), range(7))
    with torch.no_grad():
        ours = task.loss(task.forward(model, batch), batch)["loss"] / batch.weights["loss"]
        theirs = LabelSmoother(epsilon=0.2)(model(**batch.inputs), batch.inputs["labels"])
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


# generation -------------------------------------------------------------------------------------------------------------------


def texts_of(task: Text2TextGeneration, model: Any, parts: list[list[int]], *, name: str = "generated0") -> list[list[int]]:
    every, found = columns(), {}
    for part in parts:
        with torch.inference_mode():
            outputs, losses = task.infer(model, batch_of(task, every, part, asked=True))
        assert losses == {}
        flat = outputs[name]
        ids = np.split(flat.values.numpy(), np.cumsum(flat.lengths)[:-1])
        found |= dict(zip(part, [i.tolist() for i in ids], strict=True))
    return [found[i] for i in range(7)]


HOW = {
    "greedy": {},
    "beams": {"num_beams": 3, "length_penalty": 0.7},
    "samples": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "without repetition": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_new_tokens": 4},
}


@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("build", [t5, bart])
def test_a_text_does_not_depend_on_the_rows_beside_it(how: str, build: Callable[[], Any]) -> None:
    model, task = build(), a_task(max_new_tokens=10, **HOW[how])
    task.adjust(model)
    never_wait(model)
    alone = texts_of(task, model, [[i] for i in range(7)])
    assert texts_of(task, model, [list(range(7))]) == alone == texts_of(task, model, [[6, 0, 3], [5, 1], [4, 2]])
    assert len({tuple(ids) for ids in alone}) > 1 and max(map(len, alone)) <= 10


@pytest.mark.parametrize("how", ["greedy", "beams", "without repetition"])
def test_the_exported_model_generates_the_same_in_plain_transformers(how: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    model, task = t5(), a_task(max_new_tokens=9, **HOW[how])
    task.adjust(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    every = columns()
    theirs = [plain.generate(torch.tensor([every["input_ids"].sequence(i).tolist()]))[0, 1:].tolist() for i in range(7)]
    assert theirs == texts_of(task, model, [list(range(7))])


def test_samples_follow_the_probabilities_and_the_seed() -> None:
    """The share of each first token over many rows of one source is its probability."""
    model, rows = t5(), 4000
    model.lm_head.weight.data *= 3
    every = {"input_ids": Ragged.of([[7, 9, 11]] * rows), "place": np.arange(rows)}
    with torch.no_grad():
        logits = model(torch.tensor([[7, 9, 11]]), decoder_input_ids=torch.tensor([[0]])).logits[0, 0]

    def drawn(**options: Any) -> np.ndarray:
        task = a_task(max_new_tokens=1, do_sample=True, **options)
        task.adjust(model)
        with torch.inference_mode():
            outputs, _ = task.infer(model, batch_of(task, every, range(rows), asked=True))
        return outputs["generated0"].values.numpy()

    found = drawn()
    shares = np.bincount(found, minlength=VOCABULARY) / rows
    assert np.abs(shares - torch.softmax(logits, -1).numpy()).max() < 0.03
    assert (drawn() == found).all() and not (drawn(sampling_seed=1) == found).all()
    best = set(torch.topk(logits, 3).indices.tolist())
    assert set(drawn(top_k=3).tolist()) == best
    assert set(drawn(temperature=1e-3).tolist()) == {int(logits.argmax())}


def test_several_texts_a_row_come_best_first() -> None:
    model, task = t5(), a_task(max_new_tokens=6, num_beams=4, num_return_sequences=3)
    task.adjust(model)
    three = [texts_of(task, model, [list(range(7))], name=f"generated{k}") for k in range(3)]
    one = a_task(max_new_tokens=6, num_beams=4)
    one.adjust(model)
    assert three[0] == texts_of(one, model, [list(range(7))])
    assert all(len({tuple(found[i]) for found in three}) == 3 for i in range(7))
    samples = a_task(max_new_tokens=6, do_sample=True, num_return_sequences=2)
    samples.adjust(model)
    assert texts_of(samples, model, [[2], [1, 0, 3], [4, 5, 6]]) != texts_of(samples, model, [list(range(7))], name="generated1")


def test_a_model_with_few_positions_is_not_asked_for_more() -> None:
    with pytest.raises(UserError, match="at most 63 tokens"):
        a_task(max_new_tokens=64).adjust(bart())


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"do_sample": True, "num_beams": 2}, "task.do_sample"),
        ({"num_return_sequences": 2}, "task.num_return_sequences"),
        ({"num_return_sequences": 5, "num_beams": 4}, "task.num_return_sequences"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "task.min_new_tokens"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as told:
        a_task(**options)
    assert where in told.value.where


# metrics ----------------------------------------------------------------------------------------------------------------------

GIVEN = ["the cat sat on the mat .", "he eats", "", "one two three four five six", "Das Auto ist sehr schnell!", "same words here"]
WANTED = [
    ["the cat sat on a mat .", "a cat was on the mat ."],
    ["he is eating bread"],
    ["something was here"],
    ["one two three four five six", "six five four", "one"],
    ["Das Auto war schnell."],
    ["same words here", "other words"],
]


def theirs_of(given: list[str], wanted: list[list[str]], tokenize: str = "13a") -> dict[str, float]:
    """The libraries' own corpus figures."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    streams = [[own[k] if k < len(own) else None for own in wanted] for k in range(max(map(len, wanted)))]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouge = [scorer.score_multi(own, text) for text, own in zip(given, wanted, strict=True)]
    found = {"bleu": BLEU(tokenize=tokenize).corpus_score(given, streams).score, "chrf": CHRF().corpus_score(given, streams).score}
    return found | {name: float(np.mean([row[name].fmeasure for row in rouge])) for name in ("rouge1", "rouge2", "rougeL")}


def test_metrics_are_those_of_the_libraries_on_any_resample() -> None:
    table = metrics.per_text(GIVEN, WANTED)
    assert metrics.generation(table) == pytest.approx(theirs_of(GIVEN, WANTED), abs=1e-9)
    draw = np.random.default_rng(0)
    for _ in range(30):
        rows = draw.integers(0, len(GIVEN), len(GIVEN))
        times = np.bincount(rows, minlength=len(GIVEN))[None, :].astype(float)
        ours = {name: float(found[0]) for name, found in metrics.generation_measures(table, slice(None)).plain(times).items()}
        assert ours == pytest.approx(theirs_of([GIVEN[i] for i in rows], [WANTED[i] for i in rows]), abs=1e-9)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(["", ""], [["a b"], ["c"]]), (["a"], [["a"]]), (["x y z w v"], [["a b c d e"]]), (["a b c d", "e f"], [["a b x d"], ["e"]])],
)
def test_metrics_at_the_edges(given: list[str], wanted: list[list[str]]) -> None:
    """Nothing written, nothing right, texts shorter than an n-gram."""
    assert metrics.generation(metrics.per_text(given, wanted)) == pytest.approx(theirs_of(given, wanted), abs=1e-9)


def test_each_text_has_the_chrf_of_sacrebleu() -> None:
    from sacrebleu.metrics import CHRF

    each = metrics.per_text(GIVEN, WANTED).each_chrf()
    assert each.tolist() == pytest.approx([CHRF().sentence_score(text, own).score for text, own in zip(GIVEN, WANTED, strict=True)])


def test_chinese_is_counted_by_characters() -> None:
    given, wanted = ["我喜欢吃苹果"], [["我喜欢吃梨"]]
    found = metrics.generation(metrics.per_text(given, wanted, tokenize="zh"))
    assert found["bleu"] == pytest.approx(theirs_of(given, wanted, "zh")["bleu"]) and found["bleu"] > 30
    assert found["rouge1"] == pytest.approx(2 * 4 / (6 + 5)), "rouge-score's own tokenizer sees no word here"


def test_scores_have_intervals_and_n() -> None:
    table = metrics.per_text(GIVEN, WANTED)
    score = metrics.score(lambda rows: metrics.generation_measures(table, rows), len(table), seed=1)
    assert set(score) == {"bleu", "chrf", "rouge1", "rouge2", "rougeL"}
    for entry in score.values():
        assert entry["n"] == 6 and entry["low"] < entry["value"] < entry["high"]
    assert "nrefs:var" in metrics.signatures()["bleu"] and "tok:zh" in metrics.signatures("zh")["bleu"]


def test_missing_libraries_are_told_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as told:
        metrics.require_generation()
    assert "sacrebleu and rouge-score" in told.value.what and 'pip install "ftune[generation]"' in told.value.fix
