"""The input alarm: broken streams stop learning, ordinary change and ordinary noise do not."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from esmm.batch import Examples, FeatureBlock, Kind
from stream_scorer.core.drift import CONSTANT_ROWS, DriftAlarm, DriftPolicy

POLICY = DriftPolicy(heal_rows=600, adopt_rows=12_000)
CLICK_MS, OBSERVE_MS = 100, 300


class Stream:
    """Steps of an ordinary stream of unrelated rows, unless told otherwise. A row a millisecond."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.now_ms = 1_000

    def step(self, rows: int = 400, ctr: float = 0.1, price: float = 3.0, hour: float = 13.0, **bad) -> Examples:
        rng = self.rng
        dense = np.stack([rng.normal(price, 1, rows), np.full(rows, hour), rng.normal(0, 1, rows)], axis=1)
        if bad.get("blank"):
            dense[:, 0] = 0
        if bad.get("constant"):
            dense[:, 2] = 0
        click = (rng.random(rows) < ctr).astype(np.float32)
        if bad.get("flip"):
            click = 1 - click
        conversion = click * (rng.random(rows) < bad.get("cvr", 0.3))
        ids = rng.integers(1, 100, (rows, 2))
        if bad.get("missing"):
            ids[:] = 0
        zeros, none = np.zeros((rows, 0), np.int64), np.zeros((rows, 0), np.float32)
        blocks = FeatureBlock(zeros, none), FeatureBlock(ids, dense.astype(np.float32)), FeatureBlock(zeros, none)
        self.now_ms += rows
        return examples(blocks, np.full(rows, Kind.FIRST), click, conversion, self.now_ms - np.arange(rows)[::-1])


def examples(blocks, kind, click, conversion, shown_ms) -> Examples:
    rows, conversion = len(kind), np.asarray(conversion, np.float32)
    score = np.full(rows, 0.1, np.float32)
    return Examples(
        *blocks, np.asarray(kind, np.uint8), np.asarray(click, np.float32), conversion, conversion, score, score,
        np.ones(rows, np.int64), np.asarray(shown_ms, np.int64),
    )  # fmt: skip


def warm(seed: int = 0, policy: DriftPolicy = POLICY, steps: int = 60):
    stream, alarm = Stream(seed), DriftAlarm(policy, CLICK_MS, OBSERVE_MS)
    for _ in range(steps):
        assert alarm.check(stream.step()).learn
    return stream, alarm


@pytest.mark.parametrize("rows", [64, 400])
@pytest.mark.parametrize(
    ("bad", "reason", "within"),
    [
        ({"blank": True}, "shift", 400),
        ({"price": 3_000.0}, "shift", 400),
        ({"missing": True}, "shift", 400),
        ({"flip": True}, "clicks", 1_200),
        ({"ctr": 1.0}, "clicks", 1_200),
        ({"ctr": 0.0}, "clicks", 4_800),  # a feedback topic from which clicks no longer come
        ({"cvr": 1.0}, "conversions", 2_800),
        ({"cvr": 0.0}, "conversions", 4_000),
    ],
)
def test_a_broken_stream_stops_learning_and_healing_starts_it_again(rows, bad, reason, within) -> None:
    stream, alarm = warm()
    learned = [alarm.check(stream.step(rows, **bad)).learn for _ in range(8_000 // rows)]
    assert learned == sorted(learned, reverse=True)  # once off it stays off
    assert sum(learned) * rows < within
    assert alarm.reason == reason
    healing = [alarm.check(stream.step(rows)).learn for _ in range(16_000 // rows)]
    assert not healing[0]  # one ordinary step is not enough
    assert healing == sorted(healing)
    assert healing[-1]
    assert alarm.reason == ""


def test_a_column_that_stops_varying_is_found() -> None:
    stream, alarm = warm()
    learned = [alarm.check(stream.step(constant=True)).learn for _ in range(10)]
    assert sum(learned) in (CONSTANT_ROWS // 400, CONSTANT_ROWS // 400 + 1)  # about a tenth of the rows are clicked
    assert alarm.reason == "constant"


def test_what_was_often_constant_may_be_so_again() -> None:
    stream, alarm = warm()
    for turn in range(6):  # 800 rows at a time, then for good
        for _ in range(2 if turn < 5 else 20):
            assert alarm.check(stream.step(constant=True)).learn
        assert alarm.check(stream.step()).learn


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_change_is_learned(seed: int) -> None:
    stream, alarm = warm(seed)
    for at in range(600):
        changing = {"ctr": 0.1 + 0.05 * np.sin(at / 60), "price": 3 + at / 300, "cvr": 0.3 - at / 4_000}
        verdict = alarm.check(stream.step(hour=float(at // 20 % 24), **changing))
        assert verdict.learn, (at, verdict)


def request(rng, shown_ms: int, taste_U, cart_U) -> tuple:
    """Ten items for one user: everything of the user and of the context is the same in all ten."""
    user = int(rng.integers(1, len(taste_U)))
    cart_U[user] += 1
    history = np.arange(1, 13) * (np.arange(12) < cart_U[user])  # fills as the stream goes on
    user_dense = [taste_U[user], np.exp(rng.normal() * 1.5), float(user % 97 == 0), np.log1p(cart_U[user])]
    context_dense = [shown_ms // 20_000 % 24, rng.normal()]
    item = rng.integers(1, 200, 10)
    click = rng.random(10) < 1 / (1 + np.exp(2.5 - taste_U[user] - item / 100))
    dense = np.column_stack(
        [np.tile(user_dense, (10, 1)), item / 50, rng.pareto(1.5, 10), np.tile(context_dense, (10, 1))]
    )
    ids = np.column_stack([np.full(10, user), np.tile(history, (10, 1)), item, np.arange(10), np.full(10, user % 3)])
    return dense, ids, click, click & (rng.random(10) < 0.08)


def clustered(seed: int, steps: int) -> Iterator[Examples]:
    """Steps of 64 rows as the join emits them: clicked rows later, matured rows later still, all at once in a pause."""
    rng = np.random.default_rng(seed)
    taste_U, cart_U = rng.normal(0, 0.8, 400), np.zeros(400)
    due: list[tuple] = []
    for number in range(steps * 8):
        shown_ms = number * 20 + (60_000 if number > steps * 3 else 0)  # a pause: what is due comes, and nothing else
        dense, ids, click, conversion = request(rng, shown_ms, taste_U, cart_U)
        for row in range(10):
            out_ms = shown_ms + 2_000 + int(click[row]) * 8_000
            values = (shown_ms, dense[row], ids[row], click[row], conversion[row])
            due.append((out_ms, number, row, Kind.FIRST, *values))
            if click[row]:
                due.append((out_ms + 15_000, number, row, Kind.MATURED, *values))
    due.sort(key=lambda one: one[:3])
    for at in range(0, steps * 64, 64):
        _, _, _, kind, shown, dense, ids, click, conversion = zip(*due[at : at + 64], strict=True)
        dense_BD, ids_BS = np.array(dense, np.float32), np.array(ids, np.int64)
        blocks = (
            FeatureBlock(ids_BS[:, :13], dense_BD[:, :4]),
            FeatureBlock(ids_BS[:, 13:14], dense_BD[:, 4:6]),
            FeatureBlock(ids_BS[:, 14:], dense_BD[:, 6:]),
        )
        yield examples(blocks, kind, click, conversion, shown)


@pytest.mark.parametrize("seed", range(6))
def test_small_steps_of_clustered_rows_raise_no_alarm(seed: int) -> None:
    alarm = DriftAlarm(DriftPolicy(), click_window_ms=2_000, observation_window_ms=8_000)
    for at, one in enumerate(clustered(seed, 500)):
        verdict = alarm.check(one)
        assert verdict.learn, (at, verdict)


@pytest.mark.parametrize(("column", "value"), [(0, 50.0), (4, 0.0)])
def test_among_clustered_rows_a_broken_column_is_found(column: int, value: float) -> None:
    alarm = DriftAlarm(DriftPolicy(), click_window_ms=2_000, observation_window_ms=8_000)
    learned = []
    for at, one in enumerate(clustered(0, 500)):
        if at >= 350:
            block, inside = (one.user, column) if column < 4 else (one.item, column - 4)
            block.dense_ND[:, inside] = value
        learned.append(alarm.check(one).learn)
    assert all(learned[:350])
    assert sum(learned[350:]) < 25
    assert not any(learned[375:])


@pytest.mark.parametrize(("source", "learned"), [("item", True), ("user", False)])
def test_another_model_shows_other_items_but_not_other_users(source: str, learned: bool) -> None:
    rng, alarm = np.random.default_rng(4), DriftAlarm(POLICY, CLICK_MS, OBSERVE_MS)

    def step(now_ms: int, picky: bool) -> Examples:
        """The first ten of fifty, or the ten with the largest value in the first column."""
        value = np.sort(rng.normal(0, 1, (40, 50)), axis=1)[:, -10:] if picky else rng.normal(0, 1, (40, 10))
        dense = np.stack([value.ravel(), rng.normal(0, 1, 400)], axis=1).astype(np.float32)
        chosen = FeatureBlock(rng.integers(1, 9, (400, 1)), dense)
        other = FeatureBlock(np.zeros((400, 0), np.int64), np.zeros((400, 0), np.float32))
        blocks = (other, chosen, other) if source == "item" else (chosen, other, other)
        click = (rng.random(400) < 0.1).astype(np.float32)
        return examples(blocks, np.full(400, Kind.FIRST), click, click * 0, now_ms + np.arange(400))

    verdicts = [alarm.check(step(400 * at, picky=at >= 60)).learn for at in range(90)]
    assert all(verdicts[:60])
    assert all(verdicts[60:]) is learned


def test_nothing_is_judged_while_too_few_rows_were_seen() -> None:
    stream, alarm = Stream(0), DriftAlarm(POLICY, CLICK_MS, OBSERVE_MS)
    for _ in range(8):
        assert alarm.check(stream.step()).learn
    assert alarm.check(stream.step(blank=True, flip=True)).learn


def test_small_steps_are_judged_together_and_do_not_end_an_alarm() -> None:
    stream, alarm = warm()
    learned = [alarm.check(stream.step(10, blank=True)).learn for _ in range(60)]
    assert learned[0]
    assert not learned[-1]
    assert not alarm.check(stream.step(10)).learn


def test_what_stays_becomes_ordinary() -> None:
    stream, alarm = warm()
    learned = [alarm.check(stream.step(price=30.0)).learn for _ in range(60)]
    assert learned.index(True) == POLICY.adopt_rows // 400 - 1
    assert all(learned[POLICY.adopt_rows // 400 - 1 :])


def test_it_can_be_off() -> None:
    stream, alarm = warm(policy=DriftPolicy(enabled=False))
    assert all(alarm.check(stream.step(flip=True, blank=True)).learn for _ in range(10))


@pytest.mark.parametrize("bad", [{"flip": True}, {"constant": True}, {"blank": True}, {"cvr": 1.0}])
def test_state_survives_json(bad) -> None:
    stream, alarm = warm()
    for _ in range(6):
        alarm.check(stream.step(100, **bad))
    other = DriftAlarm(POLICY, CLICK_MS, OBSERVE_MS)
    other.restore(json.loads(json.dumps(alarm.state())))
    assert other._columns._picked == slice(0, 3)  # before a step has any unclicked row
    verdicts = []
    for some in [bad] * 12 + [{}] * 20:
        one = stream.step(**some)
        verdicts.append(alarm.check(one))
        assert verdicts[-1] == other.check(one)
    assert other.state() == alarm.state()
    assert {verdict.learn for verdict in verdicts} == {True, False}
