"""The kept gradient of a table of embeddings is that of torch's own, to the bit wherever a pass looks up once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ran import Ran
from torch import nn

from finetune_cli import models
from finetune_cli.models import tables

ROWS = 40


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LEAST", 1)


def pair(padding: int | None = 0) -> tuple[nn.Module, nn.Module]:
    """A model as torch runs it, and the same with kept gradients."""
    torch.manual_seed(1)
    own = nn.Sequential(nn.Embedding(ROWS, 8, padding_idx=padding), nn.Linear(8, 3))
    kept = copy.deepcopy(own)
    models.keep_table_gradients(kept)
    return own, kept


def passes(model: Any, batches: list[list[list[int]]]) -> list[torch.Tensor]:
    """Gradients of one update; in each pass the model looks up several sequences."""
    model.zero_grad(set_to_none=True)
    for texts in batches:
        torch.stack([model[1](model[0](torch.tensor([ids]))).pow(2).sum() for ids in texts]).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def is_kept(model: Any) -> bool:
    """Whether the table's gradient lies in the memory that is kept."""
    kept = tables._gradients.get(model[0].weight)
    return kept is not None and model[0].weight.grad.data_ptr() == kept.values.data_ptr()


IDS = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=9)


@given(
    st.lists(st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=4), st.sampled_from([None, 0, 7])
)
def test_updates_passes_and_several_lookups_in_a_pass(updates: list[list[list[list[int]]]], padding: int | None) -> None:
    own, kept = pair(padding)
    for batches in updates:
        to_the_bit = len(batches) == 1 or all(len(texts) == 1 for texts in batches)
        for a, b in zip(passes(own, batches), passes(kept, batches), strict=True):
            assert torch.equal(a, b) if to_the_bit else torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert is_kept(kept) == (len(batches[0]) == 1)


def test_a_pass_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    own, kept = pair()
    passes(kept, [[[1, 2]]])
    lost = kept[1](kept[0](torch.tensor([[3, 4]]))).sum()  # type: ignore[index]
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(tables._Gradient, "of", lambda *args: (_ for _ in ()).throw(MemoryError))
        lost.backward()
    for a, b in zip(passes(own, [[[5, 1]]]), passes(kept, [[[5, 1]]]), strict=True):
        assert torch.equal(a, b)


def test_copies_keep_gradients_of_their_own() -> None:
    own, kept = pair()
    twin = copy.deepcopy(kept)
    first = passes(kept, [[[1, 2, 3]]])
    second = passes(twin, [[[4, 5]]])
    assert is_kept(kept) and is_kept(twin)
    assert torch.equal(kept[0].weight.grad, first[0]) and torch.equal(second[0], passes(own, [[[4, 5]]])[0])  # type: ignore[index]


def test_tables_that_a_head_shares_or_that_do_not_learn_are_left_alone() -> None:
    own, _ = pair()
    shared = nn.Sequential(nn.Embedding(ROWS, 8), nn.Linear(8, ROWS, bias=False))
    shared[1].weight = shared[0].weight
    models.keep_table_gradients(shared)
    assert "forward" not in vars(shared[0])
    models.keep_table_gradients(own)
    own[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    own[1](own[0](torch.tensor([[1]]))).sum().backward()  # type: ignore[index]
    assert own[0].weight.grad is None and own[0].weight not in tables._gradients  # type: ignore[index]


def test_memory_is_given_back_when_nothing_is_left_to_learn() -> None:
    _, kept = pair()
    passes(kept, [[[1, 2]]])
    weight, names = kept[0].weight, list(kept.state_dict())  # type: ignore[index]
    models.drop_table_gradients(kept)
    assert weight not in tables._gradients
    models.let_go(kept)
    assert list(kept.state_dict()) == names and not any(p.numel() for p in kept.parameters()) and weight.grad is None


def test_a_run_is_the_same_to_the_byte(ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = ["+exp=smoke", "train.steps=6", "device=cpu", "device.threads=1"]
    ftune_inside("train", *keys, "run.dir=kept").ok()
    monkeypatch.setattr(tables, "LEAST", tables.MOST + 1)
    ftune_inside("train", *keys, "run.dir=own").ok()
    kept, own = ((tmp_path / name / "checkpoints" / "last" / "model.safetensors").read_bytes() for name in ("kept", "own"))
    assert kept == own
