"""Criteo's log through the learning benchmark: what becomes of a line, no row before its time, what is printed.

The file is made here, in the log's format: the real one cannot be had.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from esmm.batch import Kind
from esmm.delay import METHODS
from stream_scorer.core.errors import ConfigurationError
from tests.bench import learning, learning_criteo, learning_stream
from tests.bench.learning_criteo import LEFT_OUT, OBSERVATION, compare, hourly, line, world_of
from tests.bench.learning_stream import Predicted, emitted
from tests.bench.learning_world import Plan, World

HOUR, DAY = 3_600, 86_400
SMALL, WINDOW = Plan(pretrain=24, warm_up=1, test=15), 24.0


def text_of(at: int, converted: int | None, campaign: str) -> str:
    later = "" if converted is None else str(converted)
    return "\t".join([str(at), later, *"1234", "", *"678", campaign, *"abcdefgh"]) + "\n"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty hours of clicks on a good and a bad campaign; a third of the conversions within the observation window."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("criteo") / "data.txt"
    lines = []
    for at in np.sort(rng.integers(0, 40 * HOUR, 60_000)).tolist():
        campaign, rate = ("good", 0.5) if rng.random() < 0.5 else ("bad", 0.1)
        delay = 60 if rng.random() < 1 / 3 else int(rng.exponential(4 * HOUR))
        lines.append(text_of(at, at + delay if rng.random() < rate else None, campaign))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def world(log: Path) -> World:
    return world_of(log, SMALL, WINDOW)


def test_a_line_is_a_click_with_its_conversion_within_thirty_days(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    rows = ((0, None), (HOUR, 2 * HOUR), (2 * HOUR, 2 * HOUR + 30 * DAY), (3 * HOUR, 3 * HOUR + 30 * DAY + 1))
    path.write_text("".join(text_of(at, converted, "good") for at, converted in rows))
    world = world_of(path)
    assert world.at_N.tolist() == world.click_at_N.tolist() == [0, 1, 2, 3]
    assert world.converted_at_N.tolist() == [np.inf, 2, 722, np.inf]
    assert world.converted_N.tolist() == [False, True, True, False]
    assert (world.start, world.test_start, world.end) == (720, 721, 1440)
    block = world.examples.context
    assert (block.ids_NS[:, -1] == [0, 1, 2, 3]).all()  # the hour
    assert block.dense_ND[0] == pytest.approx([*np.log1p([1, 2, 3, 4]), -1, *np.log1p([6, 7, 8])])


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("user,item\n" * 30)
    with pytest.raises(ConfigurationError, match="19 tab-separated columns"):
        world_of(path)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"oracle"}))
def test_no_row_of_the_stream_knows_its_future(world: World, name: str) -> None:
    rows = emitted(world, METHODS[name], 0.0, np.inf)
    at_R, of_R = rows.at_R, rows.impression_R
    wait = OBSERVATION if METHODS[name].observes else 0.0
    first_R = rows.kind_R == Kind.FIRST
    assert at_R[first_R] == pytest.approx(world.at_N[of_R[first_R]] + wait)
    positive_R = rows.conversion_R == 1
    assert positive_R.any() or not METHODS[name].observes
    assert (at_R[positive_R] >= world.converted_at_N[of_R[positive_R]]).all()


def test_metrics_are_means_of_hours_weighted_by_clicks(world: World) -> None:
    at_N = np.array([5.0, 5.1, 6.0, 6.2, 6.4, 6.6, 7.0])
    converted_N = np.array([True, False, True, False, False, False, False])
    few = world._replace(at_N=at_N, converted_N=converted_N)
    p_N = np.array([0.8, 0.2, 0.2, 0.4, 0.1, 0.1, 0.1])
    found = hourly(few, Predicted(0, np.ones(7), p_N))
    assert found["auc"] == pytest.approx((2 * 1.0 + 4 * 2 / 3) / 6)  # the last hour has no conversion
    losses = -np.log(np.where(converted_N, p_N, 1 - p_N))
    assert found["nll"] == pytest.approx(losses[:6].sum() / 6)
    assert found["pcoc"] == pytest.approx(p_N.sum() / 2)


def test_every_method_is_compared_and_learns_which_campaign_sells(world: World, monkeypatch) -> None:
    monkeypatch.setattr(learning_stream, "LEARNING_RATE", 0.02)  # the file has forty batches, the real one thousands
    found = {str(row["method"]): row for row in compare(world)}
    assert set(found) == {"pretrained", *METHODS} - set(LEFT_OUT)
    assert (found["pretrained"]["ri_nll"], found["oracle"]["ri_nll"]) == pytest.approx((0, 100))
    assert all(float(row["auc"]) == pytest.approx(0.745, abs=0.005) for row in found.values())  # of the two rates
    assert float(found["oracle"]["nll"]) < 0.53  # .509 is their entropy
    assert float(found["mp-es-dfm"]["pcoc"]) == pytest.approx(1, abs=0.05)
    assert float(found["vanilla-dup"]["pcoc"]) < 0.9


def test_published_values_stand_beside_ours() -> None:
    ours = dict.fromkeys(("auc", "pr_auc", "nll", "pcoc", "ri_auc", "ri_pr_auc", "ri_nll"), 0.5)
    es_dfm, ddfm = (line({"method": name, **ours}).split("|")[1].split() for name in ("es-dfm", "ddfm"))
    assert es_dfm == ["0.8402", "0.6393", "0.3924", "66.4", "65.1", "60.3", "-", "46.1"]
    assert ddfm == ["-"] * 8


def test_the_command_prints_the_table_and_writes_it(log: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(learning_criteo, "world_of", lambda path: world_of(path, SMALL, WINDOW))
    rows = [dict.fromkeys(learning_criteo.COLUMNS, 0.5) | {"method": name} for name in ("pretrained", "fnw")]
    monkeypatch.setattr(learning_criteo, "compare", lambda _: iter(rows))
    monkeypatch.setattr(sys, "argv", ["learning", "--criteo", str(log), "--out", str(tmp_path / "out")])
    learning.main()
    said = capsys.readouterr().out
    assert "60000 clicks" in said
    assert said.split("\nfnw")[1].split("|")[1].split()[:3] == ["0.8373", "0.6313", "0.4033"]
    assert (tmp_path / "out" / "learning_criteo.csv").read_text().splitlines()[2].startswith("fnw,0.5,")
