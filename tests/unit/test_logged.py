"""Public logs as matured examples: final labels only, features of the moment; and `pretrain --dataset` to the end."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from esmm.batch import Examples
from esmm.features import FeatureSchema
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.cli import DATASET_NAMES
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded.datasets import DATASETS
from stream_scorer.embedded.replay import ReplayOptions, ReplayReport
from stream_scorer.settings import Settings, load
from stream_scorer.wiring.logged import Windows, read_log
from stream_scorer.wiring.pretrain import PretrainOptions, run_pretrain
from stream_scorer.wiring.replay import dirt_text
from tests.unit.test_datasets import T0, write
from tests.unit.test_labelled_logs import COMMON, HEADER, OWN, ali, click, shown
from tests.unit.test_labelled_logs import write as write_text

SCHEMAS = {name: FeatureSchema.from_toml(dataset.schema_toml) for name, dataset in DATASETS.items()}
WINDOWS = Windows(click_ms=10_000, attribution_ms=100_000)


def read(name: str, path: Path, windows: Windows = WINDOWS) -> tuple[Examples, ReplayReport]:
    return read_log(name, path, SCHEMAS[name], windows, ReplayOptions())


def labels(examples: Examples) -> list[tuple[float, float]]:
    return list(zip(examples.click_B.tolist(), examples.conversion_B.tolist(), strict=True))


def test_labels_follow_the_trainer_s_windows_and_only_final_ones_count(tmp_path: Path) -> None:
    rows = [
        (1, 10, 7, "pv", T0),
        (2, 10, 7, "pv", T0),
        (3, 10, 7, "pv", T0),
        (4, 10, 7, "pv", T0),
        (1, 10, 7, "cart", T0 + 10),  # in time
        (2, 10, 7, "cart", T0 + 11),  # too late for a click
        (3, 10, 7, "fav", T0 + 5),
        (1, 10, 7, "buy", T0 + 110),  # in time
        (3, 10, 7, "buy", T0 + 106),  # too late for a conversion
        (5, 10, 7, "pv", T0 + 1),
        (6, 10, 7, "pv", T0 + 111),  # nobody knows yet
    ]
    path = write(tmp_path / "log.csv", sorted(rows, key=lambda row: row[4]))
    examples, report = read("taobao", path)
    assert labels(examples) == [(1, 1), (0, 0), (1, 0), (0, 0)]
    assert report.impressions == 6
    assert set((examples.impression_ms_B // 1_000 - T0).tolist()) == {0}
    with pytest.raises(ConfigurationError, match="no impression is older at the log's end"):
        read("taobao", path, Windows(10_000, 200_000))


def test_features_are_those_of_the_impression(tmp_path: Path) -> None:
    rows = [(1, 10, 7, "pv", T0), (1, 10, 7, "pv", T0 + 1), (1, 11, 8, "pv", T0 + 500)]
    examples, _ = read("taobao", write(tmp_path / "log.csv", rows))
    counts = next(slot for slot in SCHEMAS["taobao"].layout("user").dense if slot.name == "user_counts")
    assert np.expm1(examples.user.dense_ND[:, counts.start]).round(3).tolist() == [0, 1]
    hour = next(slot for slot in SCHEMAS["taobao"].layout("context").ids if slot.name == "hour")
    assert (examples.context.ids_NS[:, hour.start] == (T0 // 3_600 + 8) % 24).all()


def test_the_three_labelled_logs_become_examples(tmp_path: Path) -> None:
    text = click(10, 100) + click(20) + click(30, 131) + click(500)
    examples, _ = read("criteo-conversions", write_text(tmp_path / "data.txt", text))
    assert labels(examples) == [(1, 1), (1, 0), (1, 0)]
    assert (examples.user.ids_NS.shape, examples.item.ids_NS.shape) == ((3, 0), (3, 0))
    rows = shown(0, click=1, conversion=1, conversion_timestamp=9) + shown(1) + shown(900)
    examples, _ = read("criteo-attribution", write_text(tmp_path / "log.tsv", HEADER + rows))
    assert labels(examples) == [(1, 1), (0, 0)]
    samples = f"1,1,1,aa,{OWN}\n2,0,0,aa,{OWN}\n" + f"3,0,0,bb,{OWN}\n" * 3_000
    examples, _ = read("ali-ccp", ali(tmp_path, samples, COMMON), Windows(1_000, 20_000))
    assert labels(examples)[:3] == [(1, 1), (0, 0), (0, 0)]


def settings(tmp_path: Path, dataset: str) -> Settings:
    (tmp_path / "features.toml").write_text(DATASETS[dataset].schema_toml)
    names = {"schema_file": "features.toml", "store": "models"}
    own = {f"model.{key}": str(tmp_path / name) for key, name in names.items()}
    more = {"model.tower_hidden_units": [16], "trainer.click_window_s": 1, "trainer.attribution_window_s": 600}
    return load(None, {}, {**own, **more, "trainer.batch_rows": 64})


def test_pretrain_learns_from_a_log_and_says_what_it_left_out(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    lines = [click(n, n + 60 if rng.random() < (0.8 if n % 2 else 0.1) else "", cats=f"k{n % 2}") for n in range(3_000)]
    path = write_text(tmp_path / "data.txt", "".join(lines[:99]) + "oops\n" + "".join(lines[99:]), packed=True)
    options = PretrainOptions(path, epochs=6, patience=6, dataset="criteo-conversions")
    assert run_pretrain(settings(tmp_path, "criteo-conversions"), options) == 0
    out = capsys.readouterr().out
    assert re.search(r"3001 log rows, 3000 impressions, of which 2398 have final labels: 2398 clicks, \d+ conv", out)
    assert "; 1 dirty, left out: 1 time (lines 100)" in out
    assert DirectoryStore(tmp_path / "models").current() == 1
    assert float(re.findall(r"AUC [\d.na]+, ([\d.]+);", out)[-1]) > 0.75


def test_pretrain_under_another_schema_or_of_an_unknown_log_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not the schema of taobao: write it with"):
        run_pretrain(settings(tmp_path, "ali-ccp"), PretrainOptions(tmp_path / "x", dataset="taobao"))
    with pytest.raises(ConfigurationError, match="dataset 'movielens' is not known"):
        run_pretrain(settings(tmp_path, "ali-ccp"), PretrainOptions(tmp_path / "x", dataset="movielens"))


def test_dirt_is_told_with_the_lines_that_are_known() -> None:
    report = ReplayReport()
    assert dirt_text(report) == ""
    for number in range(1, 13):
        report.leave_out("columns", number)
    report.dirty["time"] += 2
    assert dirt_text(report) == ("; 14 dirty, left out: 12 columns (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...); 2 time")


def test_the_command_line_names_every_dataset() -> None:
    assert set(re.split(r", | or ", DATASET_NAMES)) == set(DATASETS)
