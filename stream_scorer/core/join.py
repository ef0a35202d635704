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
`stream_scorer.core.outcomes`. Timers fire as a function of the event sequence alone, never of how it was cut into
polls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from esmm.batch import Kind
from stream_scorer.core.emit import Emission
from stream_scorer.core.heard import Heard, Page
from stream_scorer.core.inbox import Event, Inbox
from stream_scorer.core.join_entry import NEVER, NONE, Entry, JoinPolicy, JoinStore, Row, Stage, earliest
from stream_scorer.core.served import ServedRequest
from stream_scorer.core.watermark import Watermark

Arrival = tuple[Event, int, int]  # and the watermark after it, and its record's time
_COUNTS: Final = ("held", "open_impressions", "open_clicks")
_WAITING, _OPEN, _UNCLICKED = int(Stage.WAITING), int(Stage.OPEN), int(Stage.UNCLICKED)  # plain numbers compare faster
_SETTLED: Final = frozenset((_WAITING, _UNCLICKED))  # nothing is left to wait for when the request is forgotten


class Joiner:
    """Feed it `served` and `feedback` in any order; take emissions with `take`."""

    def __init__(self, policy: JoinPolicy, store: JoinStore, watermark: Watermark) -> None:
        """``store`` and ``watermark`` hold all state but the counters."""
        self.policy = policy
        self.watermark = watermark
        self.outcomes: Counter[str] = Counter()
        self.now_ms = watermark.value_ms  # how far event time has surely come after the last event taken
        self.held = 0  # requests known by feedback only
        self.open_impressions = 0  # shown, first emission not made yet
        self.open_clicks = 0  # clicked, not matured
        self._store = store
        self._first_ms = policy.first_ms
        self._out: list[Emission] = []

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint: all but what the store holds. Call after `take`."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {"watermark": self.watermark.state(), "outcomes": dict(self.outcomes), **counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.watermark.restore(state["watermark"])
        self.now_ms = self.watermark.value_ms
        self.outcomes = Counter(state["outcomes"])
        for name in _COUNTS:
            setattr(self, name, state[name])

    @property
    def emitted(self) -> int:
        """Rows that `take` would give."""
        return sum(emission.rows for emission in self._out)

    def take(self) -> list[Emission]:
        """Everything emitted since the last call, in order."""
        out = self._out.copy()
        self._out.clear()
        return out

    def advance(self, event_ms: int) -> None:
        """Event time has come to ``event_ms`` (all partitions are idle)."""
        self.watermark.advance(event_ms)
        self.now_ms = self.watermark.value_ms
        self._fire()

    def arrivals(self, inbox: Inbox) -> Iterator[Arrival]:
        """Events for `take_in`, each with the watermark after it. To be used up before the next, and before `state`."""
        values = self.watermark.observe_all(inbox.where, inbox.event_ms, inbox.record_ms)
        return zip(inbox.events, values, inbox.record_ms, strict=True)

    def take_in(self, arrivals: Iterator[Arrival], until_ms: int) -> int | None:
        """Take events until rows were emitted or record time is ``until_ms``; the last one's, None when all are taken.

        How the stream was cut into inboxes changes nothing.
        """
        store, hear, serve, out = self._store, self._hear, self._serve, self._out
        get, put, arm = store.get, store.put, store.arm
        first_ms, tick_ms = self._first_ms, self.policy.tick_ms
        next_due_ms = store.next_due_ms()
        shown = 0
        for event, watermark_ms, record_ms in arrivals:
            if isinstance(event, Heard):
                kind, request_id, item, ts = event
                entry = get(request_id)
                if (
                    kind == "impression"
                    and entry is not None
                    and not (item in entry.shown or item in entry.rows or item in entry.passed)
                    and ts <= entry.expires_ms
                    and not entry.closed
                    and entry.find(item) is not None
                ):  # what most events are: the impression of a served candidate that nothing was heard of before
                    due_ms = ts + first_ms
                    due_ms += -due_ms % tick_ms
                    entry.shown[item] = ts
                    shown += 1
                    if due_ms < entry.armed_ms:
                        entry.armed_ms = due_ms
                        arm(due_ms, request_id)
                        if due_ms < next_due_ms:  # noqa: PLR1730  min() costs a call an event
                            next_due_ms = due_ms
                    put(request_id, entry)
                else:
                    hear(event, entry)
                    next_due_ms = store.next_due_ms()
            else:
                if isinstance(event, Page):
                    self._show(event)
                else:
                    serve(event)
                next_due_ms = store.next_due_ms()
            self.now_ms = watermark_ms
            if next_due_ms < watermark_ms:
                self._note_shown(shown)
                shown = 0
                self._fire()
                next_due_ms = store.next_due_ms()
            if out or record_ms >= until_ms:
                self._note_shown(shown)
                return record_ms
        self._note_shown(shown)
        return None

    def _note_shown(self, rows: int) -> None:
        self.open_impressions += rows
        self.outcomes["impression"] += rows

    def _serve(self, request: ServedRequest) -> None:
        entry = self._store.get(request.request_id)
        expires_ms = request.ts_ms + self.policy.served_ttl_ms
        if entry is not None and entry.served is not None:
            self.outcomes["served_duplicate"] += 1
            return
        if expires_ms < self.now_ms:
            self.outcomes["served_late"] += 1
            return
        if entry is None:
            entry = Entry(request, expires_ms)
        else:
            self.held -= 1
            entry.served, entry.expires_ms = request, expires_ms
            self._resolve(entry)
        self.outcomes["served"] += 1
        self._keep(request.request_id, entry, self._next_due_ms(entry))

    def _resolve(self, entry: Entry) -> None:
        """Feedback came first: give held rows their place in the request."""
        for item, row in list(entry.rows.items()):
            index = entry.find(item)
            if index is None:
                self.outcomes["item_not_served"] += len(row.kinds)
                del entry.rows[item]
                continue
            row.index = index
            if row.impression_ms > entry.expires_ms:
                self.outcomes["impression_after_ttl"] += 1
                row.impression_ms = NONE
            if row.impression_ms != NONE:
                self._open(row)

    def _hear(self, event: Heard, entry: Entry | None) -> None:
        item = event.item_id
        if entry is None:
            if self.held >= self.policy.max_held:
                self.outcomes["held_overflow"] += 1
                return
            self.held += 1
            entry = Entry(None, event.ts_ms + self.policy.held_ttl_ms)
        row = entry.rows.get(item) or self._as_row(entry, item)
        if row is None:
            index = entry.place(item)
            if index is None:
                self.outcomes["after_ttl" if entry.closed else "item_not_served"] += 1
                return
            row = entry.rows[item] = Row(index)
        if row.stage <= _OPEN:
            self._note(entry, row, event.kind, event.ts_ms)
        elif event.kind == "conversion":
            self._late_conversion(entry, row, event.ts_ms)
        elif event.kind == "click" and row.stage == _UNCLICKED and row.click_ms == NONE:
            row.click_ms = event.ts_ms
            self.outcomes["late_click"] += 1
        else:
            self.outcomes["duplicate"] += 1
        self._keep(event.request_id, entry, row.due_ms if entry.armed_ms != NEVER else self._next_due_ms(entry))

    def _show(self, page: Page) -> None:
        """An impression of each of its items; most are of served candidates that nothing was heard of before."""
        request_id, items, ts = page
        entry = self._store.get(request_id)
        new: set[str] = set()
        if entry is not None and not entry.closed and ts <= entry.expires_ms:
            known = entry.rows.keys() | entry.shown.keys() | entry.passed.keys()
            new = {item for item in items if item not in known and entry.find(item) is not None}
            if new:
                entry.shown.update((item, ts) for item in items if item in new)
                self._note_shown(len(new))
                self._keep(request_id, entry, self.policy.at_tick(ts + self._first_ms))
        if len(new) < len(items):
            for item in items:
                if item not in new:
                    self._hear(Heard("impression", request_id, item, ts), self._store.get(request_id))

    def _as_row(self, entry: Entry, item: str) -> Row | None:
        """More is heard of a candidate of which only the impression was known."""
        if item in entry.shown:
            ts = entry.shown.pop(item)
            row = Row(entry.places[item], ts, _OPEN, self.policy.at_tick(ts + self._first_ms))
        elif item in entry.passed:
            row = Row(entry.places[item], entry.passed.pop(item), _UNCLICKED)
        else:
            return None
        entry.rows[item] = row
        return row

    def _note(self, entry: Entry, row: Row, kind: str, ts: int) -> None:
        """Before the first emission: the earliest of each kind counts, so that order does not."""
        if kind == "impression":
            if entry.served is not None and ts > entry.expires_ms:
                self.outcomes["impression_after_ttl"] += 1
                return
            seen, row.impression_ms = row.impression_ms, earliest(row.impression_ms, ts)
        elif kind == "click":
            seen, row.click_ms = row.click_ms, earliest(row.click_ms, ts)
        else:
            seen, row.conversion_ms = row.conversion_ms, earliest(row.conversion_ms, ts)
        if seen != NONE:
            self.outcomes["duplicate"] += 1
        if row.stage == _OPEN:
            row.due_ms = self.policy.first_due_ms(row)
        elif entry.served is not None and row.impression_ms != NONE:
            self._open(row)

    def _open(self, row: Row) -> None:
        row.stage = _OPEN
        row.due_ms = self.policy.first_due_ms(row)
        self.open_impressions += 1
        self.outcomes["impression"] += 1

    def _late_conversion(self, entry: Entry, row: Row, ts: int) -> None:
        """A conversion after the first emission."""
        if row.conversion_ms != NONE:
            self.outcomes["duplicate"] += 1
        elif row.stage == _UNCLICKED:
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
        one = Emission(entry.served, [row.index], kind, click, conversion, row.observed, [row.impression_ms])
        self._out.append(one)

    def _keep(self, request_id: str, entry: Entry, due_ms: int) -> None:
        if due_ms < entry.armed_ms:
            entry.armed_ms = due_ms
            self._store.arm(due_ms, request_id)
        self._store.put(request_id, entry)

    def _next_due_ms(self, entry: Entry) -> int:
        """When something has to be done about it next."""
        due_ms = NEVER if entry.closed else entry.expires_ms
        if entry.shown:
            due_ms = min(due_ms, self.policy.at_tick(min(entry.shown.values()) + self._first_ms))
        for row in entry.rows.values():
            if row.due_ms < due_ms:  # noqa: PLR1730  min() costs a call a row
                due_ms = row.due_ms
        return due_ms

    def _fire(self) -> None:
        now_ms, store, tick_ms = self.now_ms, self._store, self.policy.tick_ms
        shown_by_ms = (now_ms - 1) // tick_ms * tick_ms - self._first_ms  # such impressions are due, and no later ones
        while store.next_due_ms() < now_ms:
            due_ms, request_id = store.pop_due()
            entry = store.get(request_id)
            if entry is None or entry.armed_ms != due_ms:
                continue  # a stale timer
            entry.armed_ms = NEVER
            if entry.shown:
                self._pass(entry, shown_by_ms)
            for item, row in list(entry.rows.items()) if entry.rows else ():
                while row.due_ms < now_ms:
                    self._fire_row(entry, item, row)
            if entry.expires_ms < now_ms and not entry.closed:
                self._expire(entry)
            if entry.closed and not entry.rows and not entry.shown:
                store.delete(request_id)
            else:
                self._keep(request_id, entry, self._next_due_ms(entry))

    def _pass(self, entry: Entry, shown_by_ms: int) -> None:
        """Emit the candidates shown so early of which nothing more was heard."""
        served, places, due = entry.served, entry.places, entry.shown
        if served is None:
            raise AssertionError("a row was opened without its served request")
        if max(due.values()) > shown_by_ms:
            due = {item: ts for item, ts in due.items() if ts <= shown_by_ms}
            entry.shown = {item: ts for item, ts in entry.shown.items() if ts > shown_by_ms}
        else:
            entry.shown = {}
        if not due:
            return
        self._out.append(Emission(served, [places[item] for item in due], Kind.FIRST, 0, 0, 0, list(due.values())))
        self.open_impressions -= len(due)
        if not entry.closed:
            entry.passed = entry.passed | due if entry.passed else due

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
        self._emit(entry, row, Kind.FIRST, 0, 0)
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
        row.due_ms = self.policy.at_tick(row.click_ms + self.policy.attribution_window_ms)
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
            self.outcomes.update(f"expired_{kind}" for row in entry.rows.values() for kind in row.kinds)
            entry.rows.clear()
            return
        waiting = [row for row in entry.rows.values() if row.stage == _WAITING]
        heard = len(entry.rows) + len(entry.shown) + len(entry.passed)
        self.outcomes["never_shown"] += len(served.items) - heard + len(waiting)
        self.outcomes.update(f"{kind}_without_impression" for row in waiting for kind in row.kinds)
        entry.passed = {}
        if entry.rows:
            entry.rows = {item: row for item, row in entry.rows.items() if row.stage not in _SETTLED}
        if entry.rows or entry.shown:
            entry.narrow([*entry.rows, *entry.shown])
