"""Approximate search through any faiss index, re-ranked exactly and measured against exact search."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.errors import BankError
from tinyalign.memory.exclusion import Banned
from tinyalign.memory.inputs import is_whole
from tinyalign.memory.rows import RowTable
from tinyalign.memory.search import SPARE, TopRows, rescored

ROWS_AT_ONCE = 65536
TRAINING_ROWS = 262_144


class FaissIndex:
    """A faiss index over the bank's keys that proposes candidates; the stored keys decide their order.

    Args:
        table: the bank's rows; those present now are indexed.
        factory: a faiss factory string, such as ``HNSW32``, ``IVF1024,Flat`` or ``IVF1024,RaBitQ``.
        candidates: how many rows the index proposes per query, besides those to make up for exclusions; k + 8 at least.
        parameters: of the index by faiss's names, such as ``{"nprobe": 64}`` or ``{"efSearch": 200}``.

    Raises:
        ValueError: ``candidates`` is negative or no integer.
        BankError: faiss refuses the string, a parameter or the number of entries.
    """

    def __init__(self, table: RowTable, factory: str, candidates: int, parameters: dict[str, float]) -> None:
        import faiss

        if not is_whole(candidates) or candidates < 0:
            where, found = "MemoryBank.build_index", repr(candidates)
            raise ValueError(f"{where}: candidates must be an integer from 0, got {found}. Leave it out for k + 8.")
        self.version, self.factory, self.candidates = table.version, factory, candidates
        self.rows = table.live_rows()
        width = int(table.gather(torch.from_numpy(self.rows[:1]), "keys").shape[1])
        try:
            self.index: Any = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            if not self.index.is_trained:
                step = max(1, -(-len(self.rows) // TRAINING_ROWS))
                self.index.train(self._keys(table, self.rows[::step]))
            for at in range(0, len(self.rows), ROWS_AT_ONCE):
                self.index.add(self._keys(table, self.rows[at : at + ROWS_AT_ONCE]))
            for name, value in parameters.items():
                faiss.ParameterSpace().set_index_parameter(self.index, name, value)
            self.index.search(self._keys(table, self.rows[:1]), 1)  # some parameters are refused only here
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason"
            raise BankError(
                f"MemoryBank.build_index: factory must be one that faiss builds over {len(self.rows)} entries of width "
                f"{width}, got {factory!r} with {parameters}: {reason}. See faiss's index_factory."
            ) from error

    @staticmethod
    def _keys(table: RowTable, rows: np.ndarray) -> np.ndarray:
        keys: np.ndarray = table.gather(torch.from_numpy(rows), "keys").to(torch.float32).numpy()
        return keys

    def top_rows(self, queries: Tensor, table: RowTable, k: int, banned: Banned) -> TopRows:
        """Return the best of what the index proposes, excluded rows left out."""
        count = queries.shape[0]
        excluded = np.bincount(banned.queries, minlength=count).max(initial=0)
        wanted = int(min(len(self.rows), max(k + SPARE, self.candidates) + excluded))
        if not count or not wanted:
            return TopRows(torch.full((count, k), float("-inf")), torch.full((count, k), -1))
        _, positions = self.index.search(queries.numpy(), wanted)
        rows = torch.from_numpy(np.where(positions < 0, -1, self.rows[positions]))
        hidden = rows < 0
        if len(banned.rows):
            pairs = torch.from_numpy(banned.queries * table.total + banned.rows)
            asked = torch.arange(count)[:, None] * table.total + rows
            hidden |= torch.isin(asked, pairs)
        best = torch.zeros(rows.shape).masked_fill(hidden, float("-inf"))
        return rescored(queries, table, best, rows.clamp_min(0), k)
