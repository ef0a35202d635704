"""The ledger against a brute-force model that remembers every record and every acknowledgement."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stream_scorer.core.ledger import Ledger, Ticket
from stream_scorer.core.records import TopicPartition
from tests.builders import record

PARTITIONS = [TopicPartition("score-requests", n) for n in range(3)]


@dataclass
class Batch:
    """A ticket as the model sees it."""

    ticket: Ticket
    messages: int
    read: dict[TopicPartition, list[int]]  # offsets
    epochs: dict[TopicPartition, int]
    reported: int = 0
    sealed: bool = False

    @property
    def done(self) -> bool:
        return self.sealed and self.reported == self.messages


@dataclass
class Life:
    """One assignment of one partition."""

    epoch: int
    next_offset: int
    batches: list[Batch] = field(default_factory=list)
    committed: int = -1


class LedgerModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.lives: dict[TopicPartition, Life] = {}
        self.group: dict[TopicPartition, int] = dict.fromkeys(PARTITIONS, 0)
        self.epoch = 0
        self.batches: list[Batch] = []
        self.abandoned: list[Batch] = []

    @rule(where=st.sampled_from(PARTITIONS))
    def assign(self, where: TopicPartition) -> None:
        self.epoch += 1
        self.ledger.assign([where])
        self.lives[where] = Life(self.epoch, self.group[where])

    @rule(where=st.sampled_from(PARTITIONS))
    def forget(self, where: TopicPartition) -> None:
        self.ledger.forget([where])
        self.lives.pop(where, None)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), messages=st.integers(0, 3))
    def open(self, data: st.DataObject, messages: int) -> None:
        records, read = [], {}
        for where, life in self.lives.items():
            steps = data.draw(st.lists(st.integers(0, 2), max_size=3), label=f"gaps on {where.partition}")
            for gap in steps:
                offset = life.next_offset + gap
                life.next_offset = offset + 1
                read.setdefault(where, []).append(offset)
                records.append(record(b"x", offset, where.partition, life.epoch))
        assert all(self.ledger.admit(one) for one in records)
        batch = Batch(self.ledger.open(records), messages, read, {where: self.lives[where].epoch for where in read})
        self.batches.append(batch)
        for where in read:
            self.lives[where].batches.append(batch)

    @precondition(lambda self: any(not batch.sealed for batch in self.batches))
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from([one for one in self.batches if not one.sealed]))
        batch.ticket.seal(batch.messages, 1)
        batch.sealed = True

    @precondition(lambda self: any(batch.reported < batch.messages for batch in self.batches))
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from([one for one in self.batches if one.reported < one.messages]))
        batch.ticket.report(None, None)
        batch.reported += 1

    @rule()
    def commit(self) -> None:
        offsets = self.ledger.settled()
        for where, offset in offsets.items():
            life = self.lives[where]
            assert offset > life.committed, "never backwards"
            life.committed = self.group[where] = offset
        self.ledger.committed(offsets)

    @rule()
    def rewind(self) -> None:
        back = self.ledger.rewind()
        for where, life in self.lives.items():
            kept = self._prefix(life)
            rest = life.batches[len(kept) :]
            assert (where in back) == bool(rest)
            if rest:
                life.next_offset = rest[0].read[where][0]
                assert back[where] == life.next_offset
            life.batches = kept
        open_ = [batch for batch in self.batches if not batch.done]
        for batch in open_:  # reports still come, errors among them, and count for nothing
            batch.ticket.report("_PURGE_QUEUE", None)
        self.batches = [batch for batch in self.batches if batch.done]

    @staticmethod
    def _prefix(life: Life) -> list[Batch]:
        kept = []
        for batch in life.batches:
            if not batch.done:
                break
            kept.append(batch)
        return kept

    @invariant()
    def settled_is_the_acknowledged_prefix(self) -> None:
        settled = self.ledger.settled()
        for where, life in self.lives.items():
            prefix = self._prefix(life)
            want = prefix[-1].read[where][-1] + 1 if prefix else -1
            assert settled.get(where, life.committed) == max(want, life.committed)
        assert set(settled) <= set(self.lives)

    @invariant()
    def nothing_unacknowledged_is_ever_committed(self) -> None:
        for where, life in self.lives.items():
            for batch in life.batches:
                if not batch.done:
                    assert life.committed <= batch.read[where][0]

    @invariant()
    def in_flight_is_what_is_not_done(self) -> None:
        self.ledger.raise_if_failed()
        assert self.ledger.in_flight == sum(not batch.done for batch in self.batches)


TestLedger = LedgerModel.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
