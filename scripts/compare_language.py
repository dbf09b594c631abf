"""Does ftune learn what Hugging Face's Trainer learns, on the language tasks, from the same rows with the same hyperparameters?

    python scripts/compare_language.py --data DIR    all sets; Markdown on stdout, scripts/results/compare_language.json
    python scripts/compare_language.py --sets conll2003,chat --seeds 1

MiniLM is fine-tuned by each side as it comes: heads, dropout and order of rows are each side's own, and the spread of seeds says what a
difference means. Small models from scratch begin with the very weights that ``ftune train train.steps=0`` writes, on both sides, without
dropout, in fp32, and see the rows in the same order: there the curves of the training loss must be one.

One process per run. A finished run is not done again: stop it and call it again to go on. ftune is run from its command line and reads
the sets' own formats; the peer reads them by plain lines of Python. Both sides' saved models are scored by the same lines, with seqeval,
sacrebleu and rouge-score; what ftune says of its own test rows is kept beside that in the JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import language_peers
import peers
import public_sets
from language_sets import SETS, LanguageSet

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("initial", "trainer", "ftune")


def main() -> None:
    given = arguments()
    if given.side:
        one_run(given)
        return
    seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else None
    wanted = [(name, seed) for name in given.sets.split(",") for seed in seeds or SETS[name].seeds]
    if given.finished:
        report(given, [one for one in wanted if all(result_file(given, side, *one).exists() for side in SIDES[1:])])
        return
    data = public_sets.data_directory(given.data)
    for name in dict.fromkeys(name for name, _ in wanted):
        SETS[name].cut(data / name, *files(given, name), *sizes(given, SETS[name]))
    for count, (name, seed) in enumerate(wanted, 1):
        for side in SIDES if SETS[name].scratch else SIDES[1:]:
            if not result_file(given, side, name, seed).exists():
                print(f"{count}/{len(wanted)} {name} seed {seed}: {side}", file=sys.stderr, flush=True)
                again = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--sets", name, "--seeds", str(seed)]
                subprocess.run(again, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    report(given, wanted)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of the public sets (default: FTUNE_DATA)")
    parser.add_argument("--sets", default=",".join(SETS), help="which of " + ", ".join(SETS))
    parser.add_argument("--seeds", help="default: 1,2,3 for MiniLM; 1 from scratch, where both sides do the same")
    parser.add_argument("--rows", type=int, help="at most so many training rows; default: as each set says")
    parser.add_argument("--test-rows", type=int, help="at most so many test rows; default: as each set says")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--finished", action="store_true", help="run nothing: tables of the runs that are finished")
    parser.add_argument("--work", default="bench/compare_language", help="where rows, runs and results of single runs are kept")
    parser.add_argument("--output", default=str(ROOT / "scripts" / "results" / "compare_language.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def sizes(given: argparse.Namespace, kind: LanguageSet) -> tuple[int, int]:
    """Training and test rows."""
    return min(given.rows or kind.rows, kind.rows), min(given.test_rows or kind.test_rows, kind.test_rows)


def files(given: argparse.Namespace, name: str) -> tuple[Path, Path]:
    """The training and the test file that ``main`` writes."""
    folder = Path(given.work) / "rows" / "-".join(map(str, (name, *sizes(given, SETS[name]))))
    train, test = SETS[name].names
    return folder / train, folder / test


def result_file(given: argparse.Namespace, side: str, name: str, seed: int) -> Path:
    """One file a run; other sizes have other files."""
    rows, test_rows = sizes(given, SETS[name])
    return Path(given.work) / "results" / f"{side}-{name}-{rows}-{test_rows}-seed{seed}.json"


def one_run(given: argparse.Namespace) -> None:
    """One side once: train, score the saved model, write the result."""
    name, seed, began = given.sets, int(given.seeds), time.perf_counter()
    result = {"initial": initial, "trainer": trainer, "ftune": ftune}[given.side](given, name, seed, *files(given, name))
    peers.save(
        result_file(given, given.side, name, seed),
        {**result, "seconds": round(time.perf_counter() - began, 1), "machine": peers.machine(given.device)},
    )


def directory(given: argparse.Namespace, side: str, name: str, seed: int) -> Path:
    """Where one run writes; what a killed one left there is gone."""
    return Path(given.work) / "runs" / result_file(given, side, name, seed).stem


def command(given: argparse.Namespace, name: str, seed: int, train: Path, where: Path) -> list[str]:
    """``ftune train`` as both the run and its beginning need it."""
    kind = SETS[name]
    shutil.rmtree(where, ignore_errors=True)
    options = [f"data.train={train}", "data.validation=null", f"train.seed={seed}", f"device={given.device}", "offline=true"]
    options += [f"data.{gate}=1" for gate in ("max_truncated", "max_conflicts", "max_leaked", "max_unknown")]  # public sets as they are
    if kind.scratch:
        options += ["model.dropout=0", "train.order=shuffled", "device.precision=fp32"]
    return [*kind.overrides(), *options, f"run.dir={where}"]


def initial(given: argparse.Namespace, name: str, seed: int, train: Path, test: Path) -> dict[str, Any]:
    """The model with which both sides begin."""
    where = directory(given, "initial", name, seed)
    shape = ",".join(f"{key}: {value}" for key, value in (SETS[name].scratch or {}).items())
    peers.ftune("train", "model=tiny", f"model.shape={{{shape}}}", "train.steps=0", *command(given, name, seed, train, where))
    return {}


def trainer(given: argparse.Namespace, name: str, seed: int, train: Path, test: Path) -> dict[str, Any]:
    """Trainer, and its model scored."""
    kind, model = SETS[name], directory(given, "trainer", name, seed)
    start = directory(given, "initial", name, seed) / "model" if kind.scratch else None
    rows, test_rows = kind.read(train), kind.read(test)
    result = language_peers.train(kind, rows, start=start, seed=seed, order=ftunes_order(seed), device=given.device, save=model)
    measured = language_peers.measure(kind, model, test_rows, device=given.device)
    answered = language_peers.answers(kind, model, test_rows, device=given.device)
    return {"scores": language_peers.score(kind, measured, answered, test_rows), "measured": measured, "rows": len(rows), **result}


def ftunes_order(seed: int) -> language_peers.Order:
    """The order of rows under ``train.order=shuffled``: the one thing that the peer is told by ftune."""
    sys.path.insert(0, str(ROOT))
    from finetune_cli import randomness

    return lambda epoch, count: randomness.generator(seed, "order", epoch).permutation(count).tolist()


def ftune(given: argparse.Namespace, name: str, seed: int, train: Path, test: Path) -> dict[str, Any]:
    """``ftune train`` and ``ftune predict`` from the command line; its model scored by the peer's lines, its answers by the same."""
    kind, run = SETS[name], directory(given, "ftune", name, seed)
    model = f"model.path={directory(given, 'initial', name, seed) / 'model'}" if kind.scratch else "model=minilm"
    peers.ftune("train", model, f"data.test={test}", *command(given, name, seed, train, run))
    rows, answered = kind.read(test), []
    if kind.task in ("token-classification", "text2text-generation"):
        output = run.with_suffix(".jsonl")
        peers.ftune("predict", str(run), f"input={test}", f"output={output}", f"device={given.device}", "offline=true")
        found = public_sets.read(output)
        answered = [a["generated"] for a in found] if kind.task == "text2text-generation" else [*map(tags, found, rows)]
    measured = language_peers.measure(kind, run / "model", rows, device=given.device)
    lines, clock = public_sets.read(run / "metrics.jsonl"), public_sets.read(run / "timing.jsonl")
    told = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]
    return {
        "scores": language_peers.score(kind, measured, answered, rows),
        "measured": measured,
        "rows": len(kind.read(train)),
        "loop_seconds": round(clock[-1]["seconds"], 1),
        "curve": [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line],
        "told": {name: metric["value"] for name, metric in told.items()},
    }


def tags(answer: dict[str, Any], row: public_sets.Row) -> list[str]:
    """The entities that ``ftune predict`` found, as a tag for each word of the row; characters count in its own text."""
    told, at = ["O"] * len(row["words"]), 0
    begins = {}
    for number, word in enumerate(row["words"]):
        at = answer["text"].index(word, at)
        begins[at] = number
        at += len(word)
    for entity in answer["entities"]:
        inside = [number for start, number in begins.items() if entity["start"] <= start < entity["end"]]
        for number in inside:
            told[number] = f"{'B' if number == inside[0] else 'I'}-{entity['label']}"
    return told


def report(given: argparse.Namespace, wanted: Sequence[tuple[str, int]]) -> None:
    """The table on stdout, everything in the JSON file."""
    from readme_tables import language_comparison

    table, runs = [], []
    for name in dict.fromkeys(name for name, _ in wanted):
        seeds = [seed for n, seed in wanted if n == name]
        found = {side: [json.loads(result_file(given, side, name, s).read_text(encoding="utf-8")) for s in seeds] for side in SIDES[1:]}
        runs += [{"side": side, "set": name, "seed": s, **r} for side in SIDES[1:] for s, r in zip(seeds, found[side], strict=True)]
        table += [line(SETS[name], metric, found) for metric in SETS[name].scores]
    where = runs[0]["machine"]
    caption = (
        "Both sides on the same rows with the same hyperparameters. MiniLM (all-MiniLM-L6-v2) as each side comes, over several "
        "seeds: mean (lowest to highest); small models from scratch begin with the same weights, without dropout, in fp32, with the "
        "rows in one order, and the last column is the largest difference of their training losses, each a mean of ten steps. Seconds are "
        "those of the training loops, ftune / Trainer, on a machine that did other work: no measure of "
        f"speed. transformers {where['transformers']}, torch {where['torch']}, {where['hardware']}."
    )
    sets = {name: {"rows": sizes(given, SETS[name]), "shape": SETS[name].scratch, **SETS[name].recipe.__dict__} for name, _ in wanted}
    result = {"caption": caption, "table": table, "sets": sets, "runs": runs}
    print(language_comparison(result))
    Path(given.output).parent.mkdir(parents=True, exist_ok=True)
    Path(given.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def line(kind: LanguageSet, metric: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One row: means and ranges of both sides, whether they differ by less than the wider range, and how far the curves lie apart."""
    values = {side: [run["scores"][metric] for run in found[side]] for side in found}
    spread = max(max(v) - min(v) for v in values.values())
    difference = statistics.mean(values["ftune"]) - statistics.mean(values["trainer"])
    told = {side: peers.mean_and_range(v) for side, v in values.items()}
    seconds = [statistics.mean(run["loop_seconds"] for run in found[side]) for side in ("ftune", "trainer")]
    apart = max(curves_apart(*pair) for pair in zip(*([run["curve"] for run in found[side]] for side in found), strict=True))
    return {
        "name": kind.title,
        "task": kind.task,
        "model": kind.model,
        "rows": found["ftune"][0]["rows"],
        "epochs": kind.recipe.epochs,
        "seconds": " / ".join(f"{s:.0f}" for s in seconds),
        "metric": metric,
        **told,
        "difference": f"{round(difference, 4) + 0.0:+.4f}",  # never -0
        "within_spread": abs(difference) <= spread if len(values["ftune"]) > 1 else None,
        "curves_apart": f"{apart:.0e}" if kind.scratch else None,
    }


def curves_apart(one: Sequence[tuple[int, float]], other: Sequence[tuple[int, float]]) -> float:
    """The largest difference of two training losses at the steps that both sides logged (ftune logs the last one too)."""
    beside = dict(map(tuple, other))
    return max((abs(loss - beside[step]) for step, loss in one if step in beside), default=0.0)


if __name__ == "__main__":
    main()
