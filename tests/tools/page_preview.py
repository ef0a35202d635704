"""Look at the dashboard without a stream: ``python -m tests.tools.page_preview [--port 8766] [--case full]``.

Serves the page with its real headers and made-up snapshots. Cases: full, start (no version yet), empty (nothing
known), trouble (lost, held, refused, degraded), silent (one snapshot, then no news), end (the run is over).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from stream_scorer.dashboard.page import CONTENT_SECURITY_POLICY, assets
from stream_scorer.dashboard.snapshot import (
    END_EVENT,
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

CASES = ("full", "start", "empty", "trouble", "silent", "end")
PROFILE = "embedded: librdkafka mock cluster, Valkey, simulated market"


def made_up(case: str, now_ms: int, s: float) -> Snapshot:
    """The snapshot ``s`` seconds into a made-up run that is now at ``now_ms``."""
    if case == "empty":
        return Snapshot(now_ms, PROFILE, s)
    learned = 1 - math.exp(-s / 60)
    wave = math.sin(s / 7)
    versions = () if case == "start" else _versions(case, now_ms, s)
    live = versions[-1].version if versions else 0
    trouble = case == "trouble"
    scorer = ScorerPart(
        requests=int(400 * s),
        scored=int(400 * s) - 12,
        rejected=3,
        candidates_per_s=20_000 + 1_500 * wave,
        latency_ms=LatencyMs(5.2 + 0.4 * wave, 14 + 3 * wave + (40 if int(s) % 47 == 0 else 0)),
        lag=12,
        model_version=live,
        degraded_share=0.12 if trouble else 0.0,
        missing_share=0.004,
        batch_rows=780.0,
    )
    known = case != "start"
    trainer = TrainerPart(
        examples=ExampleCounts(int(3900 * s), int(6 * s), int(2 * s)),
        versions_published=live,
        gate_holds=1 if trouble else 0,
        open_impressions=39_204,
        step_ms=4.1,
        ctr=TaskMetrics(0.52 + 0.19 * learned, 0.62 - 0.17 * learned + 0.004 * wave, 2.4 - 1.4 * learned)
        if known
        else None,
        ctcvr=TaskMetrics(0.51 + 0.16 * learned, 0.14 - 0.05 * learned + 0.002 * wave, 3.4 - 2.45 * learned)
        if known
        else None,
        served=int(400 * s),
        feedback=FeedbackCounts(int(4000 * s), int(620 * s), int(70 * s)),
    )
    events = [EventPart(v.swapped_ms, "swap", f"version {v.version} in service") for v in versions if v.swapped_ms]
    if trouble:
        events.append(EventPart(now_ms - 4000, "refuse", "version 9 refused (corrupt): sha256 of model.safetensors"))
        events.append(EventPart(now_ms - 2000, "degraded", "Redis did not answer within 50 ms, 12% of scores degraded"))
    start = EventPart(now_ms - int(s * 1000), "start", "scorer, trainer and market are up")
    return Snapshot(
        now_ms,
        PROFILE,
        s,
        scorer,
        trainer,
        TruthPart(0.53 + 0.22 * learned, 0.08 - 0.06 * learned) if known else None,
        versions,
        PromisePart(2 if trouble else 0, 5 if trouble else 0),
        (start, *events),
    )


def _versions(case: str, now_ms: int, s: float) -> tuple[VersionPart, ...]:
    count = int(s // 20) + 1
    out = []
    for number in range(1, count + 1):
        at = now_ms - int((s - (number - 1) * 20) * 1000)
        state = "live" if number == count else "previous"
        out.append(VersionPart(number, at - 900, at, state, 0.14 - 0.005 * number))
    if case == "trouble":
        live = out[-1]
        out.insert(-1, VersionPart(live.version, live.published_ms, None, "held", 0.2))
        out[-1] = replace(live, version=live.version + 1)
    return tuple(out)


def stream(case: str, past_s: int) -> Iterator[bytes]:
    """The past at once, as a server that replays does, then one snapshot a second."""
    begun = time.time() - past_s
    for second in range(1, past_s):
        yield to_event(made_up(case, int((begun + second) * 1000), float(second)))
    while True:
        yield to_event(made_up(case, int(time.time() * 1000), time.time() - begun))
        if case == "silent":
            time.sleep(3600)
        if case == "end":
            yield END_EVENT
            return
        time.sleep(1)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--case", choices=CASES, default="full")
    parser.add_argument("--past", type=int, default=180, help="seconds already run")
    options = parser.parse_args()
    files = assets()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/events":
                self._head(200, "text/event-stream")
                try:
                    for event in stream(options.case, options.past):
                        self.wfile.write(event)
                except (BrokenPipeError, ConnectionResetError):
                    return
            elif self.path in files:
                self._head(200, files[self.path].content_type)
                self.wfile.write(files[self.path].body)
            else:
                self._head(404, "text/plain")

        def _head(self, status: int, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{options.port}/")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
