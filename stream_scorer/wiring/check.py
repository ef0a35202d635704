"""``check`` and ``topics create``: look at everything a scorer needs, and say what to fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from esmm.checkpoint import CheckpointError, load_version, probe
from esmm.features import FeatureSchema
from stream_scorer.adapters.feature_writer import check_meta, read_meta
from stream_scorer.adapters.kafka_admin import connect as describe
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.core.errors import ConfigurationError, StreamScorerError
from stream_scorer.settings import Settings
from stream_scorer.wiring import build, connect

CONFIGURATION = 78


def run_check(settings: Settings) -> int:
    """0 when all is well; 78 when something has to be fixed, each with a line of its own."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("schema", lambda: _schema(settings)),
        ("kafka", lambda: _kafka(settings)),
        ("topics", lambda: _topics(settings)),
        ("redis", lambda: _redis(settings)),
        ("model", lambda: _model(settings)),
        ("trainer", lambda: _trainer(settings)),
    ]
    failed = 0
    for name, look in checks:
        try:
            typer.echo(f"ok    {name:8} {look()}")
        except StreamScorerError as error:
            failed += 1
            typer.echo(f"FAIL  {name:8} {error}")
    typer.echo("all is well" if not failed else f"{failed} of {len(checks)} checks failed")
    return CONFIGURATION if failed else 0


def _schema(settings: Settings) -> str:
    schema = connect.load_schema(settings)
    return f"{settings.model.schema_file}: {len(schema.columns)} features, hash {schema.hash}"


def _kafka(settings: Settings) -> str:
    info = describe(connect.kafka_config(settings), settings.kafka.connect_timeout_s)
    return f"{settings.kafka.bootstrap}: {len(info.brokers)} broker(s), cluster {info.cluster_id}"


def _topics(settings: Settings) -> str:
    names = connect.all_topics(settings)
    connect.require_topics(settings, names)
    return ", ".join(names)


def _redis(settings: Settings) -> str:
    config = connect.redis_config(settings)
    check_meta(config, read_meta(config), connect.entity_layouts(connect.load_schema(settings)))
    return f"{config.where}: features of this schema, {config.buckets} buckets"


def _model(settings: Settings) -> str:
    schema: FeatureSchema = connect.load_schema(settings)
    store = DirectoryStore(Path(settings.model.store))
    current = store.current()
    if current is None:
        return f"{settings.model.store} is empty: `stream-scorer train` publishes a first version, scorers wait for it"
    try:
        error = probe(load_version(store.info(current).path, schema.hash))
    except CheckpointError as problem:
        raise ConfigurationError(
            f"version {current} in {settings.model.store} cannot be served ({problem}): "
            "`stream-scorer models rollback`, or retrain with this schema"
        ) from problem
    return f"version {current} verified, golden rows within {error:.1e}"


def _trainer(settings: Settings) -> str:
    build.trainer_policy(settings, connect.load_schema(settings))
    build.method_of(settings)
    trainer = settings.trainer
    return (
        f"{trainer.method}, windows {trainer.click_window_s:g} / {trainer.observation_window_s:g} / "
        f"{trainer.attribution_window_s:g} s (click, observation, attribution)"
    )


def run_topics_create(settings: Settings) -> int:
    """Create the topics that are not there, and say which."""
    kafka = settings.kafka
    created = connect.make_topics(settings, kafka.partitions, kafka.replication, kafka.connect_timeout_s)
    for name in connect.all_topics(settings):
        typer.echo(f"{name}: {'created' if name in created else 'was there'}")
    return 0
