"""Finding the row of an id: through a table where ids are dense, by bisection where they are not."""

from __future__ import annotations

import numpy as np

SPREAD = 2  # a table may have this many places per id; two of 4 bytes weigh no more than a sorted id
MANY = 64  # from here on, ids are sorted before they are looked up: neighbours in the list stay in cache


class IdLookup:
    """Rows of distinct ids.

    Sample ids are mostly numbers from 0 on, and then a table answers in two nanoseconds where bisecting a list of
    100,000 takes a hundred; ids far apart, such as hashes, are bisected.

    Args:
        ids: (n,) int64, distinct.
        rows: (n,) int64, the row of each.

    Example:
        >>> IdLookup(np.array([7, 5, 9]), np.array([0, 1, 2])).find(np.array([9, 8, 5, -1])).tolist()
        [2, -1, 1, -1]
    """

    def __init__(self, ids: np.ndarray, rows: np.ndarray) -> None:
        self._size = len(ids)
        self._first = int(ids.min()) if self._size else 0
        span = int(ids.max()) - self._first + 1 if self._size else 0
        self._table: np.ndarray | None = None
        if span <= SPREAD * self._size and rows.max(initial=0) < 2**31:
            self._table = np.full(span, -1, dtype=np.int32)
            self._table[ids - self._first] = rows
            return
        order = np.argsort(ids, kind="stable")
        self._ids, self._rows = ids[order], rows[order]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id (m,), -1 where there is none."""
        if not self._size:
            return np.full(ids.shape, -1, dtype=np.int64)
        if self._table is not None:
            return self._by_table(ids, self._table)
        if len(ids) < MANY:
            return self._by_bisection(ids)
        order = np.argsort(ids)
        found = np.empty(ids.shape, dtype=np.int64)
        found[order] = self._by_bisection(ids[order])
        return found

    def _by_table(self, ids: np.ndarray, table: np.ndarray) -> np.ndarray:
        inside = (ids >= self._first) & (ids < self._first + len(table))
        places = np.where(inside, ids - self._first, 0)
        return np.where(inside, table[places], np.int64(-1))

    def _by_bisection(self, ids: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(self._ids, ids), self._size - 1)
        return np.where(self._ids[at] == ids, self._rows[at], -1)
