import pytest

from stream_scorer.core.errors import FatalError
from stream_scorer.core.ledger import Ledger
from stream_scorer.core.records import Record, TopicPartition
from tests.builders import record

P0, P1 = TopicPartition("score-requests", 0), TopicPartition("score-requests", 1)


def records(*offsets: int, partition: int = 0, epoch: int = 1) -> list[Record]:
    return [record(b"x", offset, partition, epoch) for offset in offsets]


def ledger(*partitions: TopicPartition) -> Ledger:
    made = Ledger()
    made.assign(partitions or (P0, P1))
    for where in partitions or (P0, P1):
        assert made.admit(record(b"x", 0, where.partition))
    return made


def test_nothing_is_settled_before_every_message_is_acknowledged() -> None:
    book = ledger()
    ticket = book.open(records(5, 6))
    ticket.report(None, "m1")
    assert book.settled() == {}
    ticket.seal(messages=2, scored=1)
    assert book.settled() == {}
    assert book.in_flight == 1
    ticket.report(None, "m2")
    assert book.settled() == {P0: 7}
    assert (book.in_flight, book.scored) == (0, 1)


def test_reports_may_all_come_before_the_ticket_is_sealed() -> None:
    book = ledger()
    ticket = book.open(records(0))
    ticket.report(None, None)
    ticket.report(None, None)
    assert not ticket.done
    ticket.seal(messages=2, scored=1)
    assert book.settled() == {P0: 1}


def test_a_ticket_without_messages_is_done_when_sealed() -> None:
    book = ledger()
    book.open(records(0, 1)).seal(0, 0)
    assert book.settled() == {P0: 2}


def test_a_later_batch_waits_for_an_earlier_one() -> None:
    book = ledger()
    first, second = book.open(records(0)), book.open([*records(1), *records(0, partition=1)])
    for ticket in (first, second):
        ticket.seal(1, 1)
    second.report(None, None)
    assert book.settled() == {P1: 1}
    first.report(None, None)
    assert book.settled() == {P0: 2, P1: 1}


def test_what_was_committed_is_not_offered_again() -> None:
    book = ledger()
    book.open(records(0)).seal(0, 0)
    offsets = book.settled()
    assert book.settled() == offsets, "until it is committed it is offered"
    book.committed(offsets)
    assert book.settled() == {}
    book.open(records(1)).seal(0, 0)
    assert book.settled() == {P0: 2}


def test_offsets_may_have_holes() -> None:
    book = ledger()
    book.open(records(3, 9)).seal(0, 0)
    book.open(records(20)).seal(0, 0)
    assert book.settled() == {P0: 21}


@pytest.mark.parametrize("offsets", [(4,), (5, 5), (6, 5)])
def test_reading_backwards_is_refused_loudly(offsets: tuple[int, ...]) -> None:
    book = ledger()
    book.open(records(4))
    with pytest.raises(FatalError, match=r"score-requests/0: .*refusing to go backwards"):
        book.open(records(*offsets))


def test_committing_backwards_or_past_what_is_settled_is_refused_loudly() -> None:
    book = ledger()
    book.open(records(0, 1)).seal(0, 0)
    book.committed(book.settled())
    with pytest.raises(FatalError, match="committed 1, but 2 was committed before"):
        book.committed({P0: 1})
    with pytest.raises(FatalError, match="2 is settled"):
        book.committed({P0: 3})


def test_a_failed_delivery_is_latched_and_never_settles() -> None:
    book = ledger()
    ticket = book.open(records(0))
    ticket.seal(2, 1)
    ticket.report(None, None)
    book.raise_if_failed()
    ticket.report("MSG_TIMED_OUT", None)
    ticket.report("a later error", None)
    for _ in range(2):
        with pytest.raises(FatalError, match="MSG_TIMED_OUT"):
            book.raise_if_failed()
    assert book.settled() == {}
    assert book.scored == 0


def test_a_forgotten_partition_settles_nothing_and_its_results_are_stale() -> None:
    book = ledger()
    ticket = book.open([*records(0), *records(0, partition=1)])
    book.forget([P0])
    assert ticket.stale
    assert not book.current(records(0)[0])
    assert book.current(records(0, partition=1)[0])
    assert not book.admit(records(1)[0])
    ticket.seal(0, 0)
    assert book.settled() == {P1: 1}
    book.committed({P0: 1})  # a commit that was under way when it went
    assert book.held == [P1]


def test_a_partition_that_comes_back_starts_afresh_and_its_old_results_stay_stale() -> None:
    book = ledger()
    old = book.open(records(7))
    book.assign([P0])
    assert not book.current(records(7)[0])
    assert book.admit(record(b"x", 3, epoch=2))
    assert not book.admit(records(8)[0]), "a record of the old assignment"
    new = book.open(records(3, epoch=2))
    old.seal(0, 0)
    assert book.settled() == {}
    new.seal(0, 0)
    assert book.settled() == {P0: 4}


def test_an_assignment_that_was_not_announced_is_fatal() -> None:
    book = ledger()
    with pytest.raises(FatalError, match="did not announce"):
        book.admit(record(b"x", 1, epoch=2))


def test_rewinding_abandons_what_is_on_its_way() -> None:
    book = ledger()
    book.open(records(0)).seal(0, 0)
    first, second = book.open(records(1)), book.open([*records(2), *records(5, partition=1)])
    first.seal(1, 1)
    second.seal(1, 1)
    second.report(None, None)
    assert book.rewind() == {P0: 1}, "all of partition 1 is acknowledged"
    first.report("_PURGE_QUEUE", None)
    book.raise_if_failed()
    assert book.in_flight == 0
    assert book.settled() == {P0: 1, P1: 6}
    again = book.open(records(1, 2))
    again.seal(0, 0)
    assert book.settled()[P0] == 3


def test_rewinding_leaves_a_done_prefix_settled() -> None:
    book = ledger()
    done, open_ = book.open(records(0, 1)), book.open(records(2))
    done.seal(0, 0)
    open_.seal(1, 1)
    assert book.rewind() == {P0: 2}
    assert book.settled() == {P0: 2}
    open_.report(None, None)
    assert (book.in_flight, book.scored) == (0, 0), "a report for an abandoned batch counts for nothing"
