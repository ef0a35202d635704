"""Model versions as directories (`stream_scorer.ports.ModelStore`): ``versions/<n>/`` and a pointer file ``current``.

A version appears whole or not at all: it is written under a temporary name, fsynced, then renamed. Publishers on
several machines may share the directory: the rename to a number that exists fails, and the next number is tried.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from stream_scorer.adapters.durable import sync, sync_tree
from stream_scorer.core.errors import ConfigurationError, ModelRefused, RecoverableError
from stream_scorer.ports import VersionInfo

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 << 20
ABANDONED_S = 3_600.0
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_ATTEMPTS = 1_000


class DirectoryStore:
    """Versions of one model under ``root``, on a local disk or a shared volume."""

    def __init__(self, root: Path) -> None:
        """Makes ``root`` when it is not there. `ConfigurationError` when that cannot be done."""
        self._root = root
        self._versions = root / "versions"
        self._pointer = root / "current"
        try:
            self._versions.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"model store {root}: {error.strerror}: set model.store to a directory") from None

    def versions(self) -> list[int]:
        """See `stream_scorer.ports.ModelStore`."""
        names = (entry.name for entry in os.scandir(self._versions) if entry.is_dir(follow_symlinks=False))
        return sorted(int(name) for name in names if _NUMBER.fullmatch(name))

    def current(self) -> int | None:
        """See `stream_scorer.ports.ModelStore`. `RecoverableError` when the pointer holds anything but a number."""
        try:
            text = self._pointer.read_text("ascii").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise RecoverableError(f"model store pointer {self._pointer} is not readable: {error}") from error
        if not _NUMBER.fullmatch(text):
            raise RecoverableError(
                f"model store pointer {self._pointer} holds {text[:40]!r}, not a version: repair it with "
                "`stream-scorer models promote VERSION`"
            )
        return int(text)

    def info(self, version: int) -> VersionInfo:
        """See `stream_scorer.ports.ModelStore`."""
        path = self._path(version)
        try:
            if path.is_symlink() or not path.is_dir():
                raise ModelRefused(version, "missing", f"no directory {path}")
            manifest = _read_manifest(path / MANIFEST)
        except FileNotFoundError:
            raise ModelRefused(version, "missing", f"no {MANIFEST} in {path}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelRefused(version, "corrupt", f"{path / MANIFEST}: {error}") from error
        return VersionInfo(version, path, manifest)

    def publish(self, write: Callable[[Path, int], None], promote: bool = True) -> int:
        """See `stream_scorer.ports.ModelStore`. What ``write`` raises is passed on, and nothing was published.

        When another publisher takes the number first, ``write`` is called again with the next one.
        """
        for _ in range(_ATTEMPTS):
            version = max(self.versions(), default=0) + 1
            temporary = self._root / f".tmp-{version}-{secrets.token_hex(8)}"
            temporary.mkdir()
            try:
                write(temporary, version)
                sync_tree(temporary)
                if not _rename(temporary, self._path(version)):
                    continue
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            sync(self._versions)
            if promote:
                self.promote(version)
            return version
        raise RecoverableError(f"model store {self._root}: other publishers took {_ATTEMPTS} numbers in a row")

    def promote(self, version: int) -> None:
        """See `stream_scorer.ports.ModelStore`. `ModelRefused` when there is no such version."""
        if not self._path(version).is_dir():
            raise ModelRefused(version, "missing", f"it is not in {self._versions}")
        temporary = self._root / f".current-{secrets.token_hex(8)}"
        try:
            with temporary.open("x", encoding="ascii") as pointer:
                pointer.write(f"{version}\n")
                pointer.flush()
                os.fsync(pointer.fileno())
            temporary.replace(self._pointer)
        finally:
            temporary.unlink(missing_ok=True)
        sync(self._root)

    def prune(self, keep: int, also: Collection[int] = ()) -> list[int]:
        """See `stream_scorer.ports.ModelStore`. Nothing is deleted while the pointer is unreadable."""
        if keep < 1:
            raise ValueError(f"keep at least one version, not {keep}")
        current = self.current()
        gone = [version for version in self.versions()[:-keep] if version != current and version not in also]
        for version in gone:
            dying = self._root / f".dead-{version}-{secrets.token_hex(8)}"
            try:
                self._path(version).rename(dying)  # so that nobody sees half a version
            except FileNotFoundError:  # another one prunes too
                continue
            shutil.rmtree(dying, ignore_errors=True)
        self._sweep()
        return gone

    def _sweep(self) -> None:
        """Remove what processes that were killed left half written or half deleted."""
        for pattern in (".tmp-*", ".dead-*"):
            for left in self._root.glob(pattern):
                with suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > ABANDONED_S:
                        shutil.rmtree(left, ignore_errors=True)

    def _path(self, version: int) -> Path:
        return self._versions / str(version)


def _read_manifest(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MANIFEST_LIMIT:
        raise ValueError(f"larger than {MANIFEST_LIMIT} bytes")
    manifest = json.loads(path.read_bytes())
    if not isinstance(manifest, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - what is wrong is the file, not a type here
    return manifest


def _rename(temporary: Path, target: Path) -> bool:
    """False when ``target`` exists: a directory that is not empty is never replaced by a rename (rename(2))."""
    try:
        temporary.rename(target)
    except OSError:
        if target.exists():
            return False
        raise
    return True
