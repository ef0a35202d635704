"""Feedback as the join takes it, read in one go for a whole poll.

`hear_all` gives what `codec.decode_feedback` gives, without a model object an event. Messages that are plain (exactly
the known fields, each of its type and within its bounds) are parsed together as one JSON array; when one of them is not
plain, each is read by itself, and what is not plain goes the long way and is refused or accepted there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Final, NamedTuple

import numpy as np
from orjson import JSONDecodeError, loads

from stream_scorer.core.codec import decode_feedback
from stream_scorer.core.records import Record
from stream_scorer.core.rejects import Reject

KINDS: Final = frozenset(("impression", "click", "conversion"))
PLAIN_BYTES: Final = 256  # no longer, so that no id in it is longer than `messages.Id` allows
END_MS: Final = 1 << 53
_FIELDS: Final = 6
_OPEN, _CLOSE = b"{}"
_heard_fields = itemgetter("kind", "request_id", "item_id", "ts")
_other_fields = itemgetter("event_id", "user_id")


class Heard(NamedTuple):
    """One impression, click or conversion; the fields of `messages.Feedback` that the join needs."""

    kind: str
    request_id: str
    item_id: str
    ts_ms: int


_heard = partial(tuple.__new__, Heard)  # a fifth of what the constructor costs


def hear_all(records: Sequence[Record]) -> list[Heard | Reject]:
    """Read and check feedback messages, in order."""
    values = [record.value or b"" for record in records]
    found = _plain(values)
    return [hear(record) for record in records] if found is None else found


def hear(record: Record) -> Heard | Reject:
    """Read and check one feedback message."""
    value = record.value
    if value and len(value) <= PLAIN_BYTES:
        try:
            message = loads(value)
            heard, others = _heard(_heard_fields(message)), _other_fields(message)
        except (JSONDecodeError, KeyError, TypeError):
            heard, others = None, ()
        if heard is not None and _is_plain([message], [heard], [others]):
            return heard
    event = decode_feedback(record)
    return event if isinstance(event, Reject) else Heard(event.kind, event.request_id, event.item_id, event.ts)


def _plain(values: list[bytes]) -> list[Any] | None:
    """The events, or None when a message is not plain."""
    sizes = list(map(len, values))
    if not values or max(sizes) > PLAIN_BYTES or min(sizes) == 0:
        return None
    joined = b",".join(values)
    if not _apart(joined, sizes):
        return None
    try:
        messages = loads(b"[%b]" % joined)
        heard = list(map(_heard_fields, messages))
        others = list(map(_other_fields, messages))
    except (JSONDecodeError, KeyError, TypeError):
        return None
    return list(map(_heard, heard)) if _is_plain(messages, heard, others) else None


def _is_plain(messages: list[Any], heard: Sequence[tuple[Any, ...]], others: Sequence[tuple[Any, ...]]) -> bool:
    """Whether every field has its type and bounds, and there are no others."""
    kinds, request_ids, item_ids, times = zip(*heard, strict=True)
    event_ids, user_ids = zip(*others, strict=True)
    if set(map(type, kinds)) != {str} or not KINDS.issuperset(kinds):
        return False
    if set(map(type, times)) != {int} or min(times) < 0 or max(times) >= END_MS:
        return False
    for ids in (request_ids, item_ids, event_ids, user_ids):
        if set(map(type, ids)) != {str} or not all(ids):
            return False
    return set(map(len, messages)) == {_FIELDS} or all(map(_nothing_else, messages))


def _apart(joined: bytes, sizes: list[int]) -> bool:
    """Whether every message is one JSON object by itself, if the array of all of them parses.

    Each starts with the only ``{`` and ends with the only ``}`` that it has. So no object spans two messages, and no
    message holds two.
    """
    count = len(sizes)
    if joined.count(b"{") != count or joined.count(b"}") != count:
        return False
    stops = np.cumsum(np.array(sizes) + 1) - 1
    text = np.frombuffer(joined, np.uint8)
    firsts = np.concatenate([[0], stops[:-1] + 1])
    return bool((text[firsts] == _OPEN).all() and (text[stops - 1] == _CLOSE).all())


def _nothing_else(message: dict[str, object]) -> bool:
    """No field but the six, and the schema's version if it says so."""
    if len(message) == _FIELDS:
        return True
    version = message.get("schema_version")
    return len(message) == _FIELDS + 1 and type(version) is int and version == 1
