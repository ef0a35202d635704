"""A log with labels of its own through the whole loop: users and items without features, late conversions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stream_scorer.embedded.broker import EmbeddedBroker
from stream_scorer.embedded.datasets import DATASETS
from stream_scorer.embedded.redis import EmbeddedRedis
from stream_scorer.settings import Topics
from tests.integration.loop import Loop, last_json, until
from tests.unit.test_labelled_logs import click

ROWS, LATE = 2_000, 500
RULES = "negative_keep = 0.5\nadmit_after = 2\nevict_after_s = 3600.0\n"


@pytest.mark.timeout(300)
def test_criteo_conversions_are_scored_once_and_learned_late_ones_too(tmp_path: Path) -> None:
    log, topics = tmp_path / "data.txt", Topics()
    log.write_text("".join(click(n, n + LATE if n % 3 == 0 else "", cats=f"k{n % 5}") for n in range(ROWS)) + "x\n")
    with (
        EmbeddedBroker(dict.fromkeys(topics.model_dump().values(), 2)) as broker,
        EmbeddedRedis() as redis,
    ):
        loop = Loop(tmp_path, broker.bootstrap, redis.url, topics)
        (tmp_path / "features.toml").write_text(DATASETS["criteo-conversions"].schema_toml)
        text = loop.config.read_text()
        loop.config.write_text(text.replace("[trainer]\n", "[trainer]\n" + RULES))
        loop.prepare(create_topics=False)
        try:
            trainer, scorer = loop.start("train"), loop.start("score")
            done = loop.command("replay", "criteo-conversions", str(log), "--json")
            assert done.returncode == 0, done.stderr + done.stdout
            report = last_json(done.stdout)
            assert (report["requests"], report["scored"], report["lost"], report["duplicates"]) == (ROWS, ROWS, 0, 0)
            assert report["log"]["dirty_lines"] == {"time": [ROWS + 1]}
            scorer.stop(30)
            until(lambda: trainer.status.get("feedback") == report["feedback"], "the trainer to read all feedback", 120)
            trainer.stop(30)
            assert (scorer.exit_code, trainer.exit_code) == (0, 0), scorer.tail(5) + trainer.tail(5)
            assert scorer.final is not None
            assert trainer.final is not None
            assert (scorer.final["rejected"], scorer.final["degraded"], trainer.final["rejected"]) == (0, 0, 0)
            assert trainer.final["examples"]["first"] > ROWS / 2
            assert trainer.final["examples"]["late_conversion"] > ROWS / 6
            version = str(trainer.final["version"])
            manifest = json.loads(loop.command("models", "show", version).stdout)
            rows = manifest["embedding_rows"]
            assert (rows["admit_after"], rows["evict_after_ms"]) == (2, 3_600_000)
            assert rows["admitted"] > 0
        finally:
            loop.stop()
            loop.forget()
