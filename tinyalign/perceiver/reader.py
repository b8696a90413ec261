"""The light decoder that asks the latents what stood at a position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyalign.perceiver.layers import PerceiverLayer
from tinyalign.perceiver.positions import sinusoids
from tinyalign.perceiver.weights import draw_linears


class LatentReader(nn.Module):
    """One query per position reads the latents in a single cross-attention and predicts what stood there.

    It is kept light so that the latents, not the decoder, have to know.

    Args:
        latent_dim: width of the latents.
        output_dim: width of the prediction.
        hidden_dim: width of the queries.
        num_heads: attention heads.
        device: where the weights live.
        dtype: dtype of the weights.

    Shape:
        latents: (B, L, latent_dim). positions: (B, P) or (1, P), long. returns: (B, P, output_dim).

    Source:
        Jaegle et al., 2022, arXiv 2107.14795, section 3.2.

    Example:
        >>> import torch
        >>> reader = LatentReader(8, 5, hidden_dim=16, num_heads=2)
        >>> reader(torch.zeros(2, 4, 8), torch.arange(3)[None]).shape
        torch.Size([2, 3, 5])
    """

    def __init__(
        self,
        latent_dim: int,
        output_dim: int,
        *,
        hidden_dim: int = 128,
        num_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.read = PerceiverLayer(
            hidden_dim,
            qk_channels=hidden_dim,
            v_channels=hidden_dim,
            num_heads=num_heads,
            input_dim=latent_dim,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(hidden_dim, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_dim, output_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew."""
        draw_linears(self, self.hidden_dim**-0.5, generator)

    def forward(self, latents: Tensor, positions: Tensor) -> Tensor:
        """Predict what stood at each position."""
        queries = sinusoids(positions, self.hidden_dim).to(latents.dtype)
        predicted: Tensor = self.output(self.norm(self.read(queries, latents)))
        return predicted
