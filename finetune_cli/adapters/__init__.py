"""Adapters: small trained matrices inside a model whose other weights, its base, stay as they were. peft makes them, in place: the model
keeps its class and its modules' names, so that every task's forward, packing and export meet it as they meet any model.

A checkpoint holds the adapter, the head and what tells the base again: its name and the hash of its weights.
"""

from __future__ import annotations

from finetune_cli.adapters.adapter import (
    WEIGHTS_FILE,
    Adapter,
    attach,
    bare,
    check,
    check_targets,
    in_full,
    is_adapted,
    load_trained,
    loading,
    merge,
    restore,
)
from finetune_cli.adapters.base import BASE, Base
from finetune_cli.adapters.quantised import in_full_config

__all__ = [
    "BASE",
    "WEIGHTS_FILE",
    "Adapter",
    "Base",
    "attach",
    "bare",
    "check",
    "check_targets",
    "in_full",
    "in_full_config",
    "is_adapted",
    "load_trained",
    "loading",
    "merge",
    "restore",
]
