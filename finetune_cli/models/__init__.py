"""Models and tokenizers: where they are, how they are loaded, built from scratch and run.

The order of search: a local directory or a run, the bundled files (sha256 checked), the hub. Weights come from safetensors; pickled
weights only where asked for, and then with ``weights_only``. Nothing of a model's own code runs unless the user says so.
"""

from __future__ import annotations

from finetune_cli.models.compiled import are_compiled, compile_layers, in_training, make_room_for_compiled
from finetune_cli.models.execution import (
    activation_bytes,
    attend_as_before,
    attend_by,
    bytes_on_disk,
    checkpoint_gradients,
    let_go,
    never_wait,
    parameters,
)
from finetune_cli.models.faults import quiet
from finetune_cli.models.hub import ask_hub
from finetune_cli.models.loading import load, load_config, load_exact, not_finite, skeleton
from finetune_cli.models.products import activated, ready_products
from finetune_cli.models.saving import save_without_tensors, saved_tensors
from finetune_cli.models.scratch import build, family, train_tokenizer
from finetune_cli.models.source import BUNDLED, BUNDLED_HUB_ID, Source, locate, of_run
from finetune_cli.models.tables import drop_table_gradients, keep_table_gradients
from finetune_cli.models.tokenizer import check_vocabulary, length_limit, load_tokenizer, tokenizer_digest

__all__ = [
    "BUNDLED",
    "BUNDLED_HUB_ID",
    "Source",
    "activated",
    "activation_bytes",
    "are_compiled",
    "ask_hub",
    "attend_as_before",
    "attend_by",
    "build",
    "bytes_on_disk",
    "check_vocabulary",
    "checkpoint_gradients",
    "compile_layers",
    "drop_table_gradients",
    "family",
    "in_training",
    "keep_table_gradients",
    "length_limit",
    "let_go",
    "load",
    "load_config",
    "load_exact",
    "load_tokenizer",
    "locate",
    "make_room_for_compiled",
    "never_wait",
    "not_finite",
    "of_run",
    "parameters",
    "quiet",
    "ready_products",
    "save_without_tensors",
    "saved_tensors",
    "skeleton",
    "tokenizer_digest",
    "train_tokenizer",
]
