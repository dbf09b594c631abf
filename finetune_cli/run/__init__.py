"""The run directory: the only module that knows the names of its files."""

from __future__ import annotations

from finetune_cli.run.directory import Run, State, new_evaluation_dir
from finetune_cli.run.find import Found, find, looks_like_path, near_run
from finetune_cli.run.layout import run_around

__all__ = ["Found", "Run", "State", "find", "looks_like_path", "near_run", "new_evaluation_dir", "run_around"]
