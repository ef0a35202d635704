"""deploy/contracts is what the code says: run ``python -m tests.tools.wire_contracts`` after changing a message."""

from __future__ import annotations

import json

import pytest
import yaml
from pydantic import ValidationError

from stream_scorer.core.records import Position, Record
from stream_scorer.core.rejects import Reject, reject_record
from tests.tools.wire_contracts import CONTRACTS, EXAMPLES, JSON_TOPICS, REJECT_HEADERS, TOPICS, documents, json_schema


@pytest.mark.parametrize("name", sorted(documents()))
def test_document_is_up_to_date(name: str) -> None:
    assert (CONTRACTS / name).read_text() == documents()[name], "run: python -m tests.tools.wire_contracts"


def test_no_document_is_left_over() -> None:
    assert {path.name for path in CONTRACTS.iterdir()} == set(documents())


@pytest.mark.parametrize("topic", sorted(JSON_TOPICS))
def test_example_is_valid_and_complete_enough(topic: str) -> None:
    text = json.dumps(EXAMPLES[topic])
    JSON_TOPICS[topic].model_validate_json(text)
    for name in json.loads((CONTRACTS / f"{topic}.schema.json").read_text())["required"]:
        shorter = {key: value for key, value in EXAMPLES[topic].items() if key != name}
        with pytest.raises(ValidationError):
            JSON_TOPICS[topic].model_validate_json(json.dumps(shorter))


@pytest.mark.parametrize("topic", sorted(JSON_TOPICS))
def test_unknown_fields_are_refused_in_schema_and_code(topic: str) -> None:
    assert json.loads((CONTRACTS / f"{topic}.schema.json").read_text())["additionalProperties"] is False
    with pytest.raises(ValidationError):
        JSON_TOPICS[topic].model_validate_json(json.dumps({**EXAMPLES[topic], "surprise": 1}))


def test_asyncapi_names_every_topic_and_every_reference_resolves() -> None:
    document = yaml.safe_load((CONTRACTS / "asyncapi.yaml").read_text())
    assert document["asyncapi"].startswith("3.")
    assert set(document["channels"]) == set(TOPICS.model_dump().values())
    used = {operation["channel"]["$ref"].split("/")[-1] for operation in document["operations"].values()}
    assert used == set(document["channels"])
    references = _references(document)
    assert len(references) > 10
    for reference in references:
        if reference.startswith("#/"):
            node = document
            for part in reference[2:].split("/"):
                node = node[part]
        else:
            assert (CONTRACTS / reference).is_file()


def _references(node: object) -> list[str]:
    if isinstance(node, dict):
        here = [node["$ref"]] if "$ref" in node else []
        return here + [one for value in node.values() for one in _references(value)]
    if isinstance(node, list):
        return [one for value in node for one in _references(value)]
    return []


def test_reject_headers_are_those_of_the_code() -> None:
    record = Record(Position("score-requests", 3, 41), b"u7", b"{", (), 1_700_000_000_000, 0)
    out = reject_record(Reject(record, "json", "EOF"), "score-rejects", "0.1.0")
    assert [name for name, _ in out.headers] == list(REJECT_HEADERS)


@pytest.mark.parametrize("topic", JSON_TOPICS)
def test_every_example_in_a_document_is_a_message(topic: str) -> None:
    examples = json_schema(topic)["examples"]
    for example in examples:
        JSON_TOPICS[topic].model_validate_json(json.dumps(example))
    assert len(examples) == (2 if topic == "feedback" else 1)
