"""The page is complete, self-contained and CSP-safe, and reads only what the snapshot contract promises."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
import urllib.request

import pytest

from stream_scorer.adapters.http import Endpoints, HttpConfig, HttpServer
from stream_scorer.dashboard import snapshot as contract
from stream_scorer.dashboard.page import CONTENT_SECURITY_POLICY, STATIC, assets
from stream_scorer.dashboard.snapshot import Snapshot, TaskMetrics, TrainerPart, to_event, to_json
from tests.tools.page_preview import CASES, made_up

INDEX = (STATIC / "index.html").read_text()
OURS = sorted(p for p in STATIC.rglob("*") if p.is_file() and "vendor" not in p.parts)
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


def test_every_referenced_file_exists() -> None:
    referenced = re.findall(r'\b(?:src|href)="([^"#]+)"', INDEX)
    for script in STATIC.glob("*.js"):
        referenced += [name.removeprefix("./") for name in re.findall(r'from "([^"]+)"', script.read_text())]
    assert len(referenced) > 10
    served = assets()
    assert [name for name in referenced if f"/{name}" not in served] == []


def test_every_file_is_used() -> None:
    text = "".join(path.read_text() for path in OURS)
    assert [path.name for path in OURS if path.name != "index.html" and path.name not in text] == []


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_no_other_host(path: typing.Any) -> None:
    text = path.read_text().replace(SVG_NAMESPACE, "")
    assert re.findall(r"(?:https?:|wss?:)?//[\w.-]+\.\w+", text) == []


def test_no_inline_script_or_style() -> None:
    assert re.findall(r"<script(?![^>]*\bsrc=)", INDEX) == []
    assert "<style" not in INDEX
    assert re.findall(r"\sstyle=|\son\w+=|javascript:", INDEX) == []
    scripts = "".join(path.read_text() for path in STATIC.glob("*.js"))
    assert (
        re.findall(r"\beval\(|new Function|innerHTML|insertAdjacentHTML|document\.write|setAttribute\(.style", scripts)
        == []
    )


def test_content_security_policy_allows_only_our_own_host() -> None:
    sources = {source for directive in CONTENT_SECURITY_POLICY.split(";") for source in directive.split()[1:]}
    assert sources == {"'none'", "'self'", "data:"}


def test_vendored_licence_is_there() -> None:
    assert "MIT" in (STATIC / "vendor/uplot/LICENSE").read_text()
    assert "v1.6.32" in (STATIC / "vendor/uplot/uPlot.iife.min.js").read_text()[:100]


def test_every_binding_has_a_reader() -> None:
    app = (STATIC / "app.js").read_text()
    bindings = set(re.findall(r'data-bind="([^"]+)"', INDEX))
    literal = set(re.findall(r'(?:bind|bound|promise)\("([^"]+)"', app))
    prefixes = set(re.findall(r"bind\(`([\w.]+)\.\$\{", app))
    prefixes |= {"lost", "duplicates"}
    orphans = {b for b in bindings if b not in literal and b.split(".")[0] not in prefixes}
    assert orphans == set()
    assert {name for name in literal if name not in bindings} == set()


def test_every_term_is_explained() -> None:
    words = set(re.findall(r"^  (\w+): \[", (STATIC / "words.js").read_text(), re.MULTILINE))
    used = set(re.findall(r'data-term="(\w+)"', INDEX))
    used |= set(re.findall(r'term: "(\w+)"', (STATIC / "panels.js").read_text()))
    assert used <= words


def _names(cls: type) -> set[str]:
    """Every field name of a snapshot part, parts inside it included."""
    out: set[str] = set()
    for name, hint in typing.get_type_hints(cls).items():
        out.add(name)
        for part in _parts(hint):
            out |= _names(part)
    return out


def _parts(hint: typing.Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [typing.cast("type", hint)]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is tuple:
        return [part for inner in typing.get_args(hint) for part in _parts(inner)]
    return []


def test_page_reads_only_contract_names() -> None:
    known = _names(Snapshot)
    read = "".join((STATIC / name).read_text() for name in ("app.js", "history.js"))
    read = re.sub(r'//.*|"[^"\n]*"', "", read)
    chains = re.findall(
        r"\b(?:s|scorer|trainer|truth|promises|latency|examples|f|v|e|snapshot|next)((?:\??\.\w+)+)", read
    )
    fields = {field for chain in chains for field in re.findall(r"\w+", chain)}
    javascript = {"length", "filter", "slice", "sort", "find", "state", "includes", "target", "data", "t"}
    assert {"auc_ctr", "pcoc", "p99", "swapped_ms", "uptime_s"} <= fields
    assert fields - known - javascript == set()


@pytest.mark.parametrize("case", CASES)
def test_snapshot_json_has_the_contract_shape(case: str) -> None:
    data = json.loads(to_json(made_up(case, 1_700_000_000_000, 65.0)))
    assert set(data) == {f.name for f in dataclasses.fields(Snapshot)}
    if data["scorer"] is not None:
        assert set(data["scorer"]) == {f.name for f in dataclasses.fields(contract.ScorerPart)}
        assert set(data["scorer"]["latency_ms"]) == {"p50", "p99"}
        assert set(data["trainer"]["examples"]) == {"first", "late_conversion", "matured"}


def test_a_number_that_is_not_finite_is_null() -> None:
    trainer = TrainerPart(contract.ExampleCounts(0, 0, 0), 0, 0, ctr=TaskMetrics(float("nan"), float("inf"), 1.0))
    data = json.loads(to_json(Snapshot(1, "p", 0.0, trainer=trainer)))
    assert data["trainer"]["ctr"] == {"auc": None, "logloss": None, "pcoc": 1.0}


def test_event_is_one_server_sent_event() -> None:
    text = to_event(made_up("full", 1_700_000_000_000, 65.0)).decode()
    head, kind, data, *rest = text.split("\n")
    assert (head, kind) == ("id: 1700000000000", "event: snapshot")
    assert json.loads(data.removeprefix("data: "))["profile"]
    assert rest == ["", ""]


def test_the_http_server_serves_the_whole_page_under_its_policy() -> None:
    def get(url: str) -> typing.Any:
        return urllib.request.urlopen(url, timeout=5)

    endpoints = Endpoints(
        event=lambda: to_event(made_up("full", 1_700_000_000_000, 65.0)),
        assets=assets(),
        headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY},
    )
    server = HttpServer(HttpConfig(), endpoints)
    url = server.start()
    try:
        for path, asset in assets().items():
            with get(url + path) as answer:
                assert answer.read() == asset.body
                assert answer.headers["Content-Type"] == asset.content_type
                assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        with get(f"{url}/events") as events:
            assert events.headers["Content-Type"].startswith("text/event-stream")
            assert [events.readline().split(b":")[0] for _ in range(3)] == [b"id", b"event", b"data"]
    finally:
        server.stop()


def test_snapshot_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made_up("full", 1, 1.0).t_ms = 2  # type: ignore[misc]
