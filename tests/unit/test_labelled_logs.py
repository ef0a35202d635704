"""Criteo's two logs and Ali-CCP: what becomes of a row, never before its time, dirt by line number, one-line errors."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from esmm.features import FeatureSchema
from stream_scorer.core.context import check_context, slots_by_name
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded import labelled
from stream_scorer.embedded.criteo_attribution import COLUMNS, START_MS
from stream_scorer.embedded.datasets import DATASETS, Layouts, Replay, ReplayOptions
from stream_scorer.embedded.replay import Action, FeatureUpdate, FeedbackEvent, Request

DAY = 86_400
SCHEMAS = {name: FeatureSchema.from_toml(dataset.schema_toml) for name, dataset in DATASETS.items()}
NEW = ["criteo-conversions", "criteo-attribution", "ali-ccp"]


def opened(name: str, path: Path, options: ReplayOptions | None = None) -> Replay:
    schema = SCHEMAS[name]
    return DATASETS[name].open(path, Layouts(schema.layout("user"), schema.layout("item")), options)


def write(path: Path, text: str, *, packed: bool = False) -> Path:
    if packed:
        path = path.with_name(f"{path.name}.gz")
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def told(actions: list[Action], start_ms: int = START_MS) -> list[tuple[float, str, str]]:
    """(log second, request, kind) of all feedback."""
    events = [action for action in actions if isinstance(action, FeedbackEvent)]
    return [((a.at_ms - start_ms) / 1_000, a.message.request_id, a.message.kind) for a in events]


def requests(actions: list[Action]) -> list[Request]:
    return [action for action in actions if isinstance(action, Request)]


def checked(name: str, path: Path, options: ReplayOptions | None = None) -> tuple[Replay, list[Action]]:
    """Actions in time order, features known before they are read, context that a scorer would take."""
    replay = opened(name, path, options)
    actions, known, asked = list(replay), set(), set()
    assert [a.at_ms for a in actions] == sorted(a.at_ms for a in actions)
    slots = slots_by_name(SCHEMAS[name].layout("context"))
    for action in actions:
        if isinstance(action, FeatureUpdate):
            known |= {(action.entity, id_) for id_ in action.ids}
        elif isinstance(action, Request):
            message = action.message
            assert {("user", message.user_id), *(("item", item) for item in message.items)} <= known
            assert check_context(message, slots) is None
            assert set(message.context) == set(slots)
            asked.add(message.request_id)
        else:
            assert action.at_ms == action.message.ts
            assert action.message.request_id in asked
    return replay, actions


# Criteo conversions -------------------------------------------------------------------------------------------------


def click(at: int, converted: int | str = "", counts: str = "1\t\t-3\t4\t5\t6\t7\t8", cats: str = "a") -> str:
    return f"{at}\t{converted}\t{counts}\t" + "\t".join([cats, "", *"cdefghi"]) + "\n"


@pytest.mark.parametrize("packed", [False, True])
def test_a_criteo_click_is_an_impression_clicked_at_once_and_converts_when_it_did(tmp_path: Path, packed: bool) -> None:
    text = click(10, 100) + click(20) + click(50, 50) + click(200)
    replay, actions = checked("criteo-conversions", write(tmp_path / "data.txt", text, packed=packed))
    assert told(actions) == [
        (10, "cc-1", "impression"),
        (10, "cc-1", "click"),
        (20, "cc-2", "impression"),
        (20, "cc-2", "click"),
        (50, "cc-3", "impression"),
        (50, "cc-3", "click"),
        (50, "cc-3", "conversion"),
        (100, "cc-1", "conversion"),  # before the row of 200, after the row of 50
        (200, "cc-4", "impression"),
        (200, "cc-4", "click"),
    ]
    report = replay.report
    assert (report.rows, report.impressions, report.clicks, report.conversions) == (4, 4, 4, 2)
    assert (report.first_ms - START_MS, report.last_ms - START_MS) == (10_000, 200_000)


def test_criteo_features_are_the_row_s(tmp_path: Path) -> None:
    text = click(DAY + 3_600 * 5, cats="x") + click(DAY + 3_600 * 6, cats="y") + click(DAY + 3_600 * 6, cats="x")
    _, actions = checked("criteo-conversions", write(tmp_path / "data.txt", text))
    one, two, three = (request.message.context for request in requests(actions))
    assert one["counts"][:3] == pytest.approx([np.log(2), -1.0, -np.log(4)])
    assert (one["hour"], two["hour"], one["c2"]) == (5, 6, 0)
    assert one["c1"] == three["c1"] != two["c1"]
    assert one["c3"] == two["c3"]


def test_the_conversion_of_the_last_click_is_told_after_the_log_s_end(tmp_path: Path) -> None:
    _, actions = checked("criteo-conversions", write(tmp_path / "data.txt", click(10, 40 * DAY)))
    assert told(actions)[-1] == (40 * DAY, "cc-1", "conversion")


@pytest.mark.parametrize("run_rows", [3, 1_000])
def test_an_unsorted_log_is_sorted_on_disk_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_rows) -> None:
    monkeypatch.setattr(labelled, "RUN_ROWS", run_rows)
    times = np.random.default_rng(0).integers(0, 30, 20).tolist()
    path = write(tmp_path / "data.txt", "".join(click(at, at + 5) for at in times))
    replay, actions = checked("criteo-conversions", path)
    assert replay.report.sorted_on_disk
    order = [request.message.request_id for request in requests(actions)]
    assert order == [f"cc-{n + 1}" for n in np.argsort(times, kind="stable").tolist()]
    assert replay.report.conversions == 20


def test_a_late_row_of_a_sorted_log_is_left_out_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "PEEK_ROWS", 2)
    replay, actions = checked("criteo-conversions", write(tmp_path / "data.txt", click(1) + click(5) + click(2)))
    assert len(requests(actions)) == 2
    assert (replay.report.sorted_on_disk, replay.report.dirty_lines) == (False, {"order": [3]})


def test_criteo_dirt_is_counted_with_its_lines(tmp_path: Path) -> None:
    bad = [
        "\t\t" + click(1).split("\t", 2)[2],  # 4: no time
        "x" + click(1),  # 5
        "7\t\t1\n",  # 6
        click(8, 7),  # 7: before its click
        click(8, "soon"),  # 8
        click(8, counts="1\t2\t3\t4\t5\t6\t7\tmany"),  # 9
        "\n",  # 10
        click(8) + "\n",  # 11, 12
    ]
    path = write(tmp_path / "data.txt", click(1) + click(2) + click(3) + "".join(bad) + click(9) * 12)
    replay, actions = checked("criteo-conversions", path)
    assert replay.report.dirty_lines == {
        "time": [4, 5, 10, 12], "columns": [6], "conversion-time": [7], "number": [8, 9],
    }  # fmt: skip
    assert sum(replay.report.dirty.values()) == 8
    assert len(requests(actions)) == replay.report.rows - 8


def test_only_the_first_numbers_are_kept(tmp_path: Path) -> None:
    text = "".join(click(n) + "x\n" for n in range(1, 100)) + click(100) * 3
    replay, _ = checked("criteo-conversions", write(tmp_path / "data.txt", text))
    assert (replay.report.dirty["time"], replay.report.dirty_lines["time"]) == (99, list(range(2, 21, 2)))


def test_limit_and_progress(tmp_path: Path) -> None:
    path = write(tmp_path / "data.txt", "".join(click(n) for n in range(5_000)), packed=True)
    seen: list[tuple[int, float]] = []
    options = ReplayOptions(limit=3_000, progress=lambda *at: seen.append(at), retime=lambda ms: ms - START_MS)
    _, actions = checked("criteo-conversions", path, options)
    assert [request.message.ts for request in requests(actions)] == [1_000 * n for n in range(3_000)]
    assert [rows for rows, _ in seen] == [1_000, 2_000, 3_000, 3_000]


# Criteo attribution -------------------------------------------------------------------------------------------------


def shown(at: int, **fields: object) -> str:
    values: dict[str, object] = dict.fromkeys(COLUMNS, 7) | {
        "timestamp": at, "conversion": 0, "conversion_timestamp": -1, "conversion_id": -1, "attribution": 0, "click": 0,
        "click_pos": -1, "click_nb": -1, "cost": "1e-05", "cpo": 0.1, "time_since_last_click": -1,
    }  # fmt: skip
    return "\t".join(str(value) for value in (values | fields).values()) + "\n"


HEADER = "\t".join(COLUMNS) + "\n"


@pytest.mark.parametrize("packed", [False, True])
def test_an_attributed_row_clicks_at_once_and_converts_when_it_did(tmp_path: Path, packed: bool) -> None:
    rows = [
        shown(0, click=1, conversion=1, conversion_timestamp=9),
        shown(1, uid=8, campaign=3),
        shown(2, click=1, time_since_last_click=7_200),
        shown(3, conversion=1, conversion_timestamp=5),  # nobody clicked
        shown(20),
    ]
    path = write(tmp_path / "log.tsv", HEADER + "".join(rows), packed=packed)
    replay, actions = checked("criteo-attribution", path)
    assert told(actions) == [
        (0, "ca-2", "impression"),
        (0, "ca-2", "click"),
        (1, "ca-3", "impression"),
        (2, "ca-4", "impression"),
        (2, "ca-4", "click"),
        (3, "ca-5", "impression"),
        (9, "ca-2", "conversion"),
        (20, "ca-6", "impression"),
    ]
    report = replay.report
    assert (report.rows, report.clicks, report.conversions, report.unattributed) == (5, 2, 1, 1)
    updates = [(u.entity, u.ids, u.block.ids_NS.tolist()) for u in actions if isinstance(u, FeatureUpdate)]
    assert updates == [
        ("user", ["u7"], [[7]]),
        ("item", ["c7"], [[7]]),
        ("user", ["u8"], [[8]]),
        ("item", ["c3"], [[3]]),
    ]
    since = [request.message.context["since_click"] for request in requests(actions)]
    assert since == pytest.approx([-1, -1, np.log(3), -1, -1])


def test_nothing_that_is_known_afterwards_is_a_feature() -> None:
    names = {column.name for column in SCHEMAS["criteo-attribution"].columns}
    later = {
        "conversion",
        "conversion_timestamp",
        "conversion_id",
        "attribution",
        "click",
        "click_pos",
        "click_nb",
        "cpo",
    }
    assert not names & later


def test_attribution_dirt_is_counted_with_its_lines(tmp_path: Path) -> None:
    bad = [
        shown(1, click=2),
        shown(1, cat4="x"),
        shown(1, cost="nan"),
        shown(9, conversion=1, conversion_timestamp=8),
        "1\t2\n",
        "\n",
        shown(1, timestamp="now"),
        shown(1, uid=1 << 70),
    ]
    path = write(tmp_path / "log.tsv", HEADER + shown(1) * 9 + "".join(sorted(bad, key=len)))
    replay, actions = checked("criteo-attribution", path)
    assert replay.report.dirty == {"label": 1, "number": 3, "conversion-time": 1, "time": 2, "columns": 1}
    assert min(min(lines) for lines in replay.report.dirty_lines.values()) == 11
    assert len(requests(actions)) == 9


# Ali-CCP ------------------------------------------------------------------------------------------------------------

ALI_MS = 1_500_000_000_000


def features(**fields: object) -> str:
    parts = [
        f"{name[1:]}\x02{id_}\x03{value}"
        for name, pairs in fields.items()
        for id_, value in (pairs if isinstance(pairs, list) else [(pairs, 1.0)])
    ]
    return f"{len(parts)}," + "\x01".join(parts)


def ali(tmp_path: Path, samples: str, common: str, *, packed: bool = False) -> Path:
    write(tmp_path / "common_features_train.csv", common, packed=packed)
    return write(tmp_path / "sample_skeleton_train.csv", samples, packed=packed)


OWN = features(_205=11, _206=12, _207=13, _210=[(5, 1.0), (6, 2.0)], _216=14, _301=2, _508=[(77, 3.5)])
COMMON = (
    "aa," + features(_101=1, _121=4, _109_14=[(n, float(n)) for n in range(1, 31)]) + "\nbb," + features(_101=2) + "\n"
)


@pytest.mark.parametrize("packed", [False, True])
def test_ali_ccp_samples_are_joined_with_their_common_features(tmp_path: Path, packed: bool) -> None:
    samples = f"1,0,0,aa,{OWN}\n2,1,0,aa,{OWN}\n3,1,1,bb,{features(_205=11, _206=99)}\n"
    replay, actions = checked("ali-ccp", ali(tmp_path, samples, COMMON, packed=packed))
    assert told(actions, ALI_MS) == [
        (0.01, "ali-1", "impression"),
        (0.02, "ali-2", "impression"),
        (0.03, "ali-3", "impression"),
        (1.02, "ali-2", "click"),
        (1.03, "ali-3", "click"),
        (11.03, "ali-3", "conversion"),
    ]
    assert (replay.report.clicks, replay.report.conversions, dict(replay.report.dirty)) == (2, 1, {})
    updates = [action for action in actions if isinstance(action, FeatureUpdate)]
    assert [(u.entity, u.ids) for u in updates] == [
        ("user", ["uaa"]), ("item", ["i11"]), ("user", ["ubb"]), ("item", ["i11"]),
    ]  # fmt: skip  # an item is written again when its features changed
    layout = SCHEMAS["ali-ccp"].layout("user")
    slot = next(slot for slot in layout.ids if slot.name == "f109_14")
    assert updates[0].block.ids_NS[0, slot.start : slot.stop].tolist() == list(range(30, 10, -1))
    context = requests(actions)[0].message.context
    assert (context["f301"], context["f508"], context["f509"], context["crosses"]) == (2, 77, 0, [3.5, 0, 0, 0])


def test_ali_ccp_dirt_is_counted_with_its_lines(tmp_path: Path) -> None:
    good = f"1,0,0,aa,{OWN}\n"
    bad = [
        "1,0,0,aa\n",
        f"1,0,1,aa,{OWN}\n",  # bought, not clicked
        f"1,0,0,zz,{OWN}\n",
        f"1,0,0,aa,{features(_206=1)}\n",
        "1,0,0,aa,2,205\x021\x031\n",  # one of two features
        "1,0,0,aa,1,205\x02x\x031\n",
        "1,0,0,aa,1,205\x021\x03inf\n",
    ]
    common = "only\n" + COMMON + "cc,1,broken\n"
    replay, actions = checked("ali-ccp", ali(tmp_path, good * 8 + "".join(bad), common))
    assert replay.report.dirty_lines == {
        "columns": [9], "label": [10], "common-index": [11], "item": [12], "features": [13, 14, 15],
        "common-features": [1, 4],
    }  # fmt: skip
    assert len(requests(actions)) == 8


def test_ali_ccp_says_which_file_it_lacks(tmp_path: Path) -> None:
    sample = f"1,0,0,aa,{OWN}\n"
    with pytest.raises(ConfigurationError, match=r"must be named sample_skeleton_\*\.csv"):
        opened("ali-ccp", write(tmp_path / "x.csv", sample))
    path = write(tmp_path / "sample_skeleton_test.csv", sample)
    with pytest.raises(ConfigurationError, match=r"common_features_test\.csv\[\.gz\] is missing"):
        opened("ali-ccp", path)
    write(tmp_path / "common_features_test.csv", "a\n")
    with pytest.raises(ConfigurationError, match="no line can be used; common features have the columns"):
        opened("ali-ccp", path)
    write(tmp_path / "common_features_test.csv", "bb,0,\n")
    with pytest.raises(ConfigurationError, match="none of the 1 rows can be used"):
        opened("ali-ccp", path)


# All three ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(
    "content",
    [b"", b"user_id,item_id\n1,2\n", b"\x00\xff\xfe" * 50, b"\x1f\x8bnot gzip", gzip.compress(b"1\t\t2\n" * 99)[:-9]],
)
def test_a_file_that_is_no_log_gives_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "sample_skeleton_x.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        list(opened(name, path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_further_candidates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--candidates must be 1"):
        opened("criteo-conversions", write(tmp_path / "data.txt", click(1)), ReplayOptions(candidates=2))


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    replay = opened("criteo-conversions", write(tmp_path / "data.txt", "".join(click(n, n + 9) for n in range(9_000))))
    funnel = replay.actions.gi_frame.f_locals["self"]  # type: ignore[attr-defined]
    most = 0
    for _ in replay:
        most = max(most, len(funnel.ahead))
    assert most <= 11  # the conversions of the last nine seconds
    assert len(funnel.known) == 1_001
