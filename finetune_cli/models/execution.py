"""How a loaded model runs: attention that never waits for the device, activations kept or not, and what it weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune_cli.errors import UserError

OWN_ATTENTION = "ftune_sdpa"


def never_wait(model: nn.Module) -> None:
    """Keep transformers' attention mask from reading the padding back from the device in every forward pass.

    Its own mask function asks whether anything is padded (``mask.all()``, a host sync) to skip an empty mask. Our layouts give a mask only
    where something is, so there is nothing to ask. The mathematics is the same; saved configs do not know of it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attend_by(model, OWN_ATTENTION, sdpa_attention_forward)


def attend_by(model: nn.Module, name: str, attention: Callable[..., Any]) -> bool:
    """Let a model that attends by PyTorch's kernel attend by a function of ours, with masks as in ``never_wait``; whether it does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        if attention_mask is not None:
            options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(*args, attention_mask=attention_mask, **options)

    if getattr(model.config, "_attn_implementation", None) not in ("sdpa", name):
        return False
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)  # type: ignore[operator]
    return bool(model.config._attn_implementation == name)  # type: ignore[union-attr]


def attend_as_before(model: nn.Module) -> None:
    """Take back ``attend_by``."""
    model.set_attn_implementation("sdpa")  # type: ignore[operator]


def checkpoint_gradients(model: Any) -> None:
    """Let every layer compute its activations again in the backward pass instead of keeping them."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} knows no gradient checkpointing",
            where="model.gradient_checkpointing",
            fix="model.gradient_checkpointing=false",
        )
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def activation_bytes(model_config: Any, *, kept: bool = True) -> float:
    """Rough bytes that one token of training holds in activations, to choose a micro-batch; ``kept``: no gradient checkpointing."""
    layers = getattr(model_config, "num_hidden_layers", None) or 12
    hidden = getattr(model_config, "hidden_size", None) or 768
    return float(layers * hidden * 80) if kept else float(layers * hidden * 4 + hidden * 80)


def bytes_on_disk(model: nn.Module) -> tuple[int, int]:
    """(of a checkpoint: trained weights with two moments each; of the exported model)."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return 3 * sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def let_go(model: nn.Module) -> None:
    """Free the weights of a model that nobody will ask again; their names stay."""
    for parameter in model.parameters():
        if type(parameter.data) is torch.Tensor:  # what quantised weights hold is theirs to free
            parameter.data, parameter.grad = parameter.data.new_empty(0), None


def parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)
