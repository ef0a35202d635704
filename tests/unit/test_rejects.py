import pytest

from stream_scorer.core.rejects import Reject, StormBreaker, StormPolicy, reject_record
from tests.builders import record


def test_a_reject_keeps_the_bytes_and_says_why_and_where() -> None:
    original = record(b"\xff\x00junk", offset=41, partition=3, key=b"u9", timestamp_ms=123)
    out = reject_record(Reject(original, "json", "not JSON"), "score-rejects", "0.1.0")
    assert (out.topic, out.key, out.value) == ("score-rejects", b"u9", b"\xff\x00junk")
    assert dict(out.headers) == {
        "reason": b"json",
        "detail": b"not JSON",
        "topic": b"score-requests",
        "partition": b"3",
        "offset": b"41",
        "time": b"123",
        "version": b"0.1.0",
    }


def test_a_tombstone_stays_a_tombstone() -> None:
    out = reject_record(Reject(record(None, key=None), "empty", "no value"), "score-rejects", "1")
    assert (out.key, out.value) == (None, None)


def test_the_detail_is_one_short_line() -> None:
    out = reject_record(Reject(record(b"x"), "schema", "a\nb\ud800 " + "c" * 1000), "score-rejects", "1")
    detail = dict(out.headers)["detail"].decode()
    assert len(detail) == 200
    assert detail.startswith("a b? c")
    assert detail.endswith("...")


def test_the_breaker_opens_at_the_share_and_closes_after_the_cooldown() -> None:
    breaker = StormBreaker(StormPolicy(share=0.5, window=10, cooldown_s=30.0))
    assert not breaker.record(4, 4, 0.0)
    assert not breaker.is_open(0.0)
    assert breaker.record(1, 1, 1.0)
    assert breaker.is_open(1.0)
    assert breaker.is_open(30.9)
    assert not breaker.is_open(31.0)


def test_after_the_cooldown_the_count_starts_afresh() -> None:
    breaker = StormBreaker(StormPolicy(share=0.5, window=10, cooldown_s=30.0))
    assert breaker.record(5, 5, 0.0)
    assert not breaker.record(4, 4, 40.0)
    assert breaker.record(1, 1, 41.0)


@pytest.mark.parametrize("batch", [1, 3, 10, 25])
def test_a_steady_share_below_the_limit_never_opens_it(batch: int) -> None:
    breaker = StormBreaker(StormPolicy(share=0.5, window=100, cooldown_s=30.0))
    opened = [breaker.record(batch, batch // 3, 0.0) for _ in range(500)]
    assert not any(opened)


def test_rejects_older_than_the_window_are_forgotten() -> None:
    breaker = StormBreaker(StormPolicy(share=0.5, window=10, cooldown_s=30.0))
    assert not breaker.record(4, 4, 0.0)
    for _ in range(10):
        assert not breaker.record(1, 0, 0.0)
    assert not breaker.record(4, 4, 0.0)


def test_requests_the_model_could_not_score_count_too() -> None:
    breaker = StormBreaker(StormPolicy(share=0.5, window=10, cooldown_s=30.0))
    assert not breaker.record(10, 0, 0.0)
    assert not breaker.record(0, 4, 0.0)
    assert breaker.record(0, 1, 0.0)
