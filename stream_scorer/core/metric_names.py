"""Every metric of the project in one list, typed. Base units: seconds, bytes, ratios of 0 to 1."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """A metric's full name (without the ``stream_scorer_`` prefix), kind, help text and label names."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROWS = (1, 10, 50, 100, 500, 1000, 2000, 5000, 10000, 20000, 50000)

# scorer
REQUESTS = Metric("requests_total", "counter", "score requests read")
SCORED = Metric("scored_total", "counter", "score messages acknowledged by the broker")
CANDIDATES = Metric("candidates_total", "counter", "candidate rows scored")
REJECTED = Metric("rejected_total", "counter", "messages sent to score-rejects", ("reason",))
STALE_EPOCH = Metric("stale_epoch_total", "counter", "results dropped because their partition had moved")
BATCH_ROWS = Metric("batch_rows", "histogram", "candidate rows a batch", (), ROWS)
BATCH_LIMIT = Metric("batch_rows_limit", "gauge", "candidate rows a batch may have now")
STAGE_SECONDS = Metric(
    "stage_seconds", "histogram", "time a batch spends in a stage; batch: all but read and decode", ("stage",), SECONDS
)
LATENCY_SECONDS = Metric("latency_seconds", "histogram", "request timestamp to scored", (), SECONDS)
LAG = Metric("lag_records", "gauge", "records behind the end of the assigned partitions")
OFFSET_GAPS = Metric("offset_gap_records_total", "counter", "records skipped because the broker had dropped them")
KAFKA_ERRORS = Metric("kafka_errors_total", "counter", "errors the Kafka consumer got over", ("error",))
FEATURES_MISSING = Metric(
    "features_missing_total", "counter", "entities scored with a default vector", ("entity", "reason")
)
FEATURES_DEGRADED = Metric("features_degraded_total", "counter", "batches scored without the feature store")
FEATURE_CACHE = Metric(
    "feature_cache_total", "counter", "item rows by cache outcome; changed: written while cached", ("outcome",)
)
FEATURE_TRACKING = Metric("feature_tracking", "gauge", "1 while Redis tells which items are written")
# hot swap
MODEL_VERSION = Metric("model_version", "gauge", "model version being served")
MODEL_SWAPS = Metric("model_swaps_total", "counter", "versions taken into service")
MODEL_REFUSED = Metric("model_refused_total", "counter", "versions refused", ("reason",))
MODEL_LOAD_SECONDS = Metric("model_load_seconds", "histogram", "verify, load, warm and probe", (), SECONDS)
# trainer
TRAINER_REJECTED = Metric("trainer_rejected_total", "counter", "served or feedback messages rejected", ("reason",))
JOIN_OUTCOME = Metric("join_outcome_total", "counter", "what became of an event in the join", ("outcome",))
JOIN_OPEN = Metric("join_open", "gauge", "entries held by the join state", ("state",))
EXAMPLES = Metric("examples_total", "counter", "training rows by kind", ("kind",))
EMBEDDING_ROWS = Metric(
    "embedding_rows_total", "counter", "embedding rows admitted to training, and evicted from it", ("change",)
)
STEP_SECONDS = Metric("train_step_seconds", "histogram", "one optimiser step", (), SECONDS)
LEARNING = Metric("learning_metric", "gauge", "progressive metric over the recent window", ("task", "measure"))
VERSIONS_PUBLISHED = Metric("versions_published_total", "counter", "versions published")
GATE = Metric("gate_total", "counter", "gate decisions", ("decision", "reason"))
CHECKPOINTS = Metric("checkpoints_total", "counter", "trainer checkpoints written")

ALL: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
