"""On the device of ``--device``: a packed batch gives the logits and gradients of the padded one. Run on a GPU by scripts/cuda_tests.sh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from finetune_cli import packing
from finetune_cli.batching import Padded
from finetune_cli.config import DeviceConfig
from finetune_cli.config.choices import DeviceName, Precision
from finetune_cli.device import find
from finetune_cli.encoded import Ragged
from finetune_cli.packing import Packed

pytestmark = pytest.mark.device
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 90, "num_labels": 3}
LENGTHS = [5, 40, 3, 17, 40, 1, 9]


def network(family: str, place: torch.device) -> Any:
    """A classifier without dropout, with weights large enough that a mixed-up sample shows."""
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForSequenceClassification")(getattr(transformers, f"{family}Config")(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to(place).train()


def moved(value: Any, place: torch.device) -> Any:
    return value.each(lambda tensor: tensor.to(place)) if hasattr(value, "each") else value.to(place)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_packed_is_padded_on_the_device(family: str, precision: str, tolerance: float, device: str) -> None:
    plan = find(DeviceConfig(name=DeviceName(device), precision=Precision(precision)))
    plan.apply()
    model = network(family, plan.device)
    draw = np.random.default_rng(1)
    columns = {"input_ids": Ragged.of([draw.integers(2, 90, n) for n in LENGTHS])}
    layout, told = packing.layout(model, pad_id=model.config.pad_token_id, limit=64, device=plan)
    assert isinstance(layout, Packed), told
    weights = torch.randn(len(LENGTHS), 3, generator=torch.Generator().manual_seed(0)).to(plan.device)
    found = []
    for way in (Padded({"input_ids": model.config.pad_token_id}, 64), layout):
        model.zero_grad()
        with plan.autocast():
            logits = model(**{name: moved(value, plan.device) for name, value in way.lay(columns).items()}).logits
        (logits.float() * weights).sum().backward()
        found.append([logits.detach().float(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    scale = torch.stack([gradient.norm() for gradient in found[0][1:]]).max()  # some gradients are 0 but for rounding
    for number, (padded, packed) in enumerate(zip(*found, strict=True)):
        off = (padded - packed).norm() / (scale if number else padded.norm())
        assert off < tolerance, f"off by {off:.1e} of its size"
