"""Drawing weights so that one seed gives one set of numbers, whatever the device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def draw_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with normal numbers, drawn on the CPU in float32 and then copied."""
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).normal_(std=std, generator=generator))


def draw_linears(module: nn.Module, std: float, generator: torch.Generator | None) -> None:
    """Draw every linear layer inside, biases zero, and put every norm at its identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            draw_normal(part.weight, std, generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
