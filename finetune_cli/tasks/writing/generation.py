"""Prompts to continuations: greedy, beams, or sampling whose draws are keyed by seed, row and step: neither order nor batch matters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli import randomness
from finetune_cli.tasks.base import Flat

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from finetune_cli.tasks.writing.generation_options import TextGenerationConfig

TOKENS = 16_384
"""Tokens of prompts and continuations, over all beams and sequences, that are worked on at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How to continue."""

    max_new_tokens: int
    sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    beams: int
    sequences: int
    stops: Sequence[str]
    seed: int
    ends: frozenset[int]
    """Tokens that end a continuation."""
    pad: int

    @classmethod
    def of(cls, config: TextGenerationConfig, *, ends: frozenset[int], pad: int) -> Wish:
        """As the options say."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            sample=config.do_sample,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            beams=config.num_beams,
            sequences=config.num_return_sequences,
            stops=config.stop_strings,
            seed=config.seed,
            ends=ends,
            pad=pad,
        )


def pad_left(prompts: Any, pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [B, T], of a ragged column of prompts."""
    import numpy as np
    import torch

    lengths = prompts.lengths()
    width = int(lengths.max())
    real = np.arange(width)[None, :] >= (width - lengths)[:, None]
    ids = np.full(real.shape, pad, np.int64)
    ids[real] = prompts.values
    return torch.from_numpy(ids), torch.from_numpy(real.astype(np.int64))


def generate(model: Any, ids: Tensor, mask: Tensor, numbers: np.ndarray, wish: Wish, tokenizer: Any) -> list[Flat]:
    """New tokens of every prompt, without what ended them; one Flat a sequence. ``numbers`` [B] name the rows for the keyed draws."""
    import numpy as np
    import torch

    every = (ids.shape[1] + wish.max_new_tokens) * max(wish.beams, wish.sequences)
    size = max(1, TOKENS // every)
    found: list[list[list[int]]] = [[] for _ in range(wish.sequences)]
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        for number, tokens in enumerate(_some(model, ids[part], mask[part], numbers[part], wish, tokenizer)):
            found[number % wish.sequences].append(tokens)
    return [
        Flat(torch.tensor([t for tokens in rows for t in tokens], dtype=torch.int64), np.array([len(t) for t in rows], np.int64))
        for rows in found
    ]


def _some(model: Any, ids: Tensor, mask: Tensor, numbers: np.ndarray, wish: Wish, tokenizer: Any) -> Iterator[list[int]]:
    """The continuations of a few prompts, all sequences of a prompt together."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    width, processors, criteria = ids.shape[1], LogitsProcessorList(), StoppingCriteriaList()
    again = wish.sequences if wish.sample else 1
    if wish.sample:
        ids, mask = ids.repeat_interleave(again, 0), mask.repeat_interleave(again, 0)
        processors.append(_keyed(numbers, width, wish, ids))
    if wish.stops:
        criteria.append(_stopped(wish.stops, width, tokenizer))
    config = GenerationConfig(
        max_new_tokens=wish.max_new_tokens,
        do_sample=False,
        num_beams=wish.beams,
        num_return_sequences=wish.sequences if not wish.sample else 1,
        eos_token_id=sorted(wish.ends),
        pad_token_id=wish.pad,
    )
    out = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors, stopping_criteria=criteria
    )
    over = wish.ends | {wish.pad}
    for tokens in out[:, width:].tolist():
        yield tokens[: next((i for i, t in enumerate(tokens) if t in over), len(tokens))]


def _keyed(numbers: np.ndarray, width: int, wish: Wish, ids: Tensor) -> Any:
    """Sampling as a processor of scores: one keyed number a step picks the token, by the inverse of the distribution function."""
    import numpy as np
    import torch
    from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    drawn = [
        randomness.generator(wish.seed, "sample", int(number), sequence).random(wish.max_new_tokens)
        for number in numbers
        for sequence in range(wish.sequences)
    ]
    draws = torch.from_numpy(np.stack(drawn)).to(ids.device, torch.float64 if ids.device.type != "mps" else torch.float32)
    warpers = [TemperatureLogitsWarper(wish.temperature)] if wish.temperature != 1 else []
    warpers += [TopKLogitsWarper(wish.top_k)] if wish.top_k else []
    warpers += [TopPLogitsWarper(wish.top_p)] if wish.top_p < 1 else []

    class Keyed(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            for warp in warpers:
                scores = warp(input_ids, scores)
            upto = torch.softmax(scores.to(draws.dtype), -1).cumsum(-1)  # [B, V]
            draw = draws[:, input_ids.shape[1] - width, None] * upto[:, -1:]
            chosen = torch.searchsorted(upto, draw, right=True).clamp(max=scores.shape[1] - 1)
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    return Keyed()


def _stopped(stops: Sequence[str], width: int, tokenizer: Any) -> Any:
    """Whether one of the strings stands in what was written, looked for in the last tokens alone."""
    import torch
    from transformers import StoppingCriteria

    tail = max(len(stop.encode()) for stop in stops) + 4

    class Stopped(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
            texts = [written(tokenizer, tokens[-tail:]) for tokens in input_ids[:, width:].tolist()]
            return torch.tensor([any(stop in text for stop in stops) for text in texts], device=input_ids.device)

    return Stopped()


def written(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str] = ()) -> str:
    """Tokens as text, without marks, up to the first of the ``stops``."""
    text = str(tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
