"""The join against brute force: any arrival order, any number of duplicates, saved and restored at any point."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from stream_scorer.adapters.join_rocks import RocksJoinState
from stream_scorer.adapters.join_state import MemoryJoinState
from stream_scorer.core.emit import Emission
from stream_scorer.core.join_entry import JoinPolicy
from stream_scorer.core.messages import Feedback
from stream_scorer.core.outcomes import Outcome
from stream_scorer.core.served import ServedRequest
from tests.join_kit import brute_force, feedback, inbox, joiner, page, rows_in_order, rows_of, send, served_request

POLICY = JoinPolicy(
    click_window_ms=20, observation_window_ms=30, attribution_window_ms=100, served_ttl_ms=60, held_ttl_ms=50
)
LATENESS = 15
REQUESTS = st.sampled_from(["r0", "r1", "r2"])
ITEMS = st.sampled_from(["i0", "i1"])
KINDS = st.sampled_from(["impression", "click", "conversion"])
SERVED = ("served", "served_duplicate", "served_late")
NOT_EVENTS = {*SERVED, "never_shown"}


class JoinMachine(RuleBasedStateMachine):
    """Events arrive at most LATENESS behind the newest of their stream; the emitted rows are those of brute force."""

    new_state = staticmethod(MemoryJoinState)
    policy = POLICY

    @initialize()
    def start(self) -> None:
        self.store = self.new_state()
        self.join = joiner(self.policy, self.store, LATENESS)
        self.newest = 1_000
        self.served: list[ServedRequest] = []
        self.events: list[Feedback] = []
        self.out: list[Emission] = []

    def _time(self, delta: int) -> int:
        ts = self.newest + delta
        self.newest = max(self.newest, ts)
        return ts

    def _before(self, request: str) -> list[ServedRequest]:
        """Its served message, once sent. What was given up before that is another test's business."""
        before = [s for s in self.served if s.request_id == request]
        assume(before or self.store.get(request) or not any(e.request_id == request for e in self.events))
        return before

    @rule(request=REQUESTS, delta=st.integers(-LATENESS, 30))
    def serve(self, request: str, delta: int) -> None:
        before = self._before(request)
        self.served.append(before[0] if before else served_request(request, self._time(delta)))
        send(self.join, self.served[-1])
        self.out += self.join.take()

    @rule(request=REQUESTS, item=ITEMS, kind=KINDS, delta=st.integers(-LATENESS, 40), times=st.integers(1, 2))
    def hear(self, request: str, item: str, kind: str, delta: int, times: int) -> None:
        self._before(request)
        event = feedback(kind, request, self._time(delta), item)
        self.events += [event] * times
        for _ in range(times):
            send(self.join, event)
        self.out += self.join.take()

    @rule(
        request=REQUESTS, items=st.lists(ITEMS, min_size=1, max_size=2, unique=True), delta=st.integers(-LATENESS, 40)
    )
    def see(self, request: str, items: list[str], delta: int) -> None:
        self._before(request)
        self.events.append(page(request, self._time(delta), items))
        send(self.join, self.events[-1])
        self.out += self.join.take()

    @rule(after=st.integers(0, 60))
    def quiet(self, after: int) -> None:
        self.newest += after
        self.join.advance(self.newest)
        self.out += self.join.take()

    @rule()
    def restart(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.store.save(Path(directory))
            state = self.join.state()
            self.store.close()
            self.store = self.new_state()
            self.store.restore(Path(directory))
        self.join = joiner(self.policy, self.store, LATENESS)
        self.join.restore(state)

    def teardown(self) -> None:
        if not hasattr(self, "join"):
            return
        self.join.advance(self.newest + 100_000)
        assert rows_of(self.out + self.join.take()) == brute_force(self.policy, self.served, self.events)
        check_accounts(self.join, self.store, len(self.served), sum(max(1, len(e.items)) for e in self.events))
        self.store.close()


def check_accounts(join, store, served: int, events: int) -> None:
    """After the end of time nothing is held, and everything has a name."""
    assert (join.held, join.open_impressions, join.open_clicks, len(store)) == (0, 0, 0, 0)
    outcomes = join.outcomes
    assert set(outcomes) <= set(get_args(Outcome))
    assert sum(outcomes[name] for name in SERVED) == served
    assert sum(n for name, n in outcomes.items() if name not in NOT_EVENTS) == events


TestJoinMachine = JoinMachine.TestCase
TestJoinMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


class TogetherJoinMachine(JoinMachine):
    """The same rows when clicked and unclicked ones wait equally long."""

    policy = replace(POLICY, together=True)


TestTogetherJoinMachine = TogetherJoinMachine.TestCase
TestTogetherJoinMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


class RocksJoinMachine(JoinMachine):
    """The same with all but two entries, and all but three timers, on disk."""

    @staticmethod
    def new_state() -> RocksJoinState:
        return RocksJoinState(Path(tempfile.mkdtemp()) / "rocks", cache_entries=2, cache_timers=3)


TestRocksJoinMachine = RocksJoinMachine.TestCase
TestRocksJoinMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)

events_strategy = st.lists(st.tuples(KINDS, REQUESTS, ITEMS, st.integers(0, 300)), max_size=25)


@given(
    events=events_strategy,
    served=st.lists(st.tuples(REQUESTS, st.integers(0, 200)), max_size=4),
    data=st.data(),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_in_any_order_at_all_everything_is_accounted_for_and_nothing_is_emitted_twice(events, served, data) -> None:
    stream = [feedback(kind, request, ts, item) for kind, request, item, ts in events]
    stream += [served_request(request, ts) for request, ts in served]
    store = MemoryJoinState()
    join = joiner(POLICY, store, LATENESS)
    out: list[Emission] = []
    for event in data.draw(st.permutations(stream)):
        send(join, event)
        out += join.take()
    join.advance(1_000_000)
    out += join.take()

    check_accounts(join, store, len(served), len(events))
    sent = Counter((e.served.request_id, id(e.served.user_1), e.served.items[p], e.kind) for e in out for p in e.places)
    if len({request for request, _ in served}) == len(served):
        assert max(sent.values(), default=1) == 1


@pytest.mark.parametrize("jitter", [0, LATENESS])
def test_the_machine_can_fail(jitter: int) -> None:
    """Brute force is no tautology: an event later than the lateness makes the two differ."""
    store = MemoryJoinState()
    join = joiner(POLICY, store, LATENESS)
    stream = [served_request("r0", 1_000), feedback("impression", "r0", 1_000)]
    far = [served_request("r1", 1_035 + jitter), feedback("impression", "r1", 1_035 + jitter)]
    click = feedback("click", "r0", 1_020)
    for event in [*stream, *far, click]:
        send(join, event)
    join.advance(100_000)
    equal = rows_of(join.take()) == brute_force(POLICY, [stream[0], far[0]], [stream[1], far[1], click])
    assert equal == (jitter == 0)


@given(
    events=st.lists(st.tuples(KINDS, REQUESTS, ITEMS, st.integers(0, 300), st.booleans()), max_size=80),
    served=st.lists(st.tuples(REQUESTS, st.integers(0, 200)), max_size=4),
    size=st.integers(1, 70),
    waiting_ms=st.integers(1, 400),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_how_the_stream_was_cut_changes_nothing(events, served, size, waiting_ms, data) -> None:
    stream: list[Feedback | ServedRequest] = [
        page(request, ts, ["i0", "i1"]) if whole and kind == "impression" else feedback(kind, request, ts, item)
        for kind, request, item, ts, whole in events
    ]
    stream += [served_request(request, ts) for request, ts in served]
    stream = data.draw(st.permutations(stream)) if len(stream) < 20 else sorted(stream, key=_time_of)
    alone, together = joiner(POLICY, MemoryJoinState(), LATENESS), joiner(POLICY, MemoryJoinState(), LATENESS)
    out: list[Emission] = []
    when: list[int] = []
    for event in stream:
        send(alone, event)
        when += [_time_of(event)] * alone.emitted
        out += alone.take()
    got: list[Emission] = []
    then: list[int] = []
    for at in range(0, len(stream), size):
        arrivals = together.arrivals(inbox(stream[at : at + size]))
        while (record_ms := together.take_in(arrivals, waiting_ms)) is not None:
            then += [record_ms] * together.emitted
            got += together.take()
    assert rows_in_order(got) == rows_in_order(out)
    assert then == when
    assert together.state() == alone.state()


def _time_of(event: Feedback | ServedRequest) -> int:
    return event.ts if isinstance(event, Feedback) else event.ts_ms
