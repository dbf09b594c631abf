"""ftune beside Trainer and pipeline on one GPU, with the share of the device's own peak that real tokens get (MFU).

    python scripts/bench/gpu.py                    all works; prints Markdown, writes scripts/results/gpu.json
    python scripts/bench/gpu.py --only base_short,predict --rounds 5
    python scripts/bench/gpu.py --device cpu --tiny    the whole way with tiny models on a CPU, in seconds: it measures nothing

Nothing is fetched: models are built from config with random weights, rows are stretches of the shipped reviews. The peak is that of a
product of square matrices, measured on the device first. Work is counted on real tokens, as the model needs it: 6 operations for each
weight of the layers and token in training, 2 in prediction, and attention's products (half of them where attention is causal); embeddings
and heads are not counted, padding neither. Every side's first updates are left out of the clock, and its checkpoints and scores too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import language_peers
import material
import peers
import processes
import public_sets
import speed

VARIANTS = {
    "trainer": "Trainer, eager, fp32",
    "trainer_best": "Trainer, best flags: bf16, group_by_length, tf32",
    "trainer_compile": "Trainer, best flags and torch_compile",
    "pipeline": "pipeline, batch 32",
    "trainer_bf16": "Trainer.predict, bf16_full_eval",
    "ftune": "ftune",
}
TRAINING, PREDICTION = ("trainer", "trainer_best", "trainer_compile", "ftune"), ("pipeline", "trainer_bf16", "ftune")


@dataclass(frozen=True)
class Work:
    """One line of work: a model's shape, rows and how many of them an update has."""

    told: str
    shape: str
    batch: int
    updates: int
    words: tuple[float, float, int, int] = (material.WORDS_A_ROW, 0.5, 1, 90)
    max_length: int = 512
    chat: bool = False
    predict: bool = False
    variants: tuple[str, ...] = TRAINING


WORKS = {
    "base_short": Work("BERT-base, batch 32, lengths like SST-2's", "base", 32, 150),
    "base_long": Work("BERT-base, batch 64, 128 to 512 tokens", "base", 64, 60, (220, 0.4, 110, 400)),
    "large_long": Work("BERT-large, batch 64, 128 to 512 tokens", "large", 64, 40, (220, 0.4, 110, 400)),
    "llama_chat": Work("Llama of 1 B, chats, at most 4,096 tokens", "1b", 24, 30, max_length=4096, chat=True, variants=TRAINING[1:]),
    "predict": Work("BERT-base, prediction, lengths like SST-2's", "base", 32, 1500, predict=True, variants=PREDICTION),
}
WARM, SEED = 10, 1


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    folder = Path(given.work)
    peak = processes.job(__file__, "probe", {"device": given.device, "size": given.probe}).result
    wanted = {name: tiny(WORKS[name]) if given.smoke else WORKS[name] for name in given.only.split(",")}
    files = {name: material_of(name, work, folder) for name, work in wanted.items()}
    jobs = [(name, variant) for name, work in wanted.items() for variant in chosen(given, work)]
    runs = []
    for number, (name, variant) in harness.interleaved(given.rounds, jobs):
        asked = {"rows": files[name][0], "start": files[name][1], "folder": folder / name, "device": given.device, "work": wanted[name]}
        runs.append({"work": name, "variant": variant, "round": number, **measured(variant, asked, given.smoke)})
    report(given, wanted, files, runs, peak)


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "gpu")
    parser.add_argument("--tiny", dest="smoke", action="store_true", help="as --smoke")
    parser.add_argument("--only", default=",".join(WORKS), help="which works, with commas: " + ", ".join(WORKS))
    parser.add_argument("--probe", type=int, default=8192, help="side of the matrices that find the peak")
    given = harness.settle(parser.parse_args(typed), probe=128)
    if not given.smoke and not peers.on_gpu(given.device):
        sys.exit("there is no CUDA device here: --device cpu --tiny goes the whole way with tiny models")
    return given


def tiny(work: Work) -> Work:
    """The same work in seconds on a CPU."""
    shape = "tiny" if work.chat else "one_layer"
    return Work(f"{work.told}: tiny here", shape, 4, 3, (8, 0.3, 2, 20), 64, work.chat, work.predict, work.variants)


def material_of(name: str, work: Work, folder: Path) -> tuple[Path, Path]:
    """(file of rows, model to begin with); what is there is taken as it is."""
    count = work.batch * work.updates
    file = folder / "rows" / f"{name}-{count}.jsonl"
    if work.chat:
        words = 60 if work.max_length > 1000 else 4
        chats = material.made_chats(file, count, words=words)
        return file, material.llama(folder / "llama" / work.shape, work.shape, chats)
    material.made_rows(file, count, words=work.words)
    plain = material.bert(folder / "bert" / work.shape, work.shape)
    return file, material.with_head(plain, folder / "bert" / f"{work.shape}-classifier") if work.predict else plain


def chosen(given: argparse.Namespace, work: Work) -> list[str]:
    """The variants that can run here; compiling on a CPU takes minutes for nothing."""
    there = [v for v in work.variants if v != "trainer_compile" or (peers.on_gpu(given.device) and not given.smoke)]
    return harness.without_trainer([v for v in there if v != "trainer_bf16" or peers.fast_bf16(given.device)], smoke=given.smoke)


def measured(variant: str, asked: dict[str, Any], smoke: bool) -> dict[str, Any]:
    """The figures of one run; where memory is too small for a side, that is its result and the others go on."""
    try:
        return ftune(**asked) if variant == "ftune" else peer(variant, **asked)
    except SystemExit as end:
        if smoke:
            raise
        print(f"{variant} failed: {str(end)[-2000:]}", file=sys.stderr)
        return {"failed": str(end)[-400:]}


# -- ftune ---------------------------------------------------------------------------------------
def ftune(rows: Path, start: Path, folder: Path, device: str, work: Work, more: Sequence[str] = ()) -> dict[str, Any]:
    """The command, and its rate as it says it itself. ``more``: further keys of its command line."""
    if work.predict:
        keys = [f"input={rows}", f"output={folder / 'predictions.jsonl'}", f"device={device}", f"data.max_length={work.max_length}"]
        folder.mkdir(parents=True, exist_ok=True)
        return {"rows_per_second": speed.told_rate(processes.ftune("predict", str(start), *keys, "offline=true"))[0]}
    keys = [f"model.path={start}", f"data.train={rows}", "data.validation=null", f"data.max_length={work.max_length}", "offline=true"]
    keys += ["task=text-generation"] if work.chat else ["data.text=text", "data.label=label"]
    keys += [f"data.{gate}=1" for gate in ("max_truncated", "max_conflicts", "max_unknown")]
    keys += [f"train.batch_size={work.batch}", "train.epochs=1", f"train.log_every={warm(work)}", f"train.seed={SEED}"]
    keys += ["optimizer.lr=1e-5", f"device={device}", f"run.root={folder / 'runs'}", *more]
    run = Path(processes.ftune("train", *keys).out.strip())
    times = [json.loads(line) for line in (run / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [b["step"] - a["step"] for a, b in pairwise(times)]
    seconds = [n * work.batch / t["train/samples_per_second"] for n, t in zip(steps, times[1:], strict=True)]
    plan = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["plan"]["batches"]
    processes.remove(run / "checkpoints")
    return {
        "rows_per_second": sum(steps) * work.batch / sum(seconds),
        "memory_mb": times[-1]["memory_mb"],
        "layout": plan["reasons"].get("layout", ""),
        "micro_tokens": plan["micro_tokens"],
    }


def warm(work: Work) -> int:
    """Updates before the clock starts, on every side."""
    return min(WARM, max(1, work.updates // 3))


# -- its peers -----------------------------------------------------------------------------------
def peer(variant: str, rows: Path, start: Path, folder: Path, device: str, work: Work) -> dict[str, Any]:
    """A peer in a process of its own."""
    asked = {"variant": variant, "rows": rows, "start": start, "device": device, "batch": work.batch, "warm": warm(work)}
    if work.predict:
        return processes.job(__file__, "predict", asked).result
    return processes.job(__file__, "train", {**asked, "chat": work.chat, "max_length": work.max_length}).result


def predict_job(variant: str, rows: str, start: str, device: str, batch: int, warm: int) -> dict[str, Any]:
    """``pipeline`` or Trainer answers every row, after some that nobody counts."""
    read = public_sets.read(Path(rows))
    peers.predict(Path(start), read[: batch * warm], how=variant, device=device)
    return {"rows_per_second": peers.predict(Path(start), read, how=variant, device=device)["samples_per_second"]}


def train_job(variant: str, rows: str, start: str, device: str, batch: int, warm: int, chat: bool, max_length: int) -> dict[str, Any]:
    """Trainer, one epoch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding

    read, tokenizer = public_sets.read(Path(rows)), AutoTokenizer.from_pretrained(start)
    if chat:
        model, collate = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32), DataCollatorForSeq2Seq(tokenizer)
        chats = [language_peers.chat(tokenizer, {**row, "tools": None}) for row in read]
        examples = [{key: values[:max_length] for key, values in one.items()} for one in chats]
    else:
        (model, _), collate = peers.build(Path(start), 2, SEED), DataCollatorWithPadding(tokenizer)
        examples = peers.encoded(tokenizer, read, labelled=True, regression=False, max_length=max_length)
    flags = {} if variant == "trainer" else peers.best(device) | ({"tf32": True} if peers.on_gpu(device) else {})
    flags |= {"torch_compile": True} if variant == "trainer_compile" else {}
    recipe = peers.Recipe(batch_size=batch, lr=1e-5, max_length=max_length)
    with peers.fitted(model, examples, collate, seed=SEED, recipe=recipe, device=device, flags=flags, warm=warm) as (_, seconds):
        memory = torch.cuda.max_memory_allocated() / 2**20 if peers.on_gpu(device) else None
        return {"rows_per_second": (len(examples) - warm * batch) / seconds, "memory_mb": memory}


def probe_job(device: str, size: int) -> dict[str, Any]:
    """The most operations a second that products of square matrices reach, in the precision of the mixed sides."""
    import torch

    place = torch.device("cuda" if peers.on_gpu(device) else "cpu")
    dtype = torch.bfloat16 if peers.fast_bf16(device) else torch.float32
    a, b = (torch.randn(size, size, device=place, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        if place.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 10)
    return {"peak": 2 * size**3 / best, "precision": str(dtype).removeprefix("torch."), "size": size}


# -- what it comes to ----------------------------------------------------------------------------
def operations(work: Work, rows: Path, start: Path) -> tuple[float, float]:
    """(tokens, operations) of a row, on average: what the model needs for its real tokens."""
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    read, hidden, layers = public_sets.read(rows), config.hidden_size, config.num_hidden_layers
    if work.chat:
        lengths = [len(language_peers.chat(tokenizer, {**row, "tools": None})["input_ids"]) for row in read]
        keys = hidden * config.num_key_value_heads // config.num_attention_heads
        weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    else:
        lengths = [len(ids) for ids in tokenizer([row["text"] for row in read])["input_ids"]]
        weights = 4 * hidden * hidden + 2 * hidden * config.intermediate_size
    cut = [min(n, work.max_length) for n in lengths]
    attended = 2 * hidden * (0.5 if work.chat else 1.0)  # products of one token with another, twice: scores and values
    passes = 2 if work.predict else 6
    return statistics.mean(cut), statistics.mean(passes * layers * (weights * n + attended * n * n) for n in cut)


def report(
    given: argparse.Namespace, works: dict[str, Work], files: dict[str, tuple[Path, Path]], runs: harness.Runs, peak: dict[str, Any]
) -> None:
    """Medians, ratios, and shares of the peak."""
    table = []
    for name, work in works.items():
        tokens, cost = operations(work, *files[name])
        own = harness.values(runs, "rows_per_second", work=name, variant="ftune")
        for variant in work.variants:
            of = partial(harness.values, runs, work=name, variant=variant)
            if rate := of("rows_per_second"):
                share = harness.told([100 * r * cost / peak["peak"] for r in rate], ".1f")
                ratio = "" if variant == "ftune" else harness.ratio(own, rate)
                cells = [harness.told(rate), harness.told([r * tokens for r in rate], ",.0f"), share, harness.told(of("memory_mb"), ",.0f")]
                table.append([work.told, VARIANTS[variant], *cells, ratio])
            elif of("failed"):
                table.append([work.told, VARIANTS[variant], "failed", "", "", "", ""])
    layouts = sorted({run["layout"] for run in runs if "layout" in run})
    caption = (
        f"Models with random weights, rows of shipped reviews; medians (lowest to highest) of {given.rounds} interleaved rounds, each in "
        "its own process, the first updates left out. "
        f"Peak: {peak['peak'] / 1e12:,.1f} TFLOP/s in products of {peak['precision']} matrices "
        f"of {peak['size']:,}. MFU: of that, what the real tokens need. ftune's layouts: {'; '.join(layouts)}."
    )
    columns = ["work", "side", "rows/s", "real tokens/s", "MFU, %", "memory, MB", "ftune is faster by"]
    harness.finish(given, caption, columns, table, runs, peak=peak)


if __name__ == "__main__":
    processes.begin(main, {"probe": probe_job, "train": train_job, "predict": predict_job})
