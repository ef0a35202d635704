"""The rows that the gate judges by, each with what the candidate said of it before it learned anything from it.

A version knows nothing of rows that were learned after it was published; the candidate's own predictions are
progressive: made just before it learned the row. So both are judged on rows that neither had learned from. A matured
click was learned from before, when it was first emitted and when its conversion came late: of those occasions the first
one after the other version was published counts, so that both know equally little of how that click ended.

"When" is a number of rows learned, never a time.

Beside them are rows of impressions that are held out: no model learns from any row of theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Bool, Examples, Float32, Int64, Kind, concat_examples
from stream_scorer.core.gate import cvr_of
from stream_scorer.core.pending import Arrays, from_arrays, to_arrays

UInt64 = NDArray[np.uint64]
ABSENT: Final = -1
OCCASIONS: Final = 3  # a click is learned from when first emitted, when it converts late, and when it matures
OPEN_CLICKS: Final = 16  # times the limit of rows: clicks that are remembered until they mature
TELLING: Final = 8  # dense columns of a block that tell rows apart: all of them would cost more than they add
_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)


class Judgeable(NamedTuple):
    """B rows, and what the candidate said of each before it learned from it."""

    examples: Examples
    candidate_B: Float32


class _Part(NamedTuple):
    """K rows of a step. ``at_KE``: rows learned before each of E predictions, ascending, `ABSENT` for none.

    The last prediction is always there. The step is kept as it is: most of its rows belong to one part, and it would
    cost more to copy them each time.
    """

    examples: Examples
    rows_K: Int64
    at_KE: Int64
    said_KE: Float32

    @classmethod
    def of(cls, examples: Examples, rows_K: Int64, at_KE: Int64, said_KE: Float32) -> _Part:
        """Rows of a step; a copy where it would keep many others alive."""
        if 2 * len(rows_K) >= examples.rows:
            return cls(examples, rows_K, at_KE, said_KE)
        return cls(examples.take(rows_K), np.arange(len(rows_K)), at_KE, said_KE)

    @property
    def rows(self) -> int:
        """K."""
        return len(self.rows_K)

    def some(self, which: Any) -> _Part:
        """Some of the rows, by a slice or a mask (K,)."""
        return _Part(self.examples, self.rows_K[which], self.at_KE[which], self.said_KE[which])


class _Rows:
    """The last ``limit`` rows."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: deque[_Part] = deque()
        self._rows = 0

    def add(self, part: _Part) -> None:
        if not part.rows:
            return
        self._parts.append(part)
        self._rows += part.rows
        while self._rows > self._limit:
            oldest = self._parts.popleft()
            over = min(self._rows - self._limit, oldest.rows)
            self._rows -= over
            if over < oldest.rows:
                self._parts.appendleft(oldest.some(slice(over, None)))

    def since(self, learned: int) -> Judgeable | None:
        """The rows not yet learned at ``learned``, with what was said first after it."""
        parts = [part.some(part.at_KE[:, -1] >= learned) for part in self._parts]
        parts = [part for part in parts if part.rows]
        if not parts:
            return None
        first = [(part.at_KE >= learned).argmax(axis=1) for part in parts]
        said = [part.said_KE[np.arange(part.rows), first_K] for part, first_K in zip(parts, first, strict=True)]
        return Judgeable(_together(parts), np.concatenate(said))

    def forget(self) -> None:
        self._parts.clear()
        self._rows = 0

    def arrays(self, prefix: str) -> Arrays:
        if not self._parts:
            return {}
        at_BE, said_BE = (np.concatenate(columns) for columns in zip(*(part[2:] for part in self._parts), strict=True))
        rows = to_arrays(prefix, _together(self._parts))
        return rows | {f"{prefix}_at_BE": at_BE, f"{prefix}_said_BE": said_BE}

    def restore(self, prefix: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.forget()
        examples = from_arrays(prefix, arrays)
        if examples is not None:
            at_BE, said_BE = arrays[f"{prefix}_at_BE"], arrays[f"{prefix}_said_BE"]
            self.add(_Part(examples, np.arange(examples.rows), at_BE, said_BE))


def _together(parts: Iterable[_Part]) -> Examples:
    return concat_examples([part.examples.take(part.rows_K) for part in parts])


class GateRows:
    """Recent first emissions with pCTR, and recent matured clicks with pCVR; and such that were held out."""

    def __init__(self, limit: int, held_out: int = 1_000) -> None:
        """``limit``: first emissions kept, and as many matured clicks; ``held_out``: of those held out likewise."""
        self.learned = 0  # rows, ever
        self._first, self._matured = _Rows(limit), _Rows(limit)
        self._held_first, self._held_matured = _Rows(held_out), _Rows(held_out)
        self._open_limit = OPEN_CLICKS * limit
        self._open: dict[int, list[tuple[int, float]]] = {}  # click -> when it was learned from, and what was said

    def add(self, examples: Examples, ctr_B: Float32, ctcvr_B: Float32) -> None:
        """Rows just learned, with the learner's predictions from before it did."""
        at, kind_B = self.learned, examples.kind_B
        self.learned += examples.rows
        first_K = np.flatnonzero(kind_B == Kind.FIRST)
        at_KE = np.full((len(first_K), 1), at, np.int64)
        self._first.add(_Part.of(examples, first_K, at_KE, ctr_B[first_K, None].astype(np.float32)))
        clicked_K = np.flatnonzero((examples.click_B == 1) & (kind_B != Kind.MATURED))
        matured_K = np.flatnonzero(kind_B == Kind.MATURED)
        cvr_B = cvr_of(ctr_B, ctcvr_B)
        if len(clicked_K):
            self._remember(examples.take(clicked_K), at, cvr_B[clicked_K])
        if len(matured_K):
            self._mature(examples.take(matured_K), at, cvr_B[matured_K])

    def hold_out(self, examples: Examples) -> None:
        """Rows that are not learned, of impressions of which none is."""
        for rows, kind in ((self._held_first, Kind.FIRST), (self._held_matured, Kind.MATURED)):
            rows_K = np.flatnonzero(examples.kind_B == kind)
            nothing = (np.zeros((len(rows_K), 1), np.int64), np.zeros((len(rows_K), 1), np.float32))
            rows.add(_Part.of(examples, rows_K, *nothing))

    def forget_held_out(self) -> None:
        """Begin to hold out anew."""
        self._held_first.forget()
        self._held_matured.forget()

    def _remember(self, clicks: Examples, at: int, cvr_B: Float32) -> None:
        for click, cvr in zip(identity(clicks).tolist(), cvr_B.tolist(), strict=True):
            occasions = self._open.setdefault(click, [])
            if len(occasions) < OCCASIONS - 1:
                occasions.append((at, cvr))
        while len(self._open) > self._open_limit:
            del self._open[next(iter(self._open))]

    def _mature(self, matured: Examples, at: int, cvr_B: Float32) -> None:
        at_BE = np.full((matured.rows, OCCASIONS), ABSENT, np.int64)
        said_BE = np.zeros((matured.rows, OCCASIONS), np.float32)
        at_BE[:, -1], said_BE[:, -1] = at, cvr_B
        for row, click in enumerate(identity(matured).tolist()):
            for occasion, (then, cvr) in enumerate(self._open.pop(click, ())):
                at_BE[row, occasion], said_BE[row, occasion] = then, cvr
        self._matured.add(_Part(matured, np.arange(matured.rows), at_BE, said_BE))

    def forget(self) -> None:
        """The learner is another one now: what it said before says nothing of it."""
        self._first.forget()
        self._matured.forget()
        self._open = {}

    def first_since(self, learned: int) -> Judgeable | None:
        """First emissions learned after a version with ``learned`` rows was published, with pCTR."""
        return self._first.since(learned)

    def matured_since(self, learned: int) -> Judgeable | None:
        """Clicks that matured after a version with ``learned`` rows was published, with pCVR."""
        return self._matured.since(learned)

    def held_out(self) -> tuple[Judgeable | None, Judgeable | None]:
        """First emissions and matured clicks that were held out; what the candidate said of them is not kept."""
        return self._held_first.since(0), self._held_matured.since(0)

    def arrays(self) -> Arrays:
        """For a checkpoint."""
        padded = [(*row, *[(ABSENT, 0.0)] * (OCCASIONS - 1 - len(row))) for row in self._open.values()]
        at = [[then for then, _ in row] for row in padded]
        said = [[cvr for _, cvr in row] for row in padded]
        shape = (len(padded), OCCASIONS - 1)
        return {
            "gate_learned": np.array([self.learned], np.int64),
            "gate_open": np.array(list(self._open), np.uint64),
            "gate_open_at": np.array(at, np.int64).reshape(shape),
            "gate_open_said": np.array(said, np.float64).reshape(shape),
            **self._first.arrays("gate_first"),
            **self._matured.arrays("gate_matured"),
            **self._held_first.arrays("held_first"),
            **self._held_matured.arrays("held_matured"),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over `arrays`; KeyError when one is missing."""
        self.learned = int(arrays["gate_learned"][0])
        names = ("gate_open", "gate_open_at", "gate_open_said")
        opened, at, said = (arrays[name].tolist() for name in names)
        self._open = {
            click: [(then, cvr) for then, cvr in zip(*row, strict=True) if then != ABSENT]
            for click, *row in zip(opened, at, said, strict=True)
        }
        self._first.restore("gate_first", arrays)
        self._matured.restore("gate_matured", arrays)
        self._held_first.restore("held_first", arrays)
        self._held_matured.restore("held_matured", arrays)


def is_held_out(examples: Examples, share: float) -> Bool:
    """Whether each row (B,) is of an impression that is held out: the same for all rows of one impression."""
    if share == 0:
        return np.zeros(examples.rows, np.bool_)
    out: Bool = (identity(examples) >> np.uint64(32)) < np.uint64(share * 2**32)
    return out


def identity(examples: Examples) -> UInt64:
    """A hash (B,) of each row's impression time and features, which all rows of one impression share."""
    blocks = (examples.user, examples.item, examples.context)
    columns = [examples.impression_ms_B[:, None], *(block.ids_NS for block in blocks)]
    floats = (np.ascontiguousarray(block.dense_ND[:, :TELLING]) for block in blocks)
    columns += [block_ND.view(np.int32).astype(np.int64) for block_ND in floats]
    word_BK = np.concatenate(columns, axis=1).view(np.uint64)
    with np.errstate(over="ignore"):
        factor_K = np.multiply.accumulate(np.full(word_BK.shape[1], _FACTOR))
    out: UInt64 = word_BK @ factor_K
    return out
