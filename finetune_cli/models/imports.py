"""transformers' model classes, imported without what only other tasks need."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from typing import Any

from finetune_cli import collector

LOSSES = "transformers.loss.loss_utils"
NEEDS_SCIPY = "linear_sum_assignment"


def auto_class(name: str, model_config: Any) -> Any:
    """One of transformers' ``AutoModelFor…``, with the class that it has for a config."""
    with collector.resting(until="transformers.modeling_utils"):
        import transformers

        _import_losses()
        found = getattr(transformers, name)
        with suppress(Exception):  # what cannot be had is told where it is loaded
            found._model_mapping[type(model_config)]
    return found


def _import_losses() -> None:
    """Every model class brings the losses of object detection, and they bring scipy (a quarter of a second): here only once they ask."""
    if LOSSES in sys.modules or "scipy.optimize" in sys.modules:
        return
    from transformers import utils

    real = getattr(utils, "is_scipy_available", None)
    if real is None:
        return
    utils.is_scipy_available = lambda: False
    try:
        importlib.import_module(LOSSES)
    finally:
        utils.is_scipy_available = real
    modules = list(sys.modules.items())
    for name, module in modules:
        if name.startswith("transformers.loss.") and hasattr(module, "is_scipy_available"):
            module.is_scipy_available = real  # type: ignore[attr-defined]
            vars(module).setdefault(NEEDS_SCIPY, _linear_sum_assignment)


def _linear_sum_assignment(*given: Any, **named: Any) -> Any:
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    return linear_sum_assignment(*given, **named)
