"""Tokens per second of a training step, by the length of the rows, padded and packed.

    python scripts/bench/scaling.py length                    16 to 512 tokens, 4,096 real tokens a step, MiniLM's shape
    python scripts/bench/scaling.py length --shape base --tokens 16384

A step has equally many real tokens at every length: rows of half the stated length up to all of it, evenly. It is forward, loss, backward,
clipping and AdamW of one model, in the precision and layouts that ``ftune train`` would choose, all in one process, interleaved. Tokens
are real ones; padding is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import material
import processes

WARM = 2
LAYOUTS = ("padded", "packed")


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    start = material.start(Path(given.work), given.shape)
    lengths = [int(length) for length in given.lengths.split(",")]
    asked = {name: getattr(given, name) for name in ("tokens", "rounds", "steps", "device")}
    found = processes.job(__file__, "steps", {"start": start, "lengths": lengths, **asked}).result
    report(given, lengths, found["runs"], found["told"], found["precision"])


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "scaling_length", rounds=5)
    parser.add_argument("--shape", default="minilm", choices=list(material.SHAPES))
    parser.add_argument("--lengths", default="16,32,64,128,256,512")
    parser.add_argument("--tokens", type=int, default=4096, help="real tokens of a step, about")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed together")
    return harness.settle(parser.parse_args(typed), shape="one_layer", lengths="16,32", tokens=128, steps=1)


def steps_job(start: str, lengths: list[int], tokens: int, rounds: int, steps: int, device: str) -> dict[str, Any]:
    """Time steps of every length and layout, over and over."""
    import torch

    from finetune_cli.config.choices import DeviceName
    from finetune_cli.config.schema import DeviceConfig
    from finetune_cli.device import find

    plan = find(DeviceConfig(name=DeviceName(device)))
    plan.apply()
    told, step_of = {}, {}
    for name in LAYOUTS:
        step_of[name], told[name] = stepper(start, name, plan)
    rows = {length: drawn(length, tokens) for length in lengths}
    runs = []
    for number, (length, name) in harness.interleaved(rounds, [(length, name) for length in lengths for name in LAYOUTS]):
        for _ in range(WARM):
            step_of[name](rows[length])
        settled(torch, plan)
        began = time.perf_counter()
        for _ in range(steps):
            step_of[name](rows[length])
        settled(torch, plan)
        seconds, real = (time.perf_counter() - began) / steps, int(rows[length].lengths().sum())
        runs.append({"length": length, "layout": name, "round": number, "seconds": seconds, "tokens_per_second": real / seconds})
    return {"runs": runs, "told": told, "precision": plan.precision}


def settled(torch: Any, plan: Any) -> None:
    """Wait for the device."""
    if plan.device.type == "cuda":
        torch.cuda.synchronize()


def drawn(longest: int, tokens: int) -> Any:
    """Rows of random words, half as long as the longest up to as long, so many that they have about that many tokens in all."""
    import numpy as np

    from finetune_cli.encoded import Ragged

    draw, count = np.random.default_rng(material.SEED), max(1, round(tokens / (0.75 * longest)))
    of = np.linspace(longest / 2, longest, count).round().astype(int)
    return Ragged.of([draw.integers(1000, 20000, n) for n in draw.permutation(of)])


def stepper(start: str, name: str, plan: Any) -> tuple[Callable[[Any], None], str]:
    """(one update on given rows, how they are laid out) of a model of its own."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from finetune_cli import packing

    torch.manual_seed(material.SEED)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=2).to(plan.device).train()
    layout, told = packing.layout(model, pad_id=0, limit=512, device=plan, saved=None if name == "packed" else False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(rows: Any) -> None:
        inputs = {key: moved(value, plan.device) for key, value in layout.lay({"input_ids": rows}).items()}
        labels = torch.arange(len(rows), device=plan.device) % 2
        with plan.autocast():
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, told


def moved(value: Any, device: Any) -> Any:
    """A tensor, or the places of a packed row, on the device."""
    return value.each(lambda tensor: tensor.to(device)) if hasattr(value, "each") else value.to(device)


def report(given: argparse.Namespace, lengths: Sequence[int], runs: harness.Runs, told: dict[str, str], precision: str) -> None:
    """A line for each length."""
    table = []
    for length in lengths:
        padded, packed = (harness.values(runs, "tokens_per_second", length=length, layout=name) for name in LAYOUTS)
        table.append([str(length), harness.told(padded, ",.0f"), harness.told(packed, ",.0f"), harness.ratio(packed, padded)])
    caption = (
        f"Real tokens per second of a training step of about {given.tokens:,} tokens in rows of half the length up to all of it, "
        f"{given.shape} shape, {precision}; medians (lowest to highest) of {given.rounds} interleaved rounds of {given.steps} steps. "
        f"Layouts: {told['padded']}; {told['packed']}."
    )
    harness.finish(given, caption, ["length", "padded, tokens/s", "packed, tokens/s", "packed is faster by"], table, runs)


JOBS = {"steps": steps_job}

if __name__ == "__main__":
    processes.begin(main, JOBS)
