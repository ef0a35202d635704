"""Model versions on disk: a directory with ``model.safetensors``, ``manifest.json`` and ``golden.safetensors``.

Loading trusts nothing: files are opened without following links, their size and SHA-256 must be the manifest's, and
every tensor must have the name, shape and dtype that the manifest's schema and hyper-parameters ask for, and be finite.
The golden rows say what the weights computed where they were saved; `probe` asks whether they still do. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor

from esmm.batch import FeatureBlock, Float32, RankBatch
from esmm.features import SOURCES, FeatureSchema
from esmm.model import ESMM

FORMAT = "stream-scorer-model/1"
WEIGHTS, MANIFEST, GOLDEN = "model.safetensors", "manifest.json", "golden.safetensors"
DTYPES = frozenset({torch.float32, torch.int64})  # int64: batch norm's num_batches_tracked
PROBE_TOLERANCE = 1e-4  # of a logit, times its size where that is above one
MAX_MANIFEST_BYTES = 16 << 20
MAX_GOLDEN_BYTES = 64 << 20
MAX_WIDTH = 1 << 20  # columns of input and of embedding: a manifest must not make the loader build endless lists
OWN_KEYS = ("format", "schema", "schema_hash", "hyper", "files", "tensors")

Reason = Literal["corrupt", "schema", "shape", "nonfinite", "missing", "probe"]


class CheckpointError(ValueError):
    """A version that must not be used; ``reason`` is one of a few words, ``detail`` says what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        """``reason``: corrupt | schema | shape | nonfinite | missing | probe."""
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


class Golden(NamedTuple):
    """B rows of features, a user, an item and a context a row."""

    user: FeatureBlock
    item: FeatureBlock
    context: FeatureBlock


class Loaded(NamedTuple):
    """A verified version: the model in eval mode, and its golden rows with the logits they had when it was saved."""

    model: ESMM
    schema: FeatureSchema
    manifest: Mapping[str, Any]
    golden: Golden | None
    golden_logits_B2: Float32 | None


def save_version(
    directory: Path, model: ESMM, manifest: Mapping[str, Any], golden: Golden | None = None
) -> dict[str, Any]:
    """Write the version's files into an existing directory, each fsynced, and give back the whole manifest.

    ``manifest`` holds the caller's own fields (version, parent, offsets, metrics). ``golden``: rows to probe with, by
    default `random_golden`. Raises ValueError when a field has a name that is written here.
    """
    taken = sorted(set(manifest) & set(OWN_KEYS))
    if taken:
        raise ValueError(f"manifest field {taken[0]!r} is written by save_version; use another name")
    golden = random_golden(model.schema) if golden is None else golden
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    files = {WEIGHTS: pack_tensors(state), GOLDEN: _golden_bytes(model, golden)}
    full = {
        **manifest,
        "format": FORMAT,
        "schema": model.schema.to_dict(),
        "schema_hash": model.schema.hash,
        "hyper": dict(model.hyper),
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
        "tensors": {name: list(tensor.shape) for name, tensor in state.items()},
    }
    for name, data in files.items():
        _write(directory / name, data)
    _write(directory / MANIFEST, json.dumps(full, indent=2, sort_keys=True).encode())  # last: it vouches for the rest
    return full


def load_version(directory: Path, schema_hash: str | None = None) -> Loaded:
    """Read and verify a version; the model is on the CPU. Raises `CheckpointError`.

    ``schema_hash``: the schema that the caller's features follow; a version made for another is refused (``schema``).
    """
    manifest = read_manifest(directory)
    schema = _schema(manifest)
    if schema_hash is not None and schema.hash != schema_hash:
        raise CheckpointError("schema", f"made for feature schema {schema.hash}, this process uses {schema_hash}")
    state = _tensors(_read_listed(directory, WEIGHTS, manifest), WEIGHTS)
    _check_tensors(state, _expected(schema, manifest["hyper"]), manifest["tensors"])
    model = ESMM.from_hyper(schema, manifest["hyper"])
    model.load_state_dict(state, assign=True)
    golden, logits_B2 = _read_golden(directory, schema, manifest)
    return Loaded(model.eval(), schema, manifest, golden, logits_B2)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, well-formed and of a known format, without touching the weights. Raises `CheckpointError`."""
    data = _read(directory, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("corrupt", f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError("corrupt", f"{MANIFEST} is not a JSON object")
    if manifest.get("format") != FORMAT:
        raise CheckpointError("corrupt", f"format {manifest.get('format')!r}, this build reads {FORMAT!r}")
    for key, kind in (("schema", dict), ("schema_hash", str), ("hyper", dict), ("files", dict), ("tensors", dict)):
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError("corrupt", f"{MANIFEST}: {key!r} is missing or no {kind.__name__}")
    return manifest


def probe(loaded: Loaded) -> float:
    """The largest difference of a golden logit from what was saved, relative above one; 0 without golden rows.

    Raises `CheckpointError` (``probe``) above `PROBE_TOLERANCE`.
    """
    if loaded.golden is None or loaded.golden_logits_B2 is None:
        return 0.0
    expected_B2 = loaded.golden_logits_B2
    error_B2 = np.abs(golden_logits(loaded.model, loaded.golden) - expected_B2) / np.maximum(1.0, np.abs(expected_B2))
    worst = float(error_B2.max(initial=0.0))
    if not worst <= PROBE_TOLERANCE:  # also true for NaN
        raise CheckpointError("probe", f"golden logits differ by {worst:.2e}, more than {PROBE_TOLERANCE:.0e}")
    return worst


def golden_batch(golden: Golden) -> RankBatch:
    """The golden rows as a batch for a predictor: every row its own user and item, nothing cached."""
    index_B = np.arange(golden.user.rows)
    nowhere_B = np.full(golden.user.rows, -1)
    return RankBatch(golden.user, golden.item, golden.context, index_B, index_B, nowhere_B, nowhere_B)


def golden_logits(model: ESMM, golden: Golden) -> Float32:
    """logits_B2 of the golden rows by the plain model in eval mode; leaves the mode as it was."""
    training, device = model.training, model.out.bias.device
    ids_BS, dense_BD = model.schema.pack(*golden)
    model.eval()
    try:
        with torch.inference_mode():
            logits_B2 = model.logits(torch.from_numpy(ids_BS).to(device), torch.from_numpy(dense_BD).to(device))
    finally:
        model.train(training)
    return np.asarray(logits_B2.float().cpu().numpy(), np.float32)


def random_golden(schema: FeatureSchema, rows: int = 32, seed: int = 0) -> Golden:
    """Rows that reach every input: ids up to one past the vocabulary, any history length, N(0, 1) floats."""
    rng = np.random.default_rng(seed)
    sizes = {column.name: getattr(column, "vocabulary_size", 0) for column in schema.columns}
    blocks = []
    for source in SOURCES:
        layout = schema.layout(source)
        ids_BS = np.zeros((rows, layout.id_width), np.int64)
        width = 0  # of the history that a length slot follows
        for slot in layout.ids:
            top = width if slot.kind == "length" else sizes[slot.name]
            ids_BS[:, slot.start : slot.stop] = rng.integers(0, top + 1, (rows, slot.width))
            width = slot.width
        dense_BD = rng.standard_normal((rows, layout.dense_width), np.float32)
        blocks.append(FeatureBlock(ids_BS, dense_BD))
    return Golden(*blocks)


def _golden_bytes(model: ESMM, golden: Golden) -> bytes:
    arrays = {f"{source}_ids": block.ids_NS for source, block in zip(SOURCES, golden, strict=True)}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    for source, block in zip(SOURCES, golden, strict=True):
        tensors[f"{source}_dense"] = torch.from_numpy(np.ascontiguousarray(block.dense_ND))
    tensors["logits"] = torch.from_numpy(golden_logits(model, golden))
    return bytes(pack_tensors(tensors))


def _read_golden(
    directory: Path, schema: FeatureSchema, manifest: Mapping[str, Any]
) -> tuple[Golden | None, Float32 | None]:
    if GOLDEN not in manifest["files"]:
        return None, None
    tensors = _tensors(_read_listed(directory, GOLDEN, manifest, MAX_GOLDEN_BYTES), GOLDEN)
    rows = len(tensors["logits"]) if "logits" in tensors and tensors["logits"].ndim else 0
    shapes: dict[str, tuple[int, ...]] = {"logits": (rows, 2)}
    for source in SOURCES:
        layout = schema.layout(source)
        shapes |= {f"{source}_ids": (rows, layout.id_width), f"{source}_dense": (rows, layout.dense_width)}
    types = {name: torch.int64 if name.endswith("_ids") else torch.float32 for name in shapes}
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if found != {name: (shape, types[name]) for name, shape in shapes.items()}:
        raise CheckpointError("shape", f"{GOLDEN} does not hold the rows of this schema: {sorted(found)}")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    blocks = (FeatureBlock(arrays[f"{source}_ids"], arrays[f"{source}_dense"]) for source in SOURCES)
    return Golden(*blocks), arrays["logits"]


def _schema(manifest: Mapping[str, Any]) -> FeatureSchema:
    try:
        schema = FeatureSchema.from_dict(manifest["schema"])
    except (ValueError, TypeError) as error:
        raise CheckpointError("schema", f"{MANIFEST}: {error}") from error
    if schema.width + sum(getattr(column, "dim", 0) for column in schema.columns) > MAX_WIDTH:
        raise CheckpointError("schema", f"the schema is wider than {MAX_WIDTH} columns")
    if schema.hash != manifest["schema_hash"]:
        raise CheckpointError("schema", f"the schema's hash is {schema.hash}, not {manifest['schema_hash']!r}")
    return schema


def _expected(schema: FeatureSchema, hyper: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names, shapes and dtypes the model will have; nothing is allocated, however large the numbers given."""
    try:
        with torch.device("meta"):
            return dict(ESMM.from_hyper(schema, hyper, device="meta").state_dict())
    except Exception as error:  # any argument can be wrong in any way: all of them mean the same
        raise CheckpointError("schema", f"{MANIFEST}: schema and hyper make no model: {error}") from error


def _check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], listed: Mapping[str, Any]) -> None:
    for name in sorted(state.keys() | expected.keys()):
        if name not in state:
            raise CheckpointError("shape", f"tensor {name!r} is missing")
        if name not in expected:
            raise CheckpointError("shape", f"tensor {name!r} does not belong to this model")
        tensor, like = state[name], expected[name]
        if tensor.shape != like.shape or listed.get(name) != list(like.shape):
            raise CheckpointError("shape", f"tensor {name!r} is {list(tensor.shape)}, expected {list(like.shape)}")
        if tensor.dtype not in DTYPES or tensor.dtype != like.dtype:
            raise CheckpointError("shape", f"tensor {name!r} is {tensor.dtype}, expected {like.dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError("nonfinite", f"tensor {name!r} holds NaN or infinity")
    if set(listed) != set(expected):
        raise CheckpointError("shape", f"{MANIFEST} lists other tensors than the model has")


def _tensors(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        return dict(parse_tensors(data))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError("corrupt", f"{name} is not a safetensors file: {error}") from error


def _read_listed(directory: Path, name: str, manifest: Mapping[str, Any], limit: int | None = None) -> bytes:
    """A file whose size and SHA-256 the manifest gives."""
    entry = manifest["files"].get(name)
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
        raise CheckpointError("corrupt", f"{MANIFEST} does not list {name}")
    if limit is not None and entry["bytes"] > limit:
        raise CheckpointError("corrupt", f"{name} is larger than {limit} bytes")
    data = _read(directory, name, entry["bytes"])
    if len(data) != entry["bytes"]:
        raise CheckpointError("corrupt", f"{name} is {len(data)} bytes, the manifest says {entry['bytes']}")
    if _sha256(data) != entry.get("sha256"):
        raise CheckpointError("corrupt", f"{name} does not have the SHA-256 that the manifest gives")
    return data


def _read(directory: Path, name: str, limit: int) -> bytes:
    """A regular file of at most ``limit`` bytes, directly in a real directory: no link is followed for either."""
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:  # non-blocking: a named pipe must not hang the loader
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(handle, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError("corrupt", f"{name} is not a regular file")
            if info.st_size > limit:
                raise CheckpointError("corrupt", f"{name} is {info.st_size} bytes, more than {limit}")
            return file.read(limit + 1)
    except FileNotFoundError as error:
        raise CheckpointError("missing", f"{directory / name} does not exist") from error
    except OSError as error:
        raise CheckpointError("corrupt", f"{directory / name} cannot be read, or is a link: {error}") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
