"""Metrics of generated texts against references: corpus BLEU and chrF as sacrebleu computes them, ROUGE as rouge-score does.

The libraries count each text once: n-grams found, given and wanted, lengths, and the ROUGE of its best reference. Everything after that is
sums: a corpus score of a resample is a product of multiplicities and counts, and the tests hold it equal to the libraries' own figure. BLEU
and chrF run from 0 to 100 and ROUGE from 0 to 1, as their libraries have them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune_cli.errors import UserError
from finetune_cli.metrics.bootstrap import Floats, Measures, Rows, values

ROUGE = ("rouge1", "rouge2", "rougeL")
_ORDER = 4
"""Longest word n-gram of BLEU."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """What the metrics need of N generated texts and their references."""

    bleu: Floats
    """[N, 10]: words given, words of the reference nearest in length, then n-grams found (1 to 4) and n-grams given (1 to 4)."""
    chrf: Floats
    """[N, 18]: for each n of 1 to 6, character n-grams given, wanted, and found, of the best reference."""
    rouge: Floats
    """[N, 3] F-measure of the best reference."""

    def __len__(self) -> int:
        return len(self.bleu)

    def each_chrf(self) -> Floats:
        """chrF of each text by itself, [N]."""
        return _chrf(self.chrf)


def require_generation() -> None:
    """Raise UserError where the libraries that count are not installed."""
    modules = {"sacrebleu": "sacrebleu", "rouge-score": "rouge_score"}
    lacking = [package for package, module in modules.items() if importlib.util.find_spec(module) is None]
    if lacking:
        raise UserError(
            f"generated text is scored by {' and '.join(lacking)}, which is not installed",
            where="the extra 'generation'",
            fix="pip install sacrebleu rouge-score",
        )


def per_text(given: Sequence[str], references: Iterable[Sequence[str]], *, tokenize: str = "13a") -> TextTable:
    """Count each text against its references (at least one); ``tokenize`` is sacrebleu's name of how BLEU cuts words.

    With another tokenizer than 13a, ROUGE counts its words too: rouge-score's own knows the letters a to z alone.
    """
    texts, several = list(given), [list(own) for own in references]
    if not texts:
        return TextTable(np.zeros((0, 2 + 2 * _ORDER)), np.zeros((0, 18)), np.zeros((0, len(ROUGE))))
    bleu, chrf = _metrics(tokenize)
    streams = [[own[k] if k < len(own) else None for own in several] for k in range(max(map(len, several)))]
    counts = [np.array(metric._extract_corpus_statistics(texts, streams), np.float64) for metric in (bleu, chrf)]
    scorer = _rouge(tokenize)
    best = [scorer.score_multi(own, text) for text, own in zip(texts, several, strict=True)]
    return TextTable(counts[0], counts[1], np.array([[found[name].fmeasure for name in ROUGE] for found in best], np.float64))


def generation(table: TextTable) -> dict[str, float]:
    """Corpus BLEU and chrF, mean ROUGE."""
    return values(generation_measures(table, slice(None)))


def generation_measures(table: TextTable, rows: Rows) -> Measures:
    """The metrics of ``generation`` on some rows, for ``score``."""
    bleu, chrf, rouge = table.bleu[rows], table.chrf[rows], table.rouge[rows]

    def plain(w: Floats) -> dict[str, Floats]:
        n = w.sum(axis=1)
        means = (w @ rouge) / np.where(n > 0, n, np.nan)[:, None]
        return {"bleu": _bleu(w @ bleu), "chrf": _chrf(w @ chrf), **{name: means[:, k] for k, name in enumerate(ROUGE)}}

    return Measures(len(bleu), plain)


def signatures(tokenize: str = "13a") -> dict[str, str]:
    """How each metric was computed, in the libraries' own words: what a table of results must cite."""
    bleu, chrf = _metrics(tokenize)
    for metric in (bleu, chrf):
        metric.num_refs = -1  # sacrebleu's word for a number that differs from row to row
    cut = "rouge_score's own" if tokenize == "13a" else f"sacrebleu {tokenize}, lower case"
    return {
        "bleu": str(bleu.get_signature()),
        "chrf": str(chrf.get_signature()),
        "rouge1, rouge2, rougeL": f"F-measure of the best reference|stemmer:no|tok:{cut}|rouge_score:{_version('rouge-score')}",
    }


def _metrics(tokenize: str) -> tuple[Any, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(tokenize=tokenize), CHRF()


def _rouge(tokenize: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), tokenizer=None if tokenize == "13a" else _Words(tokenize))


class _Words:
    """sacrebleu's words, in the form in which rouge-score asks for them."""

    def __init__(self, tokenize: str) -> None:
        from sacrebleu.metrics import BLEU

        self.cut = BLEU(tokenize=tokenize).tokenizer

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = self.cut(text.lower().strip()).split()
        return words


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _bleu(sums: Floats) -> Floats:
    """Corpus BLEU of summed counts [R, 10], exponentially smoothed (sacrebleu's ``exp``)."""
    given, wanted = sums[:, 0], sums[:, 1]
    found, total = sums[:, 2 : 2 + _ORDER], sums[:, 2 + _ORDER :]
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.where(given < wanted, np.exp(1 - wanted / np.maximum(given, 1e-9)), 1.0)
        nothing = np.asarray((found == 0) & (total > 0))
        smoothed = np.where(nothing, 1.0 / 2.0 ** np.cumsum(nothing, axis=1), found)
        logs = np.log(smoothed / total)
    possible = np.asarray((total > 0).all(axis=1) & (found > 0).any(axis=1))
    score: Floats = np.where(possible, 100 * brevity * np.exp(np.where(possible[:, None], logs, 0.0).mean(axis=1)), 0.0)
    return score


def _chrf(sums: Floats, beta: float = 2.0) -> Floats:
    """Corpus chrF (Popović 2015) of summed counts [R, 18]: means over the orders that occur on both sides, then F-beta."""
    given, wanted, found = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    both = (given > 0) & (wanted > 0)
    orders = np.maximum(both.sum(axis=1), 1)
    precision, recall = ((found / np.maximum(side, 1.0) * both).sum(axis=1) / orders for side in (given, wanted))
    below = beta**2 * precision + recall
    score: Floats = 100 * (1 + beta**2) * precision * recall / np.where(below > 0, below, 1.0)
    return score
