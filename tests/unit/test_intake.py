from stream_scorer.core.intake import Arrival, Intake
from stream_scorer.core.records import Record, TopicPartition
from stream_scorer.core.rejects import Reject
from tests.builders import LIMITS, record, request_bytes


def sized(*sizes: int, partition: int = 0, first: int = 0) -> list[Record]:
    """Requests of these sizes; size 0 is a reject."""
    values = [request_bytes(f"r{at}", [f"i{n}" for n in range(size)]) for at, size in enumerate(sizes)]
    return [record(value, first + at, partition) for at, value in enumerate(values)]


def offsets(arrivals: list[Arrival]) -> list[int]:
    return [one.record.position.offset for one in arrivals]


def test_batches_are_cut_by_rows_in_order() -> None:
    intake = Intake(LIMITS, max_rows=10, max_records=100)
    assert intake.add(sized(4, 0, 4, 3, 10, 1)) == 1
    assert [offsets(intake.take()) for _ in range(5)] == [[0, 1, 2], [3], [4], [5], []]
    assert len(intake) == 0


def test_a_request_larger_than_a_batch_is_a_batch_of_its_own() -> None:
    intake = Intake(LIMITS, max_rows=10, max_records=100)
    intake.add(sized(25, 2))
    assert [offsets(intake.take()) for _ in range(2)] == [[0], [1]]


def test_rejects_take_no_rows_but_count_as_records() -> None:
    intake = Intake(LIMITS, max_rows=10, max_records=3)
    intake.add(sized(0, 0, 0, 0))
    first = intake.take()
    assert offsets(first) == [0, 1, 2]
    assert all(isinstance(one.decoded, Reject) for one in first)
    assert offsets(intake.take()) == [3]


def test_put_back_undoes_take() -> None:
    intake = Intake(LIMITS, max_rows=10, max_records=100)
    intake.add(sized(6, 4, 6))
    room = intake.room
    taken = intake.take()
    intake.put_back(taken)
    assert intake.room == room
    assert [offsets(intake.take()) for _ in range(2)] == [[0, 1], [2]]


def test_dropped_partitions_do_not_wait_any_more() -> None:
    intake = Intake(LIMITS, max_rows=100, max_records=100)
    intake.add([*sized(6, 6), *sized(5, partition=1, first=7)])
    intake.drop([TopicPartition("score-requests", 0)])
    assert offsets(intake.take()) == [7]
    assert intake.room == Intake(LIMITS, 100, 100).room


def test_the_room_follows_recent_requests() -> None:
    intake = Intake(LIMITS, max_rows=1000, max_records=300)
    assert intake.room == 20
    intake.add(sized(100, 100))
    intake.take()
    assert intake.room == 10, "larger requests count at once"
    for _ in range(40):
        intake.add(sized(1))
        intake.take()
    assert intake.room == 300, "smaller ones after a while, up to the most records a batch takes"


def test_the_room_leaves_place_for_what_waits_and_never_closes() -> None:
    intake = Intake(LIMITS, max_rows=200, max_records=300)
    intake.add(sized(50, 50))
    assert intake.room == 2
    intake.add(sized(50, 50, 50))
    assert intake.room == 1


def test_only_rejects_do_not_divide_by_zero() -> None:
    intake = Intake(LIMITS, max_rows=1000, max_records=300)
    for _ in range(60):
        intake.add(sized(0))
        intake.take()
    assert intake.room == 300
