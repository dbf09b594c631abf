"""The report of a run or an evaluation: ``index.html`` (one file, no network, no script), ``report.md``, and the model card.

A report is plain data; what a task has to show comes as ``tasks.sections``. Everything that came out of data or config is escaped
at the last moment, by the template or by the functions of ``markdown``; a report of the same data is the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from finetune_cli.report.card import model_card
from finetune_cli.report.content import Report
from finetune_cli.report.html import page
from finetune_cli.report.markdown import document
from finetune_cli.storage import REAL, FileSystem, make_folders, write_whole

__all__ = ["Report", "document", "model_card", "page", "write"]


def write(directory: Path, report: Report, *, fs: FileSystem = REAL) -> None:
    """Write ``index.html`` and ``report.md`` into a directory; each is whole or absent."""
    make_folders(fs, directory)
    write_whole(fs, directory / "index.html", page(report).encode("utf-8", "replace"))
    write_whole(fs, directory / "report.md", document(report).encode("utf-8", "replace"))
