"""Candidates against published versions, on recent rows that neither had learned: publish, or hold and say why.

The live version is whatever the store's pointer names, so a rollback is respected: the next candidate is judged against
the version that was rolled back to, and no later one is taken for the best.

Which rows a version had learned is a count, and counts can be compared within one *lineage*: all that has been learned
since a trainer started from nothing. Its id is drawn then, kept in the checkpoint and written into each manifest beside
the count. A trainer that was killed between a publication and its next checkpoint goes back to fewer rows than the live
version had learned; it learns the same rows again in the same order (a replay is exact, as long as the settings are the
same), so that version is judged on rows beyond its own count only, and until there are enough of them the gate holds.
Nothing is known of a version of another lineage, or of one that names none (pretrained, or published by an older
build): it is judged on all recent rows. If it had learned some of them it looks better than it is, and candidates may
be held until these rows have been replaced by later ones.
"""

from __future__ import annotations

import math
import secrets
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

LINEAGE = "lineage"  # in a manifest and in a checkpoint: which trainer's rows are counted
LEARNED = "learned"  # in a manifest: how many rows of its lineage it had learned
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
    """A published version; ``learned``: rows of this trainer's lineage it had learned, 0 for one of another lineage."""

    judge: Judge
    learned: int


class _Said(NamedTuple):
    """One model on some rows."""

    verdicts: Verdicts
    ctr_B: Float32
    cvr_B: Float32


class _Match(NamedTuple):
    """A candidate and a rival on the rows that neither had learned from; all recent rows when there is no rival."""

    progressive: Verdicts
    now: _Said
    rival: _Said | None

    @property
    def contest(self) -> Contest | None:
        """By progressive predictions."""
        return None if self.rival is None else Contest(self.progressive, self.rival.verdicts)


class Publisher:
    """Keeps the recent rows; knows the live version, and the best one lately."""

    def __init__(self, ports: TrainerPorts, policy: GatePolicy, rows: int, keep_versions: int) -> None:
        """``rows``: recent first emissions, and as many matured clicks, that a candidate is judged on."""
        self._ports, self._policy, self._keep_versions = ports, policy, keep_versions
        self._rows = GateRows(rows, max(HELD_OUT_ROWS, policy.min_examples))
        self._lineage = secrets.token_hex(8)  # of a trainer that starts from nothing; `restore` goes on with its own
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
            if version is not None and self._open.get(version) is None:  # one that could not be read may be by now
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
        learned = info.manifest.get(LEARNED) if info.manifest.get(LINEAGE) == self._lineage else None
        return _Opened(judge, learned if isinstance(learned, int) else 0)

    def _decide(self) -> tuple[Decision, Contest | None]:
        """The decision, and how the candidate did against the best version.

        With a live version that cannot be read the best one is still a rival; without any the candidate stands alone.
        """
        live, best = (None if version is None else self._open.get(version) for version in (self._live, self._best))
        match = self._match(live)
        contest = match.contest if best is None or best is live else self._match(best).contest
        held_out = self._held_out(live or best)
        distance = 0.0
        if match.rival is not None:
            distance = max(gap(match.rival.ctr_B, match.now.ctr_B), gap(match.rival.cvr_B, match.now.cvr_B))
        decision = decide(
            self._policy, match.rival.verdicts if match.rival else None, match.progressive, distance,
            now=match.now.verdicts, best=contest, held_out=held_out,
        )  # fmt: skip
        return decision, contest

    def _match(self, rival: _Opened | None) -> _Match:
        learned = rival.learned if rival is not None else 0
        first, matured = self._rows.first_since(learned), self._rows.matured_since(learned)
        now = _ask(self._ports.learner, first, matured)
        if first is None:  # nothing was learned since: that it says numbers at all must show on rows from before
            before = _ask(self._ports.learner, self._rows.first_since(0), self._rows.matured_since(0))
            now = now._replace(verdicts=now.verdicts._replace(finite=now.verdicts.finite and before.verdicts.finite))
        return _Match(_progressive(first, matured), now, None if rival is None else _ask(rival.judge, first, matured))

    def _held_out(self, rival: _Opened | None) -> Contest | None:
        """By what both say now: neither has learned from these rows."""
        if rival is None:
            return None
        first, matured = self._rows.held_out()
        return Contest(_ask(self._ports.learner, first, matured).verdicts, _ask(rival.judge, first, matured).verdicts)

    def _publish(self, decision: Decision, facts: Facts) -> int:
        ports, parent = self._ports, self._live
        # JSON has no word for an infinite PCOC
        gate = {name: number if math.isfinite(number) else None for name, number in decision.numbers.items()}
        manifest = {
            **facts(), "parent": parent, "created_ms": ports.clock.now_ms(), "gate": gate,
            LINEAGE: self._lineage, LEARNED: self._rows.learned,
        }  # fmt: skip
        version = ports.store.publish(lambda path, number: ports.learner.export(path, {**manifest, "version": number}))
        self.tally.versions_published += 1
        self.tally.version = version
        ports.metrics.inc(names.GATE, decision="promote", reason=decision.reason)
        ports.metrics.inc(names.VERSIONS_PUBLISHED)
        try:
            ports.store.prune(self._keep_versions, () if self._best is None else (self._best,))
        except (RecoverableError, OSError) as error:
            _log.warning("old versions stay", error=str(error))
        _log.info("version published", version=version, parent=parent, reason=decision.reason)
        return version

    def arrays(self) -> Arrays:
        """The recent rows, for a checkpoint."""
        return self._rows.arrays()

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return {"tally": asdict(self.tally), "best": self._best, LINEAGE: self._lineage}

    def restore(self, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `state` and `arrays` gave. A state without a lineage, of an older build, begins one here."""
        self.tally, self._best = PublishTally(**state["tally"]), state["best"]
        self._lineage = state.get(LINEAGE, self._lineage)
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
