"""A scored batch -> the messages to send: for each request one on ``scores`` and, when wanted, one on ``served``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stream_scorer.core.codec import ScoredBatch, encode_scores
from stream_scorer.core.records import OutRecord, Position, Record
from stream_scorer.core.served import Dense, ServedLayout, encode_served


@dataclass(frozen=True)
class OutputPolicy:
    """Where and how results are written. ``served_topic`` None: what was served is not published."""

    scores_topic: str
    rejects_topic: str
    served_topic: str | None
    layout: ServedLayout
    served_top_k: int = 50
    served_dtype: Dense = "float32"
    code_version: str = ""  # of this program, for reject headers

    @property
    def messages_a_request(self) -> int:
        """How many messages `score_messages` gives for each request."""
        return 1 if self.served_topic is None else 2


def score_messages(scored: ScoredBatch, records: Sequence[Record], policy: OutputPolicy) -> list[list[OutRecord]]:
    """Messages of each request, in order; ``records`` are what the requests were read from.

    All are keyed by user id. Headers of ``scores``: request_id, and source (topic/partition/offset of the request).
    """
    out = []
    for request, record, body in zip(scored.requests, records, encode_scores(scored), strict=True):
        headers = (("request_id", request.request_id.encode()), ("source", source_header(record.position)))
        out.append([OutRecord(policy.scores_topic, request.user_id.encode(), body, headers)])
    if policy.served_topic is not None:
        bodies = encode_served(scored, policy.layout, policy.served_top_k, policy.served_dtype)
        for messages, body in zip(out, bodies, strict=True):
            messages.append(OutRecord(policy.served_topic, messages[0].key, body, ()))
    return out


def source_header(position: Position) -> bytes:
    """``topic/partition/offset``: the same for every copy of a result, so that a reader can drop duplicates."""
    return f"{position.topic}/{position.partition}/{position.offset}".encode()
