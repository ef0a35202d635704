"""The streaming learner: predict a batch, then take one optimiser step on it.

For a guided tour: `esmm.delay` (what each row teaches), `esmm.loss`, `esmm.optim` (how weights move), `Learner.step`.
One thread at a time. On one compute thread every step is reproducible bit for bit, also across `save` and `restore`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmm.admission import Admission, AdmissionRule
from esmm.batch import Bool, Examples, FeatureBlock, Float32, StepStats
from esmm.delay import (
    DEFAULT,
    Beliefs,
    HeadTargets,
    Rows,
    Weights,
    fake_negative,
    head_targets,
    method_named,
    sample_classes,
    served_ctcvr,
)
from esmm.features import SOURCES
from esmm.graphs import as_tensor
from esmm.heads import FULL_WEIGHT_ROWS, HeadRule, Heads, Trust
from esmm.loss import entire_space_loss
from esmm.model import ESMM, Lookup, probabilities
from esmm.optim import DenseAdam, RowRule, Tables, Touched
from esmm.restart import read_state, refused, write_state
from esmm.sampling import NegativeSampler
from esmm.towers import HandTowers, Numbers, Part, Passed, Precision, StepRule, distinct

_ADMISSION = "admission."  # of tensors that a checkpoint has only when the rule was on
WriteVersion = Callable[[Path, ESMM, Mapping[str, Any]], object]


@dataclass(frozen=True)
class LearnerConfig:
    """How to learn. ``threads`` are torch's compute threads, for the whole process."""

    method: str = DEFAULT
    learning_rate: float = 1e-3
    l2_dense: float = 0.0
    embedding: RowRule = field(default_factory=RowRule)
    heads: HeadRule = field(default_factory=HeadRule)
    clip_norm: float = 10.0  # of the whole gradient, embeddings included
    precision: Precision = "float32"  # of the towers' matrix products
    by_hand: bool = True  # False: towers under autograd, the plain path, whatever the model
    admission: AdmissionRule = field(default_factory=AdmissionRule)
    negative_keep: float = 1.0  # share of the unclicked first emissions that is learned from, see `esmm.sampling`
    seed: int = 1024
    threads: int = 1


class Evaluator:
    """Scores examples with a model as it is, for progressive metrics and for the gate's candidate against live."""

    def __init__(self, model: ESMM, odds_correction: bool = False, chunk_rows: int = 8_192) -> None:
        """``odds_correction``: see `esmm.delay.served_ctcvr`; a manifest says it by ``"ctcvr_correction": "odds"``."""
        self._model, self._odds_correction, self._chunk_rows = model, odds_correction, chunk_rows

    def predict(self, examples: Examples) -> tuple[Float32, Float32]:
        """Give pCTR and pCTCVR (B,) of every row, in evaluation mode."""
        parts = [np.zeros((0, 2), np.float32)]
        training = self._model.training
        self._model.eval()
        try:
            with torch.inference_mode():
                for at in range(0, examples.rows, self._chunk_rows):
                    ids_BS, dense_BD = _inputs(self._model, examples, slice(at, at + self._chunk_rows))
                    parts.append(self._model.logits(ids_BS, dense_BD).numpy())
        finally:
            self._model.train(training)
        return self.served(torch.from_numpy(np.concatenate(parts)))

    def served(self, logits_B2: Tensor) -> tuple[Float32, Float32]:
        """Give pCTR and pCTCVR as they would be published."""
        p = probabilities(logits_B2.detach())
        ctr_B, ctcvr_B = p.ctr_B.numpy(), p.ctcvr_B.numpy()
        return ctr_B, served_ctcvr(ctr_B, ctcvr_B) if self._odds_correction else ctcvr_B


class _Forward(NamedTuple):
    """One batch through towers and heads under autograd, with what it will teach."""

    logits_B2: Tensor
    head_logits_B2: Tensor
    rows: Rows
    weights: Weights
    targets: HeadTargets
    loss: Tensor
    head_loss: Tensor


class Learner:
    """An ESMM, its delayed-feedback heads and their optimisers."""

    def __init__(self, model: ESMM, config: LearnerConfig, write_version: WriteVersion) -> None:
        """Take the model's parameters over (they become views of the optimisers' memory); it must be on the CPU.

        ``write_version`` is how `export` writes a version: `esmm.checkpoint.save_version`.
        Raises ValueError for an unknown method, or one that cannot do with the ``negative_keep`` asked for.
        """
        torch.set_num_threads(config.threads)
        self.model, self.config, self.steps = model, config, 0
        self.method = method_named(config.method)
        self.evaluator = Evaluator(model, self.method.odds_correction)
        self._sampler = NegativeSampler(config.negative_keep)
        if self.method.odds_correction and config.negative_keep < 1:
            raise ValueError(f"method {config.method!r} learns t / (1 + t), which does not go with negative_keep < 1")
        self._write_version = write_version
        self._tables = Tables(dict(model.embedding_dict.items()), config.embedding)
        self._admission = Admission(model, self._tables, config.admission)
        dense = [p for name, p in model.named_parameters() if not name.startswith("embedding_dict.")]
        self._adam = DenseAdam(dense, config.learning_rate, config.l2_dense)
        self._heads = Heads(model.input_dim, config.heads, config.seed)
        by_hand = config.by_hand and HandTowers.fit(model)
        self._hand = HandTowers(model, self._heads.linears, self.method, config.precision) if by_hand else None
        self._dropout = model.hyper["dnn_dropout"] > 0
        self._batch_norm = [buffer for name, buffer in model.named_buffers() if ".bn." in name]

    @property
    def fallback(self) -> bool:
        """Whether `fake_negative` weighs rows now, because the method's heads are cold or out of bounds."""
        return self.method.needs_heads and not self._heads.trusted

    def predict(self, examples: Examples) -> tuple[Float32, Float32]:
        """Give pCTR and pCTCVR of every row with the weights as they are."""
        return self.evaluator.predict(examples)

    def step(self, examples: Examples) -> StepStats:
        """Predict every row, then take one optimiser step, or none when the loss or its gradient is not finite.

        With ``negative_keep`` below 1 all rows are predicted still, so that metrics are of the world as it is; the
        loss and the first rows in what is returned are those of the rows that were learned from.
        """
        kept_B = self._sampler.kept(examples)
        learned = examples if kept_B is None else examples.take(np.flatnonzero(kept_B))
        apart = self._hand is None and (self._dropout or bool(self._batch_norm) or learned is not examples)
        before = self.predict(examples) if apart else None
        with self._undo_batch_norm() as undo:
            passed = self._by_hand(self._hand, learned) if self._hand is not None else self._by_autograd(learned)
            if before is None:
                before = self.evaluator.served(self._whole(passed.logits_B2, examples, kept_B))
            self._admission.see(examples)
            finite, numbers = self._learn(passed.numbers_N, self._admission.admitted(self._tables.collect()))
            if not finite:
                undo()
        self.steps += 1
        return StepStats(examples.rows, int(numbers.first), numbers.loss, *before, finite)

    def _whole(self, logits_B2: Tensor, examples: Examples, kept_B: Bool | None) -> Tensor:
        """Logits of all rows, those of the kept ones being known."""
        if kept_B is None or self._hand is None:
            return logits_B2
        dropped = examples.take(np.flatnonzero(~kept_B))
        with torch.no_grad():
            parts = self._parts(dropped, self.model.lookup)
        whole_B2, kept = torch.empty(examples.rows, 2), torch.from_numpy(kept_B)
        whole_B2[kept] = logits_B2
        whole_B2[~kept] = self._hand.logits(parts, dropped.rows)
        return whole_B2

    def _by_hand(self, hand: HandTowers, examples: Examples) -> Passed:
        """By hand down to the embeddings, which autograd takes from there."""
        parts = self._parts(examples, self._tables.lookup)
        rule = StepRule(self.fallback, self._sampler.shift, FULL_WEIGHT_ROWS)
        passed = hand.step(parts, examples, rule, (self._adam.grad_P, self._heads.adam.grad_P))
        pairs = [(part.x_UD, grad_UE) for part, grad_UE in zip(parts, passed.grads, strict=True) if grad_UE.shape[1]]
        if pairs:
            outputs = [x_UD[:, : grad_UE.shape[1]] for x_UD, grad_UE in pairs]
            torch.autograd.backward(outputs, [grad_UE for _, grad_UE in pairs])
        return passed

    def _parts(self, examples: Examples, lookup: Lookup) -> list[Part]:
        parts = []
        for source, block in zip(SOURCES, (examples.user, examples.item, examples.context), strict=True):
            unique, row_of_B = distinct(block)
            ids_US, dense_UD = as_tensor(unique.ids_NS), as_tensor(unique.dense_ND)
            parts.append(Part(self.model.embed_source(source, ids_US, dense_UD, lookup), row_of_B))
        return parts

    def _by_autograd(self, examples: Examples) -> Passed:
        """The plain path, and the only one of models that are not done by hand."""
        forward = self._forward(examples)
        self._adam.zero()
        self._heads.adam.zero()
        (forward.loss + forward.head_loss).backward()  # type: ignore[no-untyped-call]
        first_B, mask_B, targets = forward.rows.first_B, forward.targets.rn_mask_B, forward.targets
        numbers = (
            forward.loss.detach(),
            torch.linalg.vector_norm(self._adam.grad_P),
            torch.linalg.vector_norm(self._heads.adam.grad_P),
            (first_B + forward.weights.positive_B + forward.weights.negative_B).sum(),
            first_B.sum(),
            forward.head_loss.detach(),
            targets.dp_mask_B.sum(),
            mask_B.sum(),
            (torch.sigmoid(forward.head_logits_B2.detach()[:, 0]) * mask_B).sum(),
            (targets.rn_label_B * mask_B).sum(),
        )
        return Passed(forward.logits_B2, [], torch.stack(numbers))

    def _forward(self, examples: Examples) -> _Forward:
        columns = (examples.click_B, examples.conversion_B, examples.observed_B)
        rows = sample_classes(torch.tensor(examples.kind_B), *(torch.tensor(c, dtype=torch.float32) for c in columns))
        ids_BS, dense_BD = _inputs(self.model, examples, slice(None))
        x_BD = self.model.embed(ids_BS, dense_BD, self._tables.lookup)
        with self._own_randomness():
            logits_B2 = self.model.towers(x_BD)
        head_logits_B2 = self._head_logits(x_BD.detach(), rows)
        rn_B, dp_B = torch.sigmoid(head_logits_B2.detach()).unbind(1)
        beliefs = Beliefs(torch.sigmoid(logits_B2.detach()[:, 1]), rn_B, dp_B)
        weights = (fake_negative if self.fallback else self.method.weights)(rows, beliefs)
        targets = head_targets(rows)
        click_B = torch.tensor(examples.click_B, dtype=torch.float32)
        loss = entire_space_loss(self._sampler.shifted(logits_B2), click_B, rows.first_B, *weights)
        head_loss = self._heads.loss(head_logits_B2, targets)
        return _Forward(logits_B2, head_logits_B2, rows, weights, targets, loss, head_loss)

    def _head_logits(self, x_BD: Tensor, rows: Rows) -> Tensor:
        """Logits of [f_rn, f_dp] where the method or the heads' own loss asks for them, zero elsewhere."""
        logits_B2 = torch.zeros(len(rows.first_B), 2)
        if not self.method.needs_heads:
            return logits_B2
        used_B = rows.pending_B + rows.matured_B if not self.method.needs_dp else torch.ones(len(logits_B2))
        index_K = used_B.nonzero()[:, 0]
        return logits_B2.index_copy(0, index_K, self._heads(x_BD.index_select(0, index_K)))

    def _learn(self, numbers_N: Tensor, touched: Sequence[Touched]) -> tuple[bool, Numbers]:
        """Apply the gradients if all are finite; whether they were."""
        norms = [torch.linalg.vector_norm(one.grad_UE) for one in touched]
        known = (torch.cat([numbers_N, torch.stack(norms)]) if norms else numbers_N).tolist()
        numbers = Numbers(*known[: len(numbers_N)])
        norm = math.hypot(numbers.norm, *known[len(numbers_N) :])
        if not all(map(math.isfinite, known)):
            return False, numbers
        if numbers.weighted > 0:  # with nothing to learn from, Adam's momentum would still move the towers
            scale = self._clip(norm)
            self._adam.step(scale)
            for tables, rows_U, grad_UE in touched:
                tables.learn(rows_U, grad_UE, scale)
        if self.method.needs_heads and numbers.matured > 0:
            sums = (int(numbers.rn_rows), numbers.rn_predicted, numbers.rn_labelled)
            self._heads.learn(self._clip(numbers.head_norm), *sums)
        return True, numbers

    def _clip(self, norm: float) -> float:
        return 1.0 if norm <= self.config.clip_norm else self.config.clip_norm / norm

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Dropout drawn from the seed and the step's number, so that a restart draws the same."""
        if not self._dropout:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed + self.steps)
            yield

    @contextlib.contextmanager
    def _undo_batch_norm(self) -> Iterator[Callable[[], None]]:
        """Batch norm's running statistics move in the forward pass, before anyone knows that the step is refused."""
        saved = [buffer.clone() for buffer in self._batch_norm]

        def undo() -> None:
            for buffer, before in zip(self._batch_norm, saved, strict=True):
                buffer.copy_(before)

        yield undo

    def embedding_rows(self) -> dict[str, int]:
        """Embedding rows ``admitted`` and ``evicted`` so far, see `esmm.admission`; empty when its rule is off."""
        return self._admission.counts()

    def export(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        """Write ``model.safetensors`` and ``manifest.json`` (schema, hyper-parameters, sha256 and the given fields).

        The manifest also says the method, ``"ctcvr_correction"``: "odds" when a scorer must apply `served_ctcvr`, and
        which embedding rows are trained when not all are, with the numbers admitted and evicted so far.
        """
        correction = "odds" if self.method.odds_correction else "none"
        own = {"method": self.method.name, "ctcvr_correction": correction}
        self._write_version(directory, self.model, {**manifest, **own, **self._admission.facts()})

    def finite(self) -> bool:
        """Whether everything that `save` would write is: `restore` refuses what is not."""
        return all(bool(torch.isfinite(t).all()) for t in self._state().values() if t.is_floating_point())

    def save(self, directory: Path) -> None:
        """Write weights, optimiser and auxiliary state for an exact restart into an existing directory, fsynced."""
        write_state(directory, self._state(), self._numbers())

    def restore(self, directory: Path) -> None:
        """Read what `save` wrote; raises ValueError that says what is wrong, and then nothing was changed."""
        own, numbers = self._state(), self._numbers()
        saved, meta = read_state(directory, own, numbers, optional=_ADMISSION)
        for key in ("schema_hash", "embedding_optimiser", "odds_correction"):
            if meta[key] != numbers[key]:
                raise refused(directory, f"{key} is {meta[key]!r}, this learner has {numbers[key]!r}")
        self._admission.forget()
        for name, tensor in saved.items():
            own[name].copy_(tensor)
        self.steps, self._adam.steps, self._heads.adam.steps = meta["steps"], meta["dense_steps"], meta["head_steps"]
        self._heads.trust = Trust(meta["head_rows"], meta["head_predicted"], meta["head_labelled"])

    def _numbers(self) -> dict[str, Any]:
        """The counters of a restart, and what must be equal for its tensors to mean the same.

        The method may change between runs, but not what its t means.
        """
        trust = self._heads.trust
        return {
            "schema_hash": self.model.schema.hash,
            "embedding_optimiser": self.config.embedding.optimiser,
            "odds_correction": self.method.odds_correction,
            "steps": self.steps,
            "dense_steps": self._adam.steps,
            "head_steps": self._heads.adam.steps,
            "head_rows": trust.rows,
            "head_predicted": trust.predicted,
            "head_labelled": trust.labelled,
        }

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that a restart needs, by name; views, not copies."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "heads": self._heads.state_dict(),
            "adam": self._adam.state(),
            "head_adam": self._heads.adam.state(),
            "tables": self._tables.state(),
            "admission": self._admission.state(),
        }
        return {f"{part}.{name}": tensor.detach() for part, named in parts.items() for name, tensor in named.items()}


def _inputs(model: ESMM, examples: Examples, rows: slice) -> tuple[Tensor, Tensor]:
    """ids_BS and dense_BD of some rows."""
    blocks = (examples.user, examples.item, examples.context)
    ids_BS, dense_BD = model.schema.pack(*(FeatureBlock(b.ids_NS[rows], b.dense_ND[rows]) for b in blocks))
    return torch.from_numpy(ids_BS), torch.from_numpy(dense_BD)
