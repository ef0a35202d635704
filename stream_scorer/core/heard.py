"""Feedback as the join takes it, read in one go for a whole poll.

`hear_all` gives what `codec.decode_feedback` gives, without a model object an event. From the fastest way on, each for
what the one before cannot do:

- alike: all messages have the first one's order of fields and punctuation, as one producer writes them. Then no JSON is
  parsed: quotes are found in all of them at once, what lies between values is compared, and values are cut out.
- plain: exactly the known fields, each of its type and within its bounds. Parsed together as one JSON array.
- each message by itself, pages among them; what is not plain is refused or accepted by `codec.decode_feedback`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from orjson import JSONDecodeError, loads

from esmm.batch import Int64
from stream_scorer.core.codec import FEEDBACK_BYTES, decode_feedback
from stream_scorer.core.messages import MAX_ID, MAX_PAGE
from stream_scorer.core.records import Record
from stream_scorer.core.rejects import Reject

KINDS: Final = frozenset(("impression", "click", "conversion"))
PLAIN_BYTES: Final = MAX_ID  # no longer, so that no id in it is
END_MS: Final = 1 << 53
_PAGE: Final = b'"items"'
_FIELDS: Final = 6
_OPEN, _CLOSE, _QUOTE, _SPACE, _ZERO = b'{}" 0'
_NINE: Final = 9
_MOST_DIGITS: Final = 16
_NUMBER: Final = re.compile(rb'"ts"\s*:\s*(\d+)')
_heard_fields = itemgetter("kind", "request_id", "item_id", "ts")
_other_fields = itemgetter("event_id", "user_id")
_page_fields = itemgetter("kind", "request_id", "items", "ts")


class Heard(NamedTuple):
    """One impression, click or conversion; the fields of `messages.Feedback` that the join needs."""

    kind: str
    request_id: str
    item_id: str
    ts_ms: int


class Page(NamedTuple):
    """Candidates of one request that were shown at once: an impression of each."""

    request_id: str
    items: list[str]  # each once
    ts_ms: int


_heard = partial(tuple.__new__, Heard)  # a fifth of what the constructor costs


def hear_all(records: Sequence[Record]) -> list[Heard | Page | Reject]:
    """Read and check feedback messages, in order."""
    values = [record.value or b"" for record in records]
    joined = b",".join(values)
    if _PAGE not in joined:
        return _hear_single(records, values, joined)
    is_page = [_PAGE in value for value in values]
    records_1 = [record for record, it_is in zip(records, is_page, strict=True) if not it_is]
    values_1 = [value for value, it_is in zip(values, is_page, strict=True) if not it_is]
    heard = iter(_hear_single(records_1, values_1, b",".join(values_1)))
    return [hear(record) if it_is else next(heard) for record, it_is in zip(records, is_page, strict=True)]


def _hear_single(records: Sequence[Record], values: list[bytes], joined: bytes) -> list[Heard | Page | Reject]:
    """Messages of one candidate each; ``joined`` by commas."""
    sizes = list(map(len, values))
    found = None
    if values and max(sizes) <= PLAIN_BYTES and min(sizes) > 0:
        found = _alike(values[0], joined, sizes) or _plain(joined, sizes)
    return [hear(record) for record in records] if found is None else found


def hear(record: Record) -> Heard | Page | Reject:
    """Read and check one feedback message."""
    value = record.value or b""
    found = _page(value) if _PAGE in value else _single(value)
    if found is not None:
        return found
    event = decode_feedback(record)
    if isinstance(event, Reject):
        return event
    if event.items:
        return Page(event.request_id, event.items, event.ts)
    return Heard(event.kind, event.request_id, event.item_id, event.ts)


def _single(value: bytes) -> Heard | None:
    """A plain message of one candidate."""
    if not value or len(value) > PLAIN_BYTES:
        return None
    try:
        message = loads(value)
        heard, others = _heard(_heard_fields(message)), _other_fields(message)
    except (JSONDecodeError, KeyError, TypeError):
        return None
    return heard if _is_plain([message], [heard], [others]) else None


def _page(value: bytes) -> Page | None:
    """A plain message of several candidates."""
    try:
        message = loads(value)
        kind, request_id, items, ts = _page_fields(message)
        ids = (request_id, *_other_fields(message), *items)
    except (JSONDecodeError, KeyError, TypeError):
        return None
    if kind != "impression" or type(ts) is not int or not 0 <= ts < END_MS:
        return None
    if set(map(type, ids)) != {str} or not all(ids) or max(map(len, ids)) > MAX_ID:
        return None
    if type(items) is not list or not 0 < len(set(items)) == len(items) <= MAX_PAGE:
        return None
    if len(value) > FEEDBACK_BYTES or not _nothing_else(message):
        return None
    return Page(request_id, items, ts)


class _Pattern(NamedTuple):
    """A plain message as V values in quotes and a number, with T = V + 1 texts before, between and after them."""

    quoted: int  # names and values in quotes
    opens_V: Int64  # which quote begins each value
    heard: list[int]  # which of the values are kind, request and item
    size_T: Int64  # bytes of each text, the number included
    fixed: list[tuple[int, int, bytes]]  # what is the same in all messages: in which text, where in it, and what
    number: tuple[int, int, int]  # in which text the number lies, where in it, and its digits


def _pattern(message: bytes) -> _Pattern | None:
    """How a message is written, None when it is not plain."""
    try:
        fields: dict[str, Any] = loads(message)
        if not _is_plain([fields], [_heard_fields(fields)], [_other_fields(fields)]):
            return None
    except (JSONDecodeError, KeyError, TypeError):
        return None
    quotes = [at for at, char in enumerate(message) if char == _QUOTE]
    values = [name for name, value in fields.items() if type(value) is str]
    quoted = [is_value for name in fields for is_value in ((False, True) if name in values else (False,))]
    if len(quotes) != 2 * len(quoted):
        return None
    opens = [2 * at for at, is_value in enumerate(quoted) if is_value]
    begins, ends = [quotes[at] + 1 for at in opens], [quotes[at + 1] for at in opens]
    texts = [message[a:b] for a, b in zip([0, *ends], [*begins, len(message)], strict=True)]
    places = ((at, found.span(1)) for at, text in enumerate(texts) if (found := _NUMBER.search(text)))
    holder, (low, high) = next(places, (-1, (0, 0)))
    if holder < 0:  # -0 is a time too
        return None
    fixed = [(at, 0, text) for at, text in enumerate(texts) if at != holder]
    fixed += [(holder, 0, texts[holder][:low]), (holder, high, texts[holder][high:])]
    return _Pattern(
        quoted=len(quoted),
        opens_V=np.array(opens, np.int64),
        heard=[values.index(name) for name in ("kind", "request_id", "item_id")],
        size_T=np.array(list(map(len, texts)), np.int64),
        fixed=fixed,
        number=(holder, low, high - low),
    )


def _alike(first: bytes, joined: bytes, sizes: list[int]) -> list[Any] | None:
    """The events, or None when a message is not like the first one, or not of plain ASCII."""
    if b"\\" in joined or not joined.isascii():
        return None
    pattern = _pattern(first)
    if pattern is None:
        return None
    text = np.frombuffer(joined, np.uint8)
    stop_N = np.cumsum(np.array(sizes) + 1) - 1
    start_N = stop_N - sizes
    quote = np.flatnonzero(text == _QUOTE)
    if len(quote) != len(sizes) * 2 * pattern.quoted or int(text.min()) < _SPACE:
        return None
    quote_NQ = quote.reshape(len(sizes), -1)
    begin_NV, end_NV = quote_NQ[:, pattern.opens_V] + 1, quote_NQ[:, pattern.opens_V + 1]
    if (quote_NQ[:, 0] < start_N).any() or (quote_NQ[:, -1] >= stop_N).any() or (begin_NV == end_NV).any():
        return None
    from_NT = np.concatenate([start_N[:, None], end_NV], axis=1)
    to_NT = np.concatenate([begin_NV, stop_N[:, None]], axis=1)
    if ((to_NT - from_NT) != pattern.size_T).any():
        return None
    if any(
        _cut(joined, from_NT[:, at] + low, len(same)).tobytes() != same * len(sizes) for at, low, same in pattern.fixed
    ):
        return None
    at, low, digits = pattern.number
    digit_ND = _cut(joined, from_NT[:, at] + low, digits).view(np.uint8).reshape(-1, digits).astype(np.int64) - _ZERO
    if (digit_ND > _NINE).any() or (digit_ND < 0).any() or (digit_ND[:, 0] == 0).any() or digits > _MOST_DIGITS:
        return None
    time_N = digit_ND @ 10 ** np.arange(digits - 1, -1, -1, dtype=np.int64)
    if int(time_N.max()) >= END_MS:
        return None
    chars = joined.decode("ascii")
    spans = zip(begin_NV[:, pattern.heard].T.tolist(), end_NV[:, pattern.heard].T.tolist(), strict=True)
    kinds, request_ids, item_ids = ([chars[a:b] for a, b in zip(*span, strict=True)] for span in spans)
    if not KINDS.issuperset(kinds):
        return None
    return list(map(_heard, zip(kinds, request_ids, item_ids, time_N.tolist(), strict=True)))


def _cut(joined: bytes, at_N: Int64, size: int) -> NDArray[np.void]:
    """So many bytes from each place on; the places leave room for them."""
    everywhere = np.ndarray((len(joined) - size + 1,), f"V{size}", joined, 0, (1,))
    return everywhere[at_N]


def _plain(joined: bytes, sizes: list[int]) -> list[Any] | None:
    """The events, or None when a message is not plain."""
    if not _apart(joined, sizes):
        return None
    try:
        messages = loads(b"[%b]" % joined)
        heard = list(map(_heard_fields, messages))
        others = list(map(_other_fields, messages))
    except (JSONDecodeError, KeyError, TypeError):
        return None
    if len(messages) != len(sizes):
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
    """Whether every message is one JSON object by itself, if the array of all of them parses to as many.

    Each starts with the only ``{`` and ends with the only ``}`` that it has. With as many objects none of these lies in
    a string, so no object spans two messages, and no message holds two.
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
