"""Does ftune reach the scores of Hugging Face's Trainer, on the same rows with the same hyperparameters?

    python scripts/compare_trainer.py --data DIR    all sets, three seeds; Markdown on stdout, scripts/results/compare_trainer.json
    python scripts/compare_trainer.py --sets mrpc --seeds 1,2,3 --rows 2000

One process per run. A finished run is not done again: stop it and call it again to go on. Both sides train on the same files, no rows
held out, and their predictions on test are scored here by the same lines. ftune runs as it comes (its own precision and order of rows);
Trainer as its documentation shows it.
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
from public_sets import SETS

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("trainer", "ftune")


def main() -> None:
    given = arguments()
    if given.side:
        one_run(given)
        return
    work, wanted = Path(given.work), [(name, seed) for name in given.sets.split(",") for seed in map(int, given.seeds.split(","))]
    data = public_sets.data_directory(given.data)
    for name in dict.fromkeys(name for name, _ in wanted):
        public_sets.prepare(name, data, work / "rows", given.rows, given.test_rows)
    for count, (name, seed) in enumerate(wanted, 1):
        for side in SIDES:
            file = result_file(work, side, name, seed, given.rows)
            if not file.exists():
                print(f"{count}/{len(wanted)} {name} seed {seed}: {side}", file=sys.stderr, flush=True)
                again = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--sets", name, "--seeds", str(seed)]
                subprocess.run(again, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    report(given, work, wanted)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of the public sets (default: FTUNE_DATA)")
    parser.add_argument("--sets", default=",".join(SETS), help="which of " + ", ".join(SETS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rows", type=int, default=10_000, help="at most so many training rows")
    parser.add_argument("--test-rows", type=int, help="at most so many test rows; default: all")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--work", default="bench/compare_trainer", help="where rows, runs and results of single runs are kept")
    parser.add_argument("--output", default=str(ROOT / "scripts" / "results" / "compare_trainer.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def result_file(work: Path, side: str, name: str, seed: int, rows: int) -> Path:
    return work / "results" / f"{side}-{name}-{rows}-seed{seed}.json"


def one_run(given: argparse.Namespace) -> None:
    """Train one side once, predict test, score it, write the result."""
    work, name, seed = Path(given.work), given.sets, int(given.seeds)
    files = [work / "rows" / f"{name}-{split}.jsonl" for split in ("train", "test")]
    began = time.perf_counter()
    if given.side == "trainer":
        rows, test = map(public_sets.read, files)
        predictions = peers.trainer(rows, test, labels=SETS[name].labels, seed=seed, recipe=peers.Recipe(), device=given.device)[
            "predictions"
        ]
    else:
        predictions = ftune(name, seed, *files, work=work, device=given.device)
    seconds = time.perf_counter() - began
    targets = [row["label"] for row in public_sets.read(files[1])]
    result = {
        "scores": score(SETS[name], predictions, targets),
        "seconds": round(seconds, 1),
        "rows": len(public_sets.read(files[0])),
        "machine": peers.machine(given.device),
    }
    peers.save(result_file(work, given.side, name, seed, given.rows), result)


def ftune(name: str, seed: int, train: Path, test: Path, *, work: Path, device: str) -> list[float]:
    """``ftune train`` and ``ftune predict`` from the command line; the predictions of the test rows."""
    kind, pair = SETS[name], "text_pair" in public_sets.read(test)[0]
    options = [
        f"data.train={train}",
        "data.validation=null",
        "data.text=text",
        "data.label=label",
        f"train.seed={seed}",
        f"device={device}",
    ]
    options += peers.Recipe().overrides() + [f"run.root={work / 'runs'}", f"run.name={name}-seed{seed}", "offline=true"]
    options += ["data.text_pair=text_pair"] * pair + ["task=text-regression"] * kind.regression
    options += [f"data.{gate}=1" for gate in ("max_truncated", "max_conflicts")]  # public sets as they are
    run = peers.ftune("train", "model=minilm", *options)
    output = work / "predictions" / f"{name}-seed{seed}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    peers.ftune("predict", run, f"input={test}", f"output={output}", f"device={device}", "offline=true")
    answers = public_sets.read(output)
    return [float(a["value"] if kind.regression else a["label"]) for a in answers]


def score(kind: public_sets.PublicSet, predictions: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    """The set's metrics; the same lines for both sides."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score

    if len(predictions) != len(targets):
        raise SystemExit(f"{len(predictions)} predictions for {len(targets)} rows")
    known = {
        "accuracy": lambda: accuracy_score(targets, predictions),
        "f1": lambda: f1_score(targets, predictions),
        "pearson": lambda: pearsonr(targets, predictions).statistic,
        "spearman": lambda: spearmanr(targets, predictions).statistic,
    }
    return {metric: float(known[metric]()) for metric in kind.metrics}


def report(given: argparse.Namespace, work: Path, wanted: Sequence[tuple[str, int]]) -> None:
    """The table on stdout, everything in the JSON file."""
    from readme_tables import comparison

    table, runs = [], []
    for name in dict.fromkeys(name for name, _ in wanted):
        seeds = [seed for n, seed in wanted if n == name]
        found = {
            side: [json.loads(result_file(work, side, name, s, given.rows).read_text(encoding="utf-8")) for s in seeds] for side in SIDES
        }
        runs += [{"side": side, "set": name, "seed": s, **r} for side in SIDES for s, r in zip(seeds, found[side], strict=True)]
        table += [line(name, metric, found) for metric in SETS[name].metrics]
    recipe, where = peers.Recipe(), runs[0]["machine"]
    versions = f"transformers {where['transformers']}, torch {where['torch']}, {where['hardware']}"
    caption = (
        f"MiniLM (all-MiniLM-L6-v2), at most {given.rows:,} training rows, {recipe.epochs:g} epoch, batch {recipe.batch_size}, AdamW, "
        f"lr {recipe.lr:g}, seeds {given.seeds}: mean (lowest to highest). {versions}."
    )
    result = {"caption": caption, "table": table, "runs": runs, "recipe": recipe.__dict__}
    print(comparison(result))
    Path(given.output).parent.mkdir(parents=True, exist_ok=True)
    Path(given.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def line(name: str, metric: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One row: means, ranges, and whether the means differ by less than the wider range of seeds."""
    values = {side: [run["scores"][metric] for run in found[side]] for side in SIDES}
    means = {side: statistics.mean(values[side]) for side in SIDES}
    spread = max(max(v) - min(v) for v in values.values())
    told = {side: peers.mean_and_range(values[side]) for side in SIDES}
    difference = means["ftune"] - means["trainer"]
    return {
        "name": SETS[name].title,
        "metric": metric,
        "rows": found["ftune"][0]["rows"],
        **told,
        "difference": f"{difference:+.4f}",
        "within_spread": abs(difference) <= spread,
    }


if __name__ == "__main__":
    main()
