"""The join: `served` and `feedback` in, training rows out, in event time. Pure; exact for any arrival order.

For one candidate row with an impression at I (the earliest heard of), click C and conversion D:

    FIRST            clicked (C <= I + click window): at max(I + click window, C + observation window), with
                     v = (D <= C + observation window); else at I + click window, unclicked
    LATE_CONVERSION  after a first emission with v = 0, when D <= C + attribution window is heard of; once
    MATURED          every clicked row, at C + attribution window, with y and v

With ``together`` in the policy both kinds of FIRST come at I + click window + observation window, with the same labels.
Then the clicked share among rows emitted at a time is that among rows shown at a time. Without it clicked rows are of
older impressions than unclicked ones, and while traffic grows or shrinks their share, and CTR with it, is wrong.

"At" means: as soon as the watermark is past it and the end of its tick (`JoinPolicy.tick_ms`), so that everything up
to then has been heard. As long as events come
within the lateness the emitted rows are the same for any arrival order. What comes later is counted by name, see
`Outcome`. Timers fire as a function of the event sequence alone, never of how it was cut into polls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Literal

from esmm.batch import Kind
from stream_scorer.core.emit import Emission
from stream_scorer.core.heard import Heard
from stream_scorer.core.join_entry import NEVER, NONE, UNKNOWN, Entry, JoinPolicy, JoinStore, Row, Stage, keep_rows
from stream_scorer.core.messages import Feedback
from stream_scorer.core.records import TopicPartition
from stream_scorer.core.served import ServedRequest
from stream_scorer.core.watermark import Watermark

Outcome = Literal[
    # every served message has one of these
    "served",
    "served_duplicate",
    "served_late",  # its time to live is over already: a replay, not news
    # every feedback event has exactly one of these, once it is decided
    "impression",
    "click",
    "conversion_immediate",  # within the observation window: the first emission carries it
    "conversion_late",  # emitted as LATE_CONVERSION
    "duplicate",  # this kind was heard of before for this row: no effect
    "late_click",  # after the click window: the first emission says unclicked
    "conversion_without_click",  # or with a late click
    "conversion_after_attribution",
    "conversion_after_maturity",  # it would have counted, and came after its row had matured
    "impression_after_ttl",
    "click_without_impression",
    "conversion_without_impression",
    "item_not_served",  # the request is known, the item is not in its `served` message
    "after_ttl",  # the request had been forgotten but for its clicked rows
    "held_overflow",  # too many requests waiting for their `served`
    "expired_impression",  # `served` never came
    "expired_click",
    "expired_conversion",
    # candidates, not events
    "never_shown",
]
_COUNTS: Final = ("held", "open_impressions", "open_clicks")
_OPEN, _UNCLICKED, _FIRST = Stage.OPEN, Stage.UNCLICKED, Kind.FIRST  # a class attribute of an enum costs a lookup
_KINDS: Final = ("impression", "click", "conversion")


class Joiner:
    """Feed it `served` and `feedback` in any order; take emissions with `take`."""

    def __init__(self, policy: JoinPolicy, store: JoinStore, watermark: Watermark) -> None:
        """``store`` and ``watermark`` hold all state but the counters."""
        self.policy = policy
        self.watermark = watermark
        self.outcomes: Counter[str] = Counter()
        self.held = 0  # requests known by feedback only
        self.open_impressions = 0  # shown, first emission not made yet
        self.open_clicks = 0  # clicked, not matured
        self._store = store
        self._first_ms = policy.click_window_ms + (policy.observation_window_ms if policy.together else 0)
        self._out: list[Emission] = []

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint: all but what the store holds. Call after `take`."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {"watermark": self.watermark.state(), "outcomes": dict(self.outcomes), **counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.watermark.restore(state["watermark"])
        self.outcomes = Counter(state["outcomes"])
        for name in _COUNTS:
            setattr(self, name, state[name])

    @property
    def emitted(self) -> int:
        """Rows that `take` would give."""
        return len(self._out)

    def take(self) -> list[Emission]:
        """Everything emitted since the last call, in order."""
        out, self._out = self._out, []
        return out

    def advance(self, event_ms: int) -> None:
        """Event time has come to ``event_ms`` (all partitions are idle)."""
        self.watermark.advance(event_ms)
        self._fire()

    def served(self, request: ServedRequest, partition: TopicPartition, record_ms: int) -> None:
        """One request as it was scored; ``record_ms`` is the broker's time of its record."""
        self._serve(request)
        self.watermark.observe(partition, request.ts_ms, record_ms)
        if self._store.next_due_ms() < self.watermark.value_ms:
            self._fire()

    def feedback(self, event: Feedback | Heard, partition: TopicPartition, record_ms: int) -> None:
        """One impression, click or conversion."""
        self._hear(event)
        self.watermark.observe(partition, event.ts, record_ms)
        if self._store.next_due_ms() < self.watermark.value_ms:
            self._fire()

    def _serve(self, request: ServedRequest) -> None:
        entry = self._store.get(request.request_id)
        expires_ms = request.ts_ms + self.policy.served_ttl_ms
        if entry is not None and entry.served is not None:
            self.outcomes["served_duplicate"] += 1
            return
        if expires_ms < self.watermark.value_ms:
            self.outcomes["served_late"] += 1
            return
        if entry is None:
            entry = Entry(request, expires_ms)
        else:
            self.held -= 1
            entry.served, entry.expires_ms = request, expires_ms
            self._resolve(entry, request)
        self.outcomes["served"] += 1
        self._keep(request.request_id, entry, entry.next_due_ms())

    def _resolve(self, entry: Entry, served: ServedRequest) -> None:
        """Feedback came first: give held rows their place in the request."""
        place = {item: index for index, item in enumerate(served.items)}
        for item, row in list(entry.rows.items()):
            index = place.get(item, UNKNOWN)
            if index == UNKNOWN:
                self.outcomes["item_not_served"] += _events(row)
                del entry.rows[item]
                continue
            row.index = index
            if row.impression_ms > entry.expires_ms:
                self.outcomes["impression_after_ttl"] += 1
                row.impression_ms = NONE
            if row.impression_ms != NONE:
                self._open(row)

    def _hear(self, event: Feedback | Heard) -> None:
        item = event.item_id
        entry = self._store.get(event.request_id)
        if event.kind == "impression" and entry is not None and entry.served is not None and item not in entry.rows:
            place = None if entry.closed or event.ts > entry.expires_ms else _place(entry, item)
            if place is not None:
                self._show(event.request_id, entry, item, Row(place, event.ts))
                return
        if entry is None:
            if self.held >= self.policy.max_held:
                self.outcomes["held_overflow"] += 1
                return
            self.held += 1
            entry = Entry(None, event.ts + self.policy.held_ttl_ms)
        row = entry.rows.get(item)
        if row is None:
            index = _place(entry, item)
            if index is None:
                self.outcomes["after_ttl" if entry.closed else "item_not_served"] += 1
                return
            row = entry.rows[item] = Row(index)
        if row.stage <= Stage.OPEN:
            self._note(entry, row, event.kind, event.ts)
        elif event.kind == "conversion":
            self._late_conversion(entry, row, event.ts)
        elif event.kind == "click" and row.stage == Stage.UNCLICKED and row.click_ms == NONE:
            row.click_ms = event.ts
            self.outcomes["late_click"] += 1
        else:
            self.outcomes["duplicate"] += 1
        self._keep(event.request_id, entry, row.due_ms if entry.armed_ms != NEVER else entry.next_due_ms())

    def _show(self, request_id: str, entry: Entry, item: str, row: Row) -> None:
        """What most events are: the impression of a served candidate that nothing was heard of before."""
        row.stage = _OPEN
        row.due_ms = due_ms = self._at_tick(row.impression_ms + self._first_ms)
        entry.rows[item] = row
        self.open_impressions += 1
        self.outcomes["impression"] += 1
        if due_ms < entry.armed_ms:
            entry.armed_ms = due_ms
            self._store.arm(due_ms, request_id)
        self._store.put(request_id, entry)

    def _note(self, entry: Entry, row: Row, kind: str, ts: int) -> None:
        """Before the first emission: the earliest of each kind counts, so that order does not."""
        if kind == "impression":
            if entry.served is not None and ts > entry.expires_ms:
                self.outcomes["impression_after_ttl"] += 1
                return
            seen, row.impression_ms = row.impression_ms, _earliest(row.impression_ms, ts)
        elif kind == "click":
            seen, row.click_ms = row.click_ms, _earliest(row.click_ms, ts)
        else:
            seen, row.conversion_ms = row.conversion_ms, _earliest(row.conversion_ms, ts)
        if seen != NONE:
            self.outcomes["duplicate"] += 1
        if row.stage == Stage.OPEN:
            row.due_ms = self._first_due_ms(row)
        elif entry.served is not None and row.impression_ms != NONE:
            self._open(row)

    def _open(self, row: Row) -> None:
        row.stage = Stage.OPEN
        row.due_ms = self._first_due_ms(row)
        self.open_impressions += 1
        self.outcomes["impression"] += 1

    def _first_due_ms(self, row: Row) -> int:
        click_by_ms = row.impression_ms + self.policy.click_window_ms
        if self.policy.together or row.click_ms == NONE or row.click_ms > click_by_ms:
            return self._at_tick(row.impression_ms + self._first_ms)
        return self._at_tick(max(click_by_ms, row.click_ms + self.policy.observation_window_ms))

    def _at_tick(self, due_ms: int) -> int:
        """The next multiple of the tick; labels go by the events' own times, whenever their row is emitted."""
        return due_ms + -due_ms % self.policy.tick_ms

    def _late_conversion(self, entry: Entry, row: Row, ts: int) -> None:
        """A conversion after the first emission."""
        if row.conversion_ms != NONE:
            self.outcomes["duplicate"] += 1
        elif row.stage == Stage.UNCLICKED:
            row.conversion_ms = ts
            self.outcomes["conversion_without_click"] += 1
        elif ts > row.click_ms + self.policy.attribution_window_ms:
            self.outcomes["conversion_after_attribution"] += 1
        elif row.stage == Stage.MATURE:
            row.conversion_ms = ts
            self.outcomes["conversion_after_maturity"] += 1
        else:
            row.conversion_ms = ts
            self.outcomes["conversion_late"] += 1
            self._emit(entry, row, Kind.LATE_CONVERSION, 1, 1)

    def _emit(self, entry: Entry, row: Row, kind: Kind, click: int, conversion: int) -> None:
        if entry.served is None:
            raise AssertionError("a row was opened without its served request")
        self._out.append(Emission(entry.served, row.index, kind, click, conversion, row.observed, row.impression_ms))

    def _keep(self, request_id: str, entry: Entry, due_ms: int) -> None:
        if due_ms < entry.armed_ms:
            entry.armed_ms = due_ms
            self._store.arm(due_ms, request_id)
        self._store.put(request_id, entry)

    def _fire(self) -> None:
        now_ms, store = self.watermark.value_ms, self._store
        while store.next_due_ms() < now_ms:
            due_ms, request_id = store.pop_due()
            entry = store.get(request_id)
            if entry is None or entry.armed_ms != due_ms:
                continue  # a stale timer
            entry.armed_ms = NEVER
            next_ms = self._fire_rows(entry, now_ms)
            if not entry.closed:
                if entry.expires_ms < now_ms:
                    self._expire(entry)
                    next_ms = entry.next_due_ms()
                else:
                    next_ms = min(next_ms, entry.expires_ms)
            if entry.closed and not entry.rows:
                store.delete(request_id)
            else:
                self._keep(request_id, entry, next_ms)

    def _fire_rows(self, entry: Entry, now_ms: int) -> int:
        """All rows that are due; when the next one is."""
        next_ms = NEVER
        served, emit = None if entry.closed else entry.served, self._out.append
        for item, row in list(entry.rows.items()):
            due_ms = row.due_ms
            if due_ms < now_ms:
                if row.stage == _OPEN and row.click_ms == row.conversion_ms == NONE and served is not None:
                    row.due_ms, row.stage = NEVER, _UNCLICKED  # `_fire_row` in short, for what most rows are
                    self.open_impressions -= 1
                    emit(Emission(served, row.index, _FIRST, 0, 0, 0, row.impression_ms))
                    continue
                while due_ms < now_ms:
                    self._fire_row(entry, item, row)
                    due_ms = row.due_ms
            if due_ms < next_ms:  # noqa: PLR1730  min() costs a call a row
                next_ms = due_ms
        return next_ms

    def _fire_row(self, entry: Entry, item: str, row: Row) -> None:
        policy = self.policy
        row.due_ms, due_ms = NEVER, row.due_ms
        if row.stage == _OPEN:
            self.open_impressions -= 1
            if row.click_ms != NONE and row.click_ms <= row.impression_ms + policy.click_window_ms:
                self._first_clicked(entry, row)
            else:
                self._first_unclicked(entry, item, row)
        elif row.stage == Stage.CLICKED:
            self._emit(entry, row, Kind.MATURED, 1, int(row.conversion_ms != NONE))
            self.open_clicks -= 1
            row.stage = Stage.MATURE
            row.due_ms = due_ms + policy.held_ttl_ms
        else:
            del entry.rows[item]

    def _first_unclicked(self, entry: Entry, item: str, row: Row) -> None:
        self._emit(entry, row, _FIRST, 0, 0)
        row.stage = _UNCLICKED
        if row.click_ms != NONE:
            self.outcomes["late_click"] += 1
        if row.conversion_ms != NONE:
            self.outcomes["conversion_without_click"] += 1
        if entry.closed:
            del entry.rows[item]

    def _first_clicked(self, entry: Entry, row: Row) -> None:
        delay_ms = max(0, row.conversion_ms - row.click_ms) if row.conversion_ms != NONE else NEVER
        row.stage = Stage.CLICKED
        row.due_ms = self._at_tick(row.click_ms + self.policy.attribution_window_ms)
        row.observed = int(delay_ms <= self.policy.observation_window_ms)
        self.open_clicks += 1
        self.outcomes["click"] += 1
        self._emit(entry, row, Kind.FIRST, 1, row.observed)
        if row.observed:
            self.outcomes["conversion_immediate"] += 1
        elif delay_ms <= self.policy.attribution_window_ms:
            self.outcomes["conversion_late"] += 1
            self._emit(entry, row, Kind.LATE_CONVERSION, 1, 1)
        elif delay_ms != NEVER:
            self.outcomes["conversion_after_attribution"] += 1
            row.conversion_ms = NONE  # an earlier one, that counts, may still be on its way

    def _expire(self, entry: Entry) -> None:
        """Forget what was never shown or is settled; keep the features of open and clicked rows only."""
        entry.closed = True
        served = entry.served
        if served is None:
            self.held -= 1
            for row in entry.rows.values():
                self._count_unheard(row, "expired_")
            entry.rows.clear()
            return
        waiting = [row for row in entry.rows.values() if row.stage == Stage.WAITING]
        self.outcomes["never_shown"] += len(served.items) - len(entry.rows) + len(waiting)
        for row in waiting:
            self._count_unheard(row, "")
        entry.rows = {
            item: row for item, row in entry.rows.items() if row.stage not in (Stage.WAITING, Stage.UNCLICKED)
        }
        if entry.rows:
            entry.served = keep_rows(served, [row.index for row in entry.rows.values()])
            for index, row in enumerate(entry.rows.values()):
                row.index = index

    def _count_unheard(self, row: Row, prefix: str) -> None:
        suffix = "" if prefix else "_without_impression"
        for kind, ts in zip(_KINDS, (row.impression_ms, row.click_ms, row.conversion_ms), strict=True):
            if ts != NONE:
                self.outcomes[f"{prefix}{kind}{suffix}"] += 1


def _place(entry: Entry, item: str) -> int | None:
    """Where a new row lies in its request: `UNKNOWN` until served, None when it can have no place."""
    if entry.served is None:
        return UNKNOWN
    if entry.closed:
        return None
    try:
        return entry.served.items.index(item)
    except ValueError:
        return None


def _earliest(seen: int, ts: int) -> int:
    return ts if seen == NONE else min(seen, ts)


def _events(row: Row) -> int:
    return sum(ts != NONE for ts in (row.impression_ms, row.click_ms, row.conversion_ms))
