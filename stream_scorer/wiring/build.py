"""Settings -> adapters: one small function a part, so that every command builds the same thing the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from esmm.admission import AdmissionRule
from esmm.batch import RankBatch, Scores
from esmm.checkpoint import CheckpointError, Loaded, golden_batch, load_version, probe, save_version
from esmm.delay import Method, method_named, served_ctcvr
from esmm.features import FeatureSchema
from esmm.learner import Evaluator, Learner, LearnerConfig
from esmm.model import ESMM
from esmm.optim import RowRule
from esmm.predictor.build import build_predictor
from esmm.predictor.config import PredictorConfig
from stream_scorer import __version__
from stream_scorer.adapters.join_rocks import RocksJoinState
from stream_scorer.adapters.join_state import MemoryJoinState
from stream_scorer.core.codec import RequestLimits
from stream_scorer.core.errors import ConfigurationError, ModelRefused
from stream_scorer.core.gate import GatePolicy
from stream_scorer.core.join_entry import JoinPolicy
from stream_scorer.core.output import OutputPolicy
from stream_scorer.core.rejects import StormPolicy
from stream_scorer.core.scoreboard import ScoreboardPolicy
from stream_scorer.core.served import ServedLayout
from stream_scorer.core.watermark import WatermarkPolicy
from stream_scorer.ports import JoinState, Pending, Predictor, VersionInfo
from stream_scorer.scorer import ScorerPolicy
from stream_scorer.settings import Settings
from stream_scorer.trainer import TrainerPolicy

JOIN_SCRATCH = "join-scratch"
TICKS = 20  # in a click window: what falls due waits for up to a twentieth of it

_log = structlog.get_logger("stream_scorer")


def predictor_config(settings: Settings) -> PredictorConfig:
    """How every version is run."""
    scorer = settings.scorer
    return PredictorConfig(
        precision=scorer.precision,
        threads=scorer.threads,
        compile=scorer.compile,
        device=scorer.device,
        cache_items=settings.redis.cache_items,
    )


def loader(schema: FeatureSchema, config: PredictorConfig) -> Callable[[VersionInfo], Predictor]:
    """What the watcher calls: verify, probe, build and warm a version, or raise `ModelRefused`."""

    def load(info: VersionInfo) -> Predictor:
        try:
            loaded = load_version(info.path, schema.hash)
            probe(loaded)
            predictor = _predictor(loaded, info.version, config)
        except CheckpointError as error:
            raise ModelRefused(info.version, error.reason, error.detail) from error
        except ValueError as error:
            raise ModelRefused(info.version, "probe", str(error)) from error
        return predictor

    return load


def _predictor(loaded: Loaded, version: int, config: PredictorConfig) -> Predictor:
    """Warm, compared with the plain path on the golden rows, with the method's correction of CTCVR if any."""
    golden = None if loaded.golden is None else golden_batch(loaded.golden)
    predictor = build_predictor(loaded.model, version, config, golden)
    if predictor.served.warning is not None:
        _log.warning("served in float32", version=version, reason=predictor.served.warning)
    if loaded.manifest.get("ctcvr_correction") == "odds":
        return OddsCorrected(predictor)
    return predictor


class OddsCorrected:
    """A predictor of a model that learned q = t / (1 + t): publishes t (`esmm.delay.served_ctcvr`)."""

    def __init__(self, predictor: Predictor) -> None:
        """``predictor`` is closed with this one."""
        self._predictor = predictor

    @property
    def version(self) -> int:
        """The model version."""
        return self._predictor.version

    def launch(self, batch: RankBatch) -> Pending:
        """See `stream_scorer.ports.Predictor`."""
        return self._predictor.launch(batch)

    def collect(self, pending: Any) -> Scores:
        """See `stream_scorer.ports.Predictor`; CVR is what the corrected CTCVR says of it."""
        scores = self._predictor.collect(pending)
        ctcvr_B = served_ctcvr(scores.ctr_B, scores.ctcvr_B)
        cvr_B = np.divide(ctcvr_B, scores.ctr_B, out=np.zeros_like(ctcvr_B), where=scores.ctr_B > 0)
        return scores._replace(cvr_B=np.minimum(cvr_B, 1.0), ctcvr_B=ctcvr_B)

    def close(self) -> None:
        """See `stream_scorer.ports.Predictor`."""
        self._predictor.close()


def served_layout(schema: FeatureSchema) -> ServedLayout:
    """What scorer and trainer agree on."""
    return ServedLayout(schema.layout("user"), schema.layout("item"), schema.layout("context"), schema.hash)


def scorer_policy(settings: Settings, schema: FeatureSchema) -> ScorerPolicy:
    """The scoring loop's plain values."""
    scorer, topics = settings.scorer, settings.kafka.topics
    output = OutputPolicy(
        scores_topic=topics.scores,
        rejects_topic=topics.rejects,
        served_topic=topics.served if scorer.served else None,
        layout=served_layout(schema),
        served_top_k=scorer.served_top_k,
        served_dtype=scorer.served_dtype,
        code_version=__version__,
    )
    return ScorerPolicy(
        limits=RequestLimits(schema.layout("context"), scorer.max_bytes, scorer.max_items),
        output=output,
        max_rows=scorer.max_rows,
        linger_s=scorer.linger_ms / 1000,
        target_s=scorer.target_ms / 1000,
        fetch_budget_s=settings.redis.budget_ms / 1000,
        on_outage=settings.redis.on_outage,
        storm=StormPolicy(scorer.reject_storm_share, scorer.reject_storm_window),
        drain_timeout_s=scorer.drain_timeout_s,
    )


def learner(settings: Settings, schema: FeatureSchema) -> Learner:
    """A fresh model with its optimisers; a checkpoint replaces its weights. `ConfigurationError` for a bad method."""
    model, trainer = settings.model, settings.trainer
    esmm = ESMM(
        schema,
        tower_dnn_hidden_units=model.tower_hidden_units,
        l2_reg_embedding=model.l2_embedding,
        l2_reg_dnn=model.l2_dense,
        init_std=model.init_std,
        seed=model.seed,
    )
    config = LearnerConfig(
        method=trainer.method,
        learning_rate=trainer.learning_rate,
        l2_dense=model.l2_dense,
        embedding=RowRule(learning_rate=trainer.embedding_learning_rate, l2=model.l2_embedding),
        admission=admission_rule(settings),
        negative_keep=trainer.negative_keep,
        precision=trainer.precision,
        seed=model.seed,
        threads=trainer.threads,
    )
    method_of(settings)
    return Learner(esmm, config, save_version)


def admission_rule(settings: Settings) -> AdmissionRule:
    """Which embedding rows are trained; `ConfigurationError` when one could be evicted before its conversion comes."""
    trainer = settings.trainer
    if 0 < trainer.evict_after_s < trainer.attribution_window_s:
        raise ConfigurationError(
            f"setting 'trainer.evict_after_s' is wrong: {trainer.evict_after_s:g} is shorter than "
            f"attribution_window_s, {trainer.attribution_window_s:g}: conversions would find their embeddings gone"
        )
    return AdmissionRule(trainer.admit_after, _ms(trainer.evict_after_s))


def method_of(settings: Settings) -> Method:
    """The delayed-feedback method; `ConfigurationError` when there is none of that name."""
    trainer = settings.trainer
    try:
        method = method_named(trainer.method)
    except ValueError as error:
        raise ConfigurationError(f"setting 'trainer.method' is wrong: {error}") from error
    if method.odds_correction and trainer.negative_keep < 1:
        raise ConfigurationError(f"setting 'trainer.negative_keep' must be 1 with the method {method.name}")
    return method


def judge_of(schema: FeatureSchema) -> Callable[[VersionInfo], Evaluator]:
    """Open a published version for the gate; raises `ModelRefused`."""

    def open_version(info: VersionInfo) -> Evaluator:
        try:
            loaded = load_version(info.path, schema.hash)
        except CheckpointError as error:
            raise ModelRefused(info.version, error.reason, error.detail) from error
        return Evaluator(loaded.model, loaded.manifest.get("ctcvr_correction") == "odds")

    return open_version


def join_state(settings: Settings) -> JoinState:
    """Empty; RocksDB works in a scratch directory beside the checkpoints, where it can link its tables into them."""
    if settings.trainer.join_state == "memory":
        return MemoryJoinState()
    return RocksJoinState(Path(settings.trainer.checkpoint_dir) / JOIN_SCRATCH)


def _tick_ms(click_window_s: float) -> int:
    """A page's rows are emitted together: it is seen within seconds, and its labels are waited for ten minutes."""
    return max(1, _ms(click_window_s) // TICKS)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def trainer_policy(settings: Settings, schema: FeatureSchema) -> TrainerPolicy:
    """The training loop's plain values."""
    trainer, topics = settings.trainer, settings.kafka.topics
    low, high = trainer.gate_pcoc
    try:
        join = JoinPolicy(
            click_window_ms=_ms(trainer.click_window_s),
            observation_window_ms=_ms(trainer.observation_window_s),
            attribution_window_ms=_ms(trainer.attribution_window_s),
            served_ttl_ms=_ms(trainer.served_ttl_s),
            held_ttl_ms=_ms(trainer.served_ttl_s),
            together=trainer.first_emission == "together",
            tick_ms=_tick_ms(trainer.click_window_s),
        )
    except ValueError as error:
        raise ConfigurationError(f"settings [trainer]: {error}") from error
    return TrainerPolicy(
        served_topic=topics.served,
        feedback_topic=topics.feedback,
        rejects_topic=topics.rejects,
        layout=served_layout(schema),
        join=join,
        watermark=WatermarkPolicy(lateness_ms=_ms(trainer.lateness_s)),
        scoreboard=ScoreboardPolicy(
            first_rows=min(2_000, trainer.window_examples // 2),
            window_rows=trainer.window_examples,
            settle_ms=_ms(trainer.click_window_s + trainer.observation_window_s) + join.tick_ms,
            mature_ms=_ms(trainer.click_window_s + trainer.attribution_window_s) + join.tick_ms,
        ),
        gate_rows=max(4_000, 2 * trainer.gate_min_examples),
        gate=GatePolicy(trainer.gate_logloss_margin, low, high, trainer.gate_min_examples),
        rewind=settings.kafka.options.get("auto.offset.reset", "earliest") in ("earliest", "smallest", "beginning"),
        batch_rows=trainer.batch_rows,
        overlap=trainer.overlap,
        max_wait_ms=_ms(trainer.max_wait_s),
        holdout=trainer.gate_holdout,
        publish_every_s=trainer.publish_every_s,
        publish_every_examples=trainer.publish_every_examples,
        checkpoint_every_s=trainer.checkpoint_every_s,
        keep_versions=settings.model.keep_versions,
        code_version=__version__,
    )
