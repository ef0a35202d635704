"""An ESMM in eval mode as plain weights: first layer split by source, batch norm folded in, both towers side by side.

Shapes: D input columns of one source, H first hidden width, K and L a later layer's input and output width. Tower 0 is
CTR, tower 1 is CVR.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from esmm.batch import Source
from esmm.features import SOURCES
from esmm.model import ESMM, Tower


class Activation(NamedTuple):
    """One hidden layer's activation: relu | sigmoid | linear, or prelu with a slope a tower."""

    kind: str
    slopes: tuple[float, float]


class Layer(NamedTuple):
    """A linear layer after the first, of both towers, and the activation behind it."""

    weight_2LK: Tensor
    bias_2L: Tensor
    activation: Activation


class Folded(NamedTuple):
    """Everything after the embeddings, float32. ``first`` maps x of one source to its part of both first layers."""

    first: dict[Source, Tensor]  # weight_DT, T = 2 * H: [CTR | CVR]
    bias_T: Tensor
    activation: Activation
    layers: list[Layer]
    final_2K: Tensor
    final_bias: float

    @property
    def width(self) -> int:
        """T, both towers' first hidden widths."""
        return len(self.bias_T)

    @property
    def context_2DH(self) -> Tensor:
        """The context's part of the first layer, a matrix a tower."""
        weight_DT = self.first["context"]
        return weight_DT.view(len(weight_DT), 2, self.width // 2).transpose(0, 1).contiguous()


@torch.no_grad()
def fold(model: ESMM) -> Folded:
    """The weights of ``model`` as eval mode uses them; copies, so later training does not reach them."""
    towers = (model.ctr_dnn, model.cvr_dnn)
    linears = [[_linear(tower, i) for tower in towers] for i in range(len(model.ctr_dnn.linears))]
    activations = [_activation(towers, i) for i in range(len(linears))]
    first_TD = torch.cat([weight for weight, _ in linears[0]])
    columns = {source: torch.from_numpy(model.input_columns(source)).to(first_TD.device) for source in SOURCES}
    return Folded(
        first={source: first_TD[:, at].T.contiguous() for source, at in columns.items()},
        bias_T=torch.cat([bias for _, bias in linears[0]]),
        activation=activations[0],
        layers=[
            Layer(torch.stack([w for w, _ in pair]), torch.stack([b for _, b in pair]), activation)
            for pair, activation in zip(linears[1:], activations[1:], strict=True)
        ],
        final_2K=torch.cat([model.ctr_dnn_final_layer.weight, model.cvr_dnn_final_layer.weight]).detach().clone(),
        final_bias=float(model.out.bias),
    )


def _linear(tower: Tower, i: int) -> tuple[Tensor, Tensor]:
    """Layer ``i`` of one tower, its batch norm folded in: in float64, so that one rounding is left."""
    linear = cast("nn.Linear", tower.linears[i])
    weight, bias = linear.weight.double(), linear.bias.double()
    if tower.bn is not None:
        bn = cast("nn.BatchNorm1d", tower.bn[i])
        mean, variance = cast("Tensor", bn.running_mean), cast("Tensor", bn.running_var)
        scale = bn.weight.double() / torch.sqrt(variance.double() + bn.eps)
        weight, bias = weight * scale[:, None], (bias - mean.double()) * scale + bn.bias.double()
    return weight.float(), bias.float()


def _activation(towers: tuple[Tower, Tower], i: int) -> Activation:
    modules = [tower.activation_layers[i] for tower in towers]
    kinds = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Identity: "linear", nn.PReLU: "prelu"}
    kind = kinds.get(type(modules[0]))
    if kind is None:
        raise ValueError(f"the fast predictor has no activation {type(modules[0]).__name__}; serve with PlainPredictor")
    slopes = [float(cast("Tensor", module.weight)) if kind == "prelu" else 0.0 for module in modules]
    return Activation(kind, (slopes[0], slopes[1]))
