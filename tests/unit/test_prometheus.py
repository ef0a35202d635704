"""The metrics adapter: every metric exists, values land where they belong, wrong labels are errors."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stream_scorer.adapters.prometheus import PrometheusMetrics
from stream_scorer.core import metric_names as names


def families(metrics: PrometheusMetrics) -> dict[str, object]:
    return {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}


def test_every_metric_is_known_from_the_start_with_its_help() -> None:
    found = families(PrometheusMetrics("1.2.3"))
    for metric in names.ALL:
        family = found[f"stream_scorer_{metric.name.removesuffix('_total')}"]
        assert family.documentation == metric.help
        assert family.type == metric.kind


def test_values_and_labels() -> None:
    metrics = PrometheusMetrics("1.2.3")
    metrics.inc(names.REQUESTS)
    metrics.inc(names.REQUESTS, 4)
    metrics.inc(names.FEATURES_MISSING, 2, entity="item", reason="absent")
    metrics.inc(names.FEATURES_MISSING, 3, reason="absent", entity="item")  # the same child, whatever the order
    metrics.set(names.LAG, 17)
    metrics.set(names.LAG, 12)
    metrics.observe(names.BATCH_ROWS, 120)
    assert metrics.value(names.REQUESTS) == 5
    assert metrics.value(names.FEATURES_MISSING, entity="item", reason="absent") == 5
    assert metrics.value(names.FEATURES_MISSING, entity="user", reason="absent") == 0
    assert metrics.value(names.LAG) == 12
    assert metrics.value(names.BATCH_ROWS) == 1
    text = metrics.text().decode()
    assert 'stream_scorer_info{version="1.2.3"} 1.0' in text
    assert 'stream_scorer_batch_rows_bucket{le="100.0"} 0.0' in text
    assert 'stream_scorer_batch_rows_bucket{le="500.0"} 1.0' in text
    assert "_created" not in text


def test_wrong_labels_are_errors() -> None:
    metrics = PrometheusMetrics("1.2.3")
    with pytest.raises(ValueError, match="label"):
        metrics.inc(names.REJECTED, why="json")
    with pytest.raises(ValueError, match="label"):
        metrics.inc(names.REJECTED)


def test_two_registries_do_not_share() -> None:
    one, two = PrometheusMetrics("a"), PrometheusMetrics("b")
    one.inc(names.SCORED)
    assert (one.value(names.SCORED), two.value(names.SCORED)) == (1, 0)
