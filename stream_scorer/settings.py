"""Settings, read once at the door: defaults, then a TOML file, then ``STREAM_SCORER_*`` environment variables.

Nested names join with two underscores: ``STREAM_SCORER_KAFKA__BOOTSTRAP=broker:9092``. Unknown keys are errors.
Secrets are masked.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from stream_scorer.core.secrets import MASK, is_secret, mask_url

PREFIX = "STREAM_SCORER_"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)  # a password may be 12345


class Topics(_Section):
    """Topic names."""

    requests: str = "score-requests"
    scores: str = "scores"
    served: str = "served"
    feedback: str = "feedback"
    rejects: str = "score-rejects"


class KafkaSettings(_Section):
    """Where Kafka is and how to talk to it."""

    bootstrap: str = "localhost:9092"
    scorer_group: str = "stream-scorer"
    trainer_group: str = "stream-scorer-trainer"
    group_protocol: Literal["classic", "consumer"] = "classic"
    partitions: int = Field(4, ge=1, le=1024, description="partitions that `topics create` makes")
    replication: int = Field(1, ge=1, le=9)
    session_timeout_ms: int = Field(10_000, ge=1_000)
    max_poll_interval_ms: int = Field(60_000, ge=5_000)
    connect_timeout_s: float = Field(10.0, gt=0)
    delivery_timeout_s: float = Field(30.0, gt=0, description="a message not acknowledged by then stops the process")
    fetch_wait_ms: int = Field(10, ge=1, le=5_000)
    username: str = ""
    password: SecretStr = SecretStr("")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: str = "SCRAM-SHA-512"
    ca_file: str = ""
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        repr=False,
        description="more librdkafka options, as they are; shown only through `masked`",
    )
    topics: Topics = Topics()


class RedisSettings(_Section):
    """The feature store."""

    url: SecretStr = SecretStr("redis://localhost:6379/0")
    prefix: str = Field("f", min_length=1, description="of every key")
    buckets: int = Field(
        64, ge=1, le=16384, description="hash-tag buckets a key falls into; fixed once features are written"
    )
    budget_ms: int = Field(50, ge=1, description="time a batch may wait for features")
    cache_items: int = Field(100_000, ge=0, description="item rows kept in process")
    cache_ttl_s: float = Field(30.0, ge=0)
    tracking: bool = Field(
        True,
        description="have Redis tell which items are written, and ask for them again; without it rows live cache_ttl_s",
    )
    stale_limit_s: float = Field(3_600.0, ge=0, description="a cached row this old may still be served in an outage")
    on_outage: Literal["degrade", "pause", "fail"] = "degrade"


class ScorerSettings(_Section):
    """The scoring loop."""

    max_rows: int = Field(10_000, ge=1, description="candidate rows a batch")
    linger_ms: float = Field(2.0, ge=0, description="how long a batch waits for more after its first request")
    target_ms: float = Field(0.0, ge=0, description="keep 95 batches of 100 within this, by their size; 0: off")
    max_items: int = Field(2_000, ge=1, description="more candidates than this in one request is a reject")
    max_bytes: int = Field(1_000_000, ge=1, description="a longer request is a reject")
    served: bool = Field(True, description="publish what was served, for the trainer")
    served_top_k: int = Field(50, ge=1, description="candidates a request kept in `served`, best CTCVR first")
    served_dtype: Literal["float32", "float16"] = "float32"
    reject_storm_share: float = Field(
        0.5, gt=0, le=1, description="share of rejects in the window that pauses the scorer"
    )
    reject_storm_window: int = Field(2_000, ge=10, description="requests looked at for the share")
    drain_timeout_s: float = Field(10.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int = Field(1, ge=1, description="compute threads of the model")
    compile: bool = Field(False, description="torch.compile the towers (needs a C++ compiler)")
    device: Literal["cpu"] = "cpu"


class ModelSettings(_Section):
    """The model and where its versions live."""

    schema_file: str = Field("features.toml", description="feature schema (TOML)")
    store: str = Field("models", description="directory of model versions")
    tower_hidden_units: tuple[int, ...] = (256, 128)
    l2_embedding: float = Field(0.0, ge=0)
    l2_dense: float = Field(0.0, ge=0)
    init_std: float = Field(0.01, gt=0)
    seed: int = 1024
    poll_s: float = Field(0.5, gt=0, description="how often scorers look for a new version")
    keep_versions: int = Field(10, ge=2)


class TrainerSettings(_Section):
    """Join windows, learning and publishing."""

    click_window_s: float = Field(600.0, gt=0, description="an impression not clicked by then is a negative")
    observation_window_s: float = Field(
        3_600.0, gt=0, description="a clicked impression waits this long for its conversion"
    )
    first_emission: Literal["together", "early"] = Field(
        "together", description="whether unclicked impressions wait as long as clicked ones before they are learned"
    )
    attribution_window_s: float = Field(864_000.0, gt=0, description="later conversions are counted, not learned")
    lateness_s: float = Field(5.0, ge=0, description="how far a partition's events may be out of order")
    served_ttl_s: float = Field(3_600.0, gt=0, description="served rows never shown are forgotten after this")
    method: str = Field("mp-es-dfm", description="delayed-feedback method, see esmm/delay.py")
    batch_rows: int = Field(512, ge=1, description="examples a step")
    max_wait_s: float = Field(1.0, gt=0, description="a smaller step is taken after this long")
    learning_rate: float = Field(1e-3, gt=0)
    embedding_learning_rate: float = Field(0.02, gt=0)
    negative_keep: float = Field(
        1.0, gt=0, le=1, description="share of unclicked impressions learned from; the loss undoes the sampling"
    )
    admit_after: int = Field(1, ge=1, le=1_000_000, description="impressions before an embedding row is trained")
    evict_after_s: float = Field(
        0.0, ge=0, description="an embedding row not seen for this long is reset; 0: never; else >= attribution window"
    )
    publish_every_s: float = Field(60.0, gt=0)
    publish_every_examples: int = Field(0, ge=0, description="0: only by time")
    join_state: Literal["memory", "rocksdb"] = Field(
        "memory", description="where requests wait for their labels: rocksdb holds more than memory can"
    )
    checkpoint_dir: str = "checkpoints"
    checkpoint_every_s: float = Field(60.0, gt=0)
    gate_logloss_margin: float = Field(0.02, ge=0)
    gate_pcoc: tuple[float, float] = (0.5, 2.0)
    gate_holdout: float = Field(0.05, ge=0, le=0.5, description="share of impressions only the gate looks at")
    gate_min_examples: int = Field(200, ge=1)
    window_examples: int = Field(20_000, ge=100, description="examples behind the progressive metrics")
    threads: int = Field(1, ge=1)
    overlap: bool = Field(False, description="learn in a thread beside the join: the same weights, on a second core")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the towers' products while learning")


class HttpSettings(_Section):
    """Health, metrics and the page."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="0: off")


class Settings(_Section):
    """Everything, frozen."""

    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    scorer: ScorerSettings = ScorerSettings()
    model: ModelSettings = ModelSettings()
    trainer: TrainerSettings = TrainerSettings()
    http: HttpSettings = HttpSettings()
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_json: bool = False


class SettingsError(ValueError):
    """What is wrong with the settings and how to fix it, one line a problem."""


def load(
    path: Path | None, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Defaults, then the TOML file, then the environment, then ``overrides`` (dotted names, from the command line).

    Raises `SettingsError`; its text never contains a value of a secret.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text())
        except FileNotFoundError as error:
            raise SettingsError(f"settings file {path} does not exist; pass --config FILE or leave it out") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"settings file {path} is not valid TOML: {error}") from error
    for name, value in (os.environ if environ is None else environ).items():
        if name.startswith(PREFIX) and not name.startswith(PREFIX + "TEST_"):
            _put(data, name.removeprefix(PREFIX).lower().split("__"), _literal(value))
    for name, value in (overrides or {}).items():
        if value is not None:
            _put(data, name.split("."), value)
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise SettingsError(
            "\n".join(_explain(dict(problem)) for problem in error.errors(include_input=False))
        ) from None


def _put(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"setting {key!r} is a table: write {key}.NAME = VALUE")
        data = inner
    data[keys[-1]] = value


def _literal(text: str) -> Any:
    """An environment value as TOML would read it: numbers, booleans, arrays; else the text itself."""
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | list | dict) else text


def _explain(problem: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: Any = Settings
        for part in problem["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"unknown setting {where!r}; known here: {', '.join(section.model_fields)}"
    name = PREFIX + where.replace(".", "__").upper()
    return f"setting {where!r} is wrong: {problem['msg']} (set it in the TOML file or as {name})"


def masked(settings: Settings) -> dict[str, Any]:
    """Plain data for ``--print-config``: secrets are stars, also inside ``kafka.options`` and the Redis URL."""
    data = settings.model_dump(mode="json")
    data["kafka"]["password"] = MASK if settings.kafka.password.get_secret_value() else ""
    data["redis"]["url"] = mask_url(settings.redis.url.get_secret_value())
    data["kafka"]["options"] = {key: MASK if is_secret(key) else value for key, value in settings.kafka.options.items()}
    return data
