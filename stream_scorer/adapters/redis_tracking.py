"""Which features were written, as the server tells: client tracking in broadcast mode, sent on to a second connection.

A cached row is then asked for again as soon as it changed, not when its time to live is over; that time stays the
safety net, and all there is in a cluster, on a server that refuses tracking, and while the connections are down.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import structlog
from redis import Redis, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from stream_scorer.adapters.redis_link import FAILURES, RedisConfig

CHANNEL = "__redis__:invalidate"
LISTEN_S = 1.0  # between two looks at the connection that asked for it
RETRY_S = 2.0
MOST_WAITING = 1_000_000  # keys not looked at yet; past this everything counts as changed

_log = structlog.get_logger("stream_scorer.redis")


class Invalidations:
    """A thread that listens. `take` is called by another one."""

    def __init__(self, config: RedisConfig, prefix: str) -> None:
        """``prefix``: of the keys to hear about. Connects to nothing yet."""
        self._config = config
        self._prefix = prefix
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
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
        if self._everything or len(self._waiting) == MOST_WAITING:
            self._everything = False
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
        said = False
        while not self._closing.is_set():
            try:
                self._listen()
            except exceptions.ResponseError as error:
                if not said:
                    _log.warning("no tracking: rows live out their time", error=self._config.explain(error))
                said = True
            except FAILURES as error:
                if self._tracking.is_set():
                    _log.warning("tracking lost: rows live out their time", error=self._config.explain(error))
            if self._tracking.is_set():
                self._tracking.clear()
                self._everything = True  # what was written until we are back will not be told
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
            ear = hears.connection_pool.get_connection()
            number = _answer(ear, "CLIENT", "ID")  # before it subscribes: then it may ask nothing else
            _answer(ear, "SUBSCRIBE", CHANNEL)
            asks.execute_command("CLIENT TRACKING", "ON", "REDIRECT", number, "BCAST", "PREFIX", self._prefix)
            self._everything = True  # written before we listened
            self._tracking.set()
            while not self._closing.is_set():
                if not ear.can_read(timeout=LISTEN_S):
                    asks.ping()
                    continue
                keys = ear.read_response()[2]
                if keys is None:  # the database was emptied
                    self._everything = True
                else:
                    self._waiting.extend(keys)


def _answer(connection: Any, *words: str) -> Any:
    connection.send_command(*words)
    return connection.read_response()
