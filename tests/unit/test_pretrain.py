"""``pretrain``: a parquet file of matured impressions becomes a first version that beats the base rate."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm.checkpoint import load_version
from esmm.learner import Evaluator
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.settings import load
from stream_scorer.wiring import build, connect
from stream_scorer.wiring.pretrain import PretrainOptions, read_matured, run_pretrain, start_from_live

SCHEMA = """
[[features]]
name = "user_id"
kind = "sparse"
source = "user"
vocabulary_size = 20
embedding_dim = 4

[[features]]
name = "taste"
kind = "dense"
source = "item"
dimension = 2
"""


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "features.toml").write_text(SCHEMA)
    return load(
        None,
        overrides={
            "model.schema_file": str(tmp_path / "features.toml"),
            "model.store": str(tmp_path / "models"),
            "model.tower_hidden_units": [16],
            "trainer.learning_rate": 0.01,
        },
    )


def table(rows=6_000, seed=0, **columns):
    rng = np.random.default_rng(seed)
    taste_N2 = rng.standard_normal((rows, 2)).astype(np.float32)
    click_N = rng.random(rows) < 1 / (1 + np.exp(-2 * taste_N2[:, 0]))
    conversion_N = click_N & (rng.random(rows) < 1 / (1 + np.exp(-2 * taste_N2[:, 1])))
    return {
        "user_id": rng.integers(0, 20, rows),
        "taste": list(taste_N2),
        "click": click_N.astype(int),
        "conversion": conversion_N.astype(int),
        "time": np.arange(rows)[::-1],
        **columns,
    }


def written(tmp_path, data):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(data), path)
    return path


def test_a_first_version_is_published_that_ranks_and_is_where_training_starts(tmp_path, settings, capsys):
    path = written(tmp_path, table())
    assert run_pretrain(settings, PretrainOptions(path, epochs=4)) == 0
    assert "version 1 published" in capsys.readouterr().out
    store, schema = DirectoryStore(tmp_path / "models"), connect.load_schema(settings)
    assert store.current() == 1
    loaded = load_version(store.info(1).path, schema.hash)
    assert loaded.manifest["pretrained"]["rows"] == 6_000
    ctr_B, ctcvr_B = Evaluator(loaded.model).predict(read_matured(written(tmp_path, table(seed=1)), schema))
    fresh = table(seed=1)
    click_N = np.asarray(fresh["click"])[::-1]  # read in order of time
    assert ctr_B[click_N == 1].mean() > ctr_B[click_N == 0].mean() + 0.3
    assert np.all(ctcvr_B <= ctr_B)
    learner = build.learner(settings, schema)
    assert start_from_live(learner, store, schema) == 1
    assert all(bool((a == b).all()) for a, b in zip(learner.model.parameters(), loaded.model.parameters(), strict=True))


def test_it_stops_early_and_keeps_the_best_epoch(tmp_path, settings, capsys):
    noise = np.random.default_rng(3).integers(0, 2, 400)  # nothing to learn but the rows themselves
    path = written(tmp_path, table(rows=400, click=noise, conversion=noise * 0))
    run_pretrain(settings, PretrainOptions(path, epochs=60, patience=2))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("log loss ")[1].split()[0]) + float(line.split("CTR, ")[1].split()[0]) for line in lines]
    assert len(lines) < 60
    assert losses[-1] <= min(losses[:-1]) + 1e-4


def test_rows_come_in_order_of_time(tmp_path, settings):
    data = table(rows=50)
    examples = read_matured(written(tmp_path, data), connect.load_schema(settings))
    assert examples.user.ids_NS[:, 0].tolist() == data["user_id"][::-1].tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"click": np.full(50, 2)}, "column 'click' must be 0 or 1"),
        ({"click": np.zeros(50, int), "conversion": np.ones(50, int)}, "conversion without a click"),
        ({"taste": [[np.nan, 0.0]] * 50}, "not finite"),
        ({"taste": [[1.0]] * 50}, "has 1 values, the schema 2"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(tmp_path, settings, change, words):
    path = written(tmp_path, table(rows=50, **change))
    with pytest.raises(ConfigurationError, match=words):
        run_pretrain(settings, PretrainOptions(path))
    assert DirectoryStore(tmp_path / "models").current() is None


def test_a_missing_column_and_a_file_that_is_no_parquet(tmp_path, settings):
    schema = connect.load_schema(settings)
    data = table(rows=50)
    del data["conversion"]
    with pytest.raises(ConfigurationError, match="no column 'conversion'"):
        read_matured(written(tmp_path, data), schema)
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(ConfigurationError, match="not a parquet file"):
        read_matured(tmp_path / "text.parquet", schema)
