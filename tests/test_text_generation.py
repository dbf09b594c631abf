"""text-generation held against plain transformers: the same loss and gradients, documents apart, generation that no batch can change."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from forked import Forks
from hypothesis import given, settings
from hypothesis import strategies as st
from ran import ROOT, Ran

from finetune_cli import corpora, models
from finetune_cli.batching import Padded
from finetune_cli.config.schema import DataConfig, ModelConfig
from finetune_cli.data.chat_templates import CHATML, TEMPLATES
from finetune_cli.data.conversations import CONVERSATION, find_form, with_conversations
from finetune_cli.data.rows import Rows, of_table
from finetune_cli.encoded import Ragged, join
from finetune_cli.errors import UserError
from finetune_cli.tasks import get
from finetune_cli.tasks.writing.blocks import token_bytes
from finetune_cli.tasks.writing.generation_options import Template

SHAPE = {"layers": 2, "hidden": 32, "heads": 2, "intermediate": 32, "vocabulary": 400, "positions": 256}
TEXTS = [
    "The harbour was quiet.",
    "",
    "Nobody had seen the ferry since noon, and nobody missed it.",
    "Rain.",
    "It came at six, late and empty.",
]
TASK = get("text-generation")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    lines = corpora.path("corpus:chat/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = (message["content"] for line in lines for message in json.loads(line)["messages"])
    return models.train_tokenizer(texts, ModelConfig(shape=SHAPE), "decoder")


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    built = models.build(ModelConfig(shape=SHAPE), task_of(tokenizer), tokenizer, seed=1)
    return built.eval()


def task_of(tokenizer: Any, *, chat: bool = False, **options: Any) -> Any:
    return TASK(TASK.Config(**options), {"chat": chat}).reading_with(tokenizer)


def rows_of(cells: list[Any], column: str = "text") -> Rows:
    return of_table(pa.table({column: pa.array(cells)}), "rows.jsonl", np.arange(1, len(cells) + 1))


def chats(conversations: list[Any], **more: list[Any]) -> tuple[Rows, Any]:
    table = pa.table({"messages": pa.array(conversations), **{name: pa.array(cells) for name, cells in more.items()}})
    rows = of_table(table, "rows.jsonl", np.arange(1, len(conversations) + 1))
    form, _ = find_form(rows, DataConfig(), "auto")
    assert form is not None
    return with_conversations(rows, form, DataConfig())


def encoded(task: Any, cells: list[str], *, max_length: int = 16) -> Any:
    rows, roles, _ = task.arrange(task.config, rows_of(cells), DataConfig(), labelled=False)
    return task.encode(rows, roles, task.tokenizer, max_length=max_length, first_row=0)


def batch_of(task: Any, examples: Any) -> Any:
    return task.collate(examples.columns, np.zeros(len(examples)), Padded({"input_ids": 0}, 256), key=0)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + said


# the loss ---------------------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def huggingface_loss(model: Any, examples: Any) -> torch.Tensor:
    """What a plain loop does: ids and labels padded, -100 where nothing is learnt, an attention mask."""
    ids, supervised = examples.columns["input_ids"], examples.columns["supervised"]
    width = int(ids.lengths().max())
    inputs, labels, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.full((len(ids), width), -100), torch.zeros(len(ids), width)
    for i in range(len(ids)):
        n = len(ids.sequence(i))
        inputs[i, :n], mask[i, :n] = torch.from_numpy(ids.sequence(i).astype(np.int64)), 1
        labels[i, :n] = torch.where(torch.from_numpy(supervised.sequence(i).astype(bool)), inputs[i, :n], -100)
    loss: torch.Tensor = model(input_ids=inputs, attention_mask=mask.long(), labels=labels).loss
    return loss


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("chunk", [2**22, 3 * 400])
def test_loss_and_gradients_are_those_of_the_hugging_face_model(
    tokenizer: Any, model: Any, chat: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_cli.tasks.writing.token_loss.LOGITS", chunk)
    task = task_of(tokenizer, chat=chat)
    if chat:
        rows, roles = chats([turns("Hi", "Hello there."), turns("Who?", "Me.", "Why?", "Because of the ferry.", system="Be brief.")])
        examples = task.encode(rows, roles, tokenizer, max_length=200, first_row=0)
    else:
        examples = encoded(task, TEXTS)
    batch = batch_of(task, examples)
    ours = task.loss(task.forward(model, batch), batch)["loss"] / batch.weights["loss"]
    ours.backward()
    found = gradients(model)
    theirs = huggingface_loss(model, examples)
    theirs.backward()
    expected = gradients(model)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert found.keys() == expected.keys() and all(torch.allclose(found[k], expected[k], atol=1e-6) for k in found)


def test_the_loss_curve_is_that_of_a_plain_loop(tokenizer: Any) -> None:
    task = task_of(tokenizer)
    examples = encoded(task, TEXTS * 4)

    def curve(loss_of: Callable[[Any, Any], torch.Tensor]) -> list[float]:
        built: Any = models.build(ModelConfig(shape=SHAPE), task, tokenizer, seed=3)
        optimizer, losses = torch.optim.AdamW(built.parameters(), lr=3e-3), []
        for step in range(12):
            loss = loss_of(built, examples.take(np.arange(step, step + 3) % len(examples)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def own(built: Any, some: Any) -> torch.Tensor:
        batch = batch_of(task, some)
        found: torch.Tensor = task.loss(task.forward(built, batch), batch)["loss"] / batch.weights["loss"]
        return found

    ours = curve(own)
    assert ours[-1] < ours[0] and ours == pytest.approx(curve(huggingface_loss), rel=1e-4)


PEAK = """
import resource, sys, torch, torch.utils.checkpoint
from finetune_cli.tasks.writing.token_loss import Hidden, total
torch.manual_seed(0)
head = torch.nn.Linear(64, 50_000, bias=False)
states, targets = torch.randn(4096, 64, requires_grad=True), torch.randint(0, 50_000, (4096,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "chunks":
    loss = total(Hidden(states, lambda s: head(s).float(), 2**22 // 50_000), targets)
else:
    loss = torch.nn.functional.cross_entropy(head(states).float(), targets, reduction="sum")
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, loss.item())
"""


def test_logits_of_a_whole_row_are_never_held() -> None:
    """4,096 tokens of 50,000 logits are 780 MiB; in chunks the whole pass, backward too, takes less than half of that."""

    def peak(how: str) -> tuple[float, float]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", PEAK, how], env=env, capture_output=True, text=True, check=True)
        kilobytes, loss = map(float, done.stdout.split())
        return kilobytes / 1024, loss

    chunks, chunked_loss = peak("chunks")
    whole, loss = peak("whole")
    assert chunked_loss == pytest.approx(loss, rel=1e-5)
    assert chunks < 390, chunks
    assert whole > 780, whole


@pytest.mark.parametrize("apart", [True, False])
def test_documents_run_as_if_each_was_alone(tokenizer: Any, model: Any, apart: bool) -> None:
    task = task_of(tokenizer, attention_within_documents=apart)
    documents = [text for text in TEXTS if text]
    examples = encoded(task, documents, max_length=200)
    assert len(examples) == 1
    batch = batch_of(task, examples)
    alone = [encoded(task, [text], max_length=200) for text in documents]
    losses = [task.loss(task.forward(model, b), b)["loss"].item() for b in (batch_of(task, e) for e in alone)]
    together = task.loss(task.forward(model, batch), batch)["loss"].item()
    if apart:
        task.adjust(model)
        assert batch.weights["loss"] == sum(len(e.columns["input_ids"].values) - 1 for e in alone)
        assert together == pytest.approx(sum(losses), rel=1e-5)
    else:
        assert abs(together - sum(losses)) > 1


def test_a_model_that_mixes_documents_is_refused(tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda position_ids=None, **inputs: own(**inputs))
    with pytest.raises(UserError, match="apart"):
        task_of(tokenizer, attention_within_documents=True).adjust(model)


def test_gradient_checkpointing_changes_no_gradient(tokenizer: Any) -> None:
    task = task_of(tokenizer)
    batch = batch_of(task, encoded(task, TEXTS))
    found = []
    for checkpointed in (False, True):
        built: Any = models.build(ModelConfig(shape=SHAPE), task, tokenizer, seed=1).train()
        if checkpointed:
            models.checkpoint_gradients(built)
        calls: list[int] = []
        built.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        task.loss(task.forward(built, batch), batch)["loss"].backward()
        found.append((gradients(built), len(calls)))
    (kept, once), (again, twice) = found
    assert (once, twice) == (1, 2), "the layer ran again in the backward pass"
    assert all(torch.equal(kept[name], again[name]) for name in kept)


# blocks -----------------------------------------------------------------------------------------------------------------------


def test_blocks_hold_every_token_in_order(tokenizer: Any) -> None:
    for length in (4, 7, 16, 200):
        examples = encoded(task_of(tokenizer), TEXTS, max_length=length)
        ids, supervised = examples.columns["input_ids"], examples.columns["supervised"]
        end = tokenizer.eos_token_id
        expected = [i for text in TEXTS if text for i in [*tokenizer(text)["input_ids"], end]]
        assert ids.values.tolist() == expected and ids.lengths().max() <= length
        assert all(supervised.sequence(i).tolist() == [0] + [1] * (len(ids.sequence(i)) - 1) for i in range(len(ids)))
        assert ids.lengths().min() >= 2, "a block of one token would have nothing to predict"
        assert examples.row[0] == 0 and (np.diff(examples.row) >= 0).all()


def test_lines_of_a_text_file_are_running_text(tokenizer: Any) -> None:
    lines = [f"Line {i} of a play." if i % 9 else "" for i in range(2000)]
    rows = of_table(pa.table({"text": lines}), "play.txt", np.arange(1, 2001))
    task = task_of(tokenizer)
    made, roles, notes = task.arrange_split(task.config, rows, DataConfig(), labelled=False)
    assert 5 < len(made) < 20 and "2,000 lines" in notes[-1] and made.line_of[0] == 1
    whole = task.encode(made, roles, tokenizer, max_length=64, first_row=0).columns["input_ids"].values
    assert tokenizer.decode(whole.tolist()) == "\n".join(lines) + "\n<|endoftext|>"
    gap = task.encode(made.take([0, 2]), roles, tokenizer, max_length=64, first_row=0).columns["input_ids"].values
    assert (gap == tokenizer.eos_token_id).sum() == 2, "where a passage is left out, one text ends"
    asked, _, _ = task.arrange(task.config, rows, DataConfig(), labelled=False)
    assert len(asked) == 2000


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Any, text: str) -> None:
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    if encoding.ids:
        found = token_bytes(text, encoding.offsets)
        assert found.sum() == len(text.encode("utf-8", "surrogatepass")) and (found >= 0).all()


# conversations ----------------------------------------------------------------------------------------------------------------


def supervised_text(task: Any, examples: Any, i: int = 0) -> str:
    ids, marks = examples.columns["input_ids"].sequence(i), examples.columns["supervised"].sequence(i).astype(bool)
    return str(task.tokenizer.decode(ids[marks].tolist()))


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_answers_and_the_token_that_ends_them_are_supervised(tokenizer: Any, template: str | None) -> None:
    task = task_of(copy.deepcopy(tokenizer), chat=True, template=None if template is None else Template(template))
    rows, roles = chats([turns("Hi\nyou", "Hello.", "Bye", "See you.")])
    examples = task.encode(rows, roles, task.tokenizer, max_length=200, first_row=0)
    text = supervised_text(task, examples)
    if template in (None, "chatml"):
        assert text == "Hello.<|im_end|>See you.<|im_end|>" and examples.columns["ended"].tolist() == [2]
    elif template == "alpaca":
        assert text == "Hello.<|endoftext|>See you.<|endoftext|>" and examples.columns["ended"].tolist() == [2]
    else:  # <|eot_id|> is no mark of this vocabulary, so the ledger says that no end token is supervised
        assert text == "Hello.<|eot_id|>See you.<|eot_id|>" and examples.columns["ended"].tolist() == [0]
    assert examples.columns["bytes"][0] >= len("Hello.See you.")
    every = task_of(task.tokenizer, chat=True, loss_on=type(task.config.loss_on)("all"))
    everything = every.encode(rows, roles, task.tokenizer, max_length=200, first_row=0)
    assert everything.columns["supervised"].values.sum() == len(everything.columns["input_ids"].values) - 1


def test_tools_and_calls_are_written_and_supervised(tokenizer: Any) -> None:
    said = [
        {"from": "human", "value": "Weather in Oslo?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": '{"sky": "grey"}'},
        {"from": "gpt", "value": "Grey."},
    ]
    table = pa.table({"conversations": [said], "tools": ['[{"name": "weather", "parameters": {}}]']})
    rows = of_table(table, "rows.jsonl", np.array([1]))
    task = task_of(tokenizer, chat=True)
    arranged, roles, _ = task.arrange(task.config, rows, DataConfig(), labelled=False)
    examples = task.encode(arranged, roles, tokenizer, max_length=250, first_row=0)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert supervised_text(task, examples) == call + "Grey.<|im_end|>"
    assert '"parameters": {}' in tokenizer.decode(examples.columns["input_ids"].values.tolist())
    assert roles.options == {"text": "conversations", "text_pair": None, "label": None}


def test_weights_of_turns_are_kept(tokenizer: Any) -> None:
    said = [[{**turn, "weight": i // 2} for i, turn in enumerate(turns("Hi", "Bad answer.", "Again", "Good answer."))]]
    rows, roles = chats(said)
    task = task_of(tokenizer, chat=True)
    assert supervised_text(task, task.encode(rows, roles, tokenizer, max_length=200, first_row=0)) == "Good answer.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m['content'] }}\n{% endfor %}", "otherwise"),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}\n{% endif %}{% endfor %}",
            "leaves out a turn of 'assistant'",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_a_template_that_cannot_be_trusted_is_refused_with_the_line(tokenizer: Any, template: str, told: str) -> None:
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = template
    rows, roles = chats([turns("Hi", "Hello.", "Bye", "See you.")])
    with pytest.raises(UserError, match=told) as caught:
        task_of(odd, chat=True).encode(rows, roles, odd, max_length=200, first_row=0)
    assert caught.value.where == "rows.jsonl:1, row 1"


def test_long_conversations_are_dropped_cut_or_refused(tokenizer: Any) -> None:
    rows, roles = chats([turns("Hi", "Yes."), turns("Tell me more", "word " * 60), turns("Ho", "No.")])
    kinds = type(TASK.Config().too_long)

    def encode(how: str) -> Any:
        return task_of(tokenizer, chat=True, too_long=kinds(how)).encode(rows, roles, tokenizer, max_length=40, first_row=5)

    cut, dropped = encode("cut"), encode("drop")
    assert cut.row.tolist() == [5, 6, 7] and cut.counts.cut_rows == 1 and cut.counts.lost == cut.counts.longest - 40
    assert cut.columns["ended"].tolist() == [1, 0, 1] and cut.columns["input_ids"].lengths().max() == 40
    assert dropped.row.tolist() == [5, 7] and dropped.counts.cut_rows == 0
    with pytest.raises(UserError, match="40 tokens") as caught:
        encode("refuse")
    assert "rows.jsonl:2" in caught.value.where


def test_the_ledger_counts_what_is_learnt(tokenizer: Any) -> None:
    rows, roles = chats([turns("Hi", "Yes."), turns("Tell me more", "word " * 60)])
    task = task_of(tokenizer, chat=True)
    examples = task.encode(rows, roles, tokenizer, max_length=40, first_row=0)
    ledger = task.ledger({"train": examples}, {"train": rows})
    told = dict(zip(ledger.columns, ledger.rows[0], strict=True))
    assert told["rows"] == 2 and told["cut"] == 1 and told["dropped"] == 0 and told["none supervised"] == 0
    assert told["supervised"] == examples.columns["supervised"].values.sum() and told["end of turn supervised"] == "1 of 2"
    (first, *_) = task.shown(examples, rows)
    assert "rows.jsonl:1" in first.title and "".join(t for t, mark in first.pieces if mark) == "Yes.<|im_end|>"


@pytest.mark.parametrize(
    "columns",
    [
        {"instruction": ["Add.", "Say hi."], "input": ["1 + 1", ""], "output": ["2", "Hi."]},
        {"prompt": ["Add.\n1 + 1", "Say hi."], "completion": ["2", "Hi."]},
        {"conversations": [[{"from": "human", "value": "Add.\n1 + 1"}, {"from": "gpt", "value": "2"}], [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]]},  # noqa: E501
        {"messages": [json.dumps(turns("Add.\n1 + 1", "2")), json.dumps(turns("Say hi.", "Hi."))]},
        {"messages": [turns("Add.\n1 + 1", "2"), turns("Say hi.", "Hi.")]},
    ],
    ids=["alpaca", "prompt", "sharegpt", "json", "messages"],
)  # fmt: skip
def test_every_form_becomes_the_same_conversation(columns: dict[str, Any]) -> None:
    rows = of_table(pa.table(columns), "rows.jsonl", np.array([1, 2]))
    arranged, roles, notes = TASK.arrange(TASK.Config(), rows, DataConfig(), labelled=False)
    found = [json.loads(cell)["messages"] for cell in arranged.column(CONVERSATION).to_pylist()]
    assert found == [turns("Add.\n1 + 1", "2"), turns("Say hi.", "Hi.")] and notes
    again = replace(DataConfig(), **roles.options)
    assert TASK.arrange(TASK.Config(), rows, again, labelled=False)[0].column(CONVERSATION) == arranged.column(CONVERSATION)


# generation -------------------------------------------------------------------------------------------------------------------

PROMPTS = ["The", "Nobody had seen the ferry since noon, and", "It came at six", "Rain and wind and a little more rain"]


def continued(task: Any, model: Any, prompts: list[str], order: list[int], size: int) -> list[Any]:
    """What is written behind each prompt when they come in this order, so many at a time; in the prompts' own order."""
    rows, roles, _ = task.arrange(task.config, rows_of(prompts), DataConfig(), labelled=False)
    examples = task.encode(rows, roles, task.tokenizer, max_length=200, first_row=0, asked=True)
    found: list[Any] = [None] * len(prompts)
    for start in range(0, len(order), size):
        some = np.array(order[start : start + size])
        chosen = examples.take(some)
        with torch.inference_mode():
            outputs, losses = task.infer(model, task.collate(chosen.columns, None, Padded({}, 256), key=0))
        assert losses == {}
        ragged = {n: Ragged(f.values.numpy(), np.concatenate([[0], np.cumsum(f.lengths)])) for n, f in outputs.items()}
        for i, answer in zip(some, task.decode(ragged, rows.take(some), roles), strict=True):
            found[i] = answer["generated"]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "num_return_sequences": 3},
        {"do_sample": True, "stop_strings": ["e", "q"]},
    ],
)
def test_neither_order_nor_batch_changes_a_continuation(tokenizer: Any, model: Any, options: dict[str, Any]) -> None:
    task = task_of(tokenizer, max_new_tokens=12, **options)
    alone = continued(task, model, PROMPTS, [0, 1, 2, 3], 1)
    assert alone == continued(task, model, PROMPTS, [0, 1, 2, 3], 4) == continued(task, model, PROMPTS, [3, 1, 0, 2], 2)
    if options.get("do_sample"):
        assert alone != continued(task_of(tokenizer, max_new_tokens=12, seed=7, **options), model, PROMPTS, [0, 1, 2, 3], 4)
        assert len({json.dumps(a) for a in continued(task, model, ["The"] * 6, list(range(6)), 6)}) > 1, "every row draws for itself"
    several = options.get("num_return_sequences", 1)
    assert all(isinstance(a, list) and len(a) == several if several > 1 else isinstance(a, str) for a in alone)
    if stops := options.get("stop_strings"):
        assert not any(stop in a for a in alone for stop in stops)


@pytest.mark.parametrize("beams", [1, 3])
def test_continuations_are_those_of_plain_transformers(tokenizer: Any, model: Any, beams: int) -> None:
    task = task_of(tokenizer, max_new_tokens=10, num_beams=beams)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=10, do_sample=False, num_beams=beams, pad_token_id=0)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert continued(task, model, PROMPTS, [0, 1, 2, 3], 4) == expected


def test_tokens_are_drawn_by_their_probabilities() -> None:
    from finetune_cli.tasks.writing.generation import Wish, _keyed

    n, scores = 4000, torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0])
    scores[4] = -torch.inf
    wish = Wish(
        max_new_tokens=1, sample=True, temperature=0.5, top_k=3, top_p=1, beams=1, sequences=1, stops=(), seed=5, ends=frozenset(), pad=0
    )
    ids = torch.zeros(n, 1, dtype=torch.long)
    chosen = _keyed(np.arange(n), 1, wish, ids)(ids, scores.repeat(n, 1)).argmax(-1)
    expected = torch.softmax(torch.tensor([4.0, 2.0, 0.0]), -1)
    shares = torch.bincount(chosen, minlength=5) / n
    assert torch.allclose(shares[:3], expected, atol=0.03) and shares[3:].sum() == 0


def test_a_chat_model_is_asked_with_its_template(tokenizer: Any) -> None:
    task = task_of(tokenizer, chat=True)
    rows, roles = chats([turns("Hi", "Hello.", "Bye", "See you.")])
    asked = task.encode(rows, roles, tokenizer, max_length=200, first_row=0, asked=True)
    written = tokenizer.decode(asked.columns["input_ids"].values.tolist())
    learnt = task.encode(rows, roles, tokenizer, max_length=200, first_row=0)
    assert written.endswith("Bye<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(learnt.columns["input_ids"].values.tolist()).startswith(written)
    plain, roles, _ = task.arrange(task.config, rows_of(["Hi"]), DataConfig(), labelled=False)
    asked = task.encode(plain, roles, tokenizer, max_length=200, first_row=0, asked=True)
    assert tokenizer.decode(asked.columns["input_ids"].values.tolist()) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert {tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")} == task.ends


# the whole way ----------------------------------------------------------------------------------------------------------------


def test_metrics_are_what_they_say() -> None:
    from finetune_cli import metrics

    found = metrics.language(np.array([6.0, 2.0]), np.array([3, 1]), np.array([10, 2]), np.array([1, 1]))
    assert found == pytest.approx({"accuracy": 0.5, "perplexity": np.exp(2.0), "bits_per_byte": 8 / np.log(2) / 12})
    assert np.isnan(metrics.language(np.zeros(1), np.zeros(1, int), np.zeros(1, int), np.zeros(1, int))["perplexity"])


def test_chunks_of_a_split_join(tokenizer: Any) -> None:
    task = task_of(tokenizer)
    parts = [encoded(task, TEXTS[:3]), encoded(task, TEXTS[3:])]
    assert join(parts).columns["input_ids"].values.tolist() == encoded(task, TEXTS).columns["input_ids"].values.tolist()


SMALL = ["data.max_rows=24", "model.shape.layers=1", "model.shape.hidden=32", "train.batch_size=8", "train.log_every=1", "train.epochs=8"]
SMALL += ["train.eval_every=4", "train.save_every=3", "device=cpu", "device.threads=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ["+exp=chat", "model.gradient_checkpointing=true", "model.dropout=0.1"],
        ["+exp=textgen", "task.attention_within_documents=true", "data.max_length=48"],
    ],
    ids=["chat", "text"],
)
def test_a_stopped_run_resumes_exactly(keys: list[str], ftune_inside: Callable[..., Ran], forks: Forks, tmp_path: Path) -> None:
    whole = ftune_inside("train", *keys, *SMALL, "run.dir=whole", cwd=tmp_path).ok().run
    part = tmp_path / "part"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = forks.start("train", *keys, *SMALL, f"run.dir={part}", cwd=tmp_path, **quiet)
    for _ in range(2400):
        if process.poll() is not None or (part / "metrics.jsonl").is_file() and (part / "metrics.jsonl").read_text().count("\n") >= 2:
            break
        time.sleep(0.05)
    process.terminate()
    assert process.wait(120) == 75
    ftune_inside("train", f"resume={part}", cwd=tmp_path).ok()
    for name in ("metrics.jsonl", "model/model.safetensors", "checkpoints/last/state.safetensors", "model/generation_config.json"):
        assert (whole / name).read_bytes() == (part / name).read_bytes(), name


def test_chatml_is_the_template_of_a_model_from_scratch(tokenizer: Any) -> None:
    assert tokenizer.chat_template == CHATML


@pytest.mark.slow
@pytest.mark.skipif("FTUNE_DATA" not in os.environ, reason="FTUNE_DATA names no folder of data sets")
@pytest.mark.parametrize(
    "file",
    ["tinyshakespeare/input.txt", "instruct/alpaca_en_demo.json", "chat/glaive_toolcall_en_demo.json", "chat/v1_sft_demo.jsonl"]
    + ["chat/dummy_conversation.json"],
)
def test_real_files_train(file: str, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    keys = ["task=text-generation", "model=tiny", "train.steps=2", "train.batch_size=4", "model.shape.layers=1", "model.shape.hidden=32"]
    keys += ["model.shape.vocabulary=600", "data.max_truncated=1", "data.max_leaked=1", "data.max_rows=20", "device=cpu"]
    keys += ["task.too_long=drop"] if file.endswith(("json", "jsonl")) else ["data.max_length=64"]
    run = ftune_inside("train", *keys, f"data.train={Path(os.environ['FTUNE_DATA']) / file}", cwd=tmp_path).ok().run
    assert "supervised" in (run / "log.txt").read_text(encoding="utf-8")
