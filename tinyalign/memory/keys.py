"""The paper's parameter-free key: attention over frozen features, then the mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class AttentionPooledKey(nn.Module):
    """Pool image and text features into one key by self-attention without weights (the paper's section 4.2).

    Rows of both modalities are brought to unit length, weighted by ``alpha`` (image) and ``1 - alpha`` (text) and
    joined to F; the key is the mean over queries of ``softmax(scale * F F^T) F``. Only the mean of the attention
    weights over queries is needed, ``w = mean_q softmax(scale * F F^T)_q``, and then ``w F``: half the work of
    attention, and in chunks of queries no (S, S) matrix. A sample without text has no weights. On a CPU all is computed
    in float64: how products are rounded depends on the shape of a batch, and that must not show in a key.

    Args:
        alpha: weight of the image's rows.
        scale: factor of the logits. With unit rows the paper's 1 leaves them within 0.36, so that the result is nearly
            the plain mean; larger values attend more sharply.
        balance: give each modality an equal say however many tokens it has.

    Shape:
        image_features: (B, N, D). text_features: (B, T, D). masks: (B, N), (B, T) bool. returns: (B, D), dtype of the
        image features.

    Raises:
        ValueError: a size does not fit, ``alpha`` is outside [0, 1], or ``scale`` is not finite.

    Source: the paper, section 4.2. Deviations: masks, ``scale`` and ``balance``; the defaults equal the paper.

    Example:
        >>> key = AttentionPooledKey(alpha=0.4)
        >>> tuple(key(torch.randn(2, 5, 8), torch.randn(2, 3, 8)).shape)
        (2, 8)
    """

    CHUNK = 128  # queries whose weights are held at once

    def __init__(self, alpha: float = 0.4, *, scale: float = 1.0, balance: bool = False) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"AttentionPooledKey: alpha must be within [0, 1], got {alpha}. The paper uses 0.4.")
        if not math.isfinite(scale):
            raise ValueError(f"AttentionPooledKey: scale must be a finite number, got {scale}. The paper uses 1.")
        self.alpha, self.scale, self.balance = float(alpha), float(scale), bool(balance)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"alpha={self.alpha}, scale={self.scale}, balance={self.balance}"

    def fingerprint(self) -> dict[str, str | float | bool]:
        """Return the fields that a bank made with this key carries."""
        return {
            "key.pooling": "attention",
            "key.alpha": self.alpha,
            "key.scale": self.scale,
            "key.balance": self.balance,
        }

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Return one key per sample; samples do not influence one another, and padding nothing."""
        _check(image_features, image_mask, None, "image")
        features, keep = _rows(image_features, image_mask)
        share = _share(keep, features)
        if text_features is not None:
            _check(text_features, text_mask, image_features, "text")
            text, text_keep = _rows(text_features, text_mask)
            told = text_keep.any(1)[:, None, None]
            features = torch.cat([torch.where(told, features * self.alpha, features), text * (1 - self.alpha)], 1)
            keep = torch.cat([keep, text_keep], 1)
            share = torch.cat([share, _share(text_keep, text)], 1)
        weights = share if self.balance else keep.to(features.dtype)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return self._pool(features, keep, weights).to(image_features.dtype)

    def _pool(self, features: Tensor, keep: Tensor, weights: Tensor) -> Tensor:
        bias = torch.zeros_like(weights).masked_fill(~keep, torch.finfo(weights.dtype).min)
        if self.balance:
            bias = bias + weights.clamp_min(torch.finfo(weights.dtype).tiny).log() * keep
        columns = torch.zeros_like(weights)  # (B, S): how much each row is attended to
        for at in range(0, features.shape[1], self.CHUNK):
            logits = self.scale * features[:, at : at + self.CHUNK] @ features.transpose(1, 2)
            attention = torch.softmax(logits + bias[:, None], dim=-1)
            columns = columns + (weights[:, at : at + self.CHUNK, None] * attention).sum(1)
        return (columns[:, None] @ features).squeeze(1)


def _rows(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return rows of unit length, zero where they are left out, and which are kept."""
    wide = torch.float64 if features.device.type == "cpu" else torch.promote_types(features.dtype, torch.float32)
    rows = nn.functional.normalize(features.to(wide), dim=-1)
    if mask is None:
        return rows, torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    return rows.masked_fill(~mask[..., None], 0.0), mask


def _share(keep: Tensor, rows: Tensor) -> Tensor:
    return keep.to(rows.dtype) / keep.sum(1, keepdim=True).clamp_min(1)


def _check(features: Tensor, mask: Tensor | None, image: Tensor | None, name: str) -> None:
    where = "AttentionPooledKey.forward"
    if features.ndim != 3 or not features.is_floating_point():
        raise ValueError(
            f"{where}: {name}_features must be float (B, S, D), got {features.dtype} {tuple(features.shape)}. "
            "Pass the tower's tokens, one row per sample."
        )
    if image is not None and (features.shape[0] != image.shape[0] or features.shape[2] != image.shape[2]):
        raise ValueError(
            f"{where}: text_features must match the image's batch and width {(image.shape[0], image.shape[2])}, "
            f"got {tuple(features.shape)}. Use a text encoder of the same width, or the image alone."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != features.shape[:2]):
        raise ValueError(
            f"{where}: {name}_mask must be bool of shape {tuple(features.shape[:2])}, got {mask.dtype} "
            f"{tuple(mask.shape)}. True keeps a token."
        )
