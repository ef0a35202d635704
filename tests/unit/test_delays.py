"""Conversion delays: the published shares, truncation, compression, and delays that depend on who buys what."""

from __future__ import annotations

import numpy as np
import pytest

from stream_scorer.embedded.delays import TAOBAO, DelayMixture, to_ms

SHARES = {0.25: 0.390, 1.0: 0.490, 6.0: 0.608, 24.0: 0.743, 72.0: 0.917, 240.0: 1.0, 500.0: 1.0}


@pytest.mark.parametrize(("hours", "share"), SHARES.items())
def test_taobao_has_the_published_shares(hours: float, share: float) -> None:
    assert TAOBAO.cdf(np.array([hours]))[0] == pytest.approx(share, abs=0.003)


def test_samples_follow_the_cdf_and_end_at_the_window() -> None:
    drawn = TAOBAO.sample(np.random.default_rng(1), np.zeros(200_000))
    assert drawn.min() >= 0
    assert drawn.max() <= TAOBAO.window_h
    for hours, share in SHARES.items():
        assert (drawn <= hours).mean() == pytest.approx(share, abs=0.005)


def test_a_tilt_makes_conversions_earlier_or_later() -> None:
    rng = np.random.default_rng(2)
    early, late = TAOBAO.sample(rng, np.full(20_000, 1.0)), TAOBAO.sample(rng, np.full(20_000, -1.0))
    assert (early < 1).mean() > (TAOBAO.cdf(np.array([1.0]))[0] + 0.1)
    assert (late < 1).mean() < (TAOBAO.cdf(np.array([1.0]))[0] - 0.1)


def test_one_component_is_a_truncated_exponential() -> None:
    one = DelayMixture((1.0,), (10.0,), 20.0)
    drawn = one.sample(np.random.default_rng(3), np.zeros(100_000))
    expected = 10.0 - 20.0 * np.exp(-2.0) / (1 - np.exp(-2.0))
    assert drawn.mean() == pytest.approx(expected, rel=0.01)


def test_time_is_compressed_and_never_rounds_down_to_before_the_click() -> None:
    assert to_ms(np.array([240.0, 1.0, 1e-9, 0.0]), 36_000.0).tolist() == [24_000, 100, 1, 0]


@pytest.mark.parametrize(
    ("weights", "means", "window"),
    [
        ((0.5,), (1.0,), 9.0),
        ((1.0,), (1.0, 2.0), 9.0),
        ((1.0,), (0.0,), 9.0),
        ((1.0,), (1.0,), 0.0),
        ((1.5, -0.5), (1.0, 1.0), 9.0),
    ],
)
def test_nonsense_is_refused(weights: tuple[float, ...], means: tuple[float, ...], window: float) -> None:
    with pytest.raises(ValueError, match="delay"):
        DelayMixture(weights, means, window)
