"""The benchmark's requests: an item once a request, as popular as asked for."""

import numpy as np
import pytest

from tests.bench.speed.__main__ import merged
from tests.bench.speed.latency import _quantiles
from tests.bench.speed.report import ratios
from tests.bench.speed.world import Workload


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_an_item_stands_once_in_a_request(zipf: float) -> None:
    users_R, items_RK = Workload(candidates=40, catalogue=60, users=7, zipf=zipf).ids(500)
    assert items_RK.shape == (500, 40)
    assert all(len(set(row)) == 40 for row in items_RK.tolist())
    assert set(users_R.tolist()) == set(range(7))
    assert (items_RK.min(), items_RK.max()) == (0, 59)


def test_popularity_falls_with_the_rank() -> None:
    _, items_RK = Workload(candidates=5, catalogue=100_000, zipf=1.0).ids(20_000)
    counts = np.bincount(items_RK.ravel(), minlength=100_000)
    share = counts[:1_000].sum() / counts.sum()
    assert abs(share - np.log(1_000) / np.log(100_000)) < 0.06  # drawn without repeats, so a little less
    _, uniform = Workload(candidates=5, catalogue=100_000).ids(20_000)
    assert (uniform < 1_000).mean() < 0.02


def test_ratios_are_of_medians_and_name_both_sides() -> None:
    names = {"stream-scorer float32": 500.0, "Quix + DeepCTR-Torch": 50.0, "hand-written, batch 64": 100.0}
    found = ratios({name: {"candidates_per_s": {"median": value}} for name, value in names.items()})
    assert found["float32 one worker / Quix + DeepCTR-Torch one process"] == 10.0
    assert found["float32 one worker / hand-written best"] == 5.0
    assert not any("bfloat16" in name for name in found)


def test_latencies_are_quantiles_of_all_answers() -> None:
    found = _quantiles(np.arange(1, 1001))
    assert found["p50"] == pytest.approx(500, abs=1)
    assert found["p99"] == pytest.approx(990, abs=1)
    assert found["max"] == 1000


def test_a_part_of_the_file_is_replaced_and_the_rest_stays(tmp_path) -> None:
    path = tmp_path / "speed.json"
    assert merged(path, {"command": "a", "contenders": {}}) == {"command": "a", "contenders": {}}
    path.write_text('{"command": "a", "contenders": {}, "soak": 1, "soak_command": "s"}')
    assert merged(path, {"command": "b", "latency": [2]}) == {
        "command": "a", "contenders": {}, "soak": 1, "soak_command": "s", "latency": [2], "latency_command": "b",
    }  # fmt: skip
    assert merged(path, {"command": "c", "contenders": {"x": 1}}) == {
        "command": "c", "contenders": {"x": 1}, "soak": 1, "soak_command": "s",
    }  # fmt: skip
