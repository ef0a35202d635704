"""ESMM: what it refuses, how ids become vectors, its three ways in, and offline training."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from esmm.batch import FeatureBlock
from esmm.features import SOURCES, DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat, hash_ids
from esmm.model import ESMM, probabilities

MIXED = [
    SparseFeat("user", 50, 8, source="user"),
    DenseFeat("price", 2, source="item"),
    VarLenSparseFeat(SparseFeat("history", 30, 4, embedding_name="item", source="user"), 5, "mean", "history_length"),
    SparseFeat("item", 30, 4, source="item"),
    DenseFeat("hour"),
    VarLenSparseFeat(SparseFeat("tags", 9, 3, source="item"), 3, "max"),
    SparseFeat("city", 1000, 2, use_hash=True, source="user"),
]


def model_of(columns, seed: int = 0, **options) -> ESMM:
    """A small model in evaluation mode with weights of std .3."""
    model = ESMM(columns, **({"tower_dnn_hidden_units": (8, 4)} | options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def mixed_inputs(rows: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Ids known and unknown, lengths beyond maxlen, empty histories."""
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(-5, 55, rows),
        "price": rng.normal(size=(rows, 2)),
        "history": rng.integers(-2, 33, (rows, 5)),
        "history_length": rng.integers(-1, 8, rows),
        "item": rng.integers(0, 40, rows),
        "hour": rng.normal(size=rows),
        "tags": rng.integers(0, 10, (rows, 3)) * (rng.random((rows, 1)) < 0.7),
        "city": rng.integers(-(2**62), 2**62, rows),
    }


def tensors(model: ESMM, x) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BS, dense_BD = model.pack(x)
    return torch.from_numpy(ids_BS), torch.from_numpy(dense_BD)


def embedded(model: ESMM, **x) -> list[list[float]]:
    return model.embed(*tensors(model, {name: np.asarray(values) for name, values in x.items()})).tolist()


# What the constructor refuses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task_names": ("ctr",)}, r"^the length of task_names must be equal to 2, got \['ctr'\]"),
        ({"task_names": ("a", "b", "c")}, "^the length of task_names must be equal to 2"),
        ({"dnn_feature_columns": []}, r"^dnn_feature_columns is null! got \[\]"),
        ({"task_types": ("binary",)}, r"^num_tasks must be equal to the length of task_types, got \['binary'\]"),
        ({"task_types": ("binary", "regression")}, "^task must be binary in ESMM, regression is illegal"),
        ({"tower_dnn_hidden_units": ()}, r"^hidden_units is empty!!.*\[\]"),
        ({"tower_dnn_hidden_units": (8, 0)}, r"hidden units must be at least 1, got \[8, 0\]"),
        ({"dnn_activation": "dice"}, "dnn_activation must be one of relu, sigmoid, linear, prelu, got 'dice'"),
        ({"dnn_dropout": 1.5}, r"dropout.*1\.5"),
        ({"gpus": [0]}, "^`gpus.0.` should be the same gpu with `device`, got gpus=.0., device='cpu'"),
        ({"gpus": [1], "device": "cuda:10"}, "^`gpus.0.` should be the same gpu"),
        ({"gpus": [0, 1], "device": "cuda:0"}, "one process drives one GPU, got gpus=.0, 1."),
        ({"dnn_feature_columns": [SparseFeat("a.b", 3)]}, "'a.b' cannot name a table"),
        ({"dnn_feature_columns": [SparseFeat("keys", 3)]}, "'keys' cannot name a table"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_given(arguments, words):
    with pytest.raises(ValueError, match=words):
        ESMM(**({"dnn_feature_columns": MIXED} | arguments))


def test_checks_come_in_the_known_order():
    bad = {"dnn_feature_columns": [], "task_types": ("x",), "task_names": ("one",), "tower_dnn_hidden_units": ()}
    good = {"task_names": ("ctr", "ctcvr"), "dnn_feature_columns": MIXED, "task_types": ("binary", "binary")}
    order = ["task_names", "dnn_feature_columns is null", "num_tasks", "hidden_units is empty"]
    for words, fix in zip(order, [*good, None], strict=True):
        with pytest.raises(ValueError, match=words):
            ESMM(**bad)
        if fix is not None:
            bad[fix] = good[fix]


def test_something_that_is_no_column_is_refused():
    with pytest.raises(TypeError, match=r"^Invalid feature column type,got <class 'str'>"):
        ESMM(["user"])


def test_defaults_are_the_known_ones():
    model = ESMM(MIXED)
    assert model.hyper == {
        "tower_dnn_hidden_units": [256, 128],
        "l2_reg_linear": 1e-5,
        "l2_reg_embedding": 1e-5,
        "l2_reg_dnn": 0,
        "init_std": 1e-4,
        "seed": 1024,
        "dnn_dropout": 0,
        "dnn_activation": "relu",
        "dnn_use_bn": False,
        "task_types": ["binary", "binary"],
        "task_names": ["ctr", "ctcvr"],
    }
    p = model.predict(mixed_inputs())
    assert abs(p - [0.5, 0.25]).max() < 0.05, "an untrained model knows nothing"


def test_hyper_survives_json_and_rebuilds_the_model():
    model = ESMM(MIXED, (6, 5), dnn_use_bn=True, dnn_activation="prelu", dnn_dropout=0.1, seed=3, init_std=0.02)
    again = ESMM.from_hyper(model.schema, json.loads(json.dumps(model.hyper)))
    assert again.hyper == model.hyper
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_building_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ESMM(MIXED)
    assert torch.equal(torch.rand(3), expected)


def test_state_dict_holds_parameters_and_batch_norm_only():
    names = set(ESMM(MIXED, dnn_use_bn=True).state_dict())
    assert not [name for name in names if name.startswith("_inputs") or "columns" in name or "vocabulary" in name]
    assert {"embedding_dict.item.weight", "out.bias", "ctr_dnn.linears.0.weight", "ctr_dnn.bn.1.running_var"} <= names
    assert {"cvr_dnn_final_layer.weight", "ctr_dnn_final_layer.weight"} <= names


# From ids to vectors


def test_input_order_is_sparse_then_histories_then_dense():
    model = model_of(MIXED)
    x = {name: values[:1] for name, values in mixed_inputs().items()} | {"user": np.array([7]), "city": np.array([123])}
    (row,) = embedded(model, **x)
    assert model.input_dim == len(row) == 8 + 4 + 2 + 4 + 3 + 2 + 1
    tables = model.embedding_dict
    assert row[:8] == tables["user"].weight[7].tolist()
    assert row[12:14] == tables["city"].weight[int(hash_ids(np.array([123]), 1000)[0])].tolist()
    assert row[-3:] == np.float32([*x["price"][0], x["hour"][0]]).tolist()


def brute_pool(weight, ids, length, combiner):
    """One history, straight from the rules: unknown ids are zero vectors, an empty history is zero."""
    counted = [i for i in ids if i != 0] if length is None else list(ids[: max(0, length)])
    vectors = [weight[i] if 0 <= i < len(weight) else np.zeros(weight.shape[1]) for i in counted]
    if not vectors:
        return np.zeros(weight.shape[1])
    return {"sum": np.sum, "mean": np.mean, "max": np.max}[combiner](vectors, axis=0)


@pytest.mark.parametrize("combiner", ["sum", "mean", "max"])
@pytest.mark.parametrize("length_name", [None, "n"])
def test_pooling_is_what_the_rules_say(combiner, length_name):
    model = model_of([VarLenSparseFeat(SparseFeat("h", 7, 3), 4, combiner, length_name)])
    rng = np.random.default_rng(1)
    ids = rng.integers(-2, 9, (200, 4)) * (rng.random((200, 4)) < 0.8)
    lengths = rng.integers(-2, 7, 200)
    x = {"h": ids} if length_name is None else {"h": ids, "n": lengths}
    weight = model.embedding_dict["h"].weight.detach().numpy()
    expected = [
        brute_pool(weight, row, None if length_name is None else n, combiner)
        for row, n in zip(ids, lengths, strict=True)
    ]
    assert (np.abs(expected).max(1) == 0).any(), "an empty history is among them"
    np.testing.assert_allclose(embedded(model, **x), expected, atol=1e-6)


def test_hashed_histories_keep_their_padding():
    model = model_of([VarLenSparseFeat(SparseFeat("h", 100, 2, use_hash=True), 3, "sum")])
    far = 2**61 + 5
    weight = model.embedding_dict["h"].weight
    row = int(hash_ids(np.array([far]), 100, padded=True)[0])
    assert embedded(model, h=[[far, 0, 0], [0, 0, 0]]) == [weight[row].tolist(), [0.0, 0.0]]


def test_hashing_does_not_write_into_the_callers_ids():
    model = model_of([SparseFeat("u", 100, 2, use_hash=True)])
    for rows in (1, 3):
        ids_BS = torch.arange(rows)[:, None] + 2**50
        before = ids_BS.clone()
        model.embed(ids_BS, torch.zeros(rows, 0))
        assert torch.equal(ids_BS, before)


def test_sources_together_make_the_whole_input():
    model = model_of(MIXED)
    blocks = {}
    rng = np.random.default_rng(0)
    for source in SOURCES:
        layout = model.schema.layout(source)
        ids = rng.integers(-3, 40, (33, layout.id_width))
        blocks[source] = FeatureBlock(ids, rng.normal(size=(33, layout.dense_width)).astype(np.float32))
    whole = model.embed(*map(torch.from_numpy, model.schema.pack(**blocks)))
    columns = [model.input_columns(source) for source in SOURCES]
    assert sorted(np.concatenate(columns)) == list(range(model.input_dim))
    for source, of_x in zip(SOURCES, columns, strict=True):
        part = model.embed_source(source, *map(torch.from_numpy, blocks[source]))
        assert torch.equal(part, whole[:, of_x])


def test_a_lookup_replaces_the_tables_and_sees_valid_rows_only():
    model = model_of(MIXED)
    asked = []
    leaves = {name: table.weight.detach().clone().requires_grad_() for name, table in model.embedding_dict.items()}

    def lookup(table, rows):
        asked.append((table, int(rows.min()), int(rows.max())))
        return leaves[table][rows]

    ids_BS, dense_BD = tensors(model, mixed_inputs())
    x_BD = model.embed(ids_BS, dense_BD, lookup)
    assert torch.equal(x_BD, model.embed(ids_BS, dense_BD))
    assert [table for table, *_ in asked] == ["user", "item", "city", "item", "tags"]
    assert all(0 <= low <= high < len(leaves[table]) for table, low, high in asked)
    model.towers(x_BD).sum().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves.values())
    assert all(table.weight.grad is None for table in model.embedding_dict.values())


# Forward


def test_forward_logits_predict_and_cvr_say_the_same():
    model = model_of(MIXED, dnn_use_bn=True)
    x = mixed_inputs()
    X = torch.from_numpy(np.concatenate([x[name].reshape(64, -1).astype(np.float64) for name in model.schema.index], 1))
    x["city"] = X[:, model.schema.index["city"][0]].numpy().astype(np.int64)  # what float64 leaves of 62 bits
    with torch.no_grad():
        p = probabilities(model.logits(*tensors(model, x)))
        assert torch.equal(model(X), torch.stack([p.ctr_B, p.ctcvr_B], 1))
        assert torch.equal(model.cvr(X), p.cvr_B)
    assert torch.equal(p.ctcvr_B, p.ctr_B * p.cvr_B)
    np.testing.assert_allclose(model.predict(x), torch.stack([p.ctr_B, p.ctcvr_B], 1), atol=1e-7)


def test_x_of_integers_keeps_ids_exact_and_extra_columns_are_ignored():
    model = model_of([SparseFeat("u", 9, 2, use_hash=True), DenseFeat("d")])
    big = 2**62 + 1
    X = torch.tensor([[big, 3, 99], [big - 1, 3, 99]])
    with torch.no_grad():
        actual = model(X)
    np.testing.assert_allclose(model.predict({"u": X[:, 0].numpy(), "d": X[:, 1].numpy()}), actual, atol=1e-7)
    assert not torch.equal(actual[0], actual[1])


def test_x_of_the_wrong_shape_is_refused():
    model = model_of(MIXED)
    with pytest.raises(ValueError, match=r"X must be \(rows, 15\), got \(4, 14\)"):
        model(torch.zeros(4, 14))
    with pytest.raises(ValueError, match=r"got \(15,\)"):
        model(torch.zeros(15))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows):
    model = model_of(MIXED, dnn_use_bn=True)
    assert model.predict(mixed_inputs(rows)).shape == (rows, 2)
    with torch.no_grad():
        assert model(torch.zeros(rows, model.schema.width)).shape == (rows, 2)


def test_probabilities_of_extreme_logits_are_finite():
    p = probabilities(torch.tensor([[1e4, -1e4], [0.0, 0.0]]))
    assert p.ctr_B.tolist() == [1.0, 0.5]
    assert p.cvr_B.tolist() == [0.0, 0.5]
    assert p.ctcvr_B.tolist() == [0.0, 0.25]


def test_the_graph_is_free_of_python_data():
    """Exports with a dynamic batch: nothing in the forward depends on values or builds tensors from Python lists."""
    model = model_of(MIXED)
    ids_BS, dense_BD = tensors(model, mixed_inputs())

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids_BS, dense_BD):
            return self.model.logits(ids_BS, dense_BD)

    rows = torch.export.Dim("rows")
    exported = torch.export.export(Logits(), (ids_BS, dense_BD), dynamic_shapes=({0: rows}, {0: rows}))
    assert not [n.name for n in exported.graph.nodes if "lift_fresh" in str(n.target) or "_to_copy" in str(n.target)]
    again = exported.module()(ids_BS[:7], dense_BD[:7])
    torch.testing.assert_close(again, model.logits(ids_BS[:7], dense_BD[:7]))


def test_a_copy_is_independent():
    model = model_of(MIXED)
    x = mixed_inputs()
    before = model.predict(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.out.bias.fill_(1.0)
    assert np.array_equal(model.predict(x), before)
    assert (other.predict(x)[:, 0] > before[:, 0]).all()


# predict


def test_predict_does_not_depend_on_the_batch_size_and_keeps_the_mode():
    model = model_of(MIXED, dnn_dropout=0.5)
    x = mixed_inputs()
    model.train()
    whole = model.predict(x, batch_size=1000)
    assert model.training
    assert whole.dtype == np.float64
    for size in (1, 7, 64):
        np.testing.assert_allclose(model.predict(x, batch_size=size), whole, atol=1e-6)
    assert not model.eval().predict(x).any() < 0
    assert not model.training


def test_predict_takes_a_list_in_index_order():
    model = model_of(MIXED)
    x = mixed_inputs()
    assert np.array_equal(model.predict([x[name] for name in model.schema.index]), model.predict(x))


def test_predict_names_a_missing_or_misshapen_feature():
    model = model_of(MIXED)
    x = mixed_inputs()
    with pytest.raises(KeyError, match="feature 'hour' is missing"):
        model.predict({name: values for name, values in x.items() if name != "hour"})
    with pytest.raises(ValueError, match=r"feature 'price' must be \(rows, 2\), got \(64, 3\)"):
        model.predict(x | {"price": np.zeros((64, 3))})
    with pytest.raises(ValueError, match=r"feature 'hour' has 63 rows, 'user' has 64"):
        model.predict(x | {"hour": np.zeros(63)})


# Offline training


def funnel(rows: int = 4000, seed: int = 0):
    """Clicks that depend on the item, conversions that depend on a float."""
    rng = np.random.default_rng(seed)
    appeal = np.random.default_rng(99).normal(0, 1.5, 40)
    item, quality = rng.integers(0, 40, rows), rng.normal(size=rows)
    click = rng.random(rows) < 1 / (1 + np.exp(1 - appeal[item]))
    conversion = click & (rng.random(rows) < 1 / (1 + np.exp(-2 * quality)))
    return {"item": item, "quality": quality}, np.stack([click, conversion], 1)


COLUMNS = [SparseFeat("item", 40, 4), DenseFeat("quality")]


def trainable(**options) -> ESMM:
    model = ESMM(COLUMNS, **({"tower_dnn_hidden_units": (16, 8), "init_std": 0.2} | options))
    model.compile("adam", "binary_crossentropy")
    model._recipe.optimizer.param_groups[0]["lr"] = 0.01
    return model


def test_fit_learns_both_tasks_and_tells_each():
    model = trainable()
    history = model.fit(*funnel(), epochs=6, verbose=0, validation_split=0.25)
    names = {f"{task}_{metric}" for task in ("ctr", "ctcvr") for metric in ("auc", "logloss", "pcoc")}
    assert set(history.history) == {"loss", *names, *(f"val_{name}" for name in names)}
    assert history.epoch == list(range(6))
    assert history.history["loss"][-1] < history.history["loss"][0]
    found = model.evaluate(*funnel(seed=1))
    assert found["ctr_auc"] > 0.75
    assert found["ctcvr_auc"] > 0.75
    assert found["ctr_pcoc"] == pytest.approx(1, abs=0.15)
    assert found["ctcvr_pcoc"] == pytest.approx(1, abs=0.2)
    assert model.training, "evaluate leaves training mode on"


def test_history_is_exact_and_named_by_the_tasks_given():
    x, y = funnel(500)
    model = trainable(task_names=("click", "order"))
    history = model.fit(x, y, epochs=1, verbose=0, validation_data=(x, y)).history
    assert {name: values[-1] for name, values in history.items() if name.startswith("val_")} == {
        f"val_{name}": value for name, value in model.evaluate(x, y).items()
    }
    assert "click_auc" in history
    assert "order_auc" in history


def test_fit_is_reproducible_and_shuffles_by_its_own_seed():
    x, y = funnel(600)
    first, again, ordered = trainable(), trainable(), trainable()
    torch.manual_seed(1)
    first.fit(x, y, verbose=0)
    torch.manual_seed(2)
    again.fit(x, y, verbose=0)
    ordered.fit(x, y, verbose=0, shuffle=False)
    assert np.array_equal(first.predict(x), again.predict(x))
    assert not np.array_equal(first.predict(x), ordered.predict(x))


def test_metrics_of_one_class_are_nan_and_chosen_metrics_only():
    model = trainable()
    model.compile("sgd", ["binary_crossentropy", "binary_crossentropy"], metrics=["auc", "binary_crossentropy"])
    x, y = funnel(100)
    found = model.evaluate(x, np.zeros_like(y))
    assert set(found) == {"ctr_auc", "ctr_logloss", "ctcvr_auc", "ctcvr_logloss"}
    assert math.isnan(found["ctr_auc"])
    assert found["ctr_logloss"] > 0


def test_the_last_row_alone_does_not_break_batch_norm():
    model = trainable(dnn_use_bn=True)
    x, y = funnel(33)
    model.fit(x, y, batch_size=16, verbose=0)
    assert int(model.ctr_dnn.bn[0].num_batches_tracked) == 2


def test_l2_pulls_weights_in():
    x, y = funnel(1000)
    free, held = trainable(l2_reg_embedding=0), trainable(l2_reg_embedding=1.0, l2_reg_dnn=1.0)
    for model in (free, held):
        model.fit(x, y, epochs=10, verbose=0)
    assert held.embedding_dict["item"].weight.norm() < 0.5 * free.embedding_dict["item"].weight.norm()


def test_progress_is_shown_when_asked(capsys):
    x, y = funnel(300)
    model = trainable()
    model.fit(x, y, verbose=0)
    assert capsys.readouterr() == ("", "")
    model.fit(x, y, verbose=1)
    bar = capsys.readouterr().err
    assert "epoch 1/1" in bar
    assert "300/300" in bar
    assert "ctcvr_auc=" in bar
    model.fit(x, y, verbose=2, epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [text.split(" loss=")[0] for text in lines] == ["epoch 1/2", "epoch 2/2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optimizer": "adamw"}, "unknown optimizer 'adamw'; choose sgd, adam, adagrad, rmsprop"),
        ({"loss": "mse"}, "got loss='mse'"),
        ({"loss": ["binary_crossentropy", "mse"]}, "got loss="),
        ({"metrics": ["acc"]}, "unknown metric 'acc'; choose from auc, logloss, pcoc"),
    ],
)
def test_compile_refuses_what_it_does_not_know(arguments, words):
    with pytest.raises(ValueError, match=words):
        ESMM(COLUMNS).compile(**arguments)


def test_compile_takes_an_optimizer():
    model = ESMM(COLUMNS, (4,))
    x, y = funnel(50)
    before = model.predict(x)
    model.compile(torch.optim.SGD(model.parameters(), lr=0.0))
    model.fit(x, y, verbose=0)
    assert np.array_equal(model.predict(x), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y": np.zeros(10)}, r"y must be \(10, 2\)"),
        ({"y": np.zeros((9, 2))}, r"y must be \(10, 2\).*got \(9, 2\)"),
        ({"y": np.full((10, 2), 0.5)}, "labels must be 0 or 1"),
        ({"y": np.array([[1, 1]] * 3 + [[0, 1]] * 7)}, "row 3 has a conversion without a click"),
        ({"validation_split": 1.0}, r"validation_split must be in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch size of at least one"),
    ],
)
def test_fit_refuses_bad_labels_and_splits(change, words):
    x, y = funnel(10)
    with pytest.raises(ValueError, match=words):
        trainable().fit(x, **({"y": y, "verbose": 0} | change))


def test_fit_needs_compile_first():
    with pytest.raises(ValueError, match="call compile"):
        ESMM(COLUMNS).fit(*funnel(10))


def test_schema_from_toml_builds_the_same_model():
    schema = FeatureSchema.from_toml(FeatureSchema(MIXED).to_toml())
    assert np.array_equal(ESMM(schema).predict(mixed_inputs()), ESMM(MIXED).predict(mixed_inputs()))
