"""``stream-scorer demo`` as a newcomer runs it: it learns, swaps, loses nothing and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.integration.loop import last_json, until

pytestmark = pytest.mark.timeout(240)
DEMO = [sys.executable, "-m", "stream_scorer.cli", "demo"]


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that name this folder, and of embedded servers started from it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def children_of(pid: int) -> set[int]:
    """Every descendant, by process id."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def alive(pids: set[int]) -> set[int]:
    running = set()
    for pid in pids:
        try:
            state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.add(pid)
    return running


def test_the_loop_closes_and_says_so(tmp_path):
    words = [*DEMO, "--duration", "45", "--headless", "--json", "--keep", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = last_json(done.stdout)
    assert report["requests"] > 100
    assert (report["scored"], report["lost"], report["duplicates"]) == (report["requests"], 0, 0)
    assert report["rejected"] == 0
    assert report["candidates_per_s"] > 0
    assert report["latency_ms"]["p50"] <= report["latency_ms"]["p99"]
    assert report["versions_published"] >= 2
    assert report["versions_served"] >= 2
    for task in ("ctr", "ctcvr"):
        assert report[task].keys() == {"labels", "auc_first", "auc_last", "logloss_first", "logloss_last", "pcoc_last"}
    assert report["ctr"]["logloss_last"] < report["ctr"]["logloss_first"]
    assert 0.0 <= report["truth_auc_ctr"] <= 1.0
    assert processes_of(tmp_path) == []
    manifest = json.loads(next((tmp_path / "models").rglob("manifest.json")).read_text())
    assert {"files", "schema_hash", "parent", "offsets"} <= manifest.keys()


def test_ctrl_c_stops_everything_and_the_page_is_up_before(tmp_path):
    words = [*DEMO, "--duration", "0", "--port", "0", "--keep", str(tmp_path)]
    log = tmp_path / "demo.log"
    with log.open("wb") as out:
        demo = subprocess.Popen(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        until(lambda: "http://" in log.read_text() or demo.poll() is not None, "the page's address")
        url = "http://" + log.read_text().split("http://")[1].split()[0]
        with urllib.request.urlopen(url, timeout=10) as page:
            assert b"stream-scorer" in page.read()
        with urllib.request.urlopen(f"{url}/events", timeout=10) as events:
            lines = [events.readline().decode() for _ in range(3)]
        assert any(line.startswith("data: {") for line in lines)
        until(lambda: " scored" in log.read_text() and " 0 of 0" not in log.read_text().splitlines()[-1], "scores")
        descendants = children_of(demo.pid)
        assert len(descendants) >= 5  # broker, Valkey, scorer, trainer, simulator
        demo.send_signal(signal.SIGINT)
        demo.wait(60)
    finally:
        demo.kill()
        demo.wait()
    assert alive(descendants) == set()
    assert "lost" in log.read_text()


def test_a_killed_demo_takes_its_processes_along(tmp_path):
    words = [*DEMO, "--duration", "0", "--headless", "--keep", str(tmp_path)]
    demo = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        until(lambda: len(children_of(demo.pid)) >= 5, "five processes")
        descendants = children_of(demo.pid)
    finally:
        os.kill(demo.pid, signal.SIGKILL)
        demo.wait()
    until(lambda: not alive(descendants), "every process to end", 40)


@pytest.mark.real_kafka
@pytest.mark.real_redis
def test_the_demo_on_a_broker_it_starts_and_somebodys_redis(tmp_path, kafka_home, redis_url):
    words = [*DEMO, "--duration", "30", "--headless", "--json", "--rate", "20", "--keep", str(tmp_path)]
    words += ["--kafka-home", str(kafka_home), "--redis", redis_url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = last_json(done.stdout)
    assert (report["scored"], report["lost"], report["duplicates"]) == (report["requests"], 0, 0)
    assert report["profile"] == "Apache Kafka started here and your Redis"
    assert processes_of(tmp_path) == []
