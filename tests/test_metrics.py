"""Metrics equal scikit-learn's on random arrays, count rows as often as told, and never hide what is not defined."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from finetune_cli import metrics
from finetune_cli.metrics import DIRECTIONS, better
from finetune_cli.metrics.classification import BINS, bin_of
from finetune_cli.metrics.ranking import Ranking

SEEDS = range(40)


def one_label(seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities with many ties, in two to six classes; some classes may be missing among the labels."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 80)), int(rng.integers(2, 7))
    p = np.round(rng.dirichlet(np.ones(k), n), int(rng.integers(1, 6)))
    p = np.where(p.sum(1, keepdims=True) > 0, p, 1.0)
    p /= p.sum(1, keepdims=True)
    return p, rng.integers(0, k, n), [f"label {c}" for c in range(k)]


def several_labels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 80)), int(rng.integers(1, 6))
    return np.round(rng.random((n, k)), int(rng.integers(1, 6))), (rng.random((n, k)) < rng.random(k)).astype(np.int64)


def numbers(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n, t = int(rng.integers(3, 80)), int(rng.integers(1, 4))
    y = np.round(rng.normal(size=(n, t)) * 10.0 ** rng.integers(-3, 4), int(rng.integers(0, 6)))
    return y + rng.normal(size=(n, t)) * (1 + y.std()), y + 1000.0 * rng.integers(0, 2)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("seed", SEEDS)
def test_one_label_equals_scikit_learn(seed: int) -> None:
    from sklearn import metrics as sk

    p, y, names = one_label(seed)
    k, guess = p.shape[1], p.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(y, guess),
        "mcc": sk.matthews_corrcoef(y, guess),
        "log_loss": sk.log_loss(y, p, labels=range(k)),
        "brier": sk.brier_score_loss(y, p[:, 1]) if k == 2 else sk.brier_score_loss(y, p, labels=range(k)),
    }
    for average in ("macro", "micro", "weighted"):
        expected[f"f1_{average}"] = sk.f1_score(y, guess, average=average, zero_division=0)
    for name in ("precision", "recall"):
        score = getattr(sk, f"{name}_score")
        expected[f"{name}_macro"] = score(y, guess, average="macro", zero_division=0)
        if k == 2:
            expected[name] = score(y, guess, zero_division=0)
    if k == 2:
        expected["f1"] = sk.f1_score(y, guess, zero_division=0)
    if len(np.unique(y)) == k:
        ranked = p[:, 1] if k == 2 else p
        expected["roc_auc"] = sk.roc_auc_score(y, ranked, multi_class="ovr", labels=range(k) if k > 2 else None)
        classes = [1] if k == 2 else range(k)
        expected["pr_auc"] = np.mean([sk.average_precision_score(y == c, p[:, c]) for c in classes])
    else:
        expected |= {"roc_auc": math.nan, "pr_auc": math.nan}
    found = metrics.classification(p, y, names)
    assert set(found) == {*expected, "ece"} and set(found) <= set(DIRECTIONS)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_several_labels_equal_scikit_learn(seed: int) -> None:
    from sklearn import metrics as sk

    p, y = several_labels(seed)
    threshold = 0.5 if seed % 2 else np.linspace(0.3, 0.6, p.shape[1])
    guess = (p >= threshold).astype(int)
    kinds = {"f1_macro": "macro", "f1_micro": "micro", "f1_weighted": "weighted"}
    # scikit-learn takes a single 0/1 column for two classes; f_score on a stacked column would be another metric
    labels = slice(None) if p.shape[1] > 1 else np.array([0])
    expected: dict[str, float] = {"accuracy": sk.accuracy_score(y, guess), "brier": float(((p - y) ** 2).mean())}
    if p.shape[1] > 1:
        expected |= {name: sk.f1_score(y, guess, average=kind, zero_division=0) for name, kind in kinds.items()}
        expected["precision_macro"] = sk.precision_score(y, guess, average="macro", zero_division=0)
        expected["recall_macro"] = sk.recall_score(y, guess, average="macro", zero_division=0)
    else:
        expected["f1_macro"] = sk.f1_score(y[:, 0], guess[:, 0], zero_division=0)
    columns = range(p.shape[1])
    expected["log_loss"] = float(np.mean([sk.log_loss(y[:, c], np.c_[1 - p[:, c], p[:, c]], labels=[0, 1]) for c in columns]))
    mixed = all(0 < y[:, c].sum() < len(y) for c in columns)
    expected["roc_auc"] = sk.roc_auc_score(y[:, labels], p[:, labels], average="macro") if mixed else math.nan
    expected["pr_auc"] = float(np.mean([sk.average_precision_score(y[:, c], p[:, c]) for c in columns])) if mixed else math.nan
    found = metrics.multilabel(p, y, threshold)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_equal_scikit_learn_and_scipy(seed: int) -> None:
    from scipy import stats
    from sklearn import metrics as sk

    p, y = numbers(seed)
    columns = range(y.shape[1])
    varied = all(np.ptp(y[:, c]) > 0 for c in columns)
    expected = {
        "mae": sk.mean_absolute_error(y, p),
        "rmse": sk.root_mean_squared_error(y, p),
        "r2": sk.r2_score(y, p) if varied else math.nan,
        "pearson": np.mean([stats.pearsonr(y[:, c], p[:, c]).statistic for c in columns]),
        "spearman": np.mean([stats.spearmanr(y[:, c], p[:, c]).statistic for c in columns]),
    }
    assert metrics.regression(p, y) == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("seed", range(10))
def test_a_row_that_counts_twice_is_two_rows(seed: int) -> None:
    """What the bootstrap rests on: a metric of multiplicities is the metric of the repeated rows."""
    rng = np.random.default_rng(seed)
    p, y, names = one_label(seed)
    pm, ym = several_labels(seed)
    pr, yr = numbers(seed)
    families: list[tuple[Callable[[Any], metrics.Measures], int]] = [
        (lambda rows: metrics.classification_measures(p[rows], y[rows], names), len(y)),
        (lambda rows: metrics.multilabel_measures(pm[rows], ym[rows]), len(ym)),
        (lambda rows: metrics.regression_measures(pr[rows], yr[rows]), len(yr)),
    ]
    for build, n in families:
        weights = rng.integers(0, 4, size=(3, n)).astype(np.float64)
        weights[:, 0] = 1
        whole = build(slice(None))
        assert whole.ranked is not None
        counted = {**whole.plain(weights), **whole.ranked(weights)}
        for r, row in enumerate(weights):
            repeated = metrics.values(build(np.repeat(np.arange(n), row.astype(int))))
            got = {name: float(value[r]) for name, value in counted.items()}
            assert got == pytest.approx(repeated, rel=1e-9, abs=1e-8, nan_ok=True)


def test_undefined_is_not_a_number_and_says_why() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
    y = np.array([0, 1, 0])
    entries = metrics.score(lambda rows: metrics.classification_measures(p[rows], y[rows], ["a", "b", "c"]), 3, seed=0)
    assert entries["roc_auc"]["value"] is None and "'c'" in entries["roc_auc"]["note"]
    assert entries["accuracy"]["value"] == 1.0
    json.dumps(entries, allow_nan=False)
    constant = metrics.regression(np.full((5, 1), 0.1), np.arange(5.0)[:, None])
    assert math.isnan(constant["pearson"]) and math.isnan(constant["spearman"]) and not math.isnan(constant["mae"])
    two = metrics.regression(np.c_[np.arange(5.0), np.full(5, 3.0)], np.c_[np.arange(5.0), np.arange(5.0)])
    assert math.isnan(two["pearson"]), "one undefined target may not vanish in the mean"
    flat = metrics.regression(np.arange(5.0)[:, None], np.full((5, 1), 1e9 + 0.1))
    assert math.isnan(flat["r2"]) and math.isnan(flat["pearson"])


def test_no_rows_and_one_row() -> None:
    none = metrics.classification(np.zeros((0, 2)), np.zeros(0, dtype=int), ["a", "b"])
    assert all(math.isnan(value) for name, value in none.items() if name not in ("f1", "precision", "recall"))
    entries = metrics.score(lambda rows: metrics.regression_measures(np.ones((1, 1))[rows], np.ones((1, 1))[rows]), 1, seed=0)
    assert entries["mae"]["value"] == 0.0 and entries["r2"]["value"] is None and "fewer than two" in entries["r2"]["note"]


def test_ece_has_fifteen_bins_of_equal_width() -> None:
    assert BINS == 15
    assert bin_of(np.array([0.0, 1 / 15, 1 / 15 + 1e-9, 0.999, 1.0])).tolist() == [0, 0, 1, 14, 14]
    p = np.array([[0.1, 0.9], [0.1, 0.9], [0.4, 0.6]])
    assert metrics.classification(p, np.array([1, 0, 1]), ["a", "b"])["ece"] == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.6)) / 3)


def test_intervals_are_seeded_and_of_the_right_width() -> None:
    rng = np.random.default_rng(0)
    n = 800
    y = rng.integers(0, 2, n)
    p = np.clip(0.5 + (y - 0.5) * 0.5 + rng.normal(size=n) * 0.25, 0.01, 0.99)
    both = np.c_[1 - p, p]

    def build(rows: Any) -> metrics.Measures:
        return metrics.classification_measures(both[rows], y[rows], ["no", "yes"])

    first, again, other = (metrics.score(build, n, seed=seed) for seed in (1, 1, 2))
    assert first == again and first["accuracy"] != other["accuracy"]
    for name, entry in first.items():
        assert set(entry) == {"value", "low", "high", "n"} and entry["n"] == n
        assert entry["low"] <= entry["value"] <= entry["high"] or name == "ece"
    a = first["accuracy"]
    assert a["high"] - a["low"] == pytest.approx(2 * 1.96 * math.sqrt(a["value"] * (1 - a["value"]) / n), rel=0.12)


def test_many_rows_get_a_narrower_interval_not_a_longer_wait() -> None:
    rng = np.random.default_rng(0)
    n = 90_000
    y = rng.integers(0, 3, n)
    p = rng.dirichlet(np.ones(3), n)
    start = time.process_time()
    entries = metrics.score(lambda rows: metrics.classification_measures(p[rows], y[rows], list("abc")), n, seed=0)
    assert time.process_time() - start < 20
    a = entries["accuracy"]
    assert a["high"] - a["low"] == pytest.approx(2 * 1.96 * math.sqrt(a["value"] * (1 - a["value"]) / n), rel=0.15)
    assert a["n"] == n and entries["roc_auc"]["resamples"] < metrics.RESAMPLES


def test_per_class_and_confusion_equal_scikit_learn() -> None:
    from sklearn import metrics as sk

    p, y, names = one_label(7)
    guess = p.argmax(1)
    report = sk.classification_report(y, guess, labels=range(len(names)), target_names=names, output_dict=True, zero_division=0)
    for row in metrics.per_class(p, y, names):
        expected = report[row.name]
        assert (row.precision, row.recall, row.f1, row.support) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"], expected["support"])
        )
    assert (metrics.confusion(y, guess, len(names)) == sk.confusion_matrix(y, guess, labels=range(len(names)))).all()


def test_calibration_bins_make_the_ece() -> None:
    p, y, names = one_label(3)
    found = metrics.calibration(p.max(1), p.argmax(1) == y)
    gap = sum(n * abs(a - c) for n, a, c in zip(found.counts, found.accuracy, found.confidence, strict=True)) / len(y)
    assert gap == pytest.approx(metrics.classification(p, y, names)["ece"]) and sum(found.counts) == len(y)


@pytest.mark.parametrize("seed", range(8))
def test_best_thresholds_are_best(seed: int) -> None:
    p, y = several_labels(seed)
    found = metrics.best_thresholds(p, y)
    best = metrics.per_label(p, y, found, [str(c) for c in range(p.shape[1])])
    for grid in np.linspace(0, 1, 41):
        for row, other in zip(best, metrics.per_label(p, y, grid, [str(c) for c in range(p.shape[1])]), strict=True):
            assert row.f1 >= other.f1 - 1e-12 or row.support == 0


def test_lengths_fall_into_ranges_that_hold_every_row() -> None:
    rng = np.random.default_rng(1)
    lengths, errors = rng.integers(3, 60, 500), rng.random(500)
    names, means, counts = metrics.by_length(lengths, errors)
    assert sum(counts) == 500 and len(names) == len(means) == len(counts) <= 8
    assert np.average(means, weights=counts) == pytest.approx(errors.mean())
    assert metrics.by_length(np.full(5, 7), np.ones(5)) == (["7"], [1.0], [5])
    assert metrics.by_length(np.zeros(0), np.zeros(0)) == ([], [], [])


def test_ties_count_half() -> None:
    once = np.ones((1, 4))
    roc, _ = Ranking(np.full(4, 0.5), np.array([True, False, True, False])).areas(once)
    assert roc[0] == 0.5


def test_directions_cover_every_name() -> None:
    assert better("validation/rmse") == "min" and better("recall_at_10") == "max"
    with pytest.raises(KeyError):
        better("acuracy")
