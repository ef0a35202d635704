"""Replays: funnels, features of the past alone, dirt reported, one-line errors; and the real files where they lie."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from esmm.features import FeatureSchema
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded import taobao_rows
from stream_scorer.embedded.datasets import DATASETS, Layouts, Replay, ReplayOptions, open_bandit, taobao
from stream_scorer.embedded.replay import Action, FeatureUpdate, FeedbackEvent, InFlight, Request

T0 = 1_511_658_000
HEX = "81ce123cbb5bd8ce818f60fb3586bba5"


def layouts(name: str) -> Layouts:
    schema = FeatureSchema.from_toml(DATASETS[name].schema_toml)
    return Layouts(schema.layout("user"), schema.layout("item"))


TAOBAO, BANDIT = layouts("taobao"), layouts("open-bandit")


def write(path: Path, rows: list[tuple[int, int, int, str, int]], more: str = "") -> Path:
    path.write_text("".join(f"{','.join(map(str, row))}\n" for row in rows) + more)
    return path


def dense(update: FeatureUpdate, layout_name: str, name: str, slot: str) -> list[float]:
    layout = getattr(layouts(layout_name), update.entity)
    at = next(s for s in layout.dense if s.name == slot)
    return np.expm1(update.block.dense_ND[update.ids.index(name), at.start : at.stop]).round(3).tolist()


def told(actions: list[Action]) -> list[tuple[int, str, str]]:
    return [
        (a.at_ms // 1_000 - T0, a.message.request_id, a.message.kind) for a in actions if isinstance(a, FeedbackEvent)
    ]


def in_order(actions: list[Action]) -> bool:
    times = [action.at_ms for action in actions]
    return times == sorted(times)


# Taobao -------------------------------------------------------------------------------------------------------------


def test_the_funnel_is_impression_then_click_then_conversion(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.csv",
        [
            (1, 10, 7, "buy", T0),  # before any impression
            (1, 10, 7, "pv", T0 + 1),
            (2, 10, 7, "cart", T0 + 2),  # somebody else
            (1, 10, 7, "cart", T0 + 3),
            (1, 10, 7, "fav", T0 + 4),  # clicked already
            (1, 10, 7, "buy", T0 + 5),
            (1, 10, 7, "buy", T0 + 6),  # bought already
            (3, 10, 7, "pv", T0 + 7),
            (3, 10, 7, "pv", T0 + 8),  # takes over
            (3, 10, 7, "buy", T0 + 9),  # implies a click
        ],
    )
    replay = taobao(path, TAOBAO)
    assert replay.first_ms == T0 * 1_000
    actions = list(replay)
    assert told(actions) == [
        (1, "tb-2", "impression"),
        (3, "tb-2", "click"),
        (5, "tb-2", "conversion"),
        (7, "tb-8", "impression"),
        (8, "tb-9", "impression"),
        (9, "tb-9", "click"),
        (9, "tb-9", "conversion"),
    ]
    report = replay.report
    assert (report.rows, report.requests, report.impressions, report.clicks, report.conversions) == (10, 3, 3, 2, 2)
    assert (report.clicks_implied, report.unattributed, dict(report.dirty)) == (1, 4, {})
    assert in_order(actions)


def test_features_count_only_earlier_seconds(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.csv",
        [
            (1, 10, 7, "pv", T0),
            (1, 10, 7, "cart", T0),  # the same second: nobody knows what came first
            (2, 10, 7, "pv", T0),
            (1, 11, 8, "pv", T0 + 1),
            (2, 10, 7, "pv", T0 + 1),
        ],
    )
    actions = list(taobao(path, TAOBAO))
    kinds = [type(action).__name__ for action in actions]
    assert kinds[:2] == ["FeatureUpdate", "FeatureUpdate"]  # before the first request
    updates = [action for action in actions if isinstance(action, FeatureUpdate)]
    assert [(u.at_ms // 1_000 - T0, u.entity, u.ids) for u in updates] == [
        (0, "user", ["u1", "u2"]),
        (0, "item", ["i10"]),
        (1, "user", ["u1", "u2"]),
        (1, "item", ["i11", "i10"]),
    ]
    assert dense(updates[0], "taobao", "u1", "user_counts") == [0, 0, 0, 0]
    assert dense(updates[1], "taobao", "i10", "item_counts") == [0, 0, 0, 0]
    assert dense(updates[2], "taobao", "u1", "user_counts") == [1, 1, 0, 0]
    assert dense(updates[2], "taobao", "u2", "user_counts") == [1, 0, 0, 0]
    assert dense(updates[3], "taobao", "i10", "item_counts") == [2, 1, 0, 0]
    assert dense(updates[3], "taobao", "i11", "item_counts") == [0, 0, 0, 0]
    recent = next(slot for slot in TAOBAO.user.ids if slot.name == "recent_categories")
    assert updates[2].block.ids_NS[0, recent.start : recent.stop].tolist() == [7, 7, 0, 0, 0, 0, 0, 0]


def test_counts_equal_those_of_a_brute_force_look_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    kinds = np.array(["pv", "pv", "pv", "cart", "fav", "buy"])
    rows = [
        (int(rng.integers(5)), 10 + int(rng.integers(6)), 3, str(rng.choice(kinds)), T0 + n // 3) for n in range(600)
    ]
    current: dict[str, list[float]] = {}
    checked = 0
    for action in taobao(write(tmp_path / "log.csv", rows), TAOBAO, ReplayOptions(candidates=4)):
        if isinstance(action, FeatureUpdate):
            slot = f"{action.entity}_counts"
            current |= {name: dense(action, "taobao", name, slot) for name in action.ids}
        elif isinstance(action, Request):
            second = action.at_ms // 1_000
            for column, names in ((0, [action.message.user_id]), (1, action.message.items)):
                for name in names:
                    past = Counter(r[3] for r in rows if r[column] == int(name[1:]) and r[4] < second)
                    assert current[name] == [past[kind] for kind in ("pv", "cart", "fav", "buy")]
                    checked += 1
    assert checked > 500


def test_further_candidates_come_from_the_past_and_the_shown_one_is_among_them(tmp_path: Path) -> None:
    rows = [(1, 10 + n, 5, "pv", T0 + n) for n in range(40)]
    actions = list(taobao(write(tmp_path / "log.csv", rows), TAOBAO, ReplayOptions(candidates=5)))
    requests = [action for action in actions if isinstance(action, Request)]
    shown = {a.message.request_id: a.message.item_id for a in actions if isinstance(a, FeedbackEvent)}
    places = set()
    for n, request in enumerate(requests):
        items = request.message.items
        assert len(items) == len(set(items)) <= 5
        assert all(int(item[1:]) <= 10 + n for item in items)
        places.add(items.index(shown[request.message.request_id]))
    assert len(requests[-1].message.items) == 5
    assert len(places) == 5


def test_dirt_is_counted_by_reason_and_never_raises(tmp_path: Path) -> None:
    rows = [(1, 10, 7, "pv", T0 + n) for n in range(20)]
    more = f"1,2,3\n1,x,7,pv,{T0}\n1,10,7,swipe,{T0}\n1,10,7,pv,15\n1,{10**30},7,pv,{T0}\n1,10,7,pv,{T0}\n\n"
    replay = taobao(write(tmp_path / "log.csv", rows, more), TAOBAO)
    assert len([action for action in replay if isinstance(action, Request)]) == 20 + 1
    assert replay.report.dirty == {"columns": 2, "number": 2, "behaviour": 1, "time": 1}
    assert replay.report.sorted_in_memory  # the last good row goes back
    assert replay.report.rows == 27


def test_an_unsorted_log_is_sorted_and_too_large_a_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "log.csv", [(1, 10, 7, "pv", T0 + n % 7) for n in range(50)])
    replay = taobao(path, TAOBAO)
    assert in_order(list(replay))
    assert replay.report.sorted_in_memory
    monkeypatch.setattr(taobao_rows, "SORT_LIMIT", 30)
    with pytest.raises(ConfigurationError, match=r"not sorted by time and has more than 30 rows: sort it first"):
        taobao(path, TAOBAO)


def test_a_late_row_of_a_sorted_log_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taobao_rows, "PEEK_ROWS", 10)
    rows = [(1, 10, 7, "pv", T0 + n) for n in range(20)]
    replay = taobao(write(tmp_path / "log.csv", rows, f"1,10,7,pv,{T0 + 3}\n"), TAOBAO)
    assert in_order(list(replay))
    assert (replay.report.sorted_in_memory, dict(replay.report.dirty)) == (False, {"order": 1})


def test_what_is_shown_is_forgotten_after_the_attribution_window(tmp_path: Path) -> None:
    day = 86_400
    rows = [(1, 10, 7, "pv", T0), (1, 11, 7, "pv", T0), (1, 10, 7, "buy", T0 + day), (1, 11, 7, "buy", T0 + 4 * day)]
    replay = taobao(write(tmp_path / "log.csv", rows), TAOBAO)
    list(replay)
    assert (replay.report.conversions, replay.report.unattributed) == (1, 1)


def test_limit_progress_and_new_times(tmp_path: Path) -> None:
    path = tmp_path / "log.csv.gz"
    with gzip.open(path, "wt") as out:
        out.writelines(f"{n},10,7,pv,{T0 + n}\n" for n in range(5_000))
    seen: list[tuple[int, float]] = []
    options = ReplayOptions(limit=3_000, retime=lambda ms: ms - T0 * 1_000, progress=lambda *at: seen.append(at))
    actions = list(taobao(path, TAOBAO, options))
    requests = [action for action in actions if isinstance(action, Request)]
    assert [request.message.ts for request in requests] == [1_000 * n for n in range(3_000)]
    assert [rows for rows, _ in seen] == [1_000, 2_000, 3_000, 3_000]
    assert seen[-1][1] == 1.0
    assert all(0 < share <= 1 for _, share in seen)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "0 of the first 0 rows"),
        (b"user_id,item_id\n1,2\n", "2 of the first 2 rows cannot be used; a Taobao log has the columns"),
        (b"\x00\xff\xfe" * 50, "cannot be used"),
        (gzip.compress(b"1,2,3,pv,1511658000\n" * 500)[:-20], "damaged after line"),
        (b"\x1f\x8bnot gzip at all", "damaged after line 0"),
    ],
)
def test_a_file_that_is_no_log_gives_one_line(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=word) as caught:
        list(taobao(path, TAOBAO))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DATASETS)
def test_a_path_that_is_not_there_gives_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        DATASETS[name].open(tmp_path / "nowhere", layouts(name), None)


def test_half_a_file_of_wild_times_keeps_the_half_of_the_median(tmp_path: Path) -> None:
    rows = [(1, 10, 7, "pv", 15 if n % 2 else T0 + n) for n in range(20)]
    replay = taobao(write(tmp_path / "log.csv", rows), TAOBAO)
    assert len([a for a in replay if isinstance(a, Request)]) == 10
    assert replay.report.dirty == {"time": 10}


# Open Bandit --------------------------------------------------------------------------------------------------------

HEADER = (
    ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3,"
    "user-item_affinity_0,user-item_affinity_1\n"
)


def bandit_row(second: float, item: int, click: int, user: str = HEX, position: int = 1) -> str:
    users = ",".join([user] * 4)
    return f"0,2019-11-24 00:00:{second:09.6f}+00:00,{item},{position},{click},0.1,{users},0.5,0.0\n"


def bandit_dir(path: Path, rows: str, name: str = "random_all.csv", context: str = "item_context_all.csv") -> Path:
    items = ",item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3\n"
    items += f"0,0,-0.5,{HEX},{HEX},{HEX}\n1,1,0.25,{HEX},{HEX},{HEX}\n"
    for file, text in ((path / name, HEADER + rows), (path / context, items)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def test_bandit_rows_become_requests_impressions_and_later_clicks(tmp_path: Path) -> None:
    rows = bandit_row(1, 0, 1) + bandit_row(1.5, 1, 0, position=3) + bandit_row(3, 0, 0, user="other")
    replay = open_bandit(bandit_dir(tmp_path, rows), BANDIT)
    actions = list(replay)
    assert in_order(actions)
    assert [
        (a.at_ms - replay.first_ms, a.message.request_id, a.message.kind)
        for a in actions
        if isinstance(a, FeedbackEvent)
    ] == [
        (0, "ob-random-all-1", "impression"),
        (500, "ob-random-all-2", "impression"),
        (1_000, "ob-random-all-1", "click"),
        (2_000, "ob-random-all-3", "impression"),
    ]
    first, second, third = (a.message for a in actions if isinstance(a, Request))
    assert (first.items, second.items) == (["all:0"], ["all:1"])
    assert (first.item_context, second.item_context) == (
        {"position": [1], "affinity": [0.5]},
        {"position": [3], "affinity": [0.0]},
    )
    assert first.context == {"hour": 9}
    assert first.user_id == second.user_id != third.user_id
    assert replay.report.clicks == 1


def test_bandit_counts_are_of_the_past_and_refreshed_now_and_then(tmp_path: Path) -> None:
    early = bandit_row(1, 0, 1) + bandit_row(2, 0, 0)
    late = bandit_row(0, 0, 0).replace("00:00:00", "00:10:01")
    same = bandit_row(30, 0, 0)
    actions = list(open_bandit(bandit_dir(tmp_path, early + same + late), BANDIT))
    updates = [a for a in actions if isinstance(a, FeatureUpdate) and a.entity == "item"]
    assert len(updates) == 2  # the rows at 2 s and 30 s come too soon for another
    at = next(slot for slot in BANDIT.item.dense if slot.name == "item_counts")
    counts = [np.expm1(u.block.dense_ND[0, at.start : at.start + 2]).round(3).tolist() for u in updates]
    assert counts == [[0, 0], [3, 1]]


def test_logs_are_merged_by_time_in_both_arrangements(tmp_path: Path) -> None:
    bandit_dir(tmp_path, bandit_row(1, 0, 0) + bandit_row(5, 0, 0))
    bandit_dir(tmp_path, bandit_row(3, 1, 0), "bts/men/men.csv", "bts/men/item_context.csv")
    actions = list(open_bandit(tmp_path, BANDIT, ReplayOptions(candidates=2)))
    requests = [a.message for a in actions if isinstance(a, Request)]
    assert [r.request_id for r in requests] == ["ob-random-all-1", "ob-bts-men-1", "ob-random-all-2"]
    assert sorted(requests[1].items) == ["men:0", "men:1"]
    assert in_order(actions)


def test_bandit_dirt_is_counted(tmp_path: Path) -> None:
    rows = bandit_row(5, 0, 0) + bandit_row(1, 0, 0) + bandit_row(6, 7, 0) + bandit_row(7, 0, 2) + "1,2,3\n"
    rows += bandit_row(8, 0, 0).replace("2019", "soon") + bandit_row(9, 0, 0).replace("0.5,0.0", "0.5,much")
    replay = open_bandit(bandit_dir(tmp_path, rows), BANDIT)
    assert len([a for a in replay if isinstance(a, Request)]) == 1
    assert replay.report.dirty == {"order": 1, "item": 1, "click": 1, "columns": 1, "time": 1, "number": 1}


def test_a_bandit_directory_that_is_wrong_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no Open Bandit log"):
        open_bandit(tmp_path, BANDIT)
    (tmp_path / "random_all.csv").write_text(HEADER)
    with pytest.raises(ConfigurationError, match=r"item_context_all\.csv cannot be read"):
        open_bandit(tmp_path, BANDIT)
    (tmp_path / "item_context_all.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match="is not an item context"):
        open_bandit(tmp_path, BANDIT)
    bandit_dir(tmp_path, "")
    with pytest.raises(ConfigurationError, match="none of the 0 rows"):
        open_bandit(tmp_path, BANDIT)
    (tmp_path / "random_all.csv").write_text("timestamp,item_id\n")
    with pytest.raises(ConfigurationError, match="column 'position' is missing"):
        open_bandit(tmp_path, BANDIT)


# Both ---------------------------------------------------------------------------------------------------------------


def test_an_update_waits_for_requests_that_read_the_same_entity(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [(1, 10, 7, "pv", T0), (1, 11, 7, "pv", T0 + 1)])
    update_user, _, request, _, again, other, _, _ = list(taobao(path, TAOBAO))
    assert isinstance(update_user, FeatureUpdate)
    assert isinstance(request, Request)
    assert isinstance(again, FeatureUpdate)
    assert isinstance(other, FeatureUpdate)
    flight = InFlight()
    assert not flight.must_wait(update_user)
    flight.asked(request.message)
    flight.asked(request.message.model_copy(update={"request_id": "second"}))
    assert len(flight) == 2
    assert flight.must_wait(again)
    assert not flight.must_wait(other)  # another item
    assert flight.answered("tb-1")
    assert not flight.answered("tb-1")
    assert flight.must_wait(again)
    assert flight.answered("second")
    assert not flight.must_wait(again)
    assert len(flight) == 0


def test_layouts_of_another_schema_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [(1, 10, 7, "pv", T0)])
    with pytest.raises(ConfigurationError, match="user features of the schema and of the data differ"):
        list(taobao(path, BANDIT))


def real(name: str) -> Path:
    path = Path(os.environ.get("STREAM_SCORER_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / name
    if path.exists():
        return path
    if os.environ.get("STREAM_SCORER_TEST_REQUIRE_REAL") == "1":
        pytest.fail(f"STREAM_SCORER_TEST_REQUIRE_REAL=1 needs {name} in STREAM_SCORER_TEST_DATA")
    pytest.skip(f"needs {name} (STREAM_SCORER_TEST_DATA)")


def check_stream(replay: Replay) -> list[Action]:
    actions = list(replay)
    assert in_order(actions)
    known: set[str] = set()
    asked: set[str] = set()
    for action in actions:
        if isinstance(action, FeatureUpdate):
            known |= set(action.ids)
            assert np.isfinite(action.block.dense_ND).all()
        elif isinstance(action, Request):
            assert {action.message.user_id, *action.message.items} <= known
            asked.add(action.message.request_id)
        else:
            assert action.message.request_id in asked
    assert len(asked) == replay.report.requests
    return actions


def test_the_real_taobao_log() -> None:
    replay = taobao(real("taobao_user_behavior.csv.gz"), TAOBAO)
    actions = check_stream(replay)
    report = replay.report
    assert report.dirty == {"time": 1}
    assert report.impressions == report.requests == report.rows - 1 - 5_292 - 2_959 - 2_144
    assert 80 <= report.conversions <= report.clicks
    feedback = [action for action in actions if isinstance(action, FeedbackEvent)]
    shown, bought = (
        {event.message.request_id: event.at_ms for event in feedback if event.message.kind == kind}
        for kind in ("impression", "conversion")
    )
    delays_s = [(at - shown[request]) / 1_000 for request, at in bought.items()]
    assert 240 < float(np.median(delays_s)) < 900


def test_the_real_bandit_logs() -> None:
    replay = open_bandit(real("open_bandit"), BANDIT, ReplayOptions(limit=20_000, candidates=3))
    check_stream(replay)
    assert (replay.report.requests, dict(replay.report.dirty)) == (20_000, {})
    assert 60 < replay.report.clicks < 140
