"""The order of rows: a permutation, seeded, resumable, cut without losing or doubling a row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_cli.batching import BatchPlan, Padded, epoch_order, find, inference_batches, micro_batches, padded
from finetune_cli.config import Order
from finetune_cli.encoded import Ragged


def plan(batch: int = 8, micro: int = 4096, order: str = "buckets", packed: bool = False) -> BatchPlan:
    return BatchPlan(batch_size=batch, micro_tokens=micro, inference_tokens=256, order=order, whole=False, packed=packed, reasons={})


lengths_of_rows = st.lists(st.integers(1, 60), min_size=1, max_size=900).map(lambda x: np.array(x, np.int64))


@settings(max_examples=40, deadline=None)
@given(lengths_of_rows, st.integers(1, 40), st.sampled_from(["buckets", "shuffled"]), st.integers(0, 5))
def test_an_epoch_holds_every_row_once(lengths: np.ndarray, batch: int, order: str, epoch: int) -> None:
    batches = epoch_order(lengths, plan=plan(batch, order=order), seed=7, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == plan(batch).steps_per_epoch(len(lengths))
    assert sorted(map(len, batches), reverse=True)[:-1] == [batch] * (len(batches) - 1)
    again = epoch_order(lengths, plan=plan(batch, order=order), seed=7, epoch=epoch)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.arange(1, 400)
    orders = [np.concatenate(epoch_order(lengths, plan=plan(), seed=s, epoch=e)).tolist() for s, e in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_buckets_pad_less_than_shuffling() -> None:
    lengths = np.random.default_rng(0).geometric(0.05, 4000)

    def waste(order: str) -> float:
        batches = epoch_order(lengths, plan=plan(32, order=order), seed=1, epoch=0)
        return sum(len(b) * lengths[b].max() for b in batches) / lengths.sum()

    assert waste("buckets") < 0.6 * waste("shuffled")


@settings(max_examples=40, deadline=None)
@given(lengths_of_rows, st.integers(1, 500), st.booleans())
def test_micro_batches_keep_to_the_budget(lengths: np.ndarray, tokens: int, packed: bool) -> None:
    rows = np.arange(len(lengths))
    parts = micro_batches(rows, lengths, plan=plan(micro=tokens, packed=packed))
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    cost = [int(lengths[p].sum()) if packed else len(p) * padded(int(lengths[p].max())) for p in parts]
    assert all(len(p) == 1 or tokens_of <= tokens for p, tokens_of in zip(parts, cost, strict=True))
    if packed:  # no part could have taken the next one's first row as well
        assert all(tokens_of + lengths[following[0]] > tokens for tokens_of, following in zip(cost, parts[1:], strict=False))


@settings(max_examples=40, deadline=None)
@given(lengths_of_rows, st.booleans(), st.integers(1, 4))
def test_inference_sees_every_row_once_longest_first(lengths: np.ndarray, packed: bool, crew: int) -> None:
    parts = inference_batches(lengths, plan=plan(packed=packed), crew=crew)
    order = np.concatenate(parts)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[order]) <= 0).all()


def test_padding_and_mask() -> None:
    ids = Ragged.of([[5, 6, 7], [8]])
    laid = Padded({"input_ids": 9}, limit=512).lay({"input_ids": ids})
    assert laid["input_ids"].tolist() == [[5, 6, 7, 9, 9, 9, 9, 9], [8, 9, 9, 9, 9, 9, 9, 9]]
    assert laid["attention_mask"].sum(1).tolist() == [3, 1]
    full = Padded({}, limit=3).lay({"input_ids": Ragged.of([[1, 2, 3], [4, 5, 6]])})
    assert "attention_mask" not in full and full["input_ids"].shape == (2, 3)


@pytest.mark.parametrize("indices", [[0], [2, 0], [1, 1, 2]])
def test_ragged_take(indices: list[int]) -> None:
    rows = [[1, 2], [], [3, 4, 5]]
    taken = Ragged.of(rows).take(np.array(indices))
    assert [taken.values[a:b].tolist() for a, b in zip(taken.offsets, taken.offsets[1:], strict=False)] == [rows[i] for i in indices]


@pytest.mark.parametrize(
    ("wanted", "packed", "chosen"),
    [("auto", True, "shuffled"), ("auto", False, "buckets"), ("buckets", True, "buckets"), ("shuffled", False, "shuffled")],
)
def test_random_order_where_it_costs_nothing(wanted: str, packed: bool, chosen: str) -> None:
    found = find(
        8, Order(wanted), np.array([3, 9, 4]), memory_bytes=1e9, bytes_per_token=1e3, whole=False, packed=packed, layout="", saved=None
    )
    assert found.order == chosen and found.reasons["order"]
    again = find(
        8, Order.buckets, np.array([3, 9]), memory_bytes=1, bytes_per_token=1e3, whole=False, packed=packed, layout="", saved=found.saved()
    )
    assert again == found
