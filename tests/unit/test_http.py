"""Health, metrics and the event stream, over a real socket."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from stream_scorer.adapters.http import END_EVENT, Endpoints, HttpConfig, HttpServer
from stream_scorer.core.errors import ConfigurationError


@contextmanager
def serving(endpoints: Endpoints, config: HttpConfig | None = None) -> Iterator[str]:
    server = HttpServer(config or HttpConfig(), endpoints)
    url = server.start()
    try:
        yield url
    finally:
        server.stop()


def get(url: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    link = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        link.request("GET", path, headers=headers or {})
        answer = link.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        link.close()


def test_health_follows_what_it_is_told() -> None:
    state = {"alive": "", "ready": "no model yet"}
    ends = Endpoints(alive=lambda: state["alive"], ready=lambda: state["ready"])
    with serving(ends) as url:
        assert get(url, "/livez")[::2] == (200, b"ok\n")
        assert get(url, "/healthz")[0] == 200
        assert get(url, "/readyz")[::2] == (503, b"no model yet\n")
        state |= {"alive": "no poll for 60 s", "ready": ""}
        assert get(url, "/livez")[::2] == (503, b"no poll for 60 s\n")
        assert get(url, "/readyz")[0] == 200


def test_metrics_version_and_unknown_paths() -> None:
    ends = Endpoints(metrics=lambda: b"x_total 1\n", version={"version": "1.2.3"})
    with serving(ends) as url:
        status, headers, body = get(url, "/metrics")
        assert (status, body) == (200, b"x_total 1\n")
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        assert get(url, "/version")[2] == b'{"version":"1.2.3"}'
        assert get(url, "/events")[0] == 404  # nothing to stream
        assert get(url, "/../etc/passwd")[0] == 404


def test_assets_come_with_their_type_and_headers() -> None:
    page = {"/": ("text/html; charset=utf-8", b"<!doctype html>"), "/app.js": ("text/javascript", b"1")}
    with serving(Endpoints(assets=page, headers={"Content-Security-Policy": "default-src 'none'"})) as url:
        status, headers, body = get(url, "/")
        assert (status, body, headers["content-type"]) == (200, b"<!doctype html>", "text/html; charset=utf-8")
        assert headers["content-security-policy"] == "default-src 'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert get(url, "/app.js")[2] == b"1"


def test_a_web_site_does_not_reach_a_loopback_server_through_dns() -> None:
    with serving(Endpoints()) as url:
        assert get(url, "/livez", {"Host": "evil.example"})[0] == 400
        assert get(url, "/livez", {"Host": "localhost:1"})[0] == 200


def test_a_server_for_all_addresses_takes_any_host_or_those_named() -> None:
    with serving(Endpoints(), HttpConfig(host="0.0.0.0")) as url:
        assert get(url.replace("0.0.0.0", "127.0.0.1"), "/livez", {"Host": "10.0.0.9"})[0] == 200
    with serving(Endpoints(), HttpConfig(host="0.0.0.0", allowed_hosts=("scorer.local",))) as url:
        assert get(url.replace("0.0.0.0", "127.0.0.1"), "/livez", {"Host": "10.0.0.9"})[0] == 400


def test_an_address_in_use_is_said() -> None:
    with serving(Endpoints()) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigurationError, match=r"cannot listen on 127\.0\.0\.1.*http\.port"):
            HttpServer(HttpConfig(port=port), Endpoints()).start()


def test_events_stream_history_first_and_end_with_the_server() -> None:
    counter = iter(range(1, 10_000))
    server = HttpServer(HttpConfig(), Endpoints(event=lambda: b"data: %d\n\n" % next(counter), event_every_s=0.01))
    url = server.start()
    first = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    first.request("GET", "/events")
    answer = first.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    assert answer.getheader("cache-control") == "no-store"
    seen = [int(answer.readline().removeprefix(b"data: ")) if at % 2 == 0 else answer.readline() for at in range(10)]
    assert seen[::2] == [1, 2, 3, 4, 5]  # each once, in order, from the start of the history
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    rest = answer.read()
    stopping.join(5)
    assert not stopping.is_alive()
    assert rest.endswith(END_EVENT)
    first.close()


def test_a_snapshot_that_fails_costs_one_event_not_the_server() -> None:
    outcomes = iter([ValueError("broken"), b"data: 2\n\n"])

    def event() -> bytes:
        outcome = next(outcomes, b"data: later\n\n")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with serving(Endpoints(event=event, event_every_s=0.01)) as url:
        link = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
        link.request("GET", "/events")
        assert link.getresponse().readline() == b"data: 2\n"
        link.close()
        assert get(url, "/livez")[0] == 200


def test_stop_twice_and_before_start() -> None:
    server = HttpServer(HttpConfig(), Endpoints())
    server.stop()
    server.start()
    server.stop()
    server.stop()
