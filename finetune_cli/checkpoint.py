"""A checkpoint: a folder that transformers can load by itself, plus what the task learnt and what a resume needs.

config.json model.safetensors tokenizer…   plain Hugging Face files
adapter_… base.json                        in place of model.safetensors where an adapter was trained: peft's files, and what tells its base
task.json config.yaml                      what eval and predict must know; the run's config: a folder moved alone still works
state.json state.safetensors               counters (floats in hex: exact) and optimizer moments; no pickle anywhere
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune_cli import adapters, console, models
from finetune_cli.adapters import Adapter
from finetune_cli.errors import Diverged, FtuneError, UserError
from finetune_cli.models import load_exact, quiet
from finetune_cli.snapshot import Snapshot, first_not_finite, write_tensors
from finetune_cli.storage import HELD, Background, Store, disk_trouble, parsed, sha256
from finetune_cli.tasks.base import Facts, Task

TASK_FILE, CONFIG_FILE, STATE_FILE, TENSORS_FILE = "task.json", "config.yaml", "state.json", "state.safetensors"
WEIGHTS_FILE = "model.safetensors"
"""transformers' own name."""
MOST_THREADS = 4096
"""No plan says more."""


@dataclass(frozen=True, slots=True)
class Saver:
    """Writes checkpoints of one run from copies, while training goes on; what never changes is turned into bytes once."""

    store: Store
    knowledge: Knowledge
    tokenizer: Any
    config_yaml: str
    adapter: Adapter | None = None
    """What is trained in place of the whole model."""
    _snapshot: Snapshot = field(default_factory=Snapshot)
    _writer: Background = field(default_factory=lambda: Background("checkpoint"))
    _unchanging: dict[str, bytes] = field(default_factory=dict)

    def save(
        self,
        step: int,
        model: nn.Module,
        state: Mapping[str, Any],
        *,
        best: bool,
        last: bool = False,
        first: Callable[[], object] = lambda: None,
        held: int = 0,
    ) -> None:
        """Commit model and state as ``step``: copied aside now, written in the background once the checkpoint before is whole.

        ``first`` runs before a byte is written; the checkpoint of step ``held`` stays, however few are kept. What fails is raised by the
        next ``save``, ``look`` or ``join``. Weights with NaN are refused, so that the good checkpoint stays the last. The
        ``last`` checkpoint of a run, which nothing goes on beside, and one that memory has no room to copy are written before this returns.
        """
        self.join()
        moments, skeleton = flatten(state)
        weights = self._weights(model)
        files = self._small_files(model) | {
            TASK_FILE: self.knowledge.to_json(),
            CONFIG_FILE: self.config_yaml.encode(),
            STATE_FILE: json.dumps(skeleton, sort_keys=True).encode(),
        }
        buffers = {buffer.data_ptr() for buffer in model.buffers()}
        learnt = [name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.data_ptr() not in buffers]
        copies = None if last else self._snapshot.take({"weights": weights, "moments": moments})

        def write(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
            self._snapshot.settle()
            if (bad := first_not_finite({name: weights[name] for name in learnt})) is not None:
                raise Diverged(f"the weights hold NaN or infinity, first in {bad}", where=f"step {step}", fix="start from other weights")
            if (bad := first_not_finite({k: t for k, t in moments.items() if t.is_floating_point()})) is not None:
                raise Diverged(
                    f"the optimizer's moments hold NaN or infinity, first in {bad}",
                    where=f"step {step}",
                    fix="train.clip=1 or a smaller optimizer.lr; then resume from the last checkpoint",
                )
            first()
            name = WEIGHTS_FILE if self.adapter is None else adapters.WEIGHTS_FILE
            tensors = {name: _writer(weights, {"format": "pt"}), TENSORS_FILE: _writer(moments or {"none": torch.zeros(0)})}
            self.store.save(step, {**files, **tensors}, best=best, meta={"closed": state.get("closed"), **({HELD: held} if held else {})})

        if copies is None:
            write(weights, moments)
        else:
            self._writer.start(lambda: write(**copies))

    def digests(self, model: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
        """sha256 of the files of tensors as ``save`` would write them now; ``state`` holds at least the tensors."""
        moments, _ = flatten(state)
        weights = WEIGHTS_FILE if self.adapter is None else adapters.WEIGHTS_FILE
        files = {weights: (self._weights(model), {"format": "pt"}), TENSORS_FILE: (moments or {"none": torch.zeros(0)}, None)}
        found = {}
        for name, (tensors, metadata) in files.items():
            sink = _Hashed()
            write_tensors(cast(BinaryIO, sink), tensors, metadata)
            found[name] = sink.sha256.hexdigest()
        return found

    def differing(self, model: nn.Module, directory: Path) -> list[str]:
        """Names of the weights that are not to the bit those of a checkpoint's file."""
        there = load_file(directory / (WEIGHTS_FILE if self.adapter is None else adapters.WEIGHTS_FILE))
        here = {name: tensor.detach().cpu() for name, tensor in self._weights(model).items()}
        return sorted(name for name in there.keys() | here.keys() if not _same(there.get(name), here.get(name)))

    def make_room(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Take the memory of a copy in the background, so that the first save need not wait for the machine to give it page by page."""
        moments, _ = flatten(state)
        self._writer.start(lambda: self._snapshot.make_room({"weights": self._weights(model), "moments": moments}, touch=True))

    def look(self) -> None:
        """Raise what went wrong with the checkpoint that was being written; never waits."""
        self._writer.look()

    def join(self) -> None:
        """Wait until the checkpoint that is being written is whole; raises what went wrong."""
        self._writer.join()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """After the block, however it ends, nothing is being written; an error of the block goes before one of writing."""
        try:
            yield
            self.join()
        except BaseException:
            try:
                self.join()
            except FtuneError as error:
                console.warn(f"nor could a checkpoint be written: {error.what}")
            raise
        finally:
            self._snapshot.release()

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What the file of weights holds, as it lies in the model now."""
        return models.saved_tensors(model) if self.adapter is None else self.adapter.tensors(model)

    def _small_files(self, model: Any) -> dict[str, Any]:
        """Hugging Face's files beside the tensors."""
        if not self._unchanging:
            self._unchanging.update(self._staged(self.tokenizer.save_pretrained))
        if self.adapter is None:
            return self._unchanging | self._staged(partial(models.save_without_tensors, model))
        return self._unchanging | self._staged(partial(_save_configs, model)) | self.adapter.small_files()

    def _staged(self, save: Callable[[Path], object]) -> dict[str, bytes]:
        """What ``save`` writes into a folder, by name."""
        quiet()
        with disk_trouble(self.store.fs, "writing a checkpoint", self.store.root):
            self.store.root.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".tmp-stage-", dir=self.store.root))
            try:
                save(staging)
                return {p.name: p.read_bytes() for p in sorted(staging.iterdir()) if p.is_file()}
            finally:
                shutil.rmtree(staging, ignore_errors=True)


class _Hashed:
    """A file whose bytes are only hashed."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> None:
        self.sha256.update(data)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal to the bit."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)


def _save_configs(model: Any, directory: Path) -> None:
    """What a model with an adapter is made from: its base's config, in full precision, and how it writes where it does."""
    adapters.in_full_config(model.config).save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def write_model(directory: Path, model: Any, tokenizer: Any) -> None:
    """Plain Hugging Face files: config, one safetensors file, tokenizer."""
    quiet()
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory, max_shard_size="1000GB")


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
            found = cls(**parsed(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{TASK_FILE} cannot be read: {error}", where=str(file), fix="name another checkpoint") from error
        with interpreting(directory):
            found._check()
        return found

    def _check(self) -> None:
        """Raise ValueError for what ftune never writes: the folder may come from anybody."""
        texts = [self.task, self.plan["device"]["device"], self.plan["device"]["precision"], self.plan["batches"]["order"]]
        names = [self.columns[name] for name in ("text", "text_pair", "label")]
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.facts, dict):
            raise ValueError("a text is another value")
        if not all(name is None or isinstance(name, str) or all(isinstance(n, str) for n in name) for name in names):
            raise ValueError("a column is no name")
        sizes = [self.max_length, *(self.plan["batches"][name] for name in ("batch_size", "micro_tokens", "inference_tokens"))]
        if type(self.seed) is not int or not all(type(size) is int and 0 < size < 1 << 40 for size in sizes):
            raise ValueError("a size is out of range")
        if type(threads := self.plan["device"]["threads"]) is not int or not 0 < threads <= MOST_THREADS:
            raise ValueError(f"{threads!r} threads")


@contextmanager
def interpreting(directory: Path) -> Iterator[None]:
    """Whatever a block raises that reads the facts of a folder means that ``task.json`` is not of ftune's making, or not this model's."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"{TASK_FILE} does not fit: {told}", where=str(directory / TASK_FILE), fix="name another checkpoint") from error


def verify_weights(directory: Path) -> None:
    """Raise UserError where an exported model's weights are not those that ftune wrote; other folders pass."""
    try:
        written = parsed((directory / TASK_FILE).read_text(encoding="utf-8"))["weights"].items()
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
        state = unflatten(parsed((directory / STATE_FILE).read_text()), tensors)
        if not isinstance(state["plan"]["packed"], bool):
            raise TypeError("it holds no plan")
        found: dict[str, Any] = state
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise unfit(directory, error) from error
    return found


def unfit(directory: Path, error: Exception) -> UserError:
    """A resume state that is not of ftune's making."""
    told = f"{type(error).__name__}: {error}"
    return UserError(f"the resume state cannot be read: {told}", where=str(directory), fix="resume from another checkpoint")


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """A tree of dicts, lists, tensors and plain values as (tensors by path, JSON skeleton). Floats are kept in hex."""
    tensors: dict[str, Tensor] = {}

    def walk(path: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
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


def _writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Callable[[BinaryIO], None]:
    return lambda file: write_tensors(file, tensors, metadata)
