"""ESMM, the entire-space multi-task model (Ma et al., SIGIR 2018, arXiv:1804.07931), in one file.

Two towers over shared embeddings: pCTR = P(click), pCVR = P(conversion | click), pCTCVR = pCTR x pCVR.
Constructor, defaults, validation, initialisation and state_dict are those of DeepCTR-Torch 0.3.0. Where that library
is wrong (ids above 2^24, pooling of empty and over-long histories, unseen ids) this one is right, as the tests show.

Shape suffixes: B rows, S id slots, T positions of a history, E width of a table, D input width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from esmm import offline
from esmm.batch import Float32, Int64, Source
from esmm.features import (
    SOURCES,
    Column,
    DenseFeat,
    FeatureSchema,
    SparseFeat,
    VarLenSparseFeat,
    hash_ids,
    is_padded,
    known_rows,
)

Lookup = Callable[[str, Tensor], Tensor]  # (table name, rows of any shape) -> vectors, one more axis of width E
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "linear": nn.Identity,
    "prelu": nn.PReLU,
}


class Probabilities(NamedTuple):
    """What a row of logits means; ``ctcvr_B = ctr_B * cvr_B``."""

    ctr_B: Tensor
    cvr_B: Tensor
    ctcvr_B: Tensor


def probabilities(logits_B2: Tensor) -> Probabilities:
    """[CTR logit, CVR logit] a row -> the three probabilities."""
    ctr_B, cvr_B = torch.sigmoid(logits_B2).unbind(-1)
    return Probabilities(ctr_B, cvr_B, ctr_B * cvr_B)


class Tower(nn.Module):
    """Linear, batch norm if asked, activation, dropout, for each hidden width. Named as DeepCTR-Torch's `DNN`."""

    def __init__(self, widths: Sequence[int], activation: str, dropout: float, use_bn: bool, init_std: float) -> None:
        """``widths``: the input's, then each hidden layer's. Weights are N(0, init_std), biases torch's default."""
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.bn = nn.ModuleList(nn.BatchNorm1d(b) for b in widths[1:]) if use_bn else None
        self.activation_layers = nn.ModuleList(ACTIVATIONS[activation]() for _ in widths[1:])
        self.dropout = nn.Dropout(dropout)
        for linear in self.linears:
            nn.init.normal_(linear.weight, mean=0.0, std=init_std)  # type: ignore[arg-type]

    def forward(self, x_BD: Tensor) -> Tensor:
        """x_BD -> h_BH of the last layer."""
        for i, linear in enumerate(self.linears):
            x_BD = linear(x_BD)
            if self.bn is not None:
                x_BD = self.bn[i](x_BD)
            x_BD = self.dropout(self.activation_layers[i](x_BD))
        return x_BD


class SharedBias(nn.Module):
    """One bias for both tasks' logits: DeepCTR-Torch's `PredictionLayer`, without its sigmoid."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))


class _History(NamedTuple):
    """A variable-length feature: ids in slots ``start:stop``, its length (if it has one) in slot ``stop``."""

    column: VarLenSparseFeat
    start: int
    stop: int


class Inputs(nn.Module):
    """Turns the ids and floats of some columns into the towers' input: sparse, pooled variable-length, dense.

    Holds no parameters: the tables come from ``lookup``. Its buffers follow from the columns and are not saved.
    """

    vocabulary_S1: Tensor

    def __init__(self, columns: Iterable[Column]) -> None:
        """Lay the columns out in the order given: a slot for each id and length, a float for each dense dimension."""
        super().__init__()
        self.sparse: list[tuple[str, int]] = []  # table, slot
        self.histories: list[_History] = []
        self.hashed: list[tuple[SparseFeat | VarLenSparseFeat, int, int]] = []
        vocabulary: list[int] = []
        for column in columns:
            if isinstance(column, DenseFeat):
                continue
            start, width = len(vocabulary), column.maxlen if isinstance(column, VarLenSparseFeat) else 1
            vocabulary += [column.vocabulary_size] * width
            if column.use_hash:
                self.hashed.append((column, start, start + width))
            if isinstance(column, SparseFeat):
                self.sparse.append((column.table, start))
                continue
            self.histories.append(_History(column, start, start + width))
            if column.length_name is not None:
                vocabulary.append(2**63 - 1)  # a length is no id: only a negative one is replaced, by 0
        vocabulary_S1 = torch.tensor(vocabulary, dtype=torch.int64)[:, None]
        self.register_buffer("vocabulary_S1", vocabulary_S1, persistent=False)

    def forward(self, ids_BS: Tensor, dense_BD: Tensor, lookup: Lookup) -> Tensor:
        """ids_BS int64 and dense_BD, both in column order -> x_BD. An id outside its vocabulary is a zero vector."""
        rows_SB, known_SB = self.rows(ids_BS)
        weight_SB1 = known_SB[:, :, None].to(dense_BD.dtype)
        parts = [lookup(table, rows_SB[slot]) * weight_SB1[slot] for table, slot in self.sparse]  # each (B, E)
        parts += [_pool(history, rows_SB, known_SB, lookup) for history in self.histories]
        return torch.cat([*parts, dense_BD], 1)

    def rows(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Raw ids -> table rows, all valid, and which are known; lengths stay. Slot-major: each slot is contiguous."""
        ids_SB = ids_BS.T.contiguous()
        if self.hashed:
            ids_SB = ids_SB.clone()  # contiguous() hands back the caller's own memory when there is one row or one slot
        for column, start, stop in self.hashed:
            ids_SB[start:stop] = hash_ids(ids_SB[start:stop], column.vocabulary_size, padded=is_padded(column))
        return known_rows(ids_SB, self.vocabulary_S1)


def _pool(history: _History, rows_SB: Tensor, known_SB: Tensor, lookup: Lookup) -> Tensor:
    """One history -> pooled_BE. An empty one is zero under every combiner; an unknown id counts, as a zero vector.

    The mean divides by the number of positions that count, never by a length beyond maxlen.
    """
    column, start, stop = history
    rows_TB, known_TB = rows_SB[start:stop], known_SB[start:stop]
    if column.length_name is None:
        counts_TB = (rows_TB != 0) | ~known_TB  # id 0 is padding; an unknown id's row is 0 too, but it is an id
    else:
        counts_TB = torch.arange(column.maxlen, device=rows_SB.device)[:, None] < rows_SB[stop]
    vectors_TBE = lookup(column.table, rows_TB)
    weight_TB = (counts_TB & known_TB).to(vectors_TBE.dtype)
    if column.combiner == "max":  # v where it counts, 0 where it counts but is unknown, -inf elsewhere
        floor_TB = torch.zeros_like(weight_TB).masked_fill(~counts_TB, -torch.inf)
        pooled_BE = (vectors_TBE * weight_TB[:, :, None] + floor_TB[:, :, None]).amax(0)
        return pooled_BE.masked_fill(~counts_TB.any(0)[:, None], 0.0)
    if column.combiner == "mean":
        weight_TB = weight_TB / counts_TB.sum(0).clamp(min=1)
    return (vectors_TBE * weight_TB[:, :, None]).sum(0)


class ESMM(nn.Module):
    """Entire-space multi-task model: click and click-and-conversion from two towers over shared embeddings."""

    def __init__(
        self,
        dnn_feature_columns: FeatureSchema | Sequence[Column],
        tower_dnn_hidden_units: Sequence[int] = (256, 128),
        l2_reg_linear: float = 1e-5,
        l2_reg_embedding: float = 1e-5,
        l2_reg_dnn: float = 0,
        init_std: float = 1e-4,
        seed: int = 1024,
        dnn_dropout: float = 0,
        dnn_activation: str = "relu",
        dnn_use_bn: bool = False,
        task_types: Sequence[str] = ("binary", "binary"),
        task_names: Sequence[str] = ("ctr", "ctcvr"),
        device: str = "cpu",
        gpus: Sequence[int] | None = None,
    ) -> None:
        """DeepCTR-Torch's arguments; ``l2_reg_linear`` is accepted and has nothing to regularise, as there.

        The same seed gives the same weights as DeepCTR-Torch 0.3.0; the caller's random state is left as it was.
        ``hyper`` keeps the arguments for checkpoints, without ``device`` and ``gpus``, which describe a machine.
        Raises ValueError for bad arguments, TypeError for something that is no feature column.
        """
        super().__init__()
        _check_gpus(device, gpus)
        self.schema = _schema(dnn_feature_columns)
        _check_tasks(self.schema, task_types, task_names)
        hidden = _check_tower(tower_dnn_hidden_units, dnn_activation)
        self.hyper: dict[str, Any] = {
            "tower_dnn_hidden_units": hidden,
            "l2_reg_linear": l2_reg_linear,
            "l2_reg_embedding": l2_reg_embedding,
            "l2_reg_dnn": l2_reg_dnn,
            "init_std": init_std,
            "seed": seed,
            "dnn_dropout": dnn_dropout,
            "dnn_activation": dnn_activation,
            "dnn_use_bn": dnn_use_bn,
            "task_types": list(task_types),
            "task_names": list(task_names),
        }
        self._inputs = Inputs(self.schema.columns)
        self._inputs_of = nn.ModuleDict(
            {source: Inputs(c for c in self.schema.columns if c.source == source) for source in SOURCES}
        )
        self._recipe: offline.Recipe | None = None
        self._split_X()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the CUDA generators too
            self._build(hidden)
        self.to(device)

    def _build(self, hidden: list[int]) -> None:
        """Create every parameter in DeepCTR-Torch's order, so that the same seed draws the same weights."""
        init_std = self.hyper["init_std"]
        self.embedding_dict = nn.ModuleDict()
        for column in _embedded(self.schema):  # a shared table is drawn once a column, and the last draw stays
            self.embedding_dict[column.table] = nn.Embedding(column.vocabulary_size, column.dim)
        for table in self.embedding_dict.values():
            nn.init.normal_(table.weight, mean=0.0, std=init_std)  # type: ignore[arg-type]
        self.out = SharedBias()
        options = (self.hyper["dnn_activation"], self.hyper["dnn_dropout"], self.hyper["dnn_use_bn"], init_std)
        self.ctr_dnn = Tower([self.input_dim, *hidden], *options)
        self.cvr_dnn = Tower([self.input_dim, *hidden], *options)
        self.ctr_dnn_final_layer = nn.Linear(hidden[-1], 1, bias=False)
        self.cvr_dnn_final_layer = nn.Linear(hidden[-1], 1, bias=False)

    def _split_X(self) -> None:
        """Which columns of the concatenated X are id slots and which are floats."""
        dense = {column.name for column in self.schema.columns if isinstance(column, DenseFeat)}
        ids = [at for name, (a, b) in self.schema.index.items() if name not in dense for at in range(a, b)]
        floats = [at for name, (a, b) in self.schema.index.items() if name in dense for at in range(a, b)]
        self.register_buffer("_id_columns", torch.tensor(ids, dtype=torch.int64), persistent=False)
        self.register_buffer("_dense_columns", torch.tensor(floats, dtype=torch.int64), persistent=False)

    @classmethod
    def from_hyper(cls, schema: FeatureSchema, hyper: Mapping[str, Any], device: str = "cpu") -> ESMM:
        """The model that a checkpoint's schema and ``hyper`` describe, with freshly initialised weights."""
        return cls(schema, **hyper, device=device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.out.bias.device

    @property
    def input_dim(self) -> int:
        """D, the towers' input width."""
        return sum(c.dimension if isinstance(c, DenseFeat) else c.dim for c in self.schema.columns)

    def input_columns(self, source: Source) -> Int64:
        """Which columns of x_BD come from one source, in the order `embed_source` gives them."""
        sizes = [*((c, c.dim) for c in _embedded(self.schema))]
        sizes += [(c, c.dimension) for c in self.schema.columns if isinstance(c, DenseFeat)]  # type: ignore[misc]
        starts = np.cumsum([0, *(size for _, size in sizes)])
        parts = [np.arange(a, a + n) for (c, n), a in zip(sizes, starts, strict=False) if c.source == source]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def lookup(self, table: str, rows: Tensor) -> Tensor:
        """Vectors of the model's own table: rows of any shape -> one more axis of width E."""
        return F.embedding(rows, self.embedding_dict[table].weight)  # type: ignore[arg-type]

    def embed(self, ids_BS: Tensor, dense_BD: Tensor, lookup: Lookup | None = None) -> Tensor:
        """All columns in schema order, as `FeatureSchema.pack` makes them -> x_BD: sparse, pooled histories, dense.

        ``lookup`` replaces the model's tables, so that a learner can hand in just the rows a batch touches; it is
        called with valid rows only, once a column, sparse columns first.
        """
        x_BD: Tensor = self._inputs(ids_BS, dense_BD, lookup or self.lookup)
        return x_BD

    def embed_source(self, source: Source, ids_NS: Tensor, dense_ND: Tensor, lookup: Lookup | None = None) -> Tensor:
        """One source's `FeatureBlock` -> its part of x: columns `input_columns(source)` of what `embed` makes."""
        x_ND: Tensor = self._inputs_of[source](ids_NS, dense_ND, lookup or self.lookup)
        return x_ND

    def towers(self, x_BD: Tensor) -> Tensor:
        """x_BD -> logits_B2, [CTR, CVR], both with the shared bias."""
        ctr_B1 = self.ctr_dnn_final_layer(self.ctr_dnn(x_BD))
        cvr_B1 = self.cvr_dnn_final_layer(self.cvr_dnn(x_BD))
        return torch.cat([ctr_B1, cvr_B1], 1) + self.out.bias

    def logits(self, ids_BS: Tensor, dense_BD: Tensor) -> Tensor:
        """ids_BS int64, dense_BD float32, in schema order -> logits_B2, [CTR, CVR]."""
        return self.towers(self.embed(ids_BS, dense_BD))

    def l2_penalty(self) -> Tensor:
        """The L2 terms of the training loss, over whole tables, as DeepCTR-Torch has them: no bias, no batch norm."""
        towers = [*self.ctr_dnn.named_parameters(), *self.cvr_dnn.named_parameters()]
        dnn: list[Tensor] = [weight for name, weight in towers if "weight" in name and "bn" not in name]
        dnn += [self.ctr_dnn_final_layer.weight, self.cvr_dnn_final_layer.weight]
        groups = (("l2_reg_embedding", list(self.embedding_dict.parameters())), ("l2_reg_dnn", dnn))
        penalty = torch.zeros_like(self.out.bias[0])
        for name, weights in groups:
            if self.hyper[name] > 0:
                penalty = penalty + self.hyper[name] * sum(weight.square().sum() for weight in weights)
        return penalty

    def forward(self, X: Tensor) -> Tensor:
        """X (B, schema.width), all columns concatenated in schema order -> (B, 2): pCTR, pCTCVR.

        Ids are truncated towards zero. int64 X keeps every id exact, float64 up to 2^53, float32 only up to 2^24.
        """
        p = probabilities(self._logits_of(X))
        return torch.stack([p.ctr_B, p.ctcvr_B], 1)

    def cvr(self, X: Tensor) -> Tensor:
        """X as in `forward` -> cvr_B, P(conversion | click)."""
        return probabilities(self._logits_of(X)).cvr_B

    def _logits_of(self, X: Tensor) -> Tensor:
        if X.ndim != 2 or X.shape[1] < self.schema.width:
            raise ValueError(f"X must be (rows, {self.schema.width}), got {tuple(X.shape)}")
        dense_BD = X[:, self._dense_columns].to(self.out.bias.dtype)  # type: ignore[index]
        return self.logits(X[:, self._id_columns].long(), dense_BD)  # type: ignore[index]

    def pack(self, x: Mapping[str, Any] | Sequence[Any]) -> tuple[Int64, Float32]:
        """Feature arrays by name, or listed in ``schema.index`` order -> ids_BS, dense_BD; ids stay integers.

        Each array is (N,) or (N, width). Raises KeyError for a missing feature, ValueError for a wrong shape.
        """
        named = dict(x) if isinstance(x, Mapping) else dict(zip(self.schema.index, x, strict=True))
        dense = {column.name for column in self.schema.columns if isinstance(column, DenseFeat)}
        first = next(iter(self.schema.index))
        rows = len(np.atleast_1d(named.get(first, ())))
        ids_parts: list[Int64] = []
        dense_parts: list[Float32] = []
        for name, (start, stop) in self.schema.index.items():
            if name not in named:
                raise KeyError(f"feature {name!r} is missing; got {', '.join(sorted(named))}")
            values = np.asarray(named[name])
            values = values[:, None] if values.ndim == 1 else values
            if values.ndim != 2 or values.shape[1] != stop - start:
                raise ValueError(f"feature {name!r} must be (rows, {stop - start}), got {values.shape}")
            if len(values) != rows:
                raise ValueError(f"feature {name!r} has {len(values)} rows, {first!r} has {rows}")
            if name in dense:
                dense_parts.append(values.astype(np.float32))
            else:
                ids_parts.append(values.astype(np.int64))
        ids_BS = np.concatenate([np.zeros((rows, 0), np.int64), *ids_parts], 1)
        return ids_BS, np.concatenate([np.zeros((rows, 0), np.float32), *dense_parts], 1)

    def predict(self, x: Mapping[str, Any] | Sequence[Any], batch_size: int = 256) -> NDArray[np.float64]:
        """Feature arrays as in `pack` -> float64 (N, 2): pCTR, pCTCVR. Leaves train or eval mode as it was."""
        return self.score(*self.pack(x), batch_size)

    def score(self, ids_NS: Int64, dense_ND: Float32, batch_size: int) -> NDArray[np.float64]:
        """`predict` on packed arrays."""
        out = np.empty((len(ids_NS), 2))
        ids, dense = torch.from_numpy(ids_NS), torch.from_numpy(dense_ND)
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                for at in range(0, len(out), batch_size):
                    rows = slice(at, at + batch_size)
                    p = probabilities(self.logits(ids[rows].to(self.device), dense[rows].to(self.device)))
                    out[rows] = torch.stack([p.ctr_B, p.ctcvr_B], 1).cpu().numpy()
        finally:
            self.train(training)
        return out

    def compile(
        self,
        optimizer: str | torch.optim.Optimizer = "adam",
        loss: str | Sequence[str] | None = None,
        metrics: Sequence[str] | None = None,
    ) -> None:
        """Choose what `fit` uses: sgd, adam, adagrad, rmsprop or an instance; metrics from auc, logloss, pcoc (all)."""
        self._recipe = offline.Recipe.of(self.hyper["task_names"], self.parameters(), optimizer, loss, metrics)

    def fit(
        self,
        x: Mapping[str, Any] | Sequence[Any],
        y: ArrayLike,
        batch_size: int = 256,
        epochs: int = 1,
        verbose: int = 1,
        validation_split: float = 0.0,
        validation_data: tuple[Any, Any] | None = None,
        shuffle: bool = True,
    ) -> offline.History:
        """Train on arrays: x as in `pack`, y (N, 2) of 0 and 1, [click, click and conversion].

        ``verbose`` 1 shows a progress bar, 2 a line an epoch. ``validation_split`` keeps back the last share of rows;
        ``validation_data`` is (x, y). The model's seed orders the rows. The history holds, an epoch, ``loss``,
        ``<task>_<metric>`` as predicted just before each step, and ``val_<task>_<metric>``. ValueError if not compiled.
        """
        if self._recipe is None:
            raise ValueError("call compile(optimizer) before fit")
        train, held_out = offline.split(self._labelled(x, y), 0.0 if validation_data else validation_split)
        if validation_data is not None:
            x_held_out, y_held_out = validation_data
            held_out = self._labelled(x_held_out, y_held_out)
        plan = offline.Plan(batch_size, epochs, verbose, self.hyper["seed"] if shuffle else None)
        return offline.fit(self, self._recipe, train, held_out, plan)

    def evaluate(self, x: Mapping[str, Any] | Sequence[Any], y: ArrayLike, batch_size: int = 256) -> dict[str, float]:
        """``<task>_<metric>``, exact over all rows; nan where the rows do not define it (an AUC of one class)."""
        metrics = self._recipe.metrics if self._recipe else tuple(offline.METRICS)
        return offline.evaluate(self, self.hyper["task_names"], metrics, self._labelled(x, y), batch_size)

    def _labelled(self, x: Mapping[str, Any] | Sequence[Any], y: ArrayLike) -> offline.Rows:
        ids_NS, dense_ND = self.pack(x)
        return offline.Rows(ids_NS, dense_ND, offline.labels(y, len(ids_NS)))


def _schema(columns: FeatureSchema | Sequence[Column]) -> FeatureSchema:
    if isinstance(columns, FeatureSchema):
        return columns
    for column in columns:
        if not isinstance(column, SparseFeat | VarLenSparseFeat | DenseFeat):
            raise TypeError(f"Invalid feature column type,got {type(column)!r}")
    return FeatureSchema(columns)


def _embedded(schema: FeatureSchema) -> list[SparseFeat | VarLenSparseFeat]:
    """Columns with a table, in the order the towers see them: sparse, then variable-length."""
    sparse = [c for c in schema.columns if isinstance(c, SparseFeat)]
    return [*sparse, *(c for c in schema.columns if isinstance(c, VarLenSparseFeat))]


def _check_gpus(device: str, gpus: Sequence[int] | None) -> None:
    if not gpus:
        return
    first = gpus[0] if isinstance(gpus[0], int) else torch.device(gpus[0]).index
    if torch.device(device).type != "cuda" or torch.device(device).index != first:
        raise ValueError(f"`gpus[0]` should be the same gpu with `device`, got gpus={list(gpus)!r}, device={device!r}")
    if len(gpus) > 1:
        raise ValueError(f"one process drives one GPU, got gpus={list(gpus)!r}; use torchrun for more")


def _check_tasks(schema: FeatureSchema, task_types: Sequence[str], task_names: Sequence[str]) -> None:
    """DeepCTR-Torch's checks, in its order and with its words, plus what was given."""
    if len(task_names) != 2:
        raise ValueError(f"the length of task_names must be equal to 2, got {list(task_names)!r}")
    if not schema.columns:
        raise ValueError(f"dnn_feature_columns is null! got {list(schema.columns)!r}")
    if len(task_types) != 2:
        raise ValueError(f"num_tasks must be equal to the length of task_types, got {list(task_types)!r} for 2 tasks")
    for task_type in task_types:
        if task_type != "binary":
            raise ValueError(f"task must be binary in ESMM, {task_type} is illegal, got {list(task_types)!r}")
    for column in _embedded(schema):
        if not column.table or "." in column.table or hasattr(nn.ModuleDict(), column.table):
            raise ValueError(f"feature {column.name!r}: {column.table!r} cannot name a table; set embedding_name")


def _check_tower(hidden: Sequence[int], activation: str) -> list[int]:
    if len(hidden) == 0:
        raise ValueError(f"hidden_units is empty!! got {list(hidden)!r}")
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden units must be at least 1, got {list(hidden)!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"dnn_activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return [int(width) for width in hidden]
