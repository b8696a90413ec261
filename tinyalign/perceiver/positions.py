"""Fixed sinusoidal positions: any length, no table to run out of."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sine and cosine of every position at geometrically spaced frequencies, in float32.

    Args:
        positions: positions, whole or not.
        width: channels; the first half are sines, the rest cosines.

    Shape:
        positions: any. returns: the same with one more axis of size `width`.

    Source:
        Vaswani et al., 2017, arXiv 1706.03762, section 3.5 (sines and cosines in two halves instead of interleaved).

    Example:
        >>> sinusoids(torch.arange(3), 4)[0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    half = (width + 1) // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32)
    angles = positions.to(torch.float32).unsqueeze(-1) * torch.exp(steps * (-9.210340371976184 / half))  # ln 10,000
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :width]
