"""The pooling of a sentence encoder, carried by a plain BERT in its own weights.

Sentence encoders such as all-MiniLM-L6-v2 speak through the mean of their token vectors, but a BERT classifier reads the first token. One
more BERT layer closes the gap, so that the checkpoint stays what transformers loads and runs:

- query and key are 0: every token attends evenly to the real tokens of its sample, so that attention gives the mean of the values;
- value is ALPHA times the identity, the projection after it the identity: the first token's own state counts 1 / ALPHA beside the mean;
- the feed-forward part gives 0, so that both LayerNorms leave the mean centred, with a standard deviation of 1;
- the pooler is SCALE times the identity, where tanh is nearly straight.

Encoders that speak through the first token (BGE, say) need the pooler alone. The layer's dropout acts in training as that of any other:
some words are left out of the mean, and some places of the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune_cli.config.choices import Pooling
from finetune_cli.config.schema import ModelConfig
from finetune_cli.errors import UserError

ALPHA = 1e4
"""How much the mean outweighs the state it is added to."""
SCALE = 0.1
"""Of the pooler: cosines after tanh are those before it to 0.005, and a new head still gets inputs of a useful size."""
CLASSIFIER = "AutoModelForSequenceClassification"
MARK = "sentence_pooling"
"""What the model's config says of a pooling that was built in, so that a run that starts from it builds no second one."""


def refuse_unknown(config: ModelConfig, *, auto_class: str, model_type: str) -> None:
    """Raise UserError where a pooling cannot be built into this kind of model; ``model_type`` is that of its config."""
    if config.pooling == Pooling.own:
        return
    if auto_class != CLASSIFIER:
        raise UserError(
            f"model.pooling={config.pooling.value} is for models that label whole texts, and this task uses {auto_class}",
            where="model.pooling",
            fix="leave model.pooling out",
        )
    if model_type != "bert":
        raise UserError(
            f"model.pooling={config.pooling.value} is built for BERT models, and this one is {model_type or 'of no known family'}",
            where="model.pooling",
            fix="model=minilm, another BERT, or model.pooling=own",
        )


@torch.no_grad()
def build_in(model: Any, kind: Pooling) -> list[str]:
    """Give a ``BertForSequenceClassification`` a pooling; the names of the parameters that are set by it."""
    if kind == Pooling.own or getattr(model.config, MARK, None) == kind.value:
        return []
    layers = model.config.num_hidden_layers
    if kind == Pooling.mean:
        _append_mean(model)
    _identity(model.base_model.pooler.dense, SCALE)
    setattr(model.config, MARK, kind.value)
    return [name for name, _ in model.named_parameters() if f".layer.{layers}." in name or ".pooler." in name]


def _append_mean(model: Any) -> None:
    """Add the layer whose first token is the mean of all tokens, centred and of standard deviation 1."""
    from transformers.models.bert.modeling_bert import BertLayer

    base, config = model.base_model, model.config
    layer = BertLayer(config, layer_idx=config.num_hidden_layers).to(next(base.parameters()).device)
    for parameter in layer.parameters():
        parameter.zero_()
    _identity(layer.attention.self.value, ALPHA)
    _identity(layer.attention.output.dense, 1.0)
    layer.attention.output.LayerNorm.weight.fill_(1.0)
    layer.output.LayerNorm.weight.fill_(1.0)
    base.encoder.layer.append(layer.train(model.training))
    config.num_hidden_layers += 1


def _identity(linear: nn.Module, size: float) -> None:
    """``size`` times the identity, without a bias."""
    assert isinstance(linear, nn.Linear) and linear.bias is not None
    nn.init.eye_(linear.weight).mul_(size)
    linear.bias.zero_()
