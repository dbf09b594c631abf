"""A checkpoint: a folder that transformers can load by itself, plus what the task learnt and what a resume needs.

config.json model.safetensors tokenizer…   plain Hugging Face files
adapter_… base.json                        in place of model.safetensors where an adapter was trained: peft's files, and what tells its base
task.json config.yaml                      what eval and predict must know; the run's config: a folder moved alone still works
state.json state.safetensors               counters (floats in hex: exact) and optimizer moments; no pickle anywhere
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from finetune_cli import adapters
from finetune_cli.adapters import Adapter
from finetune_cli.errors import UserError
from finetune_cli.models import check_finite, load_exact, quiet
from finetune_cli.storage import Store, sha256
from finetune_cli.tasks.base import Facts, Task

TASK_FILE, CONFIG_FILE, STATE_FILE, TENSORS_FILE = "task.json", "config.yaml", "state.json", "state.safetensors"


@dataclass(frozen=True, slots=True)
class Saver:
    """Writes checkpoints of one run; what never changes while training is turned into bytes once."""

    store: Store
    knowledge: Knowledge
    tokenizer: Any
    config_yaml: str
    adapter: Adapter | None = None
    """What is trained in place of the whole model."""

    def save(self, step: int, model: nn.Module, state: Mapping[str, Any], *, best: bool) -> Path:
        """Commit model and state as ``step``. Weights with NaN are refused, so that the good checkpoint stays the last."""
        check_finite(model, f"step {step}")
        self.store.root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".tmp-stage-", dir=self.store.root))
        try:
            write_model(staging, model, self.tokenizer, self.adapter)
            files: dict[str, Any] = {p.name: p for p in sorted(staging.iterdir()) if p.is_file()}
            tensors, skeleton = flatten(state)
            files |= {
                TASK_FILE: self.knowledge.to_json(),
                CONFIG_FILE: self.config_yaml.encode(),
                STATE_FILE: json.dumps(skeleton, sort_keys=True).encode(),
                TENSORS_FILE: _writer(tensors),
            }
            return self.store.save(step, files, best=best, meta={"closed": state.get("closed")})
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_model(directory: Path, model: Any, tokenizer: Any, adapter: Adapter | None = None) -> None:
    """Plain Hugging Face files: config, one safetensors file, tokenizer. With an adapter, its files in place of the weights."""
    quiet()
    tokenizer.save_pretrained(directory)
    if adapter is None:
        model.save_pretrained(directory, max_shard_size="1000GB")
        return
    adapters.in_full_config(model.config).save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    for name, content in adapter.files(model).items():
        (directory / name).write_bytes(content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What eval and predict must know beside the weights; ``task.json`` of every checkpoint and of ``model/``."""

    task: str
    facts: Facts
    columns: dict[str, Any]
    """Data options that name the columns of training: text, text_pair, label."""
    max_length: int
    seed: int
    plan: dict[str, Any]
    """The run's plan for device and batches, so that eval computes what train computed."""
    weights: dict[str, str] = field(default_factory=dict)
    """Of ``model/``: sha256 of each file of weights. A checkpoint has a manifest instead."""

    def to_json(self) -> bytes:
        """JSON for ``task.json``."""
        told = {name: value for name, value in asdict(self).items() if name != "weights" or value}
        return json.dumps(told, ensure_ascii=False, indent=1).encode()

    @classmethod
    def read(cls, directory: Path) -> Knowledge | None:
        """That of a folder which ftune wrote; None for a plain Hugging Face model."""
        file = directory / TASK_FILE
        if not file.is_file():
            return None
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{TASK_FILE} cannot be read: {error}", where=str(file), fix="name another checkpoint") from error


def verify_weights(directory: Path) -> None:
    """Raise UserError where an exported model's weights are not those that ftune wrote; other folders pass."""
    try:
        written = json.loads((directory / TASK_FILE).read_text(encoding="utf-8"))["weights"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name, expected in written:
        file = directory / Path(str(name)).name
        if file.is_file() and sha256(file) != expected:  # a file that is missing is told by what loads it
            raise UserError(
                f"the model is damaged: {file.name} does not match its sha256 (corrupt)",
                where=str(directory),
                fix=f"name the run or a checkpoint in it, or copy it again; if the change is yours, take 'weights' out of {TASK_FILE}",
            )


def load_model(directory: Path, task: Task[Any], *, offline: bool = True, device: str = "cpu") -> tuple[nn.Module, Adapter | None]:
    """The model of a checkpoint or model directory, fp32, on the CPU: whole, or its base with its adapter in place.

    ``offline`` and ``device`` say how a base may be had, and where one of few bits would be held.
    """
    if adapters.is_adapted(directory):
        return adapters.restore(directory, task, offline=offline, device=device)
    return load_exact(directory, task), None


def load_weights(directory: Path, task: Task[Any], model: nn.Module, adapter: Adapter | None) -> None:
    """Give a model of the same run the weights of a checkpoint."""
    if adapter is None:
        model.load_state_dict(load_exact(directory, task).state_dict())
    else:
        adapters.load_trained(model, directory, adapter.whole)


def load_state(directory: Path) -> dict[str, Any]:
    """The resume state of a checkpoint."""
    try:
        tensors = load_file(directory / TENSORS_FILE)
        state = unflatten(json.loads((directory / STATE_FILE).read_text()), tensors)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the resume state cannot be read: {error}", where=str(directory), fix="resume from another checkpoint") from error
    assert isinstance(state, dict)
    return state


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """A tree of dicts, lists, tensors and plain values as (tensors by path, JSON skeleton). Floats are kept in hex."""
    tensors: dict[str, Tensor] = {}

    def walk(path: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"map": {str(k): walk(f"{path}.{k}", v) for k, v in value.items()}}
        if isinstance(value, (list, tuple)):
            return {"list": [walk(f"{path}.{i}", v) for i, v in enumerate(value)]}
        if isinstance(value, float):
            return {"float": value.hex()}
        return {"value": value}

    return tensors, walk("state", state)


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``flatten``."""
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {k: unflatten(v, tensors) for k, v in content.items()}
    if kind == "list":
        return [unflatten(v, tensors) for v in content]
    return float.fromhex(content) if kind == "float" else content


def _writer(tensors: dict[str, Tensor]) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(save(tensors) if tensors else save({"none": torch.zeros(0)}))

    return write
