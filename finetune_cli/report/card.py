"""The model card: README.md of an exported model, as the Hugging Face hub reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_cli.metrics import Entry
from finetune_cli.report.content import Report, score_table
from finetune_cli.report.markdown import bullets, fenced, grid, words
from finetune_cli.report.wording import clean

_HUB_NAMES = {
    "f1_macro": "f1",
    "f1_micro": "f1",
    "f1_weighted": "f1",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "mcc": "matthews_correlation",
    "rmse": "mse",
    "r2": "r_squared",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
"""Our names to the hub's, where they differ."""
_ON_THE_HUB = {"accuracy", "f1", "precision", "recall", "roc_auc", "mae", "perplexity", "bleu", "chrf", *_HUB_NAMES.values()}


def model_card(
    *,
    name: str,
    task: str,
    pipeline: str | None,
    auto_class: str,
    base: str,
    facts: Sequence[tuple[str, str]],
    rows: Mapping[str, int],
    files: Mapping[str, Mapping[str, str]],
    scores: Mapping[str, Mapping[str, Entry]],
    hyperparameters: Mapping[str, str],
    versions: Mapping[str, str],
) -> str:
    """The whole card. ``files`` are names to sha256 by split; ``base`` says in words what was fine-tuned."""
    told = score_table(Report(title=name, run="", summary=[], scores=scores)) if scores else None
    parts = [
        _front_matter(name, pipeline, scores),
        f"# {words(name)}",
        f"A {words(task)} model, fine-tuned with ftune. Base: {words(base)}.",
        bullets(facts),
        "## How to use it",
        fenced(_usage(pipeline, auto_class), "python"),
        "## Scores",
        grid(told.columns, told.rows) if told else "No labelled rows were held out, so it was not scored.",
        words(told.note) if told else "",
        "## Training data",
        grid(["split", "rows"], list(rows.items())),
        _files(files),
        "## Hyperparameters",
        bullets(hyperparameters.items()),
        "## Limits",
        _limits(scores, rows),
        "## Made with",
        bullets(versions.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(name: str, pipeline: str | None, scores: Mapping[str, Mapping[str, Entry]]) -> str:
    """YAML; every value from outside is a JSON string, which YAML reads as text."""
    lines = ["---", "library_name: transformers"]
    lines += [f"pipeline_tag: {_quoted(pipeline)}"] if pipeline else []
    lines += ["tags:", "- ftune"]
    split = next((s for s in ("test", "validation") if s in scores), None)
    found = {m: e["value"] for m, e in scores.get(split or "", {}).items() if e["value"] is not None and m != "loss"}
    hub = list(dict.fromkeys(_HUB_NAMES.get(m, m) for m in found if _HUB_NAMES.get(m, m) in _ON_THE_HUB))
    lines += ["metrics:", *(f"- {metric}" for metric in hub)] if hub else []
    return "\n".join([*lines, *_results(name, pipeline, split, found), "---"])


def _results(name: str, pipeline: str | None, split: str | None, found: Mapping[str, float]) -> list[str]:
    """The hub's table of results."""
    exact = {m: value for m, value in found.items() if m in _ON_THE_HUB}
    if not (exact and pipeline and split):
        return []
    lines = ["model-index:", f"- name: {_quoted(name)}", "  results:", "  - task:", f"      type: {_quoted(pipeline)}"]
    lines += ["    dataset:", "      name: own data", "      type: own", f"      split: {_quoted(split)}", "    metrics:"]
    return lines + [line for m, value in exact.items() for line in (f"    - type: {m}", f"      value: {json.dumps(round(value, 6))}")]


def _quoted(text: str) -> str:
    return json.dumps(clean(text), ensure_ascii=False)


def _usage(pipeline: str | None, auto_class: str) -> str:
    if pipeline:
        load = f'model = pipeline("{pipeline}", model="PATH_OF_THIS_DIRECTORY")'
        return f'from transformers import pipeline\n\n{load}\nprint(model("Some text"))'
    lines = [
        "import torch",
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        'path = "PATH_OF_THIS_DIRECTORY"',
        f"tokenizer, model = AutoTokenizer.from_pretrained(path), {auto_class}.from_pretrained(path).eval()",
        "with torch.inference_mode():",
        '    print(model(**tokenizer("Some text", return_tensors="pt")).logits)',
    ]
    return "\n".join(lines)


def _files(files: Mapping[str, Mapping[str, str]]) -> str:
    rows: list[list[Any]] = [[split, file, sha] for split, named in files.items() for file, sha in named.items()]
    return grid(["split", "file", "sha256"], rows) if rows else ""


def _limits(scores: Mapping[str, Mapping[str, Entry]], rows: Mapping[str, int]) -> str:
    """What nobody should read into the scores."""
    scored = [f"{max((e['n'] for e in found.values()), default=0):,} {words(split)} rows" for split, found in scores.items()]
    calibrated = any("ece" in found for found in scores.values())
    lines = [
        f"It learnt from {rows.get('train', 0):,} rows; texts of another kind, time, source or language were not tried.",
        f"Its scores rest on {' and '.join(scored)}; the intervals cover the luck of drawing those rows, not the luck of the training seed."
        if scored
        else "",
        "It repeats the habits and prejudices of its training rows and of the model it started from.",
        "Probabilities are honest only as far as the calibration error (ece) says." if calibrated else "",
    ]
    return "\n".join(f"- {line}" for line in lines if line)
