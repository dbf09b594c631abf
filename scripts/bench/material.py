"""Rows and models to measure with: shipped rows, rows made in any number, models of a stated shape built from config. No download."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import peers
import public_sets

SEED = 20261125
WORDS_A_ROW = 15
"""Median; about 22 tokens with the special ones, as in whole sentences of SST-2."""
SHAPES: dict[str, dict[str, int]] = {
    "large": {"layers": 24, "hidden": 1024, "heads": 16, "intermediate": 4096},
    "base": {"layers": 12, "hidden": 768, "heads": 12, "intermediate": 3072},
    "minilm": {"layers": 6, "hidden": 384, "heads": 12, "intermediate": 1536},
    "one_layer": {"layers": 1, "hidden": 64, "heads": 2, "intermediate": 128},
}
LLAMA: dict[str, dict[str, int]] = {
    "1b": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "intermediate": 8192, "vocabulary": 32000},
    "small": {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 8, "intermediate": 1024, "vocabulary": 4000},
    "tiny": {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "intermediate": 64, "vocabulary": 600},
}
CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def shipped_rows(folder: Path, split: str, count: int) -> Path:
    """Reviews that come with the package, two labels as 0 and 1."""
    names = ["negative", "neutral", "positive"]
    rows = public_sets.read(harness.ROOT / "finetune_cli" / "corpora" / "reviews" / f"{split}.jsonl")
    two = [{"text": r["text"], "label": names.index(r["label"]) // 2} for r in rows if r["label"] != "neutral"]
    return public_sets.write(folder / f"smoke-{split}.jsonl", two[:count])


def _shipped_words() -> list[str]:
    rows = public_sets.read(harness.ROOT / "finetune_cli" / "corpora" / "reviews" / "train.jsonl")
    return " ".join(row["text"] for row in rows).split()


def made_rows(file: Path, count: int, *, words: tuple[float, float, int, int] = (WORDS_A_ROW, 0.5, 1, 90), seed: int = SEED) -> Path:
    """``count`` rows of text and label, written as they are made: two stretches of the shipped reviews each, their length log-normal.

    ``words``: median, sigma of the logarithm, least and most words. An existing file of that name is taken as it is.
    """
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    draw, known, unfinished = random.Random(seed), _shipped_words(), file.with_suffix(".unfinished")
    median, sigma, least, most = words
    with unfinished.open("w", encoding="utf-8") as out:
        for _ in range(count):
            length = min(max(round(median * draw.lognormvariate(0.0, sigma)), least), most)
            cut, parts = draw.randint(0, length), []
            for part in (cut, length - cut):
                at = draw.randrange(len(known) - part)
                parts += known[at : at + part]
            out.write(json.dumps({"text": " ".join(parts), "label": draw.randrange(2)}, ensure_ascii=False) + "\n")
    unfinished.replace(file)
    return file


def made_chats(file: Path, count: int, *, turns: int = 4, words: int = 60, seed: int = SEED) -> Path:
    """Conversations in the form of messages, user and assistant in turn."""
    draw, known = random.Random(seed), _shipped_words()
    rows = []
    for _ in range(count):
        messages = []
        for turn in range(2 * draw.randint(1, turns)):
            length = max(1, round(words * draw.lognormvariate(0.0, 0.6)))
            at = draw.randrange(max(1, len(known) - length))
            messages.append({"role": ("user", "assistant")[turn % 2], "content": " ".join(known[at : at + length])})
        rows.append({"messages": messages})
    return public_sets.write(file, rows)


def bert(folder: Path, shape: str) -> Path:
    """A BERT of that shape with random weights and MiniLM's tokenizer, which is BERT's own; a folder that is there is taken as it is."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import BertConfig, BertModel

    s = SHAPES[shape]
    torch.manual_seed(SEED)
    config = BertConfig(
        num_hidden_layers=s["layers"], hidden_size=s["hidden"], num_attention_heads=s["heads"], intermediate_size=s["intermediate"]
    )

    def tokenizer(into: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            shutil.copyfile(peers.minilm() / name, into / name)

    return _write(BertModel(config), tokenizer, folder)


def with_head(model: Path, folder: Path) -> Path:
    """The same model with a classifier of two labels, which all that predict can load."""
    if (folder / "config.json").exists():
        return folder
    network, tokenizer = peers.build(model, 2, SEED)
    return _write(network, tokenizer.save_pretrained, folder)


def llama(folder: Path, shape: str, chats: Path) -> Path:
    """A Llama of that shape with random weights, and a byte-level tokenizer learnt from the conversations, with ChatML."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    s, marks = LLAMA[shape], ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learn = trainers.BpeTrainer(vocab_size=s["vocabulary"], special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator((turn["content"] for row in public_sets.read(chats) for turn in row["messages"]), learn)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token=marks[0], eos_token=marks[1], model_max_length=4096, chat_template=CHATML
    )
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=s["vocabulary"],
        hidden_size=s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        intermediate_size=s["intermediate"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _write(LlamaForCausalLM(config), tokenizer.save_pretrained, folder)


def _write(model: Any, tokenizer: Callable[[Path], Any], folder: Path) -> Path:
    """Model and tokenizer, whole or not at all."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def start(folder: Path, shape: str) -> Path:
    """What both sides start from: all-MiniLM-L6-v2 itself, or a model of another shape with random weights."""
    return peers.minilm() if shape == "minilm" else bert(folder / shape, shape)
