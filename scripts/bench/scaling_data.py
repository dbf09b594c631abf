"""From a thousand rows to millions: reading, tokenising, the token cache, the order of an epoch, memory, and predict with order restored.

    python scripts/bench/scaling.py data                 10^3, 10^4, 10^5, 10^6 rows
    python scripts/bench/scaling.py data --largest --rounds 1    10^7 too: 1.3 GB of rows below --work
    python scripts/bench/scaling.py data --sizes 1000,50000

The rows are stretches of the shipped reviews of about 22 tokens (log-normal), made by a fixed seed. Reading, tokenising, opening and
ordering are calls of ftune's own functions in one fresh process; training (a few updates) and prediction are whole commands of a model of
one small layer, so that what is left is ftune. Memory of training is the high-water mark of the training process; ``beyond`` is what it is
above that of the fewest rows. Every answer of predict is held against its row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import harness
import material
import processes
import speed
from processes import resident_mb, timed

MAX_LENGTH = 128
STEPS = 8
OPENINGS = 5


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    folder = Path(given.work)
    start = material.bert(folder / "one_layer", "one_layer")
    files = {size: material.made_rows(folder / "rows" / f"{size}.jsonl", size) for size in given.sizes}
    warm = material.made_rows(folder / "rows" / "warm.jsonl", 100)
    runs, trained = [], None
    for number, size in harness.interleaved(given.rounds, given.sizes):
        cache = folder / "cache" / f"{size}-{number}"
        asked = {"train": files[size], "start": start, "warm": warm}
        phases = processes.job(__file__, "phases", asked, env={"FTUNE_CACHE": str(cache)}).result
        training, run = train(files[size], start, folder, given.device)
        trained = trained or run / "model"
        prediction = predict(files[size], trained, folder, given.device)
        runs.append({"rows": size, "round": number, **phases, **training, **prediction})
        processes.remove(cache)
    report(given, runs)


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "scaling_data")
    parser.add_argument("--sizes", default="1000,10000,100000,1000000", help="numbers of rows, with commas, the fewest first")
    parser.add_argument("--largest", action="store_true", help="10^7 rows too")
    given = harness.settle(parser.parse_args(typed), sizes="100,200", largest=False)
    given.sizes = [int(size) for size in given.sizes.split(",")] + [10**7] * given.largest
    return given


def phases_job(train: str, start: str, warm: str) -> dict[str, Any]:
    """Seconds of what stands before the first update, in the order in which ``ftune train`` does it.

    ``warm``: a few rows that are read first, so that imports are no part of the reading.
    """
    from finetune_cli import encoded, models, tasks
    from finetune_cli.batching import BatchPlan, epoch_order
    from finetune_cli.config.schema import DataConfig, ModelConfig
    from finetune_cli.data import load_splits
    from finetune_cli.engine.preparation import Encoder

    kind = tasks.get("text-classification")
    chosen, data, model = kind.Config(), DataConfig(train=train, validation=None, text="text", label="label"), ModelConfig(path=start)
    source = models.locate(model, offline=True)
    assert source is not None
    tokenizer = models.load_tokenizer(source, model, offline=True)
    load_splits(replace(data, train=warm), seed=1, stratify=kind.stratified, arrange=partial(kind.arrange_split, chosen))
    before = resident_mb()[0]
    splits, reading = timed(lambda: load_splits(data, seed=1, stratify=kind.stratified, arrange=partial(kind.arrange_split, chosen)))
    rows, after_reading = splits.rows["train"], resident_mb()[0]
    task = kind(chosen, kind.learn(chosen, data, rows, splits.roles)).reading_with(tokenizer)
    encoder = Encoder(task, tokenizer, MAX_LENGTH, data)
    examples, tokenising = timed(lambda: encoder.split(rows, splits.roles, splits.sources["train"]))
    after_tokenising, lengths = resident_mb()[0], examples.lengths()
    (entry,) = (encoded.cache_root() / "encoded").iterdir()
    openings = [timed(lambda: encoded.encode_once(_nothing_to_encode, entry.name))[1] for _ in range(OPENINGS)]
    _, again = timed(lambda: encoder.split(rows, splits.roles, splits.sources["train"]))
    ordering = {}
    for order in ("shuffled", "buckets"):
        plan = BatchPlan(batch_size=32, micro_tokens=4096, inference_tokens=4096, order=order, whole=False, reasons={})
        ordering[f"{order}_seconds"] = timed(partial(epoch_order, lengths, plan=plan, seed=1, epoch=0))[1]
    return {
        "tokens": int(lengths.sum()),
        "reading_seconds": reading,
        "reading_rows_per_second": len(rows) / reading,
        "tokenising_seconds": tokenising,
        "tokenising_rows_per_second": len(rows) / tokenising,
        "opening_ms": statistics.median(openings) * 1000,
        "second_run_ms": again * 1000,
        **ordering,
        "reading_mb": after_reading - before,
        "tokenising_mb": after_tokenising - after_reading,
    }


def _nothing_to_encode() -> Iterable[Any]:
    raise AssertionError("the cache has no such entry")


def train(file: Path, start: Path, folder: Path, device: str) -> tuple[dict[str, Any], Path]:
    """A few updates by the whole command; what it took, and the run."""
    keys = [f"model.path={start}", f"data.train={file}", "data.validation=null", "data.text=text", "data.label=label", "offline=true"]
    keys += [f"data.max_length={MAX_LENGTH}", f"train.steps={STEPS}", f"device={device}", f"run.root={folder / 'runs'}"]
    keys += [f"data.{gate}=1" for gate in ("max_truncated", "max_conflicts")]
    ended = processes.ftune("train", *keys, watch=True)
    memory = {} if ended.memory is None else {"train_mb": ended.memory.process_mb, "train_tree_mb": ended.memory.tree_mb}
    return {"train_wall_seconds": ended.wall_seconds, **memory}, Path(ended.out.strip())


def predict(file: Path, model: Path, folder: Path, device: str) -> dict[str, Any]:
    """Label every row by the whole command; its rate, its memory, and whether row and answer belong together."""
    output = folder / "predictions.jsonl"
    keys = [f"input={file}", f"output={output}", f"device={device}", "offline=true"]
    ended = processes.ftune("predict", str(model), *keys, watch=True)
    memory = {} if ended.memory is None else {"predict_mb": ended.memory.process_mb}
    check_order(file, output)
    return {"predict_rows_per_second": speed.told_rate(ended)[0], "predict_wall_seconds": ended.wall_seconds, **memory}


def check_order(file: Path, output: Path) -> None:
    """End the script where an answer is not that of the row in its place."""
    with file.open(encoding="utf-8") as rows, output.open(encoding="utf-8") as answers:
        for number, (row, answer) in enumerate(zip_longest(rows, answers), 1):
            if row is None or answer is None:
                sys.exit(f"predict gave {'more' if row is None else 'fewer'} answers than there are rows: {number}")
            told = json.loads(answer)
            if (told["row"], told["text"]) != (number, json.loads(row)["text"]):
                sys.exit(f"the answer in place {number} is about row {told['row']}: {told['text']}")


def report(given: argparse.Namespace, runs: harness.Runs) -> None:
    """A line for each number of rows."""
    table, fewest = [], harness.values(runs, "train_mb", rows=given.sizes[0])
    for size in given.sizes:
        of = partial(harness.values, runs, rows=size)
        beyond = [mb - statistics.median(fewest) for mb in of("train_mb")]
        table.append(
            [
                f"{size:,}",
                harness.told(of("reading_rows_per_second"), ",.0f"),
                harness.told(of("tokenising_rows_per_second"), ",.0f"),
                harness.told(of("opening_ms"), ".2f"),
                harness.told([1000 * s for s in of("shuffled_seconds")], ",.1f"),
                harness.told(of("train_mb"), ",.0f"),
                "" if size == given.sizes[0] else harness.told(beyond, ",.0f"),
                harness.told(of("predict_rows_per_second"), ",.0f"),
                harness.told(of("predict_mb"), ",.0f"),
            ]
        )
    caption = (
        f"Rows of about 22 tokens in JSON Lines, a BERT of one layer of 64 units, {STEPS} updates of 32 rows; medians (lowest to "
        f"highest) of {given.rounds} interleaved rounds. Opening: the token cache of a run before. "
        "Memory: resident set of the process, in MB of 2^20 bytes. predict: every answer in the place of its row."
    )
    columns = ["rows", "reading, rows/s", "tokenising, rows/s", "opening, ms", "order of an epoch, ms", "training, MB"]
    columns += [f"beyond {given.sizes[0]:,} rows, MB", "predict, rows/s", "predict, MB"]
    harness.finish(given, caption, columns, table, runs)


JOBS = {"phases": phases_job}

if __name__ == "__main__":
    processes.begin(main, JOBS)
