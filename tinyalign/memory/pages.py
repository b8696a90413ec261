"""Telling the system how mapped values are read: a few rows at random, from a warm or a cold cache."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import numpy as np

POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; Python has no name for it
SAMPLES = 32  # pages looked at to tell a warm file from a cold one


class Pages:
    """A read-only mapping of a file whose rows are gathered at random.

    By default the system reads ahead, which turns a cold gather of half a megabyte into hundreds. Here it is told that
    reads are random, and which rows are coming. Once the file is found to be in the page cache, its pages are mapped in
    one call, so that gathers no longer stop at each page for the first time.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (lives as long as the mapping)
        self.memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._size = len(self.memory)
        self._mapped_in = False
        self._draws = random.Random(0)
        self._advise(getattr(mmap, "MADV_RANDOM", None))

    def _advise(self, advice: int | None, begin: int = 0, length: int | None = None) -> bool:
        if advice is None:  # pragma: no cover (a system without madvise)
            return False
        try:
            self.memory.madvise(advice, begin, self._size - begin if length is None else length)
        except OSError:  # an older kernel: advice is only advice
            return False
        return True

    def read_in_order(self) -> None:
        """Take back the advice of random reads, for a file that is read from end to end."""
        self._advise(getattr(mmap, "MADV_NORMAL", None))

    def resident(self) -> bool:
        """Say whether a random sample of the file's pages is in the page cache, without reading any from the disk."""
        if not hasattr(os, "RWF_NOWAIT"):  # pragma: no cover (not Linux)
            return False
        byte = bytearray(1)
        for _ in range(SAMPLES):
            try:
                os.preadv(self._file.fileno(), [byte], self._draws.randrange(self._size), os.RWF_NOWAIT)
            except OSError:
                return False
        return True

    def map_in(self) -> bool:
        """Map every page now, reading from the disk what is not in memory; False where the kernel cannot."""
        self._mapped_in = self._mapped_in or self._advise(POPULATE_READ)
        return self._mapped_in

    def expect(self, rows: np.ndarray, row_bytes: int) -> None:
        """Announce that rows are about to be read."""
        if self._mapped_in or (self.resident() and self.map_in()):
            return
        page = mmap.ALLOCATIONGRANULARITY
        first = np.unique(rows) * row_bytes
        begins, ends = first // page * page, first + row_bytes
        willneed = getattr(mmap, "MADV_WILLNEED", None)
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            self._advise(willneed, begin, end - begin)
