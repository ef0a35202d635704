"""``pretrain``: a table of matured impressions, or a public log, into the model store's first version.

A table has a column a feature, by the schema's names, and ``click`` and ``conversion`` of 0 and 1 as they are when the
attribution window is over; with a column ``time`` rows are put into its order. The last rows are held back: an epoch
that does not lower their log loss, CTR's plus CTCVR's, counts towards stopping. The best epoch's weights are published.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import structlog
import typer
from tqdm import tqdm

from esmm.batch import Examples, FeatureBlock, Float32, Int64, Kind, concat_examples
from esmm.checkpoint import CheckpointError, load_version
from esmm.features import SOURCES, FeatureSchema
from esmm.learner import Learner
from esmm.metrics import TaskStats
from stream_scorer import __version__
from stream_scorer.adapters.clock import SystemClock
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.core.errors import ConfigurationError, FatalError, ModelRefused
from stream_scorer.embedded.replay import ReplayOptions
from stream_scorer.settings import Settings
from stream_scorer.wiring import build, connect
from stream_scorer.wiring.load import Table, block_of
from stream_scorer.wiring.logged import Windows, read_log
from stream_scorer.wiring.replay import dirt_text

_log = structlog.get_logger("stream_scorer.trainer")
CHUNK = 20_000
CLICK, CONVERSION, TIME = "click", "conversion", "time"


@dataclass(frozen=True)
class PretrainOptions:
    """At most ``epochs``; stop after ``patience`` of them without a better one. ``held_out`` is a share of the rows."""

    file: Path
    epochs: int = 20
    patience: int = 2
    held_out: float = 0.1
    dataset: str | None = None  # of the public log that the file is; None: a table
    limit: int = 0  # rows of the log to read, 0: all


class Judged(NamedTuple):
    """Held-back rows under one model."""

    logloss: float  # CTR's plus CTCVR's, nats
    ctr: TaskStats
    ctcvr: TaskStats


def run_pretrain(settings: Settings, options: PretrainOptions) -> int:
    """Read, learn, publish; 0 when a version was published and promoted."""
    schema = connect.load_schema(settings)
    store = DirectoryStore(Path(settings.model.store))
    rows = _rows(settings, options, schema)
    split = round(rows.rows * (1 - options.held_out))
    if not 0 < split < rows.rows:
        raise ConfigurationError(f"{options.file}: {rows.rows} rows are too few to hold back {options.held_out:g}")
    train, held_out = (rows.take(part) for part in np.split(np.arange(rows.rows), [split]))
    # FIRST rows with final labels: what the oracle learns from; the trainer's own method takes over on the stream
    trainer = settings.trainer.model_copy(update={"method": "oracle", "negative_keep": 1.0})
    learner = build.learner(settings.model_copy(update={"trainer": trainer}), schema)
    best, epoch = fit(learner, train, held_out, options, settings)
    manifest = {
        "parent": store.current(),
        "created_ms": SystemClock().now_ms(),
        "code_version": __version__,
        "pretrained": {"rows": rows.rows, "epoch": epoch, "logloss": best.logloss},
    }
    version = store.publish(lambda path, number: learner.export(path, {**manifest, "version": number}))
    typer.echo(f"version {version} published: epoch {epoch}, {_text(best)}")
    return 0


def _rows(settings: Settings, options: PretrainOptions, schema: FeatureSchema) -> Examples:
    """The table's rows or the log's impressions, in time order."""
    if options.dataset is None:
        return read_matured(options.file, schema)
    with tqdm(total=100, unit="%", desc=f"read {options.dataset}", disable=not sys.stderr.isatty()) as bar:

        def progress(rows: int, share: float) -> None:
            bar.n = round(share * 100, 1)
            bar.set_postfix_str(f"{rows} rows")

        replay = ReplayOptions(limit=options.limit, progress=progress)
        rows, report = read_log(options.dataset, options.file, schema, Windows.of(settings), replay)
    typer.echo(
        f"{report.rows} log rows, {report.impressions} impressions, of which {rows.rows} have final labels: "
        f"{int(rows.click_B.sum())} clicks, {int(rows.conversion_B.sum())} conversions{dirt_text(report)}"
    )
    return rows


def start_from_live(learner: Learner, store: DirectoryStore, schema: FeatureSchema) -> int | None:
    """Give a fresh learner the live version's weights; says which, None when there is none that can be used.

    A checkpoint that is restored later replaces them.
    """
    version = store.current()
    if version is None:
        return None
    try:
        loaded = load_version(store.info(version).path, schema.hash)
    except (CheckpointError, ModelRefused) as error:
        _log.warning("learning does not start from the live version", version=version, error=str(error))
        return None
    odds = loaded.manifest.get("ctcvr_correction") == "odds"
    if odds != learner.method.odds_correction or dict(loaded.model.hyper) != dict(learner.model.hyper):
        _log.warning("learning does not start from the live version: other [model] settings or method", version=version)
        return None
    learner.model.load_state_dict(loaded.model.state_dict())
    _log.info("learning starts from the live version unless there is a checkpoint", version=version)
    return version


def fit(
    learner: Learner, train: Examples, held_out: Examples, options: PretrainOptions, settings: Settings
) -> tuple[Judged, int]:
    """Epochs until none is better; the learner's model is left as the best one. `FatalError` for a non-finite step."""
    best, at_best, weights = _judge(learner, held_out), 0, _weights(learner)
    rng = np.random.default_rng(settings.model.seed)
    for epoch in range(1, options.epochs + 1):
        order = rng.permutation(train.rows)
        with tqdm(total=train.rows, unit="row", desc=f"epoch {epoch}", disable=not sys.stderr.isatty()) as bar:
            for index in np.array_split(order, -(-train.rows // settings.trainer.batch_rows)):
                if not learner.step(train.take(index)).finite:
                    raise FatalError(f"epoch {epoch}: a step was not finite; nothing was published")
                bar.update(len(index))
        found = _judge(learner, held_out)
        typer.echo(f"epoch {epoch}: {_text(found)}")
        if found.logloss < best.logloss:
            best, at_best, weights = found, epoch, _weights(learner)
        elif epoch - at_best >= options.patience:
            break
    learner.model.load_state_dict(weights)
    return best, at_best


def read_matured(file: Path, schema: FeatureSchema) -> Examples:
    """The whole file as first emissions that know the future. `ConfigurationError` says what is wrong with it."""
    parts, times = [], []
    for table in _tables(file):
        try:
            blocks = [
                block_of(schema.layout(source), table, file) if _wanted(schema, source) else None for source in SOURCES
            ]
            parts.append(_examples(table, blocks, file))
            times.append(np.asarray(table.get(TIME, np.zeros(parts[-1].rows)), np.float64))
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(f"{file}, in rows after {sum(map(len, times))}: {error}") from error
    if not parts:
        raise ConfigurationError(f"{file} has no rows")
    return concat_examples(parts).take(np.argsort(np.concatenate(times), kind="stable"))


def _wanted(schema: FeatureSchema, source: Any) -> bool:
    layout = schema.layout(source)
    return bool(layout.id_width or layout.dense_width)


def _examples(table: Table, blocks: list[FeatureBlock | None], file: Path) -> Examples:
    rows = len(next(iter(table.values())))
    empty = FeatureBlock(np.zeros((rows, 0), np.int64), np.zeros((rows, 0), np.float32))
    user, item, context = (empty if block is None else block for block in blocks)
    for block in (user, item, context):
        if not np.isfinite(block.dense_ND).all():
            raise ValueError("a feature is not finite")
    click_B, conversion_B = _label(table, CLICK, file), _label(table, CONVERSION, file)
    if (conversion_B > click_B).any():
        raise ValueError(f"row {int(np.argmax(conversion_B > click_B))} has a conversion without a click")
    none_B, number_B = np.zeros(rows, np.float32), np.zeros(rows, np.int64)
    kind_B = np.full(rows, Kind.FIRST, np.uint8)
    return Examples(
        user,
        item,
        context,
        kind_B,
        click_B,
        conversion_B,
        conversion_B,
        none_B,
        none_B,
        number_B,
        cast("Int64", number_B),
    )


def _label(table: Table, name: str, file: Path) -> Float32:
    if name not in table:
        raise ConfigurationError(f"{file} has no column {name!r}; it has {', '.join(table)}")
    label_B = np.asarray(table[name], np.float32)
    if not ((label_B == 0) | (label_B == 1)).all():
        raise ValueError(f"column {name!r} must be 0 or 1")
    return label_B


def _tables(file: Path) -> Iterator[Table]:
    if not file.is_file():
        raise ConfigurationError(f"{file} does not exist")
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigurationError("parquet needs pyarrow: pip install 'stream-scorer[parquet]'") from error
    try:
        opened: Any = cast("Any", ParquetFile)(file)
        yield from (batch.to_pydict() for batch in opened.iter_batches(CHUNK))
    except ArrowException as error:
        raise ConfigurationError(f"{file} is not a parquet file: {error}") from error


def _judge(learner: Learner, held_out: Examples) -> Judged:
    ctr_B, ctcvr_B = learner.predict(held_out)
    ctr, ctcvr = TaskStats.of(held_out.click_B, ctr_B), TaskStats.of(held_out.conversion_B, ctcvr_B)
    return Judged(ctr.logloss() + ctcvr.logloss(), ctr, ctcvr)


def _weights(learner: Learner) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def _text(judged: Judged) -> str:
    ctr, ctcvr = judged.ctr, judged.ctcvr
    return (
        f"held-out log loss {ctr.logloss():.5f} CTR, {ctcvr.logloss():.5f} CTCVR; "
        f"AUC {ctr.auc():.4f}, {ctcvr.auc():.4f}; PCOC {ctr.pcoc():.3f}, {ctcvr.pcoc():.3f}"
    )
