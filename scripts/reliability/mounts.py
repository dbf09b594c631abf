"""A small disk of our own, where this user may make one (Linux, root): the mounts are seen by this process and its forks alone."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

OWN_MOUNTS, PRIVATE = 0x20000, 0x44000  # CLONE_NEWNS; MS_REC | MS_PRIVATE


def own_mounts() -> bool:
    """From now on what is mounted here stays here; whether that may be done. Before anything is forked that is to see it."""
    try:
        c = ctypes.CDLL(None, use_errno=True)
        return not (c.unshare(OWN_MOUNTS) or c.mount(b"none", b"/", None, PRIVATE, None))
    except (OSError, AttributeError):
        return False


def mount(place: Path, size: str) -> None:
    """A disk in memory of so many bytes at ``place``."""
    place.mkdir()
    c = ctypes.CDLL(None, use_errno=True)
    if c.mount(b"none", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(place))


def unmount(place: Path) -> None:
    """Take it away again."""
    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(place), 0)
