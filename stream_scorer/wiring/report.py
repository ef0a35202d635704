"""What the demo says at its end, from the last status line of each process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stream_scorer.wiring.processes import Child

TASK_FIELDS = ("labels", "auc_first", "auc_last", "logloss_first", "logloss_last", "pcoc_last")


@dataclass(frozen=True)
class Report:
    """The outcome of a run. ``lost`` and ``duplicates`` are counted by the market, from outside the scorer."""

    profile: str
    simulator: Mapping[str, Any] = field(default_factory=dict)
    scorer: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost and at least one version was swapped in while scoring."""
        return bool(self.simulator["lost"] == 0 and self.simulator["versions_served"] >= 2)

    def fields(self) -> dict[str, Any]:
        """The JSON object of ``demo --json``."""
        market = self.simulator
        return {
            "profile": self.profile,
            **{name: market[name] for name in ("requests", "scored", "lost", "duplicates")},
            "rejected": self.scorer["rejected"],
            "candidates_per_s": market["candidates_per_s"],
            "latency_ms": market["latency_ms"],
            "versions_published": self.trainer["versions_published"],
            "versions_served": market["versions_served"],
            "ctr": {name: self.trainer["ctr"][name] for name in TASK_FIELDS},
            "ctcvr": {name: self.trainer["ctcvr"][name] for name in TASK_FIELDS},
            "truth_auc_ctr": market["truth_auc_ctr"],
            "truth": market.get("truth"),
            "examples": self.trainer["examples"],
            "ok": self.ok,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        market, trainer = self.simulator, self.trainer
        latency = market["latency_ms"]
        counts = ", ".join(f"{market[name]} {name}" for name in ("requests", "scored", "lost", "duplicates"))
        speed = f"{_number(market['candidates_per_s'], 0)} candidates/s"
        return [
            f"{counts}, {self.scorer['rejected']} rejected",
            f"{speed}, latency p50 {_number(latency['p50'], 1)} ms, p99 {_number(latency['p99'], 1)} ms",
            f"{trainer['versions_published']} versions published, {market['versions_served']} served while scoring",
            _task_line("CTR", trainer["ctr"]),
            _task_line("CTCVR", trainer["ctcvr"]),
            f"against the market's truth: CTR AUC {_number(market['truth_auc_ctr'])}",
        ]


def _task_line(name: str, task: Mapping[str, Any]) -> str:
    return (
        f"{name}: logloss {_number(task['logloss_first'])} -> {_number(task['logloss_last'])}, "
        f"AUC {_number(task['auc_first'])} -> {_number(task['auc_last'])}, PCOC {_number(task['pcoc_last'])}"
    )


def _number(value: float | None, digits: int = 4) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def build_report(profile: str, children: Mapping[str, Child]) -> Report:
    """From processes that have ended; each has left a final status."""
    finals = {name: child.final or {} for name, child in children.items()}
    return Report(profile, finals["simulator"], finals["scorer"], finals["trainer"])
