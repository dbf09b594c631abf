"""The exported model: plain Hugging Face files in ``model/``, proved by a stranger's process to give the answers that were measured."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import finetune_cli
from finetune_cli import adapters
from finetune_cli.batching import Padded
from finetune_cli.checkpoint import CONFIG_FILE, STATE_FILE, TASK_FILE, TENSORS_FILE, Saver, write_model
from finetune_cli.data import Roles, Rows, texts
from finetune_cli.engine.inference import Labelled
from finetune_cli.errors import SelfCheckFailed
from finetune_cli.run import Run
from finetune_cli.storage import MANIFEST, sha256
from finetune_cli.tasks.base import Layout, Task

TOLERANCE = 1e-4
"""Largest difference of an fp32 logit, relative to its size where that is above 1."""
STORED_ROWS = 16
MOST_NUMBERS = 4096
"""Logits of one example that are compared; of more, as many are taken evenly."""
TRAINING_ONLY = {STATE_FILE, TENSORS_FILE, CONFIG_FILE, TASK_FILE, MANIFEST}
"""Files of a checkpoint that the exported model leaves out."""


def export(run: Run, checkpoint: Path, task: Task[Any], model: nn.Module, saver: Saver, card: str) -> nn.Module:
    """Write ``model/``: the best checkpoint's own files where they are the whole model, else a copy with all folded and merged in.

    An adapter that was merged also stands beside, in ``adapter/``; both give the same answers. Returns the model whose logits
    ``model/`` must give: the one that was measured, or the same in fp32 where that one's base was held in fewer bits.
    """
    files: dict[str, Any] = {"README.md": card.encode()}
    staging = Path(tempfile.mkdtemp(prefix=".tmp-model-", dir=run.path))
    try:
        full = adapters.in_full(model, saver.adapter)
        plain = copy.deepcopy(full) if saver.adapter else full
        if saver.adapter is not None:
            adapters.merge(plain)
        facts = task.fold(plain)
        if facts is None and saver.adapter is None:
            files |= {p.name: p for p in checkpoint.iterdir() if p.is_file() and p.name not in TRAINING_ONLY}
        else:
            write_model(staging, plain, saver.tokenizer)
            files |= {p.name: p for p in staging.iterdir() if p.is_file()}
        if saver.adapter is not None:
            files["adapter"] = saver.adapter.files(model, head=plain)
        weights = {name: sha256(path) for name, path in files.items() if name.endswith(".safetensors")}
        files[TASK_FILE] = replace(saver.knowledge, facts=facts or saver.knowledge.facts, weights=weights).to_json()
        run.write_model(files)
        return full if saver.adapter is not None and saver.adapter.base.is_quantised else model
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def thin(logits: np.ndarray) -> np.ndarray:
    """At most ``MOST_NUMBERS`` of an example's logits, as the stranger's process takes them."""
    flat = logits.reshape(-1)
    return flat if len(flat) <= MOST_NUMBERS else flat[np.linspace(0, len(flat) - 1, MOST_NUMBERS).astype(np.int64)]


def _plain_texts(rows: Rows, roles: Roles, limit: int) -> dict[str, Any]:
    """What a stranger's tokenizer must turn into the very same tokens."""
    pairs = texts(rows, roles.text_pair) if roles.text_pair else None
    return {"texts": texts(rows, roles.text), "pairs": pairs, "max_length": limit}


@dataclass(frozen=True, slots=True)
class ReloadCheck:
    """A running check: what we computed, and the process that must compute the same."""

    process: subprocess.Popen[bytes]
    ours: list[np.ndarray]

    @classmethod
    def start(
        cls,
        run: Run,
        task: Task[Any],
        model: nn.Module,
        data: Labelled,
        rows: Rows,
        roles: Roles,
        *,
        layout: Layout | None,
        limit: int,
    ) -> ReloadCheck:
        """Compute fp32 logits of a few stored examples, spread over the split, and start the stranger's process on the same ones.

        ``layout`` is what the model reads; None: plain rows alone.
        """
        chosen = np.unique(np.linspace(0, len(data.examples) - 1, STORED_ROWS).astype(np.int64))
        plain = Padded({"input_ids": task.tokenizer.pad_token_id or 0}, limit).tight()
        own = plain if layout is None else layout.tight()
        model.eval()
        where = next(model.parameters()).device
        inputs, ours = [], []
        for number in chosen:
            one = data.examples.take(np.array([number]))
            targets = None if data.targets is None else data.targets[one.row]
            batches = [task.collate(one.columns, targets, way, key=0) for way in (plain, own)]
            inputs.append({name: tensor.tolist() for name, tensor in batches[0].inputs.items()})
            with torch.inference_mode():
                ours.append(thin(task.reproducible(model, batches[1].to(where))))
        asked = {
            "model": str(run.model_dir),
            "auto_class": task.auto_class,
            "inputs": inputs,
            "most": MOST_NUMBERS,
            **(_plain_texts(rows.take(data.examples.row[chosen]), roles, limit) if task.plain_texts else {}),
            "threads": torch.get_num_threads(),
        }
        program = Path(finetune_cli.__file__).with_name("reload_check.py")
        process = subprocess.Popen(
            [sys.executable, "-I", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is ours to answer
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(asked).encode())
        process.stdin.close()
        return cls(process, ours)

    def finish(self) -> str:
        """Wait and compare. Raises SelfCheckFailed where the exported model does not load or answers differently."""
        assert self.process.stdout is not None and self.process.stderr is not None
        output, errors = self.process.stdout.read(), self.process.stderr.read()
        code = self.process.wait()
        fix = "keep the run: checkpoints/best holds what was measured; please report this as a bug of ftune"
        if code:
            last = errors.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {code}"]
            raise SelfCheckFailed(f"the exported model does not load in plain transformers: {last[0]}", where="model/", fix=fix)
        theirs = [np.asarray(numbers) for numbers in json.loads(output)]
        if [len(numbers) for numbers in theirs] != [len(numbers) for numbers in self.ours]:
            raise SelfCheckFailed("the exported model answers in another shape", where="model/", fix=fix)
        worst = max(float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b)))) for a, b in zip(theirs, self.ours, strict=True))
        if not worst <= TOLERANCE:
            raise SelfCheckFailed(f"the exported model answers differently: a logit is off by {worst:.2g}", where="model/", fix=fix)
        return f"plain transformers gives the same logits on {len(theirs)} stored rows (largest difference {worst:.1g})"

    def abort(self) -> None:
        """Stop a check that nobody waits for any more."""
        self.process.kill()
        self.process.wait()
