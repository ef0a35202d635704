"""A learner's state on disk: named tensors and a few numbers, refused whole when torn, of another format or unfit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "stream-scorer-learner/1"
TENSORS, META = "learner.safetensors", "learner.json"


def write_state(directory: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Write both files into an existing directory, fsynced; the JSON, which vouches for the tensors, comes last."""
    path = directory / TENSORS
    save_file(dict(tensors), path)
    _fsync(path)
    meta = {"format": FORMAT, **numbers, "sha256": _sha256(path)}
    (directory / META).write_text(json.dumps(meta, indent=2))
    _fsync(directory / META)


def read_state(
    directory: Path, like: Mapping[str, Tensor], numbers: Mapping[str, Any], optional: str = "\0"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Finite tensors with the names, shapes and types of ``like``, numbers with the keys and types of ``numbers``.

    Tensors whose names begin with ``optional`` may be missing on either side; others are left out of what is returned.
    Raises ValueError that says what is wrong.
    """
    meta = _read_meta(directory, numbers)
    tensors = _read_tensors(directory, meta["sha256"])
    for name in sorted(like.keys() | tensors.keys()):
        if name.startswith(optional) and not (name in like and name in tensors):
            tensors.pop(name, None)
            continue
        problem = _problem(tensors.get(name), like.get(name))
        if problem:
            raise refused(directory, f"tensor {name!r} {problem}")
    return tensors, meta


def refused(directory: Path, why: str) -> ValueError:
    """The error for a checkpoint that must not be used."""
    return ValueError(f"learner checkpoint {directory}: {why}")


def _read_meta(directory: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    try:
        meta = json.loads((directory / META).read_text())
    except (OSError, ValueError) as error:
        raise refused(directory, f"{META} cannot be read: {error}") from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise refused(directory, f"format {found!r}, this build reads {FORMAT!r}")
    for key, like in (*numbers.items(), ("sha256", "")):
        if type(meta.get(key)) is not type(like):
            raise refused(directory, f"{key!r} in {META} is missing or no {type(like).__name__}")
    return dict(meta)


def _read_tensors(directory: Path, sha256: str) -> dict[str, Tensor]:
    path = directory / TENSORS
    try:
        if _sha256(path) != sha256:
            raise refused(directory, f"{TENSORS} is torn or changed: its SHA-256 differs")
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise refused(directory, f"{TENSORS} cannot be read: {error}") from error


def _problem(saved: Tensor | None, own: Tensor | None) -> str:
    if saved is None or own is None:
        return "is missing" if saved is None else "does not belong to this learner"
    if saved.shape != own.shape or saved.dtype != own.dtype:
        return f"is {saved.dtype} {list(saved.shape)}, this learner has {own.dtype} {list(own.shape)}"
    if saved.is_floating_point() and not bool(torch.isfinite(saved).all()):
        return "holds NaN or infinity"
    return ""


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
