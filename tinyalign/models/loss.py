"""Cross-entropy on the supervised positions alone: the head never sees the other rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK = 1024


class LabelledRows(NamedTuple):
    """The positions whose next token is supervised, gathered to the front of each row.

    Shape:
        positions: (B, M), int64, in the sequence. targets: (B, M), int64, -100 where a row has fewer than M.
    """

    positions: Tensor
    targets: Tensor


def labelled_rows(labels: Tensor, max_supervised_tokens: int | None = None) -> LabelledRows:
    """Find the positions that predict a supervised token.

    Args:
        labels: token ids, -100 where nothing is to be learned; position t is predicted from t - 1.
        max_supervised_tokens: the most supervised tokens that any row has. Without it the CPU counts them and another
            device keeps every position, so that it is never waited for.

    Shape:
        labels: (B, S), int64. returns: `LabelledRows`.

    Raises:
        ValueError: on the CPU, a row with more supervised tokens than `max_supervised_tokens`.

    Example:
        >>> labelled_rows(torch.tensor([[-100, 7, -100, 8], [-100, -100, 9, -100]]))
        LabelledRows(positions=tensor([[0, 2],
            [1, 0]]), targets=tensor([[   7,    8],
            [   9, -100]]))
    """
    targets = labels[:, 1:]
    known = targets != IGNORE_INDEX
    width = targets.shape[1]
    if labels.device.type == "cpu":
        most = int(known.sum(dim=1).max()) if known.numel() else 0
        if max_supervised_tokens is not None and most > max_supervised_tokens:
            raise ValueError(
                f"labelled_rows: max_supervised_tokens must cover every row, got {max_supervised_tokens} where a row "
                f"has {most} supervised tokens. Take it from the collator, or leave it out."
            )
        width = most
    elif max_supervised_tokens is not None:
        width = min(width, max_supervised_tokens)
    order = torch.argsort((~known).to(torch.int8), dim=1, stable=True)[:, :width]
    return LabelledRows(order, targets.gather(1, order))


@contextmanager
def rows_before_head(head: nn.Module | None, index: Tensor) -> Iterator[bool]:
    """Let the language model's own head see the chosen positions only; yields whether it will.

    What the model does to its logits afterwards (soft caps, scales) is elementwise and still applies, which is why the
    selection stands in front of the head instead of replacing it.

    Shape:
        index: (B, M), int64.
    """
    if head is None:
        yield False
        return

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield True
    finally:
        handle.remove()


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood per token, in float32 whatever the logits are, zero where the target is -100.

    Works through the rows in chunks that are computed again in the backward pass, so that no float32 copy of all
    logits is ever held.

    Units:
        nats.

    Shape:
        logits: (B, M, V), float. targets: (B, M), int64. returns: (B, M), float32.

    Example:
        >>> token_nll(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor([[1.3863, 0.0000]])
    """
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    pieces = []
    for rows, row_targets in zip(torch.split(flat, CHUNK), torch.split(wanted, CHUNK), strict=True):
        if flat.shape[0] > CHUNK and torch.is_grad_enabled() and logits.requires_grad:
            pieces.append(checkpoint(_nll, rows, row_targets, use_reentrant=False))
        else:
            pieces.append(_nll(rows, row_targets))
    return torch.cat(pieces).view(targets.shape) if pieces else logits.new_zeros(targets.shape, dtype=torch.float32)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    scores = logits.float()
    chosen = scores.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return (scores.logsumexp(dim=1) - chosen).masked_fill(targets == IGNORE_INDEX, 0.0)
