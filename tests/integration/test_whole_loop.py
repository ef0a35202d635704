"""The loop end to end with real data: every request scored once, versions swapped, rejects kept, a killed scorer."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from stream_scorer.embedded.broker import EmbeddedBroker
from stream_scorer.embedded.redis import EmbeddedRedis
from stream_scorer.settings import Topics
from tests.conftest import unavailable
from tests.integration.loop import Loop, last_json, loop_on, until

pytestmark = pytest.mark.timeout(400)
LARGEST = b"x" + os.urandom(1_048_400)  # as much as a broker takes by default: its headers make the reject longer
MALFORMED = [
    LARGEST,
    b"",
    b"\xff\xfe\x00",
    b"{",
    b'{"request_id": "r"}',
    b'{"request_id":"r","user_id":"u","items":["i"],"ts":1,"x":2}',
]


@pytest.fixture(scope="module")
def taobao() -> Path:
    folder = Path(os.environ.get("STREAM_SCORER_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = folder / "taobao_user_behavior.csv.gz"
    if not path.exists():
        unavailable(f"no {path.name} in STREAM_SCORER_TEST_DATA")
    return path


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    """A log in Taobao's format for machines without the real one: 60 users, 200 items, half an hour."""
    path = tmp_path_factory.mktemp("log") / "log.csv"
    start, lines = 1_511_658_000, []
    for at in range(4_000):
        user, item = (at * 7919) % 60, (at * 104729) % 200
        behaviour = "pv" if at % 11 else ("cart" if at % 3 else "buy")
        lines.append(f"{user + 1},{item + 1},{item % 20 + 1},{behaviour},{start + at // 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def embedded_loop(tmp_path) -> Iterator[Loop]:
    topics = Topics()
    with (
        EmbeddedBroker(dict.fromkeys(topics.model_dump().values(), 2)) as broker,
        EmbeddedRedis() as redis,
        loop_on(tmp_path, broker.bootstrap, redis.url, topics) as loop,
    ):
        yield loop


@pytest.fixture
def real_loop(tmp_path, kafka_bootstrap, redis_url) -> Iterator[Loop]:
    with loop_on(tmp_path, kafka_bootstrap, redis_url) as loop:
        yield loop


@pytest.fixture
def old_loop(tmp_path, kafka39_bootstrap, redis_url) -> Iterator[Loop]:
    with loop_on(tmp_path, kafka39_bootstrap, redis_url) as loop:
        yield loop


def replay_scores_everything_once(loop: Loop, log: Path, limit: int, versions: int) -> None:
    trainer, scorer = loop.start("train"), loop.start("score")
    loop.produce(loop.topics.requests, [(b"u", value) for value in MALFORMED])
    done = loop.command("replay", "taobao", str(log), "--limit", str(limit), "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    report = last_json(done.stdout)
    assert report["requests"] > 0
    assert (report["scored"], report["lost"], report["duplicates"]) == (report["requests"], 0, 0)
    assert report["log"]["rows"] == limit
    assert report["versions_served"] >= versions
    scorer.stop(30)
    until(lambda: trainer.status.get("served") == report["requests"], "the trainer to read what was served", 120)
    trainer.stop(30)
    assert (scorer.exit_code, trainer.exit_code) == (0, 0), scorer.tail(5) + trainer.tail(5)
    assert scorer.final is not None
    assert trainer.final is not None
    assert scorer.final["rejected"] == len(MALFORMED)
    assert trainer.final["served"] == report["requests"]
    assert trainer.final["rejected"] == 0
    assert trainer.final["examples"]["first"] > 0
    scored_once(loop, report["requests"])
    rejects_keep_their_bytes(loop)


def scored_once(loop: Loop, requests: int) -> None:
    """From outside: what lies in the scores topic, by request."""
    messages = loop.read(loop.topics.scores, lambda found: len(found) >= requests)
    bodies = [orjson.loads(message.value() or b"") for message in messages]
    counts = Counter(body["request_id"] for body in bodies)
    assert len(counts) == requests
    assert set(counts.values()) == {1}
    for body in bodies:
        for ctr, ctcvr in zip(body["ctr"], body["ctcvr"], strict=True):
            assert 0.0 <= ctcvr <= ctr <= 1.0
    headers = dict(messages[0].headers() or [])
    assert headers["request_id"].decode() == bodies[0]["request_id"]


def rejects_keep_their_bytes(loop: Loop) -> None:
    messages = loop.read(loop.topics.rejects, lambda found: len(found) >= len(MALFORMED))
    assert sorted(message.value() or b"" for message in messages) == sorted(MALFORMED)
    for message in messages:
        headers = {name: value.decode() for name, value in message.headers() or []}
        assert headers["topic"] == loop.topics.requests
        assert headers["reason"] in {"empty", "json", "schema", "too_large"}
        assert int(headers["offset"]) >= 0


def survives_sigkill(loop: Loop, log: Path, limit: int) -> None:
    """A scorer killed while it scores, and another one started: nothing lost, duplicates only of what was in flight."""
    loop.start("train")
    scorer = loop.start("score")
    replay = loop.begin("replay", "taobao", str(log), "--limit", str(limit), "--json")
    until(lambda: scorer.status.get("scored", 0) > limit // 10 or not replay.alive, "the replay to be under way")
    assert replay.alive, replay.tail(10)
    scorer.signal(signal.SIGKILL)
    assert scorer.wait(10)
    second = loop.start("score")
    until(lambda: not replay.alive, "the replay to end", 200)
    replay.wait(5)
    report = replay.status
    assert report["lost"] == 0, replay.tail(10)
    assert report["scored"] == report["requests"]
    assert report["duplicates"] <= 2_000  # what may wait for its scores at any time
    assert second.alive


def test_every_request_is_scored_once_on_the_embedded_profile(embedded_loop, made_up):
    replay_scores_everything_once(embedded_loop, made_up, 4_000, versions=1)


def test_a_killed_scorer_loses_nothing_on_the_embedded_profile(embedded_loop, made_up):
    survives_sigkill(embedded_loop, made_up, 4_000)


@pytest.mark.real_kafka
@pytest.mark.real_redis
def test_twenty_thousand_taobao_events_on_kafka(real_loop, taobao):
    replay_scores_everything_once(real_loop, taobao, 25_000, versions=2)


@pytest.mark.real_kafka
@pytest.mark.real_redis
def test_a_killed_scorer_loses_nothing_on_kafka(real_loop, taobao):
    survives_sigkill(real_loop, taobao, 25_000)


@pytest.mark.real_kafka
@pytest.mark.real_redis
def test_the_loop_on_kafka_3_9(old_loop, taobao):
    replay_scores_everything_once(old_loop, taobao, 3_000, versions=1)
