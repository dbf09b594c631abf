"""Few-shot classification: eight rows a label, what pairs of rows reach and what plain fine-tuning reaches, over seeds.

    python scripts/few_shot.py --data DIR                     both sets, five seeds, all sides; scripts/results/few_shot.json
    python scripts/few_shot.py --sets reviews --seeds 1,2     a part: a finished run is not done again, so the parts add up
    python scripts/few_shot.py --report                       the table of what is there, Markdown on stdout

Every side gets the same drawn rows and the same test rows and is scored on test once, after its last step. Plain fine-tuning is run at
each learning rate of its grid and shown at the one that is best on test, which favours it; the others have one recipe for every set.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import public_sets

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHOTS, LONGEST, BATCH = 8, 64, 32
SETS = {
    "reviews": "shipped reviews, sentiment (3 labels)",
    "reviews_kind": "shipped reviews, kind (6 labels)",
    "ag_news": "AG News (4 labels)",
}
COLUMNS = {"reviews": "label", "reviews_kind": "kind", "ag_news": "label"}
CONTRASTIVE = ["model.pooling=mean", "task.few_shot=contrastive", "optimizer.lr=2e-5", "train.steps=50"]
DESCRIPTIONS = {
    "reviews": "negative: a negative review, neutral: a neutral or mixed review, positive: a positive review",
    "reviews_kind": "book: a review of a novel or another book, clothing: a review of clothes or shoes, film: a review of a film, "
    "gadget: a review of an electronic device, hotel: a review of a hotel and its rooms, restaurant: a review of a meal in a restaurant",
    "ag_news": "0: world news and politics, 1: sports news, 2: business news, 3: science and technology news",
}
"""What the side ``described`` is told of the labels beside the rows."""
SIDES = {
    "contrastive": CONTRASTIVE,
    "described": [*CONTRASTIVE, "task.zero_shot=embedding"],
    **{f"plain {lr}": [f"optimizer.lr={lr}", "train.steps=50"] for lr in ("5e-5", "1e-4", "2e-4")},
    "setfit": [],
}
"""Side to what it adds to the command line; ``setfit`` is the library itself."""


def main() -> None:
    given = arguments()
    work, wanted = Path(given.work), [(name, side) for name in given.sets.split(",") for side in given.sides.split(",")]
    if not given.report:
        for name, side in wanted:
            files = rows(name, given, work / "rows")
            for seed in map(int, given.seeds.split(",")):
                file = work / "results" / f"{name}-{side.replace(' ', '-')}-{seed}.json"
                if not file.exists():
                    began = time.perf_counter()
                    run = with_setfit if side == "setfit" else with_ftune
                    told = [f"task.descriptions={{{DESCRIPTIONS[name]}}}"] if side == "described" else []
                    accuracy = run(seed, *files, [*SIDES[side], *told], work)
                    tested = len(public_sets.read(files[1]))
                    save(file, {"set": name, "side": side, "seed": seed, "accuracy": accuracy, "test_rows": tested})
                    print(f"{name} {side} seed {seed}: {accuracy:.4f} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    report(given, work)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of the public sets (default: FTUNE_DATA)")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--test-rows", type=int, default=2000, help="at most so many test rows, the first ones")
    parser.add_argument("--work", default="bench/few_shot", help="where rows and results of single runs are kept")
    parser.add_argument("--output", default=str(ROOT / "scripts" / "results" / "few_shot.json"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser.parse_args()


def rows(name: str, given: argparse.Namespace, folder: Path) -> list[Path]:
    """Files of training and test rows, each with text and label."""
    if name.startswith("reviews"):
        corpus = ROOT / "finetune_cli" / "corpora" / "reviews"
        found = [public_sets.read(corpus / f"{split}.jsonl") for split in ("train", "test")]
    else:
        found = list(public_sets.SETS[name].read(public_sets.data_directory(given.data) / name))
    found[1] = found[1][: given.test_rows]
    plain = [[{"text": row["text"], "label": row[COLUMNS[name]]} for row in part] for part in found]
    return [public_sets.write(folder / f"{name}-{split}.jsonl", part) for split, part in zip(("train", "test"), plain, strict=True)]


def with_ftune(seed: int, train: Path, test: Path, options: Sequence[str], work: Path) -> float:
    """``ftune train`` as a user types it; its accuracy on test."""
    from finetune_cli.cli import main as ftune

    command = ["train", "model=minilm", f"data.train={train}", f"data.test={test}", "data.text=text", "data.label=label", *options]
    command += ["data.validation=null", f"data.rows_per_label={SHOTS}", f"data.max_length={LONGEST}", f"train.batch_size={BATCH}"]
    command += [f"train.seed={seed}", "train.save_every=1000", f"run.root={work / 'runs'}", "offline=true"]
    command += ["device=cpu", "device.threads=1"]
    command += [f"data.{gate}=1" for gate in ("max_truncated", "max_leaked")]  # public sets as they are
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        code = ftune(command)
    if code:
        raise SystemExit(told.getvalue())
    run = Path(out.getvalue().strip())
    accuracy: float = json.loads((run / "metrics.json").read_text())["test"]["accuracy"]["value"]
    shutil.rmtree(run)
    return accuracy


def with_setfit(seed: int, train: Path, test: Path, _: Sequence[str], work: Path) -> float:
    """SetFit as its documentation shows it (one epoch of 20 pairs a row, batch 16, learning rate 2e-5), on the rows that ftune draws."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    from finetune_cli.config import DataConfig
    from finetune_cli.data import load_splits

    config = DataConfig(train=str(train), validation=None, rows_per_label=SHOTS, text="text", label="label")
    drawn = load_splits(config, seed=seed).rows["train"]
    held = public_sets.read(test)
    names = sorted({row["label"] for row in held}, key=str)
    labels = [names.index(label) for label in drawn.column("label").to_pylist()]
    model = SetFitModel.from_pretrained(str(peers.minilm()), device="cpu")
    model.model_body.max_seq_length = LONGEST
    settings = TrainingArguments(str(work / "setfit"), num_iterations=20, num_epochs=1, batch_size=16, seed=seed, save_strategy="no")
    rows_of = Dataset.from_dict({"text": drawn.column("text").to_pylist(), "label": labels})
    Trainer(model=model, args=settings, train_dataset=rows_of).train()
    answers = model.predict([row["text"] for row in held], use_labels=False)
    return sum(names[int(a)] == row["label"] for a, row in zip(answers, held, strict=True)) / len(held)


def save(file: Path, result: Any) -> None:
    """One JSON file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def report(given: argparse.Namespace, work: Path) -> None:
    """The table on stdout, everything in the JSON file."""
    from readme_tables import markdown

    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((work / "results").glob("*.json"))]
    table = []
    for name, title in SETS.items():
        found = {side: {r["seed"]: r["accuracy"] for r in runs if (r["set"], r["side"]) == (name, side)} for side in SIDES}
        plain = max((side for side in SIDES if side.startswith("plain") and found[side]), key=lambda s: mean(found[s]), default=None)
        for side in ("contrastive", "described", plain, "setfit"):
            if side is not None and (values := found[side]):
                told = f"{mean(values):.4f} ({min(values.values()):.4f} to {max(values.values()):.4f})"
                table.append([title, side, told, ", ".join(map(str, sorted(values)))])
    caption = (
        f"Accuracy on test with MiniLM and {SHOTS} training rows a label, at most {LONGEST} tokens: mean (lowest to highest) over seeds. "
        f"contrastive: {' '.join(CONTRASTIVE)}. "
        "described: the same, with task.zero_shot=embedding and a few words on each label. plain: 50 steps, best of three learning rates."
    )
    columns = ["data", "side", "accuracy", "seeds"]
    save(Path(given.output), {"caption": caption, "columns": columns, "table": table, "runs": runs, "machine": peers.machine("cpu")})
    print(caption + "\n\n" + markdown(columns, table))


def mean(values: dict[int, float]) -> float:
    return statistics.mean(values.values())


if __name__ == "__main__":
    main()
