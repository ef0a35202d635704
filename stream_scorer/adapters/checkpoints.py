"""The trainer's checkpoints as directories (`stream_scorer.ports.Checkpoints`): ``<n>/`` and a pointer ``current``.

A checkpoint appears whole or not at all: written under a temporary name, fsynced, renamed, then the pointer. Its
manifest is written last and lists every file with size and SHA-256 (RocksDB's own tables carry their own checksums), so
a torn one is known. The newest that is whole and readable is restored; what was refused is said and left where it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as pack_arrays

from stream_scorer.adapters.durable import sync, sync_tree
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.ports import SavedCheckpoint

FORMAT = "stream-scorer-trainer/2"
MANIFEST, STATE, ARRAYS, POINTER = "checkpoint.json", "state.json", "arrays.safetensors", "current"
_NAME = re.compile(r"[0-9]{12}")
_UNHASHED = (".sst",)

_log = structlog.get_logger("stream_scorer.checkpoints")


class CheckpointRefused(ValueError):
    """A checkpoint that must not be restored."""


class DirectoryCheckpoints:
    """Checkpoints under ``root``; the newest ``keep`` stay, not counting those that `restore` refused."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        """Makes ``root`` when it is not there. `ConfigurationError` when that cannot be done."""
        self._root, self._keep = root, keep
        self._refused: set[int] = set()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"checkpoint directory {root}: {error.strerror}: set trainer.checkpoint_dir to a directory"
            ) from None
        for left in root.glob(".tmp-*"):  # by a process that was killed while writing
            shutil.rmtree(left, ignore_errors=True)
        for left in root.glob(".current-*"):
            left.unlink(missing_ok=True)

    def save(self, write: Callable[[Path], None], state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> int:
        """See `stream_scorer.ports.Checkpoints`."""
        number = max(self._numbers(), default=0) + 1
        temporary = self._root / f".tmp-{number}-{secrets.token_hex(8)}"
        temporary.mkdir()
        try:
            write(temporary)
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            (temporary / STATE).write_text(json.dumps(state))
            (temporary / ARRAYS).write_bytes(pack_arrays(contiguous))
            manifest = {"format": FORMAT, "files": _listing(temporary)}
            (temporary / MANIFEST).write_text(json.dumps(manifest))
            sync_tree(temporary)
            temporary.rename(self._path(number))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._point(number)
        good = [one for one in self._numbers() if one not in self._refused]
        for old in good[: -self._keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return number

    def restore(self, read: Callable[[SavedCheckpoint], None]) -> int | None:
        """See `stream_scorer.ports.Checkpoints`.

        A checkpoint that is torn, of another format, or that ``read`` cannot make sense of (ValueError, LookupError,
        TypeError) is refused: that is logged and the one before is tried. `ConfigurationError` when all are refused:
        starting from nothing must be a choice.
        """
        refused = ""
        for number in reversed(self._numbers()):
            try:
                read(_load(self._path(number)))
            except (ValueError, LookupError, TypeError, OSError) as error:
                refused = f"checkpoint {self._path(number)} is refused: {type(error).__name__}: {error}"
                _log.error(refused)
                self._refused.add(number)
                continue
            return number
        if refused:
            raise ConfigurationError(
                f"{refused}; no checkpoint is left to start from: move {self._root} away to start from the beginning"
            )
        return None

    def _numbers(self) -> list[int]:
        """All checkpoints, ascending."""
        return sorted(int(entry.name) for entry in os.scandir(self._root) if _NAME.fullmatch(entry.name))

    def _path(self, number: int) -> Path:
        return self._root / f"{number:012d}"

    def _point(self, number: int) -> None:
        temporary = self._root / f".current-{secrets.token_hex(8)}"
        temporary.write_text(f"{number:012d}\n")
        sync(temporary)
        temporary.replace(self._root / POINTER)
        sync(self._root)


def _load(path: Path) -> SavedCheckpoint:
    """Verify and read; raises `CheckpointRefused`."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointRefused(f"{MANIFEST} is not readable: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointRefused(f"its format is {found!r}, this build reads {FORMAT!r}")
    listed = manifest["files"]
    for name, entry in listed.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise CheckpointRefused(f"{name} is missing or has not {entry['bytes']} bytes")
        if entry["sha256"] is not None and _sha256(file) != entry["sha256"]:
            raise CheckpointRefused(f"{name} has other content than was written")
    try:
        arrays = parse_arrays((path / ARRAYS).read_bytes())
    except SafetensorError as error:
        raise CheckpointRefused(f"{ARRAYS}: {error}") from error
    return SavedCheckpoint(path, json.loads((path / STATE).read_bytes()), arrays)


def _listing(root: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): {
            "bytes": path.stat().st_size,
            "sha256": None if path.suffix in _UNHASHED else _sha256(path),
        }
        for path in files
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
