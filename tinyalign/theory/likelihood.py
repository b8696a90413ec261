"""Negative log-likelihood of target tokens in float32, without a float32 copy of the whole vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IGNORED", "SequenceNLL", "log_normalizer", "sequence_nll"]

IGNORED = -100


class SequenceNLL(NamedTuple):
    """Per-row sums of the targets' negative log-likelihood and their counts."""

    nll: Tensor
    tokens: Tensor


def log_normalizer(logits: Tensor, *, chunk: int = 16384) -> Tensor:
    """Compute log-sum-exp over the last axis in float32 (float64 for float64 input), chunk by chunk.

    Args:
        logits: unnormalised log-probabilities of any float dtype.
        chunk: number of vocabulary entries that are converted at a time.

    Shape:
        logits: (..., V). returns: (...).

    Example:
        >>> log_normalizer(torch.zeros(2, 4)).exp().tolist()
        [4.0, 4.0]
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    total = torch.full(logits.shape[:-1], -torch.inf, dtype=wide, device=logits.device)
    for part in torch.split(logits, chunk, dim=-1):
        total = torch.logaddexp(total, part.to(wide).logsumexp(dim=-1))
    return total


def sequence_nll(logits: Tensor, labels: Tensor, *, shift: bool = True, chunk: int = 16384) -> SequenceNLL:
    """Sum each row's negative log-likelihood over its supervised tokens.

    Args:
        logits: next-token logits.
        labels: target ids, -100 where nothing is supervised.
        shift: whether logits at position t predict the label at t + 1, as causal language models return them.
        chunk: vocabulary entries per float32 chunk.

    Shape:
        logits: (B, T, V). labels: (B, T), long. returns: (B,) float32 and (B,) long.

    Units:
        nats.

    Raises:
        ValueError: the shapes disagree.

    Example:
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]])
        >>> result = sequence_nll(logits, labels)
        >>> round(result.nll.item(), 4), result.tokens.item()
        (2.7726, 2)
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"sequence_nll: labels must have shape (B, T) of logits (B, T, V), got {tuple(labels.shape)} and "
            f"{tuple(logits.shape)}. Pass the labels that the model aligned with its logits."
        )
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    picked = logits[rows, columns]
    target = picked.gather(-1, labels[rows, columns].unsqueeze(-1)).squeeze(-1)
    normalizer = log_normalizer(picked, chunk=chunk)
    per_token = normalizer - target.to(normalizer.dtype)
    total = torch.zeros(labels.shape[0], dtype=normalizer.dtype, device=logits.device)
    return SequenceNLL(total.index_add(0, rows, per_token), (labels != IGNORED).sum(dim=1))
