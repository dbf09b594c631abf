"""The order of rows: a permutation, seeded, resumable, cut without losing or doubling a row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_cli.batching import BatchPlan, Padded, epoch_order, inference_batches, micro_batches, padded
from finetune_cli.encoded import Ragged


def plan(batch: int = 8, micro: int = 4096, order: str = "buckets") -> BatchPlan:
    return BatchPlan(batch_size=batch, micro_tokens=micro, inference_tokens=256, order=order, whole=False, reasons={})


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
@given(lengths_of_rows, st.integers(1, 500))
def test_micro_batches_keep_to_the_budget(lengths: np.ndarray, tokens: int) -> None:
    rows = np.arange(len(lengths))
    parts = micro_batches(rows, lengths, plan=plan(micro=tokens))
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    assert all(len(p) == 1 or len(p) * padded(int(lengths[p].max())) <= tokens for p in parts)


@settings(max_examples=40, deadline=None)
@given(lengths_of_rows)
def test_inference_sees_every_row_once_longest_first(lengths: np.ndarray) -> None:
    parts = inference_batches(lengths, tokens=256)
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
