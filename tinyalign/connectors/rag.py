"""The connector of the retrieval branch: latents of retrieved items become tokens of the language model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyalign._attention import attend
from tinyalign._checks import check_last_dim, check_mask, check_positive
from tinyalign.connectors.mlp import MLPConnector


class RAGTokens(NamedTuple):
    """Retrieval tokens H_R and which of them stand for an item that was found.

    Shape:
        tokens: (B, T, output_dim), float; zeros where the mask is False. mask: (B, T), bool, True = keep.
    """

    tokens: Tensor
    mask: Tensor


class RAGConnector(nn.Module):
    """Turn the latents of K retrieved items into T tokens of the language model's width.

    As in the paper each latent becomes one token, T = K * L. Latents are first brought to zero mean and unit variance
    (no weights), because a Perceiver ends without a norm and the scale of a bank is its own. With ``num_tokens`` the
    latents are pooled by learned queries to a fixed budget, so that the cost no longer grows with K.

    Args:
        latent_dim: width of a latent in the memory bank.
        output_dim: width of the language model's embeddings.
        depth: linear layers of the MLP.
        num_tokens: fixed budget T; None keeps all K * L.
        gate: weigh each item by ``2 * sigmoid(slope * score + offset)``; it starts at 1, where nothing is changed.
        num_ranks: largest K; adds a learned vector per rank, which starts at zero. None for no such vector.
        device: where the weights live.
        dtype: of the weights.

    Shape:
        latents: (B, K, L, latent_dim), float. mask: (B, K), bool. scores: (B, K), float.
        returns: `RAGTokens`, (B, T, output_dim) and (B, T).

    Raises:
        ValueError: wrong rank or width, K beyond `num_ranks`, or no scores for a gated connector.
        TypeError: a mask that is not boolean.

    Source:
        TinyAlign, section 4.1 and Figure 1. Pooling after Jaegle et al. 2021, arXiv 2103.03206. Additions: the
        normalisation, the gate and the rank vector.

    Example:
        >>> connector = RAGConnector(96, 64)
        >>> found = torch.tensor([[True, True, False]])
        >>> tokens, mask = connector(torch.randn(1, 3, 32, 96), found)
        >>> tokens.shape, int(mask.sum())
        (torch.Size([1, 96, 64]), 64)
    """

    def __init__(
        self,
        latent_dim: int,
        output_dim: int,
        depth: int = 2,
        num_tokens: int | None = None,
        *,
        gate: bool = False,
        num_ranks: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_tokens", num_tokens), ("num_ranks", num_ranks)):
            if value is not None:
                check_positive("RAGConnector", name, value)
        self.mlp = MLPConnector(latent_dim, output_dim, depth=depth, device=device, dtype=dtype)
        self.latent_dim, self.output_dim, self.num_tokens, self.num_ranks = (
            latent_dim,
            output_dim,
            num_tokens,
            num_ranks,
        )
        self.pool = None if num_tokens is None else _LatentPool(latent_dim, num_tokens, device=device, dtype=dtype)
        self.gate = nn.Parameter(torch.zeros(2, device=device, dtype=dtype)) if gate else None
        self.rank = (
            None if num_ranks is None else nn.Parameter(torch.zeros(num_ranks, latent_dim, device=device, dtype=dtype))
        )

    def tokens_for(self, num_items: int, num_latents: int) -> int:
        """How many tokens K items of L latents become: K * L, or the budget.

        Example:
            >>> RAGConnector(96, 64).tokens_for(5, 32), RAGConnector(96, 64, num_tokens=8).tokens_for(5, 32)
            (160, 8)
        """
        return num_items * num_latents if self.num_tokens is None else self.num_tokens

    def forward(self, latents: Tensor, mask: Tensor | None = None, scores: Tensor | None = None) -> RAGTokens:
        """Map (B, K, L, latent_dim) to (B, T, output_dim) with its mask."""
        check_last_dim("RAGConnector.forward", "latents", latents, self.latent_dim, "(B, K, L, latent_dim)")
        B, K, L, _ = latents.shape
        if mask is None:
            mask = latents.new_ones((B, K), dtype=torch.bool)
        check_mask("RAGConnector.forward", "mask", mask, (B, K))
        if self.rank is not None and self.rank.shape[0] < K:
            raise ValueError(
                f"RAGConnector.forward: latents must hold at most num_ranks={self.rank.shape[0]} items, got {K}. "
                f"Retrieve fewer, or build the connector with a larger num_ranks."
            )
        latents = latents.masked_fill(~mask[:, :, None, None], 0.0).to(self.mlp.weight_dtype)
        latents = F.layer_norm(latents, (self.latent_dim,))
        if self.rank is not None:
            latents = latents + self.rank[:K, None]
        latents = latents.flatten(1, 2)  # (B, K, L, D) -> (B, K*L, D)
        keep = mask.repeat_interleave(L, dim=1)
        weight = self._weight(mask, scores)
        if self.pool is not None:
            per_latent = None if weight is None else weight.repeat_interleave(L, dim=1)
            tokens = self.mlp(self.pool(latents, keep, per_latent))
            keep = mask.any(dim=1, keepdim=True).expand(B, tokens.shape[1])
        else:
            tokens = self.mlp(latents)
            if weight is not None:
                tokens = tokens * weight.repeat_interleave(L, dim=1)[..., None]
        return RAGTokens(tokens.masked_fill(~keep[..., None], 0.0), keep)

    def _weight(self, mask: Tensor, scores: Tensor | None) -> Tensor | None:
        if self.gate is None:
            return None
        if scores is None or scores.shape != mask.shape:
            raise ValueError(
                f"RAGConnector.forward: scores must have shape {tuple(mask.shape)} for a gated connector, got "
                f"{None if scores is None else tuple(scores.shape)}. Pass hits.scores, or build it with gate=False."
            )
        clean = scores.to(self.gate.dtype).masked_fill(~mask, 0.0)
        return 2.0 * torch.sigmoid(self.gate[0] * clean + self.gate[1])


class _LatentPool(nn.Module):
    """Learned queries read any number of latents into a fixed number; a row without latents reads zeros."""

    def __init__(
        self, width: int, num_tokens: int, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_tokens, width, device=device, dtype=dtype) * width**-0.5)
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.key = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(width, width, device=device, dtype=dtype)

    def forward(self, latents: Tensor, keep: Tensor, weight: Tensor | None) -> Tensor:
        normed = self.norm(latents)
        value = self.value(normed)
        if weight is not None:
            value = value * weight[..., None]
        # One head: (1, 1, T, D) queries, (B, 1, K*L, D) keys and values.
        pooled = attend(self.queries[None, None], self.key(normed)[:, None], value[:, None], keep=keep)
        return pooled.squeeze(1)
