"""The wire contract as documents, made from the code: ``python -m tests.tools.wire_contracts`` writes deploy/contracts.

JSON Schema a JSON topic, from the pydantic models; AsyncAPI 3.0 for all five topics, with headers and keys.
`tests/contract/test_wire_schemas.py` fails when the files and the code differ.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from stream_scorer.core import served
from stream_scorer.core.messages import SCHEMA_VERSION, Feedback, ScoreMessage, ScoreRequest
from stream_scorer.core.rejects import Reason
from stream_scorer.settings import Topics

CONTRACTS = Path(__file__).parents[2] / "deploy" / "contracts"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
TOPICS = Topics()
JSON_TOPICS: dict[str, type[BaseModel]] = {
    TOPICS.requests: ScoreRequest,
    TOPICS.scores: ScoreMessage,
    TOPICS.feedback: Feedback,
}
EXAMPLES: dict[str, dict[str, Any]] = {
    TOPICS.requests: {
        "request_id": "r1",
        "user_id": "u7",
        "items": ["i3", "i9"],
        "ts": 1_700_000_000_000,
        "context": {"hour": 13},
        "item_context": {"position": [1, 2]},
    },
    TOPICS.scores: {
        "request_id": "r1",
        "user_id": "u7",
        "model_version": 12,
        "items": ["i3", "i9"],
        "ctr": [0.21, 0.08],
        "cvr": [0.1, 0.25],
        "ctcvr": [0.021, 0.02],
        "degraded": False,
        "missing": [1],
        "feature_age_ms": 5_210,
        "ts": 1_700_000_000_000,
        "scored_at": 1_700_000_000_007,
        "schema_version": 1,
    },
    TOPICS.feedback: {
        "event_id": "e5",
        "kind": "click",
        "request_id": "r1",
        "user_id": "u7",
        "item_id": "i3",
        "ts": 1_700_000_004_000,
    },
}
PAGE = {
    "event_id": "e4",
    "kind": "impression",
    "request_id": "r1",
    "user_id": "u7",
    "items": ["i3", "i9"],
    "ts": 1_700_000_002_000,
}
SCORE_HEADERS = {"request_id": "The request's id.", "source": "topic/partition/offset of the request."}
REJECT_HEADERS = {
    "reason": "Why, one word.",
    "detail": "Why, one line for a person.",
    "topic": "Where the message was read.",
    "partition": "Where the message was read, decimal.",
    "offset": "Where the message was read, decimal.",
    "time": "Its timestamp, milliseconds since the epoch, decimal.",
    "version": "The version of the code that refused it.",
}


def json_schema(topic: str) -> dict[str, Any]:
    """JSON Schema of one message of a JSON topic."""
    schema = JSON_TOPICS[topic].model_json_schema(by_alias=True)
    examples = [EXAMPLES[topic], PAGE] if topic == TOPICS.feedback else [EXAMPLES[topic]]
    return {"$schema": DIALECT, "$id": f"{topic}.schema.json", **schema, "examples": examples}


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3.0: what this application receives and sends."""
    receive = {TOPICS.requests: "scorer", TOPICS.served: "trainer", TOPICS.feedback: "trainer"}
    send = {TOPICS.scores: "scorer", TOPICS.served: "scorer", TOPICS.rejects: "scorer or trainer"}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "stream-scorer",
            "version": f"{SCHEMA_VERSION}.0.0",
            "license": {"name": "Apache-2.0"},
            "description": "Topic names are the defaults of `kafka.topics`. Every message is keyed by user_id, "
            "except in score-rejects, which keeps the key it had. Times are integer milliseconds since the epoch. "
            "Unknown fields are rejected.",
        },
        "defaultContentType": "application/json",
        "channels": {
            topic: {
                "address": topic,
                "description": _channel_text(topic),
                "messages": {topic: {"$ref": f"#/components/messages/{topic}"}},
            }
            for topic in TOPICS.model_dump().values()
        },
        "operations": {
            **{f"receive-{topic}": _operation("receive", topic, who) for topic, who in receive.items()},
            **{f"send-{topic}": _operation("send", topic, who) for topic, who in send.items()},
        },
        "components": {"messages": {topic: _message(topic) for topic in TOPICS.model_dump().values()}},
    }


def _operation(action: str, topic: str, who: str) -> dict[str, Any]:
    verb = "reads" if action == "receive" else "writes"
    return {"action": action, "channel": {"$ref": f"#/channels/{topic}"}, "summary": f"The {who} {verb} {topic}."}


def _channel_text(topic: str) -> str:
    if topic in JSON_TOPICS:
        return inspect.getdoc(JSON_TOPICS[topic]) or ""
    if topic == TOPICS.served:
        return (inspect.getdoc(served) or "").split("\n\nWritten by hand")[0]
    reasons = ", ".join(Reason.__args__)  # type: ignore[attr-defined]
    return f"The original bytes, untouched, of a message that could not be used. Reasons: {reasons}."


def _message(topic: str) -> dict[str, Any]:
    message: dict[str, Any] = {"name": topic}
    if topic == TOPICS.scores:
        message["headers"] = _headers(SCORE_HEADERS)
    if topic == TOPICS.rejects:
        message["headers"] = _headers(REJECT_HEADERS)
    if topic in JSON_TOPICS:
        message |= {"contentType": "application/json", "payload": {"$ref": f"./{topic}.schema.json"}}
    else:
        message |= {"contentType": "application/octet-stream", "payload": {"type": "string", "format": "binary"}}
    message["bindings"] = {"kafka": {"key": {"type": "string"}, "bindingVersion": "0.5.0"}}
    return message


def _headers(names: dict[str, str]) -> dict[str, Any]:
    return {"type": "object", "properties": {k: {"type": "string", "description": v} for k, v in names.items()}}


class _Blocks(yaml.SafeDumper):
    """Text of several lines as it reads."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _text)


def documents() -> dict[str, str]:
    """File name -> text, all that deploy/contracts holds."""
    out = {f"{topic}.schema.json": json.dumps(json_schema(topic), indent=2) + "\n" for topic in JSON_TOPICS}
    head = "# Made by `python -m tests.tools.wire_contracts`: change the code and run it again.\n"
    out["asyncapi.yaml"] = head + yaml.dump(asyncapi(), Dumper=_Blocks, sort_keys=False, width=110, allow_unicode=True)
    return out


def main() -> None:
    """Write the files."""
    CONTRACTS.mkdir(parents=True, exist_ok=True)
    for name, text in documents().items():
        (CONTRACTS / name).write_text(text)
        print(f"deploy/contracts/{name}")


if __name__ == "__main__":
    main()
