"""Numerical parity with deepctr-torch 0.3.0, both ways, and its bugs that are fixed here, each shown on both sides."""

import importlib
import sys
import threading
import types

import numpy as np
import pytest
import torch

from esmm.features import DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.model import ESMM

TOLERANCE = 1e-6
ROWS = 257
USER = SparseFeat("user", 50, 8)
ITEM = SparseFeat("item", 30, 4)
PRICE = DenseFeat("price", 2)


def history(combiner: str, length_name: str | None = None, table: str = "item", maxlen: int = 5) -> VarLenSparseFeat:
    return VarLenSparseFeat(SparseFeat("history", 30, 4, embedding_name=table), maxlen, combiner, length_name)


TAGS = VarLenSparseFeat(SparseFeat("tags", 9, 3), 3, "max")
EVERYTHING = [USER, PRICE, history("mean", "history_length"), ITEM, TAGS]
MODELS = {
    "sparse": ([USER, ITEM], {}),
    "shared-embedding": ([USER, ITEM, SparseFeat("last_item", 30, 4, embedding_name="item")], {}),
    "varlen-sum": ([USER, history("sum", table="history")], {}),
    "varlen-mean": ([history("mean"), ITEM], {}),
    "varlen-max": ([ITEM, history("max")], {}),
    "varlen-sum-length": ([ITEM, history("sum", "history_length")], {}),
    "varlen-mean-length": ([history("mean", "history_length"), ITEM], {}),
    "dense": ([USER, PRICE, DenseFeat("age")], {}),
    "dense-only": ([PRICE], {}),
    "batch-norm": (EVERYTHING, {"dnn_use_bn": True}),
    "prelu": (EVERYTHING, {"dnn_activation": "prelu"}),
    "sigmoid": (EVERYTHING, {"dnn_activation": "sigmoid"}),
    "linear": (EVERYTHING, {"dnn_activation": "linear"}),
    "dropout-eval": (EVERYTHING, {"dnn_dropout": 0.5}),
    "one-layer": (EVERYTHING, {"tower_dnn_hidden_units": (12,)}),
    "three-layers": (EVERYTHING, {"dnn_use_bn": True, "tower_dnn_hidden_units": (24, 16, 8)}),
    "auto-dim": ([SparseFeat("user", 700, "auto"), PRICE], {}),
}


class Upstream:
    """deepctr_torch, and our columns in its types."""

    def __init__(self, esmm, inputs) -> None:
        self.esmm, self.inputs = esmm, inputs

    def model(self, columns, **options):
        return self.esmm.ESMM([self.column(c) for c in columns], **({"tower_dnn_hidden_units": (16, 8)} | options))

    def column(self, column):
        if isinstance(column, DenseFeat):
            return self.inputs.DenseFeat(column.name, column.dimension)
        if isinstance(column, VarLenSparseFeat):
            sparse = self.column(column.sparsefeat)
            return self.inputs.VarLenSparseFeat(sparse, column.maxlen, column.combiner, column.length_name)
        return self.inputs.SparseFeat(column.name, column.vocabulary_size, column.dim, embedding_name=column.table)


@pytest.fixture(scope="module")
def upstream():
    """Imported with a stand-in for `requests`: its __init__ starts a thread that asks a package index for updates."""
    answer = types.SimpleNamespace(status_code=0)
    stand_in = types.SimpleNamespace(get=lambda _: answer, codes=types.SimpleNamespace(ok=200))
    before = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "requests", stand_in)
        package = importlib.import_module("deepctr_torch")
        models = importlib.import_module("deepctr_torch.models.multitask.esmm")
        inputs = importlib.import_module("deepctr_torch.inputs")
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert package.__version__ == "0.3.0"
    return Upstream(models, inputs)


def ours(columns, **options) -> ESMM:
    return ESMM(columns, **({"tower_dnn_hidden_units": (16, 8)} | options))


def randomise(model, seed: int = 3) -> None:
    """Weights of std .3, so that a difference in any of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3, generator=generator)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)


def inputs_for(columns, rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs that upstream handles: known ids, lengths within maxlen, some padding, no empty history under max."""
    rng = np.random.default_rng(seed)
    x = {}
    for column in columns:
        if isinstance(column, DenseFeat):
            x[column.name] = rng.normal(size=(rows, column.dimension)).astype(np.float32)
        elif isinstance(column, SparseFeat):
            x[column.name] = rng.integers(0, column.vocabulary_size, rows)
        else:
            x[column.name] = rng.integers(0, column.vocabulary_size, (rows, column.maxlen))
            if column.length_name is not None:
                x[column.length_name] = rng.integers(0, column.maxlen + 1, rows)
            elif column.combiner == "max":
                x[column.name][:, 0] = rng.integers(1, column.vocabulary_size, rows)
            else:
                x[column.name][:20] = 0
    return x


def pair(upstream, columns, **options):
    """Both models with the same random weights."""
    theirs, mine = upstream.model(columns, **options), ours(columns, **options)
    randomise(theirs)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


@pytest.fixture(params=MODELS, ids=list(MODELS))
def case(request):
    return MODELS[request.param]


def test_weights_of_either_load_strictly_in_the_other_and_predict_the_same(upstream, case):
    columns, options = case
    theirs, mine = upstream.model(columns, **options), ours(columns, **options)
    x = inputs_for(columns)
    randomise(theirs, seed=1)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    expected = theirs.predict(dict(x))
    assert expected.std(0).min() > 100 * TOLERANCE, "the inputs must matter for this comparison to mean anything"
    np.testing.assert_allclose(mine.predict(x), expected, atol=TOLERANCE, rtol=0)

    randomise(mine, seed=2)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    np.testing.assert_allclose(theirs.predict(dict(x)), mine.predict(x), atol=TOLERANCE, rtol=0)


def test_forward_takes_the_same_concatenated_input(upstream, case):
    columns, options = case
    theirs, mine = pair(upstream, columns, **options)
    theirs.eval()
    mine.eval()
    x = inputs_for(columns, rows=9)
    X = torch.from_numpy(np.concatenate([x[name].reshape(9, -1) for name in theirs.feature_index], 1)).float()
    with torch.no_grad():
        assert theirs.feature_index == mine.schema.index
        torch.testing.assert_close(mine(X), theirs(X), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", [1024, 7])
def test_same_seed_same_weights(upstream, case, seed):
    columns, options = case
    expected = upstream.model(columns, seed=seed, **options).state_dict()
    actual = ours(columns, seed=seed, **options).state_dict()
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_gradients_of_the_towers_and_tables_agree(upstream):
    theirs, mine = pair(upstream, EVERYTHING, dnn_use_bn=True, dnn_activation="prelu")
    x = inputs_for(EVERYTHING)
    X = torch.from_numpy(np.concatenate([x[name].reshape(ROWS, -1) for name in mine.schema.index], 1)).float()
    for model in (theirs, mine):
        model.train()
        model(X).log().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-4)


def test_l2_penalty_is_upstreams(upstream):
    options = {"l2_reg_embedding": 0.01, "l2_reg_dnn": 0.02, "dnn_use_bn": True, "dnn_activation": "prelu"}
    theirs, mine = pair(upstream, EVERYTHING, **options)
    torch.testing.assert_close(mine.l2_penalty(), theirs.get_regularization_loss()[0])


# Upstream is wrong below this line: each test shows how, and what is right.


def test_ids_above_2_to_the_24_are_exact(upstream):
    big = 2**24 + 1
    columns = [SparseFeat("id", big + 1, 1)]
    theirs, mine = upstream.model(columns), ours(columns)
    for model in (theirs, mine):
        with torch.no_grad():
            model.embedding_dict["id"].weight[-2:] = torch.tensor([[-3.0], [3.0]])
            for tower in (model.ctr_dnn, model.cvr_dnn):
                tower.linears[0].weight.fill_(0.5)
                tower.linears[1].weight.fill_(0.5)
    ids = np.array([big - 1, big])
    wrong = theirs.predict({"id": ids})
    assert np.array_equal(wrong[0], wrong[1]), "float32 makes the two ids one"
    right = mine.predict({"id": ids})
    assert abs(right[0] - right[1]).max() > 1e-3
    for dtype in (torch.int64, torch.float64):
        with torch.no_grad():
            np.testing.assert_allclose(mine(torch.tensor(ids)[:, None].to(dtype)).numpy(), right, atol=TOLERANCE)


def test_max_pooling_of_an_empty_history_is_zero(upstream):
    columns = [ITEM, history("max")]
    theirs, mine = pair(upstream, columns)
    x = {"item": np.arange(1, 9), "history": np.zeros((8, 5), np.int64)}
    wrong = theirs.predict(dict(x))
    assert np.isin(wrong, (0.0, 1.0)).all(), "-1e9 saturates every tower"
    vectors_BD = mine.embed(*(torch.from_numpy(a) for a in mine.pack(x)))
    assert torch.equal(vectors_BD[:, 4:], torch.zeros(8, 4))
    right = mine.predict(x)
    assert ((right > 0) & (right < 1)).all()
    assert len(np.unique(right[:, 0])) == 8


def test_max_pooling_with_a_length_works(upstream):
    columns = [ITEM, history("max", "history_length")]
    theirs, mine = pair(upstream, columns)
    x = inputs_for(columns, rows=64)
    with pytest.raises((NotImplementedError, RuntimeError), match="Subtraction"):
        theirs.predict(dict(x))
    weight = mine.embedding_dict["item"].weight
    expected = torch.stack(
        [weight[h[:n]].amax(0) if n else torch.zeros(4) for h, n in zip(x["history"], x["history_length"], strict=True)]
    )
    assert (x["history_length"] == 0).any()
    vectors_BD = mine.embed(*(torch.from_numpy(a) for a in mine.pack(x)))
    torch.testing.assert_close(vectors_BD[:, 4:], expected)


def test_mean_divides_by_no_more_than_maxlen(upstream):
    columns = [ITEM, history("mean", "history_length", maxlen=3)]
    theirs, mine = pair(upstream, columns)
    x = inputs_for(columns, rows=16)
    full, beyond = x | {"history_length": np.full(16, 3)}, x | {"history_length": np.full(16, 6)}
    assert abs(theirs.predict(dict(beyond)) - theirs.predict(dict(full))).max() > 1e-4, "it divides three ids by six"
    np.testing.assert_array_equal(mine.predict(beyond), mine.predict(full))
    np.testing.assert_allclose(mine.predict(full), theirs.predict(dict(full)), atol=TOLERANCE)


def test_cvr_is_given(upstream):
    theirs, mine = pair(upstream, EVERYTHING)
    assert not hasattr(theirs, "cvr")
    mine.eval()
    x = inputs_for(EVERYTHING)
    X = torch.from_numpy(np.concatenate([x[name].reshape(ROWS, -1) for name in mine.schema.index], 1))
    with torch.no_grad():
        p_B2, cvr_B = mine(X), mine.cvr(X)
    torch.testing.assert_close(p_B2[:, 0] * cvr_B, p_B2[:, 1])
    assert cvr_B.std() > 1e-3


@pytest.mark.parametrize("unseen", [30, -1, 2**40])
def test_unseen_ids_are_zero_vectors(upstream, unseen):
    columns = [USER, ITEM]
    theirs, mine = pair(upstream, columns)
    x = {"user": np.array([3, 3]), "item": np.array([4, unseen])}
    with pytest.raises(IndexError):
        theirs.predict(dict(x))
    vectors_BD = mine.embed(*(torch.from_numpy(a) for a in mine.pack(x)))
    assert torch.equal(vectors_BD[1, 8:], torch.zeros(4))
    with torch.no_grad():
        theirs.embedding_dict["item"].weight[4] = 0  # what an unseen item ought to score like
    np.testing.assert_allclose(mine.predict(x)[1], theirs.predict(x | {"item": np.array([4, 4])})[1], atol=TOLERANCE)


def test_metrics_are_per_task(upstream):
    columns = [USER, PRICE]
    theirs, mine = pair(upstream, columns)
    x = inputs_for(columns, rows=400)
    rng = np.random.default_rng(5)
    click = rng.random(400) < 0.5
    y = np.stack([click, click & (rng.random(400) < 0.3)], 1).astype(np.float32)
    theirs.compile("adam", ["binary_crossentropy"] * 2, metrics=["auc"])
    mixed = theirs.evaluate(dict(x), y)["auc"]
    per_task = mine.evaluate(x, y)
    assert mixed > per_task["ctr_auc"] + 0.05, "one AUC over both tasks rewards telling clicks from conversions"
    assert mixed > per_task["ctcvr_auc"] + 0.05


def test_training_mode_survives_validation(upstream):
    columns = [USER]
    theirs, mine = pair(upstream, columns, dnn_dropout=0.5)
    x = {"user": np.arange(40) % 50}
    y = np.stack([np.arange(40) % 2, np.arange(40) % 4 == 3], 1).astype(np.float32)
    modes = {"theirs": [], "mine": []}
    theirs.compile("sgd", ["binary_crossentropy"] * 2)
    mine.compile("sgd")
    for name, model in (("theirs", theirs), ("mine", mine)):
        tower = model.ctr_dnn.dropout
        tower.register_forward_hook(lambda m, *_, name=name: modes[name].append(m.training))
    theirs.fit(dict(x), y, batch_size=40, epochs=2, verbose=0, validation_data=(dict(x), y))
    mine.fit(x, y, batch_size=40, epochs=2, verbose=0, validation_data=(x, y))
    layers = 2  # the dropout runs once a hidden layer
    assert modes["theirs"] == [True] * layers + [False] * layers + [False] * layers + [False] * layers
    assert modes["mine"] == [True] * layers + [False] * layers + [True] * layers + [False] * layers


def test_schema_and_columns_build_the_same_model():
    schema = FeatureSchema(EVERYTHING)
    a, b = ours(schema), ours(EVERYTHING)
    assert a.schema == b.schema
    assert a.state_dict().keys() == b.state_dict().keys()
