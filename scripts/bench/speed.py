"""How fast is ftune beside the tutorial loop and Hugging Face's Trainer? Same rows, same updates, whole epochs, one process per run.

    python scripts/bench/speed.py --data DIR    SST-2 whole sentences; prints Markdown, writes scripts/results/speed.json
    python scripts/bench/speed.py --rows 2000 --only train
    python scripts/bench/speed.py --smoke       seconds, on shipped rows: shows that it works, measures nothing

Rounds are interleaved (every variant once, then again), figures are medians. ``rows/s`` is the loop alone, from first to last
update (predict: reading and tokenising included, loading not). ``whole process`` is what a person waits: start, training,
scoring test, saving; ftune's also computes baselines, writes its report and proves that its model reloads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import peers  # noqa: E402
import public_sets  # noqa: E402

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
SEED = 1


def main() -> None:
    given = arguments()
    if given.variant:
        one_run(given)
        return
    work = Path(given.work)
    files = rows_to_use(given, work)
    kinds = [kind for kind in ("train", "predict") if given.only in (None, kind)]
    jobs = [(kind, variant) for kind in kinds for variant in chosen(given, TRAIN if kind == "train" else PREDICT)]
    if "predict" in kinds:
        ftune_train(given, files, work / "model-for-predict")
    runs = []
    for round_number in range(1, given.rounds + 1):
        for kind, variant in jobs:
            print(f"round {round_number}/{given.rounds}: {kind} {variant}", file=sys.stderr, flush=True)
            runs.append({"kind": kind, "variant": variant, "round": round_number, **timed(kind, variant, files)})
    report(given, files, runs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of the public sets (default: FTUNE_DATA)")
    parser.add_argument("--rows", type=int, help="use fewer rows, of training and of prediction")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["train", "predict"])
    parser.add_argument("--variants", help="which, with commas, of " + ", ".join({**TRAIN, **PREDICT}))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--work", default="bench/speed")
    parser.add_argument("--output", default=str(ROOT / "scripts" / "results" / "speed.json"))
    parser.add_argument("--smoke", action="store_true", help="32 shipped rows, one round, nothing written to scripts/results/")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--files", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.smoke:
        given.rows, given.rounds = 32, 1
        given.output = str(Path(given.work) / "smoke.json")
    return given


def chosen(given: argparse.Namespace, variants: dict[str, str]) -> list[str]:
    wanted = [v for v in variants if given.variants is None or v in given.variants.split(",")]
    if not peers.fast_bf16(given.device) and "trainer_bf16" in wanted:
        wanted.remove("trainer_bf16")
        print("left out, this hardware has no bf16: trainer_bf16", file=sys.stderr)
    if find_spec("accelerate") is None:
        left_out = [v for v in wanted if v.startswith("trainer")]
        if left_out and not given.smoke:
            sys.exit('Trainer needs accelerate: pip install ".[bench]"')
        wanted = [v for v in wanted if v not in left_out]
        print(f"left out, accelerate is not installed: {', '.join(left_out)}", file=sys.stderr)
    return wanted


def rows_to_use(given: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """The files of training and test rows."""
    if not given.smoke:
        train, test = public_sets.prepare("sst2_sentences", public_sets.data_directory(given.data), work / "rows", given.rows)
        return train, public_sets.write(test, public_sets.drawn(public_sets.read(test), given.rows))
    names, files = ["negative", "neutral", "positive"], []
    for split in ("train", "test"):
        rows = public_sets.read(ROOT / "finetune_cli" / "corpora" / "reviews" / f"{split}.jsonl")
        two = [{"text": r["text"], "label": names.index(r["label"]) // 2} for r in rows if r["label"] != "neutral"]
        files.append(public_sets.write(work / "rows" / f"smoke-{split}.jsonl", two[: given.rows]))
    return files[0], files[1]


def timed(kind: str, variant: str, files: tuple[Path, Path]) -> dict[str, Any]:
    """Run one variant in a process of its own; its figures and the wall time of the whole process."""
    again = [sys.executable, __file__, *sys.argv[1:], "--variant", f"{kind}:{variant}", "--files", json.dumps([str(f) for f in files])]
    began = time.perf_counter()
    done = subprocess.run(again, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    outer = time.perf_counter() - began
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"wall_seconds": outer, **found}


def one_run(given: argparse.Namespace) -> None:
    """The body of one process: a variant, its figures as one line on stdout."""
    kind, variant = given.variant.split(":")
    train, test = map(Path, json.loads(given.files))
    work, keep = Path(given.work), {"labels": 2, "seed": SEED, "recipe": peers.Recipe(), "device": given.device}
    held_out = public_sets.read(test)
    if kind == "train" and variant == "ftune":
        found = ftune_train(given, (train, test), work / "runs")
    elif kind == "train" and variant == "tutorial":
        found = peers.tutorial(public_sets.read(train), held_out, save=work / "saved", **keep)
    elif kind == "train":
        best = variant == "trainer_best"
        found = peers.trainer(public_sets.read(train), held_out, best_flags=best, save=work / "saved", **keep)
    elif variant == "ftune":
        found = ftune_predict(given, test, work)
    else:
        found = peers.predict(trained_model(work), held_out, how=variant, device=given.device)
    truth = [row["label"] for row in held_out]
    answers = [int(str(a).removeprefix("LABEL_")) for a in found.pop("predictions", None) or found.pop("labels")]
    print(json.dumps({**found, "accuracy": sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth)}))


def ftune_train(given: argparse.Namespace, files: Sequence[Path], root: Path) -> dict[str, Any]:
    """``ftune train``; its wall time is that of its own process, not of this wrapper."""
    options = [
        f"data.train={files[0]}",
        f"data.test={files[1]}",
        "data.validation=null",
        "data.text=text",
        "data.label=label",
        "offline=true",
    ]
    options += [
        *peers.Recipe().overrides(),
        f"train.seed={SEED}",
        f"device={given.device}",
        f"run.root={root}",
    ]
    options += [f"data.{gate}=1" for gate in ("max_truncated", "max_conflicts", "max_leaked")]
    command = [*ftune(), "train", "model=minilm", *options]
    with tempfile.TemporaryDirectory() as cold:  # tokenising is part of the work on every side
        began = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"FTUNE_CACHE": cold})
        wall = time.perf_counter() - began
    run = Path(done.stdout.strip())
    times = [json.loads(line) for line in (run / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = times[-1]["seconds"]
    count = len(public_sets.read(files[0])) * peers.Recipe().epochs
    answers = public_sets.read(run / "eval" / "test" / "predictions.jsonl")
    (root / "newest").write_text(str(run), encoding="utf-8")
    return {
        "predictions": [a["label"] for a in answers],
        "loop_seconds": seconds,
        "samples_per_second": count / seconds,
        "last_logged_samples_per_second": times[-1]["train/samples_per_second"],
        "wall_seconds": wall,
    }


def ftune_predict(given: argparse.Namespace, test: Path, work: Path) -> dict[str, Any]:
    """``ftune predict`` on the test rows; rows/s as it reports them."""
    output = work / "predictions.jsonl"
    command = [*ftune(), "predict", str(trained_model(work)), f"input={test}", f"output={output}", f"device={given.device}", "offline=true"]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    wall = time.perf_counter() - began
    told = re.search(r"(\d+) rows in ([\d.]+) s, ([\d.,]+) rows a second", done.stderr)
    if told is None:
        sys.exit(f"ftune predict told no rate:\n{done.stderr}")
    rate = float(told[3].replace(",", ""))
    labels = [answer["label"] for answer in public_sets.read(output)]
    return {"labels": labels, "loop_seconds": int(told[1]) / rate, "samples_per_second": rate, "wall_seconds": wall}


def trained_model(work: Path) -> Path:
    """The model that every predict variant loads: one ``ftune train`` on the same rows."""
    return Path((work / "model-for-predict" / "newest").read_text(encoding="utf-8")) / "model"


def ftune() -> list[str]:
    return [sys.executable, "-m", "finetune_cli"]


def report(given: argparse.Namespace, files: Sequence[Path], runs: list[dict[str, Any]]) -> None:
    """Medians and ratios; Markdown on stdout, all runs in the JSON file."""
    from readme_tables import speed

    table = []
    for kind, variants in (("train", TRAIN), ("predict", PREDICT)):
        median = {v: medians([r for r in runs if (r["kind"], r["variant"]) == (kind, v)]) for v in variants}
        for variant, told in variants.items():
            if (mine := median[variant]) is None:
                continue
            own = median["ftune"]
            ratio = "" if own is None or variant == "ftune" else f"{own['rate'] / mine['rate']:.2f}×"
            table.append(
                {
                    "what": kind,
                    "variant": told,
                    "samples_per_second": f"{mine['rate']:,.1f}",
                    "wall_seconds": f"{mine['wall']:.1f}",
                    "against": ratio,
                    "accuracy": mine["accuracy"],
                }
            )
    where = peers.machine(given.device)
    counts = [len(public_sets.read(file)) for file in files]
    what = "Smoke run, not a measurement: shipped reviews" if given.smoke else "SST-2 whole sentences"
    caption = (
        f"{what}, {counts[0]:,} rows to train on and {counts[1]:,} to predict, MiniLM, batch 32, one epoch; "
        f"medians of {given.rounds} interleaved rounds, each in its own process. "
        f"transformers {where['transformers']}, torch {where['torch']}, Python {where['python']}, {where['hardware']}."
    )
    result = {"caption": caption, "table": table, "machine": where, "runs": runs}
    print(speed(result))
    Path(given.output).parent.mkdir(parents=True, exist_ok=True)
    Path(given.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def medians(runs: list[dict[str, Any]]) -> dict[str, float] | None:
    if not runs:
        return None
    names = {"rate": "samples_per_second", "wall": "wall_seconds", "accuracy": "accuracy"}
    return {short: statistics.median(run[name] for run in runs) for short, name in names.items()}


if __name__ == "__main__":
    main()
