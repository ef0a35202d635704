"""Making sure that what was written is on the disk before anyone is told of it."""

from __future__ import annotations

import os
from pathlib import Path


def sync_tree(root: Path) -> None:
    """Fsync every file and directory under ``root``, and ``root``."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Fsync one file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
