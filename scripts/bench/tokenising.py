"""Rows tokenised per second on all cores: ftune, with its cache written, beside ``datasets.map`` where datasets is installed.

    python scripts/bench/tokenising.py             200,000 rows; prints Markdown, writes scripts/results/tokenising.json
    python scripts/bench/tokenising.py --smoke     seconds, on few rows: shows that it works, measures nothing

Both sides have the rows in memory, the same fast tokenizer (MiniLM's) and an empty cache, and end with token ids on disk.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import material
import peers
import processes
import scaling_data
from processes import timed

VARIANTS = {
    "map": "datasets.map, batched",
    "map_cores": "datasets.map, batched, a process for each core",
    "ftune": "ftune",
}


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    wanted = list(VARIANTS)
    if find_spec("datasets") is None:
        wanted = ["ftune"]
        print("left out, datasets is not installed: datasets.map", file=sys.stderr)
    file = material.made_rows(Path(given.work) / "rows" / f"{given.rows}.jsonl", given.rows)
    warm = material.made_rows(Path(given.work) / "rows" / "warm.jsonl", 100)
    runs = []
    for number, variant in harness.interleaved(given.rounds, wanted):
        with tempfile.TemporaryDirectory(prefix="ftune-cold-") as cold:
            own = {} if variant == "ftune" else {"HF_DATASETS_CACHE": cold, "HF_HUB_OFFLINE": "1"}
            env = {"FTUNE_CACHE": cold, "TOKENIZERS_PARALLELISM": "true", **own}
            asked = {"variant": variant, "train": file, "warm": warm}
            ended = processes.job(__file__, "ftune" if variant == "ftune" else "map", asked, env=env)
        runs.append({"variant": variant, "round": number, **ended.result})
    report(given, runs)


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "tokenising")
    parser.add_argument("--rows", type=int, default=200_000)
    return harness.settle(parser.parse_args(typed), rows=200)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_job(variant: str, train: str, warm: str) -> dict[str, Any]:
    """Rows per second of ``datasets.map``."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(peers.minilm())
    rows = load_dataset("json", data_files=train, split="train")
    cut = partial(tokenizer, truncation=True, max_length=scaling_data.MAX_LENGTH)
    number = cores() if variant == "map_cores" else None
    made, seconds = timed(lambda: rows.map(lambda batch: cut(batch["text"]), batched=True, num_proc=number))
    return {"rows_per_second": len(made) / seconds, "tokens": sum(map(len, made["input_ids"]))}


def ftune_job(variant: str, train: str, warm: str) -> dict[str, Any]:
    """The same of ftune's own encoder."""
    found = scaling_data.phases_job(train, str(peers.minilm()), warm)
    return {"rows_per_second": found["tokenising_rows_per_second"], "tokens": found["tokens"]}


def report(given: argparse.Namespace, runs: harness.Runs) -> None:
    """Medians and ratios; the sides must have made equally many tokens."""
    if len({run["tokens"] for run in runs}) != 1:
        sys.exit(f"the sides made different tokens: { {run['variant']: run['tokens'] for run in runs} }")
    table, own = [], harness.values(runs, "rows_per_second", variant="ftune")
    for variant, told in VARIANTS.items():
        if rate := harness.values(runs, "rows_per_second", variant=variant):
            table.append([told, harness.told(rate, ",.0f"), "" if variant == "ftune" else harness.ratio(own, rate)])
    caption = (
        f"{given.rows:,} rows of about 22 tokens, MiniLM's tokenizer, every core; medians (lowest to highest) of {given.rounds} "
        "interleaved rounds, each in a fresh process with an empty cache."
    )
    harness.finish(given, caption, ["side", "rows/s", "ftune is faster by"], table, runs)


if __name__ == "__main__":
    processes.begin(main, {"map": map_job, "ftune": ftune_job})
