"""A public log as matured examples: what `stream-scorer pretrain --dataset` learns from.

The log is replayed as it would be through Kafka, so features are those of the moment of each impression and labels come
from the same events; only nobody scores. An impression counts when its windows are over before the log ends: a younger
one may still be clicked or convert. Labels follow the trainer's rules: a click within the click window of its
impression, a conversion within the attribution window of its click.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Examples, FeatureBlock, Kind, concat_blocks
from esmm.features import FeatureSchema
from stream_scorer.core.assemble import context_block
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.messages import Feedback, ScoreRequest
from stream_scorer.embedded.datasets import DATASETS
from stream_scorer.embedded.replay import FeatureUpdate, Layouts, ReplayOptions, ReplayReport, Request
from stream_scorer.settings import Settings
from stream_scorer.wiring.replay import schema_text

CHUNK = 20_000
_NONE = -1


@dataclass(frozen=True)
class Windows:
    """The trainer's, in milliseconds."""

    click_ms: int
    attribution_ms: int

    @classmethod
    def of(cls, settings: Settings) -> Windows:
        """As set."""
        trainer = settings.trainer
        return cls(int(trainer.click_window_s * 1000), int(trainer.attribution_window_s * 1000))


def read_log(
    dataset: str, path: Path, schema: FeatureSchema, windows: Windows, options: ReplayOptions
) -> tuple[Examples, ReplayReport]:
    """First emissions of B impressions with their final labels, in time order, and what was read.

    `ConfigurationError` for an unknown dataset, another schema, a file that is no such log, or one shorter than the
    windows.
    """
    if schema != FeatureSchema.from_toml(schema_text(dataset)):
        raise ConfigurationError(
            f"model.schema_file is not the schema of {dataset}: write it with "
            f"`stream-scorer replay {dataset} {path} --print-schema`"
        )
    layouts = Layouts(schema.layout("user"), schema.layout("item"))
    replay = DATASETS[dataset].open(path, layouts, options)
    impressions = _Impressions(schema)
    for action in replay:
        if isinstance(action, FeatureUpdate):
            impressions.update(action)
        elif isinstance(action, Request):
            impressions.ask(action.message)
        else:
            impressions.hear(action.message)
    examples = impressions.matured(windows, options.retime(replay.report.last_ms))
    if examples.rows == 0:
        raise ConfigurationError(
            f"{path}: no impression is older at the log's end than click_window_s + attribution_window_s, so no label "
            f"is final; set [trainer] windows that fit the log"
        )
    return examples, replay.report


@dataclass
class _Impressions:
    """Everything that was asked for, one item a request; memory grows with the log, as the table's does."""

    schema: FeatureSchema
    entities: dict[tuple[str, str], tuple[NDArray[np.int64], NDArray[np.float32]]] = field(default_factory=dict)
    waiting: list[tuple[ScoreRequest, FeatureBlock, FeatureBlock]] = field(default_factory=list)
    blocks: list[tuple[FeatureBlock, FeatureBlock, FeatureBlock]] = field(default_factory=list)
    row_of: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[int]] = field(default_factory=lambda: {"impression": [], "click": [], "conversion": []})

    def update(self, action: FeatureUpdate) -> None:
        for row, name in enumerate(action.ids):
            self.entities[action.entity, name] = (action.block.ids_NS[row], action.block.dense_ND[row])

    def ask(self, message: ScoreRequest) -> None:
        user, item = self.entities["user", message.user_id], self.entities["item", message.items[0]]
        self.waiting.append((message, FeatureBlock(*user), FeatureBlock(*item)))
        self.row_of[message.request_id] = len(self.row_of)
        for column in self.times.values():
            column.append(_NONE)
        if len(self.waiting) == CHUNK:
            self._assemble()

    def hear(self, event: Feedback) -> None:
        column, row = self.times[event.kind], self.row_of[event.request_id]
        if column[row] == _NONE:
            column[row] = event.ts

    def matured(self, windows: Windows, end_ms: int) -> Examples:
        self._assemble()
        shown_B, click_B, bought_B = (np.array(column, np.int64) for column in self.times.values())
        clicked_B = (click_B != _NONE) & (click_B <= shown_B + windows.click_ms)
        converted_B = clicked_B & (bought_B != _NONE) & (bought_B <= click_B + windows.attribution_ms)
        final_B = end_ms > shown_B + windows.click_ms + windows.attribution_ms  # of clicked and unclicked ones alike
        final_B &= shown_B != _NONE
        rows = len(shown_B)
        user, item, context = (concat_blocks(list(parts)) for parts in zip(*self.blocks, strict=True))
        label_B, none_B = converted_B.astype(np.float32), np.zeros(rows, np.float32)
        examples = Examples(
            user,
            item,
            context,
            np.full(rows, Kind.FIRST, np.uint8),
            clicked_B.astype(np.float32),
            label_B,
            label_B,
            none_B,
            none_B,
            np.zeros(rows, np.int64),
            shown_B,
        )
        return examples.take(np.flatnonzero(final_B))

    def _assemble(self) -> None:
        if not self.waiting:
            return
        requests = [message for message, _, _ in self.waiting]
        starts = np.arange(len(requests) + 1)
        user, item = (
            FeatureBlock(np.stack([b.ids_NS for b in blocks]), np.stack([b.dense_ND for b in blocks]))
            for blocks in ([u for _, u, _ in self.waiting], [i for _, _, i in self.waiting])
        )
        self.blocks.append((user, item, context_block(requests, starts, self.schema.layout("context"))))
        self.waiting.clear()
