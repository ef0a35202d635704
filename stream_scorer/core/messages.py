"""The public wire contract, as pydantic models. JSON unless said otherwise; unknown fields are rejected.

Times are integer milliseconds since the epoch. All topics are keyed by ``user_id``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_ID = 256  # characters
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Millis = Annotated[int, Field(ge=0, lt=1 << 53)]
Number = float | int
ContextValue = Number | list[Number]
SCHEMA_VERSION = 1
MAX_PAGE = 1_000  # candidates that one impression may name


def _without_default(schema: dict[str, Any]) -> None:
    """The empty text stands for a field that is not there; in a message it is refused."""
    schema.pop("default", None)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ScoreRequest(_Wire):
    """Topic ``score-requests``: score these candidates for this user.

    ``context`` holds one value a request for each context feature; ``item_context`` one value a candidate. A context
    feature that is in neither is 0. A varlen or wide dense feature is a list.
    """

    request_id: Id
    user_id: Id
    items: Annotated[list[Id], Field(min_length=1)]
    ts: Millis
    context: dict[str, ContextValue] = Field(default_factory=dict)
    item_context: dict[str, list[ContextValue]] = Field(default_factory=dict)
    schema_version: Literal[1] = 1


class ScoreMessage(_Wire):
    """Topic ``scores``: columnar, one entry a candidate in the request's order; ``0 <= ctcvr <= ctr <= 1``.

    ``missing`` lists the candidates whose item features were not found (default vector used); ``-1`` is the user.
    ``feature_age_ms`` is the age of the oldest feature record used, at ``scored_at``; -1 when none was found.
    ``degraded`` is true when the feature store could not answer in time.
    Headers: ``request_id``, ``source`` (``topic/partition/offset`` of the request): either finds duplicates.
    """

    request_id: Id
    user_id: Id
    model_version: int
    items: list[Id]
    ctr: list[float]
    cvr: list[float]
    ctcvr: list[float]
    degraded: bool
    missing: list[int]
    feature_age_ms: int
    ts: Millis
    scored_at: Millis
    schema_version: Literal[1] = 1


class Feedback(_Wire):
    """Topic ``feedback``: what a user did with one scored candidate, ``item_id``.

    An impression may name all candidates of a page that were shown at once, in ``items`` and not in ``item_id``: one
    message in place of many, which is what a busy trainer spends its time on.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["item_id"], "properties": {"items": False}},
                {"required": ["items"], "properties": {"item_id": False, "kind": {"const": "impression"}}},
            ]
        }
    )

    event_id: Id
    kind: Literal["impression", "click", "conversion"]
    request_id: Id
    user_id: Id
    item_id: Annotated[Id, Field(json_schema_extra=_without_default)] = ""
    items: Annotated[list[Id], Field(min_length=1, max_length=MAX_PAGE, json_schema_extra={"uniqueItems": True})] = (
        Field(default_factory=list)
    )
    ts: Millis
    schema_version: Literal[1] = 1

    @model_validator(mode="after")
    def _one_or_many(self) -> Self:
        if bool(self.item_id) == bool(self.items):
            raise ValueError("either item_id or items")
        if self.items and (self.kind != "impression" or len(set(self.items)) < len(self.items)):
            raise ValueError("items are of an impression, each once")
        return self
