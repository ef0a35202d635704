"""What a narrower number type costs in the scores, and where the hardware has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from esmm.batch import RankBatch
from esmm.predictor.config import PrecisionError
from esmm.predictor.fast import FastPredictor
from esmm.predictor.plain import PlainPredictor

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # bf16: how Linux names it on ARM


@dataclass(frozen=True)
class PrecisionBound:
    """A version whose error passes one of these is served in float32. Measured in logits; bfloat16 rounds at 2**-9."""

    max_abs: float = 0.25
    mean_abs: float = 0.02
    bias: float = 0.005

    def exceeded(self, error: PrecisionError) -> str | None:
        """What is wrong, or None; NaN is wrong."""
        for name, value in (("max_abs", error.max_abs), ("mean_abs", error.mean_abs), ("bias", abs(error.bias))):
            limit = getattr(self, name)
            if not value <= limit:
                return f"{name} of the logits' error is {value:.4g}, more than {limit:.4g}"
        return None


def precision_error(fast: FastPredictor, plain: PlainPredictor, batch: RankBatch) -> PrecisionError:
    """Score ``batch`` by both and compare; raises ValueError for a batch without rows."""
    if not batch.rows:
        raise ValueError("precision_error needs a batch with at least one row")
    exact_B2, got_B2 = plain.logits(batch).astype(np.float64), fast.logits(batch).astype(np.float64)
    error_B2 = (got_B2 - exact_B2) / np.maximum(1.0, np.abs(exact_B2))
    true_B2, seen_B2 = _ctr_ctcvr(exact_B2), _ctr_ctcvr(got_B2)
    excess = (_cross_entropy(true_B2, seen_B2) - _cross_entropy(true_B2, true_B2)).mean(0)
    ratio = seen_B2.mean(0) / true_B2.mean(0)
    return PrecisionError(
        rows=batch.rows,
        max_abs=float(np.abs(error_B2).max()),
        mean_abs=float(np.abs(error_B2).mean()),
        bias=float(error_B2.mean()),
        logloss_excess=(float(excess[0]), float(excess[1])),
        pcoc_ratio=(float(ratio[0]), float(ratio[1])),
    )


def supports_bfloat16(device: str = "cpu") -> bool:
    """Whether bfloat16 products run on units made for them there."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(_BFLOAT16_FLAGS & processor_flags())


def processor_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature flags of the first processor; empty where the system does not say (then float32 is served)."""
    try:
        text = path.read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return next((frozenset(v.split()) for name, _, v in lines if name.strip() in ("flags", "Features")), frozenset())


def _ctr_ctcvr(logits_B2: NDArray[np.float64]) -> NDArray[np.float64]:
    p_B2 = 1.0 / (1.0 + np.exp(-np.clip(logits_B2, -30.0, 30.0)))
    return np.stack([p_B2[:, 0], p_B2[:, 0] * p_B2[:, 1]], 1)


def _cross_entropy(true: NDArray[np.float64], seen: NDArray[np.float64]) -> NDArray[np.float64]:
    loss: NDArray[np.float64] = -(true * np.log(seen) + (1.0 - true) * np.log1p(-seen))
    return loss
