"""Scores that anyone can have for free, on the same rows as the model: the most frequent answer, and TF-IDF with a linear model.

A fine-tuned model that does not beat them is not worth its electricity. At most ``MOST_ROWS`` training rows are used, drawn by a
fixed seed, and the name says so where that is fewer than there are. Texts without spaces (Chinese, Japanese, Thai) are cut into
characters instead of words.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_cli import metrics, randomness

Floats = npt.NDArray[np.float64]
Baselines = dict[str, dict[str, float]]

CONSTANT = ("majority", "mean")
"""The baselines that give every row the same answer."""
MOST_ROWS = 20_000
MOST_LABELS = 200
"""Of several labels a row, one linear model each: beyond this many only the first baseline is scored."""
_FEATURES = 100_000
_LONGEST = 4_000
"""Characters of a text that are read."""
_SMOOTHING = 1.0
_SPACELESS = (
    ("\u0e00", "\u0eff"),  # Thai, Lao
    ("\u1000", "\u109f"),  # Burmese
    ("\u1780", "\u17ff"),  # Khmer
    ("\u3040", "\u30ff"),  # kana
    ("\u3400", "\u9fff"),  # Han
    ("\uf900", "\ufaff"),
    ("\U00020000", "\U0003ffff"),
)
"""Letters of scripts that set no spaces between words."""


def classification(
    train_texts: Sequence[str], train_labels: np.ndarray, test_texts: Sequence[str], test_labels: np.ndarray, *, names: Sequence[str]
) -> Baselines:
    """``majority`` and ``TF-IDF + logistic regression`` for label numbers [N]."""
    shares = np.bincount(train_labels, minlength=len(names)) + _SMOOTHING
    constant = np.tile(shares / shares.sum(), (len(test_labels), 1))
    found = {"majority": metrics.classification(constant, test_labels, names)}
    kept, name = _draw(len(train_texts), "TF-IDF + logistic regression")
    labels = np.asarray(train_labels)[kept]
    if len(np.unique(labels)) < 2 or (features := _features([train_texts[i] for i in kept], test_texts)) is None:
        return found
    model = _fitted(_logistic(), features[0], labels)
    probabilities = np.zeros((len(test_labels), len(names)))
    probabilities[:, model.classes_] = model.predict_proba(features[1])
    return found | {name: metrics.classification(probabilities, test_labels, names)}


def multilabel(
    train_texts: Sequence[str], train_targets: np.ndarray, test_texts: Sequence[str], test_targets: np.ndarray, *, threshold: float = 0.5
) -> Baselines:
    """``majority`` (each label's more frequent value) and one TF-IDF + logistic regression a label, for 0/1 targets [N, K]."""
    truth, labels = np.asarray(train_targets) > 0, train_targets.shape[1]
    shares = (truth.sum(axis=0) + _SMOOTHING) / (len(truth) + 2 * _SMOOTHING)
    found = {"majority": metrics.multilabel(np.tile(shares, (len(test_targets), 1)), test_targets, threshold)}
    kept, name = _draw(len(train_texts), "TF-IDF + logistic regression")
    if labels > MOST_LABELS or (features := _features([train_texts[i] for i in kept], test_texts)) is None:
        return found
    probabilities = np.tile(shares, (len(test_targets), 1))
    for k in range(labels):
        if 0 < truth[kept, k].sum() < len(kept):
            model = _fitted(_logistic(), features[0], truth[kept, k])
            probabilities[:, k] = model.predict_proba(features[1])[:, 1]
    return found | {name: metrics.multilabel(probabilities, test_targets, threshold)}


def regression(train_texts: Sequence[str], train_targets: np.ndarray, test_texts: Sequence[str], test_targets: np.ndarray) -> Baselines:
    """``mean`` of the training targets and ``TF-IDF + ridge``, for targets [N, T]."""
    from sklearn.linear_model import Ridge

    targets = np.asarray(train_targets, dtype=np.float64).reshape(len(train_texts), -1)
    truth = np.asarray(test_targets, dtype=np.float64).reshape(len(test_texts), -1)
    found = {"mean": metrics.regression(np.tile(targets.mean(axis=0), (len(truth), 1)), truth)}
    kept, name = _draw(len(train_texts), "TF-IDF + ridge")
    if (features := _features([train_texts[i] for i in kept], test_texts)) is None:
        return found
    model = _fitted(Ridge(alpha=1.0, solver="sparse_cg"), features[0], targets[kept])
    return found | {name: metrics.regression(np.asarray(model.predict(features[1])).reshape(len(truth), -1), truth)}


def _draw(n: int, name: str) -> tuple[npt.NDArray[np.int64], str]:
    """Rows to train on, and the baseline's name, which says when they are not all."""
    if n <= MOST_ROWS:
        return np.arange(n), name
    return np.sort(randomness.generator(0, "baseline rows").permutation(n)[:MOST_ROWS]), f"{name} ({MOST_ROWS:,} rows)"


def _features(train_texts: Sequence[str], test_texts: Sequence[str]) -> tuple[Any, Any] | None:
    """Sparse TF-IDF of both; None where the texts hold nothing to count."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    train, test = ([text[:_LONGEST] for text in texts] for texts in (train_texts, test_texts))
    how: dict[str, Any] = {"analyzer": "char", "ngram_range": (1, 3)} if spaceless(train) else {"ngram_range": (1, 2)}
    vectorizer = TfidfVectorizer(max_features=_FEATURES, sublinear_tf=True, min_df=1 if len(train) < 5000 else 2, **how)
    try:
        fitted = vectorizer.fit_transform(train)
    except ValueError:  # scikit-learn's word for an empty vocabulary
        return None
    return fitted, vectorizer.transform(test)


def spaceless(texts: Sequence[str]) -> bool:
    """Whether the words are not set apart by spaces."""
    sample = "".join(texts[:500])[:100_000]
    letters = sum(character.isalpha() for character in sample)
    return letters > 0 and sum(_written_without_spaces(character) for character in sample) > 0.3 * letters


def _written_without_spaces(character: str) -> bool:
    return any(low <= character <= high for low, high in _SPACELESS)


def _logistic() -> Any:
    """SAGA at a loose tolerance: as good here as the default solver, in a twentieth of the time (measured on 10,000 AG News rows)."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, solver="saga", tol=1e-2, max_iter=50, random_state=0)


def _fitted(model: Any, features: Any, targets: np.ndarray) -> Any:
    """Fit without remarks about convergence: a baseline may stop early."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(features, targets)
