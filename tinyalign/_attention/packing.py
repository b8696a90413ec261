"""Ragged rows without their padding: the kept tokens of all rows end to end, and where each row begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class PackedTokens(NamedTuple):
    """Kept tokens of all rows, one after the other.

    `tokens` is (total, C); `keep` (B, T) tells where they came from; `starts` (B + 1,) int32 holds the first index of
    each row and the total; `lengths` are the same as Python numbers. No row is empty: one without a kept token holds
    its first, and `empty` (B,) marks it, so that its result can be blanked.
    """

    tokens: Tensor
    keep: Tensor
    starts: Tensor
    lengths: list[int]
    empty: Tensor


def pack(tokens: Tensor, keep: Tensor) -> PackedTokens:
    """Drop the padding. Waits for the device once, to learn the lengths.

    Shape:
        tokens: (B, T, C) with T of at least 1. keep: (B, T), bool.

    Example:
        >>> import torch
        >>> packed = pack(torch.arange(6.0).view(2, 3, 1), torch.tensor([[True, True, False], [False, False, True]]))
        >>> packed.tokens.flatten().tolist(), packed.starts.tolist()
        ([0.0, 1.0, 5.0], [0, 2, 3])
    """
    empty = ~keep.any(dim=1)
    first = torch.arange(keep.shape[1], device=keep.device) == 0
    keep = keep | (empty[:, None] & first)
    counts = keep.sum(dim=1)
    starts = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    lengths: list[int] = counts.tolist()
    kept_first = (~keep).flatten().byte().argsort(stable=True)  # a boolean index would wait once more
    return PackedTokens(tokens.flatten(0, 1)[kept_first[: sum(lengths)]], keep, starts, lengths, empty)


def unpack(tokens: Tensor, keep: Tensor) -> Tensor:
    """(total, H, d) back to (B, H, T, d), zeros where nothing was kept."""
    rows = tokens.new_zeros(*keep.shape, *tokens.shape[1:])
    return rows.masked_scatter(keep[:, :, None, None], tokens).transpose(1, 2)
