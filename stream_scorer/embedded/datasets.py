"""The public logs that can be replayed, by the names the command line uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stream_scorer.embedded.open_bandit import OPEN_BANDIT_TOML, open_bandit
from stream_scorer.embedded.replay import Layouts, Replay, ReplayOptions
from stream_scorer.embedded.taobao import TAOBAO_TOML, taobao

__all__ = ["DATASETS", "Dataset", "Layouts", "Replay", "ReplayOptions", "open_bandit", "taobao"]


class Dataset(NamedTuple):
    """How one data set is replayed: ``open(path, layouts of its schema, options)``."""

    schema_toml: str
    open: Callable[[Path, Layouts, ReplayOptions | None], Replay]


DATASETS: dict[str, Dataset] = {
    "taobao": Dataset(TAOBAO_TOML, taobao),
    "open-bandit": Dataset(OPEN_BANDIT_TOML, open_bandit),
}
