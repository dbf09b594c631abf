"""Cross-entropy of the next token, the head applied in chunks: logits of more than a few thousand tokens never stand in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Head = Callable[["Tensor"], "Tensor"]
LOGITS = 2**22
"""Logits in memory at once: 16 MiB in fp32."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Last hidden states [S, H] of the tokens before the supervised ones, and the head that makes fp32 logits of them."""

    states: Tensor
    head: Head
    chunk: int
    """Tokens whose logits stand in memory together."""


def trunk(model: Any) -> Any:
    """The model without its head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def head(model: Any) -> Head:
    """Hidden states to fp32 logits, as the model's own forward makes them (scaled or capped where its config says so)."""
    import torch

    config, project = model.config.get_text_config(), model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    times = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)

    def logits(states: Tensor) -> Tensor:
        found = project(states)
        if times is not None:
            found = found * times
        if divisor is not None:
            found = found / divisor
        if cap is not None:
            found = torch.tanh(found / cap) * cap
        return found.float()  # type: ignore[no-any-return]

    return logits


def hidden_of(model: Any, positions: Tensor, **inputs: Any) -> Hidden:
    """The hidden states at ``positions`` [S] of the flattened batch."""
    states = trunk(model)(**inputs, use_cache=False).last_hidden_state  # [B, T, H]
    chunk = max(1, LOGITS // int(model.config.get_text_config().vocab_size))
    return Hidden(states.flatten(0, 1).index_select(0, positions), head(model), chunk)


def _chunks(hidden: Hidden, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(targets), hidden.chunk):
        yield hidden.states[start : start + hidden.chunk], targets[start : start + hidden.chunk]


def total(hidden: Hidden, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy over ``targets`` [S]. Logits of a chunk are made again for the backward pass instead of being kept."""
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    def some(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(hidden.head(states), wanted, reduction="sum")

    found = hidden.states.new_zeros((), dtype=torch.float32)
    for states, wanted in _chunks(hidden, targets):
        if torch.is_grad_enabled():
            found = found + checkpoint(some, states, wanted, use_reentrant=False, preserve_rng_state=False)
        else:
            found = found + some(states, wanted)
    return found


def each(hidden: Hidden, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy of each token, whether it was the likeliest), both [S]; without gradients."""
    import torch
    from torch.nn import functional as F

    losses, hits = [targets.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0, dtype=torch.bool)]
    for states, wanted in _chunks(hidden, targets):
        logits = hidden.head(states)
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
    return torch.cat(losses), torch.cat(hits)
