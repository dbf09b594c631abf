"""How fast is ftune beside the tutorial loop and Hugging Face's Trainer? Same rows, same updates, whole epochs, one process per run.

    python scripts/bench/speed.py --data DIR    SST-2 whole sentences; prints Markdown, writes scripts/results/speed.json
    python scripts/bench/speed.py --rows 2000 --only train
    python scripts/bench/speed.py --shape base --rows 320 --variants trainer_best,ftune    BERT-base, built from config: speed_base.json
    python scripts/bench/speed.py --smoke       seconds, on shipped rows: shows that it works, measures nothing

Rounds are interleaved (every variant once, then again), figures are medians with the lowest and the highest. ``rows/s`` is the loop
alone, from first to last update (predict: reading and tokenising included, loading not). ``whole process`` is what a person waits: start,
training, scoring test, saving; ftune's also computes baselines, writes its report and proves that its model reloads.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import material
import peers
import processes
import public_sets
from processes import Ended

TRAIN = {
    "tutorial": "tutorial loop: padded to 128, fp32",
    "trainer": "Trainer, defaults: fp32, dynamic padding",
    "trainer_best": "Trainer, best flags: group_by_length, bf16 where the hardware has it",
    "ftune": "ftune train",
}
PREDICT = {
    "pipeline": "pipeline, batch 32",
    "trainer": "Trainer.predict",
    "trainer_bf16": "Trainer.predict, bf16_full_eval",
    "ftune": "ftune predict",
}
KINDS = {"train": TRAIN, "predict": PREDICT}
SHAPES = {"minilm": "MiniLM", "base": "BERT-base's shape with random weights"}
SEED = 1


@dataclass(frozen=True)
class Work:
    """What every variant works on."""

    folder: Path
    train: Path
    test: Path
    start: Path
    device: str
    recipe: peers.Recipe = field(default_factory=peers.Recipe)

    def overrides(self) -> list[str]:
        """ftune's command line for it."""
        model = "model=minilm" if self.start == peers.minilm() else f"model.path={self.start}"
        keys = [model, f"data.train={self.train}", f"data.test={self.test}", "data.validation=null", "data.text=text"]
        keys += ["data.label=label", "offline=true", *self.recipe.overrides(), f"train.seed={SEED}", f"device={self.device}"]
        return keys + [f"data.{gate}=1" for gate in ("max_truncated", "max_conflicts", "max_leaked")]

    @property
    def trained(self) -> Path:
        """The model that every predict variant loads: one ``ftune train`` on the same rows."""
        return Path((self.folder / "model-for-predict" / "newest").read_text(encoding="utf-8")) / "model"

    def told(self) -> dict[str, Any]:
        """JSON form, for a job."""
        return {"folder": self.folder, "train": self.train, "test": self.test, "start": self.start, "device": self.device}


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    work = work_of(given)
    kinds = [kind for kind in KINDS if given.only in (None, kind)]
    jobs = [(kind, variant) for kind in kinds for variant in chosen(given, kind)]
    if "predict" in kinds:
        prepare_predict(work)
    runs = []
    for number, (kind, variant) in harness.interleaved(given.rounds, jobs):
        _, found = measured(kind, variant, work)
        runs.append({"kind": kind, "variant": variant, "round": number, **found})
    report(given, work, runs)


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "speed")
    add_options(parser)
    parser.add_argument("--only", choices=list(KINDS))
    return harness.settle(parser.parse_args(typed), rows=32)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is worked on, here and in ``memory.py``."""
    parser.add_argument("--data", help="directory of the public sets (default: FTUNE_DATA)")
    parser.add_argument("--rows", type=int, help="use fewer rows, of training and of prediction")
    parser.add_argument("--shape", default=harness.USUAL_SHAPE, choices=list(SHAPES), help="base: BERT-base, built from config")
    parser.add_argument("--variants", help="which, with commas, of " + ", ".join({**TRAIN, **PREDICT}))


def work_of(given: argparse.Namespace) -> Work:
    """The files of training and test rows, and the model to begin with."""
    folder = Path(given.work)
    if given.smoke:
        train, test = (material.shipped_rows(folder / "rows", split, given.rows) for split in ("train", "test"))
        start = material.bert(folder / "one_layer", "one_layer")
    else:
        train, test = public_sets.prepare("sst2_sentences", public_sets.data_directory(given.data), folder / "rows", given.rows)
        test = public_sets.write(test, public_sets.drawn(public_sets.read(test), given.rows))
        start = material.start(folder, given.shape)
    return Work(folder, train.resolve(), test.resolve(), start, given.device)


def prepare_predict(work: Work) -> None:
    """Train the model that the predict variants load."""
    ftune_train(replace(work, recipe=peers.Recipe(epochs=0.1)) if work.start != peers.minilm() else work, "model-for-predict")


def chosen(given: argparse.Namespace, kind: str) -> list[str]:
    """The variants that were asked for and can run here."""
    wanted = [v for v in KINDS[kind] if given.variants is None or v in given.variants.split(",")]
    if not peers.fast_bf16(given.device) and "trainer_bf16" in wanted:
        wanted.remove("trainer_bf16")
        print("left out, this hardware has no bf16: trainer_bf16", file=sys.stderr)
    return harness.without_trainer(wanted, smoke=given.smoke)


def measured(kind: str, variant: str, work: Work, *, watch: bool = False) -> tuple[Ended, dict[str, Any]]:
    """Run one variant in a process of its own; how that ended, and its figures."""
    if variant == "ftune":
        ended, found = ftune_train(work, "runs", watch=watch) if kind == "train" else ftune_predict(work, watch=watch)
    else:
        ended = processes.job(__file__, kind, {"variant": variant, **work.told()}, watch=watch)
        found = ended.result
    truth = [row["label"] for row in public_sets.read(work.test)]
    answers = [int(str(a).removeprefix("LABEL_")) for a in found.pop("predictions", None) or found.pop("labels")]
    accuracy = sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth)
    return ended, {"wall_seconds": ended.wall_seconds, **found, "accuracy": accuracy}


def train_job(variant: str, folder: str, train: str, test: str, start: str, device: str) -> dict[str, Any]:
    """A peer trains and answers the test rows."""
    keep: dict[str, Any] = {"labels": 2, "seed": SEED, "recipe": peers.Recipe(), "device": device, "start": Path(start)}
    rows, held_out, save = public_sets.read(Path(train)), public_sets.read(Path(test)), Path(folder) / "saved"
    if variant == "tutorial":
        return peers.tutorial(rows, held_out, save=save, **keep)
    return peers.trainer(rows, held_out, best_flags=variant == "trainer_best", save=save, **keep)


def predict_job(variant: str, folder: str, train: str, test: str, start: str, device: str) -> dict[str, Any]:
    """A peer answers the test rows with the model that ftune trained."""
    work = Work(Path(folder), Path(train), Path(test), Path(start), device)
    return peers.predict(work.trained, public_sets.read(work.test), how=variant, device=device)


def ftune_train(work: Work, into: str, *, watch: bool = False) -> tuple[Ended, dict[str, Any]]:
    """``ftune train`` on the same rows."""
    root = work.folder / into
    ended = processes.ftune("train", *work.overrides(), f"run.root={root}", watch=watch)
    run = Path(ended.out.strip())
    times = [json.loads(line) for line in (run / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = times[-1]["seconds"]
    count = len(public_sets.read(work.train)) * work.recipe.epochs
    (root / "newest").write_text(str(run), encoding="utf-8")
    return ended, {
        "predictions": [a["label"] for a in public_sets.read(run / "eval" / "test" / "predictions.jsonl")],
        "loop_seconds": seconds,
        "samples_per_second": count / seconds,
        "last_logged_samples_per_second": times[-1]["train/samples_per_second"],
    }


def ftune_predict(work: Work, *, watch: bool = False) -> tuple[Ended, dict[str, Any]]:
    """``ftune predict`` on the test rows; rows/s as it reports them."""
    output = work.folder / "predictions.jsonl"
    keys = [f"input={work.test}", f"output={output}", f"device={work.device}", "offline=true"]
    ended = processes.ftune("predict", str(work.trained), *keys, watch=watch)
    rate, rows = told_rate(ended)
    labels = [answer["label"] for answer in public_sets.read(output)]
    return ended, {"labels": labels, "loop_seconds": rows / rate, "samples_per_second": rate}


def told_rate(ended: Ended) -> tuple[float, int]:
    """(rows a second, rows) as ``ftune predict`` says them at its end."""
    found = re.search(r"(\d+) rows in ([\d.]+) s, ([\d.,]+) rows a second", ended.err)
    if found is None:
        sys.exit(f"ftune predict told no rate:\n{ended.err}")
    return float(found[3].replace(",", "")), int(found[1])


def told_work(given: argparse.Namespace, work: Work) -> str:
    """The work in words, for a caption."""
    what = "Shipped reviews" if given.smoke else "SST-2 whole sentences"
    rows = [len(public_sets.read(file)) for file in (work.train, work.test)]
    shape = "a tiny model" if given.smoke else SHAPES[given.shape]
    return f"{what}, {rows[0]:,} rows to train on and {rows[1]:,} to predict, {shape}, batch 32, one epoch"


def report(given: argparse.Namespace, work: Work, runs: list[dict[str, Any]]) -> None:
    """Medians and ratios."""
    table = []
    for kind, variants in KINDS.items():
        own = harness.values(runs, "samples_per_second", kind=kind, variant="ftune")
        for variant, told in variants.items():
            rate, wall = (harness.values(runs, f, kind=kind, variant=variant) for f in ("samples_per_second", "wall_seconds"))
            if rate:
                ratio = "" if variant == "ftune" else harness.ratio(own, rate)
                table.append([kind, told, harness.told(rate), harness.told(wall), ratio])
    caption = f"{told_work(given, work)}; medians (lowest to highest) of {given.rounds} interleaved rounds, each in its own process."
    columns: Sequence[str] = ["work", "variant", "rows/s", "whole process, s", "ftune is faster by"]
    harness.finish(given, caption, columns, table, runs)


JOBS = {"train": train_job, "predict": predict_job}

if __name__ == "__main__":
    processes.begin(main, JOBS)
