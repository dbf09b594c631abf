"""What decides between probabilities, settled on the validation rows at each scoring: temperature, then thresholds, then the confidence
below which no answer is given. The numbers travel with the checkpoint whose scoring gave them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from finetune_cli.storage import is_number

if TYPE_CHECKING:
    import numpy as np

QUALITY = ("ece", "log_loss", "brier")
"""What calibration is judged by."""


class Asked(Protocol):
    """The options that these words depend on."""

    threshold: Any
    calibrate: bool
    abstain_precision: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """JSON-ready; the defaults decide as if nothing had been settled."""

    temperature: float = 1.0
    """What logits are divided by."""
    folded: bool = False
    """Whether the weights hold the temperature already."""
    given: list[float] | None = None
    """Thresholds that the user stated in training."""
    tuned: list[float] | None = None
    """Thresholds of highest F1 on the validation rows."""
    least_confidence: float | None = None
    """Answers below it are withheld; None: none ever is."""
    stated_precision: float | None = None
    reached: dict[str, Any] = field(default_factory=dict)
    """Of abstaining, on the validation rows: ``stated`` whether the precision was reached, ``precision`` and ``coverage`` that were."""
    quality: dict[str, list[float]] = field(default_factory=dict)
    """ECE, log loss and Brier score on the validation rows before and after the temperature."""
    rows: int = 0
    """Validation rows that settled it."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """From its JSON form. Raises ValueError and its like for one that is not of ftune's making."""
        found = cls(**facts)
        if not is_number(found.temperature) or found.temperature <= 0 or type(found.folded) is not bool:
            raise ValueError(f"a temperature of {found.temperature!r}, folded: {found.folded!r}")
        numbers = [*(found.given or []), *(found.tuned or [])]
        numbers += [value for value in (found.least_confidence, found.stated_precision, found.rows) if value is not None]
        if not all(is_number(value) for value in numbers):
            raise ValueError("a threshold or a confidence is no number")
        return found

    def told(self, names: Sequence[str], thresholds: Sequence[float] | None, asked: Asked) -> list[tuple[str, str]]:
        """In words: (what, text). ``names`` are those of the labels that thresholds decide."""
        told = []
        on = f"on the {self.rows:,} validation rows" if self.rows else "on the validation rows"
        if thresholds is not None and (isinstance(asked.threshold, (int, float)) or self.given or self.tuned):
            stated = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, thresholds, strict=True))
            tuned = self.tuned is not None and not isinstance(asked.threshold, (int, float))
            told.append(("thresholds", f"{stated} ({f'of highest F1 {on}, so F1 there flatters itself' if tuned else 'stated'})"))
        elif asked.threshold == "auto" and names:
            told.append(("thresholds", f"those of highest F1 {on}, found at each scoring"))
        if self.quality:
            changes = ", ".join(f"{name} {before:.4f} to {after:.4f}" for name, (before, after) in self.quality.items())
            told.append(("temperature", f"{self.temperature:.4g}, of lowest log loss {on}: {changes}"))
        elif asked.calibrate:
            told.append(("temperature", f"that of lowest log loss {on}, found at each scoring"))
        if self.least_confidence is not None:
            told.append(("abstaining", self._abstaining(on)))
        elif asked.abstain_precision is not None:
            told.append(("abstaining", f"below the confidence from which {asked.abstain_precision:.4g} of the answers are right {on}"))
        return told

    def _abstaining(self, on: str) -> str:
        share = f"{self.reached['precision']:.4f} right of the {self.reached['coverage']:.2%} answered {on}"
        if self.reached["stated"]:
            return f"below a confidence of {self.least_confidence:.4g}: {share} (stated: {self.stated_precision:.4g})"
        return f"below a confidence of {self.least_confidence:.4g}; the stated {self.stated_precision:.4g} was NOT reached: {share}"


def settled(
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    multi: bool,
    given: list[float] | None,
    tune: bool,
    calibrate: bool,
    precision: float | None,
    before: Decisions,
) -> Decisions:
    """Decisions from uncalibrated logits [N, K] of the validation rows and their label numbers [N], or 0/1 targets [N, K].

    ``given`` are thresholds in use where none are tuned (``tune``). A precision that no confidence reaches leaves the strictest.
    """
    import numpy as np

    from finetune_cli import console, metrics

    temperature = metrics.best_temperature(logits, targets, multi=multi) if calibrate else 1.0
    p = metrics.probabilities(logits, multi=multi, temperature=temperature)
    tuned = None
    if tune:
        found = metrics.best_thresholds(p, targets) if multi else metrics.best_thresholds(p[:, 1:], (targets == 1)[:, None])
        tuned = [float(value) for value in found]
    quality = compared(metrics.probabilities(logits, multi=multi), p, targets, multi=multi) if calibrate else {}
    known: dict[str, Any] = {"temperature": temperature, "given": before.given, "tuned": tuned, "quality": quality, "rows": len(p)}
    if precision is None:
        return Decisions(**known)
    labels = chosen(p, tuned or given)
    least = metrics.least_confidence(p[np.arange(len(p)), labels], labels == targets, precision)
    if not least.reached and before.reached.get("stated", True):
        console.warn(
            f"no confidence reaches a precision of {precision:g} on the validation rows: the surest answers have {least.precision:.4f}, "
            "and only as sure ones are given"
        )
    reached = {"stated": least.reached, "precision": least.precision, "coverage": least.coverage}
    return Decisions(**known, least_confidence=least.least, stated_precision=precision, reached=reached)


def compared(before: np.ndarray, after: np.ndarray, targets: np.ndarray, *, multi: bool) -> dict[str, list[float]]:
    """ECE, log loss and Brier score of two sets of probabilities on the same rows."""
    from finetune_cli import metrics

    found = [metrics.quality(p, targets, multi=multi) for p in (before, after)]
    return {name: [found[0][name], found[1][name]] for name in QUALITY}


def chosen(p: np.ndarray, thresholds: Sequence[float] | None) -> np.ndarray:
    """The likeliest label of each row [N]; of two labels with a threshold, the second where its probability reaches it."""
    import numpy as np

    if thresholds is None:
        return p.argmax(-1) if len(p) else np.zeros(0, np.int64)
    return (p[:, 1] >= thresholds[0]).astype(np.int64)
