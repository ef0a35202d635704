"""A trainer that is killed by SIGKILL at random operations and started again, until it has learned everything.

``python -m tests.chaos.trainer_crash DIRECTORY SEED KILLS memory|rocksdb`` prints one JSON line. Each life of the
trainer is a forked process on the same directory, with a bomb that counts learning steps, renames and fsyncs down: it
dies in the middle of a step, of a checkpoint, of a publication. The topics are in memory and the same in every life.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from esmm.checkpoint import load_version, save_version
from esmm.learner import Evaluator, Learner, LearnerConfig
from esmm.model import ESMM
from stream_scorer.adapters import checkpoints, durable
from stream_scorer.adapters.join_rocks import RocksJoinState
from stream_scorer.adapters.join_state import MemoryJoinState
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.gate import GatePolicy
from stream_scorer.wiring.logs import configure_logs
from tests.trainer_kit import POLICY, SCHEMA, Market, TrainerWorld

CRASHING = replace(
    POLICY, max_records=250, publish_every_s=1e9, publish_every_examples=600, gate=GatePolicy(min_examples=50)
)
MARKET = Market(requests=700)
CHECKPOINT_EVERY = 4  # turns


class Bomb:
    """Kills this process at the n-th operation; 0: never."""

    def __init__(self, fuse: int) -> None:
        self._fuse = fuse
        self.operations = 0

    def tick(self) -> None:
        self.operations += 1
        if self.operations == self._fuse:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return wrapped


def learner() -> Learner:
    model = ESMM(SCHEMA.columns, tower_dnn_hidden_units=(8,), seed=7)
    return Learner(model, LearnerConfig(threads=1, learning_rate=0.01), save_version)


def live(root: Path, state: str, bomb: Bomb) -> dict[str, Any]:
    """One life: from the newest checkpoint to the end of the topics."""
    Path.rename = bomb.wrap(Path.rename)  # type: ignore[method-assign]
    durable.sync = checkpoints.sync = bomb.wrap(durable.sync)
    world = TrainerWorld(
        root,
        policy=CRASHING,
        make_learner=learner,
        open_version=lambda info: Evaluator(load_version(info.path).model),
        make_state=MemoryJoinState if state == "memory" else lambda: RocksJoinState(root / "scratch", 4, 6),
    )
    world.learner.step = bomb.wrap(world.learner.step)
    MARKET.fill(world.source)
    turns = 0
    while turns == 0 or not world.at_rest:
        world.turn()
        turns += 1
        if turns % CHECKPOINT_EVERY == 0:
            world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))
    world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))
    stats = world.trainer.stats()
    world.state.close()
    return {
        "learner": _everything(world.learner, root / "final"),
        "examples": dict(stats.examples),
        "outcomes": dict(stats.outcomes),
        "ctr": stats.ctr,
        "ctcvr": stats.ctcvr,
        "operations": bomb.operations,
    }


def _everything(trained: Learner, directory: Path) -> str:
    """A hash of weights, optimiser and auxiliary heads."""
    directory.mkdir(exist_ok=True)
    trained.save(directory)
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.read_bytes())
    return f"{trained.steps} steps, {digest.hexdigest()}"


def in_a_process_of_its_own(root: Path, state: str, fuse: int) -> dict[str, Any] | None:
    """What one life came to; None when it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            (root / "result.json").write_text(json.dumps(live(root, state, Bomb(fuse))))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    if os.WEXITSTATUS(status):
        raise SystemExit("a life of the trainer failed; its error is above")
    result: dict[str, Any] = json.loads((root / "result.json").read_text())
    return result


def main(directory: str, seed: str, kills: str, state: str) -> None:
    """Compare a trainer that was killed with one that was not."""
    configure_logs("ERROR", as_json=False)
    whole, cut = Path(directory) / "whole", Path(directory) / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = in_a_process_of_its_own(whole, state, 0)
    if expected is None:
        raise SystemExit("nobody killed this one")
    rng = random.Random(seed)
    longest = max(30, 2 * expected["operations"] // int(kills))  # so that something is left for the last life
    deaths: list[int] = []
    while len(deaths) < int(kills):
        deaths.append(rng.randrange(1, longest))
        if in_a_process_of_its_own(cut, state, deaths[-1]) is not None:
            break
    found = in_a_process_of_its_own(cut, state, 0)
    print(json.dumps({"expected": expected, "found": found, "deaths": deaths}))


if __name__ == "__main__":
    main(*sys.argv[1:])
