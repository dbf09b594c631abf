"""The loss of labels: cross-entropy or focal, with class weights and label smoothing, as a sum and the weight that it is divided by.

Every term is ``target * class weight * (1 - probability) ** gamma * -log(probability)``, summed over labels (Lin et al. 2017,
arXiv:1708.02002). The target is smoothed first: the loss is then the expected one where the label is redrawn that often. With gamma 0 it
is PyTorch's cross-entropy with weights and smoothing, and with several labels a row its binary cross-entropy with ``pos_weight``. It is
divided by what the rows (or cells) weigh, so that the loss is a weighted mean whatever the weights add up to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_cli.tasks.labelling.labels import LabelLoss, LabelOptions, LabelSet

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SMALLEST = 1e-12
"""Least ``1 - probability`` that a power is taken of: below it the slope of a root is not finite."""


def weight(targets: np.ndarray, labels: LabelSet) -> float:
    """What some rows weigh: of label numbers [N], or of 0/1 targets [N, K] the mean over labels. Negative numbers are no label."""
    import numpy as np

    if labels.multi:
        if labels.weights is None:
            return float(len(targets))
        return float((1 + targets.astype(np.float64) * (np.asarray(labels.weights) - 1)).mean(-1).sum())
    there = targets[targets >= 0]
    return float(len(there)) if labels.weights is None else float(np.asarray(labels.weights)[there].sum())


def total(logits: Tensor, targets: Tensor, labels: LabelSet, options: LabelOptions) -> Tensor:
    """The sum for logits [B, K] and label numbers [B] (negative: left out), or 0/1 targets [B, K]."""
    import torch

    raw = labels.raw(logits)
    given = None if labels.weights is None else torch.tensor(labels.weights, dtype=torch.float32, device=logits.device)
    return _binary(raw, targets, given, options) if labels.multi else _categorical(raw, targets, given, options)


def _categorical(logits: Tensor, targets: Tensor, weights: Tensor | None, options: LabelOptions) -> Tensor:
    from torch.nn import functional as F

    smoothing, k = options.label_smoothing, logits.shape[-1]
    if options.loss == LabelLoss.cross_entropy:
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing, reduction="sum", ignore_index=-1)
    logs = F.log_softmax(logits, -1)
    there = targets >= 0
    soft = F.one_hot(targets.clamp(min=0), k) * (1 - smoothing) + smoothing / k
    terms = soft * _focal(logs, -logs.expm1(), options.focal_gamma)
    return ((terms if weights is None else terms * weights).sum(-1) * there).sum()


def _binary(logits: Tensor, targets: Tensor, weights: Tensor | None, options: LabelOptions) -> Tensor:
    from torch.nn import functional as F

    soft = targets * (1 - options.label_smoothing) + options.label_smoothing / 2
    if options.loss == LabelLoss.cross_entropy:
        losses = F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weights, reduction="none")
        return losses.mean(-1).sum()
    gamma, p, q = options.focal_gamma, logits.sigmoid(), (-logits).sigmoid()
    has = soft * _focal(F.logsigmoid(logits), q, gamma)
    lacks = (1 - soft) * _focal(F.logsigmoid(-logits), p, gamma)
    return ((has if weights is None else has * weights) + lacks).mean(-1).sum()


def _focal(log: Tensor, rest: Tensor, gamma: float) -> Tensor:
    """``rest ** gamma * -log``, where ``rest`` is 1 - the probability."""
    return -log * rest.clamp(min=SMALLEST) ** gamma
