"""A model version -> a predictor that is warm, and knows what its precision costs."""

from __future__ import annotations

from dataclasses import replace

from esmm.batch import RankBatch
from esmm.model import ESMM
from esmm.predictor.config import PrecisionError, PredictorConfig
from esmm.predictor.fast import FastPredictor
from esmm.predictor.plain import PlainPredictor
from esmm.predictor.precision import PrecisionBound, precision_error, supports_bfloat16

FLOAT32_BOUND = PrecisionBound(max_abs=1e-2, mean_abs=1e-3, bias=1e-3)  # another order of sums; more is a defect


def build_predictor(
    model: ESMM,
    version: int,
    config: PredictorConfig,
    probe: RankBatch | None = None,
    bound: PrecisionBound | None = None,
) -> FastPredictor:
    """Build and warm the fast path; compare it with the plain one on ``probe`` (a version's golden rows, say).

    bfloat16 that the hardware lacks, or whose error passes ``bound``, becomes float32, with a warning in
    `FastPredictor.served`. Raises ValueError when even float32 differs from the plain path: do not serve the version.
    """
    warning = None
    if config.precision == "bfloat16" and not supports_bfloat16(config.device):
        config, warning = replace(config, precision="float32"), f"{config.device} has no bfloat16 units"
    predictor, excess = _probed(model, version, config, probe, bound or PrecisionBound())
    if excess is not None and config.precision == "bfloat16":
        predictor.close()
        config, warning = (
            replace(config, precision="float32"),
            f"bfloat16 is too coarse for version {version}: {excess}",
        )
        predictor, excess = _probed(model, version, config, probe, FLOAT32_BOUND)
    if excess is not None:
        predictor.close()
        raise ValueError(f"version {version}: the fast path differs from the plain one: {excess}")
    warnings = [text for text in (warning, predictor.served.warning) if text]
    predictor.served = predictor.served._replace(warning="; ".join(warnings) or None)
    return predictor


def _probed(
    model: ESMM, version: int, config: PredictorConfig, probe: RankBatch | None, bound: PrecisionBound
) -> tuple[FastPredictor, str | None]:
    """A warm predictor, and in which way its error on the probe is too large."""
    predictor = FastPredictor(model, version, config)
    try:
        predictor.warm()
        if probe is None or not probe.rows:
            return predictor, None
        error: PrecisionError = precision_error(predictor, PlainPredictor(model, version), probe)
    except BaseException:
        predictor.close()
        raise
    predictor.served = predictor.served._replace(error=error)
    return predictor, (FLOAT32_BOUND if config.precision == "float32" else bound).exceeded(error)
