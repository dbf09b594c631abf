"""One update computed again and taken apart: whether its numbers are finite, and if not, for which row and where in the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_cli.engine.trainer import Trainer
from finetune_cli.errors import Diverged, FtuneError
from finetune_cli.snapshot import first_not_finite

RETURNED = re.compile(r"Function '(\w+)' returned nan")
"""What autograd's anomaly detection says."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with an update; ``wrong`` is None where nothing is."""

    step: int
    loss: float
    gradient_norm: float
    wrong: str | None
    rows: np.ndarray
    """Examples that are enough for it: one, or the fewest that halving finds where no half is bad by itself."""
    others_too: bool
    """Whether the rest of the batch is bad without them."""
    place: dict[str, Any]
    """Pass, module, its class, operator, parameter."""


def advance(trainer: Trainer, step: int) -> int:
    """Make the updates before ``step``; the one to look at: ``step``, or an earlier one that is not finite already."""
    while trainer.state.step < step - 1:
        trainer.check()
        try:
            trainer.step()
        except Diverged:
            trainer.updater.drop_gradients()
            break
    return trainer.state.step + 1


def examine(trainer: Trainer) -> Finding:
    """Look into the next update of a trainer; its weights stay as they are."""
    step, rows = trainer.state.step + 1, trainer.rows_of(trainer.state.step)
    broken = first_not_finite({name: p.detach() for name, p in trainer.model.named_parameters()})
    loss, norm, wrong = _outcome(trainer, rows)
    if broken is not None:
        return Finding(step, loss, norm, f"the weights before it: {broken}", rows[:0], False, {"pass": "weights", "parameter": broken})
    if wrong is None:
        return Finding(step, loss, norm, None, rows[:0], False, {})

    def is_bad(part: np.ndarray) -> bool:
        return bool(len(part)) and _outcome(trainer, part)[2] is not None

    guilty = halved(rows, is_bad)
    rest = rows[~np.isin(rows, guilty)]
    return Finding(step, loss, norm, wrong, guilty, is_bad(rest), _place(trainer, guilty))


def halved(rows: np.ndarray, is_bad: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The fewest of some rows, bad together, that halving finds to be still bad."""
    while len(rows) > 1:
        middle = len(rows) // 2
        part = next((half for half in (rows[:middle], rows[middle:]) if is_bad(half)), None)
        if part is None:
            break
        rows = part
    return rows


def _outcome(trainer: Trainer, rows: np.ndarray) -> tuple[float, float, str | None]:
    """(loss, gradient norm, what is wrong) of some rows, weighted as in their batch."""
    try:
        loss = float(trainer.gradients(rows))
    except FtuneError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever an update raises is what is looked for
        trainer.updater.drop_gradients()
        return float("nan"), float("nan"), f"{type(error).__name__}: {error}"
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in trainer.updater.parameters if p.grad is not None]))
    trainer.updater.drop_gradients()
    if not np.isfinite(loss):
        return loss, norm, f"the loss is {loss}"
    return loss, norm, None if np.isfinite(norm) else f"the loss is {loss:.6g} and the gradient norm {norm}"


def _place(trainer: Trainer, rows: np.ndarray) -> dict[str, Any]:
    """Where numbers that are not finite come up first: in the forward pass, in the loss, or in the backward pass."""
    back = _Backward()
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True), _watched(trainer.model) as seen, back:
        warnings.simplefilter("ignore")
        try:
            loss, function = trainer.gradients(rows), None
        except Exception as error:  # noqa: BLE001  # anomaly detection raises RuntimeError, the update whatever it raised before
            loss, told = None, RETURNED.search(str(error))
            function = told[1] if told else None
    found: dict[str, Any] = {"pass": "forward", **seen}
    if not seen:
        where = "loss" if loss is not None and not bool(torch.isfinite(loss)) else "backward"
        found = {"pass": where, "operator": back.first or function}
    grads = {name: p.grad for name, p in reversed(list(trainer.model.named_parameters())) if p.grad is not None}
    trainer.updater.drop_gradients()
    bad = next((name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())), None)
    return found | ({"parameter": bad} if bad is not None and not seen else {})


class _Backward(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In the block, the first operator of the backward pass that gives an infinity or NaN; anomaly detection knows of NaN alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if self.first is None and (node := torch._C._current_autograd_node()) is not None:
            bad = any(tensor.numel() and not bool(torch.isfinite(tensor).all()) for tensor in _tensors(given))
            self.first = node.name() if bad else None
        return given


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Any]]:
    """In the block, the first module whose output is not finite is noted: a part comes before the whole that it is in."""
    seen: dict[str, Any] = {}

    def look(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if seen or not (bad := [tensor for tensor in _tensors(output) if not bool(torch.isfinite(tensor).all())]):
            return
        grad_fn = bad[0].grad_fn
        seen.update(
            module=name or "the model",
            kind=type(module).__name__,
            operator=None if grad_fn is None else grad_fn.name(),
            input_was_finite=all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(given)),
        )

    hooks = [
        module.register_forward_hook(lambda module, given, output, name=name: look(name, module, given, output))
        for name, module in model.named_modules()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
