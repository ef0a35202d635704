"""The demo's page: snapshots of the whole loop, made from the children's status lines, served on loopback."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from stream_scorer import __version__
from stream_scorer.adapters.http import Endpoints, HttpConfig, HttpServer
from stream_scorer.dashboard.page import CONTENT_SECURITY_POLICY, assets
from stream_scorer.dashboard.snapshot import (
    EventKind,
    EventPart,
    ExampleCounts,
    FeedbackCounts,
    LatencyMs,
    PromisePart,
    ScorerPart,
    Snapshot,
    TaskMetrics,
    TrainerPart,
    TruthPart,
    VersionPart,
    to_event,
)
from stream_scorer.wiring.processes import Child

EVENTS_KEPT = 50
VERSIONS_KEPT = 20


class Story:
    """Turns successive status lines into snapshots; remembers versions and events between them."""

    def __init__(self, profile: str, children: Mapping[str, Child]) -> None:
        """``children``: scorer, trainer and simulator by name."""
        self._profile = profile
        self._children = children
        self._started_s = time.monotonic()
        self._events: deque[EventPart] = deque(maxlen=EVENTS_KEPT)
        self._published: dict[int, int] = {}
        self._swapped: dict[int, int] = {}
        self._logloss: dict[int, float | None] = {}
        self._said: dict[str, int] = {}
        self._live: int | None = None
        self._note("start", f"running on {profile}")

    def snapshot(self) -> Snapshot:
        """The loop now."""
        market, scorer, trainer = (self._children[name].status for name in ("simulator", "scorer", "trainer"))
        self._follow(market, scorer, trainer)
        return Snapshot(
            t_ms=_now_ms(),
            profile=self._profile,
            uptime_s=time.monotonic() - self._started_s,
            scorer=_scorer(market, scorer) if scorer else None,
            trainer=_trainer(market, trainer) if trainer.get("examples") else None,
            truth=_truth(market) if market else None,
            versions=self._versions(),
            promises=PromisePart(market["lost"], market["duplicates"]) if market else None,
            events=tuple(self._events),
        )

    def event(self) -> bytes:
        """The snapshot as a server-sent event."""
        return to_event(self.snapshot())

    def _follow(self, market: Mapping[str, Any], scorer: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
        newest = max(self._published, default=0)
        for version in range(newest + 1, (trainer.get("version") or 0) + 1):  # a second may bring more than one
            self._published[version] = _now_ms()
            self._logloss[version] = ((trainer.get("progressive") or {}).get("ctcvr") or {}).get("logloss")
            self._note("publish", f"trainer published version {version}")
        live = scorer.get("model_version")
        if live is not None and live != self._live:
            self._swapped.setdefault(live, _now_ms())
            self._live = live
            self._note("swap", f"scorer took version {live} into service")
        for kind, count, text in (
            ("hold", sum((trainer.get("holds") or {}).values()), "the gate held a candidate back"),
            ("reject", scorer.get("rejected", 0), "requests were rejected"),
            ("degraded", scorer.get("degraded", 0), "batches were scored without the feature store"),
            ("lost", market.get("lost", 0), "requests have no scores"),
        ):
            self._count(kind, count, text)

    def _count(self, kind: Any, count: int, text: str) -> None:
        if count > self._said.get(kind, 0):
            self._note(kind, f"{count} so far: {text}")
        self._said[kind] = count

    def _note(self, kind: EventKind, text: str) -> None:
        self._events.append(EventPart(_now_ms(), kind, text))

    def _versions(self) -> tuple[VersionPart, ...]:
        known = sorted({*self._published, *self._swapped})[-VERSIONS_KEPT:]
        return tuple(
            VersionPart(
                version,
                self._published.get(version),
                self._swapped.get(version),
                "live" if version == self._live else "previous",
                self._logloss.get(version),
            )
            for version in known
        )


def _scorer(market: Mapping[str, Any], scorer: Mapping[str, Any]) -> ScorerPart:
    latency = market.get("latency_recent_ms") or {}
    candidates, batches = scorer.get("candidates", 0), scorer.get("batches", 0)
    return ScorerPart(
        requests=scorer["requests"],
        scored=scorer["scored"],
        rejected=scorer["rejected"],
        candidates_per_s=market.get("candidates_per_s"),
        latency_ms=LatencyMs(latency.get("p50"), latency.get("p99")),
        model_version=scorer.get("model_version"),
        degraded_share=market["degraded"] / market["scored"] if market.get("scored") else None,
        missing_share=market["missing"] / market["candidates"] if market.get("candidates") else None,
        batch_rows=candidates / batches if batches else None,
    )


def _trainer(market: Mapping[str, Any], trainer: Mapping[str, Any]) -> TrainerPart:
    examples = trainer["examples"]
    return TrainerPart(
        examples=ExampleCounts(examples["first"], examples["late_conversion"], examples["matured"]),
        versions_published=trainer["versions_published"],
        gate_holds=sum(trainer["holds"].values()),
        open_impressions=trainer.get("open_impressions"),
        step_ms=trainer.get("step_ms"),
        ctr=_task((trainer.get("progressive") or {}).get("ctr")),
        ctcvr=_task((trainer.get("progressive") or {}).get("ctcvr")),
        served=trainer.get("served"),
        feedback=_feedback(market),
    )


def _feedback(market: Mapping[str, Any]) -> FeedbackCounts | None:
    sent = market.get("feedback")
    return FeedbackCounts(sent["impression"], sent["click"], sent["conversion"]) if sent else None


def _task(values: Mapping[str, Any] | None) -> TaskMetrics | None:
    if not values:
        return None
    return TaskMetrics(values.get("auc"), values.get("logloss"), values.get("pcoc"))


def _truth(market: Mapping[str, Any]) -> TruthPart:
    recent = (market.get("truth") or {}).get("recent") or {}
    return TruthPart(market.get("truth_auc_ctr"), (recent.get("ctr") or {}).get("mae"))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Page:
    """The page, served while entered."""

    def __init__(self, port: int, profile: str, children: Mapping[str, Child]) -> None:
        """Port 0 takes a free one."""
        self._server = HttpServer(
            HttpConfig(port=port),
            Endpoints(
                event=Story(profile, children).event,
                assets=assets(),
                headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY},
                version={"version": __version__},
            ),
        )
        self.url = ""

    def __enter__(self) -> Self:
        self.url = self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()
