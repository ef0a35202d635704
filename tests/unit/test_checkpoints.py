"""Checkpoints appear whole or not at all; what is torn or foreign is refused by name and the one before is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stream_scorer.adapters.checkpoints import DirectoryCheckpoints
from stream_scorer.core.errors import ConfigurationError


def save(store: DirectoryCheckpoints, value: int) -> int:
    def write(directory: Path) -> None:
        (directory / "learner").mkdir()
        (directory / "learner" / "weights").write_bytes(bytes([value]) * 100)

    return store.save(write, {"value": value}, {"rows": np.full(3, value, np.float32)})


def newest(store: DirectoryCheckpoints) -> int | None:
    seen: list[int] = []

    def read(saved) -> None:
        assert (saved.path / "learner" / "weights").read_bytes() == bytes([saved.state["value"]]) * 100
        assert saved.arrays["rows"].tolist() == [saved.state["value"]] * 3
        seen.append(saved.state["value"])

    return seen[-1] if store.restore(read) is not None else None


def test_the_newest_is_restored_and_two_are_kept(tmp_path: Path) -> None:
    store = DirectoryCheckpoints(tmp_path / "c")
    assert newest(store) is None
    assert [save(store, value) for value in (1, 2, 3)] == [1, 2, 3]
    assert newest(DirectoryCheckpoints(tmp_path / "c")) == 3
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["000000000002", "000000000003", "current"]
    assert (tmp_path / "c" / "current").read_text() == "000000000003\n"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = DirectoryCheckpoints(tmp_path)
    save(store, 1)

    def write(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        store.save(write, {}, {})
    assert newest(store) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".tmp-7-abc").mkdir()
    assert newest(DirectoryCheckpoints(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def older(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "stream-scorer-trainer/0"}))


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("learner/weights", cut, "missing or has not 100 bytes"),
        ("learner/weights", flip, "other content"),
        ("learner/weights", Path.unlink, "missing"),
        ("arrays.safetensors", flip, "other content"),
        ("state.json", cut, "missing or has not"),
        ("checkpoint.json", cut, "not readable"),
        ("checkpoint.json", Path.unlink, "not readable"),
        ("checkpoint.json", older, "'stream-scorer-trainer/0', this build reads 'stream-scorer-trainer/2'"),
    ],
)
def test_a_bad_one_is_refused_and_the_one_before_is_used(tmp_path: Path, name, harm, says) -> None:
    store = DirectoryCheckpoints(tmp_path)
    save(store, 1)
    save(store, 2)
    harm(tmp_path / "000000000002" / name)
    assert newest(store) == 1
    harm(tmp_path / "000000000001" / name)
    with pytest.raises(ConfigurationError, match=r"move .* away") as error:
        newest(store)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_one_that_its_reader_refuses_is_refused(tmp_path: Path) -> None:
    store = DirectoryCheckpoints(tmp_path)
    save(store, 1)
    save(store, 2)
    tried = []

    def read(saved) -> None:
        tried.append(saved.state["value"])
        if saved.state["value"] == 2:
            raise ValueError("made for another schema")

    assert store.restore(read) == 1
    assert tried == [2, 1]


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"set trainer\.checkpoint_dir"):
        DirectoryCheckpoints(tmp_path / "file" / "c")
