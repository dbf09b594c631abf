"""Padding-free execution: the samples of a batch lie end to end in one row of tokens, and only attention sees where each begins.

The modules of the Hugging Face model itself run over that row, so weights, names and exports stay what they are. A model is packed only
after it proved, on samples of its own, that it answers as its own forward does; every other model is padded, and says why.
"""

from __future__ import annotations

from finetune_cli.packing.choosing import compile_layers, install, layout
from finetune_cli.packing.dropout import Dropout
from finetune_cli.packing.rows import Group, Packed, Packing

__all__ = ["Dropout", "Group", "Packed", "Packing", "compile_layers", "install", "layout"]
