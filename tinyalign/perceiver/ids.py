"""Token ids against the table that they look up, where looking at them costs nothing that matters."""

from __future__ import annotations

import torch
from torch import Tensor


def may_look(ids: Tensor, *, training: bool) -> bool:
    """Whether the content of `ids` may be read here: not while compiling or without data, and never at a price.

    On the CPU it always may. On another device it would make the host wait, so not in a training step, nor while a
    CUDA graph is being captured.
    """
    if torch.compiler.is_compiling() or ids.is_meta:
        return False
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return ids.device.type == "cpu" or not training


def are_ids(text: Tensor) -> bool:
    """Whether this can be a batch of token ids: integers (a mask is none) with two axes."""
    return text.dim() == 2 and text.dtype != torch.bool and not (text.is_floating_point() or text.is_complex())


def as_long(text: Tensor | None) -> Tensor | None:
    """Ids in the one dtype that every lookup and loss of torch takes; anything else as it is."""
    return text.long() if text is not None and are_ids(text) else text


def check_ids(where: str, ids: Tensor, vocab_size: int, keep: Tensor | None = None) -> None:
    """Raise unless all kept ids lie inside the table; torch's own error names neither the id nor the table.

    Shape:
        ids: (B, T), integers. keep: (B, T), bool.

    Example:
        >>> check_ids("here", torch.tensor([[0, 3]]), 4)
        >>> check_ids("here", torch.tensor([[0, 4]]), 4)
        Traceback (most recent call last):
        ...
        ValueError: here: text must hold ids from 0 to 3, got 4 at row 0, place 1. Build it with vocab_size=...
    """
    ids = ids.long()  # a uint8 cannot be compared with 30,522
    outside = (ids < 0) | (ids >= vocab_size)
    if keep is not None:
        outside = outside & keep
    if bool(outside.any()):
        row, place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{where}: text must hold ids from 0 to {vocab_size - 1}, got {int(ids[row, place])} at row {row}, place "
            f"{place}. Build it with vocab_size=len(tokenizer), special tokens included, or mask padding."
        )
