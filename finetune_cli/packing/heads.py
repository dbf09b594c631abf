"""What the heads of packed models read: the first token of each sample, or every token by itself."""

from __future__ import annotations

_ENCODERS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert")

FIRST_TOKEN = frozenset(f"{family}ForSequenceClassification" for family in _ENCODERS)
"""Heads that read the first token of a sample and nothing else."""
EVERY_TOKEN = frozenset(f"{family}{head}" for family in _ENCODERS for head in ("ForTokenClassification", "ForMaskedLM"))
"""Heads that read one hidden state at a time, so that they run over a packed row as they run over a rectangle."""
