"""Candidates against published versions, on recent rows that neither had learned: publish, or hold and say why.

The live version is whatever the store's pointer names, so a rollback is respected: the next candidate is judged against
the version that was rolled back to, and no later one is taken for the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from esmm.batch import Examples, Float32
from stream_scorer.core import metric_names as names
from stream_scorer.core.errors import ModelRefused, RecoverableError
from stream_scorer.core.gate import Contest, Decision, GatePolicy, Verdicts, beats, cvr_of, decide, gap, verdicts
from stream_scorer.core.gate_rows import GateRows, Judgeable
from stream_scorer.core.pending import Arrays
from stream_scorer.ports import Judge
from stream_scorer.trainer.ports import TrainerPorts

_log = structlog.get_logger("stream_scorer.trainer")

LEARNED = "learned"  # in a manifest: how many rows its trainer had learned
HELD_OUT_ROWS = 1_000  # of each kind, that a candidate is judged on
_NOTHING = np.zeros(0, np.float32)

Facts = Callable[[], Mapping[str, Any]]


@dataclass
class PublishTally:
    """Running counts."""

    versions_published: int = 0
    version: int = 0  # the last one published
    holds: dict[str, int] = field(default_factory=dict)  # by reason
    numbers: dict[str, float] = field(default_factory=dict)  # of the last decision


class _Opened(NamedTuple):
    """A published version; ``learned``: rows it had learned of this trainer's, 0 for a version of another origin."""

    judge: Judge
    learned: int


class _Said(NamedTuple):
    """One model on some rows."""

    verdicts: Verdicts
    ctr_B: Float32
    cvr_B: Float32


class _Match(NamedTuple):
    """A candidate and a rival on the rows that neither had learned from."""

    progressive: Verdicts
    now: _Said
    rival: _Said

    @property
    def contest(self) -> Contest:
        """By progressive predictions."""
        return Contest(self.progressive, self.rival.verdicts)


class Publisher:
    """Keeps the recent rows; knows the live version, and the best one lately."""

    def __init__(self, ports: TrainerPorts, policy: GatePolicy, rows: int, keep_versions: int) -> None:
        """``rows``: recent first emissions, and as many matured clicks, that a candidate is judged on."""
        self._ports, self._policy, self._keep_versions = ports, policy, keep_versions
        self._rows = GateRows(rows, max(HELD_OUT_ROWS, policy.min_examples))
        self._open: dict[int, _Opened | None] = {}  # live and best; None: it cannot be read
        self._live: int | None = None
        self._best: int | None = None
        self.tally = PublishTally()

    def add(self, examples: Examples, ctr_B: Float32, ctcvr_B: Float32) -> None:
        """Rows that were just learned, with what the learner predicted before it did."""
        self._rows.add(examples, ctr_B, ctcvr_B)

    def hold_out(self, examples: Examples) -> None:
        """Rows that are not learned, by any model."""
        self._rows.hold_out(examples)

    def forget(self) -> None:
        """The learner went back to a checkpoint: what it said since says nothing of it."""
        self._rows.forget()

    def publish_first(self, facts: Facts) -> None:
        """Give an empty store its first version, the learner as it is, so that scorers can start."""
        if self._ports.store.current() is None:
            self._publish(Decision(True, "first", {}), facts)

    def forget_held_out(self) -> None:
        """What was held out is of a world that is gone: it would speak for the version that fits it."""
        self._rows.forget_held_out()

    def offer(self, facts: Facts) -> Decision | None:
        """Publish the learner as it is, if the gate lets it; ``facts`` go into the manifest. None: the store failed."""
        try:
            self._open_rivals()
            decision, best = self._decide()
            self.tally.numbers = dict(decision.numbers)
            if decision.promote:
                version = self._publish(decision, facts)
                self._best = version if best is None or beats(self._policy, best) else self._best
        except (RecoverableError, OSError) as error:
            _log.warning("no version was published this time", error=str(error))
            return None
        if not decision.promote:
            self.tally.holds[decision.reason] = self.tally.holds.get(decision.reason, 0) + 1
            self._ports.metrics.inc(names.GATE, decision="hold", reason=decision.reason)
            _log.warning("candidate held", reason=decision.reason, **decision.numbers)
        return decision

    def _open_rivals(self) -> None:
        """The live version, and the best one: the live one until another has shown itself better."""
        self._live = live = self._ports.store.current()
        if self._best is None or live is None or self._best > live:  # a rollback takes the best one's title too
            self._best = live
        for version in (live, self._best):
            if version is not None and version not in self._open:
                self._open[version] = self._opened(version)
        if self._best is not None and self._open[self._best] is None:
            self._best = live
        self._open = {version: self._open[version] for version in (live, self._best) if version is not None}

    def _opened(self, version: int) -> _Opened | None:
        try:
            info = self._ports.store.info(version)
            judge = self._ports.open_version(info)
        except ModelRefused as error:
            _log.error("a version cannot be read: the candidate is judged without it", error=str(error))
            return None
        learned = info.manifest.get(LEARNED, 0)
        # more than was learned here: published by a trainer whose checkpoints are gone
        return _Opened(judge, learned if isinstance(learned, int) and learned <= self._rows.learned else 0)

    def _decide(self) -> tuple[Decision, Contest | None]:
        """The decision, and how the candidate did against the best version."""
        learner, rows = self._ports.learner, self._rows
        live = self._open.get(self._live) if self._live is not None else None
        if live is None:
            first, matured = rows.first_since(0), rows.matured_since(0)
            said = _progressive(first, matured)
            now = _ask(learner, first, matured)
            return decide(self._policy, None, said, now=now.verdicts), None
        match = self._match(live)
        distance = max(gap(match.rival.ctr_B, match.now.ctr_B), gap(match.rival.cvr_B, match.now.cvr_B))
        best = match.contest
        rival = self._open.get(self._best) if self._best is not None else None
        if rival is not None and self._best != self._live:
            best = self._match(rival).contest
        first, matured = rows.held_out()
        held_out = Contest(_ask(learner, first, matured).verdicts, _ask(live.judge, first, matured).verdicts)
        decision = decide(
            self._policy, match.rival.verdicts, match.progressive, distance,
            now=match.now.verdicts, best=best, held_out=held_out,
        )  # fmt: skip
        return decision, best

    def _match(self, rival: _Opened) -> _Match:
        first, matured = self._rows.first_since(rival.learned), self._rows.matured_since(rival.learned)
        now = _ask(self._ports.learner, first, matured)
        return _Match(_progressive(first, matured), now, _ask(rival.judge, first, matured))

    def _publish(self, decision: Decision, facts: Facts) -> int:
        ports, parent = self._ports, self._live
        manifest = {
            **facts(), "parent": parent, "created_ms": ports.clock.now_ms(), "gate": dict(decision.numbers),
            LEARNED: self._rows.learned,
        }  # fmt: skip
        version = ports.store.publish(lambda path, number: ports.learner.export(path, {**manifest, "version": number}))
        self.tally.versions_published += 1
        self.tally.version = version
        ports.metrics.inc(names.GATE, decision="promote", reason=decision.reason)
        ports.metrics.inc(names.VERSIONS_PUBLISHED)
        try:
            ports.store.prune(self._keep_versions, () if self._best is None else (self._best,))
        except OSError as error:
            _log.warning("old versions stay", error=str(error))
        _log.info("version published", version=version, parent=parent, reason=decision.reason)
        return version

    def arrays(self) -> Arrays:
        """The recent rows, for a checkpoint."""
        return self._rows.arrays()

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return {"tally": asdict(self.tally), "best": self._best}

    def restore(self, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `state` and `arrays` gave."""
        self.tally, self._best = PublishTally(**state["tally"]), state["best"]
        self._rows.restore(arrays)
        self._open = {}


def _progressive(first: Judgeable | None, matured: Judgeable | None) -> Verdicts:
    return verdicts(
        first.examples if first else None,
        first.candidate_B if first else _NOTHING,
        matured.examples if matured else None,
        matured.candidate_B if matured else _NOTHING,
    )


def _ask(model: Judge, first: Judgeable | None, matured: Judgeable | None) -> _Said:
    ctr_B = model.predict(first.examples)[0] if first else _NOTHING
    cvr_B = cvr_of(*model.predict(matured.examples)) if matured else _NOTHING
    said = verdicts(first.examples if first else None, ctr_B, matured.examples if matured else None, cvr_B)
    return _Said(said, ctr_B, cvr_B)
