"""Encoder-decoders at work: the loss of given targets without holding every logit at once, and text generated row by row alike.

Generated text is a function of the row alone: greedy and beam search look at nothing else, and a sample is drawn with numbers keyed by the
row's place in its file, so that neither the batch around a row nor the thread that works at it can change what it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Flat

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LOGITS_AT_ONCE = 1 << 24
"""Logits that the loss holds at a time: 64 MB in fp32."""
T5_LIKE = frozenset({"t5", "mt5", "umt5"})
"""Model types with ``encoder``, ``decoder`` and ``lm_head``; some scale the decoder's states before the head."""
BART_LIKE = frozenset({"bart", "mbart", "marian", "pegasus", "plbart"})
"""Model types with one ``model`` inside; their logits get ``final_logits_bias`` after the head."""
HEAD_APART = "ftune_head_apart"
"""Attribute of a model that was proved to give the same logits when its head is run by itself."""
TOLERANCE = 1e-4
"""How far those may lie from the model's own, relative to their size; a scale or bias left out is off by far more."""
SAMPLING = ("temperature", "top_k", "top_p")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Decoder states [B, T, H] and the head that makes logits of them; without a head they are the logits."""

    states: Tensor
    head: Callable[[Tensor], Tensor] | None

    def logits(self) -> Tensor:
        """All of them, [B, T, V]."""
        return self.states if self.head is None else self.head(self.states)


def decode_targets(model: Any, inputs: Mapping[str, Any]) -> Decoded:
    """Run the model over ``inputs`` with ``labels`` [B, T] (-100 is padding), shifted right by the model's own rule.

    A model whose head was proved to work apart stops before it; every other model gives all its logits.
    """
    if getattr(model, HEAD_APART, False):
        return _before_the_head(model, inputs)
    return Decoded(model(**inputs, use_cache=False).logits, None)


def _before_the_head(model: Any, inputs: Mapping[str, Any]) -> Decoded:
    """The steps of the known families, up to the head."""
    shifted = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    mask = inputs.get("attention_mask")
    if model.config.model_type in BART_LIKE:
        whole = model.model(inputs["input_ids"], attention_mask=mask, decoder_input_ids=shifted, use_cache=False)
        return Decoded(whole[0], lambda states: model.lm_head(states) + model.final_logits_bias)
    encoded = model.encoder(input_ids=inputs["input_ids"], attention_mask=mask)[0]
    states = model.decoder(input_ids=shifted, encoder_hidden_states=encoded, encoder_attention_mask=mask, use_cache=False)[0]
    if getattr(model.config, "scale_decoder_outputs", False):
        states = states * model.config.d_model**-0.5
    return Decoded(states, model.lm_head)


def prove_head(model: Any) -> None:
    """Let the head run apart where the model is of a known family and gives the same logits so, on samples of our own."""
    import numpy as np
    import torch

    if getattr(model.config, "model_type", "") not in T5_LIKE | BART_LIKE:
        return
    draw, where = np.random.Generator(np.random.Philox(0)), next(model.parameters()).device
    ids, labels = (torch.from_numpy(draw.integers(0, model.config.vocab_size, (2, 5))).to(where) for _ in range(2))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            theirs, ours = model(**inputs, use_cache=False).logits.float(), _before_the_head(model, inputs).logits().float()
    finally:
        model.train(was_training)
    same = bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1.0))
    setattr(model, HEAD_APART, same)


def target_loss(decoded: Decoded, targets: Tensor, real: Tensor, smoothing: float) -> Tensor:
    """Sum of the cross-entropy of N target tokens; ``real`` [N] says where they lie in the flat [B * T] states.

    The head runs over a chunk of them at a time; the logits of all but one chunk are computed again on the way back.
    """
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    states = decoded.states.flatten(0, 1).index_select(0, real)  # [N, H or V]

    def loss(part: Tensor, wanted: Tensor) -> Tensor:
        logits = part if decoded.head is None else decoded.head(part)
        return F.cross_entropy(logits.float(), wanted, label_smoothing=smoothing, reduction="sum")

    width = _vocabulary(decoded, states)
    size = max(1, LOGITS_AT_ONCE // width)
    parts = list(zip(torch.split(states, size), torch.split(targets, size), strict=True))
    if len(parts) == 1 or decoded.head is None or not torch.is_grad_enabled():
        return torch.stack([loss(*part) for part in parts]).sum()
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()


def _vocabulary(decoded: Decoded, states: Tensor) -> int:
    """How many logits a token has."""
    if decoded.head is None:
        return int(states.shape[-1])
    weight = getattr(decoded.head, "weight", None)
    return int(weight.shape[0]) if weight is not None else 1 << 16


# -- generation ----------------------------------------------------------------------------------
def settle_generation(model: Any, choices: Mapping[str, Any]) -> None:
    """Write the choices into the model's generation config, so that plain transformers generates alike. What they do not name stays.

    Raises UserError where the model has no positions for so many tokens.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and choices["max_new_tokens"] >= positions:
        raise UserError(
            f"the model writes at most {positions - 1} tokens",
            where=f"task.max_new_tokens={choices['max_new_tokens']}",
            fix=f"task.max_new_tokens={positions - 1} or less",
        )
    settings = model.generation_config
    settings.max_length = None
    settings.min_length = None
    for name, value in choices.items():
        setattr(settings, name, value)
    if not choices["do_sample"]:
        for name in SAMPLING:
            setattr(settings, name, None)
    if choices["num_beams"] == 1:
        settings.length_penalty = None
        settings.early_stopping = None


def generate(model: Any, inputs: Mapping[str, Any], places: np.ndarray, *, sequences: int, seed: int) -> list[Flat]:
    """``sequences`` texts a row as ids, the best first, each ending with the end token where one was written.

    ``places`` [B] tell the rows apart, for the draws of a sample.
    """
    import copy

    import torch

    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    settings, processors = copy.deepcopy(model.generation_config), []
    if settings.do_sample:
        ids, mask = ids.repeat_interleave(sequences, 0), mask.repeat_interleave(sequences, 0)
        processors = _sampling(settings, places, sequences, seed, ids.device)
        settings.do_sample, settings.num_return_sequences = False, 1
    with torch.autocast(ids.device.type, enabled=False):  # in fp32 a text depends on rounding least, and no step casts every weight
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=processors)
    written = found[:, 1:].cpu().numpy()  # what follows the decoder's start
    lengths = _lengths(written, settings.eos_token_id, settings.pad_token_id)
    return [_flat(written[k::sequences], lengths[k::sequences]) for k in range(sequences)]


def _lengths(written: np.ndarray, ends: int | list[int] | None, pad: int | None) -> np.ndarray:
    """Tokens of each row up to and with the end token, or up to padding."""
    import numpy as np

    if ends is None:
        return np.asarray((written != pad).sum(1))
    ended = np.isin(written, ends)
    return np.asarray(np.where(ended.any(1), ended.argmax(1) + 1, written.shape[1]))


def _flat(written: np.ndarray, lengths: np.ndarray) -> Flat:
    import numpy as np
    import torch

    inside = np.arange(written.shape[1])[None, :] < lengths[:, None]
    return Flat(torch.from_numpy(written[inside].astype(np.int32)), lengths.astype(np.int64))


def _sampling(settings: Any, places: np.ndarray, sequences: int, seed: int, where: Any) -> list[Any]:
    """The chain of processors that samples: temperature, top-k, top-p, then a token drawn with the row's own numbers."""
    import numpy as np
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from finetune_cli import randomness

    drawn = [
        randomness.generator(seed, "sample", int(place), number).random(settings.max_new_tokens)
        for place in places
        for number in range(sequences)
    ]
    chain: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))] if settings.temperature != 1.0 else []
    chain += [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
    chain += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1.0 else []
    return [*chain, _Drawn(torch.from_numpy(np.stack(drawn)).to(where))]


class _Drawn:
    """Turns scores into the one token that a row's number in [0, 1) falls on, so that a greedy search takes it."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        shares = torch.softmax(scores.double(), -1).cumsum(-1)  # [B, V]
        number = self.numbers[:, input_ids.shape[1] - 1, None] * shares[:, -1:]
        token = torch.searchsorted(shares, number, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)
