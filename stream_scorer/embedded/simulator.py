"""The demo's outside world in one loop: asks for scores, shows what they rank best, reports what users do, keeps count.

`Simulator` talks through a `Source` (of scores) and a `Sink`, so it works on the embedded broker and on Kafka alike. It
asks open-loop: requests come when they come (a Poisson process), however slow the answers are. It knows the truth of
every request at the moment of asking, so it can say how far the scores are. Times in messages are wall-clock ms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import FatalError, RecoverableError
from stream_scorer.core.records import OutRecord, Record
from stream_scorer.embedded.market import Int64, Market
from stream_scorer.embedded.market_features import item_block, item_names, user_block, user_names
from stream_scorer.embedded.outbox import Happened, Outbox, feedback_record
from stream_scorer.embedded.plan import Joined, SimulatorPlan, Wire
from stream_scorer.embedded.shop import CLICK, KINDS, Truth, react, show
from stream_scorer.embedded.tally import COUNTED, SimulatorStats, Tally

FOLD_S = 0.5
RETRY_S = 1.0
MAX_BURST = 2_000  # requests one step may owe after a stall
_WAIT_S = 0.02


class _Open(NamedTuple):
    """A request that waits for its scores."""

    sent_ms: int
    user: int
    items: list[str]
    category_K: Int64
    truth_3K: NDArray[np.float32]  # click, buy, tilt


class Simulator:
    """Owned by one thread; `stats` is replaced as a whole, so another thread may read it at any time."""

    def __init__(self, market: Market, wire: Wire, plan: SimulatorPlan) -> None:
        """Nothing is sent before `start`."""
        if plan.rate <= 0:
            raise ValueError(f"rate is requests a second and must be positive, got {plan.rate}")
        self.market = market
        self._wire, self._plan = wire, plan
        self._rng = np.random.default_rng([market.plan.seed, 1])  # apart from the market's, whose draws must not shift
        self._user_names = user_names(np.arange(market.plan.users))
        self._tally = Tally()
        self._open: dict[str, _Open] = {}  # by request id, oldest first
        self._unsent: set[str] = set()
        self._outbox = Outbox()
        self._number = 0
        self._joined = Joined()
        self._started_s = self._next_s = self._folded_s = self._last_score_s = 0.0
        self._owed: dict[str, set[int]] = {"user": set(), "item": set()}
        self._retry_s = 0.0
        self._ended = False
        self.stats = self._snapshot(0.0)

    def start(self) -> None:
        """Write every user's and item's features and join the scores' group; `FatalError` when that takes too long."""
        self._write("user", np.arange(self.market.plan.users))
        self._write("item", np.arange(self.market.plan.items))
        self._wire.scores.subscribe(self._joined)
        deadline = Deadline.after(self._plan.join_timeout_s, self._wire.clock.monotonic_s)
        while not self._joined.partitions:  # a request asked before could be answered unheard
            if deadline.passed:
                raise FatalError(f"no partition of the scores topic was assigned in {self._plan.join_timeout_s:.0f} s")
            self._read(self._wire.scores.poll(1_000, 0.1, 0.0))
        self._started_s = self._folded_s = self._next_s = self._wire.clock.monotonic_s()
        self._next_s += float(self._rng.exponential(1.0 / self._plan.rate))

    def run(self, duration_s: float, stopping: Callable[[], bool]) -> None:
        """Step for ``duration_s`` seconds (0: without end) or until ``stopping()``."""
        end = self._wire.clock.monotonic_s() + duration_s if duration_s > 0 else float("inf")
        while self._wire.clock.monotonic_s() < end and not stopping():
            self.step()

    def step(self) -> None:
        """Let time pass in the market, ask what is due, read scores, send the feedback that is due."""
        now_s = self._wire.clock.monotonic_s()
        changes = self.market.advance(now_s - self._started_s)
        self._write_later("user", changes.users)
        self._write_later("item", changes.slots)
        self._ask(self._due(now_s))
        self._turn(max(0.0, min(_WAIT_S, self._next_s - self._wire.clock.monotonic_s())))

    def drain(self, deadline: Deadline) -> SimulatorStats:
        """Ask nothing more; wait for the scores of what was asked, deliver what was sent, and give the final account.

        Feedback whose time has not come is left unsent (``feedback["pending"]``).
        """
        while self._open and not deadline.passed:
            self._turn(min(_WAIT_S, deadline.left_s))
        self._turn(0.0)
        self._wire.sink.flush(deadline)
        self._ended = True
        self._fold(self._wire.clock.monotonic_s())
        return self.stats

    def _turn(self, wait_s: float) -> None:
        self._read(self._wire.scores.poll(1_000, wait_s, 0.0))
        self._send_feedback(self._wire.clock.now_ms())
        self._wire.sink.poll()
        now_s = self._wire.clock.monotonic_s()
        if now_s - self._folded_s >= FOLD_S:
            self._fold(now_s)

    def _write(self, entity: Literal["user", "item"], numbers: Int64) -> None:
        """``numbers`` are user numbers or item slots."""
        if not len(numbers):
            return
        if entity == "user":
            ids, block = user_names(numbers), user_block(self.market, numbers, self._wire.user_layout)
        else:
            ids = item_names(self.market.number_M[numbers])
            block = item_block(self.market, numbers, self._wire.item_layout)
        self._wire.write_features(entity, ids, block, self._wire.clock.now_ms())

    def _write_later(self, entity: Literal["user", "item"], numbers: Int64) -> None:
        """Write these and what could not be written before: an outage of the feature store is no reason to stop."""
        owed = self._owed[entity]
        if owed and self._wire.clock.monotonic_s() >= self._retry_s:
            numbers = np.union1d(numbers, np.array(sorted(owed), np.int64))
            owed.clear()
        try:
            self._write(entity, numbers)
        except RecoverableError:
            owed.update(numbers.tolist())
            self._tally.counts["unwritten"] += len(numbers)
            self._retry_s = self._wire.clock.monotonic_s() + RETRY_S

    def _due(self, now_s: float) -> int:
        """How many requests are due, and when the next one is."""
        count = 0
        while self._next_s <= now_s and count < MAX_BURST:
            self._next_s += float(self._rng.exponential(1.0 / self._plan.rate))
            count += 1
        return count

    def _ask(self, count: int) -> None:
        if not count:
            return
        asked = self.market.ask(count)
        truth_N3K = np.stack([asked.click_NK, asked.buy_NK, asked.tilt_NK], axis=1)
        now_ms = self._wire.clock.now_ms()
        for n, (user, hour) in enumerate(zip(asked.user_N.tolist(), asked.hour_N.tolist(), strict=True)):
            self._number += 1
            request_id = f"{self._plan.run_id}-{self._number}"
            items = item_names(asked.item_NK[n])
            name = self._user_names[user]
            message = {
                "request_id": request_id,
                "user_id": name,
                "items": items,
                "ts": now_ms,
                "context": {"hour": hour},
            }
            self._open[request_id] = _Open(now_ms, user, items, asked.category_NK[n], truth_N3K[n])
            record = OutRecord(self._wire.requests_topic, name.encode(), orjson.dumps(message), ())
            self._wire.sink.send(record, partial(self._asked, request_id))

    def _asked(self, request_id: str, error: object | None, _message: object) -> None:
        if error is not None:  # the broker never took it: not asked, so not lost
            self._tally.counts["unsent"] += 1
            self._unsent.add(request_id)
            self._open.pop(request_id, None)

    def _sent(self, error: object | None, _message: object) -> None:
        if error is not None:
            self._tally.counts["unsent"] += 1

    def _read(self, records: Sequence[Record]) -> None:
        """Count score messages and show what they rank best."""
        now_ms = self._wire.clock.now_ms()
        opened: list[tuple[str, _Open]] = []
        ctcvr: list[list[float]] = []
        for record in records:
            scores = self._understood(record)
            if scores is None:
                continue
            request_id = scores["request_id"]
            asked = self._open.get(request_id)
            if asked is None:
                self._tally.counts["duplicates" if self._is_ours(request_id) else "unknown"] += 1
            elif asked.items != scores["items"] or not len(asked.items) == len(scores["ctr"]) == len(scores["ctcvr"]):
                self._tally.counts["wrong"] += 1
            else:
                del self._open[request_id]
                self._count(scores, asked, now_ms)
                opened.append((request_id, asked))
                ctcvr.append(scores["ctcvr"])
        if opened:
            self._last_score_s = self._wire.clock.monotonic_s()
            self._show(opened, np.asarray(ctcvr, np.float32), now_ms)

    def _is_ours(self, request_id: object) -> bool:
        """Whether this run asked it; what is ours and not open was answered before."""
        prefix, _, number = str(request_id).rpartition("-")
        asked = prefix == self._plan.run_id and number.isdigit() and 1 <= int(number) <= self._number
        return asked and request_id not in self._unsent

    def _understood(self, record: Record) -> dict[str, Any] | None:
        try:
            scores = orjson.loads(record.value or b"")
            if isinstance(scores, dict) and {"request_id", "items", "ctr", "ctcvr", "model_version"} <= scores.keys():
                return scores
        except orjson.JSONDecodeError:
            pass  # counted below
        self._tally.counts["wrong"] += 1
        return None

    def _count(self, scores: dict[str, Any], asked: _Open, now_ms: int) -> None:
        click_K, buy_K, _ = asked.truth_3K
        rows_4K = np.array([scores["ctr"], scores["ctcvr"], click_K, click_K * buy_K], np.float32)
        self._tally.scored(int(scores["model_version"]), rows_4K, float(now_ms - asked.sent_ms))
        self._tally.counts["degraded"] += bool(scores.get("degraded"))
        self._tally.counts["missing"] += sum(index >= 0 for index in scores.get("missing", ()))

    def _show(self, opened: list[tuple[str, _Open]], ctcvr_NK: NDArray[np.float32], now_ms: int) -> None:
        truth_N3K = np.stack([asked.truth_3K for _, asked in opened])
        truth = Truth(truth_N3K[:, 0], truth_N3K[:, 1], truth_N3K[:, 2])
        shown_NP = show(self._plan.shop, self._rng, ctcvr_NK)
        events = react(self._plan.shop, self._rng, shown_NP, now_ms, truth)
        self._tally.counts.update(never=events.never, twice=int(events.repeat_E.sum()), late=events.late)
        columns = (part.tolist() for part in events[:6])
        for row, candidate, kind, at_ms, arrive_ms, repeat in zip(*columns, strict=True):
            request_id, asked = opened[row]
            category = int(asked.category_K[candidate])
            item = asked.items[candidate]
            self._outbox.put(arrive_ms, Happened(kind, at_ms, request_id, asked.user, item, category, repeat))

    def _send_feedback(self, now_ms: int) -> None:
        clicks: list[Happened] = []
        for happened in self._outbox.due(now_ms):
            name = self._user_names[happened.user]
            self._wire.sink.send(feedback_record(self._wire.feedback_topic, name, happened), self._sent)
            self._tally.counts[KINDS[happened.kind]] += 1
            if happened.kind == CLICK and not happened.repeat:
                clicks.append(happened)
        if clicks:
            users = np.array([click.user for click in clicks], np.int64)
            self.market.clicked(users, np.array([click.category for click in clicks], np.int64))
            self._write_later("user", np.unique(users))

    def _fold(self, now_s: float) -> None:
        self._folded_s = now_s
        self._tally.fold(now_s)
        self.stats = self._snapshot(now_s)

    def _snapshot(self, now_s: float) -> SimulatorStats:
        tally, counts = self._tally, self._tally.counts
        ctr, ctcvr, latency = tally.recent()
        by_version = tally.by_version()
        scoring_s = self._last_score_s - self._started_s
        feedback = {name: counts[name] for name in (*KINDS, "twice", "late", "never")}
        return SimulatorStats(
            ready=bool(self._joined.partitions),
            uptime_s=now_s - self._started_s,
            requests=self._number - len(self._unsent),
            scored=tally.requests,
            lost=len(self._open) if self._ended else self._overdue(),
            **{name: counts[name] for name in COUNTED},
            outstanding=len(self._open),
            candidates=tally.candidates,
            candidates_per_s=tally.candidates / scoring_s if scoring_s > 0 else 0.0,
            latency_ms=tally.latency(),
            latency_recent_ms=latency,
            feedback=feedback | {"pending": len(self._outbox)},
            versions_served=tally.versions_served,
            versions=[version.version for version in by_version],
            recent_ctr=ctr,
            recent_ctcvr=ctcvr,
            by_version=by_version,
        )

    def _overdue(self) -> int:
        oldest_ms = self._wire.clock.now_ms() - self._plan.lost_after_s * 1_000.0
        count = 0
        for asked in self._open.values():  # oldest first
            if asked.sent_ms > oldest_ms:
                break
            count += 1
        return count
