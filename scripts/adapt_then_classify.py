"""Does fill-mask on unlabelled texts help a classifier that has few labels? AG News, the same labelled rows and recipe on every side.

    python scripts/adapt_then_classify.py --data DIR      three seeds; Markdown on stdout, scripts/results/adapt_then_classify.json
    python scripts/adapt_then_classify.py --texts 2000 --test-rows 2000 --seeds 1

Sides: ``plain``, MiniLM as it comes; ``adapted``, MiniLM after fill-mask on texts of the training file; ``control``, MiniLM through
fill-mask without learning. A masked language model has no pooler, so the classifier of the last two begins with a new one: the adapted
side against the control is what adaptation does, against plain what a user gains. One process for each part; what is finished is not
done again: stop it and call it again to go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import public_sets

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("plain", "control", "adapted")
FTUNE = [sys.executable, "-m", "finetune_cli"]


def main() -> None:
    given = arguments()
    work, seeds = Path(given.work), [int(seed) for seed in given.seeds.split(",")]
    unlabelled, _ = public_sets.prepare("ag_news", public_sets.data_directory(given.data), work / "texts", given.texts, 1)
    train, test = public_sets.prepare("ag_news", public_sets.data_directory(given.data), work / "rows", given.labels, given.test_rows)
    for seed in seeds:
        for side in SIDES:
            file = result_file(given, side, seed)
            if not file.exists():
                print(f"seed {seed}: {side}", file=sys.stderr, flush=True)
                began = time.perf_counter()
                model = "minilm" if side == "plain" else adapt(given, unlabelled, side, seed)
                score = classify(given, model, train, test, side, seed)
                save(file, {"accuracy": score, "seconds": round(time.perf_counter() - began, 1), "machine": peers.machine(given.device)})
    report(given, seeds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of the public sets (default: FTUNE_DATA)")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--texts", type=int, default=12_000, help="at most so many unlabelled texts")
    parser.add_argument("--labels", type=int, default=500, help="labelled rows")
    parser.add_argument("--test-rows", type=int, help="at most so many test rows; default: all")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--adapt-epochs", type=float, default=1.0)
    parser.add_argument("--adapt-lr", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=4.0, help="of the classifier")
    parser.add_argument("--lr", type=float, default=2e-4, help="of the classifier")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--work", default="bench/adapt_then_classify", help="where rows, runs and results of single parts are kept")
    parser.add_argument("--output", default=str(ROOT / "scripts" / "results" / "adapt_then_classify.json"))
    return parser.parse_args()


def recipe(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that changes a result."""
    names = ("texts", "labels", "test_rows", "max_length", "adapt_epochs", "adapt_lr", "epochs", "lr")
    return {name: getattr(given, name) for name in names}


def result_file(given: argparse.Namespace, side: str, seed: int) -> Path:
    """One file a part; another recipe has other files."""
    told = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in recipe(given).values())
    return Path(given.work) / "results" / f"{side}-{told}-seed{seed}.json"


def save(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def common(given: argparse.Namespace, side: str, seed: int, what: str) -> list[str]:
    """Options of both trainings: the files of AG News as they are, nothing scored on the way."""
    named = [f"run.root={Path(given.work) / 'runs'}", f"run.name={what}-{side}-seed{seed}", "offline=true"]
    gates = [f"data.{gate}=1" for gate in ("max_truncated", "max_conflicts")]
    return ["data.text=text", f"data.max_length={given.max_length}", f"train.seed={seed}", f"device={given.device}", *named, *gates]


def train_run(options: Sequence[str]) -> str:
    return subprocess.run(
        [*FTUNE, "train", *options], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def adapt(given: argparse.Namespace, texts: Path, side: str, seed: int) -> str:
    """The run of fill-mask; the control makes one step that changes nothing."""
    length = [f"train.epochs={given.adapt_epochs}", f"optimizer.lr={given.adapt_lr}"]
    if side == "control":
        length = ["train.steps=1", "optimizer.lr=1e-12", "optimizer.weight_decay=0"]
    options = ["task=fill-mask", "model=minilm", f"data.train={texts}", "data.validation=0.05", "task.whole_words=true"]
    return train_run([*options, *length, *common(given, side, seed, "adapt")])


def classify(given: argparse.Namespace, model: str, train: Path, test: Path, side: str, seed: int) -> float:
    """Accuracy on test of a classifier that starts from ``model``."""
    options = [f"model.path={model}", f"data.train={train}", "data.label=label", "data.validation=null", f"data.test={test}"]
    run = train_run([*options, f"train.epochs={given.epochs}", f"optimizer.lr={given.lr}", *common(given, side, seed, "classify")])
    return float(json.loads((Path(run) / "metrics.json").read_text(encoding="utf-8"))["test"]["accuracy"]["value"])


def report(given: argparse.Namespace, seeds: Sequence[int]) -> None:
    """The table on stdout, everything in the JSON file. Differences are seed by seed."""
    from readme_tables import markdown

    runs = [
        {"side": side, "seed": seed, **json.loads(result_file(given, side, seed).read_text(encoding="utf-8"))}
        for side in SIDES
        for seed in seeds
    ]
    found = {side: [run["accuracy"] for run in runs if run["side"] == side] for side in SIDES}
    cells = []
    for side in SIDES:
        gains = [a - b for a, b in zip(found[side], found["plain"], strict=True)]
        spread = f"{statistics.mean(found[side]):.4f} ({min(found[side]):.4f} to {max(found[side]):.4f})"
        cells.append([side, spread, "" if side == "plain" else f"{statistics.mean(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})"])
    where = runs[0]["machine"]
    caption = (
        f"AG News, {given.labels:,} labelled rows, {given.test_rows or 'all'} test rows, MiniLM; adapted on {given.texts:,} texts for "
        f"{given.adapt_epochs:g} epoch(s), at most {given.max_length} tokens; seeds {given.seeds}: mean (lowest to highest). "
        f"transformers {where['transformers']}, torch {where['torch']}, {where['hardware']}."
    )
    columns = ["start of the classifier", "test accuracy", "against plain, seed by seed"]
    print(f"{caption}\n\n{markdown(columns, cells)}")
    save(Path(given.output), {"caption": caption, "columns": columns, "table": cells, "runs": runs, "recipe": recipe(given)})


if __name__ == "__main__":
    main()
