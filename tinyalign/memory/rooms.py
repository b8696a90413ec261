"""Memory for results of some megabytes, used again once nobody holds the result."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 17  # bytes; smaller blocks are kept and handed out again by the C library
LARGEST = 1 << 26
ALIGNED = 64  # bytes of a cache line, as torch's own memory is
MOST = 3  # a result in use, one being made, one in between


@dataclass(frozen=True, eq=False)
class _Block:
    memory: np.ndarray
    part: weakref.ref[np.ndarray]  # what the last tensor made of it holds: gone when the tensor's storage is


class Rooms:
    """Uninitialised tensors, in memory that earlier ones have left.

    Fresh memory costs a page fault for every 4 kB: for the values of a batch, several times what copying them costs.
    Whether the C library keeps a block for the next batch hangs on all else that a program allocates, so it is kept
    here. A block is used again only when no tensor, view or array refers to it any more.

    Example:
        >>> rooms = Rooms()
        >>> first = rooms.empty((1000, 100), torch.float32)
        >>> place = first.data_ptr()
        >>> rooms.empty((1000, 100), torch.float32).data_ptr() == place
        False
        >>> rooms = Rooms()
        >>> places = [rooms.empty((1000, 100), torch.float32).data_ptr() for _ in range(2)]
        >>> places[0] == places[1]  # nobody held the first
        True
    """

    def __init__(self) -> None:
        self._kept: list[_Block] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of any content."""
        size = math.prod(shape) * dtype.itemsize
        if not SMALLEST <= size <= LARGEST:
            return torch.empty(*shape, dtype=dtype)
        memory = self._free(size)
        part = memory[:size]
        self._kept.append(_Block(memory, weakref.ref(part)))
        del self._kept[:-MOST]
        return torch.from_numpy(part).view(dtype).reshape(*shape)

    def _free(self, size: int) -> np.ndarray:
        """Take out the smallest block that does and nobody uses, or make one; no other thread sees what is taken."""
        for block in sorted(self._kept, key=lambda block: len(block.memory)):
            if block.part() is None and len(block.memory) >= size and self._take_out(block):
                return block.memory
        for block in tuple(self._kept):  # all that are left are too small: the new one is for them too
            if block.part() is None:
                self._take_out(block)
        memory = np.empty(size + ALIGNED, dtype=np.uint8)
        start = -memory.ctypes.data % ALIGNED
        return memory[start : start + size]

    def _take_out(self, block: _Block) -> bool:
        try:
            self._kept.remove(block)
        except ValueError:  # another thread was faster
            return False
        return True
