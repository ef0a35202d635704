"""Feature columns and the schema: order, layout, hashing, TOML, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esmm.batch import FeatureBlock
from esmm.features import DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat, hash_ids, is_padded, resolve

SCHEMA = FeatureSchema(
    [
        SparseFeat("item", 30, 4, source="item"),
        DenseFeat("price", 2, source="item"),
        VarLenSparseFeat(
            SparseFeat("history", 30, 4, embedding_name="item", source="user"), 3, "mean", length_name="history_length"
        ),
        DenseFeat("hour"),
        SparseFeat("user", 50, "auto", use_hash=True, source="user"),
        VarLenSparseFeat(SparseFeat("tags", 9, 3, source="item"), 2, "max"),
    ]
)
INT64 = st.integers(-(2**63), 2**63 - 1)


def test_index_is_column_order_with_a_length_right_after_its_history():
    assert SCHEMA.index == {
        "item": (0, 1),
        "price": (1, 3),
        "history": (3, 6),
        "history_length": (6, 7),
        "hour": (7, 8),
        "user": (8, 9),
        "tags": (9, 11),
    }
    assert SCHEMA.width == 11


def test_layout_of_a_source_holds_its_columns_in_order():
    user, item, context = (SCHEMA.layout(source) for source in ("user", "item", "context"))
    assert [(s.name, s.kind, s.start, s.stop) for s in user.ids] == [
        ("history", "varlen", 0, 3),
        ("history_length", "length", 3, 4),
        ("user", "sparse", 4, 5),
    ]
    assert [s.name for s in item.ids] == ["item", "tags"]
    assert (user.id_width, user.dense_width) == (5, 0)
    assert (item.id_width, item.dense_width) == (3, 2)
    assert (context.id_width, context.dense_width) == (0, 1)
    assert user.hash != item.hash


def test_pack_puts_three_blocks_into_column_order():
    user = FeatureBlock(np.array([[1, 2, 3, 2, 9]]), np.zeros((1, 0), np.float32))
    item = FeatureBlock(np.array([[7, 4, 5]]), np.float32([[0.5, 0.25]]))
    context = FeatureBlock(np.zeros((1, 0), np.int64), np.float32([[13]]))
    ids_BS, dense_BD = SCHEMA.pack(user, item, context)
    assert ids_BS.tolist() == [[7, 1, 2, 3, 2, 9, 4, 5]]
    assert dense_BD.tolist() == [[0.5, 0.25, 13]]
    assert (ids_BS.dtype, dense_BD.dtype) == (np.int64, np.float32)


def test_toml_round_trip_keeps_schema_and_hash():
    again = FeatureSchema.from_toml(SCHEMA.to_toml())
    assert again.to_dict() == SCHEMA.to_dict()
    assert again.hash == SCHEMA.hash
    assert again.index == SCHEMA.index


def test_hash_is_stable_across_versions_and_sees_every_meaning():
    assert FeatureSchema([SparseFeat("u", 10, 4, source="user"), DenseFeat("d")]).hash == "a8f57c3286a19156"
    base = SparseFeat("u", 10, 4)
    variants = [
        base,
        SparseFeat("v", 10, 4),
        SparseFeat("u", 11, 4),
        SparseFeat("u", 10, 5),
        SparseFeat("u", 10, 4, use_hash=True),
        SparseFeat("u", 10, 4, embedding_name="t"),
        SparseFeat("u", 10, 4, source="user"),
        VarLenSparseFeat(base, 3),
        VarLenSparseFeat(base, 4),
        VarLenSparseFeat(base, 3, "sum"),
        VarLenSparseFeat(base, 3, "mean", "n"),
        DenseFeat("u"),
        DenseFeat("u", 2),
    ]
    assert len({FeatureSchema([v]).hash for v in variants}) == len(variants)


def test_numpy_sizes_become_plain_ones():
    history = VarLenSparseFeat(SparseFeat("h", np.int64(9), np.int32(4)), np.int64(3))
    schema = FeatureSchema([history, DenseFeat("d", np.int8(2))])
    assert schema.hash == FeatureSchema([VarLenSparseFeat(SparseFeat("h", 9, 4), 3), DenseFeat("d", 2)]).hash


def test_auto_dimension_and_shared_name():
    assert SparseFeat("u", 700, "auto").dim == 6 * int(700**0.25)
    assert SparseFeat("u", 7).table == "u"
    assert SparseFeat("u", 7, embedding_name="t").table == "t"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SparseFeat("u", 0), "'u'.*vocabulary_size must be at least 1, got 0"),
        (lambda: SparseFeat("u", 5, 0), "'u'.*embedding_dim must be at least 1, got 0"),
        (lambda: SparseFeat("u", 5, source="basket"), "'u'.*source must be one of user, item, context, got 'basket'"),
        (lambda: VarLenSparseFeat(SparseFeat("h", 5), 0), "'h'.*maxlen must be at least 1"),
        (lambda: VarLenSparseFeat(SparseFeat("h", 5), 3, "last"), r"mode should in \[sum, mean, max\], got 'last'"),
        (lambda: SparseFeat("u", 5.5), "'u'.*vocabulary_size must be a whole number, got 5.5"),
        (lambda: SparseFeat("u", 5, "wide"), "'u'.*embedding_dim must be a whole number, got 'wide'"),
        (lambda: DenseFeat("d", 0), "'d'.*dimension must be at least 1"),
        (lambda: FeatureSchema([SparseFeat("u", 5), DenseFeat("u")]), "'u' is used twice"),
        (lambda: FeatureSchema([VarLenSparseFeat(SparseFeat("h", 5), 3, "sum", "h")]), "'h' is used twice"),
        (
            lambda: FeatureSchema([SparseFeat("a", 5, 4), SparseFeat("b", 5, 8, embedding_name="a")]),
            "table 'a' is shared by 'a' .vocabulary_size 5, embedding_dim 4. and 'b' .5, 8.",
        ),
        (
            lambda: FeatureSchema([SparseFeat("a", 5, 4), SparseFeat("b", 6, 4, embedding_name="a")]),
            "table 'a' is shared",
        ),
        (lambda: FeatureSchema.from_toml(""), r"at least one \[\[features\]\]"),
        (lambda: FeatureSchema.from_toml("[[feature]]\nname='u'"), "unknown key 'feature'"),
        (lambda: FeatureSchema.from_toml("[[features]]\nname='u'\nkind='text'"), r"kind sparse\|varlen\|dense"),
        (lambda: FeatureSchema.from_toml("[[features]]\nname='u'\nkind='sparse'\nvocab=3"), "'u': unknown key 'vocab'"),
        (lambda: FeatureSchema.from_toml("[[features]]\nname='u'\nkind='sparse'"), "'u'.*vocabulary_size"),
    ],
)
def test_bad_columns_are_refused_with_the_name_and_what_was_given(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def splitmix64(x: int) -> int:
    """The published reference, in unbounded integers."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_reference_is_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # first output of the generator seeded with 0


@given(st.lists(INT64, min_size=1, max_size=20), st.integers(1, 2**40), st.booleans())
def test_hash_is_the_same_in_numpy_torch_and_by_definition(ids, vocabulary, padded):
    array = np.array(ids, np.int64)
    rows = hash_ids(array, vocabulary, padded=padded)
    assert torch.equal(hash_ids(torch.tensor(ids), vocabulary, padded=padded), torch.from_numpy(rows))
    if padded:
        expected = [(splitmix64(i & 2**64 - 1) >> 1) % max(vocabulary - 1, 1) + 1 if i else 0 for i in ids]
    else:
        expected = [(splitmix64(i & 2**64 - 1) >> 1) % vocabulary for i in ids]
    assert rows.tolist() == expected
    assert array.tolist() == ids, "the input is not written to"


def test_hash_spreads_consecutive_ids_evenly():
    counts = np.bincount(hash_ids(np.arange(100_000), 100), minlength=100)
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 99 + 5 * (2 * 99) ** 0.5


@given(st.lists(INT64, min_size=1, max_size=20))
def test_resolve_marks_what_lies_outside_the_vocabulary(ids):
    rows, known = resolve(SparseFeat("u", 10), np.array(ids))
    assert known.tolist() == [0 <= i < 10 for i in ids]
    assert rows.tolist() == [i if 0 <= i < 10 else 0 for i in ids]
    rows_t, known_t = resolve(SparseFeat("u", 10), torch.tensor(ids))
    assert (rows_t.tolist(), known_t.tolist()) == (rows.tolist(), known.tolist())


def test_resolve_hashes_and_keeps_padding_where_zero_is_padding():
    hashed = SparseFeat("h", 10, use_hash=True)
    ids = np.array([0, -5, 2**60, 3])
    assert resolve(hashed, ids)[1].all()
    padded = VarLenSparseFeat(hashed, 4)
    assert is_padded(padded)
    rows, known = resolve(padded, ids)
    assert known.all()
    assert rows[0] == 0
    assert (rows[1:] > 0).all()
    counted = VarLenSparseFeat(hashed, 4, "mean", "n")
    assert not is_padded(counted)
    assert np.array_equal(resolve(counted, ids)[0], resolve(hashed, ids)[0])
