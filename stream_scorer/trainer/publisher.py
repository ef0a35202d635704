"""Candidates against the live version, on the same recent rows: publish, or hold and say why.

The live version is whatever the store's pointer names, so a rollback is respected: the next candidate is judged against
the version that was rolled back to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from esmm.batch import Examples, Float32, Kind
from stream_scorer.core import metric_names as names
from stream_scorer.core.errors import ModelRefused, RecoverableError
from stream_scorer.core.gate import Decision, GatePolicy, Verdicts, cvr_of, decide, gap, verdicts
from stream_scorer.core.pending import Arrays, Recent, from_arrays, to_arrays
from stream_scorer.ports import Judge
from stream_scorer.trainer.ports import TrainerPorts

_log = structlog.get_logger("stream_scorer.trainer")

Facts = Callable[[], Mapping[str, Any]]


@dataclass
class PublishTally:
    """Running counts."""

    versions_published: int = 0
    version: int = 0  # the last one published
    holds: dict[str, int] = field(default_factory=dict)  # by reason
    numbers: dict[str, float] = field(default_factory=dict)  # of the last decision


class _Judged(NamedTuple):
    """One model on the recent rows."""

    verdicts: Verdicts
    ctr_B: Float32
    cvr_B: Float32


class Publisher:
    """Keeps the recent rows; knows the live version."""

    def __init__(self, ports: TrainerPorts, policy: GatePolicy, rows: int, keep_versions: int) -> None:
        """``rows``: recent first emissions, and as many matured clicks, that a candidate is judged on."""
        self._ports, self._policy, self._keep_versions = ports, policy, keep_versions
        self._first, self._matured = Recent(rows), Recent(rows)
        self._judge: Judge | None = None
        self._judged_version: int | None = None
        self.tally = PublishTally()

    def add(self, examples: Examples) -> None:
        """Rows that were just learned."""
        self._first.add(examples.take(np.flatnonzero(examples.kind_B == Kind.FIRST)))
        self._matured.add(examples.take(np.flatnonzero(examples.kind_B == Kind.MATURED)))

    def publish_first(self, facts: Facts) -> None:
        """Give an empty store its first version, the learner as it is, so that scorers can start."""
        if self._ports.store.current() is None:
            self._publish(Decision(True, "first", {}), facts)

    def offer(self, facts: Facts) -> Decision | None:
        """Publish the learner as it is, if the gate lets it; ``facts`` go into the manifest. None: the store failed."""
        try:
            self._open_live()
            decision = self._decide()
            self.tally.numbers = dict(decision.numbers)
            if decision.promote:
                self._publish(decision, facts)
        except (RecoverableError, OSError) as error:
            _log.warning("no version was published this time", error=str(error))
            return None
        if not decision.promote:
            self.tally.holds[decision.reason] = self.tally.holds.get(decision.reason, 0) + 1
            self._ports.metrics.inc(names.GATE, decision="hold", reason=decision.reason)
            _log.warning("candidate held", reason=decision.reason, **decision.numbers)
        return decision

    def _open_live(self) -> None:
        current = self._ports.store.current()
        if current == self._judged_version:
            return
        self._judge, self._judged_version = None, current
        if current is None:
            return
        try:
            self._judge = self._ports.open_version(self._ports.store.info(current))
        except ModelRefused as error:
            _log.error("the live version cannot be read: the candidate is judged alone", error=str(error))

    def _decide(self) -> Decision:
        first, matured = self._first.snapshot(), self._matured.snapshot()
        candidate = _judge(self._ports.learner, first, matured)
        if self._judge is None:
            return decide(self._policy, None, candidate.verdicts)
        live = _judge(self._judge, first, matured)
        distance = max(gap(live.ctr_B, candidate.ctr_B), gap(live.cvr_B, candidate.cvr_B))
        return decide(self._policy, live.verdicts, candidate.verdicts, distance)

    def _publish(self, decision: Decision, facts: Facts) -> None:
        ports, parent = self._ports, self._judged_version
        manifest = {**facts(), "parent": parent, "created_ms": ports.clock.now_ms(), "gate": dict(decision.numbers)}
        version = ports.store.publish(lambda path, number: ports.learner.export(path, {**manifest, "version": number}))
        ports.store.prune(self._keep_versions)
        self.tally.versions_published += 1
        self.tally.version = version
        ports.metrics.inc(names.GATE, decision="promote", reason=decision.reason)
        ports.metrics.inc(names.VERSIONS_PUBLISHED)
        _log.info("version published", version=version, parent=parent, reason=decision.reason)

    def arrays(self) -> Arrays:
        """The recent rows, for a checkpoint."""
        return to_arrays("first", self._first.snapshot()) | to_arrays("matured", self._matured.snapshot())

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return asdict(self.tally)

    def restore(self, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `state` and `arrays` gave."""
        self.tally = PublishTally(**state)
        self._first.restore(from_arrays("first", arrays))
        self._matured.restore(from_arrays("matured", arrays))


def _judge(model: Judge, first: Examples | None, matured: Examples | None) -> _Judged:
    none_B = np.zeros(0, np.float32)
    ctr_B = model.predict(first)[0] if first is not None else none_B
    cvr_B = cvr_of(*model.predict(matured)) if matured is not None else none_B
    return _Judged(verdicts(first, ctr_B, matured, cvr_B), ctr_B, cvr_B)
