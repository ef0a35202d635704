"""How a predictor is to run, and the batch on its way through it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple

from esmm.batch import Scores

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class PredictorConfig:
    """How to run; frozen, and the same for every version a process serves.

    ``precision``: of the item cache and of the layers between the first and the last. ``threads``: of torch, inside one
    batch. ``script``: the rows' part as one call that holds no interpreter lock; False runs it operation by operation.
    ``compile``: `torch.compile` it instead. ``cache_items`` and ``cache_megabytes`` bound the cache of item
    parts, whichever is less. ``max_rows``: a larger batch is computed in several goes. ``buckets``: row counts that
    batches are padded to where shapes must be static (compiled); at most 8, ascending.
    """

    precision: Precision = "float32"
    threads: int = 1
    script: bool = True
    compile: bool = False
    device: str = "cpu"
    cache_items: int = 100_000
    cache_megabytes: int = 1024
    max_rows: int = 10_240
    buckets: tuple[int, ...] = (64, 256, 1024, 2048, 4096, 10_240)

    def __post_init__(self) -> None:
        """Refuse what cannot be run; raises ValueError."""
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        if self.threads < 1 or self.max_rows < 1 or self.cache_items < 0 or self.cache_megabytes < 0:
            raise ValueError(f"threads and max_rows must be at least 1, cache sizes at least 0, got {self}")
        if not 1 <= len(self.buckets) <= 8 or min(self.buckets) < 1 or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"buckets must be 1 to 8 ascending row counts, got {self.buckets}")


class Pending(NamedTuple):
    """A launched batch."""

    rows: int
    future: Future[Scores]


class PrecisionError(NamedTuple):
    """Fast against plain over a batch, in logits (relative where a logit is above one); pairs are (CTR, CTCVR).

    ``logloss_excess``: expected rise of the logloss, in nats, if the plain probabilities are true. ``pcoc_ratio``:
    what the calibration ratio is multiplied by.
    """

    rows: int
    max_abs: float
    mean_abs: float
    bias: float
    logloss_excess: tuple[float, float]
    pcoc_ratio: tuple[float, float]


class Served(NamedTuple):
    """The precision a version is served in, its error where it was probed, and why it is not the one asked for."""

    precision: Precision
    error: PrecisionError | None
    warning: str | None
