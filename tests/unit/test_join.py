"""The join's cases, one a line: early, late, twice, out of order, never."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from esmm.batch import Kind
from stream_scorer.adapters.join_state import MemoryJoinState
from stream_scorer.core.emit import assemble
from stream_scorer.core.join_entry import JoinPolicy, pack_served, unpack_served
from tests.join_kit import FEEDBACK, brute_force, feedback, joiner, rows_of, send, served_request

POLICY = JoinPolicy(
    click_window_ms=100, observation_window_ms=200, attribution_window_ms=1_000, served_ttl_ms=500, held_ttl_ms=400
)
END = 1_000_000
FIRST0 = ("FIRST", 0, 0, 0)
FIRST1, FIRST1V = ("FIRST", 1, 0, 0), ("FIRST", 1, 1, 1)
LATE, MATURED0, MATURED1, MATURED1V = (
    ("LATE_CONVERSION", 1, 1, 0), ("MATURED", 1, 0, 0), ("MATURED", 1, 1, 0), ("MATURED", 1, 1, 1)
)  # fmt: skip

CASES = {
    "shown, nothing else": ("S0 I10", [FIRST0], {"impression": 1}),
    "never shown": ("S0", [], {"never_shown": 3}),
    "clicked": ("S0 I10 C50", [FIRST1, MATURED0], {"click": 1}),
    "click at the window's last moment": ("S0 I10 C110", [FIRST1, MATURED0], {"click": 1}),
    "click one too late": ("S0 I10 C111", [FIRST0], {"late_click": 1}),
    "click before the impression (clocks)": ("S0 I10 C5", [FIRST1, MATURED0], {"click": 1}),
    "converted at once": ("S0 I10 C50 D60", [FIRST1V, MATURED1V], {"conversion_immediate": 1}),
    "converted at the observation's end": ("S0 I10 C50 D250", [FIRST1V, MATURED1V], {"conversion_immediate": 1}),
    "converted late": ("S0 I10 C50 D251", [FIRST1, LATE, MATURED1], {"conversion_late": 1}),
    "converted at the attribution's end": ("S0 I10 C50 D1050", [FIRST1, LATE, MATURED1], {"conversion_late": 1}),
    "converted after it": ("S0 I10 C50 D1051", [FIRST1, MATURED0], {"conversion_after_attribution": 1}),
    "converted twice, the first counts": ("S0 I10 C50 D60 D700", [FIRST1V, MATURED1V], {"duplicate": 1}),
    "converted late twice": ("S0 I10 C50 D300 D300", [FIRST1, LATE, MATURED1], {"duplicate": 1}),
    "everything twice": ("S0 S0 I10 I10 C50 C50", [FIRST1, MATURED0], {"served_duplicate": 1, "duplicate": 2}),
    "two clicks, the earlier counts": ("S0 I10 C90 C50 D260", [FIRST1, LATE, MATURED1], {"duplicate": 1}),
    "feedback before served": ("I10 C50 D60 S0", [FIRST1V, MATURED1V], {"served": 1, "conversion_immediate": 1}),
    "all in reverse": ("D300 C50 I10 S0", [FIRST1, LATE, MATURED1], {"conversion_late": 1}),
    "served never comes": ("I10 C50", [], {"expired_impression": 1, "expired_click": 1}),
    "served comes too late": ("I10 T900 S0", [], {"expired_impression": 1, "served_late": 1}),
    "conversion without a click": ("S0 I10 D60", [FIRST0], {"conversion_without_click": 1}),
    "conversion of a late click": ("S0 I10 C200 D300", [FIRST0], {"late_click": 1, "conversion_without_click": 1}),
    "click without an impression": ("S0 C50", [], {"click_without_impression": 1}),
    "conversion without an impression": ("S0 D60", [], {"conversion_without_impression": 1}),
    "impression after the request's time": ("S0 I501", [], {"impression_after_ttl": 1}),
    "held impression after the request's time": ("I501 S0", [], {"impression_after_ttl": 1}),
    "late click after the first emission": ("S0 I10 T300 C290", [FIRST0], {"late_click": 1}),
    "conversion after its row matured": ("S0 I10 C50 T1200 D900", [FIRST1, MATURED0], {"conversion_after_maturity": 1}),
    "conversion long after": ("S0 I10 C50 T1200 D1190", [FIRST1, MATURED0], {"conversion_after_attribution": 1}),
    "observed conversion that came after the lateness": ("S0 I10 C50 T300 D60", [FIRST1, LATE, MATURED1],
                                                         {"conversion_late": 1}),
    "click for a forgotten request": ("S0 I10 T900 C20", [FIRST0], {"expired_click": 1}),
}  # fmt: skip


def run(join, script: str) -> None:
    """S served, I impression, C click, D conversion at a time; T event time has come to it."""
    for word in script.split():
        letter, at = word[0], int(word[1:])
        if letter == "T":
            join.advance(at)
        elif letter == "S":
            send(join, served_request("r", at))
        else:
            send(join, feedback({"I": "impression", "C": "click", "D": "conversion"}[letter], "r", at))


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    script, emitted, outcomes = CASES[case]
    join = joiner(POLICY, MemoryJoinState())
    join.watermark.assign([FEEDBACK._replace(partition=7)])  # it stays silent, so that only T moves time
    run(join, script)
    join.advance(END)
    assert [row[2:6] for row in rows_of(join.take())] == emitted
    assert {name: join.outcomes[name] for name in outcomes} == outcomes


def test_rows_come_when_they_are_due_and_not_before() -> None:
    join = joiner(POLICY, MemoryJoinState())
    run(join, "S0 I10 C50")
    for at, kinds in ((250, []), (251, [Kind.FIRST]), (1_050, []), (1_051, [Kind.MATURED])):
        join.advance(at)
        assert [e.kind for e in join.take()] == kinds, at


def test_examples_carry_the_features_and_scores_of_their_impression() -> None:
    join = joiner(POLICY, MemoryJoinState())
    for request, ts in (("a", 0), ("b", 7)):
        send(join, served_request(request, ts))
        for item in ("i2", "i0"):
            send(join, feedback("impression", request, ts + 10, item))
    join.advance(END)
    examples = assemble(join.take())
    assert examples.user.ids_NS[:, 0].tolist() == [0, 0, 7, 7]
    assert examples.item.ids_NS[:, 0].tolist() == [12, 10, 12, 10]
    assert examples.item.dense_ND[:, 0].tolist() == [2, 0, 2, 0]
    assert examples.context.ids_NS[:, 0].tolist() == [0, 0, 7, 7]
    assert examples.served_ctr_B.tolist() == pytest.approx([0.12, 0.1, 0.12, 0.1])
    assert examples.served_ctcvr_B.tolist() == pytest.approx([0.012, 0.01, 0.012, 0.01])
    assert examples.impression_ms_B.tolist() == [10, 10, 17, 17]
    assert examples.version_B.tolist() == [1] * 4


def test_clicked_rows_keep_their_features_when_the_rest_of_the_request_is_forgotten() -> None:
    store = MemoryJoinState()
    join = joiner(POLICY, store)
    send(join, served_request("r", 0))
    for item in ("i0", "i2"):
        send(join, feedback("impression", "r", 10, item))
    send(join, feedback("click", "r", 20, "i2"))
    join.advance(600)
    join.take()
    entry = store.get("r")
    assert entry is not None
    assert entry.served is not None
    assert entry.served.items == ["i2"]
    join.advance(END)
    (matured,) = join.take()
    assert matured.kind == Kind.MATURED
    assert assemble([matured]).item.ids_NS[0, 0] == 12


def test_feedback_for_other_candidates_of_a_forgotten_request_has_a_name() -> None:
    join = joiner(POLICY, MemoryJoinState())
    run(join, "S0 I10 C20 T600")
    send(join, feedback("click", "r", 30, "i1"))
    send(join, feedback("impression", "s", 700))
    send(join, served_request("s", 700))
    send(join, feedback("click", "s", 700, "elsewhere"))
    assert (join.outcomes["after_ttl"], join.outcomes["item_not_served"]) == (1, 1)


def test_only_so_many_requests_are_held_without_their_served() -> None:
    join = joiner(JoinPolicy(max_held=1), MemoryJoinState())
    for request in ("a", "a", "b"):
        send(join, feedback("impression", request, 10))
    assert (join.held, join.outcomes["held_overflow"], join.outcomes["duplicate"]) == (1, 1, 1)


def test_policy_refuses_windows_that_contradict() -> None:
    with pytest.raises(ValueError, match="must not be shorter than the observation window"):
        JoinPolicy(observation_window_ms=10, attribution_window_ms=9)
    with pytest.raises(ValueError, match="negative"):
        JoinPolicy(click_window_ms=-1)


def test_a_served_request_packs_to_bytes_and_back() -> None:
    before = served_request("r\N{SNOWMAN}", 5, ("i0", 'quote"'))._replace(degraded=True)
    after = unpack_served(pack_served(before))
    assert (after.request_id, after.items, after.ts_ms, after.degraded) == (before.request_id, before.items, 5, True)
    for mine, theirs in zip((*after.item, *after.user, *after.context), (*before.item, *before.user, *before.context),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(after.ctcvr_K, before.ctcvr_K)


def test_saved_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "join.bin").write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="not join state of this version"):
        MemoryJoinState().restore(tmp_path)
    store = MemoryJoinState()
    send(joiner(POLICY, store), served_request("r", 0))
    store.save(tmp_path)
    whole = (tmp_path / "join.bin").read_bytes()
    (tmp_path / "join.bin").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="ends in the middle"):
        MemoryJoinState().restore(tmp_path)


def clicked_share_on_a_ramp(together: bool) -> tuple[float, float]:
    """Traffic doubles every 700 ms, one impression in four is clicked at once: the clicked share of first emissions
    in the last 200 ms of it, and of those that come when it has stopped."""
    policy = JoinPolicy(
        click_window_ms=100, observation_window_ms=500, attribution_window_ms=5_000, served_ttl_ms=1_000,
        held_ttl_ms=1_000, together=together,
    )  # fmt: skip
    join, number, at = joiner(policy, MemoryJoinState()), 0, 1_000.0
    while at < 6_000:
        for event in (served_request(f"r{number}", int(at)), feedback("impression", f"r{number}", int(at))):
            send(join, event)
        if number % 4 == 0:
            send(join, feedback("click", f"r{number}", int(at)))
        number += 1
        at += 8.0 * 0.5 ** ((at - 1_000) / 700)
        if at < 5_800:
            join.take()
    ramp = [e.click for e in join.take() if e.kind == Kind.FIRST]
    join.advance(7_000)
    stopped = [e.click for e in join.take() if e.kind == Kind.FIRST]
    assert min(len(ramp), len(stopped)) > 100
    return sum(ramp) / len(ramp), sum(stopped) / len(stopped)


def test_traffic_that_grows_and_stops_does_not_change_the_clicked_share() -> None:
    assert clicked_share_on_a_ramp(together=True) == (pytest.approx(0.25, abs=0.01), pytest.approx(0.25, abs=0.01))


def test_emitted_early_the_clicked_share_is_wrong_while_traffic_changes() -> None:
    ramp, stopped = clicked_share_on_a_ramp(together=False)
    assert ramp < 0.20
    assert stopped > 0.33


def rows(emissions) -> int:
    return sum(emission.rows for emission in emissions)


def test_a_tick_emits_a_page_together_and_changes_no_label():
    policy = JoinPolicy(1_000, 2_000, 8_000, 5_000, 5_000)
    stream = [served_request("r0", 10_000)]
    stream += [feedback("impression", "r0", 10_100 + 40 * i, f"i{i}") for i in range(3)]
    stream += [feedback("click", "r0", 10_500, "i1"), feedback("conversion", "r0", 11_000, "i1")]
    emitted, whole = {}, {}
    for tick_ms in (1, 500):
        join = joiner(replace(policy, tick_ms=tick_ms), MemoryJoinState())
        for event in stream:
            send(join, event)
        emitted[tick_ms] = []
        for at_ms in range(10_000, 30_000, 20):
            join.advance(at_ms)
            emitted[tick_ms].append(join.take())
        whole[tick_ms] = rows_of([one for part in emitted[tick_ms] for one in part])
    assert whole[1] == whole[500] == brute_force(policy, stream[:1], stream[1:])
    assert max(rows(part) for part in emitted[1]) == 1
    assert max(rows(part) for part in emitted[500]) == 2
