"""The projector: a row's pooled encoder states into the decoder's embedding space."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# E[gelu(z)^2] for a standard normal z, by numerical integration.
GELU_SECOND_MOMENT = 0.42520


class Projector(nn.Module):
    """Maps pooled states (..., E_row) to decoder embeddings (..., D).

    The input is normalised without learned weights (the layer behind it would absorb them), and
    the weights are drawn so that the output has unit variance a dimension before the learned
    scale. The output therefore starts out as large as the decoder's own embeddings, whatever the
    encoder's scale is. The 2-layer MLP with hidden size D is REFRAG's (arXiv 2509.01092); its
    activation and normalisation are not given there.

    Args:
        input_size: E_row.
        output_size: D.
        kind: `mlp` or `linear`.
        scale: Initial standard deviation a dimension of the output.
    """

    def __init__(self, *, input_size: int, output_size: int, kind: str, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_size, elementwise_affine=False)
        self.layers = nn.Sequential()
        if kind == "mlp":
            self.layers.append(nn.Linear(input_size, output_size))
            self.layers.append(nn.GELU())
            self.layers.append(nn.Linear(output_size, output_size))
        else:
            self.layers.append(nn.Linear(input_size, output_size))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.reset_parameters(scale=scale)

    @torch.no_grad()
    def reset_parameters(self, *, scale: float) -> None:
        """Draws the weights anew; see the class for the distribution."""
        second_moment = 1.0
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1 / math.sqrt(second_moment * layer.in_features))
                nn.init.zeros_(layer.bias)
                second_moment = GELU_SECOND_MOMENT
        self.scale.fill_(scale)

    def forward(self, states: Tensor) -> Tensor:
        """Projects states (..., E_row) to (..., D) in the projector's own precision."""
        return self.layers(self.norm(states.to(self.scale.dtype))) * self.scale
