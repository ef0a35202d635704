"""One contract for every feature store: the fake, Valkey, Redis, and a Redis Cluster of one node."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redis import Redis

from esmm.batch import FeatureBlock, Slot, SourceLayout
from stream_scorer.adapters import redis_tracking
from stream_scorer.adapters.redis import FeatureWriter, RedisConfig, RedisFeatures
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import ConfigurationError, RecoverableError
from stream_scorer.core.metric_names import FEATURE_CACHE, FEATURES_MISSING
from stream_scorer.core.packed import Entity, encode_records, entity_key
from stream_scorer.ports import FeatureStore
from tests.fakes import FakeFeatures, FakeMetrics
from tests.servers import RedisServer, wait_until

USER = SourceLayout("user", (Slot("u_seg", "sparse", 0, 1),), (Slot("u_age", "dense", 0, 2),))
ITEM = SourceLayout(
    "item", (Slot("i_cat", "sparse", 0, 1), Slot("i_tags", "varlen", 1, 4)), (Slot("p", "dense", 0, 3),)
)
LAYOUTS: dict[Entity, SourceLayout] = {"user": USER, "item": ITEM}
NOW_MS = 1_700_000_000_000
BIG_ID = (1 << 60) + 1  # float32 would make another id of it


def block(layout: SourceLayout, seed: int, rows: int = 1) -> FeatureBlock:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1 << 62, (rows, layout.id_width))
    return FeatureBlock(ids, rng.random((rows, layout.dense_width), dtype=np.float32))


def soon(seconds: float = 5.0) -> Deadline:
    return Deadline.after(seconds, time.monotonic)


Put = Callable[[Entity, str, FeatureBlock, int], None]


@pytest.fixture(scope="module")
def cluster(redis_program: Path) -> Iterator[RedisServer]:
    with RedisServer(redis_program, cluster=True) as running:
        yield running


REAL = [pytest.param(name, marks=pytest.mark.real_redis) for name in ("redis", "cluster")]


@pytest.fixture(params=["fake", "valkey", *REAL])
def rung(request: pytest.FixtureRequest) -> Iterator[tuple[FeatureStore, Put]]:
    if request.param == "fake":
        fake = FakeFeatures(USER, ITEM)
        yield fake, lambda entity, id_, values, event_ms: fake.put(LAYOUTS[entity], id_, values, event_ms)
        return
    if request.param == "cluster":
        running: RedisServer = request.getfixturevalue("cluster")
        yield from on_server(RedisConfig(running.url, prefix=f"f{time.time_ns()}", budget_s=2.0))
        return
    program: Path = request.getfixturevalue(f"{request.param}_program")
    with RedisServer(program) as server:
        yield from on_server(RedisConfig(server.url, budget_s=2.0))


def on_server(config: RedisConfig) -> Iterator[tuple[FeatureStore, Put]]:
    writer = FeatureWriter(config, LAYOUTS)
    store = RedisFeatures(config, LAYOUTS, FakeMetrics())
    yield store, lambda entity, id_, values, event_ms: write_one(writer, entity, id_, values, event_ms)
    store.close()
    writer.close()


def write_one(writer: FeatureWriter, entity: Entity, id_: str, values: FeatureBlock, event_ms: int) -> None:
    writer.write(entity, [id_], values, np.array([event_ms]))


def test_rows_come_in_the_order_asked_for_bit_for_bit(rung: tuple[FeatureStore, Put]) -> None:
    store, put = rung
    users, items = [f"u{n}" for n in range(5)], [f"i{n}" for n in range(40)]
    for at, id_ in enumerate(users):
        put("user", id_, block(USER, at), NOW_MS - at)
    for at, id_ in enumerate(items):
        put("item", id_, block(ITEM, 100 + at), NOW_MS - 10 * at)
    order = items[::-1]
    for _ in range(2):  # the second time from a cache, where there is one
        found = store.fetch(users, order, NOW_MS, soon())
        assert not found.degraded
        assert found.users.event_ms_N.tolist() == [NOW_MS - at for at in range(5)]
        assert not found.users.missing_N.any()
        assert not found.items.missing_N.any()
        for row, at in enumerate(reversed(range(40))):
            expected = block(ITEM, 100 + at)
            np.testing.assert_array_equal(found.items.block.ids_NS[row], expected.ids_NS[0])
            np.testing.assert_array_equal(found.items.block.dense_ND[row], expected.dense_ND[0])
            assert found.items.event_ms_N[row] == NOW_MS - 10 * at
        np.testing.assert_array_equal(found.users.block.ids_NS[3], block(USER, 3).ids_NS[0])


def test_shapes_and_types_whatever_is_asked_for(rung: tuple[FeatureStore, Put]) -> None:
    store, _ = rung
    for users, items in ([], []), (["gone-u"], []), ([], ["gone-i", "gone-j"]):
        found = store.fetch(users, items, NOW_MS, soon())
        for rows, ids, layout in (found.users, users, USER), (found.items, items, ITEM):
            assert rows.block.ids_NS.shape == (len(ids), layout.id_width)
            assert rows.block.dense_ND.shape == (len(ids), layout.dense_width)
            assert rows.block.ids_NS.dtype == np.int64
            assert rows.block.dense_ND.dtype == np.float32
            assert rows.event_ms_N.dtype == rows.slot_N.dtype == rows.generation_N.dtype == np.int64
            assert rows.missing_N.dtype == np.bool_
            assert len(rows.slot_N) == len(rows.generation_N) == len(rows.event_ms_N) == len(rows.missing_N) == len(ids)


def test_what_is_not_there_is_missing_and_holds_defaults(rung: tuple[FeatureStore, Put]) -> None:
    store, put = rung
    put("item", "i1", block(ITEM, 1), NOW_MS)
    found = store.fetch(["gone-user"], ["gone-item", "i1"], NOW_MS, soon())
    assert not found.degraded
    assert found.users.missing_N.tolist() == [True]
    assert found.items.missing_N.tolist() == [True, False]
    assert found.items.event_ms_N.tolist() == [0, NOW_MS]
    assert not found.items.block.ids_NS[0].any()
    assert not found.items.block.dense_ND[0].any()


def test_ids_are_exact_and_any_text_is_an_id(rung: tuple[FeatureStore, Put]) -> None:
    store, put = rung
    odd = ["i{x}", "a b\n", "ключ", "🎈", "i:1", "x" * 256]
    for at, id_ in enumerate(odd):
        values = block(ITEM, at)
        values.ids_NS[:] = BIG_ID + at
        put("item", id_, values, NOW_MS)
    found = store.fetch([], odd, NOW_MS, soon())
    assert found.items.block.ids_NS[:, 0].tolist() == [BIG_ID + at for at in range(len(odd))]


# What only Redis and Valkey can show


@pytest.fixture(params=["valkey", pytest.param("redis", marks=pytest.mark.real_redis)])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    program: Path = request.getfixturevalue("valkey_program" if request.param == "valkey" else "redis_program")
    with RedisServer(program) as running:
        yield running


class Bench:
    """A store with its metrics and a writer, on one server."""

    def __init__(self, server: RedisServer, **settings: object) -> None:
        self.metrics = FakeMetrics()
        self.config = replace(RedisConfig(server.url, budget_s=0.5), **settings)
        self.writer = FeatureWriter(self.config, LAYOUTS)
        self.store = RedisFeatures(self.config, LAYOUTS, self.metrics)

    def write(self, ids: list[str], seed: int = 0, event_ms: int = NOW_MS) -> None:
        self.writer.write("item", ids, block(ITEM, seed, len(ids)), np.full(len(ids), event_ms))

    def close(self) -> None:
        self.store.close()
        self.writer.close()


def test_a_bad_value_is_missing_by_reason_and_never_an_exception(server: RedisServer) -> None:
    bench = Bench(server)
    good = encode_records(ITEM, block(ITEM, 1), np.array([NOW_MS]))[0]
    other = SourceLayout("item", ITEM.ids, (Slot("q", "dense", 0, 3),))  # the same size, another schema
    values = {
        "magic": b"XXXX" + good[4:],
        "schema": encode_records(other, block(other, 1), np.array([NOW_MS]))[0],
        "size": good + b"\0",
        "nonfinite": good[:-4] + np.float32(np.nan).tobytes(),
        "good": good,
    }
    client = Redis.from_url(server.url)
    for id_, value in values.items():
        client.set(entity_key("item", id_, 64), value)
    client.rpush(entity_key("item", "list", 64), "not a string at all")
    client.close()
    ids = [*values, "list", "nowhere"]
    found = bench.store.fetch([], ids, NOW_MS, soon())
    assert not found.degraded
    assert [id_ for id_, missing in zip(ids, found.items.missing_N.tolist(), strict=True) if not missing] == ["good"]
    for reason in ("magic", "schema", "size", "nonfinite"):
        assert bench.metrics.count(FEATURES_MISSING, "item", reason) == 1, reason
    assert bench.metrics.count(FEATURES_MISSING, "item", "absent") == 2
    assert np.isfinite(found.items.block.dense_ND).all()
    bench.close()


def test_a_stopped_server_degrades_at_once_and_comes_back(server: RedisServer) -> None:
    bench = Bench(server, cache_ttl_s=30.0, stale_limit_s=3_600.0)
    bench.write(["i1", "i2", "i3"])
    before = bench.store.fetch([], ["i1", "i2"], NOW_MS, soon())
    server.kill()
    started = time.monotonic()
    for _ in range(20):
        found = bench.store.fetch(["u1"], ["i1", "i3", "i2"], NOW_MS + 60_000, soon())
        assert found.degraded
    assert time.monotonic() - started < 1.5, "an outage must not cost a time-out a batch"
    assert not bench.store.available
    assert found.items.missing_N.tolist() == [False, True, False]  # stale rows are served, i3 was never cached
    assert found.items.event_ms_N.tolist() == [NOW_MS, 0, NOW_MS]
    np.testing.assert_array_equal(found.items.block.ids_NS[[0, 2]], before.items.block.ids_NS)
    assert found.users.missing_N.tolist() == [True]
    assert found.items.slot_N[1] == -1
    assert found.items.generation_N[[0, 2]].tolist() == before.items.generation_N.tolist()
    assert bench.metrics.count(FEATURES_MISSING, "item", "outage") == 20
    assert bench.metrics.count(FEATURE_CACHE, "stale") == 40
    too_old = bench.store.fetch([], ["i1"], NOW_MS + 3_700_000, soon())
    assert too_old.items.missing_N.tolist() == [True]
    server.start()
    Bench(server).write(["i1", "i2", "i3"], seed=9)
    wait_until(lambda: bench.store.available, "the probe has found it")
    again = bench.store.fetch([], ["i1", "i2", "i3"], NOW_MS + 60_000, soon())
    assert not again.degraded
    np.testing.assert_array_equal(again.items.block.ids_NS, block(ITEM, 9, 3).ids_NS)
    bench.close()


def test_a_hung_server_costs_one_budget(server: RedisServer) -> None:
    bench = Bench(server, budget_s=0.1)
    bench.write(["i1"])
    bench.store.fetch([], ["i1"], NOW_MS, soon())
    server.signal(signal.SIGSTOP)
    started = time.monotonic()
    found = [bench.store.fetch([], ["i2"], NOW_MS, soon()) for _ in range(10)]
    took = time.monotonic() - started
    server.signal(signal.SIGCONT)
    assert all(one.degraded for one in found)
    assert 0.05 < took < 0.6, took
    wait_until(lambda: bench.store.available, "the probe has found it")
    assert not bench.store.fetch([], ["i2"], NOW_MS, soon()).degraded
    bench.close()


def test_a_deadline_that_passed_asks_nobody(server: RedisServer) -> None:
    bench = Bench(server)
    bench.write(["i1"])
    late = bench.store.fetch([], ["i1"], NOW_MS, soon(-1.0))
    assert (late.degraded, bench.store.available) == (True, True)
    assert not bench.store.fetch([], ["i1"], NOW_MS, soon()).degraded
    bench.close()


def test_a_store_that_is_down_from_the_start_degrades_and_connects_later(server: RedisServer) -> None:
    bench = Bench(server)
    store = RedisFeatures(bench.config, LAYOUTS, bench.metrics)
    server.kill()
    assert store.fetch(["u1"], ["i1"], NOW_MS, soon()).degraded
    with pytest.raises(ConfigurationError, match=r"no Redis at .*redis\.url"):
        store.verify()
    server.start()
    wait_until(lambda: store.available, "the probe has found it")
    assert not store.fetch(["u1"], ["i1"], NOW_MS, soon()).degraded
    store.close()
    bench.close()


def test_the_cache_answers_for_its_time_and_generations_name_content(server: RedisServer) -> None:
    bench = Bench(server, cache_ttl_s=30.0)
    bench.write(["i1", "i2"], seed=1)
    first = bench.store.fetch([], ["i1", "i2"], NOW_MS, soon()).items
    bench.write(["i1", "i2"], seed=1, event_ms=NOW_MS + 1)  # the same values, seen again later
    bench.writer.write("item", ["i2"], block(ITEM, 5), np.array([NOW_MS + 1]))
    cached = bench.store.fetch([], ["i2", "i1"], NOW_MS + 29_000, soon()).items
    assert cached.slot_N.tolist() == first.slot_N.tolist()[::-1]
    assert cached.generation_N.tolist() == first.generation_N.tolist()[::-1]
    assert cached.event_ms_N.tolist() == [NOW_MS, NOW_MS]
    later = bench.store.fetch([], ["i1", "i2"], NOW_MS + 31_000, soon()).items
    assert later.event_ms_N.tolist() == [NOW_MS + 1, NOW_MS + 1]
    assert later.slot_N.tolist() == first.slot_N.tolist()
    assert later.generation_N[0] == first.generation_N[0], "refetched, and the same"
    assert later.generation_N[1] > first.generation_N[1], "refetched, and another"
    np.testing.assert_array_equal(later.block.ids_NS[1], block(ITEM, 5).ids_NS[0])
    assert (bench.metrics.count(FEATURE_CACHE, "hit"), bench.metrics.count(FEATURE_CACHE, "miss")) == (2, 4)
    bench.close()


def test_an_item_that_appears_is_found_within_a_second(server: RedisServer) -> None:
    bench = Bench(server)
    assert bench.store.fetch([], ["new"], NOW_MS, soon()).items.missing_N.tolist() == [True]
    bench.write(["new"])
    assert bench.store.fetch([], ["new"], NOW_MS + 900, soon()).items.missing_N.tolist() == [True]
    assert bench.store.fetch([], ["new"], NOW_MS + 1_100, soon()).items.missing_N.tolist() == [False]
    bench.close()


def test_without_a_cache_and_with_one_that_is_too_small(server: RedisServer) -> None:
    ids = [f"i{n}" for n in range(50)]
    for capacity in (0, 7):
        bench = Bench(server, cache_items=capacity)
        bench.write(ids, seed=3)
        for _ in range(3):
            found = bench.store.fetch([], ids, NOW_MS, soon()).items
            np.testing.assert_array_equal(found.block.ids_NS, block(ITEM, 3, 50).ids_NS)
            np.testing.assert_array_equal(found.block.dense_ND, block(ITEM, 3, 50).dense_ND)
            slots = found.slot_N[found.slot_N >= 0]
            assert len(set(slots.tolist())) == len(slots) == capacity
        bench.close()


def test_defaults_stand_in_for_what_is_missing(server: RedisServer) -> None:
    bench = Bench(server)
    defaults: dict[Entity, FeatureBlock] = {"item": block(ITEM, 77), "user": block(USER, 78)}
    store = RedisFeatures(bench.config, LAYOUTS, bench.metrics, defaults)
    found = store.fetch(["u"], ["gone"], NOW_MS, soon())
    np.testing.assert_array_equal(found.items.block.ids_NS, defaults["item"].ids_NS)
    np.testing.assert_array_equal(found.users.block.dense_ND, defaults["user"].dense_ND)
    again = store.fetch(["u"], ["gone"], NOW_MS, soon())
    np.testing.assert_array_equal(again.items.block.ids_NS, defaults["item"].ids_NS)
    assert again.items.missing_N.tolist() == [True]
    store.close()
    bench.close()


def test_verify_says_what_is_wrong_and_what_to_do(server: RedisServer) -> None:
    config = RedisConfig(server.url, budget_s=0.5)
    store = RedisFeatures(config, LAYOUTS, FakeMetrics())
    with pytest.raises(ConfigurationError, match=r"holds no user features.*features load --entity user"):
        store.verify()
    writer = FeatureWriter(config, LAYOUTS)
    writer.write("user", ["u"], block(USER, 0), np.array([NOW_MS]))
    writer.write("item", ["i"], block(ITEM, 0), np.array([NOW_MS]))
    store.verify()
    other = {**LAYOUTS, "item": SourceLayout("item", ITEM.ids, (Slot("q", "dense", 0, 3),))}
    with pytest.raises(ConfigurationError, match=r"item features .* another feature schema .*features load"):
        RedisFeatures(config, other, FakeMetrics()).verify()
    with pytest.raises(ConfigurationError, match=r"redis\.buckets = 64.*set it to 64"):
        RedisFeatures(replace(config, buckets=32), LAYOUTS, FakeMetrics()).verify()
    with pytest.raises(ConfigurationError, match=r"redis\.buckets = 64"):
        FeatureWriter(replace(config, buckets=32), LAYOUTS)
    writer.close()


def test_writing_checks_first_and_can_expire(server: RedisServer) -> None:
    bench = Bench(server)
    with pytest.raises(ValueError, match="2 ids for 1 rows"):
        bench.writer.write("item", ["a", "b"], block(ITEM, 0), np.array([NOW_MS]))
    bad = block(ITEM, 0)
    bad.dense_ND[0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        bench.writer.write("item", ["a"], bad, np.array([NOW_MS]))
    many = [f"i{n}" for n in range(2_345)]
    assert bench.writer.write("item", many, block(ITEM, 4, 2_345), np.full(2_345, NOW_MS), ttl_s=60.0) == 2_345
    client = Redis.from_url(server.url)
    assert client.dbsize() == 2_345 + 1
    assert 0 < client.pttl(entity_key("item", many[-1], 64)) <= 60_000
    client.close()
    server.kill()
    with pytest.raises(RecoverableError, match="item features were not written"):
        bench.write(["i1"])
    bench.close()


def test_a_wrong_password_is_said_without_telling_it(valkey_program: Path) -> None:
    with RedisServer(valkey_program, password="right-secret") as server:
        FeatureWriter(RedisConfig(server.url), LAYOUTS).close()
        wrong = RedisConfig(server.url.replace("right-secret", "wrong-secret"))
        with pytest.raises(ConfigurationError, match=r"refused the login.*redis\.url") as caught:
            FeatureWriter(wrong, LAYOUTS)
        assert "secret" not in str(caught.value) + repr(wrong)
        store = RedisFeatures(wrong, LAYOUTS, FakeMetrics())
        assert store.fetch(["u"], ["i"], NOW_MS, soon()).degraded
        store.close()


@pytest.mark.real_redis
def test_keys_of_one_bucket_share_a_slot_of_the_cluster(cluster: RedisServer) -> None:
    bench = Bench(cluster, buckets=4, prefix="four")
    ids = [f"i{n}" for n in range(200)]
    bench.write(ids)
    found = bench.store.fetch([], ids, NOW_MS, soon())
    assert not found.items.missing_N.any()
    np.testing.assert_array_equal(found.items.block.ids_NS, block(ITEM, 0, 200).ids_NS)
    keys = [entity_key("item", id_, 4, "four") for id_ in ids]
    client = Redis.from_url(cluster.url)
    slots = {int(client.execute_command("CLUSTER KEYSLOT", key)) for key in keys}
    assert sum(client.exists(key) for key in keys) == 200
    client.close()
    assert len(slots) == len({key.split("}")[0] for key in keys}) == 4
    bench.close()


def tracked(server: RedisServer, **settings: object) -> Bench:
    bench = Bench(server, cache_ttl_s=3_600.0, **settings)
    bench.store.track()
    wait_until(lambda: bench.store.tracking, "tracking")
    return bench


def eventually_rows(bench: Bench, ids: list[str], seed: int) -> None:
    """The store gives these rows, written with ``seed``, within the patience of a test."""
    wanted = block(ITEM, seed, len(ids)).ids_NS

    def there() -> bool:
        return bool((bench.store.fetch([], ids, NOW_MS, soon()).items.block.ids_NS == wanted).all())

    wait_until(there, f"rows {seed}")


def kill(server: RedisServer, flag: str) -> None:
    """Close the one connection with this flag: P listens, t asked for tracking."""
    with Redis.from_url(server.url) as client:
        found = [one["id"] for one in client.client_list() if flag in one["flags"]]
        assert len(found) == 1, client.client_list()
        client.client_kill_filter(_id=found[0])


def test_a_cached_item_is_asked_for_again_as_soon_as_it_is_written(server: RedisServer) -> None:
    bench = tracked(server, prefix="a}:b")
    bench.write(["i1", "i2", "ü"])
    eventually_rows(bench, ["i1", "i2", "ü"], 0)
    before = bench.store.fetch([], ["i1"], NOW_MS, soon()).items.block.ids_NS
    bench.write(["i2", "ü"], seed=7)
    eventually_rows(bench, ["i2", "ü"], 7)
    np.testing.assert_array_equal(bench.store.fetch([], ["i1"], NOW_MS, soon()).items.block.ids_NS, before)
    assert bench.metrics.count(FEATURE_CACHE, "changed") >= 2
    assert bench.metrics.gauges["feature_tracking",] == 1
    bench.close()


def test_an_item_that_was_not_there_is_found_as_soon_as_it_is_written(server: RedisServer) -> None:
    bench = tracked(server)
    assert bench.store.fetch([], ["new"], NOW_MS, soon()).items.missing_N.tolist() == [True]
    bench.write(["new"])
    eventually_rows(bench, ["new"], 0)
    bench.close()


@pytest.mark.parametrize("flag", ["P", "t"])
def test_when_a_connection_was_gone_everything_is_asked_for_again(server: RedisServer, flag: str) -> None:
    bench = tracked(server)
    bench.write(["i1"])
    eventually_rows(bench, ["i1"], 0)
    kill(server, flag)
    wait_until(lambda: not bench.store.tracking, "the loss")
    bench.store.fetch([], ["i1"], NOW_MS, soon())  # takes the news of the loss
    bench.write(["i1"], seed=9)  # nobody hears of it
    wait_until(lambda: bench.store.tracking, "tracking again")
    eventually_rows(bench, ["i1"], 9)
    bench.close()


def test_what_is_written_between_the_loss_and_its_discovery_is_asked_for_again(server: RedisServer) -> None:
    bench = tracked(server)
    bench.write(["i1"])
    eventually_rows(bench, ["i1"], 0)
    kill(server, "t")  # its loss is seen at the next ping
    bench.write(["i1"], seed=5)
    wait_until(lambda: not bench.store.tracking, "the loss")
    np.testing.assert_array_equal(
        bench.store.fetch([], ["i1"], NOW_MS, soon()).items.block.ids_NS, block(ITEM, 5).ids_NS
    )
    bench.close()


def test_an_emptied_database_is_heard_of(server: RedisServer) -> None:
    bench = tracked(server)
    bench.write(["i1"])
    eventually_rows(bench, ["i1"], 0)
    with Redis.from_url(server.url) as client:
        client.flushall()
    wait_until(lambda: bool(bench.store.fetch([], ["i1"], NOW_MS, soon()).items.missing_N[0]), "missing")
    bench.close()


def test_many_writes_at_once_cost_the_next_batch_little(server: RedisServer) -> None:
    bench = tracked(server)
    bench.write(["i0"])
    eventually_rows(bench, ["i0"], 0)
    ids = [f"i{at}" for at in range(3 * redis_tracking.MOST_WAITING)]
    bench.write(ids, seed=3)
    changes = bench.store._changes
    assert changes is not None
    wait_until(lambda: changes._everything, "too many to tell")
    assert len(changes._waiting) <= redis_tracking.MOST_WAITING
    wanted = block(ITEM, 3, len(ids)).ids_NS[:1]
    np.testing.assert_array_equal(bench.store.fetch([], ["i0"], NOW_MS, soon()).items.block.ids_NS, wanted)
    bench.close()


def test_a_server_that_refuses_tracking_is_used_without(
    server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with Redis.from_url(server.url) as client:
        client.execute_command("ACL SETUSER quiet on >word ~* &* +@all -client|tracking")
        bench = Bench(server)
        bench.write(["i1"])
        limited = RedisConfig(server.url.replace("redis://", "redis://quiet:word@"), budget_s=2.0)
        store = RedisFeatures(limited, LAYOUTS, FakeMetrics())
        store.track()
        said = ""

        def refused() -> bool:
            nonlocal said
            said += capsys.readouterr().out
            return "no tracking" in said

        wait_until(refused, "the warning")
        assert not store.tracking
        for _ in range(2):
            assert not store.fetch([], ["i1"], NOW_MS, soon()).items.missing_N[0]
        assert store._metrics.count(FEATURE_CACHE, "hit") == 1  # cached as ever
        store.close()
        client.execute_command("ACL DELUSER quiet")
        bench.close()


@pytest.mark.real_redis
def test_a_cluster_is_not_tracked(cluster: RedisServer) -> None:
    bench = Bench(cluster, prefix="quiet")
    bench.store.track()
    assert bench.store._changes is None
    bench.close()
