"""One Perceiver layer: attention to inputs or to itself, then a two-layer MLP, both residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyalign._attention import AttentionSpec, PackedTokens, attend, attend_packed, compute_dtype, packs, padded_width


class PerceiverLayer(nn.Module):
    """Pre-norm attention and MLP over latents, with Hugging Face's exact maths.

    With `input_dim` the keys and values are read from inputs (cross-attention); without it, from the latents
    themselves. The residual adds to the latents before their norm. The MLP keeps the width (widening factor 1) and
    uses the exact GELU.

    Args:
        latent_dim: width of the latents.
        qk_channels: width of queries and keys over all heads.
        v_channels: width of values over all heads.
        num_heads: attention heads.
        input_dim: width of the inputs of a cross-attention; None for self-attention.
        device: where the weights live.
        dtype: dtype of the weights.

    Shape:
        latents: (B, L, latent_dim) or, in a cross-attention, (1, L, latent_dim). inputs: (B, S, input_dim), or packed.
        keep: (B, S), bool; what it hides may be NaN. returns: (B, L, latent_dim).

    Raises:
        ValueError: a width that the heads do not divide.

    Source:
        Jaegle et al., 2022, arXiv 2107.14795, section 3.1; details as in transformers' ``PerceiverLayer``.

    Example:
        >>> import torch
        >>> layer = PerceiverLayer(16, qk_channels=16, v_channels=16, num_heads=4, input_dim=8)
        >>> layer(torch.zeros(2, 5, 16), torch.zeros(2, 9, 8)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        qk_channels: int,
        v_channels: int,
        num_heads: int,
        input_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, width in (("qk_channels", qk_channels), ("v_channels", v_channels)):
            if num_heads < 1 or width < 1 or width % num_heads:
                raise ValueError(
                    f"PerceiverLayer: {name} must be a positive multiple of num_heads, got {width} and {num_heads}. "
                    "Choose a width that the heads divide."
                )
        self.num_heads = num_heads
        self.qk_dim = qk_channels // num_heads
        self.v_dim = v_channels // num_heads
        source_dim = latent_dim if input_dim is None else input_dim
        self.latent_norm = nn.LayerNorm(latent_dim, device=device, dtype=dtype)
        self.input_norm = None if input_dim is None else nn.LayerNorm(input_dim, device=device, dtype=dtype)
        self.query = nn.Linear(latent_dim, qk_channels, device=device, dtype=dtype)
        self.key = nn.Linear(source_dim, qk_channels, device=device, dtype=dtype)
        self.value = nn.Linear(source_dim, v_channels, device=device, dtype=dtype)
        self.output = nn.Linear(v_channels, latent_dim, device=device, dtype=dtype)
        self.mlp_norm = nn.LayerNorm(latent_dim, device=device, dtype=dtype)
        self.mlp_in = nn.Linear(latent_dim, latent_dim, device=device, dtype=dtype)
        self.mlp_out = nn.Linear(latent_dim, latent_dim, device=device, dtype=dtype)

    def forward(
        self, latents: Tensor, inputs: Tensor | PackedTokens | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Update the latents from the inputs (cross-attention) or from themselves."""
        normed = self.latent_norm(latents)
        tokens = inputs.tokens if isinstance(inputs, PackedTokens) else inputs
        # Attention weighs a masked token with zero, and zero times NaN is NaN. The way back multiplies by the tokens
        # themselves, which are long; without it, blank keys and values are enough.
        if keep is not None and tokens is not None and torch.is_grad_enabled():
            tokens = tokens.masked_fill(~keep.unsqueeze(-1), 0.0)
        source = normed if self.input_norm is None or tokens is None else self.input_norm(tokens)
        qk_dim, v_dim = self._run_width(self.qk_dim, source), self._run_width(self.v_dim, source)
        q = split_heads(_project(self.query, normed, self.num_heads, qk_dim), self.num_heads)
        k = _project(self.key, source, self.num_heads, qk_dim)
        v = _project(self.value, source, self.num_heads, v_dim)
        if keep is not None and not torch.is_grad_enabled():
            k, v = (projected.masked_fill(~keep.unsqueeze(-1), 0.0) for projected in (k, v))
        scale = self.qk_dim**-0.5
        if isinstance(inputs, PackedTokens):
            k, v = k.reshape(k.shape[0], self.num_heads, qk_dim), v.reshape(v.shape[0], self.num_heads, v_dim)
            return self.absorb(latents, attend_packed(q, k, v, inputs, scale=scale))
        k, v = split_heads(k, self.num_heads), split_heads(v, self.num_heads)
        return self.absorb(latents, attend(q, k, v, keep=keep, scale=scale))

    def packs(self, inputs: Tensor) -> bool:
        """Whether ragged rows of such inputs are worth packing: whether a kernel would run them without padding."""
        widths = self._run_width(self.qk_dim, inputs), self._run_width(self.v_dim, inputs)
        return packs(AttentionSpec(inputs.device.type, compute_dtype(inputs), *widths, "packed"))

    def absorb(self, latents: Tensor, mixed: Tensor) -> Tensor:
        """What follows the attention: output projection, residual, MLP, residual. mixed: (B, H, L, head width)."""
        merged = mixed.transpose(1, 2).flatten(2)  # (B, L, H * head width)
        weight, v_dim = self.output.weight, mixed.shape[3]
        if v_dim != self.v_dim:
            by_head = weight.reshape(-1, self.num_heads, self.v_dim)
            weight = F.pad(by_head, (0, v_dim - self.v_dim)).flatten(1)
        latents = latents + F.linear(merged, weight, self.output.bias)
        update: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(latents))))
        return latents + update

    @staticmethod
    def _run_width(width: int, source: Tensor) -> int:
        """Head width to compute with: 16-bit CUDA kernels take multiples of eight only, and zero channels are free."""
        return padded_width(width, source.device.type, compute_dtype(source))


def _project(linear: nn.Linear, tokens: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Apply the projection with zero rows added to each head up to `head_dim`: scores and sums stay the same."""
    own_dim = linear.out_features // num_heads
    if head_dim == own_dim:
        return linear(tokens)  # type: ignore[no-any-return]
    missing = head_dim - own_dim
    weight = F.pad(linear.weight.reshape(num_heads, own_dim, -1), (0, 0, 0, missing)).flatten(0, 1)
    bias = F.pad(linear.bias.reshape(num_heads, own_dim), (0, missing)).flatten()
    return F.linear(tokens, weight, bias)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, S, H * d) to (B, H, S, d)."""
    batch, length, width = tokens.shape
    return tokens.reshape(batch, length, num_heads, width // num_heads).transpose(1, 2)
