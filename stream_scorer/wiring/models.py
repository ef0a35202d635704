"""``models list | show | promote | rollback``."""

from __future__ import annotations

from pathlib import Path

import orjson
import typer

from esmm.checkpoint import CheckpointError, load_version, probe
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.core.errors import ModelRefused, RecoverableError
from stream_scorer.settings import Settings


def _store(settings: Settings) -> DirectoryStore:
    return DirectoryStore(Path(settings.model.store))


def run_models_list(settings: Settings) -> int:
    """One line a version: star, number, time, examples, logloss of CTCVR."""
    store = _store(settings)
    versions, current = store.versions(), store.current()
    if not versions:
        typer.echo(f"no versions in {settings.model.store}: `stream-scorer train` publishes them")
    for version in versions:
        mark = "*" if version == current else " "
        try:
            manifest = store.info(version).manifest
        except ModelRefused as error:
            typer.echo(f"{mark} {version}  unreadable: {error.detail}")
            continue
        metrics = manifest.get("metrics") or {}
        typer.echo(
            f"{mark} {version}  parent {manifest.get('parent')}  {manifest.get('examples', 0)} examples  "
            f"{orjson.dumps(metrics).decode()}"
        )
    return 0


def _verify(settings: Settings, version: int) -> None:
    info = _store(settings).info(version)
    try:
        probe(load_version(info.path))
    except CheckpointError as error:
        raise ModelRefused(version, error.reason, error.detail) from error


def run_models_show(settings: Settings, version: int) -> int:
    """The manifest, after verifying files, hashes, tensors and golden rows."""
    _verify(settings, version)
    manifest = dict(_store(settings).info(version).manifest)
    typer.echo(orjson.dumps(manifest, option=orjson.OPT_INDENT_2).decode())
    return 0


def run_models_promote(settings: Settings, version: int) -> int:
    """Verify, then point at it."""
    _verify(settings, version)
    _store(settings).promote(version)
    typer.echo(f"scorers will serve version {version} within {settings.model.poll_s:g} s")
    return 0


def run_models_rollback(settings: Settings) -> int:
    """To the newest version older than the current one that verifies."""
    store = _store(settings)
    current = store.current()
    older = [version for version in store.versions() if current is not None and version < current]
    for version in reversed(older):
        try:
            _verify(settings, version)
        except ModelRefused as error:
            typer.echo(f"skipping: {error}", err=True)
            continue
        return run_models_promote(settings, version)
    raise RecoverableError(f"nothing to roll back to: version {current} has no older version in {settings.model.store}")
