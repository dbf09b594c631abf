"""The language tasks by the means of transformers alone: Trainer on the same rows, and the scores of a saved model, whoever trained it.

Nothing of ftune is imported here. What is learnt of a conversation is said by a chat template with ``generation`` marks, written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peers
from language_sets import LanguageSet
from public_sets import Row

IGNORED = -100
MASK_SEED = 20261125
"""Draws the masks of the test texts, the same for every model."""
BATCH = 32
MARKED_CHATML = """
{%- if tools %}{{ '<|im_start|>system\n' }}{{ 'Tools that may be called, as <tool_call>{"name": ..., "arguments": ...}</tool_call>:' }}
{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' }}
{%- if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] }}
{%- if turn['tool_calls'] %}{{ '<tool_call>\n' + (turn['tool_calls'][0]['function'] | tojson) + '\n</tool_call>' }}{% endif %}
{{- '<|im_end|>' }}{% endgeneration %}{% else %}{{ turn['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"""
"""ChatML as the model's own template writes it (that is asserted), without system turns; an answer ends with its mark."""

Example = dict[str, Any]
Order = Callable[[int, int], Sequence[int]]
"""Epoch and number of examples to their order."""


def train(
    kind: LanguageSet, rows: Sequence[Row], *, start: Path | None, seed: int, order: Order, device: str, save: Path
) -> dict[str, Any]:
    """Train with Trainer and save the model. ``start``: the weights and tokenizer to begin with; None: MiniLM and a head by the seed."""
    from transformers import AutoTokenizer, set_seed

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(start or peers.minilm())
    names = sorted({tag for row in rows for tag in row.get("tags", ())})
    model = _network(kind, start or peers.minilm(), names if start is None else [])
    made = examples(kind, tokenizer, rows, model.config.label2id)
    ordered = None if start is None else lambda epoch: order(epoch, len(made))
    with peers.fitted(
        model, made, _collator(kind, tokenizer, model), seed=seed, recipe=kind.recipe, device=device, flags={}, order=ordered
    ) as (peer, seconds):
        peer.save_model(str(save))
        curve = [(entry["step"], entry["loss"]) for entry in peer.state.log_history if "loss" in entry]
    tokenizer.save_pretrained(save)
    return {"loop_seconds": round(seconds, 1), "curve": curve}


def _network(kind: LanguageSet, model: Path, labels: Sequence[str] = ()) -> Any:
    """The task's model in fp32; ``labels`` make a new head."""
    import torch
    import transformers

    found = {
        "token-classification": "AutoModelForTokenClassification",
        "fill-mask": "AutoModelForMaskedLM",
        "text-generation": "AutoModelForCausalLM",
        "text2text-generation": "AutoModelForSeq2SeqLM",
    }[kind.task]
    head = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}} if labels else {}
    return getattr(transformers, found).from_pretrained(model, dtype=torch.float32, **head)


def _collator(kind: LanguageSet, tokenizer: Any, model: Any) -> Any:
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorForTokenClassification

    if kind.task == "token-classification":
        return DataCollatorForTokenClassification(tokenizer)
    if kind.task == "fill-mask":
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    return DataCollatorForSeq2Seq(tokenizer, model if kind.task == "text2text-generation" else None)


# -- examples ------------------------------------------------------------------------------------
def examples(kind: LanguageSet, tokenizer: Any, rows: Sequence[Row], labels: dict[str, int]) -> list[Example]:
    """Rows as Trainer wants them."""
    most = kind.recipe.max_length
    if kind.task == "token-classification":
        return [_tagged(tokenizer, row, labels, most) for row in rows]
    if kind.task == "fill-mask":
        return [{"input_ids": ids} for ids in tokenizer([row["text"] for row in rows], truncation=True, max_length=most)["input_ids"]]
    if kind.task == "text2text-generation":
        sources, targets = (
            tokenizer([row[of] for row in rows], truncation=True, max_length=most)["input_ids"] for of in ("text", "target")
        )
        return [{"input_ids": a, "attention_mask": [1] * len(a), "labels": b} for a, b in zip(sources, targets, strict=True)]
    if "text" in rows[0]:
        return _blocks(tokenizer, rows, most)
    chats = [chat(tokenizer, row) for row in rows]
    if kind.too_long == "drop":
        return [one for one in chats if len(one["input_ids"]) <= most]
    return [{key: values[:most] for key, values in one.items()} for one in chats]


def _tagged(tokenizer: Any, row: Row, labels: dict[str, int], most: int) -> Example:
    """The first piece of a word has its label, no other has one."""
    found = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=most)
    words = found.word_ids()
    first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
    told = [labels[row["tags"][word]] if begins else IGNORED for begins, word in zip(first, words, strict=True)]
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": told}


def _blocks(tokenizer: Any, rows: Sequence[Row], most: int) -> list[Example]:
    """Documents end to end, each with the end-of-text token behind it, in blocks of one length; every token but a block's first counts."""
    stream = [i for row in rows for i in [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    parts = [stream[at : at + most] for at in range(0, len(stream), most)]
    return [{"input_ids": part, "attention_mask": [1] * len(part), "labels": list(part)} for part in parts]


def chat(tokenizer: Any, row: Row) -> Example:
    """A conversation whose answers are learnt, as the marks of the template say."""
    given = {"tools": row["tools"], "tokenize": True, "return_dict": True}
    found = tokenizer.apply_chat_template(row["messages"], chat_template=MARKED_CHATML, return_assistant_tokens_mask=True, **given)
    ids = found["input_ids"]
    assert ids == tokenizer.apply_chat_template(row["messages"], **given)["input_ids"], "the marked template writes something else"
    labels = [i if learnt else IGNORED for i, learnt in zip(ids, found["assistant_masks"], strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


# -- scores of a saved model ---------------------------------------------------------------------
def measure(kind: LanguageSet, model: Path, rows: Sequence[Row], *, device: str) -> dict[str, float]:
    """What does not depend on how an answer is written: the loss of given tokens."""
    from transformers import AutoTokenizer

    if kind.task == "token-classification":
        return {}
    tokenizer, network = AutoTokenizer.from_pretrained(model), _placed(_network(kind, model), device)
    made = examples(kind, tokenizer, rows, {})
    if kind.task == "fill-mask":
        made = _masked(tokenizer, made)
    nats, tokens, size = 0.0, 0, 0
    for batch in _batches(kind, tokenizer, network, made):
        losses, true = _losses(kind, network, batch)
        nats, tokens = nats + float(losses.sum()), tokens + len(true)
        special = set(tokenizer.all_special_ids)
        if "bits per byte" in kind.scores:  # a character of a byte-level vocabulary is a byte
            size += sum(len(t) for i, t in zip(true, tokenizer.convert_ids_to_tokens(true), strict=True) if i not in special)
    told = {"loss": nats / tokens, "tokens": tokens}
    if kind.task == "fill-mask":
        told["perplexity"] = math.exp(told["loss"])
    if size:
        told["bits per byte"] = nats / math.log(2) / size
    return told


def _masked(tokenizer: Any, made: Sequence[Example]) -> list[Example]:
    """The same 15 % of every test text as masks, as random tokens and as they are (8 : 1 : 1), whatever model is asked."""
    import random

    draw, special = random.Random(MASK_SEED), set(tokenizer.all_special_ids)
    told = []
    for example in made:
        ids = list(example["input_ids"])
        labels = [i if i not in special and draw.random() < 0.15 else IGNORED for i in ids]
        for at in (at for at, label in enumerate(labels) if label != IGNORED):
            turn = draw.random()
            ids[at] = tokenizer.mask_token_id if turn < 0.8 else draw.randrange(1000, len(tokenizer)) if turn < 0.9 else ids[at]
        told.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return [example for example in told if set(example["labels"]) != {IGNORED}]


def _batches(kind: LanguageSet, tokenizer: Any, network: Any, made: Sequence[Example]) -> Iterator[dict[str, Any]]:
    from transformers import DataCollatorForSeq2Seq, DataCollatorForTokenClassification

    padder = DataCollatorForSeq2Seq(tokenizer) if kind.task != "token-classification" else DataCollatorForTokenClassification(tokenizer)
    for start in range(0, len(made), BATCH):
        yield {key: value.to(network.device) for key, value in padder(list(made[start : start + BATCH])).items()}


def _losses(kind: LanguageSet, network: Any, batch: dict[str, Any]) -> tuple[Any, list[int]]:
    """(cross-entropy, token) of each token that counts, from all the logits."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        logits, labels = network(**batch).logits, batch["labels"]
    if kind.task == "text-generation":
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    true = labels[counted]
    return F.cross_entropy(logits[counted].float(), true, reduction="none").double(), true.tolist()


def _placed(network: Any, device: str) -> Any:
    return network.to("cuda" if peers.on_gpu(device) else "cpu").eval()


# -- answers of a saved model --------------------------------------------------------------------
def answers(kind: LanguageSet, model: Path, rows: Sequence[Row], *, device: str) -> list[Any]:
    """Tags of every word, or texts that the model writes by itself, taking the likeliest token; nothing for the other tasks."""
    if kind.task not in ("token-classification", "text2text-generation"):
        return []
    import torch
    from transformers import AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), _placed(_network(kind, model), device)
    names = network.config.id2label
    made = examples(kind, tokenizer, rows, network.config.label2id | {tag: 0 for row in rows for tag in row.get("tags", ())})
    found: list[Any] = []
    with torch.no_grad():
        for batch in _batches(kind, tokenizer, network, made):
            if kind.task == "text2text-generation":
                asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
                ids = network.generate(**asked, max_new_tokens=kind.most_new_tokens, max_length=None, do_sample=False, num_beams=1)
                found += tokenizer.batch_decode(ids, skip_special_tokens=True)
            else:
                guess = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
                found += [[names[int(g)] for g in gs[ls != IGNORED]] for gs, ls in zip(guess, batch["labels"], strict=True)]
    if kind.task == "token-classification":  # a word that was cut off, or has no piece, has no name
        return [_for_every_word(tokenizer, row, told, kind.recipe.max_length) for row, told in zip(rows, found, strict=True)]
    return found


def _for_every_word(tokenizer: Any, row: Row, told: Sequence[str], most: int) -> list[str]:
    read = [w for w in tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=most).word_ids() if w is not None]
    tags = ["O"] * len(row["words"])
    for word, tag in zip(dict.fromkeys(read), told, strict=True):
        tags[word] = tag
    return tags


def score(kind: LanguageSet, measured: dict[str, float], answered: Sequence[Any], rows: Sequence[Row]) -> dict[str, float]:
    """The set's scores by name; the same lines for both sides."""
    found = dict(measured)
    found["loss of a token"] = found["loss of an answer's token"] = found.get("loss", math.nan)
    if "entity F1" in kind.scores:
        from seqeval.metrics import f1_score

        found["entity F1"] = float(f1_score([row["tags"] for row in rows], list(answered)))
    if "chrF" in kind.scores:
        from sacrebleu.metrics import CHRF

        found["chrF"] = CHRF().corpus_score(list(answered), [[row["target"] for row in rows]]).score
    if "ROUGE-L" in kind.scores:
        from rouge_score.rouge_scorer import RougeScorer

        judge = RougeScorer(["rougeL"])
        found["ROUGE-L"] = sum(judge.score(row["target"], text)["rougeL"].fmeasure for row, text in zip(rows, answered, strict=True)) / len(
            rows
        )
    return {name: found[name] for name in kind.scores}
