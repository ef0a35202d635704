"""Who is measured: processes that read the request topic and write an output topic of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.speed.world import FLOATS, TOWERS, World, peers_python

PEER_DIR = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Contender:
    """How to run one. ``kind``: ours | quix | handwritten | echo. ``scorer``, ``redis``: settings of ours."""

    name: str
    kind: str
    processes: int = 1
    batch: int = 0
    threads: int = 1
    scorer: dict[str, object] = field(default_factory=dict)
    redis: dict[str, object] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        return str(self.scorer.get("precision", "float32"))


def ours(name: str, workers: int = 1, redis: dict[str, object] | None = None, **scorer: object) -> Contender:
    """``served`` is off unless asked for: the peers do not write it either."""
    return Contender(name, "ours", workers, scorer={"served": False, **scorer}, redis=redis or {})


def standard(bfloat16: bool) -> list[Contender]:
    """The table of the README."""
    fast = [ours("stream-scorer float32"), ours("stream-scorer float32, 2 workers", 2)]
    if bfloat16:
        fast += [
            ours("stream-scorer bfloat16", precision="bfloat16"),
            ours("stream-scorer bfloat16, 2 workers", 2, precision="bfloat16"),
        ]
    return [
        *fast,
        Contender("Quix + DeepCTR-Torch", "quix"),
        Contender("Quix + DeepCTR-Torch, 2 processes", "quix", 2),
        Contender("hand-written, batch 64", "handwritten", batch=64, threads=2),
        Contender("hand-written, batch 200", "handwritten", batch=200, threads=2),
        Contender("hand-written, batch 200, 2 processes", "handwritten", 2, batch=200),
        Contender("consume and produce", "echo"),
    ]


class Running:
    """A contender at work; its processes end when told, or with us."""

    def __init__(self, world: World, contender: Contender, group: str, output: str, source: str = "requests") -> None:
        self.contender = contender
        self.log = world.folder / f"{group}.log"
        env = {key: value for key, value in os.environ.items() if not key.startswith("STREAM_SCORER_")}
        env |= {"OMP_NUM_THREADS": str(contender.threads), "PYTHONUNBUFFERED": "1"}
        lines = self._lines(world, group, output, source)
        with self.log.open("ab") as log:
            self.processes = [
                subprocess.Popen(
                    line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
                )
                for line in lines
            ]

    def _lines(self, world: World, group: str, output: str, source: str) -> list[list[str]]:
        contender = self.contender
        if contender.kind == "ours":
            config = world.folder / f"{group}.toml"
            config.write_text(world.settings_text(group, (source, output), contender.scorer, contender.redis))
            workers = [] if contender.processes == 1 else ["--workers", str(contender.processes)]
            return [[sys.executable, "-m", "stream_scorer.cli", "score", "--config", str(config), *workers]]
        python = peers_python() if contender.kind == "quix" else sys.executable
        told = {
            "bootstrap": world.bootstrap,
            "redis": world.redis_url,
            "group": group,
            "requests": source,
            "output": output,
            "weights": str(world.folder / "weights.npz"),
            "floats": FLOATS,
            "towers": TOWERS,
            "batch": contender.batch,
            "threads": contender.threads,
        }
        return [[python, str(PEER_DIR / f"{contender.kind}.py"), json.dumps(told)]] * contender.processes

    def check(self) -> None:
        """Raises RuntimeError with the end of the log when a process has ended."""
        for process in self.processes:
            if process.poll() is not None:
                said = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{self.contender.name} ended with status {process.returncode}: {said}")

    @property
    def pids(self) -> list[int]:
        """Its processes and their children."""
        found, queue = [], [process.pid for process in self.processes]
        while queue:
            pid = queue.pop()
            found.append(pid)
            try:
                queue += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            except OSError:
                continue
        return found

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
