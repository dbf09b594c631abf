"""How long does a checkpoint stop training? MiniLM's shape (22.7 million weights with AdamW: 273 MB), real updates, real files.

    python scripts/bench/checkpoint_stall.py            prints JSON; about two minutes on two cores
    python scripts/bench/checkpoint_stall.py --smoke    seconds, a tiny model: shows that it works, measures nothing

``background``: what ``ftune train`` does. ``waiting``: the same files, and training waits until they are whole and on the disk. ``plain``:
``save_pretrained`` and ``torch.save`` of the optimizer, as a loop of one's own has it: no sync, no checksum, not whole after a kill.
``stall_ms`` is the time that a save holds the loop, ``stall_cpu_ms`` what of it the loop's thread computes (on a busy machine the figure to
look at, with ``--threads 1``); ``seconds`` and ``cpu_seconds`` are those of the whole loop, the last save's end included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
FACTS = {"labels": ["a", "b"], "cells": ["a", "b"], "multi": False, "weights": None}


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    measured: dict[str, list[dict[str, Any]]] = {"background": [], "waiting": [], "plain": []}
    bench = Bench(given)
    for _ in range(given.rounds):
        for name, runs in measured.items():
            runs.append(bench.measure(name))
    told = {
        "weights": sum(p.numel() for p in bench.model.parameters()),
        "megabytes": round(bench.bytes() / 1e6, 1),
        "torch": torch.__version__,
        "threads": given.threads,
        "steps_between_saves": given.every,
        "variants": {name: summary(runs) for name, runs in measured.items()},
    }
    print(json.dumps(told, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5, help="saves of each loop")
    parser.add_argument("--every", type=int, default=15, help="updates between two saves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", help="where the checkpoints go: the disk to measure (default: a temporary directory)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round of two saves")
    given = parser.parse_args()
    if given.smoke:
        given.saves, given.every, given.rounds = 2, 2, 1
    return given


class Bench:
    """A model that is trained on, loop after loop, and the ways to save it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        task = tasks.get("text-classification")
        words = [f"word{i}" for i in range(40_000 if not given.smoke else 100)]
        config = ModelConfig(shape=TINY if given.smoke else MINILM)
        self.tokenizer = models.train_tokenizer(iter(words), config, "encoder")
        self.task = task(task.Config(), FACTS)
        self.model: Any = models.build(config, self.task, self.tokenizer, seed=1)
        if not given.smoke:  # the words above do not fill the vocabulary
            self.model.resize_token_embeddings(MINILM["vocabulary"], mean_resizing=False)
        self.updater = Updater(self.model, OptimizerConfig(), clip=1.0, device=torch.device("cpu"), scaler=None)
        self.steps = 0

    def step(self) -> None:
        """One update on rows of chance."""
        self.steps += 1
        torch.manual_seed(self.steps)
        ids = torch.randint(5, self.model.config.vocab_size, (ROWS, TOKENS))
        loss = self.model(input_ids=ids, labels=torch.arange(ROWS) % 2).loss
        loss.backward()
        self.updater.update(1e-4, step=self.steps, loss=loss.detach())

    def bytes(self) -> int:
        """Of weights and moments."""
        moments = [tensor for state in self.updater.state()["moments"] for tensor in state.values()]
        return sum(tensor.nbytes for tensor in [*self.model.state_dict().values(), *moments])

    def measure(self, name: str) -> dict[str, Any]:
        """A loop that saves in one of the ways: how long each save held it, in ms, and what the loop took."""
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


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all rounds; the first save of a loop also by itself."""
    stalls, computed = ([ms for run in runs for ms in run[kind]] for kind in ("stalls", "computed"))
    return {
        "saves": len(stalls),
        "stall_ms": {"median": round(statistics.median(stalls), 1), "max": round(max(stalls), 1)},
        "stall_cpu_ms": {"median": round(statistics.median(computed), 1), "max": round(max(computed), 1)},
        "first_stall_ms": round(statistics.median(run["stalls"][0] for run in runs), 1),
        "seconds": round(statistics.median(run["seconds"] for run in runs), 2),
        "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in runs), 2),
    }


if __name__ == "__main__":
    main()
