"""The fast path: users once a request, items once and cached, rows in blocks, beside the caller's thread.

The first layer is linear, so it is a sum of a user's, an item's and a context's part: exact, not an approximation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from esmm.batch import FeatureBlock, Float32, Int64, RankBatch, Scores, Source, zero_block
from esmm.features import SOURCES
from esmm.model import ESMM
from esmm.predictor.compiled import CompiledRows, has_compiler
from esmm.predictor.config import Pending, PredictorConfig, Served
from esmm.predictor.fold import fold
from esmm.predictor.plain import scores_of
from esmm.predictor.rows import EagerRows
from esmm.predictor.scripted import Inputs, ScriptedRows, script_rows
from esmm.predictor.table import PartTable

_Rows = EagerRows | ScriptedRows | CompiledRows

QUEUE = 2  # batches launched and not yet computed; a third launch waits


@dataclass
class PredictorStats:
    """Running totals of one predictor; a batch of more than ``max_rows`` counts once a slice."""

    batches: int = 0
    rows: int = 0
    items: int = 0
    item_hits: int = 0
    users: int = 0
    padded: int = 0  # rows computed for nothing, to fill buckets


class _Slice(NamedTuple):
    """Rows ready to be computed; B rows, S parts a row."""

    user: FeatureBlock
    missed: FeatureBlock | None  # items whose parts are to be computed; None: none
    rows_M: Int64  # table rows of their parts
    context: FeatureBlock
    parts_BS: Int64  # table rows
    epoch: int


class FastPredictor:
    """One model version, computed in its own thread. `launch` and `collect` are called from one thread."""

    def __init__(self, model: ESMM, version: int, config: PredictorConfig) -> None:
        """Take over ``model``: put it into eval mode and copy what the fast path needs of its weights."""
        self._model = model.eval().to(config.device)
        self._version = version
        self._config = config
        self.stats = PredictorStats()
        self.served = Served(config.precision, None, None)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self._folded = fold(self._model)
        self._table = PartTable(
            _capacity(config, self._folded.width * dtype.itemsize),
            config.max_rows,
            self._folded.width,
            dtype,
            config.device,
        )
        self._ways = self._ways_of(dtype)
        self._rows = self._ways[0][1]()
        self._epoch = self._tags_epoch = 0  # the first: batches that failed so far; the second: as far as the tags know
        self._no_items = torch.zeros((0, len(self._folded.first["item"])))
        self._slots = threading.Semaphore(QUEUE)
        self._thread = ThreadPoolExecutor(1, f"predictor-{version}", torch.set_num_threads, (config.threads,))

    @property
    def version(self) -> int:
        """The model version."""
        return self._version

    @property
    def config(self) -> PredictorConfig:
        """How it runs."""
        return self._config

    def launch(self, batch: RankBatch) -> Pending:
        """Start computing; waits only when `QUEUE` batches are on their way. Raises RuntimeError once closed."""
        try:
            slices = self._prepare(batch)
        except Exception as error:  # noqa: BLE001  raised where the result is asked for, as what computing raises
            failed: Future[Scores] = Future()
            failed.set_exception(error)
            return Pending(batch.rows, failed)
        self._slots.acquire()
        try:
            future = self._thread.submit(self._scores, slices)
        except RuntimeError:
            self._slots.release()
            raise
        future.add_done_callback(self._finished)
        return Pending(batch.rows, future)

    def collect(self, pending: Pending) -> Scores:
        """The scores of a launched batch, in its row order; raises what computing them raised."""
        return pending.future.result()

    def close(self) -> None:
        """Finish what was launched and stop the thread."""
        self._thread.shutdown()

    def logits(self, batch: RankBatch) -> Float32:
        """logits_B2 of a batch, waited for: what `precision_error` compares."""
        return self._thread.submit(self._logits, self._prepare(batch)).result()

    def warm(self) -> None:
        """Run a batch of every bucket size, so that no later batch pays for compiling or for a kernel's first use.

        What does not compile here is run without, and `served` warns of it.
        """
        try:
            self._warm()
        except Exception as error:  # compilers fail in any way
            (way, _), *self._ways = self._ways
            if not self._ways:
                raise
            self.served = self.served._replace(warning=f"not {way}: {type(error).__name__}: {str(error)[:200]}")
            self._rows = self._ways[0][1]()
            self.warm()

    def _ways_of(self, dtype: torch.dtype) -> list[tuple[str, Callable[[], _Rows]]]:
        """How rows can be computed here, the one to try first first; `served` warns of what cannot be had."""
        folded, table, config = self._folded, self._table, self._config
        ways: list[tuple[str, Callable[[], _Rows]]] = []
        if config.compile and has_compiler():
            ways.append(("compiled", lambda: CompiledRows(folded, table.parts, dtype, config.buckets)))
        elif config.compile:
            self.served = self.served._replace(warning="no C++ compiler: not compiled")
        graph = script_rows() if config.script else None
        if graph is not None:
            ways.append(("scripted", lambda: ScriptedRows(graph, folded, table.parts, dtype, table.first_user)))
        elif config.script:
            self.served = self.served._replace(warning="no TorchScript: operation by operation, which is slower")
        return [*ways, ("eager", lambda: EagerRows(folded, table.parts, dtype))]

    def _warm(self) -> None:
        layouts = [self._model.schema.layout(source) for source in SOURCES]
        for rows in self._config.buckets:
            user, item, context = (zero_block(layout, rows) for layout in layouts)
            index_B = np.arange(rows)
            self.logits(RankBatch(user, item, context, index_B, index_B, np.full(rows, -1), np.zeros(rows, np.int64)))
        self.stats = PredictorStats()

    def _finished(self, _: Future[Scores]) -> None:
        self._slots.release()

    # In the caller's thread: which parts are where. No torch, so that nothing waits for the compute thread.

    def _prepare(self, batch: RankBatch) -> list[_Slice]:
        """Slices of at most ``max_rows`` rows, users and items, with a place for each of their parts."""
        if self._tags_epoch != self._epoch:  # a batch failed: what it was to write may be tagged
            self._tags_epoch = self._epoch
            self._table.forget()
        limit = self._config.max_rows
        try:
            if max(batch.rows, batch.user.rows, batch.item.rows) <= limit:
                return [self._place(batch)]
            return [self._place(_narrow(batch, slice(at, at + limit))) for at in range(0, batch.rows, limit)]
        except BaseException:
            self._table.forget()  # what is tagged by now will not be written
            raise

    def _place(self, batch: RankBatch) -> _Slice:
        parts, missed, rows_M = [self._table.first_user + batch.user_of_B], None, np.zeros(0, np.int64)
        self.stats.batches += 1
        self.stats.rows += batch.rows
        self.stats.users += batch.user.rows
        if len(self._folded.first["item"]):
            placement = self._table.place(batch.item_slot_I, batch.item_generation_I)
            if len(placement.missed_M):
                missed = batch.item.take(placement.missed_M)
                rows_M = self._table.claim(placement, batch.item_slot_I, batch.item_generation_I)
            parts.append(placement.row_I[batch.item_of_B])
            self.stats.items += batch.item.rows
            self.stats.item_hits += batch.item.rows - len(rows_M)
        return _Slice(batch.user, missed, rows_M, batch.context, np.stack(parts, 1), self._tags_epoch)

    # In the compute thread

    def _scores(self, slices: list[_Slice]) -> Scores:
        return scores_of(self._logits(slices), self._version)

    @torch.inference_mode()
    def _logits(self, slices: list[_Slice]) -> Float32:
        if any(one.epoch != self._epoch for one in slices):
            raise RuntimeError(
                "a batch launched before this one failed, and this one may need its parts: launch it again"
            )
        try:
            done = [self._compute(one) for one in slices]
        except BaseException:
            self._epoch += 1
            raise
        return done[0] if len(done) == 1 else np.concatenate([np.zeros((0, 2), np.float32), *done])

    def _compute(self, one: _Slice) -> Float32:
        user_UD, context_BD = self._embed("user", one.user), self._embed("context", one.context)
        item_MD = self._no_items if one.missed is None else self._embed("item", one.missed)
        rows, table = self._rows, self._table
        if isinstance(rows, ScriptedRows):
            logits_B2, bad_U, bad_M = rows.logits(one.parts_BS, Inputs(user_UD, item_MD, one.rows_M, context_BD))
            table.watch_users(bad_U)
            table.watch(one.rows_M, bad_M)
        else:
            table.write_users(user_UD @ self._folded.first["user"] + self._folded.bias_T)
            if one.missed is not None:
                table.write_items(one.rows_M, item_MD @ self._folded.first["item"])
            logits_B2 = rows.logits(one.parts_BS, context_BD)
        if isinstance(rows, CompiledRows):
            self.stats.padded, rows.padded = self.stats.padded + rows.padded, 0
        if not table.clean:
            logits_B2[table.poisoned[one.parts_BS].any(1)] = np.nan
        if context_BD.shape[1]:
            logits_B2[~torch.isfinite(context_BD.sum(1)).cpu().numpy()] = np.nan
        return logits_B2

    def _embed(self, source: Source, block: FeatureBlock) -> torch.Tensor:
        """The model's x of one source."""
        ids_NS, dense_ND = (torch.from_numpy(array).to(self._config.device) for array in block)
        if not ids_NS.shape[1]:  # dense features go in as they are
            return dense_ND
        return self._model.embed_source(source, ids_NS, dense_ND)


def _capacity(config: PredictorConfig, bytes_an_item: int) -> int:
    return min(config.cache_items, (config.cache_megabytes << 20) // bytes_an_item)


def _narrow(batch: RankBatch, rows: slice) -> RankBatch:
    """Some rows with just the users and items they use."""
    users, user_of_B = np.unique(batch.user_of_B[rows], return_inverse=True)
    items, item_of_B = np.unique(batch.item_of_B[rows], return_inverse=True)
    return RankBatch(
        batch.user.take(users),
        batch.item.take(items),
        FeatureBlock(batch.context.ids_NS[rows], batch.context.dense_ND[rows]),
        user_of_B,
        item_of_B,
        batch.item_slot_I[items],
        batch.item_generation_I[items],
    )
