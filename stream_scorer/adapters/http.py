"""Health, metrics, version and the page over HTTP, in a thread of its own. Everything is read-only."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stream_scorer.core.errors import ConfigurationError

HISTORY = 600  # events a page that is opened late gets first
MAX_STREAMS = 32
END_EVENT = b"event: end\ndata: {}\n\n"
STOP_PATIENCE_S = 5.0
_NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_log = structlog.get_logger("stream_scorer.http")


def _fine() -> str:
    return ""


def _no_metrics() -> bytes:
    return b""


@dataclass(frozen=True)
class HttpConfig:
    """Where to listen; port 0 takes a free one.

    On a loopback address only requests for that host are answered (a web site must not reach it through DNS); elsewhere
    any, unless ``allowed_hosts`` says which.
    """

    host: str = "127.0.0.1"
    port: int = 0
    allowed_hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Endpoints:
    """What is served. The callables run on the server's thread: they must only copy what is there, and never wait.

    ``alive`` and ``ready`` return why not, or an empty string. ``event`` returns one server-sent event, ``assets`` maps
    paths to (content type, body), ``headers`` go with each asset.
    """

    alive: Callable[[], str] = _fine
    ready: Callable[[], str] = _fine
    metrics: Callable[[], bytes] = _no_metrics
    metrics_type: str = "text/plain; version=0.0.4; charset=utf-8"
    version: Mapping[str, str] = field(default_factory=dict)
    event: Callable[[], bytes] | None = None
    event_every_s: float = 1.0
    assets: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpServer:
    """Serves `Endpoints` until `stop`."""

    def __init__(self, config: HttpConfig, endpoints: Endpoints) -> None:
        """Listens on nothing yet."""
        self._config = config
        self._endpoints = endpoints
        self._events = _Events(endpoints)
        options = uvicorn.Config(
            self._app(), lifespan="off", log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=2
        )
        self._server = uvicorn.Server(options)
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.url = ""

    def start(self) -> str:
        """Listen; returns the URL. `ConfigurationError` when the address cannot be had."""
        config = self._config
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._socket = socket.create_server((config.host, config.port), family=family)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"cannot listen on {config.host}:{config.port}: {error}; set http.host and http.port to a free address"
            ) from None
        port = self._socket.getsockname()[1]
        self.url = f"http://[{config.host}]:{port}" if family == socket.AF_INET6 else f"http://{config.host}:{port}"
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()
        return self.url

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        if self._socket is None:
            return
        self._loop = asyncio.get_running_loop()
        sampling = asyncio.create_task(self._events.sample())
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._events.end()
            await sampling

    def stop(self) -> None:
        """End the event streams, then the server; calling twice is fine."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._server.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._events.end)
        thread.join(STOP_PATIENCE_S)
        if thread.is_alive():
            _log.warning("the HTTP server did not stop in time")

    def _app(self) -> Starlette:
        ends = self._endpoints
        pages: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/livez": _health(ends.alive),
            "/healthz": _health(ends.alive),
            "/readyz": _health(ends.ready),
            "/metrics": self._metrics,
            "/version": self._version,
        }
        if ends.event is not None:
            pages["/events"] = self._events.respond
        pages |= {path: _asset(kind, body, ends.headers) for path, (kind, body) in ends.assets.items()}
        hosts = _allowed_hosts(self._config)
        guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
        return Starlette(routes=[Route(path, page) for path, page in pages.items()], middleware=[guard])

    async def _metrics(self, _request: Request) -> Response:
        return Response(self._endpoints.metrics(), headers={"Content-Type": self._endpoints.metrics_type, **_NO_STORE})

    async def _version(self, _request: Request) -> Response:
        return JSONResponse(dict(self._endpoints.version), headers=_NO_STORE)


class _Events:
    """Takes one event a tick, whoever watches, and hands it to every stream. Lives on the server's event loop."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._event = endpoints.event
        self._every_s = endpoints.event_every_s
        self._history: deque[tuple[int, bytes]] = deque(maxlen=HISTORY)
        self._changed = asyncio.Condition()
        self._ended = asyncio.Event()
        self._count = 0
        self._streams = 0

    def end(self) -> None:
        """Take no more, and end every stream."""
        self._ended.set()

    async def sample(self) -> None:
        """Until `end`."""
        while not self._ended.is_set():
            if self._event is not None:
                self._take(self._event)
                async with self._changed:
                    self._changed.notify_all()
            await _wait(self._ended, self._every_s)
        async with self._changed:
            self._changed.notify_all()

    def _take(self, event: Callable[[], bytes]) -> None:
        try:
            taken = event()
        except Exception:  # noqa: BLE001 - a page without news is no reason to lose the health checks
            _log.exception("no snapshot for the page")
            return
        self._count += 1
        self._history.append((self._count, taken))

    async def respond(self, _request: Request) -> Response:
        """GET /events."""
        if self._streams >= MAX_STREAMS:
            return Response("too many streams\n", status_code=503, headers=_NO_STORE)
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=_NO_STORE)

    async def _stream(self) -> AsyncIterator[bytes]:
        self._streams += 1
        try:
            seen = 0
            while not self._ended.is_set():
                news = [(number, event) for number, event in self._history if number > seen]
                if news:  # a slow reader gets what is still in the history
                    seen = news[-1][0]
                    yield b"".join(event for _, event in news)
                    continue
                async with self._changed:
                    await self._changed.wait_for(lambda: self._ended.is_set() or self._count > seen)  # noqa: B023
            yield END_EVENT
        finally:
            self._streams -= 1


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return


def _health(why_not: Callable[[], str]) -> Callable[[Request], Awaitable[Response]]:
    async def respond(_request: Request) -> Response:
        reason = why_not()
        return Response(f"{reason or 'ok'}\n", status_code=503 if reason else 200, headers=_NO_STORE)

    return respond


def _asset(kind: str, body: bytes, headers: Mapping[str, str]) -> Callable[[Request], Awaitable[Response]]:
    async def respond(_request: Request) -> Response:
        return Response(body, headers={"Content-Type": kind, **_NO_STORE, **headers})

    return respond


def _allowed_hosts(config: HttpConfig) -> list[str]:
    if config.allowed_hosts:
        return list(config.allowed_hosts)
    try:
        loopback = config.host == "localhost" or ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        loopback = False
    return ["localhost", "127.0.0.1", "::1", "[::1]", config.host] if loopback else ["*"]
