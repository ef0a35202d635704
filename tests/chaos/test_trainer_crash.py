"""The trainer, killed by SIGKILL at random points, ends exactly where one that was never killed ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("state", "kills"), [("memory", 20), ("rocksdb", 10)])
def test_killed_at_any_point_it_reaches_the_same_weights_bit_for_bit(tmp_path: Path, state: str, kills: int) -> None:
    command = [sys.executable, "-m", "tests.chaos.trainer_crash", str(tmp_path), "1", str(kills), state]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert len(outcome["deaths"]) == kills, "it had learned everything before it was killed often enough"
    expected, found = outcome["expected"], outcome["found"]
    assert expected["examples"]["matured"] > 100
    assert expected.pop("operations") > found.pop("operations")  # the last life had only the rest to do
    assert found == expected
