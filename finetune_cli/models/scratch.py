"""A small model from ``model.shape``, and the vocabulary it is built on, learnt from the training texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from finetune_cli import randomness
from finetune_cli.config.schema import ModelConfig
from finetune_cli.data.chat_templates import CHATML
from finetune_cli.errors import UserError
from finetune_cli.models.imports import auto_class
from finetune_cli.models.loading import configure, pooled
from finetune_cli.tasks.base import Task

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WRITING_TOKENS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = {"layers": 2, "hidden": 128, "heads": 4, "intermediate": 512, "vocabulary": 8000, "positions": 512}
"""What ``model.shape`` leaves open."""


def family(model_config: Any, architecture: str) -> str:
    """``model_type`` of a located model, or of the one that ``build`` makes where there is none."""
    built = {"encoder": "bert", "decoder": "llama", "encoder-decoder": "t5"}
    return built[architecture] if model_config is None else str(getattr(model_config, "model_type", ""))


def build(config: ModelConfig, task: Task[Any], tokenizer: Any, *, seed: int) -> nn.Module:
    """A small transformer from ``model.shape``, with random weights drawn from the seed: BERT's layers, Llama's or T5's."""
    shape = SHAPE | dict(config.shape)
    if unknown := sorted(set(shape) - set(SHAPE)):
        raise UserError(f"model.shape has no {unknown[0]!r}", where=f"model.shape.{unknown[0]}", fix=f"one of {', '.join(SHAPE)}")
    if shape["hidden"] % shape["heads"]:
        raise UserError(
            f"model.shape.hidden={shape['hidden']} is no multiple of model.shape.heads={shape['heads']}",
            where="model.shape",
            fix="e.g. hidden=128 heads=4",
        )
    model_config = _SCRATCH[task.architecture](shape, tokenizer)
    configure(model_config, config, task)
    torch.manual_seed(randomness.key(seed, "init"))
    model = auto_class(task.auto_class, model_config).from_config(model_config, dtype=torch.float32)
    assert isinstance(model, nn.Module)
    pooled(model, config, [])
    return model


def _bert(shape: dict[str, int], tokenizer: Any) -> Any:
    import transformers

    return transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["intermediate"],
        max_position_embeddings=shape["positions"],
        pad_token_id=tokenizer.pad_token_id,
    )


def _llama(shape: dict[str, int], tokenizer: Any) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        intermediate_size=shape["intermediate"],
        max_position_embeddings=shape["positions"],
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def _t5(shape: dict[str, int], tokenizer: Any) -> Any:
    import transformers

    return transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=shape["hidden"],
        d_kv=shape["hidden"] // shape["heads"],
        d_ff=shape["intermediate"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        feed_forward_proj="gated-gelu",
        n_positions=shape["positions"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


_SCRATCH: dict[str, Callable[[dict[str, int], Any], Any]] = {"encoder": _bert, "decoder": _llama, "encoder-decoder": _t5}
"""A task's architecture to the transformers config of a small model of that kind."""


def train_tokenizer(texts: Iterator[str], config: ModelConfig, architecture: str) -> Any:
    """A BPE tokenizer learnt from the training texts, for a model from scratch."""
    return _reading_tokenizer(texts, config) if architecture == "encoder" else _writing_tokenizer(texts, config, architecture)


def _writing_tokenizer(texts: Iterator[str], config: ModelConfig, architecture: str) -> Any:
    """For models that write: bytes, so that every text comes back as it went in; ``<|endoftext|>`` ends a text.

    An encoder-decoder's inputs end with it, as T5's do. The chat template is ChatML, whose marks are tokens of their own.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    shape = SHAPE | dict(config.shape)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=shape["vocabulary"],
        special_tokens=list(WRITING_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if architecture == "encoder-decoder":
        end = WRITING_TOKENS[1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=WRITING_TOKENS[0],
        eos_token=WRITING_TOKENS[1],
        model_max_length=shape["positions"],
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _reading_tokenizer(texts: Iterator[str], config: ModelConfig) -> Any:
    """Words and punctuation apart, lower-cased, Chinese characters standing alone.

    Without a prefix on inner pieces: with one, tokenizers numbers its alphabet in the order of a hash table, so that two runs of one
    seed would differ (seen with 0.23).
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    shape = SHAPE | dict(config.shape)
    tokenizer = Tokenizer(BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, BpeTrainer(vocab_size=shape["vocabulary"], special_tokens=list(SPECIAL_TOKENS), show_progress=False, min_frequency=2)
    )
    ends = [(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=shape["positions"],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
