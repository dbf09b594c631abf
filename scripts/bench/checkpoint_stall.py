"""How long does a checkpoint stop training? MiniLM's shape (22.7 million weights with AdamW: 273 MB), real updates, real files.

    python scripts/bench/checkpoint_stall.py            two minutes; prints Markdown, writes scripts/results/checkpoint_stall.json
    python scripts/bench/checkpoint_stall.py --smoke    seconds, a tiny model: shows that it works, measures nothing

``background``: what ``ftune train`` does. ``waiting``: the same files, and training waits until they are whole and on the disk. ``plain``:
``save_pretrained`` and ``torch.save`` of the optimizer, as a loop of one's own has it: no sync, no checksum, not whole after a kill.
How long a save holds the loop is told, and what of that the loop's thread computes (on a busy machine the figure to look at, with
``--threads 1``); and how long the whole loop takes, the last save's end included.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from finetune_cli import models, tasks
from finetune_cli.checkpoint import Knowledge, Saver
from finetune_cli.config import ModelConfig, OptimizerConfig
from finetune_cli.engine.optimizer import Updater
from finetune_cli.storage import REAL, Store

MINILM = {"layers": 6, "hidden": 384, "heads": 12, "intermediate": 1536, "vocabulary": 30522, "positions": 512}
TINY = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64, "vocabulary": 300, "positions": 32}
ROWS, TOKENS = 8, 16
VARIANTS = {"plain": "save_pretrained and torch.save", "waiting": "ftune's files, waited for", "background": "ftune"}
FACTS = {"labels": ["a", "b"], "cells": ["a", "b"], "multi": False, "weights": None}


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    torch.set_num_threads(given.threads)
    bench, runs = Bench(given), []
    for number, variant in harness.interleaved(given.rounds, list(VARIANTS)):
        runs.append({"variant": variant, "round": number, **bench.measure(variant)})
    report(given, bench, runs)


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "checkpoint_stall")
    parser.add_argument("--saves", type=int, default=5, help="saves of each loop")
    parser.add_argument("--every", type=int, default=15, help="updates between two saves")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return harness.settle(parser.parse_args(typed), saves=2, every=2)


def report(given: argparse.Namespace, bench: Bench, runs: harness.Runs) -> None:
    """Medians over the saves of all rounds, and how long the longest took."""
    table = []
    for variant, told in VARIANTS.items():
        stalls, computed = ([ms for run in runs if run["variant"] == variant for ms in run[kind]] for kind in ("stalls", "computed"))
        seconds = harness.values(runs, "seconds", variant=variant)
        table.append([told, harness.told(stalls), f"{max(stalls):,.1f}", harness.told(computed), harness.told(seconds)])
    weights = sum(p.numel() for p in bench.model.parameters())
    caption = (
        f"{weights / 1e6:,.1f} million weights with AdamW, {bench.bytes() / 1e6:,.0f} MB a checkpoint, {given.saves} saves in "
        f"{given.saves * given.every} updates, {given.threads} threads; medians (lowest to highest) of {given.rounds} interleaved rounds."
    )
    columns = ["saves", "a save holds training, ms", "the longest, ms", "of that computed, ms", "the whole loop, s"]
    harness.finish(given, caption, columns, table, runs)


def chosen(device: str) -> str:
    """cuda where it is asked for, or there is one."""
    return "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"


class Bench:
    """A model that is trained on, loop after loop, and the ways to save it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.device = given, torch.device(chosen(given.device))
        task = tasks.get("text-classification")
        words = [f"word{i}" for i in range(40_000 if not given.smoke else 100)]
        config = ModelConfig(shape=TINY if given.smoke else MINILM)
        self.tokenizer = models.train_tokenizer(iter(words), config, "encoder")
        self.task = task(task.Config(), FACTS)
        self.model: Any = models.build(config, self.task, self.tokenizer, seed=1)
        if not given.smoke:  # the words above do not fill the vocabulary
            self.model.resize_token_embeddings(MINILM["vocabulary"], mean_resizing=False)
        self.model.to(self.device)
        self.updater = Updater(self.model, OptimizerConfig(), clip=1.0, device=self.device, scaler=None)
        self.steps = 0

    def step(self) -> None:
        """One update on rows of chance."""
        self.steps += 1
        torch.manual_seed(self.steps)
        ids = torch.randint(5, self.model.config.vocab_size, (ROWS, TOKENS)).to(self.device)
        loss = self.model(input_ids=ids, labels=torch.arange(ROWS, device=self.device) % 2).loss
        loss.backward()
        self.updater.update(1e-4, step=self.steps, loss=loss.detach())

    def bytes(self) -> int:
        """Of weights and moments."""
        moments = [tensor for state in self.updater.state()["moments"] for tensor in state.values()]
        return sum(tensor.nbytes for tensor in [*self.model.state_dict().values(), *moments])

    def measure(self, name: str) -> dict[str, Any]:
        """A loop that saves in one of the ways: how long each save held it, in ms, and what the loop took."""
        Path(self.given.work).mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="checkpoint-stall-", dir=self.given.work))
        save, end = self.plain(work) if name == "plain" else self.ftune(work, waits=name == "waiting")
        stalls, computed = [], []
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            for count in range(1, self.given.saves * self.given.every + 1):
                self.step()
                if count == 1 or count % self.given.every == 0:
                    began, own = time.perf_counter(), time.thread_time()
                    save(first=count == 1)
                    if count > 1:
                        stalls.append(1e3 * (time.perf_counter() - began))
                        computed.append(1e3 * (time.thread_time() - own))
            end()
            return {"stalls": stalls, "computed": computed, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        finally:
            shutil.rmtree(work)

    def ftune(self, work: Path, *, waits: bool) -> tuple[Callable[..., None], Callable[[], None]]:
        """ftune's own saves; after the first update the loop makes room for them, as ``fit`` does."""
        knowledge = Knowledge(task=self.task.name, facts=FACTS, columns={}, max_length=TOKENS, seed=1, plan={})
        saver = Saver(Store(work / "checkpoints", REAL, keep=0), knowledge, self.tokenizer, "task: {}\n")

        def save(*, first: bool) -> None:
            state = {"optimizer": self.updater.state()}
            if first:
                saver.make_room(self.model, state)
            else:
                saver.save(self.steps, self.model, state, best=True)
            if waits:
                saver.join()

        return save, saver.join

    def plain(self, work: Path) -> tuple[Callable[..., None], Callable[[], None]]:
        """What a loop of one's own does."""

        def save(*, first: bool) -> None:
            if not first:
                folder = work / f"step-{self.steps}"
                self.model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
                torch.save(self.updater.optimizer.state_dict(), folder / "optimizer.pt")
                for old in work.iterdir():
                    if old != folder:
                        shutil.rmtree(old)

        return save, lambda: None


if __name__ == "__main__":
    main()
