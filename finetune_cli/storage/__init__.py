"""Files that are whole or absent: the injectable file-system layer, sealed records, the checkpoint store and the lock of a run."""

from __future__ import annotations

from finetune_cli.storage.background import Background
from finetune_cli.storage.files import (
    Content,
    Sink,
    checked_name,
    cleaned,
    discard,
    is_debris,
    make_folders,
    point,
    pointed,
    read_regular,
    sha256,
    sweep,
    temporary,
    write_folder,
    write_new,
    write_whole,
)
from finetune_cli.storage.lock import Lock, holder
from finetune_cli.storage.records import is_number, json_bytes, json_line, parsed, plain, seal, unseal
from finetune_cli.storage.store import HELD, MANIFEST, Store
from finetune_cli.storage.system import REAL, FileSystem
from finetune_cli.storage.trouble import cause, disk_trouble, human_bytes, machine_error

__all__ = [
    "HELD",
    "MANIFEST",
    "REAL",
    "Background",
    "Content",
    "FileSystem",
    "Lock",
    "Sink",
    "Store",
    "cause",
    "checked_name",
    "cleaned",
    "discard",
    "disk_trouble",
    "holder",
    "human_bytes",
    "is_debris",
    "is_number",
    "json_bytes",
    "json_line",
    "machine_error",
    "make_folders",
    "parsed",
    "plain",
    "point",
    "pointed",
    "read_regular",
    "seal",
    "sha256",
    "sweep",
    "temporary",
    "unseal",
    "write_folder",
    "write_new",
    "write_whole",
]
