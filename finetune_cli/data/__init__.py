"""From files to rows: every format read strictly into Arrow, columns found, splits made, and what is wrong with the data counted."""

from __future__ import annotations

from finetune_cli.data.audit import SplitRow, SplitTable, TokenCounts, audit, problems
from finetune_cli.data.label_audit import judge_labels, unknown_label
from finetune_cli.data.labels import canonical, has_several_labels, label_cells, label_names, missing, targets, text_of, texts
from finetune_cli.data.readers import read, stream
from finetune_cli.data.references import References, gather_references
from finetune_cli.data.roles import NoColumn, Roles, find_roles
from finetune_cli.data.rows import Caution, Rows, concat
from finetune_cli.data.splits import Splits, load_splits
from finetune_cli.data.without_pandas import go_without_pandas

go_without_pandas()  # before any column is made

__all__ = [
    "Caution",
    "NoColumn",
    "References",
    "Roles",
    "Rows",
    "SplitRow",
    "SplitTable",
    "Splits",
    "TokenCounts",
    "audit",
    "canonical",
    "concat",
    "find_roles",
    "gather_references",
    "has_several_labels",
    "judge_labels",
    "label_cells",
    "label_names",
    "load_splits",
    "missing",
    "problems",
    "read",
    "stream",
    "targets",
    "text_of",
    "texts",
    "unknown_label",
]
