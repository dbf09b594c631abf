"""Few-shot and zero-shot heads for text-classification: what pooled embeddings alone can say about labels.

Few-shot, in the manner of SetFit (Tunstall et al. 2022, arXiv:2209.11055): the encoder learns from pairs of rows, of which a handful of
rows gives hundreds, and a logistic regression on its embeddings becomes the head. Zero-shot: the head is made of the embeddings of label
descriptions, so that a text gets the label whose description is nearest. Both ends are an ordinary linear layer of an ordinary model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.tasks.base import Batch

INVERSE_TEMPERATURE = 20.0
"""Zero-shot logits are this many times the cosine; as in sentence-transformers' ranking loss."""
DESCRIPTION = 8.0
"""Training rows that a label's description counts as, where a fitted head has descriptions too."""
PENALTY = 0.02
"""Weight of the squared weights in the head's regression on embeddings of length 1, beside the mean log loss of the rows."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the model gives of a batch: ``logits`` [B, K] and the ``embeddings`` [B, H] that its classifier reads, before dropout."""

    logits: Tensor
    embeddings: Tensor


def see(model: Any, batch: Batch) -> Seen:
    """The forward pass of a BERT classifier, with the embeddings kept."""
    embeddings = model.base_model(**batch.inputs).pooler_output
    return Seen(model.classifier(model.dropout(embeddings)), embeddings)


def pairs(targets: np.ndarray) -> dict[str, float]:
    """How many pairs of a batch's rows share their label, and how many do not: what the sums of ``pair_losses`` are divided by."""
    import numpy as np

    rows, each = len(targets), np.unique(targets, return_counts=True)[1]
    alike = int((each * (each - 1) // 2).sum())
    return {"alike": float(alike), "apart": float(rows * (rows - 1) // 2 - alike)}


def pair_losses(embeddings: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """(cosine - 1) squared summed over the pairs of rows of one label, cosine squared over those of two.

    Each sum has its own divisor, so that with many labels the pairs of two do not drown the others (SetFit draws as many of either).
    """
    import torch
    from torch.nn import functional as F

    unit = F.normalize(embeddings.float(), dim=-1)  # [B, H]
    cosine = unit @ unit.T  # [B, B]
    once = torch.ones_like(cosine, dtype=torch.bool).triu(1)
    same = targets[:, None] == targets[None, :]
    return {"alike": ((cosine - 1).square() * (once & same)).sum(), "apart": (cosine.square() * (once & ~same)).sum()}


def fit(
    model: Any, embeddings: np.ndarray, targets: np.ndarray, *, weights: Sequence[float] | None, known: np.ndarray | None = None
) -> None:
    """Set the classifier to the logistic regression of ``targets`` [N] on ``embeddings`` [N, H], rows weighted by their label's weight.

    ``known`` [K, H] are the embeddings of the labels' descriptions: further rows, each worth DESCRIPTION of the others.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    each = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)[targets]
    if known is not None:
        embeddings = np.concatenate([embeddings, known])
        targets = np.concatenate([targets, np.arange(len(known))])
        each = np.concatenate([each, np.full(len(known), DESCRIPTION)])
    x = embeddings.astype(np.float64)
    size = float(np.linalg.norm(x, axis=1).mean())
    head = LogisticRegression(C=1 / (PENALTY * each.sum()), max_iter=1000, tol=1e-8)
    head.fit(x / size, targets, sample_weight=each)
    weight, bias = head.coef_ / size, head.intercept_
    if len(weight) == 1:  # two labels: one row of weights, for the difference of the logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    _set_classifier(model, weight, bias)


def descriptions(given: dict[str, str], labels: Sequence[str]) -> list[str]:
    """A description for each label, its name where none is given. Raises UserError for a label that there is not."""
    if strange := [name for name in given if name not in labels]:
        raise UserError(
            f"task.descriptions describes {', '.join(map(repr, strange))}, and there is no such label",
            where="task.descriptions",
            fix=f"the labels are {', '.join(labels[:20])}",
        )
    if empty := [name for name, text in given.items() if not text.strip()]:
        raise UserError(
            f"the description of {', '.join(map(repr, empty))} is empty", where="task.descriptions", fix="say in words what the label means"
        )
    return [given.get(name, name) for name in labels]


def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of a few texts, [N, H]."""
    import torch

    was_training, where = model.training, model.classifier.weight.device
    model.eval()
    with torch.inference_mode():
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(where)
        known: np.ndarray = model.base_model(**inputs).pooler_output.double().cpu().numpy()
    model.train(was_training)
    return known


def describe(model: Any, known: np.ndarray) -> list[str]:
    """Set the classifier so that logits are scaled cosines to ``known`` [K, H], one a label; the names of what was set."""
    import numpy as np

    sizes = np.linalg.norm(known, axis=1)
    weight = INVERSE_TEMPERATURE * known / sizes[:, None] / sizes.mean()  # embeddings of mean pooling all have nearly one length
    return _set_classifier(model, weight, np.zeros(len(known)))


def _set_classifier(model: Any, weight: np.ndarray, bias: np.ndarray) -> list[str]:
    """Write a linear head into the model, wherever it is."""
    import torch

    head: nn.Linear = model.classifier
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return ["classifier.weight", "classifier.bias"]
