"""``features load``: a table of entities into packed records."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import typer
from tqdm import tqdm

from esmm.batch import FeatureBlock, SourceLayout, zero_block
from stream_scorer.adapters.feature_writer import FeatureWriter
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.packed import Entity
from stream_scorer.settings import Settings
from stream_scorer.wiring import connect

CHUNK = 5_000
Table = dict[str, list[Any]]  # column name -> values of a chunk


def run_features_load(settings: Settings, file: Path, entity: str, id_column: str, time_column: str | None) -> int:
    """Write every row; 0 when all were written."""
    if entity not in ("user", "item"):
        raise ConfigurationError(f"--entity must be user or item, got {entity!r}")
    kind = cast("Entity", entity)
    layouts = connect.entity_layouts(connect.load_schema(settings))
    writer = FeatureWriter(connect.redis_config(settings), layouts)
    now_ms = time.time_ns() // 1_000_000
    written = 0
    try:
        rows, chunks = _open(file)
        with tqdm(total=rows, unit="row", desc=file.name, disable=not sys.stderr.isatty()) as bar:
            for table in chunks:
                ids = [str(value) for value in _column(table, id_column, file)]
                times = np.full(len(ids), now_ms, np.int64)
                if time_column is not None:
                    times = np.asarray(_column(table, time_column, file), np.int64)
                written += writer.write(kind, ids, block_of(layouts[kind], table, file), times)
                bar.update(len(ids))
    except ValueError as error:
        raise ConfigurationError(f"{file}, after {written} rows: {error}") from error
    finally:
        writer.close()
    typer.echo(f"{written} {entity} records written")
    return 0


def block_of(layout: SourceLayout, table: Table, file: Path) -> FeatureBlock:
    """Columns by feature name -> one block; a list in a varlen column may be shorter than its window."""
    rows = len(next(iter(table.values())))
    block = zero_block(layout, rows)
    for slots, array in ((layout.ids, block.ids_NS), (layout.dense, block.dense_ND)):
        for slot in slots:
            values = _column(table, slot.name, file)
            if slot.width == 1 and not isinstance(values[0] if values else 0, list):
                array[:, slot.start] = np.asarray(values, array.dtype)
                continue
            for row, value in enumerate(values):
                if len(value) > slot.width or (slot.kind == "dense" and len(value) != slot.width):
                    raise ValueError(
                        f"row {row}: column {slot.name!r} has {len(value)} values, the schema {slot.width}"
                    )
                array[row, slot.start : slot.start + len(value)] = value
    return block


def _column(table: Table, name: str, file: Path) -> Sequence[Any]:
    if name not in table:
        raise ConfigurationError(f"{file} has no column {name!r}; it has {', '.join(table)}")
    return table[name]


def _open(file: Path) -> tuple[int | None, Iterator[Table]]:
    """Number of rows when it is known, and the chunks."""
    if not file.is_file():
        raise ConfigurationError(f"{file} does not exist")
    if file.suffix == ".parquet":
        return _parquet(file)
    if file.suffix in (".jsonl", ".ndjson"):
        return None, _lines(file)
    raise ConfigurationError(f"{file}: use a .parquet or a .jsonl file")


def _parquet(file: Path) -> tuple[int, Iterator[Table]]:
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigurationError("parquet needs pyarrow: pip install 'stream-scorer[parquet]'") from error
    try:
        opened: Any = cast("Any", ParquetFile)(file)
    except ArrowException as error:
        raise ConfigurationError(f"{file} is not a parquet file: {error}") from error
    return opened.metadata.num_rows, (batch.to_pydict() for batch in opened.iter_batches(CHUNK))


def _lines(file: Path) -> Iterator[Table]:
    """JSON lines; every row has the columns of the first."""
    rows: list[dict[str, Any]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise ConfigurationError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
                raise ConfigurationError(f"{file}, line {number}: every line must be an object with the same columns")
            rows.append(row)
            if len(rows) == CHUNK:
                yield {name: [row[name] for row in rows] for name in rows[0]}
                rows = []
    if rows:
        yield {name: [row[name] for row in rows] for name in rows[0]}
