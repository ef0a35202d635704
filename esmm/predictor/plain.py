"""The oracle: every row packed, `ESMM.logits`, nothing split, cached or overlapped."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from esmm.batch import Float32, RankBatch, Scores
from esmm.model import ESMM, probabilities
from esmm.predictor.config import Pending


class PlainPredictor:
    """One model version, scored row by row on the caller's thread; on the device the model is on."""

    def __init__(self, model: ESMM, version: int) -> None:
        """Take over ``model`` and put it into eval mode."""
        self._model = model.eval()
        self._version = version

    @property
    def version(self) -> int:
        """The model version."""
        return self._version

    def launch(self, batch: RankBatch) -> Pending:
        """Compute at once; what goes wrong is raised by `collect`."""
        future: Future[Scores] = Future()
        try:
            future.set_result(scores_of(self.logits(batch), self._version))
        except Exception as error:  # noqa: BLE001  as on the fast path: raised where the result is asked for
            future.set_exception(error)
        return Pending(batch.rows, future)

    def collect(self, pending: Pending) -> Scores:
        """The scores of a launched batch, in its row order."""
        return pending.future.result()

    def close(self) -> None:
        """Nothing to release."""

    def logits(self, batch: RankBatch) -> Float32:
        """logits_B2 of every row, by the model as it is."""
        user, item = batch.user.take(batch.user_of_B), batch.item.take(batch.item_of_B)
        ids_BS, dense_BD = self._model.schema.pack(user, item, batch.context)
        device = self._model.out.bias.device
        with torch.inference_mode():
            logits_B2: Tensor = self._model.logits(
                torch.from_numpy(ids_BS).to(device), torch.from_numpy(dense_BD).to(device)
            )
        return np.asarray(logits_B2.cpu().numpy(), np.float32)


def scores_of(logits_B2: Float32, version: int) -> Scores:
    """Float32 logits -> the three probabilities; 0 <= ctcvr <= ctr <= 1 holds by float32's own rounding."""
    p = probabilities(torch.from_numpy(logits_B2))
    return Scores(p.ctr_B.numpy(), p.cvr_B.numpy(), p.ctcvr_B.numpy(), version)
