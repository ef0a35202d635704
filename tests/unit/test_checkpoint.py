"""A version on disk is loaded whole and unchanged, or refused with the right word."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from esmm import checkpoint
from esmm.checkpoint import CheckpointError, Golden, load_version, probe, random_golden, save_version
from esmm.features import DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.model import ESMM

SCHEMA = FeatureSchema(
    [
        SparseFeat("user_id", 50, 4, source="user"),
        DenseFeat("user_dense", 3, source="user"),
        SparseFeat("item_id", 40, 4, use_hash=True, source="item"),
        VarLenSparseFeat(SparseFeat("tags", 20, 4, source="item"), 5, "max", length_name="tags_n"),
        SparseFeat("hour", 24, 2),
    ]
)


@pytest.fixture
def model() -> ESMM:
    return ESMM(SCHEMA, (8, 4), init_std=0.3, dnn_activation="prelu", dnn_use_bn=True, dnn_dropout=0.5)


@pytest.fixture
def version(tmp_path: Path, model: ESMM) -> Path:
    directory = tmp_path / "1"
    directory.mkdir()
    save_version(directory, model, {"version": 1, "parent": None, "offsets": {"served/0": 12}})
    return directory


def refused(directory: Path, **options) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_version(directory, **options)
    return caught.value


def edit_manifest(directory: Path, **fields) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite_weights(directory: Path, change) -> None:
    """Change the tensors and make size, hash and list agree: only the check under test can refuse."""
    path = directory / "model.safetensors"
    state = load(path.read_bytes())
    change(state)
    data = save(state)
    path.write_bytes(data)
    files = json.loads((directory / "manifest.json").read_text())["files"]
    files["model.safetensors"] = {"bytes": len(data), "sha256": checkpoint._sha256(data)}
    edit_manifest(directory, files=files, tensors={name: list(t.shape) for name, t in state.items()})


def test_round_trip_is_exact(version: Path, model: ESMM) -> None:
    loaded = load_version(version, schema_hash=SCHEMA.hash)
    assert loaded.schema == SCHEMA
    assert loaded.model.hyper == model.hyper
    assert not loaded.model.training
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert loaded.manifest["offsets"] == {"served/0": 12}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert probe(loaded) <= 1e-6


def test_saving_leaves_the_mode(tmp_path: Path, model: ESMM) -> None:
    model.train()
    save_version(tmp_path, model, {})
    assert model.training


def test_a_loaded_model_can_learn(version: Path) -> None:
    loaded = load_version(version)
    ids_BS, dense_BD = SCHEMA.pack(*loaded.golden)
    loaded.model.logits(torch.from_numpy(ids_BS), torch.from_numpy(dense_BD)).sum().backward()
    assert loaded.model.ctr_dnn.linears[0].weight.grad is not None


def test_own_fields_are_protected(tmp_path: Path, model: ESMM) -> None:
    with pytest.raises(ValueError, match="'hyper' is written by save_version"):
        save_version(tmp_path, model, {"hyper": {}})


@pytest.mark.parametrize("name", ["model.safetensors", "golden.safetensors"])
@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_flipped_bit_is_corrupt(version: Path, name: str, at: int) -> None:
    data = bytearray((version / name).read_bytes())
    data[at] ^= 1
    (version / name).write_bytes(bytes(data))
    assert refused(version).reason == "corrupt"


@pytest.mark.parametrize("name", ["model.safetensors", "golden.safetensors", "manifest.json"])
def test_a_truncated_file_is_corrupt(version: Path, name: str) -> None:
    data = (version / name).read_bytes()
    (version / name).write_bytes(data[: len(data) // 2])
    assert refused(version).reason == "corrupt"


@pytest.mark.parametrize("name", ["model.safetensors", "golden.safetensors", "manifest.json"])
def test_an_absent_file_is_missing(version: Path, name: str) -> None:
    (version / name).unlink()
    assert refused(version).reason == "missing"


def test_an_absent_directory_is_missing(tmp_path: Path) -> None:
    assert refused(tmp_path / "7").reason == "missing"


@pytest.mark.parametrize("name", ["model.safetensors", "golden.safetensors", "manifest.json"])
def test_a_link_is_refused_even_to_the_right_bytes(version: Path, tmp_path: Path, name: str) -> None:
    (version / name).rename(tmp_path / "elsewhere")
    (version / name).symlink_to(tmp_path / "elsewhere")
    assert refused(version).reason == "corrupt"


def test_a_linked_directory_is_refused(version: Path, tmp_path: Path) -> None:
    (tmp_path / "2").symlink_to(version)
    assert refused(tmp_path / "2").reason == "corrupt"


def test_a_named_pipe_is_refused_without_waiting(version: Path) -> None:
    (version / "model.safetensors").unlink()
    os.mkfifo(version / "model.safetensors")
    error = refused(version)
    assert (error.reason, "not a regular file" in error.detail) == ("corrupt", True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "stream-scorer-model/9"}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_none_is_corrupt(version: Path, text: str) -> None:
    (version / "manifest.json").write_text(text, "latin-1")
    assert refused(version).reason == "corrupt"


@pytest.mark.parametrize("key", ["schema", "schema_hash", "hyper", "files", "tensors"])
def test_a_manifest_with_a_field_of_another_type_is_corrupt(version: Path, key: str) -> None:
    edit_manifest(version, **{key: 3})
    assert refused(version).reason == "corrupt"


def test_an_unlisted_weights_file_is_corrupt(version: Path) -> None:
    edit_manifest(version, files={})
    assert refused(version).reason == "corrupt"


def test_another_schema_is_refused(version: Path) -> None:
    error = refused(version, schema_hash="0" * 16)
    assert error.reason == "schema"
    assert SCHEMA.hash in error.detail


@pytest.mark.parametrize(
    "fields",
    [
        {"schema_hash": "0" * 16},
        {"schema": {"features": []}},
        {"schema": {"features": [{"name": "a", "kind": "tensor"}]}},
        {"hyper": {"tower_dnn_hidden_units": []}},
        {"hyper": {"no_such_argument": 1}},
        {"hyper": {"tower_dnn_hidden_units": "xy"}},
    ],
)
def test_a_schema_or_hyper_that_makes_no_model_is_refused(version: Path, fields) -> None:
    edit_manifest(version, **fields)
    assert refused(version).reason == "schema"


def test_absurd_sizes_are_refused_before_anything_is_allocated(version: Path) -> None:
    wide = FeatureSchema([VarLenSparseFeat(SparseFeat("a", 2, 4), 10**12)])
    edit_manifest(version, schema=wide.to_dict(), schema_hash=wide.hash)
    assert refused(version).reason == "schema"
    tall = FeatureSchema([SparseFeat("a", 10**12, 1000)])
    edit_manifest(version, schema=tall.to_dict(), schema_hash=tall.hash)
    assert refused(version).reason == "shape"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_weight_is_refused(version: Path, value: float) -> None:
    def spoil(state) -> None:
        state["ctr_dnn.linears.0.weight"][3, 2] = value

    rewrite_weights(version, spoil)
    error = refused(version)
    assert error.reason == "nonfinite"
    assert "ctr_dnn.linears.0.weight" in error.detail


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(extra=torch.zeros(2)),
        lambda s: s.pop("out.bias"),
        lambda s: s.update({"out.bias": torch.zeros(2)}),
        lambda s: s.update({"out.bias": torch.zeros(1, dtype=torch.float64)}),
        lambda s: s.update({"out.bias": torch.zeros(1, dtype=torch.float16)}),
        lambda s: s.update({"out.bias": torch.zeros(1, dtype=torch.int64)}),
        lambda s: s.update({"ctr_dnn.linears.0.weight": s["ctr_dnn.linears.0.weight"].T.contiguous()}),
    ],
)
def test_other_tensors_than_the_models_are_refused(version: Path, change) -> None:
    rewrite_weights(version, change)
    assert refused(version).reason == "shape"


def test_a_manifest_that_lists_other_tensors_is_refused(version: Path) -> None:
    tensors = json.loads((version / "manifest.json").read_text())["tensors"]
    edit_manifest(version, tensors=tensors | {"more": [1]})
    assert refused(version).reason == "shape"


def test_weights_that_compute_something_else_fail_the_probe(version: Path) -> None:
    def nudge(state) -> None:
        state["out.bias"] += 1e-3

    rewrite_weights(version, nudge)
    loaded = load_version(version)
    with pytest.raises(CheckpointError) as caught:
        probe(loaded)
    assert caught.value.reason == "probe"


def test_golden_rows_of_another_schema_are_refused(version: Path) -> None:
    path = version / "golden.safetensors"
    tensors = load(path.read_bytes())
    tensors["item_ids"] = tensors["item_ids"][:, :-1].contiguous()
    data = save(tensors)
    path.write_bytes(data)
    files = json.loads((version / "manifest.json").read_text())["files"]
    edit_manifest(
        version, files=files | {"golden.safetensors": {"bytes": len(data), "sha256": checkpoint._sha256(data)}}
    )
    assert refused(version).reason == "shape"


def test_a_version_without_golden_rows_loads_and_has_nothing_to_probe(version: Path) -> None:
    files = json.loads((version / "manifest.json").read_text())["files"]
    edit_manifest(version, files={"model.safetensors": files["model.safetensors"]})
    (version / "golden.safetensors").unlink()
    loaded = load_version(version)
    assert loaded.golden is None
    assert probe(loaded) == 0.0


def test_given_golden_rows_are_kept(tmp_path: Path, model: ESMM) -> None:
    golden = random_golden(SCHEMA, rows=5, seed=9)
    save_version(tmp_path, model, {}, golden)
    loaded = load_version(tmp_path)
    assert isinstance(loaded.golden, Golden)
    for kept, given in zip(loaded.golden, golden, strict=True):
        np.testing.assert_array_equal(kept.ids_NS, given.ids_NS)
        np.testing.assert_array_equal(kept.dense_ND, given.dense_ND)
    assert loaded.golden_logits_B2.shape == (5, 2)


def test_random_golden_reaches_unknown_ids_and_every_length() -> None:
    golden = random_golden(SCHEMA, rows=500)
    assert set(golden.item.ids_NS[:, 6]) == set(range(6))
    assert golden.user.ids_NS.max() == 50
    assert golden.user.dense_ND.std() == pytest.approx(1.0, abs=0.1)
