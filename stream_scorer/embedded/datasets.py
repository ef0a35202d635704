"""The public logs that can be replayed, by the names the command line uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stream_scorer.embedded.ali_ccp import ALI_CCP_TOML, ali_ccp
from stream_scorer.embedded.criteo_attribution import CRITEO_ATTRIBUTION_TOML, criteo_attribution
from stream_scorer.embedded.criteo_conversions import CRITEO_CONVERSIONS_TOML, criteo_conversions
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
    "criteo-conversions": Dataset(CRITEO_CONVERSIONS_TOML, criteo_conversions),
    "criteo-attribution": Dataset(CRITEO_ATTRIBUTION_TOML, criteo_attribution),
    "ali-ccp": Dataset(ALI_CCP_TOML, ali_ccp),
}
