"""Metrics for Prometheus (`stream_scorer.ports.Metrics`): a registry of our own, every metric known from the start."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from stream_scorer.core.metric_names import ALL, Metric

PREFIX = "stream_scorer"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CLASSES: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class PrometheusMetrics:
    """Counters, gauges and histograms by typed name. Meant to be called once a batch, not once a row."""

    def __init__(self, version: str) -> None:
        """``version`` is this program's, shown as ``stream_scorer_info``. Turns ``_created`` series off everywhere."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        Info(PREFIX, "this program", registry=self._registry).info({"version": version})
        self._families = {metric.name: self._make(metric) for metric in ALL}
        self._bound: dict[tuple[str, ...], Any] = {}

    def _make(self, metric: Metric) -> Any:
        options: dict[str, Any] = {"namespace": PREFIX, "labelnames": metric.labels, "registry": self._registry}
        if metric.kind == "histogram" and metric.buckets:
            options["buckets"] = metric.buckets
        return _CLASSES[metric.kind](metric.name, metric.help, **options)

    def inc(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter. ValueError for labels that the metric does not have."""
        self._child(metric, labels).inc(amount)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge. ValueError for labels that the metric does not have."""
        self._child(metric, labels).set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add one observation to a histogram. ValueError for labels that the metric does not have."""
        self._child(metric, labels).observe(value)

    def _child(self, metric: Metric, labels: dict[str, str]) -> Any:
        if not labels:
            return self._families[metric.name]
        key = (metric.name, *labels.keys(), *labels.values())
        child = self._bound.get(key)
        if child is None:
            child = self._bound[key] = self._families[metric.name].labels(**labels)
        return child

    def value(self, metric: Metric, **labels: str) -> float:
        """A counter's or gauge's value now (0 when it never moved); of a histogram, the number of observations."""
        name = f"{PREFIX}_{metric.name}" + ("_count" if metric.kind == "histogram" else "")
        return self._registry.get_sample_value(name, labels) or 0.0

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, `CONTENT_TYPE`."""
        return generate_latest(self._registry)
