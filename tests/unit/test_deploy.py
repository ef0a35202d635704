"""deploy/ keeps step with the code: settings, feature schema, metric names, commands and alert sections."""

from __future__ import annotations

import json
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from esmm.features import FeatureSchema
from stream_scorer.cli import app
from stream_scorer.core import metric_names
from stream_scorer.core.metric_names import ALL, Metric
from stream_scorer.core.outcomes import Outcome
from stream_scorer.embedded.market_features import MARKET_TOML
from stream_scorer.embedded.plan import DemoPlan
from stream_scorer.settings import Settings, load

DEPLOY = Path(__file__).parents[2] / "deploy"
TOML = DEPLOY / "stream-scorer.toml"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
ALERTS = [rule for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
PANELS = json.loads((DEPLOY / "grafana.json").read_text())["panels"]


# ---- settings
def _names(model: type[BaseModel], prefix: str = "") -> set[str]:
    out: set[str] = set()
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        out |= _names(kind, f"{prefix}{name}.") if nested else {prefix + name}
    return out


def _keys(table: dict[str, Any], prefix: str = "") -> set[str]:
    out: set[str] = set()
    for name, value in table.items():
        nested = isinstance(value, dict) and value
        out |= _keys(value, f"{prefix}{name}.") if nested else {prefix + name}
    return out


def test_settings_file_is_the_defaults() -> None:
    assert load(TOML, environ={}) == Settings()


def test_settings_file_names_every_setting() -> None:
    assert _keys(tomllib.loads(TOML.read_text())) == _names(Settings)


def test_every_setting_has_one_comment_line() -> None:
    lines = TOML.read_text().splitlines()
    settings = [at for at, line in enumerate(lines) if re.match(r"[a-z_0-9]+ = ", line) or line == "[kafka.options]"]
    assert len(settings) == len(_names(Settings))
    assert [lines[at] for at in settings if not lines[at - 1].startswith("# ")] == []


# ---- feature schema
def test_feature_schema_is_the_markets() -> None:
    text = (DEPLOY / "features.toml").read_text()
    assert text == MARKET_TOML
    assert FeatureSchema.from_toml(text).columns


# ---- metrics in alerts and dashboard
def _series(metric: Metric) -> set[str]:
    name = f"stream_scorer_{metric.name}"
    return {name + end for end in ("_bucket", "_sum", "_count")} if metric.kind == "histogram" else {name}


SERIES = {series: metric for metric in ALL for series in _series(metric)}
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [t["expr"] for panel in PANELS for t in panel["targets"]]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_exists_with_its_labels(expression: str) -> None:
    used = re.findall(r"(stream_scorer_\w+)(?:\{([^}]*)\})?", expression)
    assert used
    labels: set[str] = set()
    for series, matchers in used:
        assert series in SERIES
        labels |= set(SERIES[series].labels)
        for label in re.findall(r"(\w+)=", matchers):
            assert label in SERIES[series].labels
    for names in re.findall(r"\b(?:by|ignoring|on) \(([\w, ]+)\)", expression):
        assert set(names.split(", ")) - {"le"} <= labels


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_balanced(expression: str) -> None:
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")


def test_counters_are_read_as_rates_and_gauges_are_not() -> None:
    for expression in EXPRESSIONS:
        for series in re.findall(r"stream_scorer_\w+", expression):
            rated = re.search(rf"(?:rate|increase)\({series}", expression) is not None
            assert rated == (SERIES[series].kind != "gauge"), expression


def test_every_metric_used_is_set_by_the_code() -> None:
    names = {metric: name for name, metric in vars(metric_names).items() if isinstance(metric, Metric)}
    sources = [path for path in (DEPLOY.parent / "stream_scorer").rglob("*.py") if path.name != "metric_names.py"]
    text = "\n".join(path.read_text() for path in sources)
    used = {SERIES[series] for expression in EXPRESSIONS for series in re.findall(r"stream_scorer_\w+", expression)}
    assert [names[metric] for metric in used if not re.search(rf"\b{names[metric]}\b", text)] == []


def test_outcomes_named_in_alerts_exist() -> None:
    outcomes = typing.get_args(Outcome)
    patterns = [p for rule in ALERTS for p in re.findall(r'outcome=~?"([^"]+)"', rule["expr"])]
    assert len(patterns) == 2
    for pattern in "|".join(patterns).split("|"):
        assert any(re.fullmatch(pattern, outcome) for outcome in outcomes), pattern


def test_every_alert_has_its_section_and_no_section_is_left_over() -> None:
    runbook = (DEPLOY / "runbook.md").read_text()
    sections = {name for name in re.findall(r"^## (.+)$", runbook, re.MULTILINE) if name.startswith("StreamScorer")}
    assert {rule["alert"] for rule in ALERTS} == sections
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"deploy/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]


def test_metrics_and_settings_named_in_the_runbook_exist() -> None:
    runbook = (DEPLOY / "runbook.md").read_text()
    series = set(re.findall(r"stream_scorer_\w+", runbook))
    assert series
    assert series - set(SERIES) - {f"stream_scorer_{metric.name}" for metric in ALL} == set()
    settings = set(re.findall(r"`((?:kafka|redis|scorer|model|trainer|http)\.\w+)`", runbook))
    assert settings
    assert settings - _names(Settings) == set()


# ---- compose and image
def _commands() -> set[str]:
    root = typer.main.get_command(app)
    out: set[str] = set()
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        children = getattr(command, "commands", {})
        out |= {f"{name} {child}" for child in children} or {name}
    return out


def test_compose_runs_commands_that_exist() -> None:
    ours = {name: service for name, service in COMPOSE["services"].items() if service["image"] == "stream-scorer"}
    assert set(ours) == {"topics", "trainer", "scorer", "simulator"}
    for service in ours.values():
        words = [word for word in service["command"] if not word.startswith("-")]
        assert words[0] in _commands() or " ".join(words[:2]) in _commands()


def test_compose_environment_is_accepted_by_settings() -> None:
    image = re.findall(r"(STREAM_SCORER_\w+)=(\S+)", (DEPLOY / "Dockerfile").read_text())
    assert image
    for service in COMPOSE["services"].values():
        ours = {k: str(v) for k, v in service["environment"].items()} if service["image"] == "stream-scorer" else {}
        settings = load(TOML, environ={**dict(image), **ours})
        if ours:
            assert settings.kafka.bootstrap == "kafka:9092"
            assert settings.redis.url.get_secret_value() == "redis://valkey:6379/0"
            assert settings.http.port == 8080


def test_compose_trainer_has_the_windows_of_the_market_it_learns_from() -> None:
    environment = COMPOSE["services"]["trainer"]["environment"]
    prefix = "STREAM_SCORER_TRAINER__"
    windows = {k.removeprefix(prefix).lower(): v for k, v in environment.items() if k.startswith(prefix)}
    assert windows == DemoPlan().trainer_settings()


def test_compose_services_are_locked_down_and_wait_for_what_they_need() -> None:
    services = COMPOSE["services"]
    for name in ("trainer", "scorer", "simulator"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["depends_on"]["topics"]["condition"] == "service_completed_successfully"
    assert services["kafka"]["image"].startswith("apache/kafka:4.")
    for name in ("kafka", "valkey"):
        assert services[name]["healthcheck"]["test"]
    declared = set(COMPOSE["volumes"])
    used = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert used == declared


def test_image_is_slim_non_root_and_checked() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert stages == ["python:${PYTHON}-slim"] * 2
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["10001:10001"]
    assert text.index("USER 10001") < text.index("ENTRYPOINT")
    assert "/livez" in text
    root = DEPLOY.parent
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (root / source).exists(), source
            assert f"!{source}" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
