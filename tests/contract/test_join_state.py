"""Join states keep one contract: in memory, in RocksDB, and in RocksDB with nearly everything on disk."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stream_scorer.adapters.join_rocks import RocksJoinState
from stream_scorer.adapters.join_state import MemoryJoinState
from stream_scorer.core.emit import assemble
from stream_scorer.core.join import Joiner
from stream_scorer.core.join_entry import NEVER, Entry, JoinPolicy, Row
from stream_scorer.ports import JoinState
from tests.join_kit import feedback, joiner, rows_in_order, send, served_request

Make = Callable[[], JoinState]
POLICY = JoinPolicy(
    click_window_ms=100, observation_window_ms=200, attribution_window_ms=900, served_ttl_ms=400, held_ttl_ms=300
)


@pytest.fixture(params=["memory", "rocks", "rocks on disk"])
def make(request, tmp_path: Path):
    made: list[JoinState] = []

    def new() -> JoinState:
        path = tmp_path / f"state-{len(made)}"
        state = {
            "memory": MemoryJoinState,
            "rocks": lambda: RocksJoinState(path),
            "rocks on disk": lambda: RocksJoinState(path, cache_entries=1, cache_timers=2),
        }[request.param]()
        made.append(state)
        return state

    yield new
    for state in made:
        state.close()


def test_entries_are_kept_changed_and_forgotten(make: Make) -> None:
    state = make()
    assert state.get("a") is None
    for name in ("a", "b", "c"):
        state.put(name, Entry(served_request(name, 5) if name != "b" else None, 100))
    assert len(state) == 3
    entry = state.get("a")
    assert entry is not None
    row = entry.rows["i1"] = Row(1)
    row.impression_ms, row.due_ms = 7, NEVER
    entry.armed_ms = 70
    entry.shown, entry.passed = {"i0": 8}, {"i2": 9}
    state.put("a", entry)
    held = state.get("b")
    assert held is not None
    assert held.served is None
    held.served = served_request("b", 9)
    state.put("b", held)
    for name in ("c", "b", "a"):  # push one another out
        assert state.get(name) is not None
    again, later = state.get("a"), state.get("b")
    assert again is not None
    assert (again.rows["i1"].impression_ms, again.rows["i1"].due_ms, again.armed_ms) == (7, NEVER, 70)
    assert (again.shown, again.passed) == ({"i0": 8}, {"i2": 9})
    assert later is not None
    assert later.served is not None
    assert later.served.ts_ms == 9
    for name in ("a", "b", "c"):
        assert state.get(name) is not None
        state.delete(name)
        assert state.get(name) is None
    assert len(state) == 0


def test_timers_come_in_order_of_time_then_of_request(make: Make) -> None:
    state = make()
    rng = random.Random(1)
    names = ["a", "b", "\u00e9", "\U0001f600", "zz"]
    timers = list({(rng.randrange(-50, 300), rng.choice(names)): None for _ in range(60)})  # twice may come once
    assert state.next_due_ms() == NEVER
    taken = []
    for at, timer in enumerate(timers):
        state.arm(*timer)
        if at % 5 == 4:
            taken.append(state.pop_due())
    rest = sorted(timers)
    for timer in taken:
        rest.remove(timer)
    assert state.next_due_ms() == rest[0][0]
    assert [state.pop_due() for _ in rest] == rest
    assert state.next_due_ms() == NEVER


def stream(seed: int, requests: int = 60) -> list:
    rng = random.Random(seed)
    events = []
    for at in range(requests):
        ts = at * 15
        events.append((ts, served_request(f"r{at}", ts)))
        for item in rng.sample(["i0", "i1", "i2"], rng.randrange(4)):
            when = ts + rng.randrange(60)
            events.append((when, feedback("impression", f"r{at}", when, item)))
            if rng.random() < 0.6:
                when += rng.randrange(120)
                events.append((when, feedback("click", f"r{at}", when, item)))
                if rng.random() < 0.6:
                    when += rng.randrange(1_200)
                    events.append((when, feedback("conversion", f"r{at}", when, item)))
    return [event for _, event in sorted(events, key=lambda pair: pair[0] + rng.randrange(40))]


def emitted(join: Joiner) -> list[tuple[object, ...]]:
    return rows_in_order(join.take())


def test_the_join_emits_the_same_rows_in_the_same_order_as_in_memory(make: Make) -> None:
    state = make()
    one, two = joiner(POLICY, MemoryJoinState(), 50), joiner(POLICY, state, 50)
    for event in stream(3):
        for join in (one, two):
            send(join, event)
        assert len(state) == len(one._store)
        mine, theirs = one.take(), two.take()
        assert [e[1:] for e in mine] == [e[1:] for e in theirs]
        if mine:
            for a, b in zip(assemble(mine).item, assemble(theirs).item, strict=True):
                np.testing.assert_array_equal(a, b)
    for join in (one, two):
        join.advance(1_000_000)
    assert emitted(one) == emitted(two) != []
    assert one.outcomes == two.outcomes
    assert len(state) == 0


def test_saved_and_restored_in_the_middle_it_goes_on_as_before(make: Make, tmp_path: Path) -> None:
    events = stream(4)
    whole = joiner(POLICY, make(), 50)
    for event in events:
        send(whole, event)
    whole.advance(1_000_000)

    state = make()
    join, out = joiner(POLICY, state, 50), []
    for at, event in enumerate(events):
        send(join, event)
        out += emitted(join)
        if at in (30, 31, 120):
            directory = tmp_path / f"save-{at}"
            directory.mkdir()
            state.save(directory)
            for later in events[at + 1 : at + 40]:  # learned after the checkpoint, and lost in the crash
                send(join, later)
            state = make()
            state.restore(directory)
            state.restore(directory)  # a second time changes nothing
            join = _replayed(events[: at + 1], state)
    join.advance(1_000_000)
    out += emitted(join)
    assert out == emitted(whole)


def _replayed(events: list, state: JoinState) -> Joiner:
    """A joiner that stands where these events leave it, on the state given."""
    other = joiner(POLICY, MemoryJoinState(), 50)
    for event in events:
        send(other, event)
    other.take()
    join = joiner(POLICY, state, 50)
    join.restore(other.state())
    return join


def test_what_another_kind_saved_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    state = make()
    with pytest.raises((ValueError, OSError)):
        state.restore(tmp_path / "other")
    (tmp_path / "other" / "join.json").write_text('{"format": "stream-scorer-join-rocks/0"}')
    (tmp_path / "other" / "join.bin").write_text("stream-scorer-join/0")
    with pytest.raises(ValueError, match=r"this (build|version)"):
        state.restore(tmp_path / "other")
    state.put("a", Entry(None, 5))  # and it is still usable
    assert state.get("a") is not None
