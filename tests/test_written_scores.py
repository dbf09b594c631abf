"""What is written down suffices to compute every score again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from finetune_cli.metrics.bootstrap import values
from finetune_cli.tasks.figures import figure
from finetune_cli.tasks.labelling.labels import LabelOptions, LabelSet


@pytest.mark.parametrize("exponent", [-30, -9, -4, -1, 0, 3, 12])
def test_every_float32_survives(exponent: int) -> None:
    draw = np.random.default_rng(exponent + 40)
    for value in (draw.normal(size=300) * 10.0**exponent).astype(np.float32):
        assert np.float32(figure(value)) == value
    assert figure(math.inf) == math.inf and figure(0.0) == 0.0 and math.isnan(figure(math.nan))


def test_a_share_near_one_keeps_what_it_lacks() -> None:
    for rest in (3.3333e-4, 1.23456e-8, 1.5e-12):
        assert math.isclose(1 - figure(1 - rest), rest, rel_tol=1e-3)
    assert len(repr(figure(2 / 3))) == 14


@pytest.mark.parametrize("multi", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("scale", [1e-5, 1e-2, 20.0], ids=["learnt nothing", "weak", "too sure"])
def test_scores_come_back_from_what_is_written(multi: bool, scale: float) -> None:
    draw = np.random.default_rng(5)
    names, options = ("a", "b", "c"), LabelOptions()
    labels = LabelSet(names=names, cells=names, multi=multi)
    p = labels.probabilities((draw.normal(size=(500, 3)) * scale).astype(np.float32))
    y = draw.random((500, 3)) < 0.4 if multi else np.eye(3, dtype=bool)[draw.integers(0, 3, 500)]
    targets = y.astype(np.int64) if multi else y.argmax(1)
    scores = values(labels.measures(p, targets, options))
    read = [json.loads(json.dumps(labels.named(row))) for row in p]
    q = np.array([[line[name] for name in names] for line in read])
    lost = np.mean([log_loss(y[:, c], q[:, c], labels=[False, True]) for c in range(3)]) if multi else log_loss(targets, q)
    again = {"roc_auc": roc_auc_score(y, q), "pr_auc": average_precision_score(y, q), "log_loss": lost}
    for name, value in again.items():
        assert value == pytest.approx(scores[name], abs=1e-6), name
    assert values(labels.measures(q, targets, options)) == pytest.approx(scores, abs=1e-8)
    if not multi:
        assert [score for _, score, _ in labels.decoded(p, options)] == q.max(1).tolist()
