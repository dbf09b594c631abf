"""Layers compiled for training by ``torch.compile``: one graph for all layers of a kind and for rows of any number, run where gradients are
wanted. Scoring runs the layers as they are: it would have to compile them again, for fewer batches.

Fused kernels round less often than the operators that they are made of, so results are the same to rounding, not to the bit.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from finetune_cli.errors import MachineError

_MARK = "_ftune_compiled"


def compile_layers(model: Any) -> None:
    """Let the layers of a model, and whoever runs their parts in an order of its own, run compiled while it is trained."""
    setattr(model.base_model, _MARK, True)
    for layer in _layers(model):
        if "forward" not in vars(layer):
            layer.forward = MethodType(_forward, layer)


def are_compiled(base: nn.Module) -> bool:
    """Whether ``compile_layers`` was asked for a base model."""
    return bool(getattr(base, _MARK, False))


def in_training(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled where gradients are wanted, and itself elsewhere."""

    def called(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*inputs, **named)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return _compiled(function)(*inputs, **named)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            told = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            fix = "device.compile=false, or a compiler that works (CXX names it)"
            raise MachineError(f"the layers cannot be compiled here: {told[:200]}", where="device.compile", fix=fix) from error

    return called


def make_room_for_compiled() -> None:
    """Let what is compiled lie in a directory that nobody else can write to, which ends with this process and serves those it starts."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():  # a name that can be guessed, and taken
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="ftune-compiled-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules that a model repeats: those of its outermost lists."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _layers(child)
    return found


def _forward(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    own = type(layer).forward
    return in_training(own)(layer, *inputs, **named) if layer.training else own(layer, *inputs, **named)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One for all layers of a kind."""
    import torch._inductor.config
    from tqdm import tqdm  # type: ignore[import-untyped]

    make_room_for_compiled()
    logging.getLogger("torch.fx.experimental.sym_node").setLevel(logging.ERROR)  # it tells of a signal's exception
    tqdm.set_lock(threading.RLock())  # the compiler's own use of it makes a semaphore, which whoever ends at once would leave behind
    torch._inductor.config.compile_threads = 1  # no processes that outlive this one or get its signals
    torch._inductor.config.cpp_cache_precompile_headers = False  # they lie in /tmp under a name that can be guessed, wherever the rest lies
    found: Callable[..., Any] = torch.compile(function, dynamic=True)
    return found
