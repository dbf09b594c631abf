"""The options of text2text-generation: what a row is, and how its text is generated."""

# ruff: noqa: RUF009 (option() makes a dataclass field, not a shared default)

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from finetune_cli.config.schema import TaskConfig, option
from finetune_cli.errors import UserError


class Tokenize(str, Enum):
    auto = "auto"
    v13a = "13a"
    intl = "intl"
    char = "char"
    zh = "zh"
    none = "none"


@dataclass(kw_only=True, slots=True)
class Text2TextGenerationConfig(TaskConfig):
    """``task=text2text-generation``. A generation option that is null is as it was in training, and there as its meaning says."""

    name: str = "text2text-generation"
    """A text in, another text out."""
    prefix: str | None = None
    """Put before every source, such as ``summarize: `` for T5; null: none."""
    references: Any = option(None, form="columns")
    """Columns with several references, where a split has them all: scored in place of ``data.label``, never learnt from."""
    target_length: int | None = option(None, least=2, most=1_000_000)
    """Longest target in tokens, in training; null is as ``data.max_length``. A row whose target is cut counts as cut."""
    label_smoothing: float = option(0.0, least=0, below=1)
    """Share of each target token that is spread over the whole vocabulary."""
    tokenize: Tokenize = Tokenize.auto
    """How sacrebleu cuts words for BLEU; auto: 13a, but zh or char where the targets set no spaces between words."""
    max_new_tokens: int | None = option(None, least=1, most=100_000)
    """Most tokens of a generated text; null: 128."""
    min_new_tokens: int | None = option(None, least=0, most=100_000)
    """Fewest tokens of a generated text; null: 0."""
    num_beams: int | None = option(None, least=1, most=64)
    """Beams of the search; null: 1, which is greedy."""
    length_penalty: float | None = option(None, least=-10, most=10, applies="task.num_beams>1")
    """Power of its length by which the score of a beam is divided; above 0 favours long texts; null: 1."""
    no_repeat_ngram_size: int | None = option(None, least=0, most=100)
    """No run of so many tokens occurs twice in a text; null: 0, which allows all."""
    repetition_penalty: float | None = option(None, above=0, most=10)
    """Divides the scores of tokens that the text holds already; null: 1."""
    do_sample: bool | None = None
    """Draw tokens by their probability instead of taking the best; null: false."""
    temperature: float | None = option(None, above=0, most=100, applies="task.do_sample=true")
    """Divides the scores before a draw; null: 1."""
    top_k: int | None = option(None, least=0, most=10_000_000, applies="task.do_sample=true")
    """Draw among the so many best tokens; 0 among all; null: 0."""
    top_p: float | None = option(None, above=0, most=1, applies="task.do_sample=true")
    """Draw among the best tokens that together have this probability; null: 1."""
    sampling_seed: int = option(0, least=0, most=2**32 - 1, applies="task.do_sample=true")
    """The draws are a function of this and the row's place in its file, whatever rows share its batch."""
    num_return_sequences: int | None = option(None, least=1, most=64)
    """Texts that ``predict`` gives for a row, the best first; null: 1. More than one need beams or sampling; the first is scored."""


DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 128,
    "min_new_tokens": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "num_return_sequences": 1,
}
"""Generation options that nobody chose."""


def refuse_contradictions(chosen: dict[str, Any]) -> None:
    """Options that are each fine but not together."""
    beams, sequences = chosen["num_beams"], chosen["num_return_sequences"]
    if chosen["do_sample"] and beams > 1:
        raise UserError(
            "sampling and beam search are both set", where="task.do_sample", fix=f"task.num_beams=1, not {beams}, or no sampling"
        )
    if sequences > 1 and not chosen["do_sample"] and sequences > beams:
        what = f"{beams} beams give no {sequences} texts" if beams > 1 else "greedy search gives one text a row"
        raise UserError(what, where=f"task.num_return_sequences={sequences}", fix=f"task.num_beams={sequences}, or task.do_sample=true")
    if chosen["min_new_tokens"] > chosen["max_new_tokens"]:
        raise UserError(
            f"a text cannot have at least {chosen['min_new_tokens']} and at most {chosen['max_new_tokens']} tokens",
            where="task.min_new_tokens",
            fix="task.min_new_tokens of at most task.max_new_tokens",
        )
