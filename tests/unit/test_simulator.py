"""The simulator against a loop of our own: every request accounted for, truth exact, feedback as promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from esmm.batch import FeatureBlock
from esmm.features import FeatureSchema
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import FatalError, RecoverableError
from stream_scorer.core.messages import Feedback, ScoreRequest
from stream_scorer.core.records import DeliveryReport, OutRecord, Position, Record, TopicPartition
from stream_scorer.embedded.delays import DelayMixture
from stream_scorer.embedded.market import Market, MarketPlan
from stream_scorer.embedded.market_features import MARKET_TOML
from stream_scorer.embedded.plan import DemoPlan, SimulatorPlan, Wire
from stream_scorer.embedded.shop import CLICK, CONVERSION, IMPRESSION, ShopPlan, Truth, react, show
from stream_scorer.embedded.simulator import Simulator
from stream_scorer.embedded.tally import Tally
from stream_scorer.embedded.truth import TruthTally
from stream_scorer.ports import RebalanceListener

SCHEMA = FeatureSchema.from_toml(MARKET_TOML)
MARKET = MarketPlan(users=100, items=80, candidates=12)
T0_MS = 1_700_000_000_000
Answer = Callable[[dict[str, Any]], list[dict[str, Any]]]


class HandClock:
    """Moves only when told, and a little each time a poll waits."""

    def __init__(self) -> None:
        self.at_s = 100.0

    def now_ms(self) -> int:
        return T0_MS + round((self.at_s - 100.0) * 1_000)

    def monotonic_s(self) -> float:
        return self.at_s


class Loop:
    """The world beyond the simulator: requests are answered by ``answer`` and read at the next poll."""

    def __init__(self, answer: Answer) -> None:
        self.clock = HandClock()
        self.answer = answer
        self.assigns = True
        self.fail_requests = 0
        self.store_is_down = False
        self.requests: list[dict[str, Any]] = []
        self.feedback: list[tuple[int, dict[str, Any]]] = []
        self.written: dict[str, FeatureBlock] = {}
        self.waiting: list[bytes] = []

    def write(self, entity: str, ids: Sequence[str], block: FeatureBlock, event_ms: int) -> None:
        if self.store_is_down:
            raise RecoverableError("down")
        assert event_ms == self.clock.now_ms()
        assert block.ids_NS.shape == (len(ids), SCHEMA.layout(entity).id_width)  # type: ignore[arg-type]
        for n, name in enumerate(ids):
            self.written[name] = block.take(np.array([n]))

    def wire(self) -> Wire:
        layouts = (SCHEMA.layout("user"), SCHEMA.layout("item"))
        return Wire(LoopSource(self), LoopSink(self), self.write, self.clock, *layouts)  # type: ignore[arg-type]


class LoopSource:
    """The part of a Source that the simulator uses: it commits nothing, seeks nowhere, pauses never."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def subscribe(self, listener: RebalanceListener) -> None:
        self.listener = listener

    def poll(self, max_records: int, wait_s: float, linger_s: float) -> list[Record]:
        loop = self.loop
        if loop.assigns:
            self.listener.on_assign([TopicPartition("scores", 0)])
        loop.clock.at_s += max(wait_s, 0.001)
        taken, loop.waiting = loop.waiting[:max_records], loop.waiting[max_records:]
        return [Record(Position("scores", 0, n), None, value, (), 0, 0) for n, value in enumerate(taken)]


class LoopSink:
    """The part of a Sink that the simulator uses; every report comes at once."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def send(self, record: OutRecord, report: DeliveryReport) -> None:
        loop, message = self.loop, orjson.loads(record.value or b"")
        assert record.key == message["user_id"].encode()
        if record.topic == "feedback":
            Feedback.model_validate_json(record.value or b"")
            loop.feedback.append((loop.clock.now_ms(), message))
            report(None, None)
            return
        ScoreRequest.model_validate_json(record.value or b"")
        if loop.fail_requests:
            loop.fail_requests -= 1
            report("broken", None)
            return
        report(None, None)
        loop.requests.append(message)
        loop.waiting += [orjson.dumps(answer) for answer in loop.answer(message)]

    def poll(self) -> None: ...

    def flush(self, _deadline: Deadline) -> bool:
        return True


def make_simulator(answer: Answer, rate: float = 50.0, **shop: Any) -> tuple[Simulator, Loop]:
    loop = Loop(answer)
    simulator = Simulator(Market(MARKET), loop.wire(), SimulatorPlan(rate=rate, shop=ShopPlan(**shop)))
    simulator.start()
    return simulator, loop


def scores_of(request: dict[str, Any], ctr: Any = 0.1, cvr: float = 0.1, version: int = 1) -> dict[str, Any]:
    ctr_K = np.broadcast_to(ctr, len(request["items"])).tolist()
    return {
        "request_id": request["request_id"],
        "user_id": request["user_id"],
        "model_version": version,
        "items": request["items"],
        "ctr": ctr_K,
        "cvr": [cvr] * len(ctr_K),
        "ctcvr": [ctr * cvr for ctr in ctr_K],
        "degraded": False,
        "missing": [],
        "feature_age_ms": 0,
        "ts": request["ts"],
        "scored_at": request["ts"],
        "schema_version": 1,
    }


def run(simulator: Simulator, seconds: float) -> None:
    simulator.run(seconds, lambda: False)


def finish(simulator: Simulator, loop: Loop, seconds: float = 1.0) -> Any:
    return simulator.drain(Deadline.after(seconds, loop.clock.monotonic_s))


def test_every_request_is_scored_once_and_nothing_is_lost() -> None:
    simulator, loop = make_simulator(lambda request: [scores_of(request)])
    run(simulator, 10.0)
    stats = finish(simulator, loop)
    assert (stats.lost, stats.duplicates, stats.unknown, stats.wrong, stats.unsent, stats.outstanding) == (0,) * 6
    assert stats.requests == stats.scored == len(loop.requests) == len({r["request_id"] for r in loop.requests})
    assert 400 < stats.requests < 600  # a Poisson process of 50 a second
    assert stats.candidates == stats.scored * MARKET.candidates
    assert stats.candidates_per_s == pytest.approx(stats.candidates / 10.0, rel=0.05)
    assert stats.versions == [1]


def test_lost_duplicate_foreign_and_wrong_scores_are_told_apart() -> None:
    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        number = int(request["request_id"].rpartition("-")[2])
        good = scores_of(request)
        if number == 1:
            return []
        if number == 2:
            return [good, good]
        if number == 3:
            return [good | {"request_id": "other-3"}, good]
        if number == 4:
            return [good | {"items": good["items"][::-1]}, {"request_id": request["request_id"]}]
        return [good]

    simulator, loop = make_simulator(answer)
    run(simulator, 2.0)
    loop.waiting.append(b"not json")
    stats = finish(simulator, loop)
    assert (stats.lost, stats.duplicates, stats.unknown, stats.wrong) == (2, 1, 1, 3)
    assert stats.scored == stats.requests - 2


def test_a_request_counts_as_lost_only_after_a_while_and_is_forgiven() -> None:
    held: list[dict[str, Any]] = []
    simulator, loop = make_simulator(lambda request: held.append(scores_of(request)) or [])
    run(simulator, 9.0)
    assert (simulator.stats.lost, simulator.stats.scored) == (0, 0)
    assert 0 < simulator.stats.outstanding <= len(held)
    run(simulator, 6.0)
    assert 0 < simulator.stats.lost < simulator.stats.outstanding
    loop.waiting += [orjson.dumps(scores) for scores in held]
    assert finish(simulator, loop).lost == 0


def test_what_the_broker_never_took_is_unsent_and_not_lost() -> None:
    simulator, loop = make_simulator(lambda request: [scores_of(request)])
    loop.fail_requests = 3
    run(simulator, 2.0)
    stats = finish(simulator, loop)
    assert (stats.unsent, stats.lost, stats.requests) == (3, 0, len(loop.requests))


def test_latency_is_from_asking_to_reading() -> None:
    simulator, loop = make_simulator(lambda request: [scores_of(request)])
    run(simulator, 5.0)
    stats = finish(simulator, loop)
    assert stats.latency_ms.p50 is not None
    assert 1.0 <= stats.latency_ms.p50 <= stats.latency_ms.p99 <= 25.0  # one poll's wait


def test_perfect_scores_reach_the_ceiling_and_constant_ones_rank_nothing() -> None:
    truth: dict[str, Any] = {}

    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        number = int(request["request_id"].rpartition("-")[2])
        if number % 2:
            return [scores_of(request, 0.5, version=1)]
        click_K, buy_K, _ = truth["simulator"]._open[request["request_id"]].truth_3K
        perfect = scores_of(request, version=2)
        perfect |= {"ctr": click_K.astype(float).tolist(), "ctcvr": (click_K * buy_K).astype(float).tolist()}
        return [perfect]

    simulator, loop = make_simulator(answer)
    truth["simulator"] = simulator
    run(simulator, 8.0)
    constant, perfect = finish(simulator, loop).by_version
    assert (constant.version, perfect.version) == (1, 2)
    assert constant.ctr.auc == pytest.approx(0.5)
    assert constant.ctr.logloss == pytest.approx(np.log(2.0))
    assert perfect.ctr.auc == pytest.approx(perfect.ctr.auc_ceiling)
    assert perfect.ctr.logloss == pytest.approx(perfect.ctr.logloss_floor, rel=1e-4)
    assert perfect.ctr.mae == pytest.approx(0.0, abs=1e-6)
    assert perfect.ctr.pcoc == pytest.approx(1.0, abs=1e-5)
    assert perfect.ctcvr.auc == pytest.approx(perfect.ctcvr.auc_ceiling)


def test_feedback_tells_what_was_shown_and_done_in_due_time() -> None:
    simulator, loop = make_simulator(lambda request: [scores_of(request)], twice=0.1, late=0.1, never=0.02)
    run(simulator, 26.0)
    stats = finish(simulator, loop)
    requests = {request["request_id"]: request for request in loop.requests}
    first: dict[str, dict[str, Any]] = {}
    for sent_ms, message in loop.feedback:
        request = requests[message["request_id"]]
        assert message["item_id"] in request["items"]
        assert message["user_id"] == request["user_id"]
        assert request["ts"] < message["ts"] <= sent_ms
        assert first.setdefault(message["event_id"], message) == message  # a repetition is the same event
    kinds = Counter(message["kind"] for message in first.values())
    assert kinds["impression"] == pytest.approx(stats.scored * 10, rel=0.05)
    assert 0.02 < kinds["click"] / kinds["impression"] < 0.15
    assert 0.02 < kinds["conversion"] / kinds["click"] < 0.25
    assert stats.feedback["twice"] == pytest.approx(0.1 * sum(kinds.values()), rel=0.2)
    assert len(loop.feedback) > len(first)
    assert stats.feedback["never"] > 0
    assert sum(stats.feedback[kind] for kind in kinds) == len(loop.feedback)
    times = [message["ts"] for _, message in loop.feedback]
    assert times != sorted(times)
    delays = [
        message["ts"] - first[click]["ts"]
        for message in first.values()
        if message["kind"] == "conversion" and (click := message["event_id"].replace("conversion", "click")) in first
    ]
    assert 0 < min(delays) <= max(delays) <= 24_000
    assert max(delays) > 4_000


def test_the_best_are_shown_first() -> None:
    worth = np.linspace(0.01, 0.2, MARKET.candidates)
    tidy = {"shuffled": 0.0, "never": 0.0, "twice": 0.0, "late": 0.0}
    simulator, loop = make_simulator(lambda request: [scores_of(request, worth)], **tidy)
    run(simulator, 1.0)
    finish(simulator, loop)
    shown = {(m["request_id"], m["item_id"]) for _, m in loop.feedback if m["kind"] == "impression"}
    for request in loop.requests:
        here = {item for request_id, item in shown if request_id == request["request_id"]}
        assert here == set(request["items"][-10:])


def test_features_are_there_before_they_are_asked_for_and_follow_the_clicks() -> None:
    simulator, loop = make_simulator(lambda request: [scores_of(request)])
    assert len(loop.written) == MARKET.users + MARKET.items
    run(simulator, 20.0)
    asked = {item for request in loop.requests for item in request["items"]}
    assert asked <= set(loop.written)
    assert len(asked - {f"i{n + 1}" for n in range(MARKET.items)}) >= 3  # items that came later
    clicker = next(m["user_id"] for _, m in reversed(loop.feedback) if m["kind"] == "click")
    history = simulator.market.history_UH[int(clicker[1:])]
    at = next(slot for slot in SCHEMA.layout("user").ids if slot.name == "recent_categories")
    np.testing.assert_array_equal(loop.written[clicker].ids_NS[0, at.start : at.stop], history)


def test_features_that_were_not_taken_are_written_again() -> None:
    simulator, loop = make_simulator(lambda request: [scores_of(request)])
    loop.written.clear()
    loop.store_is_down = True
    run(simulator, 10.0)
    assert not loop.written
    loop.store_is_down = False
    run(simulator, 2.0)
    stats = finish(simulator, loop)
    assert stats.unwritten > 0
    assert not any(simulator._owed.values())
    new = {item for request in loop.requests for item in request["items"] if int(item[1:]) > MARKET.items}
    alive = {f"i{number}" for number in simulator.market.number_M.tolist()}
    assert new & alive <= set(loop.written)  # items that came and went during the outage are gone
    assert stats.lost == 0


def test_a_group_that_never_assigns_is_fatal() -> None:
    loop = Loop(lambda _request: [])
    loop.assigns = False
    with pytest.raises(FatalError, match="no partition of the scores topic"):
        Simulator(Market(MARKET), loop.wire(), SimulatorPlan()).start()
    with pytest.raises(ValueError, match="rate"):
        Simulator(Market(MARKET), loop.wire(), SimulatorPlan(rate=0.0))


def test_the_final_account_is_plain_json() -> None:
    simulator, loop = make_simulator(lambda request: [scores_of(request, version=3)])
    before = orjson.loads(orjson.dumps(simulator.stats.fields()))
    assert (before["requests"], before["truth_auc_ctr"], before["latency_ms"]) == (0, None, {"p50": None, "p99": None})
    run(simulator, 2.0)
    fields = orjson.loads(orjson.dumps(finish(simulator, loop).fields()))
    assert {"requests", "scored", "lost", "duplicates", "candidates_per_s", "latency_ms"} <= set(fields)
    assert fields["versions_served"] == 1
    assert fields["truth"]["recent"]["ctr"]["auc"] == fields["truth_auc_ctr"]
    assert fields["truth"]["first"]["version"] == fields["truth"]["last"]["version"] == 3


def test_positions_are_examined_as_planned_and_shares_average_to_one() -> None:
    plan = ShopPlan(shuffled=0.0, twice=0.0, late=0.0, never=0.0)
    assert plan.examination_P.mean() == pytest.approx(1.0)
    rng = np.random.default_rng(4)
    count = 20_000
    ctcvr = np.tile(np.linspace(1.0, 0.0, 12, dtype=np.float32), (count, 1))
    shown = show(plan, rng, ctcvr)
    np.testing.assert_array_equal(shown[0], np.arange(10))
    flat = np.full((count, 12), 0.3, np.float32)
    events = react(plan, rng, shown, T0_MS, Truth(flat, np.full_like(flat, 0.5), np.zeros_like(flat)))
    clicks = events.kind_E == CLICK
    share = np.bincount(events.candidate_E[clicks], minlength=10) / count
    np.testing.assert_allclose(share, 0.3 * plan.examination_P, atol=0.015)
    assert (events.kind_E == CONVERSION).sum() == pytest.approx(clicks.sum() / 2, rel=0.03)
    assert (events.kind_E == IMPRESSION).sum() == count * 10
    assert (events.at_ms_E[clicks] - T0_MS).max() <= plan.click_delay_limit_s * 1_000


def test_truth_sums_merge_and_agree_with_all_pairs() -> None:
    rng = np.random.default_rng(5)
    true, served = rng.uniform(0.01, 0.4, 300), rng.uniform(0.01, 0.4, 300).round(2)
    whole, one, two = TruthTally(), TruthTally(), TruthTally()
    whole.add(served, true)
    one.add(served[:100], true[:100])
    two.add(served[100:], true[100:])
    pairs = (served[:, None] > served[None, :]) + 0.5 * (served[:, None] == served[None, :])
    expected = (true[:, None] * (1 - true)[None, :] * pairs).sum() / (true.sum() * (1 - true).sum())
    metrics = whole.metrics()
    assert metrics.auc == pytest.approx(expected, abs=1e-3)
    assert metrics.logloss == pytest.approx((-true * np.log(served) - (1 - true) * np.log1p(-served)).mean())
    assert metrics.mae == pytest.approx(np.abs(served - true).mean())
    assert one.merged(two).metrics().auc == pytest.approx(metrics.auc)
    assert TruthTally().metrics().auc is None


def test_the_recent_window_forgets_and_the_versions_do_not() -> None:
    tally = Tally()
    tally.scored(1, np.full((4, 5), 0.5, np.float32), 4.0)
    tally.fold(0.0)
    tally.scored(2, np.full((4, 7), 0.1, np.float32), 400.0)
    tally.fold(20.0)
    ctr, _, latency = tally.recent()
    assert ctr.candidates == 7
    assert latency.p50 == pytest.approx(400.0, rel=0.02)
    assert tally.latency().p50 == pytest.approx(4.0, rel=0.02)
    assert [(v.version, v.ctr.candidates) for v in tally.by_version()] == [(1, 5), (2, 7)]


def test_a_run_of_many_versions_keeps_figures_of_the_first_and_the_latest() -> None:
    tally = Tally()
    for version in range(1, 100):
        tally.scored(version, np.full((4, 5), 0.5, np.float32), 4.0)
        tally.fold(float(version))
    assert [v.version for v in tally.by_version()] == [1, *range(81, 100)]
    assert (tally.versions_served, tally.requests, tally.candidates) == (99, 99, 495)


def test_the_demos_windows_fit_together_or_are_refused() -> None:
    plan = DemoPlan()
    assert plan.market(3) == MarketPlan(seed=3, time_scale=plan.time_scale)
    assert plan.trainer_settings()["attribution_window_s"] == plan.attribution_window_s
    for wrong, word in (
        ({"click_window_s": 1.0}, "click window"),
        ({"attribution_window_s": 20.0}, r"26\.5 s after"),
        ({"lateness_s": 0.1}, "lateness"),
        ({"observation_window_s": 30.0}, "observation"),
        ({"time_scale": 72_000.0}, "time scale"),
    ):
        with pytest.raises(ValueError, match=word):
            replace(plan, **wrong)
    with pytest.raises(ValueError, match="shares"):
        ShopPlan(twice=1.5)
    assert DelayMixture((1.0,), (1.0,), 2.0).window_h == 2.0
