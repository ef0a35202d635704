"""Feature columns as DeepCTR-Torch users know them, plus ``source``, and the schema that orders and hashes them.

``source`` says who owns a feature: ``user`` and ``item`` features are looked up by id in the feature store, ``context``
features travel with the request (one value a request, or one a candidate). The fast predictor splits its first layer
by it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from esmm.batch import FeatureBlock, Float32, Int64, Slot, Source, SourceLayout

if TYPE_CHECKING:
    import torch

Ids = TypeVar("Ids", Int64, "torch.Tensor")
Combiner = Literal["sum", "mean", "max"]
SOURCES: tuple[Source, ...] = ("user", "item", "context")
COMBINERS: tuple[Combiner, ...] = ("sum", "mean", "max")


def _check_count(column: Any, field: str) -> None:
    """A whole number of at least one, kept as a plain int: a numpy integer could not be written as JSON."""
    value = getattr(column, field)
    try:
        object.__setattr__(column, field, index(value))
    except TypeError:
        raise ValueError(f"feature {column.name!r}: {field} must be a whole number, got {value!r}") from None
    if value < 1:
        raise ValueError(f"feature {column.name!r}: {field} must be at least 1, got {value}")


def _check_source(name: str, source: str) -> None:
    if source not in SOURCES:
        raise ValueError(f"feature {name!r}: source must be one of {', '.join(SOURCES)}, got {source!r}")


@dataclass(frozen=True)
class SparseFeat:
    """One integer id a row, embedded. Ids outside ``[0, vocabulary_size)`` are unknown and embed to zero.

    ``use_hash`` maps any int64 id into the vocabulary by a 64-bit mix, so new ids need no dictionary.
    ``embedding_name`` shares one table between features (default: the feature's own name).
    ``embedding_dim="auto"`` is ``6 * int(vocabulary_size ** 0.25)``.
    ``dtype`` and ``group_name`` are accepted for DeepCTR-Torch users and ignored, as there.
    """

    name: str
    vocabulary_size: int
    embedding_dim: int | Literal["auto"] = 4
    use_hash: bool = False
    dtype: str = "int32"
    embedding_name: str | None = None
    group_name: str = "default_group"
    source: Source = "context"

    def __post_init__(self) -> None:
        """Resolve ``auto`` and the shared table's name; refuse sizes below one."""
        _check_count(self, "vocabulary_size")
        if self.embedding_dim == "auto":
            object.__setattr__(self, "embedding_dim", 6 * int(self.vocabulary_size**0.25))
        _check_count(self, "embedding_dim")
        if self.embedding_name is None:
            object.__setattr__(self, "embedding_name", self.name)
        _check_source(self.name, self.source)

    @property
    def dim(self) -> int:
        """The embedding width as an int."""
        return int(self.embedding_dim)

    @property
    def table(self) -> str:
        """The embedding table's name."""
        return self.embedding_name or self.name


@dataclass(frozen=True)
class VarLenSparseFeat:
    """Up to ``maxlen`` ids a row, embedded and pooled by ``combiner``.

    Without ``length_name`` id 0 is padding and never a real id. With it the first ``length`` ids count, 0 included.
    """

    sparsefeat: SparseFeat
    maxlen: int
    combiner: Combiner = "mean"
    length_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse an empty window and an unknown combiner."""
        _check_count(self, "maxlen")
        if self.combiner not in COMBINERS:
            raise ValueError(f"parameter mode should in [sum, mean, max], got {self.combiner!r} for {self.name!r}")

    @property
    def name(self) -> str:
        """The feature's name."""
        return self.sparsefeat.name

    @property
    def vocabulary_size(self) -> int:
        """Rows of its table."""
        return self.sparsefeat.vocabulary_size

    @property
    def embedding_dim(self) -> int:
        """Width of its table."""
        return self.sparsefeat.dim

    @property
    def dim(self) -> int:
        """Width of its table."""
        return self.sparsefeat.dim

    @property
    def embedding_name(self) -> str:
        """Its table's name."""
        return self.sparsefeat.table

    @property
    def table(self) -> str:
        """Its table's name."""
        return self.sparsefeat.table

    @property
    def use_hash(self) -> bool:
        """Whether ids are hashed into the vocabulary (padding 0 stays 0)."""
        return self.sparsefeat.use_hash

    @property
    def source(self) -> Source:
        """Who owns the feature."""
        return self.sparsefeat.source


@dataclass(frozen=True)
class DenseFeat:
    """``dimension`` float32 numbers a row."""

    name: str
    dimension: int = 1
    dtype: str = "float32"
    source: Source = "context"

    def __post_init__(self) -> None:
        """Refuse a dimension below one."""
        _check_count(self, "dimension")
        _check_source(self.name, self.source)


Column = SparseFeat | VarLenSparseFeat | DenseFeat


def hash_ids(ids: Ids, vocabulary: int, *, padded: bool = False) -> Ids:
    """Any int64 ids -> rows in ``[0, vocabulary)``; ``padded``: id 0 -> 0 and the rest into ``[1, vocabulary)``.

    The 64-bit finaliser of splitmix64 (Steele, Lea, Flood 2014), top 63 bits, modulo. Only operators that numpy arrays
    and torch tensors share (int64, wrapping), so one definition serves both and training and serving cannot differ.
    """
    z = ids + _GOLDEN
    z = (z ^ ((z >> 30) & _LOW_34)) * _MIX_1  # >> is arithmetic on int64; the mask makes it logical
    z = (z ^ ((z >> 27) & _LOW_37)) * _MIX_2
    z = (z ^ ((z >> 31) & _LOW_33)) >> 1 & _LOW_63
    rows: Ids = (z % max(vocabulary - 1, 1) + 1) * (ids != 0) if padded else z % vocabulary
    return rows


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_LOW_33, _LOW_34, _LOW_37, _LOW_63 = 2**33 - 1, 2**34 - 1, 2**37 - 1, 2**63 - 1


def known_rows(ids: Ids, vocabulary: int | Ids) -> tuple[Ids, Ids]:
    """Ids -> (rows safe to look up, bool mask of known ids). Outside ``[0, vocabulary)`` is unknown, with row 0."""
    known: Any = (ids >= 0) & (ids < vocabulary)
    return ids * known, known


def resolve(column: SparseFeat | VarLenSparseFeat, ids: Ids) -> tuple[Ids, Ids]:
    """Raw ids of one column, any shape, numpy int64 or torch int64 -> (table rows, known mask) of the same shape.

    An unknown id's row is 0 and must be masked: its vector is zero. Row 0 of a padded history is not masked here.
    """
    if column.use_hash:
        ids = hash_ids(ids, column.vocabulary_size, padded=is_padded(column))
    return known_rows(ids, column.vocabulary_size)


def is_padded(column: Column) -> bool:
    """Whether id 0 of this column is padding: a history without a length column."""
    return isinstance(column, VarLenSparseFeat) and column.length_name is None


@dataclass(frozen=True)
class FeatureSchema:
    """Ordered feature columns: the one definition that model, feature store, messages and checkpoints agree on."""

    columns: tuple[Column, ...]

    def __init__(self, columns: Iterable[Column]) -> None:
        """Keep the order given; names must be unique (a shared table is ``embedding_name``)."""
        object.__setattr__(self, "columns", tuple(columns))
        seen: set[str] = set()
        for column in self.columns:
            names = [column.name]
            if isinstance(column, VarLenSparseFeat) and column.length_name is not None:
                names.append(column.length_name)
            for name in names:
                if name in seen:
                    raise ValueError(f"feature name {name!r} is used twice; share a table with embedding_name instead")
                seen.add(name)
        _check_tables(self.columns)

    @cached_property
    def index(self) -> dict[str, tuple[int, int]]:
        """Name -> (start, stop) columns of the concatenated input X (B, width), in column order."""
        out: dict[str, tuple[int, int]] = {}
        at = 0
        for column in self.columns:
            width = _width(column)
            out[column.name] = (at, at + width)
            at += width
            if isinstance(column, VarLenSparseFeat) and column.length_name is not None:
                out[column.length_name] = (at, at + 1)
                at += 1
        return out

    @property
    def width(self) -> int:
        """Columns of X."""
        return max((stop for _, stop in self.index.values()), default=0)

    @cached_property
    def hash(self) -> str:
        """16 hex digits, stable across processes: everything that changes what a value means is in it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def layout(self, source: Source) -> SourceLayout:
        """Where this source's features lie in its `FeatureBlock`: column order within ids and within dense."""
        ids: list[Slot] = []
        dense: list[Slot] = []
        at = at_dense = 0
        for column in self.columns:
            if column.source != source:
                continue
            if isinstance(column, DenseFeat):
                dense.append(Slot(column.name, "dense", at_dense, at_dense + column.dimension))
                at_dense += column.dimension
                continue
            width = _width(column)
            ids.append(
                Slot(column.name, "varlen" if isinstance(column, VarLenSparseFeat) else "sparse", at, at + width)
            )
            at += width
            if isinstance(column, VarLenSparseFeat) and column.length_name is not None:
                ids.append(Slot(column.length_name, "length", at, at + 1))
                at += 1
        return SourceLayout(source, tuple(ids), tuple(dense))

    @cached_property
    def _permutations(self) -> tuple[Int64, Int64]:
        """Column order -> columns of the user|item|context concatenation, for ids and for dense."""
        start: dict[str, tuple[int, int]] = {}
        ids_at = dense_at = 0
        for source in SOURCES:
            layout = self.layout(source)
            start |= {slot.name: (ids_at + slot.start, slot.width) for slot in layout.ids}
            start |= {slot.name: (dense_at + slot.start, slot.width) for slot in layout.dense}
            ids_at += layout.id_width
            dense_at += layout.dense_width
        dense_names = {column.name for column in self.columns if isinstance(column, DenseFeat)}
        ranges = {name: np.arange(start[name][0], sum(start[name])) for name in self.index}
        empty = np.zeros(0, np.int64)
        return (
            np.concatenate([empty, *(ranges[name] for name in self.index if name not in dense_names)]),
            np.concatenate([empty, *(ranges[name] for name in self.index if name in dense_names)]),
        )

    def pack(self, user: FeatureBlock, item: FeatureBlock, context: FeatureBlock) -> tuple[Int64, Float32]:
        """Three blocks of B rows -> ids_BS and dense_BD in column order: what `ESMM.logits` takes."""
        ids_order, dense_order = self._permutations
        ids = np.concatenate([user.ids_NS, item.ids_NS, context.ids_NS], axis=1)
        dense = np.concatenate([user.dense_ND, item.dense_ND, context.dense_ND], axis=1)
        return ids[:, ids_order], dense[:, dense_order]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the shape of the TOML file."""
        return {"features": [_column_dict(column) for column in self.columns]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FeatureSchema:
        """The schema of `to_dict`; unknown keys are errors that name the feature."""
        unknown = set(data) - {"features"}
        if unknown:
            raise ValueError(
                f"feature schema: unknown key {sorted(unknown)[0]!r}; only [[features]] tables are allowed"
            )
        features = data.get("features")
        if not isinstance(features, list) or not features:
            raise ValueError("feature schema: at least one [[features]] table is needed")
        return cls(_column_from(entry) for entry in features)

    @classmethod
    def from_toml(cls, text: str) -> FeatureSchema:
        """Parse TOML text with ``[[features]]`` tables."""
        return cls.from_dict(tomllib.loads(text))

    def to_toml(self) -> str:
        """TOML text that `from_toml` reads back to an equal schema."""
        lines: list[str] = []
        for entry in self.to_dict()["features"]:
            lines.append("[[features]]")
            lines.extend(f"{key} = {json.dumps(value)}" for key, value in entry.items())
            lines.append("")
        return "\n".join(lines)


def _check_tables(columns: tuple[Column, ...]) -> None:
    shapes: dict[str, tuple[int, int, str]] = {}
    for column in columns:
        if isinstance(column, DenseFeat):
            continue
        rows, dim, first = shapes.setdefault(column.table, (column.vocabulary_size, column.dim, column.name))
        if (column.vocabulary_size, column.dim) != (rows, dim):
            raise ValueError(
                f"table {column.table!r} is shared by {first!r} (vocabulary_size {rows}, embedding_dim {dim}) "
                f"and {column.name!r} ({column.vocabulary_size}, {column.dim}); both must agree"
            )


def _width(column: Column) -> int:
    if isinstance(column, DenseFeat):
        return column.dimension
    return column.maxlen if isinstance(column, VarLenSparseFeat) else 1


def _column_dict(column: Column) -> dict[str, Any]:
    if isinstance(column, DenseFeat):
        return {"name": column.name, "kind": "dense", "source": column.source, "dimension": column.dimension}
    out: dict[str, Any] = {
        "name": column.name,
        "kind": "varlen" if isinstance(column, VarLenSparseFeat) else "sparse",
        "source": column.source,
        "vocabulary_size": column.vocabulary_size,
        "embedding_dim": column.dim,
        "embedding_name": column.table,
        "use_hash": column.use_hash,
    }
    if isinstance(column, VarLenSparseFeat):
        out |= {"maxlen": column.maxlen, "combiner": column.combiner}
        if column.length_name is not None:
            out["length_name"] = column.length_name
    return out


_SPARSE_KEYS = ("vocabulary_size", "embedding_dim", "embedding_name", "use_hash", "source")
_VARLEN_KEYS = ("maxlen", "combiner", "length_name")
_KEYS = {
    "dense": {"dimension", "source"},
    "sparse": set(_SPARSE_KEYS),
    "varlen": {*_SPARSE_KEYS, *_VARLEN_KEYS},
}


def _column_from(entry: Mapping[str, Any]) -> Column:
    name, kind = entry.get("name"), entry.get("kind")
    if not isinstance(name, str) or kind not in _KEYS:
        raise ValueError(f"feature schema: each feature needs a name and kind sparse|varlen|dense, got {dict(entry)!r}")
    unknown = set(entry) - _KEYS[kind] - {"name", "kind"}
    if unknown:
        raise ValueError(f"feature {name!r}: unknown key {sorted(unknown)[0]!r} for kind {kind!r}")
    try:
        if kind == "dense":
            return DenseFeat(name, **{k: entry[k] for k in ("dimension", "source") if k in entry})
        sparse = SparseFeat(name, **{k: entry[k] for k in _SPARSE_KEYS if k in entry})
        if kind == "sparse":
            return sparse
        return VarLenSparseFeat(sparse, **{k: entry[k] for k in _VARLEN_KEYS if k in entry})
    except TypeError as error:
        raise ValueError(f"feature {name!r}: {error}") from error
