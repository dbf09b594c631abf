"""text2text-generation: the model's own loss, texts that depend on their row alone, the libraries' metrics, columns and files."""

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
from finetune_cli.data import NoColumn, References, gather_references, load_splits
from finetune_cli.data.rows import of_table
from finetune_cli.encoded import Ragged
from finetune_cli.errors import UserError
from finetune_cli.models import never_wait
from finetune_cli.tasks.text2text import seq2seq
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


def mt5() -> Any:
    """Its states are not scaled before the head, although its embeddings are tied as T5's are."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    return MT5ForConditionalGeneration(MT5Config(**sizes, decoder_start_token_id=0)).eval()


MODELS = {
    "T5, tied": lambda: t5(),
    "T5, untied and gated": lambda: t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "mT5": mt5,
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
    model, every, task = MODELS[how](), columns(), a_task(max_new_tokens=9)
    task.adjust(model)
    assert getattr(model, seq2seq.HEAD_APART, False) is (how != "another")
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
    task.adjust(model)
    batch = batch_of(task, columns(), range(7))
    with torch.no_grad():
        ours = task.loss(task.forward(model, batch), batch)["loss"] / batch.weights["loss"]
        theirs = LabelSmoother(epsilon=0.2)(model(**batch.inputs), batch.inputs["labels"])
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_a_head_that_does_more_than_we_know_is_left_to_its_model() -> None:
    model = bart()
    head = model.lm_head.forward
    model.lm_head.forward = lambda states: head(states) * torch.rand(1)
    seq2seq.prove_head(model)
    assert getattr(model, seq2seq.HEAD_APART) is False


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


def test_what_anyone_can_have_for_free() -> None:
    from finetune_cli.tasks.text2text.text2text_findings import baselines, first_sentence

    long = ["#Person1#: Hi. How are you?\n#Person2#: Fine.", "One thing. Another thing.", "Nur ein Satz!"]
    assert [first_sentence(text) for text in long] == ["#Person1#: Hi.", "One thing.", "Nur ein Satz!"]
    assert first_sentence("你好。再见。") == "你好。" and first_sentence(" \n") == ""
    wanted = References(_cells([["#Person1#: Hi."], ["One thing."], ["Ein Satz"]]))
    found = baselines(long, wanted, tokenize="13a")
    assert found["copy the source"] == pytest.approx(theirs_of(long, list(wanted))) and found["first sentence"]["rouge1"] > 0.9
    assert list(baselines(["One sentence."], References(_cells([["x"]])), tokenize="13a")) == ["copy the source"]


def test_missing_libraries_are_told_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as told:
        metrics.require_generation()
    assert "sacrebleu and rouge-score" in told.value.what and "pip install sacrebleu rouge-score" in told.value.fix


# columns and files ------------------------------------------------------------------------------------------------------------


def rows_of(**cells: list[Any]) -> Any:
    import pyarrow as pa

    return of_table(pa.table(cells), "rows.jsonl", np.arange(1, 1 + len(next(iter(cells.values())))))


def arranged(rows: Any, *, references: Any = None, labelled: bool = True, **data: Any) -> tuple[Any, Any, list[str]]:
    return Text2TextGeneration.arrange(Text2TextGenerationConfig(references=references), rows, DataConfig(**data), labelled=labelled)


def test_references_are_texts_lists_and_columns() -> None:
    rows = rows_of(a=["one", " ", None], b=[["two", "three"], [], ["four"]])
    found = References(gather_references(rows, ["a", "b"]))
    assert list(found) == [["one", "two", "three"], [], ["four"]]
    assert list(found[np.array([2, 0])][np.array([1])]) == [["one", "two", "three"]]
    assert found.cells[1].as_py() is None, "a row without any has no label"


def test_columns_are_known_by_name() -> None:
    rows, roles, notes = arranged(rows_of(id=["1"], dialogue=["hello"], summary=["hi"]))
    assert (roles.text, roles.labels) == ("dialogue", ("summary",))
    assert roles.options == {"text": "dialogue", "text_pair": None, "label": "summary"} and len(notes) == 2
    assert rows.column("summary").to_pylist() == [["hi"]]
    asked, roles, _ = arranged(rows_of(dialogue=["hello"]), labelled=False)
    assert roles.text == "dialogue" and roles.labels == () and asked.columns == ["dialogue"]
    _, roles, _ = arranged(rows_of(english=["a"], german=["b"]), label="german")
    assert roles.text == "english", "the only one left"


def test_a_split_with_several_references_is_scored_against_them_all() -> None:
    """Learnt from ``summary``; where the three columns are there, they are the references, under the column that training named."""
    three = ["s1", "s2", "s3"]
    test = rows_of(dialogue=["x", "y"], s1=["a", "b"], s2=["c", "d"], s3=["e", None])
    rows, roles, _ = arranged(test, references=three, text="dialogue", label="summary")
    assert roles.labels == ("summary",) and rows.column("summary").to_pylist() == [["a", "c", "e"], ["b", "d"]]
    rows, roles, _ = arranged(rows_of(dialogue=["x"], summary=["a"]), references=three, text="dialogue", label="summary")
    assert rows.column("summary").to_pylist() == [["a"]], "the other splits have data.label alone"
    with pytest.raises(NoColumn):
        arranged(rows_of(dialogue=["x"], s1=["a"]), references=three, text="dialogue", label="summary")
    rows, roles, _ = arranged(test, text="dialogue", label=three)
    assert list(References(rows.column(roles.labels[0]))) == [["a", "c", "e"], ["b", "d"]] and roles.options["label"] == three


@pytest.mark.parametrize(
    ("targets", "words"),
    [(["two words", "three more words"], "13a"), (["我喜欢吃苹果", "他也是"], "zh"), (["これはりんごです", "それはなんですか"], "char")],
)
def test_words_are_cut_as_the_targets_are_written(targets: list[str], words: str) -> None:
    rows, roles, _ = arranged(rows_of(source=["a"] * len(targets), target=targets))
    facts = Text2TextGeneration.learn(Text2TextGenerationConfig(), DataConfig(), rows, roles)
    assert facts["tokenize"] == words
    assert Text2TextGeneration(Text2TextGenerationConfig(tokenize=Tokenize.intl), facts).tokenize == "intl"


def write_parallel(folder: Path, names: tuple[str, str], count: int, *, shift: int = 0) -> Path:
    """Easy lines to translate; the last one of each file ends in no line break, and one holds what other readers take for one."""
    numbers = ["one two", "two three", "three four", "four\u2028five", "five six"]
    words = ["eins zwei", "zwei drei", "drei vier", "vier\u2028fünf", "fünf sechs"]
    folder.mkdir(exist_ok=True)
    for name, lines in zip(names, (numbers, words), strict=True):
        text = "\n".join(f"{lines[i % 5]} {i + shift}" for i in range(count))
        (folder / name).write_text(text, encoding="utf-8")
    return folder / names[0]


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (("train.en", "train.de"), "en:de"),
        (("src-train.txt", "tgt-train.txt"), "src:tgt"),
        (("europarl.de-en.en", "europarl.de-en.de"), "en:de"),
        (("train.source", "train.target"), "source:target"),
    ],
)
def test_parallel_files_match_line_to_line(names: tuple[str, str], rule: str, tmp_path: Path) -> None:
    file = write_parallel(tmp_path, names, 9)
    splits = load_splits(DataConfig(train=str(file), validation=None, parallel=rule, label="answer"), seed=1)
    rows = splits.rows["train"]
    assert rows.columns == ["text", "answer"] and len(rows) == 9
    assert rows.column("text")[3].as_py() == "four\u2028five 3" and rows.column("answer")[3].as_py() == "vier\u2028fünf 3"
    assert [Path(name).name for name in splits.sources["train"]] == list(names), "both are hashed"
    assert rows.where(8).endswith("9, row 9")


# the whole way ----------------------------------------------------------------------------------------------------------------

TINY = ["task=text2text-generation", "model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32"]
TINY += ["data.parallel=en:de", "train.batch_size=8", "train.log_every=1", "train.save_every=6", "train.eval_every=10", "optimizer.lr=2e-2"]
TINY += ["device.precision=fp32", "task.max_new_tokens=8", "task.prefix=translate: ", "device.threads=1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    for name, count, shift in (("train", 40, 0), ("val", 10, 40), ("test", 12, 50)):
        write_parallel(folder, (f"{name}.en", f"{name}.de"), count, shift=shift)
    return folder


def keys(files: Path) -> list[str]:
    return [f"data.train={files / 'train.en'}", f"data.validation={files / 'val.en'}", f"data.test={files / 'test.en'}", *TINY]


@pytest.fixture
def run(files: Path, ftune_inside: Ftune, device: str) -> Path:
    """One small run for all tests of this module."""
    if not (files / "run").exists():
        ftune_inside("train", *keys(files), "train.epochs=6", f"device={device}", f"run.dir={files / 'run'}", cwd=files).ok()
    return files / "run"


def test_eval_scores_what_train_scored_and_takes_other_ways_to_generate(run: Path, files: Path, ftune_inside: Ftune) -> None:
    scored = json.loads((run / "metrics.json").read_text())["test"]
    assert set(scored) == {"loss", "bleu", "chrf", "rouge1", "rouge2", "rougeL"} and scored["chrf"]["n"] == 12
    assert ftune_inside("eval", run).ok().json["test"] == scored
    beams = ftune_inside("eval", run, "task.num_beams=3", "task.length_penalty=0.5").ok().json["test"]
    assert beams["loss"] == scored["loss"] and beams["chrf"] != scored["chrf"] and scored["chrf"]["value"] > 0
    alone = ftune_inside("eval", run / "model", f"data.test={files / 'test.en'}", "data.parallel=en:de", "task=text2text-generation").ok()
    assert alone.json["test"] == scored, "the exported model knows prefix and generation options"


def test_the_reported_texts_are_those_that_were_scored(run: Path, files: Path) -> None:
    lines = [json.loads(line) for line in (run / "eval/test/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = (files / "test.de").read_text(encoding="utf-8").split("\n")
    assert [line["target"] for line in lines] == wanted and [line["row"] for line in lines] == list(range(1, 13))
    scored = json.loads((run / "metrics.json").read_text())["test"]
    ours = theirs_of([line["generated"] for line in lines], [[text] for text in wanted])
    assert {name: scored[name]["value"] for name in ours} == pytest.approx(ours, abs=1e-9)
    page = (run / "report/report.md").read_text(encoding="utf-8")
    for title in ("Worst rows", "Score by length", "What was written", "How the metrics were computed", "nrefs:var", "copy the source"):
        assert title in page, title


def test_predict_asks_for_sources_alone_and_keeps_their_order(run: Path, files: Path, ftune_inside: Ftune, tmp_path: Path) -> None:
    scored = [json.loads(line) for line in (run / "eval/test/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    source = tmp_path / "alone.txt"
    source.write_bytes((files / "test.en").read_bytes())
    found = ftune_inside("predict", run, f"input={source}").ok().lines
    assert [(line["row"], line["generated"]) for line in found] == [(line["row"], line["generated"]) for line in scored]
    assert ftune_inside("predict", run, f"input={files / 'test.en'}").ok().lines == found, "the very file that was scored is text, too"
    several = ftune_inside("predict", run, f"input={source}", "task.num_beams=4", "task.num_return_sequences=3").ok().lines
    assert all(len(line["generated"]) == 3 for line in several)
    drawn = ["task.do_sample=true", "task.temperature=2"]
    first, again, other = (
        [line["generated"] for line in ftune_inside("predict", run, f"input={source}", *drawn, *more).ok().lines]
        for more in ([], [], ["task.sampling_seed=5"])
    )
    assert first == again != other
    piped = ftune_inside("predict", run, *drawn, stdin=source.read_bytes()).ok().lines
    assert [line["generated"] for line in piped] == first, "a draw belongs to the row, however the rows arrive"


def test_both_files_are_in_the_manifest(run: Path) -> None:
    files = json.loads((run / "manifest.json").read_text())["files"]
    assert [sorted(Path(name).name for name in files[split]) for split in ("train", "test")] == [
        ["train.de", "train.en"],
        ["test.de", "test.en"],
    ]


def test_a_stopped_run_goes_on_exactly(run: Path, files: Path, ftune_inside: Ftune, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from finetune_cli.engine.loop import Trainer
    from finetune_cli.errors import Stopped

    step = Trainer.step

    def stopping(self: Any) -> None:
        if self.state.step == 7:
            raise Stopped("stopped here")
        step(self)

    other = files / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        assert ftune_inside("train", *keys(files), "train.epochs=6", f"device={device}", f"run.dir={other}").code == 75
    ftune_inside("train", f"resume={other}").ok()
    for name in ("metrics.jsonl", "model/model.safetensors", "checkpoints/last/state.safetensors", "eval/test/predictions.jsonl"):
        assert (other / name).read_bytes() == (run / name).read_bytes(), name


def test_dialogsum_is_scored_against_three_references(ftune_inside: Ftune, device: str) -> None:
    """The real files: learnt from the one summary of dev, scored against the three of test."""
    import os

    if "FTUNE_DATA" not in os.environ:
        pytest.skip("FTUNE_DATA names no folder of data sets")
    folder = Path(os.environ["FTUNE_DATA"]) / "dialogsum"
    data = [f"data.train={folder / 'dialogsum.dev.jsonl'}", f"data.test={folder / 'dialogsum.test.jsonl'}", "data.text=dialogue"]
    data += ["data.label=summary", "task.references=[summary1,summary2,summary3]", "data.max_rows=32", "data.max_truncated=1"]
    small = [key for key in TINY if not key.startswith(("data.parallel", "train."))]
    ran = ftune_inside("train", *data, *small, "train.steps=1", "data.max_length=64", f"device={device}").ok().run
    line = json.loads((ran / "eval/test/predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert isinstance(line["target"], list) and len(line["target"]) == 3
