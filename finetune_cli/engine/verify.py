"""What a resume computes again before its first update: that what was loaded is what was saved, and leads where it led before.

Weights and moments are hashed as they now lie in memory and compared with the checkpoint's manifest; the rows of the next updates with the
digests that the checkpoint promises; the next loss with what the run that was killed had on record of it, if it came so far. To the run
that is never interrupted this costs two rows' worth of hashing a checkpoint and one line in ``witness.jsonl``.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_cli import console
from finetune_cli.batching import BatchPlan
from finetune_cli.device import DevicePlan
from finetune_cli.engine import environment
from finetune_cli.engine.inference import Labelled
from finetune_cli.errors import SelfCheckFailed

if TYPE_CHECKING:
    from finetune_cli.engine.trainer import Trainer

BENDS_ROWS = ("data.", "task.", "model.", "train.seed", "train.batch_size", "train.order")
"""Keys (or their beginnings) whose change makes other rows, or another loss, of the next update."""
DRAWS = ("device", "processes", "micro_tokens", "packed", "compiled")
"""Grounds on which dropout draws other numbers: losses on different ones cannot be compared."""
NEAR = 0.05
"""Share by which a loss may differ where rounding is all that can differ."""
FIX = "resume from another checkpoint (resume=RUN/checkpoints/step-…), or with the versions and the machine that the run began with"


def rows_digest(data: Labelled, indices: np.ndarray) -> str:
    """A hash of examples: which they are, their tokens and their targets."""
    digest = hashlib.blake2b(digest_size=12)
    examples = data.examples.take(indices)
    targets = None if data.targets is None else data.targets[examples.row]
    for array in _arrays({"indices": np.asarray(indices), **examples.columns, "targets": targets}):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _arrays(value: Any) -> Iterator[np.ndarray]:
    """Every array inside a value, in a fixed order."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield value
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from _arrays(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _arrays(item)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _arrays(getattr(value, f.name))


def grounds(device: DevicePlan, plan: BatchPlan) -> dict[str, Any]:
    """What the bits of a loss depend on beside the run's config, data and weights."""
    return {
        "device": device.device.type,
        "precision": device.precision,
        "threads": device.threads,
        "processes": device.processes,
        "deterministic": device.deterministic,
        "compiled": device.compiled,
        "micro_tokens": plan.micro_tokens,
        "packed": plan.packed,
        **_machine(device.device.type),
    }


@functools.cache
def _machine(kind: str) -> dict[str, Any]:
    """Versions and processor of this process, which do not change in its life."""
    versions, hardware = environment.versions(), environment.hardware()
    named = {name: versions.get(name) for name in ("ftune", "torch", "transformers")}
    return {**named, "hardware": hardware.get("gpus") if kind == "cuda" else hardware["cpu"]}


def confirm(trainer: Trainer, checkpoint: Path, changed: Sequence[str] = ()) -> None:
    """Raise SelfCheckFailed unless the state that was loaded is the one that was saved. Every process calls this at the same point.

    ``changed`` are the keys that the user lets differ: where they make other rows, only weights and moments are compared.
    """
    told: list[str] = []
    expected: dict[str, Any] | None = None
    bent = sorted({key for key in changed if key.startswith(BENDS_ROWS)})
    if trainer.world.leads:
        told = [_state(trainer, checkpoint)]
        if not bent:
            told += _rows(trainer, checkpoint)
            expected = None if _is_over(trainer) else trainer.run.witness(trainer.state.step + 1)
    expected = trainer.world.share(expected)
    if expected is not None:
        told.append(_loss(trainer, expected, checkpoint))
    if trainer.world.leads:
        left = f"; rows and loss are not compared, since {', '.join(bent)} may differ" if bent else ""
        console.say(f"resumed state verified: {', '.join(told)}{left}")


def _is_over(trainer: Trainer) -> bool:
    return trainer.state.finished or trainer.state.step >= trainer.timetable.total


def _state(trainer: Trainer, checkpoint: Path) -> str:
    """Hash weights and moments where they lie now, as files of a checkpoint."""
    try:
        manifest = trainer.run.store.read_manifest(checkpoint)["files"]
    except ValueError as error:
        raise SelfCheckFailed(f"the checkpoint changed while it was read: {error}", where=str(checkpoint), fix=FIX) from error
    now = trainer.saver.digests(trainer.model, {"optimizer": trainer.updater.state()})
    weights, moments = now
    if now[weights] != manifest[weights]["sha256"] and (names := trainer.saver.differing(trainer.model, checkpoint)):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise SelfCheckFailed(f"weights differ from the checkpoint's once loaded: {names[0]}{more}", where=str(checkpoint), fix=FIX)
    if now[moments] != manifest[moments]["sha256"]:
        raise SelfCheckFailed("the optimizer's moments differ from the checkpoint's once loaded", where=str(checkpoint), fix=FIX)
    return "weights and moments (sha256)"


def _rows(trainer: Trainer, checkpoint: Path) -> list[str]:
    """Compare the rows of the next updates with those that the checkpoint promises."""
    step, promised = trainer.state.step, trainer.promised
    for number, (then, now) in enumerate(zip(promised, trainer.next_rows(), strict=False), step + 1):
        if then != now:
            raise SelfCheckFailed(
                f"other rows: update {number} would not learn from the examples that the checkpoint says come next",
                where=str(checkpoint),
                fix="resume with the versions, the tokenizer and the data that the run began with",
            )
    return [f"rows of the next {len(promised)} updates" if len(promised) > 1 else "rows of the next update"] if promised else []


def _loss(trainer: Trainer, expected: Mapping[str, Any], checkpoint: Path) -> str:
    """Compute the loss of the next update and compare it: to the bit on the same grounds, nearly where only rounding may differ."""
    then, step = float.fromhex(str(expected["loss"])), trainer.state.step + 1
    here = grounds(trainer.device, trainer.plan)
    differ = [name for name, value in here.items() if value != dict(expected["grounds"]).get(name)]
    if draws := [name for name in differ if name in DRAWS]:
        return f"not the loss of step {step} (other {', '.join(draws)} than when it was recorded)"
    now = _computed(trainer)
    if now == then and differ:
        return f"loss of step {step} (equal, with other {', '.join(differ)}: later ones may differ in the last bits)"
    if now == then:
        return f"loss of step {step} ({'to the bit' if trainer.device.deterministic else 'equal'})"
    exact = not differ and trainer.device.deterministic and grounds(trainer.device, trainer.plan) == here
    if exact or abs(now - then) > NEAR * max(abs(then), 1.0) or not math.isfinite(now):
        why = f"; other {', '.join(differ)} than then" if differ else ""
        raise SelfCheckFailed(
            f"another loss: step {step} gives {now!r} now and gave {then!r} before the run ended{why}", where=str(checkpoint), fix=FIX
        )
    return f"loss of step {step} (nearly: {now:.6g}, it was {then:.6g}; {'other ' + ', '.join(differ) if differ else 'not deterministic'})"


def _computed(trainer: Trainer) -> float:
    """The next update's loss, without the update; buffers that a forward pass moves are put back."""
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    loss = float(trainer.backward())
    trainer.updater.drop_gradients()
    for name, buffer in trainer.model.named_buffers():
        buffer.copy_(buffers[name])
    return loss
