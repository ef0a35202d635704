"""Whatever happens to the source: nothing lost, nothing twice unless a crash made it so, order kept, same scores."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_scorer.core import intake
from tests.builders import request_bytes
from tests.drive import World, world
from tests.fakes import ABORT, LOST, PAUSE, REVOKE, Aborted, FakePredictor, Fault, Item

PARTITIONS = 3


@pytest.fixture(autouse=True, scope="module")
def small_and_quiet() -> Iterator[None]:
    """Polls that bring more than a batch takes, and no log line for each of some thousand rebalances."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake, "START_ROWS", 1.0)
        yield
    structlog.configure(**before)


SWAP = "swap"  # a new model version arrives
ITEM_IDS = [f"i{n}" for n in range(12)] + ["gone1"]
NUMBER = st.one_of(st.integers(-5, 5), st.floats(-8, 8, width=32))


@st.composite
def values(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A request's fields and its partition; users stay on their partition, as keys do in Kafka."""
    items = draw(st.lists(st.sampled_from(ITEM_IDS), min_size=1, max_size=6, unique=True))
    user = draw(st.integers(0, 5))
    fields: dict[str, Any] = {"items": items, "user_id": f"u{user}"}
    if draw(st.booleans()):
        fields["context"] = {"hour": draw(st.integers(0, 23)), "recent": draw(st.lists(st.integers(0, 9), max_size=3))}
    if draw(st.booleans()):
        fields["item_context"] = {"speed": [draw(NUMBER) for _ in items]}
    return fields, user % PARTITIONS


JUNK = st.tuples(st.sampled_from([b"junk", b"{}", None]), st.integers(0, PARTITIONS - 1))
FAULTS = st.one_of(
    st.sampled_from([PAUSE, REVOKE, LOST, ABORT]),
    st.builds(Fault, st.sampled_from(["revoke", "lost"]), st.tuples(st.integers(0, PARTITIONS - 1)), st.just(True)),
)
SCRIPT = st.lists(st.one_of(values(), values(), values(), JUNK, FAULTS, st.just(SWAP)), max_size=30)
POLICY = st.fixed_dictionaries(
    {
        "max_rows": st.integers(1, 20),
        "max_records": st.integers(1, 6),
        "overlap": st.booleans(),
        "commit_every_s": st.sampled_from([0.0, 0.1]),
    }
)


def items_of(script: list[Any]) -> list[Item | Fault]:
    """The script as a source's items; a swap becomes a pause, so that the test can act."""
    out: list[Item | Fault] = []
    for at, step in enumerate(script):
        if isinstance(step, Fault):
            out += [PAUSE, step] if at % 2 else [step]  # in a poll of its own, or after what the same poll has read
        elif step == SWAP:
            out.append(PAUSE)
        else:
            what, partition = step
            value = request_bytes(f"r{at}", **what) if isinstance(what, dict) else what
            out.append(Item(value, partition, headers=(("at", str(at).encode()),)))
    return out


def run_through(made: World, restarts: int, versions: int) -> int:
    """Step to the end; killed processes are restarted. Says how often it was killed."""
    version, kills = 1, 0
    while True:
        try:
            for turn in range(500):
                made.scorer.step()
                if turn % 3 == 0 and version < versions:
                    version += 1
                    made.mailbox.put(FakePredictor(version))
                if turn % 2:
                    made.clock.advance(0.07)
                if turn % 5 == 4:
                    made.sink.ack()
                if made.at_rest:
                    made.sink.ack()
                    made.finish()
                    return kills
        except Aborted:
            kills += 1
            assert kills <= restarts
            made.sink._ready.clear()  # what was on its way died with the process
            made.sink.waiting.clear()
            made.source.restart()
            made.mailbox.put(FakePredictor(version))
            made.start()


@settings(max_examples=250, deadline=None)
@given(script=SCRIPT, policy=POLICY, slow=st.booleans())
def test_nothing_lost_order_kept_and_twice_only_after_a_crash(
    script: list[Any], policy: dict[str, Any], slow: bool
) -> None:
    """``slow``: acknowledgements take so long that a revoke cannot wait for them."""
    made = world(items_of(script), partitions=PARTITIONS, **policy)
    made.sink.auto = not slow
    kills = run_through(made, script.count(ABORT), 1 + script.count(SWAP))

    good = [(f"r{at}", what[1]) for at, what in enumerate(script) if isinstance(what, tuple) and _is_request(what)]
    bad = [what for what in script if isinstance(what, tuple) and not isinstance(what, Fault) and not _is_request(what)]
    scored = Counter(message["request_id"] for message in made.scores)
    assert set(scored) == {request_id for request_id, _ in good}, "nothing lost, nothing invented"
    assert scored == Counter(one.request_id for one in made.served)
    assert len(made.rejects) >= len(bad)
    assert made.source.committed == {where: len(log) for where, log in made.source.log.items() if log}
    moved = {"lost", "revoke"} if slow else {"lost"}
    if not kills and not any(isinstance(one, Fault) and one.kind in moved for one in script):
        assert set(scored.values()) <= {1}, "nothing twice"
        assert len(made.rejects) == len(bad)
    first_seen = list(dict.fromkeys(message["request_id"] for message in made.scores))
    for partition in range(PARTITIONS):
        order = [request_id for request_id, of in good if of == partition]
        assert [one for one in first_seen if one in order] == order, "a partition's order is kept"
    for commits in zip(made.source.commits, made.source.commits[1:], strict=False):
        for where in commits[0].keys() & commits[1].keys():
            assert commits[1][where] > commits[0][where], "never backwards"


def _is_request(step: tuple[Any, ...]) -> bool:
    return isinstance(step[0], dict)


@settings(max_examples=150, deadline=None)
@given(script=st.lists(st.one_of(values(), JUNK), max_size=20), policy=POLICY)
def test_batching_and_overlap_never_change_a_score(script: list[Any], policy: dict[str, Any]) -> None:
    items = items_of(script)
    alone = world(items, partitions=PARTITIONS, max_rows=1, max_records=1, overlap=False).finish()
    batched = world(items, partitions=PARTITIONS, **policy).finish()
    for topic in ("scores", "served", "score-rejects"):
        assert sorted(_plain(batched.sink.on(topic))) == sorted(_plain(alone.sink.on(topic)))


def _plain(messages: list[Any]) -> list[tuple[bytes, bytes, str]]:
    return [(message.key or b"", message.value or b"", repr(message.headers)) for message in messages]


@settings(max_examples=80, deadline=None)
@given(script=SCRIPT, policy=POLICY, order=st.randoms(use_true_random=False))
def test_no_offset_is_committed_before_its_messages_are_acknowledged(
    script: list[Any], policy: dict[str, Any], order: Any
) -> None:
    quiet = [step for step in script if not isinstance(step, Fault) or step.kind == "pause"]
    made = world(items_of(quiet), partitions=PARTITIONS, **policy)
    made.sink.auto = False
    checked: dict[Any, int] = {}
    for _ in range(300):
        made.scorer.step()
        made.clock.advance(0.07)
        waiting = len(made.sink.waiting)
        if waiting:
            made.sink.ack(*order.sample(range(waiting), order.randint(1, waiting)))
        elif made.at_rest:
            break
        if made.source.committed != checked:
            checked = dict(made.source.committed)
            _nothing_committed_too_early(made)
    made.sink.ack()
    made.finish()
    assert made.source.committed == {where: len(log) for where, log in made.source.log.items() if log}


def _nothing_committed_too_early(made: World) -> None:
    """Every record below a committed offset has its scores and served, or its reject, acknowledged."""
    served = {one.request_id for one in made.served}
    done = {
        dict(message.headers)["source"].decode()
        for message in made.sink.on("scores")
        if dict(message.headers)["request_id"].decode() in served
    }
    for _, message in made.rejects:
        headers = dict(message.headers)
        done.add("/".join(headers[name].decode() for name in ("topic", "partition", "offset")))
    for where, offset in made.source.committed.items():
        assert {f"{where.topic}/{where.partition}/{at}" for at in range(offset)} <= done
