"""Baselines are honest: learnt from train only, the same every time, and scored by the same metrics as the model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune_cli import baselines

GOOD = ["a lovely warm meal", "lovely and quick", "warm, kind staff", "I was glad to stay"]
BAD = ["a cold dull meal", "dull and slow", "cold, rude staff", "I was sorry to stay"]
TEXTS = GOOD * 10 + BAD * 12
LABELS = np.array([1] * 40 + [0] * 48)
TEST = (["lovely warm staff", "cold dull staff", "dull"], np.array([1, 0, 0]))
LINEAR = "TF-IDF + logistic regression"


def test_majority_and_tf_idf() -> None:
    found = baselines.classification(TEXTS, LABELS, *TEST, names=["bad", "good"])
    assert found["majority"]["accuracy"] == pytest.approx(2 / 3) and found["majority"]["roc_auc"] == 0.5
    assert found[LINEAR]["accuracy"] == 1.0
    again = baselines.classification(TEXTS, LABELS, *TEST, names=["bad", "good"])
    assert found == again


def test_chinese_is_cut_into_characters() -> None:
    good, bad = ["送餐很快味道好", "味道很好", "非常好吃"], ["送餐太慢汤洒了", "太难吃了", "汤都凉了太慢"]
    found = baselines.classification(
        good * 8 + bad * 8, np.array([1] * 24 + [0] * 24), ["真的很好吃", "太慢了汤凉"], np.array([1, 0]), names=["坏", "好"]
    )
    assert found[LINEAR]["accuracy"] == 1.0


def test_a_class_that_only_the_test_has_counts_as_wrong() -> None:
    found = baselines.classification(TEXTS, LABELS, ["lovely", "so so"], np.array([1, 2]), names=["bad", "good", "middling"])
    assert found[LINEAR]["accuracy"] <= 0.5 and math.isfinite(found["majority"]["log_loss"])


@pytest.mark.parametrize("texts", [[""] * 88, ["?!"] * 88])
def test_texts_without_words_leave_the_majority(texts: list[str]) -> None:
    assert set(baselines.classification(texts, LABELS, ["", "x"], np.array([0, 1]), names=["bad", "good"])) == {"majority"}


def test_several_labels_with_one_that_never_occurs() -> None:
    targets = np.c_[LABELS, 1 - LABELS, np.zeros_like(LABELS)]
    found = baselines.multilabel(TEXTS, targets, ["lovely warm", "cold dull"], np.array([[1, 0, 0], [0, 1, 0]]))
    assert found[LINEAR]["accuracy"] == 1.0 and math.isnan(found[LINEAR]["roc_auc"])
    assert found["majority"]["recall_macro"] < 1


def test_mean_and_ridge() -> None:
    found = baselines.regression(TEXTS, LABELS[:, None] * 4.0 + 1, ["lovely warm", "cold dull", "dull"], np.array([[5.0], [1.0], [1.0]]))
    assert math.isnan(found["mean"]["pearson"]) and found["TF-IDF + ridge"]["rmse"] < found["mean"]["rmse"]


def test_rows_are_capped_and_the_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MOST_ROWS", 20)
    found = baselines.classification(TEXTS, LABELS, ["lovely", "dull"], np.array([1, 0]), names=["bad", "good"])
    assert f"{LINEAR} (20 rows)" in found
