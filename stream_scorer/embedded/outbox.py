"""Feedback that waits for its time, and what it looks like on the wire."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import orjson

from stream_scorer.core.records import OutRecord
from stream_scorer.embedded.shop import KINDS


class Happened(NamedTuple):
    """One feedback message to be."""

    kind: int  # index into `shop.KINDS`
    at_ms: int
    request_id: str
    user: int
    item: str
    category: int
    repeat: bool


class Outbox:
    """Messages by the time they are due."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Happened]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, due_ms: int, happened: Happened) -> None:
        """Keep it until ``due_ms``."""
        self._number += 1  # breaks ties: among equals first in, first out
        heapq.heappush(self._heap, (due_ms, self._number, happened))

    def due(self, now_ms: int) -> list[Happened]:
        """Everything whose time has come, earliest first."""
        out: list[Happened] = []
        while self._heap and self._heap[0][0] <= now_ms:
            out.append(heapq.heappop(self._heap)[2])
        return out


def feedback_record(topic: str, user_name: str, happened: Happened) -> OutRecord:
    """As `stream_scorer.core.messages.Feedback`; the same event always has the same ``event_id``."""
    kind = KINDS[happened.kind]
    message = {
        "event_id": f"{happened.request_id}:{happened.item}:{kind}",
        "kind": kind,
        "request_id": happened.request_id,
        "user_id": user_name,
        "item_id": happened.item,
        "ts": happened.at_ms,
    }
    return OutRecord(topic, user_name.encode(), orjson.dumps(message), ())
