"""The model store: a version appears whole or not at all, whoever publishes, reads or prunes beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stream_scorer.adapters.model_store import ABANDONED_S, DirectoryStore
from stream_scorer.core.errors import ConfigurationError, ModelRefused, RecoverableError
from stream_scorer.ports import ModelStore


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return DirectoryStore(tmp_path / "models")


def write(path: Path, version: int) -> None:
    (path / "model.safetensors").write_bytes(b"w" * 100)
    (path / "manifest.json").write_text(json.dumps({"version": version, "name": "test"}))


def test_an_empty_store(store: ModelStore) -> None:
    assert store.versions() == []
    assert store.current() is None
    with pytest.raises(ModelRefused) as caught:
        store.info(1)
    assert caught.value.reason == "missing"
    assert store.prune(1) == []


def test_publish_numbers_promotes_and_describes(store: ModelStore) -> None:
    assert [store.publish(write) for _ in range(3)] == [1, 2, 3]
    assert store.versions() == [1, 2, 3]
    assert store.current() == 3
    info = store.info(2)
    assert (info.version, info.manifest["version"]) == (2, 2)
    assert sorted(path.name for path in info.path.iterdir()) == ["manifest.json", "model.safetensors"]


def test_publish_without_promotion_and_rolling_back(store: ModelStore) -> None:
    store.publish(write)
    assert store.publish(write, promote=False) == 2
    assert store.current() == 1
    store.promote(2)
    assert store.current() == 2
    store.promote(1)
    assert store.current() == 1
    assert store.publish(write) == 3, "numbers only go up"
    with pytest.raises(ModelRefused, match="missing"):
        store.promote(99)
    assert store.current() == 3


def test_a_publisher_that_fails_leaves_nothing(store: ModelStore, tmp_path: Path) -> None:
    store.publish(write)

    def broken(path: Path, version: int) -> None:
        write(path, version)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        store.publish(broken)
    assert (store.versions(), store.current()) == ([1], 1)
    assert sorted(entry.name for entry in (tmp_path / "models").iterdir()) == ["current", "versions"]


def test_readers_never_see_half_a_version(store: ModelStore, tmp_path: Path) -> None:
    seen: list[int] = []

    def slow(path: Path, version: int) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        seen.extend(store.versions())
        write(path, version)

    store.publish(slow)
    store.publish(slow)
    assert seen == [1], "while version 2 was being written only version 1 was there"


def test_two_publishers_never_share_a_number(tmp_path: Path) -> None:
    stores = [DirectoryStore(tmp_path) for _ in range(4)]
    numbers: list[int] = []
    gate = threading.Barrier(4)

    def publish(store: DirectoryStore) -> None:
        gate.wait()
        numbers.extend(store.publish(write) for _ in range(10))

    threads = [threading.Thread(target=publish, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 41))
    for version in range(1, 41):
        assert stores[0].info(version).manifest["version"] == version


def test_the_manifest_of_a_number_taken_meanwhile_is_written_again(tmp_path: Path) -> None:
    store, rival = DirectoryStore(tmp_path), DirectoryStore(tmp_path)
    calls: list[int] = []

    def raced(path: Path, version: int) -> None:
        if not calls:
            rival.publish(write)
        calls.append(version)
        write(path, version)

    assert store.publish(raced) == 2
    assert calls == [1, 2]
    assert store.info(2).manifest["version"] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["current", "versions"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"a": ' * 2000, "NaN"])
def test_an_unreadable_manifest_is_refused(store: ModelStore, text: str) -> None:
    store.publish(lambda path, _version: (path / "manifest.json").write_text(text) and None)
    with pytest.raises(ModelRefused) as caught:
        store.info(1)
    assert caught.value.reason == "corrupt"
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_there_or_not_text_is_refused(store: ModelStore) -> None:
    store.publish(lambda path, _version: (path / "other").write_text("x") and None)
    store.publish(lambda path, _version: (path / "manifest.json").write_bytes(b"\xff\xfe{}") and None)
    store.publish(lambda path, _version: (path / "manifest.json").mkdir())
    assert [reason(store, version) for version in (1, 2, 3)] == ["missing", "corrupt", "corrupt"]


def reason(store: ModelStore, version: int) -> str:
    with pytest.raises(ModelRefused) as caught:
        store.info(version)
    return caught.value.reason


def test_links_and_strangers_are_not_versions(store: ModelStore, tmp_path: Path) -> None:
    store.publish(write)
    versions = tmp_path / "models" / "versions"
    outside = tmp_path / "outside"
    outside.mkdir()
    write(outside, 2)
    (versions / "2").symlink_to(outside)
    for name in ("0", "01", "-3", "1.5", "latest", "3.tmp"):
        (versions / name).mkdir()
    (versions / "7").write_text("a file")
    assert store.versions() == [1]
    assert reason(store, 2) == "missing"


@pytest.mark.parametrize("text", ["", "two", "../../etc", "-1", "1\n2"])
def test_a_broken_pointer_is_an_error_that_says_how_to_repair_it(store: ModelStore, tmp_path: Path, text: str) -> None:
    store.publish(write)
    (tmp_path / "models" / "current").write_text(text)
    with pytest.raises(RecoverableError, match="models promote"):
        store.current()
    with pytest.raises(RecoverableError):
        store.prune(1)
    assert store.versions() == [1], "nothing is deleted while nobody knows what is served"
    store.promote(1)
    assert store.current() == 1


def test_prune_keeps_the_newest_and_the_current(store: ModelStore) -> None:
    for _ in range(6):
        store.publish(write)
    store.promote(2)
    assert store.prune(2, (3,)) == [1, 4]
    assert store.prune(2) == [3]
    assert store.versions() == [2, 5, 6]
    assert store.prune(2) == []
    assert store.publish(write) == 7
    with pytest.raises(ValueError, match="at least one"):
        store.prune(0)


def test_prune_sweeps_up_after_the_killed(store: ModelStore, tmp_path: Path) -> None:
    root = tmp_path / "models"
    for name, age_s in (("old", 2 * ABANDONED_S), ("young", 0.0)):
        left = root / f".tmp-9-{name}"
        left.mkdir()
        os.utime(left, (time.time() - age_s,) * 2)
    store.prune(1)
    assert [path.name for path in root.glob(".tmp-*")] == [".tmp-9-young"]


def test_a_publisher_killed_at_any_instant_leaves_a_store_that_works(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from stream_scorer.adapters.model_store import DirectoryStore\n"
        "def write(path, version):\n"
        "    for name in 'abc': (path / name).write_bytes(b'x' * 100000)\n"
        "    (path / 'manifest.json').write_text('{\"version\": %d}' % version)\n"
        "store = DirectoryStore(Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "while True: store.publish(write)\n"
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        store = DirectoryStore(tmp_path)
        before = store.current() or 0
        deadline = time.monotonic() + 20
        while (store.current() or 0) < before + 5:
            assert time.monotonic() < deadline
        child.kill()
        child.wait()
        child.stdout.close()
        current = store.current()
        assert current in store.versions()
        for version in store.versions():
            info = store.info(version)
            assert info.manifest["version"] == version
            assert [(info.path / name).stat().st_size for name in "abc"] == [100_000] * 3


def test_a_root_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"model\.store"):
        DirectoryStore(tmp_path / "file" / "models")
