"""The options of text-generation: what the rows are, what of them is learnt, and how text is generated."""

# ruff: noqa: RUF009 (option() makes a dataclass field, not a shared default)

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from finetune_cli.config.schema import COUNT, TaskConfig, option

CHATS = "task.format=auto|messages|sharegpt|alpaca|prompt"
TEXTS = "task.format=auto|text"
SAMPLING = "task.do_sample=True"


class Format(str, Enum):
    auto = "auto"
    text = "text"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt = "prompt"


class Template(str, Enum):
    chatml = "chatml"
    llama3 = "llama3"
    alpaca = "alpaca"


class LossOn(str, Enum):
    assistant = "assistant"
    all = "all"


class TooLong(str, Enum):
    drop = "drop"
    cut = "cut"
    refuse = "refuse"


class Lines(str, Enum):
    auto = "auto"
    joined = "joined"
    documents = "documents"


@dataclass(kw_only=True, slots=True)
class TextGenerationConfig(TaskConfig):
    """``task=text-generation``."""

    name: str = "text-generation"
    """Text that goes on, or the next turn of a conversation."""
    format: Format = Format.auto
    """``text``: plain text; conversations: ``messages`` (role, content), ``sharegpt`` (from, value), ``alpaca``, ``prompt`` (columns)."""
    template: Template | None = option(None, applies=CHATS)
    """Chat template: ``chatml``, ``llama3`` or ``alpaca``; null is the tokenizer's own."""
    loss_on: LossOn = option(LossOn.assistant, applies=CHATS)
    """Which tokens of a conversation are learnt: those of the assistant's turns with the token that ends them, or all."""
    too_long: TooLong = option(TooLong.cut, applies=CHATS)
    """Conversations longer than ``data.max_length``: dropped, cut at their end, or refused; counted in the ledger."""
    lines: Lines = option(Lines.auto, applies=TEXTS)
    """Rows of plain text: ``joined`` with their line ends into running text, or ``documents``; auto joins the lines of text files."""
    attention_within_documents: bool = option(False, applies=TEXTS)
    """Whether tokens of a block see only their own document, as if every document ran by itself."""
    max_new_tokens: int = option(64, least=1, most=1_000_000)
    """Longest continuation that is generated."""
    do_sample: bool = False
    """Draw each token by its probability; false takes the likeliest."""
    temperature: float = option(1.0, above=0, most=100, applies=SAMPLING)
    """Divides the logits before a token is drawn: below 1 is more careful."""
    top_k: int | None = option(None, least=1, most=COUNT, applies=SAMPLING)
    """Draw among the likeliest so many tokens; null: among all."""
    top_p: float = option(1.0, above=0, most=1, applies=SAMPLING)
    """Draw among the fewest tokens whose probabilities reach this sum."""
    seed: int = option(42, least=0, most=2**32 - 1, applies=SAMPLING)
    """Decides the draws, together with the row's number and the step, so that neither order nor batch matters."""
    num_beams: int = option(1, least=1, most=1000, applies="task.do_sample=False")
    """Beams of beam search; 1 is greedy."""
    num_return_sequences: int = option(1, least=1, most=1000)
    """Continuations of every prompt: drawn ones, or the best of as many beams."""
    stop_strings: list[str] = option([])
    """A continuation ends before the first of these."""
