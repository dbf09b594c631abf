"""Which layers of a model get an adapter, and which are its head."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from finetune_cli.errors import UserError

ALL_LINEAR = "all-linear"
USUAL = {
    "camembert": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
}
"""Projections of the attention, for architectures that peft's own table leaves out."""


def head(model: Any, new: Iterable[str]) -> tuple[str, ...]:
    """Modules that are trained whole: what stands on top of the base model, and what was ``new`` when the weights were loaded.

    Weights that the base shares (an output layer tied to the embeddings) are the base's and stay out. Outermost modules, by name.
    """
    base = _base_weights(model)
    own = {name: id(p) not in base for name, p in model.named_parameters(remove_duplicate=False)}
    for name in new:
        if name in own and "." in name:
            module = name.rpartition(".")[0]
            own |= {other: True for other in own if other.rpartition(".")[0] == module}
    found: list[str] = []
    for name, module in model.named_modules():
        inside = [own[f"{name}.{p}"] for p, _ in module.named_parameters(remove_duplicate=False)] if name else []
        if inside and all(inside) and not _within(name, found):
            found.append(name)
    return tuple(found)


def _base_weights(model: Any) -> set[int]:
    """The weights under the head. A model that has no inner base model (T5) is one but for its output layer."""
    if model.base_model is not model:
        return {id(p) for p in model.base_model.parameters()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    top = [name for name, module in model.named_modules() if module is output and output is not None]
    return {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not _within(name, top)}


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of the modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def choose(model: Any, wanted: Any, whole: Collection[str]) -> tuple[list[str], str]:
    """(full names of the layers that get an adapter, what was chosen and why); ``whole`` are modules trained without one.

    Raises UserError where a named layer is not in the model, with the names that may have been meant.
    """
    layers = _linear_layers(model, whole)
    kind = getattr(model.config, "model_type", "this model")
    if wanted == ALL_LINEAR:
        return layers, f"all {len(layers)} linear layers, as model.targets says"
    if wanted not in ("auto", None):
        named = _named(layers, wanted, model)
        return named, f"{len(named)} layers: {', '.join(wanted)}, as model.targets says"
    usual, source = _usual(kind)
    chosen = [layer for layer in layers if _is_called(layer, usual)]
    if not chosen:
        return layers, f"all {len(layers)} linear layers: no usual choice is known for {kind}"
    return chosen, f"{len(chosen)} layers: {', '.join(usual)}, {source} for {kind}"


def _usual(kind: str) -> tuple[tuple[str, ...], str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if kind in USUAL:
        return USUAL[kind], "the projections of queries and values"
    return tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind) or ()), "peft's choice"


def _linear_layers(model: Any, whole: Collection[str]) -> list[str]:
    """Names of the linear layers, but for the head and the layer that gives the scores of the vocabulary."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # attention reads its weight without calling it
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and module is not output
        and not _within(name, whole)
    ]


def _is_called(layer: str, names: Collection[str]) -> bool:
    """Whether a layer's full name, or its end, is among the names."""
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _named(layers: list[str], names: list[str], model: nn.Module) -> list[str]:
    """The layers of these names, in the model's order."""
    short = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    for name in names:
        if any(_is_called(layer, [name]) for layer in layers):
            continue
        near = difflib.get_close_matches(name, short, 3, 0.5)
        there = any(_is_called(module, [name]) for module, _ in model.named_modules())
        raise UserError(
            f"{name!r} is no linear layer under the head" if there else f"the model has no layer {name!r}",
            where="model.targets",
            fix=f"did you mean {' or '.join(near)}?" if near else f"all-linear, or some of {', '.join(short[:8])}",
        )
    return [layer for layer in layers if _is_called(layer, names)]
