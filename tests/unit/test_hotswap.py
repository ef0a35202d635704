"""The watcher and its mailbox, one tick at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stream_scorer.core.errors import ModelRefused, RecoverableError
from stream_scorer.core.metric_names import MODEL_LOAD_SECONDS, MODEL_REFUSED
from stream_scorer.hotswap import RETRY_S, Lease, Mailbox, Watcher
from stream_scorer.ports import VersionInfo
from tests.fakes import FakeClock, FakeMetrics, FakePredictor


class Store:
    """Versions that a test makes, breaks and points at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pointer: int | None = None
        self.broken: Exception | None = None

    def make(self, version: int, promote: bool = True) -> None:
        (self.root / str(version)).mkdir(exist_ok=True)
        (self.root / str(version) / "model").write_text("weights")
        if promote:
            self.pointer = version

    def current(self) -> int | None:
        if self.broken is not None:
            raise self.broken
        return self.pointer

    def info(self, version: int) -> VersionInfo:
        path = self.root / str(version)
        if not path.is_dir():
            raise ModelRefused(version, "missing", "gone")
        return VersionInfo(version, path, {})

    def versions(self) -> list[int]:
        return []

    def publish(self, write: Callable[[Path, int], None], promote: bool = True) -> int:
        raise NotImplementedError

    def promote(self, version: int) -> None:
        self.pointer = version

    def prune(self, keep: int) -> list[int]:
        return []


class World:
    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.metrics, self.clock, self.mailbox = FakeMetrics(), FakeClock(), Mailbox()
        self.loads: list[int] = []
        self.made: dict[int, FakePredictor] = {}
        self.fail: dict[int, Exception] = {}
        self.watcher = Watcher(self.store, self.load, self.mailbox, self.metrics, self.clock)

    def load(self, info: VersionInfo) -> FakePredictor:
        self.loads.append(info.version)
        if info.version in self.fail:
            raise self.fail[info.version]
        self.clock.advance(0.5)
        self.made[info.version] = FakePredictor(info.version)
        return self.made[info.version]

    def swap(self, old: Lease | None) -> Lease:
        """What the scorer does between two batches."""
        fresh = self.mailbox.take()
        assert fresh is not None
        if old is not None:
            old.close()
        return fresh


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_new_version_is_loaded_once_and_taken_once(world: World) -> None:
    assert world.watcher.tick() is None, "an empty store"
    world.store.make(1)
    assert world.watcher.tick() == 1
    assert world.watcher.tick() is None, "it waits in the mailbox"
    taken = world.mailbox.take()
    assert taken is not None
    assert taken.version == 1
    assert world.mailbox.take() is None
    assert world.watcher.tick() is None
    assert world.loads == [1]
    assert world.metrics.seen[(MODEL_LOAD_SECONDS.name,)] == [0.5]


def test_a_version_overtaken_before_it_was_taken_is_closed(world: World) -> None:
    world.store.make(1)
    world.watcher.tick()
    served = world.swap(None)
    world.store.make(2)
    world.watcher.tick()
    world.store.make(3)
    world.watcher.tick()
    served = world.swap(served)
    assert served.version == 3
    world.watcher.tick()
    assert {version: one.closed for version, one in world.made.items()} == {1: False, 2: True, 3: False}


def test_going_back_needs_no_load(world: World) -> None:
    world.store.make(1)
    world.watcher.tick()
    served = world.swap(None)
    world.store.make(2)
    world.watcher.tick()
    served = world.swap(served)
    world.watcher.tick()
    assert not world.made[1].closed, "the old version is kept"
    world.store.promote(1)
    assert world.watcher.tick() == 1
    served = world.swap(served)
    assert (served.version, world.loads) == (1, [1, 2])
    world.store.promote(2)
    world.watcher.tick()
    assert (world.swap(served).version, world.loads) == (2, [1, 2])


def test_only_the_served_and_the_one_before_stay_open(world: World) -> None:
    served: Lease | None = None
    for version in (1, 2, 3, 4):
        world.store.make(version)
        world.watcher.tick()
        served = world.swap(served)
    world.watcher.tick()
    assert [version for version, one in world.made.items() if not one.closed] == [3, 4]
    world.watcher.close()
    assert all(one.closed for one in world.made.values())


def test_a_model_with_a_batch_in_flight_is_not_closed(world: World) -> None:
    world.store.make(1)
    world.watcher.tick()
    first = world.swap(None)
    for version in (2, 3):
        world.store.make(version)
        world.watcher.tick()
        assert world.mailbox.take() is not None  # swapped, while a batch is still in flight on the first
        world.watcher.tick()
    assert not world.made[1].closed
    first.close()
    world.watcher.tick()
    assert world.made[1].closed


def test_the_pointer_back_to_what_is_served_empties_the_mailbox(world: World) -> None:
    world.store.make(1)
    world.watcher.tick()
    world.swap(None)
    world.store.make(2)
    world.watcher.tick()
    world.store.promote(1)
    assert world.watcher.tick() == 1
    assert world.mailbox.take() is None
    assert world.mailbox.heading == 1
    world.watcher.tick()
    assert (world.made[1].closed, world.made[2].closed) == (False, True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModelRefused(2, "nonfinite", "a weight is NaN"), "nonfinite"),
        (ModelRefused(2, "probe", "golden rows differ"), "probe"),
        (MemoryError(), "error"),
        (OSError("stale file handle"), "error"),
    ],
)
def test_a_bad_version_is_refused_once_and_the_old_one_serves_on(world: World, error: Exception, reason: str) -> None:
    world.store.make(1)
    world.watcher.tick()
    world.swap(None)
    world.fail[2] = error
    world.store.make(2)
    for _ in range(5):
        assert world.watcher.tick() is None
    assert world.loads == [1, 2], "not loaded again at every tick"
    assert world.metrics.count(MODEL_REFUSED, reason) == 1
    assert world.mailbox.take() is None
    assert not world.made[1].closed


def test_a_refused_version_is_tried_again_when_its_files_or_the_pointer_change(world: World) -> None:
    world.fail[1] = ModelRefused(1, "corrupt", "sha256 differs")
    world.store.make(1)
    world.watcher.tick()
    world.watcher.tick()
    assert world.loads == [1]
    (world.store.root / "1" / "model").write_text("other weights")
    world.watcher.tick()
    assert world.loads == [1, 1]
    world.store.make(2)
    world.watcher.tick()
    world.store.promote(1)
    world.watcher.tick()
    assert world.loads == [1, 1, 2, 1]
    assert world.metrics.count(MODEL_REFUSED, "corrupt") == 3


def test_trouble_that_is_not_the_versions_own_is_tried_again_later(world: World) -> None:
    world.fail[1] = OSError("stale file handle")
    world.store.make(1)
    world.watcher.tick()
    del world.fail[1]
    assert world.watcher.tick() is None
    world.clock.advance(RETRY_S)
    assert world.watcher.tick() == 1


def test_a_version_that_is_not_there_yet_is_taken_when_it_is(world: World) -> None:
    world.store.pointer = 5
    for _ in range(3):
        assert world.watcher.tick() is None
    assert world.metrics.count(MODEL_REFUSED, "missing") == 1
    world.store.make(5)
    assert world.watcher.tick() == 5


def test_a_store_that_is_away_does_not_end_the_watcher(world: World) -> None:
    world.store.make(1)
    world.store.broken = RecoverableError("the share is not mounted")
    assert [world.watcher.tick() for _ in range(3)] == [None] * 3
    world.store.broken = None
    assert world.watcher.tick() == 1


def test_a_lease_passes_batches_on(world: World) -> None:
    class Echo(FakePredictor):
        def launch(self, batch: Any) -> Any:
            return ("launched", batch)

        def collect(self, pending: Any) -> Any:
            return ("collected", pending)

    lease = Lease(Echo(4))
    batch: Any = object()
    assert lease.version == 4
    assert lease.collect(lease.launch(batch)) == ("collected", ("launched", batch))


def test_the_thread_looks_by_itself_and_stops(world: World) -> None:
    found = threading.Event()
    load = world.load

    def loader(info: VersionInfo) -> FakePredictor:
        found.set()
        return load(info)

    watcher = Watcher(world.store, loader, world.mailbox, world.metrics, world.clock)
    watcher.start(0.005)
    world.store.make(1)
    assert found.wait(5)
    watcher.close()
    watcher.close()
    assert world.made[1].closed


def test_take_and_offer_from_two_threads_lose_nothing(world: World) -> None:
    served: list[int] = []
    done = threading.Event()

    def scorer() -> None:
        old: Lease | None = None
        while not done.is_set() or world.mailbox.heading != (old.version if old else None):
            fresh = world.mailbox.take()
            if fresh is not None:
                if old is not None:
                    old.close()
                old = fresh
                served.append(fresh.version)
                assert not world.made[fresh.version].closed

    thread = threading.Thread(target=scorer)
    thread.start()
    for version in range(1, 200):
        world.store.make(version)
        world.watcher.tick()
    done.set()
    thread.join(10)
    assert not thread.is_alive()
    assert served == sorted(set(served))
    assert served[-1] == 199
