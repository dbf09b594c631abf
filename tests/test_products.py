"""Products that oneDNN was given ready are PyTorch's to a rounding, only where no gradient is wanted, and end with their context."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.activations import ACT2FN

from finetune_cli import models
from finetune_cli.models import products

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not products._works(), reason="this PyTorch has no ready products")


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 1)


def layer(inputs: int = 96, outputs: int = 160, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias)


def under_autocast(call: Any) -> Any:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return call()


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.booleans())
def test_they_are_pytorchs(inputs: int, outputs: int, rows: list[int], bias: bool) -> None:
    """Against the same product of the same bf16 numbers in fp64: off by the rounding of the answer to bf16, GELU included."""
    own = layer(inputs, outputs, bias=bias)
    x = torch.randn(*rows, inputs)
    exact = copy.deepcopy(own).bfloat16().double()(x.bfloat16().double())
    with models.ready_products(own, CPU, torch.bfloat16):
        plain = under_autocast(lambda: own(x))
        gelu = under_autocast(lambda: models.activated(own, ACT2FN["gelu"], x))
    for found, wanted in ((plain, exact), (gelu, nn.functional.gelu(exact))):
        assert found.dtype == torch.bfloat16 and found.shape == (*rows, outputs)
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=2e-3)


def test_another_activation_is_its_own() -> None:
    own, x = layer(), torch.randn(5, 96)
    with models.ready_products(own, CPU, torch.bfloat16):
        for name in ("relu", "gelu_new", "silu"):
            found = under_autocast(lambda name=name: models.activated(own, ACT2FN[name], x))
            assert torch.equal(found, under_autocast(lambda name=name: ACT2FN[name](own(x))))


def test_gradients_and_full_precision_are_the_layers_own() -> None:
    own, x = layer(), torch.randn(5, 96)
    wanted = own(x)
    wanted.sum().backward()
    gradient, own.weight.grad = own.weight.grad, None
    with models.ready_products(own, CPU, torch.bfloat16):
        assert torch.equal(own(x), wanted)
        with torch.no_grad():
            assert torch.equal(own(x), wanted)
        own(x).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert own(x).requires_grad
    assert gradient is not None and own.weight.grad is not None and torch.equal(own.weight.grad, gradient)


@pytest.mark.parametrize("fails", [False, True])
def test_they_end_with_their_context(fails: bool) -> None:
    """Weights that change afterwards are the ones that answer."""
    own, x = layer(), torch.randn(5, 96)
    try:
        with models.ready_products(own, CPU, torch.bfloat16):
            before = under_autocast(lambda: own(x))
            if fails:
                raise KeyError
    except KeyError:
        pass
    with torch.no_grad():
        own.weight.mul_(2.0)
    assert "forward" not in vars(own)
    assert not torch.allclose(under_autocast(lambda: own(x)), before, atol=0.1)


def test_what_computes_in_its_own_way_is_left_alone() -> None:
    """A subclass, a forward put in by somebody else, and everything in full precision."""

    class Other(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    theirs = layer()
    theirs.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleList([Other(8, 8), theirs, layer()])
    with models.ready_products(model, CPU, torch.bfloat16):
        assert "forward" not in vars(model[0]) and not isinstance(vars(theirs)["forward"], products._Product)
        assert isinstance(vars(model[2])["forward"], products._Product)
    assert "forward" in vars(theirs)
    with models.ready_products(model, CPU, torch.float32):
        assert "forward" not in vars(model[2])


def test_where_pytorch_has_none_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        def __init__(self, layer: nn.Linear) -> None:
            raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_Product", Without)
    products._works.cache_clear()
    try:
        assert not products._works()
        own = layer()
        with models.ready_products(own, CPU, torch.bfloat16):
            assert "forward" not in vars(own)
    finally:
        monkeypatch.undo()
        products._works.cache_clear()
