import numpy as np
import orjson
import pytest
import safetensors.numpy

from esmm.batch import FeatureBlock, Scores, Slot, SourceLayout
from stream_scorer.core.assemble import assemble, plan
from stream_scorer.core.codec import ScoredBatch
from stream_scorer.core.messages import ScoreRequest
from stream_scorer.core.records import FeatureRows, Fetched
from stream_scorer.core.rejects import Reject
from stream_scorer.core.served import Dense, ServedLayout, ServedRequest, encode_served, kept_rows
from stream_scorer.core.served_read import decode_all, decode_served
from tests.builders import CONTEXT, LAYOUT, NOW_MS, fetched, record, request, scores

REQUESTS = [
    request("r1", ["a", "b", "c"], context={"hour": 3, "speed": 0.5}),
    request('r"2\n', ["ü", "b"], user_id="u\\2", ts=NOW_MS - 7, item_context={"position": [1, 2]}),
]


def scored(requests: list[ScoreRequest], given: Scores | None = None, degraded: bool = False) -> ScoredBatch:
    batch_plan = plan(requests)
    features = fetched(batch_plan, degraded)
    batch = assemble(requests, batch_plan, features, CONTEXT)
    return ScoredBatch(requests, batch_plan, batch, features, given or scores(batch_plan.rows), NOW_MS + 250)


def decode(value: bytes | None, layout: ServedLayout = LAYOUT) -> ServedRequest | Reject:
    return decode_served(record(value), layout)


def encode(batch: ScoredBatch, top_k: int = 50, dense: Dense = "float32") -> list[bytes]:
    return encode_served(batch, LAYOUT, top_k, dense)


def assert_block(got: FeatureBlock, want: FeatureBlock) -> None:
    np.testing.assert_array_equal(got.ids_NS, want.ids_NS)
    np.testing.assert_array_equal(got.dense_ND, want.dense_ND)
    assert (got.ids_NS.dtype, got.dense_ND.dtype) == (np.int64, np.float32)


def test_the_trainer_reads_exactly_what_was_scored() -> None:
    batch = scored(REQUESTS, degraded=True)
    for at, value in enumerate(encode(batch)):
        got = decode(value)
        assert isinstance(got, ServedRequest)
        rows = np.arange(batch.plan.starts[at], batch.plan.starts[at + 1])
        one = REQUESTS[at]
        assert (got.request_id, got.user_id, got.items, got.ts_ms) == (one.request_id, one.user_id, one.items, one.ts)
        assert (got.model_version, got.scored_at_ms, got.degraded) == (3, NOW_MS + 250, True)
        assert_block(got.user, batch.batch.user.take(batch.batch.user_of_B[rows[:1]]))
        assert_block(got.item, batch.batch.item.take(batch.batch.item_of_B[rows]))
        assert_block(got.context, batch.batch.context.take(rows))
        np.testing.assert_array_equal(got.ctr_K, batch.scores.ctr_B[rows])
        np.testing.assert_array_equal(got.ctcvr_K, batch.scores.ctcvr_B[rows])


@pytest.mark.parametrize("dense", ["float32", "float16"])
def test_safetensors_reads_it(dense: Dense) -> None:
    batch = scored(REQUESTS)
    for at, value in enumerate(encode(batch, dense=dense)):
        tensors = safetensors.numpy.load(value)
        got = decode(value)
        assert isinstance(got, ServedRequest)
        assert set(tensors) == {
            "user_ids", "item_ids", "context_ids", "user_dense", "item_dense", "context_dense", "ctr", "ctcvr",
        }  # fmt: skip
        assert tensors["item_dense"].dtype == np.dtype(dense)
        np.testing.assert_array_equal(tensors["item_ids"], got.item.ids_NS)
        np.testing.assert_array_equal(tensors["context_dense"].astype(np.float32), got.context.dense_ND)
        header = orjson.loads(value[8 : 8 + int.from_bytes(value[:8], "little")])
        meta = header["__metadata__"]
        assert all(isinstance(text, str) for text in meta.values())
        assert orjson.loads(meta["items"]) == REQUESTS[at].items
        assert meta["schema"] == LAYOUT.schema_hash


def test_a_message_written_by_the_safetensors_library_is_read() -> None:
    value = encode(scored(REQUESTS))[0]
    header = orjson.loads(value[8 : 8 + int.from_bytes(value[:8], "little")])
    rewritten = safetensors.numpy.save(safetensors.numpy.load(value), metadata=header["__metadata__"])
    assert rewritten != value
    ours, theirs = decode(value), decode(rewritten)
    assert isinstance(theirs, ServedRequest)
    assert isinstance(ours, ServedRequest)
    assert_block(theirs.item, ours.item)
    np.testing.assert_array_equal(theirs.ctcvr_K, ours.ctcvr_K)


def test_a_schema_without_some_columns() -> None:
    user, item = SourceLayout("user", (), ()), SourceLayout("item", (Slot("i", "sparse", 0, 1),), ())
    layout = ServedLayout(user, item, SourceLayout("context", (), ()), "ff")
    batch_plan = plan(REQUESTS[1:])
    batch_plan_items = len(batch_plan.items)

    def rows(one: SourceLayout, count: int) -> FeatureRows:
        block = FeatureBlock(np.ones((count, one.id_width), np.int64), np.ones((count, one.dense_width), np.float32))
        return FeatureRows(block, np.zeros(count, np.int64), np.zeros(count, np.bool_), block.ids_NS, block.ids_NS)

    features = Fetched(rows(user, 1), rows(item, batch_plan_items), False, np.zeros(1, np.int64), np.arange(2))
    requests = [request(items=["a", "b"])]
    batch = assemble(requests, batch_plan, features, layout.context)
    value = encode_served(ScoredBatch(requests, batch_plan, batch, features, scores(2), NOW_MS), layout, 50, "float32")
    assert set(safetensors.numpy.load(value[0])) >= {"user_ids", "item_ids"}
    got = decode(value[0], layout)
    assert isinstance(got, ServedRequest)
    assert got.user.ids_NS.shape == (1, 0)
    assert got.item.ids_NS.tolist() == [[1], [1]]


def test_only_the_best_by_ctcvr_are_kept_in_request_order() -> None:
    ctcvr = np.array([0.1, 0.3, 0.2, 0.3, 0.05], np.float32)
    given = Scores(np.full(5, 0.5, np.float32), ctcvr * 2, ctcvr, 1)
    requests = [request("r1", ["a", "b", "c"]), request("r2", ["d", "e"])]
    first, second = (decode(value) for value in encode(scored(requests, given), top_k=2))
    assert isinstance(first, ServedRequest)
    assert isinstance(second, ServedRequest)
    assert first.items == ["b", "c"]
    assert first.ctcvr_K.tolist() == ctcvr[1:3].tolist()
    assert second.items == ["d", "e"]


def test_ties_keep_the_first() -> None:
    rows, starts = kept_rows(np.full(6, 0.5, np.float32), np.array([0, 4, 6]), 2)
    assert rows.tolist() == [0, 1, 4, 5]
    assert starts.tolist() == [0, 2, 4]


def test_float16_clips_what_does_not_fit() -> None:
    batch = scored(REQUESTS[:1])
    batch.batch.item.dense_ND[0, 0] = 1e9
    got = decode(encode(batch, dense="float16")[0])
    assert isinstance(got, ServedRequest)
    assert got.item.dense_ND[0, 0] == 65504.0
    np.testing.assert_allclose(got.user.dense_ND, batch.batch.user.dense_ND[:1], rtol=1e-3)


def tampered(value: bytes, old: bytes, new: bytes) -> bytes:
    """The header with a replacement of any length, its length corrected."""
    size = int.from_bytes(value[:8], "little")
    header = value[8 : 8 + size].replace(old, new)
    assert header != value[8 : 8 + size]
    return len(header).to_bytes(8, "little") + header + value[8 + size :]


GOOD = encode(scored(REQUESTS[:1]))[0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty"),
        (b"", "empty"),
        (b"abc", "corrupt"),
        (b"\xff" * 64, "corrupt"),
        (GOOD[:-1], "corrupt"),
        (GOOD[: len(GOOD) // 2], "corrupt"),
        (tampered(GOOD, b'"I64"', b'"F64"'), "corrupt"),
        (tampered(GOOD, b'"shape":[3,1]', b'"shape":[1,3]'), "corrupt"),
        (tampered(GOOD, b"data_offsets", b"offsets"), "corrupt"),
        (tampered(GOOD, b'"data_offsets":[0,', b'"data_offsets":[-8,'), "corrupt"),
        (tampered(GOOD, b'"data_offsets":[0,', b'"data_offsets":["a",'), "corrupt"),
        (tampered(GOOD, b'\\"a\\"', b"1"), "corrupt"),
        (tampered(GOOD, b'"[\\"a\\",\\"b\\",\\"c\\"]"', b'"[]"'), "corrupt"),
        (tampered(GOOD, b'"request_id":"r1"', b'"request_id":""'), "corrupt"),
        (tampered(GOOD, b'"model_version":"3"', b'"model_version":"x"'), "corrupt"),
        (tampered(GOOD, b"__metadata__", b"metadata"), "corrupt"),
        (tampered(GOOD, b"0123456789abcdef", b"fedcba9876543210"), "layout"),
    ],
)
def test_what_is_not_a_served_message_is_a_reject(value: bytes | None, reason: str) -> None:
    got = decode(value)
    assert isinstance(got, Reject)
    assert got.reason == reason


@pytest.mark.parametrize("field", ["user", "item", "context"])
def test_features_that_are_not_finite_are_refused(field: str) -> None:
    batch = scored(REQUESTS[:1])
    getattr(batch.batch, field).dense_ND[0, 0] = np.inf
    got = decode(encode(batch)[0])
    assert isinstance(got, Reject)
    assert got.reason == "nonfinite"


@pytest.mark.parametrize(("ctr", "ctcvr"), [(np.nan, 0.1), (0.5, np.nan), (0.5, -0.1), (1.5, 0.1)])
def test_scores_that_are_no_probabilities_are_refused(ctr: float, ctcvr: float) -> None:
    given = Scores(np.full(3, ctr, np.float32), np.full(3, 0.2, np.float32), np.full(3, ctcvr, np.float32), 1)
    got = decode(encode(scored(REQUESTS[:1], given))[0])
    assert isinstance(got, Reject)
    assert got.reason == "nonfinite"


def same(ours: ServedRequest | Reject, theirs: ServedRequest | Reject) -> None:
    if isinstance(ours, Reject) or isinstance(theirs, Reject):
        assert ours == theirs
        return
    assert ours.user_1.tobytes() == theirs.user_1.tobytes()
    assert ours.rows_K.tobytes() == theirs.rows_K.tobytes()
    assert ours._replace(user_1=None, rows_K=None) == theirs._replace(user_1=None, rows_K=None)  # type: ignore[arg-type]


BROKEN = [
    GOOD[:-1],
    b"",
    tampered(GOOD, b'"request_id":"r1"', b'"request_id":""'),
    tampered(GOOD, b'"ts":"', b'"ts":"x'),
    tampered(GOOD, b'"[\\"a\\",\\"b\\",\\"c\\"]"', b'"[\\"a\\",\\"b\\"]"'),
    tampered(GOOD, b"0123456789abcdef", b"fedcba9876543210"),
    GOOD[:-4] + np.float32(np.nan).tobytes(),
]


@pytest.mark.parametrize("broken", [None, *range(len(BROKEN))])
@pytest.mark.parametrize("dense", ["float32", "float16", "both"])
def test_many_messages_are_read_as_each_alone(broken: int | None, dense: str) -> None:
    batch = scored(REQUESTS)
    kinds: list[Dense] = ["float32", "float16"] if dense == "both" else [dense]  # type: ignore[list-item]
    values = [value for kind in kinds for value in encode(batch, dense=kind)]
    if broken is not None:
        values.insert(1, BROKEN[broken])
    records = [record(value) for value in values]
    got = decode_all(records, LAYOUT)
    for ours, one in zip(got, records, strict=True):
        same(ours, decode_served(one, LAYOUT))
    assert sum(isinstance(one, Reject) for one in got) == (broken is not None)


def test_what_this_project_writes_is_read_together() -> None:
    """Rows of one poll lie in one array: the short way was taken."""
    first, second = decode_all([record(value) for value in encode(scored(REQUESTS))], LAYOUT)
    assert isinstance(first, ServedRequest)
    assert isinstance(second, ServedRequest)
    assert first.rows_K.base is not None
    assert np.shares_memory(first.rows_K.base, second.rows_K)
