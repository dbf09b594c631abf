"""The head of a masked language model over chosen tokens alone: with 15 % of the tokens masked, a seventh of its work and memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKEN_BY_TOKEN = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "mpnet", "deberta-v2", "modernbert"}
)
"""``model_type`` of families whose head reads one hidden state at a time; each is held equal to the model's own logits by a test."""


def logits_at(model: Any, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Logits [M, V] of the tokens at ``positions`` [M] of the flattened batch.

    A family that is not known to read its hidden states token by token computes the logits of every token first.
    """
    prefix = model.base_model_prefix
    if getattr(model.config, "model_type", "") not in TOKEN_BY_TOKEN or prefix not in model._modules:
        logits: Tensor = model(**inputs).logits
        return logits.flatten(0, 1).index_select(0, positions)
    hidden = model.base_model(**inputs)[0]  # [B, T, H]
    chosen = hidden.flatten(0, 1).index_select(0, positions)[None]  # [1, M, H]
    told: Tensor = _with_base(model, prefix, chosen)(input_ids=inputs["input_ids"]).logits
    return told[0]


def _with_base(model: Any, prefix: str, hidden: Tensor) -> Any:
    """The model with its own head and weights, whose body answers with the hidden states given. The model itself stays as it is."""
    shell = copy.copy(model)
    shell.__dict__["_modules"] = {**model._modules, prefix: _given(hidden)}
    return shell


def _given(hidden: Tensor) -> nn.Module:
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutput

    class Given(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            return BaseModelOutput(last_hidden_state=hidden)

    return Given()
