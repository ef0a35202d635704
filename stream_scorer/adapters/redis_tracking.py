"""Which features were written, as the server tells: client tracking in broadcast mode, sent on to a second connection.

A cached row is then asked for again as soon as it changed, not when its time to live is over; that time stays the
safety net, and all there is in a cluster, on a server that refuses tracking, and while the connections are down.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import structlog
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from stream_scorer.adapters.redis_link import FAILURES, RedisConfig

CHANNEL = "__redis__:invalidate"
LISTEN_S = 1.0  # between two looks at the connection that asked for it; it is the one a server may close as idle
RETRY_S = 2.0
MOST_WAITING = 10_000  # keys not looked at yet; past this everything counts as changed, which costs less

_log = structlog.get_logger("stream_scorer.redis")


class Invalidations:
    """A thread that listens. `take` is called by another one."""

    def __init__(self, config: RedisConfig, prefix: str) -> None:
        """``prefix``: of the keys to hear about. Connects to nothing yet."""
        self._config = config
        self._prefix = prefix
        self._waiting: deque[bytes] = deque()
        self._everything = False
        self._closing = threading.Event()
        self._tracking = threading.Event()
        self._thread = threading.Thread(target=self._run, name="redis-tracking", daemon=True)

    def start(self) -> None:
        """Listen from now on."""
        self._thread.start()

    @property
    def tracking(self) -> bool:
        """Whether the server tells us."""
        return self._tracking.is_set()

    def take(self) -> Sequence[bytes] | None:
        """Keys written since the last call; None when any may have been."""
        if self._everything:
            self._everything = False  # first: what is told from here on sets it again
            self._waiting.clear()
            return None
        if not self._waiting:
            return ()
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        said = ""
        while not self._closing.is_set():
            try:
                self._listen()
            except FAILURES as error:
                why = self._config.explain(error)
                if self._tracking.is_set() or why != said:
                    _log.warning("no tracking: cached rows live out their time", error=why)
                said = why
            if self._tracking.is_set():
                self._everything = True  # what was written while nobody knew of the loss
                self._tracking.clear()
            self._closing.wait(RETRY_S)

    def _listen(self) -> None:
        """Until closed; raises one of `FAILURES` when a connection went."""
        options: dict[str, Any] = {
            "socket_timeout": 2 * LISTEN_S,
            "socket_connect_timeout": self._config.connect_timeout_s,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
        }
        with Redis.from_url(self._config.url, **options) as asks, Redis.from_url(self._config.url, **options) as hears:
            # connections, not clients: a client would connect again by itself, and nobody would track for it
            asking, ear = asks.connection_pool.get_connection(), hears.connection_pool.get_connection()
            number = _answer(ear, "CLIENT", "ID")  # before it subscribes: then it may ask nothing else
            _answer(ear, "SUBSCRIBE", CHANNEL)
            _answer(asking, "CLIENT", "TRACKING", "ON", "REDIRECT", number, "BCAST", "PREFIX", self._prefix)
            self._everything = True  # written before we listened
            self._tracking.set()
            _log.info("tracking: cached rows are asked for again when they are written")
            while not self._closing.is_set():
                give_up = time.monotonic() + LISTEN_S
                while time.monotonic() < give_up and not self._closing.is_set():
                    if ear.can_read(timeout=LISTEN_S):
                        self._heard(ear.read_response()[2])
                _answer(asking, "PING")

    def _heard(self, keys: list[bytes] | None) -> None:
        """None: the database was emptied."""
        if keys is None or len(self._waiting) + len(keys) > MOST_WAITING:
            self._everything = True
        elif not self._everything:
            self._waiting.extend(keys)


def _answer(connection: Any, *words: object) -> Any:
    connection.send_command(*words)
    return connection.read_response()
