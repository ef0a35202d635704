"""The rows that the gate judges by: what the candidate said of each before it learned from it."""

from __future__ import annotations

import numpy as np
import pytest

from esmm.batch import Examples, FeatureBlock, Kind
from stream_scorer.core.gate_rows import GateRows, identity, is_held_out

FIRST, LATE, MATURED = Kind.FIRST, Kind.LATE_CONVERSION, Kind.MATURED


def rows(*of: tuple[int, Kind, int]) -> Examples:
    """(who, kind, click) each."""
    who = np.array([one[0] for one in of], np.int64)
    number = len(of)
    click = np.array([one[2] for one in of], np.float32)
    nothing = np.zeros(number, np.float32)
    return Examples(
        FeatureBlock(who[:, None], np.zeros((number, 0), np.float32)),
        FeatureBlock(who[:, None] % 3, (who[:, None] / 7).astype(np.float32)),
        FeatureBlock(np.zeros((number, 1), np.int64), np.zeros((number, 0), np.float32)),
        np.array([one[1] for one in of], np.uint8),
        click, nothing, nothing, nothing, nothing, np.zeros(number, np.int64), 1_000 + who,
    )  # fmt: skip


def add(kept: GateRows, examples: Examples, ctr: float, cvr: float = 0.5) -> None:
    ctr_B = np.full(examples.rows, ctr, np.float32)
    kept.add(examples, ctr_B, ctr_B * np.float32(cvr))


def matured(kept: GateRows, learned: int) -> list[float]:
    found = kept.matured_since(learned)
    return [] if found is None else [pytest.approx(p, abs=1e-6) for p in found.candidate_B.tolist()]


def test_first_emissions_count_for_a_version_that_had_not_learned_them() -> None:
    kept = GateRows(100)
    add(kept, rows((1, FIRST, 0), (2, FIRST, 1)), 0.1)
    published = kept.learned
    assert kept.first_since(published) is None
    add(kept, rows((3, FIRST, 0), (2, LATE, 1)), 0.2)
    fresh = kept.first_since(published)
    assert fresh is not None
    assert fresh.examples.user.ids_NS[:, 0].tolist() == [3]
    assert fresh.candidate_B.tolist() == [pytest.approx(0.2)]
    everything = kept.first_since(0)
    assert everything is not None
    assert everything.candidate_B.tolist() == [pytest.approx(p) for p in (0.1, 0.1, 0.2)]


def test_a_matured_click_is_judged_by_the_first_occasion_after_the_other_version() -> None:
    kept = GateRows(100)
    marks = [kept.learned]
    for kind, cvr in ((FIRST, 0.1), (LATE, 0.2), (MATURED, 0.9)):
        add(kept, rows((1, kind, 1), (2, FIRST, 0)), 0.5, cvr)
        marks.append(kept.learned)
    assert [matured(kept, mark) for mark in marks] == [[0.1], [0.2], [0.9], []]


def test_a_click_that_was_not_seen_before_is_judged_when_it_matures() -> None:
    kept = GateRows(100)
    add(kept, rows((1, MATURED, 1)), 0.5, 0.3)
    assert matured(kept, 0) == [0.3]


def test_the_oldest_rows_and_clicks_go() -> None:
    kept = GateRows(10)
    for who in range(0, 1_000, 5):
        add(kept, rows(*((who + n, FIRST, 1) for n in range(5))), 0.5)
    first = kept.first_since(0)
    assert first is not None
    assert first.examples.user.ids_NS[:, 0].tolist() == list(range(990, 1_000))
    assert len(kept._open) == 160


@pytest.mark.parametrize("step", [1, 3, 7, 10, 25])
def test_the_window_is_the_same_however_rows_came_and_after_a_restart(step: int) -> None:
    kept, again = GateRows(10, held_out=10), GateRows(10, held_out=10)
    stream = [(who, kind, 1) for who in range(100) for kind in (FIRST, MATURED)]
    for at in range(0, len(stream), step):
        some = rows(*stream[at : at + step])
        for one in (kept, again):
            add(one, some, 0.5)
            one.hold_out(some)
        restarted = GateRows(10, held_out=10)
        restarted.restore(again.arrays())
        again = restarted
        seen = [who for who, kind, _ in stream[: at + step] if kind == FIRST][-10:]
        ripe = [who for who, kind, _ in stream[: at + step] if kind == MATURED][-10:]
        for one in (kept, again):
            found = (one.first_since(0), one.matured_since(0), *one.held_out())
            whose = [[] if part is None else part.examples.user.ids_NS[:, 0].tolist() for part in found]
            assert whose == [seen, ripe, seen, ripe]


def test_a_step_of_which_few_rows_are_kept_does_not_stay_in_memory() -> None:
    kept = GateRows(10)
    many = rows(*((who, MATURED, 1) for who in range(50)), (99, FIRST, 0))
    add(kept, many, 0.5)
    assert [part.examples.rows for part in kept._first._parts] == [1]


def test_forgetting_keeps_the_count() -> None:
    kept = GateRows(10)
    add(kept, rows((1, FIRST, 1)), 0.5)
    kept.forget()
    assert (kept.learned, kept.first_since(0)) == (1, None)


def test_it_survives_a_checkpoint() -> None:
    whole, parts = GateRows(50), GateRows(50)
    rng = np.random.default_rng(3)
    for at in range(40):
        kinds = [FIRST, LATE, MATURED]
        some = rows(*((int(rng.integers(1, 30)), kinds[int(rng.integers(3))], int(rng.integers(2))) for _ in range(8)))
        ctr = float(rng.random())
        for kept in (whole, parts):
            add(kept, some, ctr, 0.25)
        if at % 7 == 0:
            again = GateRows(50)
            again.restore(parts.arrays())
            parts = again
    assert parts.learned == whole.learned == 320
    assert parts._open == whole._open
    for mark in (0, 200, 300):
        a, b = whole.matured_since(mark), parts.matured_since(mark)
        assert a is not None
        assert b is not None
        np.testing.assert_array_equal(a.candidate_B[-10:], b.candidate_B[-10:])


def test_rows_of_one_impression_have_one_identity_and_others_have_another() -> None:
    some = rows((1, FIRST, 1), (2, FIRST, 1), (1, MATURED, 1))
    a, b, c = identity(some).tolist()
    assert a == c != b
    assert len(set(identity(rows(*((n, FIRST, 1) for n in range(5_000)))).tolist())) == 5_000


def test_all_rows_of_an_impression_are_held_out_or_none() -> None:
    many = rows(*((who, kind, 1) for kind in (FIRST, LATE, MATURED) for who in range(4_000)))
    held_B = is_held_out(many, 0.05)
    assert 0.04 < held_B.mean() < 0.06
    np.testing.assert_array_equal(held_B[:4_000], held_B[4_000:8_000])
    np.testing.assert_array_equal(held_B[:4_000], held_B[8_000:])
    assert not is_held_out(many, 0.0).any()


def test_what_is_held_out_is_kept_by_kind_also_in_a_checkpoint() -> None:
    kept, again = GateRows(100, held_out=100), GateRows(100, held_out=100)
    kept.hold_out(rows((1, FIRST, 1), (2, FIRST, 0), (1, LATE, 1), (1, MATURED, 1)))
    again.restore(kept.arrays())
    for one in (kept, again):
        first, matured = one.held_out()
        assert first is not None
        assert matured is not None
        assert first.examples.click_B.tolist() == [1, 0]
        assert matured.examples.rows == 1
        assert one.learned == 0
        assert one.first_since(0) is None
