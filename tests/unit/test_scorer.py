import threading
from typing import Any

import numpy as np
import orjson
import pytest

from stream_scorer.core import intake
from stream_scorer.core import metric_names as names
from stream_scorer.core.codec import encode_request
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import CommitRefused, FatalError
from stream_scorer.core.messages import ScoreMessage
from stream_scorer.core.output import OutputPolicy
from stream_scorer.core.records import Fetched, TopicPartition
from stream_scorer.core.rejects import StormPolicy
from tests.builders import ITEM, LAYOUT, NOW_MS, USER, request, request_bytes
from tests.drive import World, drive, world
from tests.fakes import (
    ABORT,
    LOST,
    PAUSE,
    POISON,
    REVOKE,
    Aborted,
    FakePredictor,
    FakeSink,
    Fault,
    Item,
    fake_scores,
)

P0, P1 = TopicPartition("score-requests", 0), TopicPartition("score-requests", 1)


def ids(made: World) -> list[str]:
    return [message["request_id"] for message in made.scores]


def requests(count: int, first: int = 0, **fields: Any) -> list[bytes]:
    return [request_bytes(f"r{at}", **fields) for at in range(first, first + count)]


# What comes out


def test_every_request_is_scored_once_in_order_and_committed() -> None:
    made = drive(requests(5))
    assert ids(made) == ["r0", "r1", "r2", "r3", "r4"]
    assert [one.request_id for one in made.served] == ids(made)
    assert made.source.committed == {P0: 5}
    assert made.metrics.count(names.REQUESTS) == 5
    assert made.metrics.count(names.SCORED) == 5
    assert made.metrics.count(names.CANDIDATES) == 10
    assert made.metrics.gauges["model_version",] == 1


def test_the_scores_are_those_of_the_features_fetched() -> None:
    one = request("r1", ["a", "b"], context={"hour": 3, "speed": 0.5}, item_context={"position": [1, 2]})
    made = drive([encode_request(one)])
    served = made.served[0]
    user, item_a = made.features.row(USER, "u1"), made.features.row(ITEM, "a")
    assert user is not None
    assert item_a is not None
    np.testing.assert_array_equal(served.user.ids_NS, user[0].ids_NS)
    np.testing.assert_array_equal(served.item.dense_ND[:1], item_a[0].dense_ND)
    assert served.context.ids_NS[:, :2].tolist() == [[3, 1], [3, 2]]
    want = fake_scores(served.user.take(np.zeros(2, np.int64)), served.item, served.context, 1)
    message = ScoreMessage.model_validate(made.scores[0])
    assert np.float32(message.ctr).tolist() == want.ctr_B.tolist()
    assert np.float32(message.cvr).tolist() == want.cvr_B.tolist()
    assert np.float32(message.ctcvr).tolist() == want.ctcvr_B.tolist()
    assert served.ctcvr_K.tolist() == want.ctcvr_B.tolist()
    assert message.feature_age_ms == 5_000


def test_messages_are_keyed_by_user_and_scores_carry_their_source() -> None:
    made = drive([Item(request_bytes("r1", user_id="ü7"), partition=1)], partitions=2)
    score, served = made.sink.on("scores")[0], made.sink.on("served")[0]
    assert score.key == served.key == "ü7".encode()
    assert dict(score.headers) == {"request_id": b"r1", "source": b"score-requests/1/0"}


def test_missing_features_are_scored_with_the_default_and_said() -> None:
    made = drive([request_bytes("r1", ["a", "gone1"], user_id="gone")])
    assert made.scores[0]["missing"] == [-1, 1]
    assert not made.scores[0]["degraded"]
    assert not made.served[0].user.ids_NS.any()


def test_served_can_be_switched_off() -> None:
    made = drive(requests(2), output=OutputPolicy("scores", "score-rejects", None, LAYOUT))
    assert {message.topic for message in made.sink.delivered} == {"scores"}
    assert made.source.committed == {P0: 2}


def test_served_top_k_and_float16() -> None:
    output = OutputPolicy("scores", "score-rejects", "served", LAYOUT, served_top_k=3, served_dtype="float16")
    made = drive([request_bytes("r1", [f"i{n}" for n in range(20)])], output=output)
    scores, served = made.scores[0], made.served[0]
    best = sorted(scores["ctcvr"], reverse=True)[:3]
    assert sorted(served.ctcvr_K.tolist(), reverse=True) == [np.float32(value) for value in best]


def test_latency_is_from_the_request_s_time() -> None:
    made = drive(requests(3, ts=NOW_MS - 40))
    stats = made.scorer.stats()
    assert (stats.latency_p50_ms, stats.latency_p99_ms) == (40, 40)
    assert made.metrics.seen["latency_seconds",] == [0.04]
    assert (stats.requests, stats.scored, stats.candidates, stats.versions) == (3, 3, 6, (1,))


# Batches


def test_a_batch_is_cut_by_candidate_rows_and_the_rest_waits() -> None:
    sizes = (60, 60, 30)
    made = drive(
        [request_bytes(f"r{at}", [f"i{n}" for n in range(size)]) for at, size in enumerate(sizes)], max_rows=100
    )
    assert made.source.polls[0][0] == 2, "as many records as are expected to fill a batch"
    assert made.metrics.seen["batch_rows",] == [60, 90]
    assert ids(made) == ["r0", "r1", "r2"]


def test_the_poll_does_not_wait_while_a_batch_is_in_flight() -> None:
    made = world([*requests(1), PAUSE, *requests(1, first=1)])
    made.scorer.step()
    made.scorer.step()
    assert [wait for _, wait, _ in made.source.polls] == [0.1, 0.0]


def test_overlap_launches_the_next_batch_before_it_collects() -> None:
    made = world(requests(3), max_records=1)
    predictor: Any = made.mailbox.waiting[0]
    made.scorer.step()
    assert (predictor.launched, predictor.collected) == (1, 0)
    made.scorer.step()
    assert (predictor.launched, predictor.collected) == (2, 1)
    assert ids(made) == ["r0"]


def test_the_plain_path_finishes_each_batch_at_once() -> None:
    made = world(requests(3), max_records=1, overlap=False)
    predictor: Any = made.mailbox.waiting[0]
    made.scorer.step()
    assert (predictor.launched, predictor.collected) == (1, 1)
    assert ids(made) == ["r0"]


def test_users_and_items_are_fetched_once_a_batch() -> None:
    made = drive([request_bytes("r1", ["a", "b"]), request_bytes("r2", ["b", "c"])])
    assert made.features.fetches == [(["u1"], ["a", "b", "c"])]


# Rejects


def test_a_malformed_message_reaches_the_rejects_and_is_committed_after_that() -> None:
    made = drive([b"junk", *requests(1), Item(None)])
    assert [(reason, message.value) for reason, message in made.rejects] == [("json", b"junk"), ("empty", None)]
    assert ids(made) == ["r0"]
    assert made.source.committed == {P0: 3}
    assert made.metrics.count(names.REJECTED, "json") == 1
    assert made.scorer.stats().rejected == 2


def test_a_reject_is_acknowledged_before_its_offset_is_settled() -> None:
    made = world([b"junk"], sink=FakeSink(auto=False))
    made.until_idle()
    assert made.source.committed == {}
    made.sink.ack()
    made.scorer.step()
    assert made.source.committed == {P0: 1}


def test_a_reject_that_cannot_be_written_stops_the_scorer() -> None:
    made = world([b"junk"])
    made.sink.refuse = "TOPIC_AUTHORIZATION_FAILED"
    with pytest.raises(FatalError, match="TOPIC_AUTHORIZATION_FAILED"):
        made.finish()
    assert made.source.committed == {}


def test_what_the_model_cannot_score_is_a_reject_and_the_others_are_scored() -> None:
    poisoned = request_bytes("bad", ["a", "b"], item_context={"speed": [0, float(POISON)]})
    made = drive([*requests(1), poisoned, *requests(1, first=1)])
    assert ids(made) == ["r0", "r1"]
    assert [one.request_id for one in made.served] == ["r0", "r1"]
    assert [(reason, message.value) for reason, message in made.rejects] == [("score", poisoned)]
    assert made.source.committed == {P0: 3}


def test_a_reject_storm_pauses_and_goes_on_after_the_cooldown() -> None:
    made = world([b"junk"] * 30, max_records=5, storm=StormPolicy(share=0.5, window=20, cooldown_s=30.0))
    for _ in range(20):
        made.scorer.step()
    assert made.scorer.stats().hold == "storm"
    assert made.source.paused
    assert len(made.rejects) == 10
    made.clock.advance(30.0)
    made.scorer.step()
    made.scorer.step()
    assert not made.source.paused
    assert len(made.rejects) > 10


def test_a_model_that_gives_no_probabilities_is_a_storm_too() -> None:
    bad = request_bytes("bad", ["a"], context={"speed": float(POISON)})
    made = world([bad] * 30, max_records=5, storm=StormPolicy(share=0.5, window=20, cooldown_s=30.0))
    for _ in range(20):
        made.scorer.step()
    assert made.scorer.hold == "storm"
    assert 10 <= len(made.rejects) <= 15, "one batch more may be in flight"


# Delivery


def test_nothing_is_committed_before_it_is_acknowledged() -> None:
    made = world(requests(2), sink=FakeSink(auto=False))
    made.until_idle()
    made.scorer.step()
    assert made.source.committed == {}
    made.sink.ack(0, 1, 2)
    made.scorer.step()
    assert made.source.committed == {}, "one message is still on its way"
    made.sink.ack()
    made.scorer.step()
    assert made.source.committed == {P0: 2}


def test_batches_acknowledged_out_of_order_are_committed_in_order() -> None:
    made = world(requests(2), max_records=1, sink=FakeSink(auto=False))
    made.until_idle()
    made.sink.ack(2, 3)
    made.scorer.step()
    assert made.source.committed == {}
    made.sink.ack()
    made.scorer.step()
    assert made.source.committed == {P0: 2}


def test_a_failed_delivery_is_fatal_and_nothing_of_it_is_committed() -> None:
    made = world(requests(1), sink=FakeSink(auto=False))
    made.until_idle()
    made.sink.ack(error="MSG_TIMED_OUT")
    with pytest.raises(FatalError, match="MSG_TIMED_OUT"):
        made.scorer.step()
    assert made.source.committed == {}


def test_a_failed_delivery_stops_at_once_not_at_the_next_commit() -> None:
    made = world(requests(1), sink=FakeSink(auto=False), commit_every_s=60.0)
    made.until_idle()
    made.sink.ack(error="MSG_TIMED_OUT")
    with pytest.raises(FatalError, match="MSG_TIMED_OUT"):
        made.scorer.step()


def test_commits_are_not_more_often_than_asked() -> None:
    made = world(requests(40), max_records=1, commit_every_s=0.1)
    for _ in range(20):
        made.scorer.step()
    assert len(made.source.commits) == 0, "nothing was acknowledged yet when the first step looked"
    made.clock.advance(0.1)
    made.scorer.step()
    assert len(made.source.commits) == 1
    for _ in range(10):
        made.scorer.step()
    assert len(made.source.commits) == 1
    assert made.scorer.drain(Deadline.after(1.0, made.clock.monotonic_s))
    assert len(made.source.commits) == 2, "a drain commits at once"


def test_a_fenced_commit_is_a_value_and_is_offered_again() -> None:
    made = world(requests(1))
    made.source.fence = True
    made.until_idle()
    made.scorer.step()
    assert made.source.commits == []
    made.source.fence = False
    made.scorer.step()
    assert made.source.committed == {P0: 1}


# The end


def test_run_drains_when_told_to_stop() -> None:
    made = world(requests(3), max_records=1)

    class AfterThree:
        turns = 0

        def is_set(self) -> bool:
            self.turns += 1
            return self.turns > 3

        def wait(self, timeout: float) -> bool:
            raise AssertionError("there is a model")

    made.scorer.run(AfterThree())
    assert ids(made) == ["r0", "r1", "r2"]
    assert made.source.committed == {P0: 3}


def test_run_says_when_it_could_not_drain() -> None:
    made = world(requests(1), sink=FakeSink(auto=False))
    stop = threading.Event()
    made.until_idle()
    stop.set()
    with pytest.raises(FatalError, match="not acknowledged in time"):
        made.scorer.run(stop)
    assert made.source.committed == {}


def test_run_says_when_the_last_commit_was_refused() -> None:
    made = world(requests(1))
    made.source.fence = True
    made.until_idle()
    stop = threading.Event()
    stop.set()
    with pytest.raises(CommitRefused, match="ILLEGAL_GENERATION"):
        made.scorer.run(stop)
    assert ids(made) == ["r0"]


def test_a_commit_refused_while_partitions_go_is_no_reason_to_go_back() -> None:
    made = world(requests(1))
    made.scorer.step()
    made.scorer.step()
    made.source.fence = True
    made.scorer.on_revoke([P0])
    assert ids(made) == ["r0"]
    assert made.scorer._rewound == {}
    made.source.fence = False
    assert made.scorer.drain(Deadline.after(1.0, made.clock.monotonic_s))


def test_what_waits_at_the_end_is_left_to_the_next_one() -> None:
    made = world(requests(5), max_rows=2)
    made.scorer.step()
    assert made.scorer.drain(Deadline.after(1.0, made.clock.monotonic_s))
    made.source.close()
    assert made.source.committed == {P0: 1}
    assert ids(made) == ["r0"]


@pytest.mark.parametrize("auto", [True, False])
def test_killed_and_restarted_loses_nothing(auto: bool) -> None:
    made = world([*requests(3), PAUSE, *requests(3, first=3), ABORT, *requests(2, first=6)], sink=FakeSink(auto=auto))
    with pytest.raises(Aborted):
        made.until_idle()
    made.sink.purge()
    made.source.restart()
    made.mailbox.put(FakePredictor(1))
    made.sink.auto = True
    made.start()
    made.finish()
    assert set(ids(made)) == {f"r{at}" for at in range(8)}
    assert made.source.committed == {P0: 8}


# Rebalances


def test_a_revoke_finishes_publishes_and_commits_first() -> None:
    made = drive([*requests(2), REVOKE, *requests(2, first=2)])
    assert ids(made) == ["r0", "r1", "r2", "r3"], "nothing twice"
    assert made.source.committed == {P0: 4}


def test_a_revoke_in_the_same_poll_hands_out_nothing_of_what_went() -> None:
    made = world([Item(request_bytes("r0")), Fault("revoke", returns=False)])
    made.scorer.step()
    made.scorer.step()
    assert made.scores == []
    assert made.source.committed == {}


def test_records_waiting_for_a_batch_go_with_their_partition() -> None:
    items = [Item(request_bytes("a0"), 0), Item(request_bytes("b0"), 1), Item(request_bytes("a1"), 0)]
    made = world([*items, PAUSE, Fault("revoke", (0,), returns=False)], partitions=2, max_rows=2)
    for _ in range(8):
        made.scorer.step()
    made.finish()
    assert ids(made).count("b0") == 1
    assert made.source.committed == {P0: ids(made).count("a0") + ids(made).count("a1"), P1: 1}


def test_lost_partitions_are_forgotten_and_read_again() -> None:
    made = drive([*requests(2), PAUSE, *requests(2, first=2), LOST, *requests(1, first=4)])
    assert ids(made) == ["r0", "r1", "r2", "r3", "r4"], "what was dropped with the assignment came again"
    assert made.source.committed == {P0: 5}


def test_results_of_a_lost_assignment_are_dropped_and_counted() -> None:
    made = world([request_bytes("r0"), b"junk", Fault("lost", returns=False)], max_records=2)
    made.scorer.step()
    assert made.scorer._flying is not None
    made.scorer.step()
    assert made.sink.sent == []
    assert made.metrics.count(names.STALE_EPOCH) == 2
    assert made.scorer.stats().stale == 2
    assert made.source.commits == []


def test_a_revoke_that_cannot_finish_purges_and_reads_the_kept_partitions_again() -> None:
    items = [Item(request_bytes("a0"), 0), Item(request_bytes("b0"), 1), PAUSE]
    made = world([*items, Fault("revoke", (0,), returns=False)], partitions=2, sink=FakeSink(auto=False))
    made.scorer.step()
    made.scorer.step()
    made.sink.auto = True
    made.until_idle()
    made.finish()
    assert ids(made) == ["b0"], "a0 is left to its new owner, b0 was read again"
    assert made.source.committed == {P1: 1}


def test_what_a_poll_read_before_such_a_revoke_is_read_again_too() -> None:
    items = [Item(request_bytes("a0"), 0), Item(request_bytes("b0"), 1), PAUSE, Item(request_bytes("b1"), 1)]
    made = world([*items, Fault("revoke", (0,), returns=False)], partitions=2, sink=FakeSink(auto=False))
    for _ in range(3):
        made.scorer.step()
    made.sink.auto = True
    made.finish()
    assert ids(made) == ["b0", "b1"]


def with_backlog(monkeypatch: pytest.MonkeyPatch, then: Fault, sink: FakeSink) -> World:
    """Twelve requests on two partitions were read, six are in flight and six wait, when ``then`` happens."""
    monkeypatch.setattr(intake, "START_ROWS", 1.0)
    items = [Item(request_bytes(f"{name}{at}"), part) for at in range(6) for part, name in enumerate("ab")]
    made = world([*items, then], partitions=2, max_rows=12, sink=sink)
    made.scorer.step()
    assert len(made.scorer._intake) == 6
    return made


def test_what_waits_is_forgotten_with_a_lost_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_backlog(monkeypatch, Fault("lost", (0,)), FakeSink()).finish()
    assert sorted(ids(made)) == sorted(f"{name}{at}" for at in range(6) for name in "ab")
    assert made.source.committed == {P0: 6, P1: 6}


def test_what_waits_is_read_again_in_order_after_a_revoke_that_could_not_finish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = with_backlog(monkeypatch, Fault("revoke", (0,), returns=False), FakeSink(auto=False))
    made.scorer.step()
    made.sink.auto = True
    made.finish()
    assert ids(made) == [f"b{at}" for at in range(6)]
    assert made.source.committed == {P1: 6}


# The model


def test_the_group_is_joined_with_the_first_model() -> None:
    made = world(requests(1))
    first = made.mailbox.take()
    assert first is not None
    assert not made.scorer.step()
    assert made.source.polls == []
    assert made.scorer.hold == "model"
    made.mailbox.put(first)
    made.finish()
    assert ids(made) == ["r0"]
    assert made.scorer.hold == ""


def test_a_new_model_is_taken_between_two_batches() -> None:
    made = world(requests(4), max_records=1)
    made.scorer.step()
    made.mailbox.put(FakePredictor(2))
    made.finish()
    versions = [message["model_version"] for message in made.scores]
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}
    assert made.metrics.count(names.MODEL_SWAPS) == 2
    assert made.metrics.gauges["model_version",] == 2
    assert made.scorer.stats().versions == (1, 2)
    assert [one.model_version for one in made.served] == versions


# Features out of reach


def test_degrade_scores_with_what_there_is_and_says_so() -> None:
    made = world(requests(1))
    made.features.down = True
    made.finish()
    assert made.scores[0]["degraded"] is True
    assert made.scores[0]["missing"] == [-1, 0, 1]
    assert made.scores[0]["feature_age_ms"] == -1
    assert made.metrics.count(names.FEATURES_DEGRADED) == 1
    assert made.served[0].degraded


def test_fail_stops_with_nothing_committed() -> None:
    made = world(requests(1), on_outage="fail")
    made.features.down = True
    with pytest.raises(FatalError, match="feature store"):
        made.until_idle()
    assert made.source.committed == {}


def test_pause_holds_the_batch_until_the_store_is_back() -> None:
    made = world([b"junk", *requests(2), PAUSE, *requests(1, first=2)], on_outage="pause")
    made.features.down = True
    for _ in range(10):
        made.scorer.step()
    assert made.sink.sent == []
    assert made.source.paused
    assert made.scorer.hold == "features"
    assert len(made.features.fetches) == 1, "not tried at every turn"
    made.clock.advance(0.25)
    made.scorer.step()
    assert len(made.features.fetches) == 2
    made.features.down = False
    made.clock.advance(0.25)
    made.finish()
    assert ids(made) == ["r0", "r1", "r2"]
    assert [reason for reason, _ in made.rejects] == ["json"]
    assert not any(message["degraded"] for message in made.scores)
    assert made.source.committed == {P0: 4}
    assert made.metrics.count(names.REQUESTS) == 4, "the held batch is counted once"


def test_a_revoke_while_waiting_for_features_leaves_the_batch_to_the_next_owner() -> None:
    made = world([*requests(1), PAUSE, Fault("revoke", returns=False)], on_outage="pause")
    made.features.down = True
    for _ in range(5):
        made.scorer.step()
    assert len(made.scorer._intake) == 0
    assert made.source.committed == {}


def test_lag_is_looked_at_once_a_second() -> None:
    made = world(requests(3), max_records=1)
    made.scorer.step()
    assert made.metrics.gauges["lag_records",] == 0
    made.source.append(orjson.dumps({}))
    made.source.append(orjson.dumps({}))
    made.clock.advance(1.0)
    made.scorer.step()
    assert made.metrics.gauges["lag_records",] == 1


def test_a_scorer_that_swaps_often_leaves_no_predictor_open():
    made = world()
    predictors = [FakePredictor(version) for version in range(10, 17)]
    for predictor in predictors:
        made.mailbox.put(predictor)
        made.scorer.step()
    assert [one.closed for one in predictors] == [True] * 5 + [False] * 2


def test_batches_shrink_where_a_target_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(requests(200, items=[f"i{at}" for at in range(50)]), max_rows=1_000, target_s=0.5)
    fetch, sizes = made.features.fetch, []

    def slow(users: list[str], items: list[str], now_ms: int, deadline: Deadline) -> Fetched:
        sizes.append(len(items))
        made.clock.advance(0.002 * len(items))
        return fetch(users, items, now_ms, deadline)

    monkeypatch.setattr(made.features, "fetch", slow)
    made.finish()
    assert len(made.scores) == 200
    assert max(sizes) > 500, "before the first one was seen to take too long"
    assert all(100 <= size <= 300 for size in sizes[-10:-1])
    assert made.metrics.gauges["batch_rows_limit",] <= 300


@pytest.mark.parametrize("items", [3, 50, 100])
def test_batches_grow_again_after_a_slow_spell(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names_ = [f"i{at}" for at in range(items)]
    made = world(requests(90_000 // items, items=names_), max_rows=400, target_s=0.5)
    fetch, sizes = made.features.fetch, []

    def slow_at_first(users: list[str], asked: list[str], now_ms: int, deadline: Deadline) -> Fetched:
        sizes.append(len(asked))
        made.clock.advance(60.0 if len(sizes) <= 120 else 0.001)
        return fetch(users, asked, now_ms, deadline)

    monkeypatch.setattr(made.features, "fetch", slow_at_first)
    made.finish()
    assert sizes[119] <= max(items, 64)
    assert sizes[-10] > 300
