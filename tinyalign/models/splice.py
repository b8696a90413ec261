"""Putting tokens into a padded batch: image features over their placeholders, retrieval tokens after the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class SplicedBatch(NamedTuple):
    """A batch after the insertion of T tokens into every row.

    Shape:
        embeds: (B, S + T, D). companions: each (B, S + T, ...). inserted: (B, S + T), bool, True at the new tokens.
    """

    embeds: Tensor
    companions: dict[str, Tensor]
    inserted: Tensor


def splice_tokens(
    embeds: Tensor,
    tokens: Tensor,
    position: Tensor,
    companions: Mapping[str, tuple[Tensor, Tensor | float]] | None = None,
) -> SplicedBatch:
    """Insert T tokens into every row, each row at a place of its own, and extend what runs beside the tokens.

    Every row gets the same number, so that shapes are static and nothing is asked of the device; a row that has fewer
    says so in its mask. The old tokens keep their order and, to the last bit, their values. Use it in a VLM of your
    own: embed text and image as you do, then splice `RAGConnector`'s tokens in.

    Args:
        embeds: input embeddings.
        tokens: what to insert; cast to the dtype of `embeds`.
        position: index in each row before which the tokens go, 0 to S.
        companions: per-token tensors by name, each with what the new tokens get: a tensor (B, T, ...) or one value.
            The attention mask gets the tokens' mask, labels get -100, token types 0.

    Shape:
        embeds: (B, S, D). tokens: (B, T, D). position: (B,), int. returns: `SplicedBatch`.

    Raises:
        ValueError: sizes that do not fit, named with the tensor they belong to.

    Example:
        >>> embeds, tokens = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[9.0]]])
        >>> spliced = splice_tokens(embeds, tokens, torch.tensor([1]), {"labels": (torch.tensor([[5, 6]]), -100)})
        >>> spliced.embeds[..., 0].tolist(), spliced.companions["labels"].tolist()
        ([[1.0, 9.0, 2.0]], [[5, -100, 6]])
    """
    if embeds.dim() != 3 or tokens.dim() != 3 or tokens.shape[::2] != embeds.shape[::2]:
        raise ValueError(
            f"splice_tokens: tokens must have shape (B, T, D) beside embeds (B, S, D), got {tuple(tokens.shape)} and "
            f"{tuple(embeds.shape)}. Give every row the same number of tokens, in the width of the language model."
        )
    (B, S, _), T = embeds.shape, tokens.shape[1]
    if position.shape != (B,):
        raise ValueError(
            f"splice_tokens: position must have shape ({B},), got {tuple(position.shape)}. Give one index per row."
        )
    column = torch.arange(S + T, device=embeds.device)
    start = position.to(embeds.device)[:, None]
    inserted = (column >= start) & (column < start + T)
    # A row of [old tokens | new tokens] is read in the new order; whole rows of all samples at once are copied fastest.
    source = torch.where(column < start, column, torch.where(inserted, S + column - start, column - T))
    rows = (source + (S + T) * torch.arange(B, device=embeds.device)[:, None]).flatten()

    def read(old: Tensor, new: Tensor) -> Tensor:
        both = torch.cat([old, new], dim=1)
        return both.flatten(0, 1).index_select(0, rows).view(both.shape)

    extended = {}
    for name, (old, fill) in (companions or {}).items():
        if old.shape[:2] != (B, S):
            raise ValueError(
                f"splice_tokens: companion {name!r} must begin with shape ({B}, {S}), got {tuple(old.shape)}. "
                f"Pass only tensors with one entry per token."
            )
        new = fill if isinstance(fill, Tensor) else old.new_full((B, T, *old.shape[2:]), fill)
        if new.shape != (B, T, *old.shape[2:]):
            raise ValueError(
                f"splice_tokens: companion {name!r} must get entries of shape {(B, T, *old.shape[2:])} for the new "
                f"tokens, got {tuple(new.shape)}. Give one entry per inserted token, or one value for all."
            )
        extended[name] = read(old, new.to(old.dtype))
    return SplicedBatch(read(embeds, tokens.to(embeds.dtype)), extended, inserted)


def fill_placeholders(embeds: Tensor, is_placeholder: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Write tokens over the placeholders of each row, in order; `counts` says how many of them belong to which row.

    Rows are counted apart, so that a row with too few or too many placeholders cannot move the tokens of the next.

    Args:
        embeds: input embeddings; what stands at a placeholder does not matter.
        is_placeholder: where to write.
        tokens: the tokens of all rows, one row after another.
        counts: tokens of each row; must equal its number of placeholders (asserted without a device sync).

    Shape:
        embeds: (B, S, D). is_placeholder: (B, S), bool. tokens: (M, D). counts: (B,), int, summing to M.

    Raises:
        ValueError: on the CPU, a row whose placeholders and tokens differ in number; elsewhere a device assertion.

    Example:
        >>> hole = torch.tensor([[False, True]])
        >>> fill_placeholders(torch.zeros(1, 2, 1), hole, torch.tensor([[7.0]]), torch.tensor([1]))[..., 0]
        tensor([[0., 7.]])
    """
    found = is_placeholder.sum(dim=1)
    counts = counts.to(embeds.device)
    if embeds.device.type == "cpu":
        wrong = (found != counts).nonzero().flatten()
        if wrong.numel() or int(counts.sum()) != tokens.shape[0]:
            raise ValueError(_mismatch(found, counts, wrong, tokens.shape[0]))
    else:
        torch._assert_async(
            (found == counts).all() & (counts.sum() == tokens.shape[0]),
            "fill_placeholders: each row must hold as many placeholders as its images give tokens",
        )
    if tokens.shape[0] == 0:
        return embeds
    first = counts.cumsum(0) - counts
    index = first[:, None] + is_placeholder.cumsum(dim=1) - 1
    chosen = tokens[index.clamp(0, tokens.shape[0] - 1)].to(embeds.dtype)  # (B, S, D)
    return torch.where(is_placeholder[..., None], chosen, embeds)


def _mismatch(found: Tensor, counts: Tensor, wrong: Tensor, total: int) -> str:
    row = int(wrong[0]) if wrong.numel() else None
    got = (
        f"{int(found[row])} placeholders for {int(counts[row])} image tokens in row {row}"
        if row is not None
        else f"{total} image tokens where the rows count {int(counts.sum())}"
    )
    return (
        f"fill_placeholders: placeholders must match the image tokens row by row, got {got}. Let the processor expand "
        f"<image>, give image_counts, and do not cut rows inside an image."
    )


def insertion_points(attention_mask: Tensor, after: Tensor, starts_with_bos: Tensor | None = None) -> Tensor:
    """Say where a row's retrieval tokens go: behind its last image token, or at its start behind BOS.

    Args:
        attention_mask: True = keep; padding may stand on either side.
        after: True at the tokens to go behind (the image tokens).
        starts_with_bos: whether a row's first kept token is BOS.

    Shape:
        attention_mask, after: (B, S), bool. starts_with_bos: (B,), bool. returns: (B,), int64.

    Example:
        >>> keep = torch.tensor([[False, True, True, True]] * 2)
        >>> image = torch.tensor([[False, False, True, False], [False] * 4])
        >>> insertion_points(keep, image, torch.tensor([True, True])).tolist()
        [3, 2]
    """
    S = after.shape[1]
    column = torch.arange(1, S + 1, device=after.device)
    behind = (column * after).amax(dim=1) if S else after.new_zeros(after.shape[0], dtype=torch.long)
    first = attention_mask.to(torch.int8).argmax(dim=1)
    if starts_with_bos is not None:
        first = first + starts_with_bos.to(first.dtype)
    return torch.where(after.any(dim=1), behind, first)


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Number the kept tokens of each row from 0, whatever padding or gaps stand before them.

    Padding behind the last kept token goes on counting, so that a row without padding on its left and without gaps
    gets 0, 1, 2, ... throughout, as a language model would number it by itself.

    Shape:
        attention_mask: (B, S), bool. returns: (B, S), int64.

    Example:
        >>> position_ids_of(torch.tensor([[False, True, False, True, False]])).tolist()
        [[0, 0, 0, 1, 2]]
    """
    trailing = attention_mask.flip(1).cumsum(1).flip(1) == 0
    return ((attention_mask | trailing).cumsum(dim=1) - 1).clamp(min=0)
