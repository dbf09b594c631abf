"""ftune beside the libraries of one task: sentence-transformers on pairs of rows, TRL on conversations.

    python scripts/bench/task_peers.py             prints Markdown, writes scripts/results/task_peers.json
    python scripts/bench/task_peers.py --smoke     seconds, on few rows: shows that it works, measures nothing

A library that is not installed is left out, and that is said. Pairs: MiniLM learns from 32 texts an update that rows of one label lie near
each other; sentence-transformers from 16 pairs of texts (CosineSimilarityLoss, as SetFit has it), ftune from all pairs of its 32 rows.
Conversations: a small Llama with random weights learns the answers; TRL packs where FlashAttention is installed, which it needs for that.
rows/s counts texts or conversations; the first updates are left out.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu
import harness
import language_peers
import material
import peers
import processes
import public_sets

VARIANTS = {
    ("pairs", "sentence_transformers"): "sentence-transformers",
    ("pairs", "sentence_transformers_bf16"): "sentence-transformers, bf16",
    ("pairs", "ftune"): "ftune, task.few_shot=contrastive",
    ("chat", "trl"): "TRL, SFTTrainer, bf16 where the hardware has it",
    ("chat", "ftune"): "ftune",
}
LIBRARY = {"sentence_transformers": "sentence_transformers", "sentence_transformers_bf16": "sentence_transformers", "trl": "trl"}
BATCH, SEED, LONGEST = 32, 1, 64


def main(typed: Sequence[str] | None = None) -> None:
    given = arguments(typed)
    jobs = chosen(given.device)
    if not jobs:
        print("no library of one task is installed: there is nothing to measure, and nothing is written")
        return
    folder, work = Path(given.work), gpu.Work("", given.llama, 8, given.updates, max_length=1024, chat=True)
    rows = {"pairs": material.shipped_rows(folder / "rows", "train", BATCH * given.updates), "chat": folder / "rows" / "chats.jsonl"}
    material.made_chats(rows["chat"], work.batch * work.updates, turns=2, words=20)
    start = {
        "pairs": material.start(folder, given.encoder),
        "chat": material.llama(folder / "llama" / given.llama, given.llama, rows["chat"]),
    }
    runs = []
    for number, (task, side) in harness.interleaved(given.rounds, jobs):
        if side != "ftune":
            asked = {"side": side, "rows": rows[task], "start": start[task], "device": given.device, "warm": gpu.warm(work)}
            rate = processes.job(__file__, task, asked).result["rows_per_second"]
        else:
            pairs = gpu.Work("", "", BATCH, given.updates, max_length=LONGEST)
            more = ["model.pooling=mean", "task.few_shot=contrastive"] if task == "pairs" else []
            rate = gpu.ftune(rows[task], start[task], folder, given.device, pairs if task == "pairs" else work, more)["rows_per_second"]
        runs.append({"task": task, "side": side, "variant": f"{task}: {side}", "round": number, "rows_per_second": rate})
    report(given, runs)


def arguments(typed: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "task_peers")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--llama", default="small", choices=list(material.LLAMA), help="its shape")
    parser.add_argument("--encoder", default="minilm", choices=list(material.SHAPES))
    return harness.settle(parser.parse_args(typed), updates=3, llama="tiny", encoder="one_layer")


def chosen(device: str) -> list[tuple[str, str]]:
    """What can run here; what is left out is said. ftune alone is compared with nothing."""
    missing = {library for library in LIBRARY.values() if find_spec(library) is None}
    if missing:
        print(f"left out, not installed: {', '.join(sorted(missing))}", file=sys.stderr)
    there = [one for one in VARIANTS if LIBRARY.get(one[1]) not in missing]
    there = [one for one in there if not one[1].endswith("_bf16") or peers.fast_bf16(device)]
    return [one for one in there if any(other != one and other[0] == one[0] for other in there)]


def pairs_job(side: str, rows: str, start: str, device: str, warm: int) -> dict[str, Any]:
    """sentence-transformers on pairs, half of them of one label."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CosineSimilarityLoss

    read, draw = public_sets.read(Path(rows)), random.Random(SEED)
    couples = [(one, draw.choice([row for row in read if (row["label"] == one["label"]) == alike])) for one, alike in alternating(read)]
    texts = {name: [couple[i]["text"] for couple in couples] for i, name in enumerate(("sentence1", "sentence2"))}
    texts["label"] = [float(a["label"] == b["label"]) for a, b in couples]
    model = SentenceTransformer(start, device="cuda" if peers.on_gpu(device) else "cpu")
    model.max_seq_length = LONGEST
    watch, clock = peers.stopwatch(device, warm)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SentenceTransformerTrainingArguments(
            scratch, per_device_train_batch_size=BATCH // 2, bf16=side.endswith("_bf16"), use_cpu=not peers.on_gpu(device), **QUIET
        )
        loss = CosineSimilarityLoss(model)
        SentenceTransformerTrainer(model, settings, train_dataset=Dataset.from_dict(texts), loss=loss, callbacks=[watch]).train()
    return {"rows_per_second": (2 * len(couples) - warm * BATCH) / (clock["end"] - clock["begin"])}


def alternating(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], bool]]:
    """Every second row, and whether its partner is to be of its label: as many texts as there are rows."""
    return [(row, number % 2 == 0) for number, row in enumerate(rows[::2])]


def chat_job(side: str, rows: str, start: str, device: str, warm: int) -> dict[str, Any]:
    """TRL's SFTTrainer on the answers of conversations."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    read, tokenizer = public_sets.read(Path(rows)), AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = language_peers.MARKED_CHATML
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    watch, clock = peers.stopwatch(device, warm)
    packs = find_spec("flash_attn") is not None and peers.on_gpu(device)
    if packs:
        model.set_attn_implementation("flash_attention_2")
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            scratch,
            per_device_train_batch_size=8,
            max_length=1024,
            packing=packs,
            assistant_only_loss=True,
            gradient_checkpointing=False,
            bf16=peers.fast_bf16(device),
            use_cpu=not peers.on_gpu(device),
            **QUIET,
        )
        data = Dataset.from_list(read)
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[watch])
        trainer.train()
        share = 1 - min(warm, trainer.state.global_step - 1) / trainer.state.global_step
    return {"rows_per_second": len(read) * share / (clock["end"] - clock["begin"])}


QUIET: dict[str, Any] = {"num_train_epochs": 1, "learning_rate": 1e-5, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def report(given: argparse.Namespace, runs: harness.Runs) -> None:
    """Medians and ratios."""
    table = []
    for (task, side), told in VARIANTS.items():
        rate = harness.values(runs, "rows_per_second", task=task, side=side)
        own = harness.values(runs, "rows_per_second", task=task, side="ftune")
        if rate:
            table.append([task, told, harness.told(rate), "" if side == "ftune" else harness.ratio(own, rate)])
    left_out = sorted({library for library in LIBRARY.values() if find_spec(library) is None})
    caption = (
        f"Pairs: {given.encoder} shape on shipped reviews, 32 texts an update. Conversations: Llama, {given.llama} shape, 8 an update. "
        f"Medians (lowest to highest) of {given.rounds} interleaved rounds of {given.updates} updates. "
        f"Not installed here: {', '.join(left_out) or 'nothing'}."
    )
    harness.finish(given, caption, ["task", "side", "rows/s", "ftune is faster by"], table, runs)


if __name__ == "__main__":
    processes.begin(main, {"pairs": pairs_job, "chat": chat_job})
