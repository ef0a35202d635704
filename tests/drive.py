"""Records in, outputs out, no broker: the whole scoring loop on fakes."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from stream_scorer.core.output import OutputPolicy
from stream_scorer.core.records import OutRecord
from stream_scorer.core.served import ServedRequest
from stream_scorer.core.served_read import decode_served
from stream_scorer.scorer import Scorer, ScorerPolicy, ScorerPorts
from tests.builders import ITEM, LAYOUT, LIMITS, OUTPUT, USER, record
from tests.fakes import (
    FakeClock,
    FakeFeatures,
    FakeMailbox,
    FakeMetrics,
    FakePredictor,
    FakeSink,
    FakeSource,
    Fault,
    Item,
)

POLICY = ScorerPolicy(limits=LIMITS, output=OUTPUT, commit_every_s=0.0)
MAX_STEPS = 10_000


@dataclass
class World:
    """A scorer among fakes. `policy` fields are given as keywords of `world`."""

    source: FakeSource
    sink: FakeSink
    features: FakeFeatures
    metrics: FakeMetrics
    clock: FakeClock
    mailbox: FakeMailbox
    policy: ScorerPolicy
    scorer: Scorer = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A new scorer process on the same world."""
        ports = ScorerPorts(self.source, self.sink, self.features, self.metrics, self.clock, self.mailbox)
        self.scorer = Scorer(ports, self.policy)

    @property
    def at_rest(self) -> bool:
        """Everything that arrived was read, and what was read was sent."""
        return self.source.exhausted and self.scorer._flying is None and not len(self.scorer._intake)

    def until_idle(self) -> None:
        """Step until `at_rest`."""
        for _ in range(MAX_STEPS):
            self.scorer.step()
            if self.at_rest:
                return
        raise AssertionError("the scorer does not come to rest")

    def finish(self) -> "World":
        """Run to the end of the script and drain."""
        self.until_idle()
        assert self.scorer.drain(self.scorer._budget())
        return self

    @property
    def scores(self) -> list[dict[str, Any]]:
        """Delivered score messages."""
        return [orjson.loads(message.value or b"") for message in self.sink.on("scores")]

    @property
    def served(self) -> list[ServedRequest]:
        """Delivered served messages."""
        decoded = [decode_served(record(message.value), LAYOUT) for message in self.sink.on("served")]
        assert all(isinstance(one, ServedRequest) for one in decoded), decoded
        return decoded

    @property
    def rejects(self) -> list[tuple[str, OutRecord]]:
        """Delivered rejects with their reason."""
        return [(dict(message.headers)["reason"].decode(), message) for message in self.sink.on("score-rejects")]


def world(items: Iterable[Item | bytes | Fault] = (), partitions: int = 1, **policy: Any) -> World:
    """A scorer on fakes with model version 1 in the mailbox."""
    output: OutputPolicy = policy.pop("output", OUTPUT)
    sink = policy.pop("sink", None) or FakeSink()
    return World(
        source=FakeSource(items, partitions=partitions),
        sink=sink,
        features=FakeFeatures(USER, ITEM),
        metrics=FakeMetrics(),
        clock=FakeClock(),
        mailbox=FakeMailbox(FakePredictor(1)),
        policy=replace(POLICY, output=output, **policy),
    )


def drive(items: Iterable[Item | bytes | Fault], **policy: Any) -> World:
    """Score everything and drain."""
    return world(items, **policy).finish()
