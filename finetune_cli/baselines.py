"""Scores that anyone can have for free, on the same rows as the model: the most frequent answer, and TF-IDF with a linear model.

A fine-tuned model that does not beat them is not worth its electricity. At most ``MOST_ROWS`` training rows are used, drawn by a
fixed seed, and the name says so where that is fewer than there are. Texts without spaces (Chinese, Japanese, Thai) are cut into
characters instead of words.
"""

from __future__ import annotations

import lzma
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_cli import metrics, randomness
from finetune_cli.metrics.entities import entities as entity_scores

Floats = npt.NDArray[np.float64]
Baselines = dict[str, dict[str, float]]
Spans = list[tuple[int, int, str]]
"""Names in a row of words: (start, end, type); the end is exclusive."""

CONSTANT = ("majority", "mean")
"""The baselines that give every row the same answer."""
MOST_ROWS = 20_000
MOST_LABELS = 200
"""Of several labels a row, one linear model each: beyond this many only the first baseline is scored."""
_FEATURES = 100_000
_LONGEST = 4_000
"""Characters of a text that are read."""
_SMOOTHING = 1.0
_COMPRESSED = 4 << 20
"""Bytes of training text that the compressor reads: half of what it remembers."""
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


def language(train_texts: Sequence[str], test_texts: Sequence[str]) -> Baselines:
    """``byte frequencies`` of the training texts, and what ``xz`` makes of the test texts when it has just read the training texts."""
    train, test = ("\n".join(texts).encode("utf-8", "surrogatepass") for texts in (train_texts, test_texts))
    train = train[-_COMPRESSED:]
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + _SMOOTHING
    seen = np.bincount(np.frombuffer(test, np.uint8), minlength=256)
    size = max(len(test), 1)
    both, alone = (len(lzma.compress(text, preset=6)) for text in (train + test, train))
    return {
        "byte frequencies": {"bits_per_byte": float(-(seen * np.log2(counts / counts.sum())).sum() / size)},
        "xz": {"bits_per_byte": 8 * (both - alone) / size},
    }


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


def entities(
    train_words: Sequence[Sequence[str]], train_spans: Sequence[Spans], test_words: Sequence[Sequence[str]], test_spans: Sequence[Spans]
) -> Baselines:
    """``majority`` (no word is a name) and ``gazetteer``: every name of train, wherever it stands, as its commonest type.

    Words row by row, and spans (start, end, type) in words. Of names that begin with one word the longest is taken.
    """
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for words, spans in zip(train_words, train_spans, strict=True):
        for start, end, name in spans:
            counts.setdefault(tuple(words[start:end]), Counter())[name] += 1
    types = {name: min(found, key=lambda t: (-found[t], t)) for name, found in counts.items()}
    longest: dict[str, int] = {}
    for known in types:
        longest[known[0]] = max(longest.get(known[0], 0), len(known))
    predicted = [_looked_up(words, types, longest) for words in test_words]
    nothing: list[Spans] = [[] for _ in test_words]
    return {"majority": entity_scores(test_spans, nothing), "gazetteer": entity_scores(test_spans, predicted)}


def _looked_up(words: Sequence[str], types: dict[tuple[str, ...], str], longest: dict[str, int]) -> Spans:
    """The known names in a row of words, from left to right."""
    found: Spans = []
    at = 0
    while at < len(words):
        sizes = range(min(longest.get(words[at], 0), len(words) - at), 0, -1)
        size = next((n for n in sizes if tuple(words[at : at + n]) in types), 0)
        if size:
            found.append((at, at + size, types[tuple(words[at : at + size])]))
        at += size or 1
    return found


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
