"""Feedback as the join takes it, read an event at a time in about a microsecond.

`hear` is `codec.decode_feedback` without the model object: a message that is plain (exactly the known fields, each of
its type and within its bounds) is read here, every other one goes the long way and is refused or accepted there.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Final, NamedTuple

from orjson import loads

from stream_scorer.core.codec import decode_feedback
from stream_scorer.core.messages import Feedback
from stream_scorer.core.records import Record
from stream_scorer.core.rejects import Reject

KINDS: Final = frozenset(("impression", "click", "conversion"))
PLAIN_BYTES: Final = 256  # no longer, so that no id in it is longer than `messages.Id` allows
END_MS: Final = 1 << 53
_VERSIONED: Final = 7  # fields with the schema's version, which may be left out
_fields = itemgetter("kind", "request_id", "item_id", "ts", "event_id", "user_id")


class Heard(NamedTuple):
    """One impression, click or conversion; the fields of `messages.Feedback` that the join needs."""

    kind: str
    request_id: str
    item_id: str
    ts: int


def hear(record: Record) -> Heard | Feedback | Reject:
    """Read and check one feedback message."""
    value = record.value
    if value and len(value) <= PLAIN_BYTES:
        try:
            message = loads(value)
            kind, request_id, item_id, ts, event_id, user_id = _fields(message)
        except (ValueError, KeyError, TypeError):
            return decode_feedback(record)
        if (
            type(request_id) is type(item_id) is type(event_id) is type(user_id) is str
            and type(ts) is int
            and 0 <= ts < END_MS
            and (request_id and item_id and event_id and user_id)
            and type(kind) is str
            and kind in KINDS
            and _nothing_else(message)
        ):
            return Heard(kind, request_id, item_id, ts)
    return decode_feedback(record)


def _nothing_else(message: dict[str, object]) -> bool:
    """No field but the six, and the schema's version if it says so."""
    if len(message) == _VERSIONED:
        version = message.get("schema_version")
        return type(version) is int and version == 1
    return len(message) == _VERSIONED - 1
