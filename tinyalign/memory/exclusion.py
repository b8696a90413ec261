"""Which rows each query must not retrieve, from ids, groups, removed rows and a filter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.inputs import is_whole
from tinyalign.memory.rows import RowTable


class Banned(NamedTuple):
    """Pairs of a query and a row it must not see, sorted by row; and rows that no query may see."""

    rows: np.ndarray  # (P,) int64, ascending
    queries: np.ndarray  # (P,) int64
    everywhere: np.ndarray  # (R,) int64, ascending


def padded_ids(exclude: Any, num_queries: int, caller: str, name: str) -> np.ndarray | None:
    """Bring (B,), (B, E) or one list per query into (B, E) int64 with -1 for nothing."""
    if exclude is None:
        return None
    if not isinstance(exclude, (Tensor, np.ndarray)):
        if not isinstance(exclude, Iterable):
            raise TypeError(f"{caller}: {name} must be a list or tensor, got {exclude!r}. Pass one row per query.")
        exclude = _from_lists(exclude, caller, name)
    table = exclude.detach().cpu().numpy() if isinstance(exclude, Tensor) else exclude
    if table.dtype == np.bool_ or not np.issubdtype(table.dtype, np.integer):
        raise TypeError(f"{caller}: {name} must hold integers, got {table.dtype}. Pass the ids given to add().")
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or table.shape[0] != num_queries:
        raise ValueError(
            f"{caller}: {name} must have one row per query, got shape {tuple(table.shape)} for {num_queries} queries. "
            "Pass (B,), (B, E) padded with -1, or one list per query."
        )
    return table.astype(np.int64)


def _from_lists(exclude: Iterable[Any], caller: str, name: str) -> np.ndarray:
    rows = [list(r) if isinstance(r, (list, tuple, set, frozenset)) else r for r in exclude]
    rows = [r.tolist() if isinstance(r, (Tensor, np.ndarray)) else r for r in rows]
    rows = [r if isinstance(r, list) else [r] for r in rows]
    for row in rows:
        for entry in row:
            if not is_whole(entry):
                raise TypeError(f"{caller}: {name} must hold integers, got {entry!r}. Pass the ids given to add().")
    table = np.full((len(rows), max((len(r) for r in rows), default=0)), -1, dtype=np.int64)
    for at, row in enumerate(rows):
        try:
            table[at, : len(row)] = row
        except OverflowError as error:
            raise ValueError(
                f"{caller}: {name} must be below 2**63, got {max(row, key=abs)}. Pass the ids given to add()."
            ) from error
    return table


def banned_rows(table: RowTable, ids: np.ndarray | None, groups: np.ndarray | None, everywhere: np.ndarray) -> Banned:
    """Resolve excluded ids and groups (B, E) to rows; ids that the bank does not hold exclude nothing."""
    rows, queries = [], []
    if ids is not None and ids.size:
        found = table.find(ids)
        at = np.nonzero(found >= 0)
        rows.append(found[at])
        queries.append(at[0])
    if groups is not None and groups.size:
        positions, hit = table.rows_of_groups(groups.reshape(-1))
        rows.append(hit)
        queries.append(positions // groups.shape[1])
    if not rows:
        none = np.zeros(0, dtype=np.int64)
        return Banned(none, none, everywhere)
    joined, owners = np.concatenate(rows), np.concatenate(queries)
    order = np.argsort(joined, kind="stable")
    return Banned(joined[order], owners[order].astype(np.int64), everywhere)


def hide(scores: Tensor, banned: Banned, start: int) -> None:
    """Write -inf into a block of scores (B, m) whose first column is row ``start``."""
    stop = start + scores.shape[1]
    begin, end = np.searchsorted(banned.rows, [start, stop]).tolist()
    if end > begin:
        at = torch.from_numpy(banned.queries[begin:end]), torch.from_numpy(banned.rows[begin:end] - start)
        scores[at] = float("-inf")
    begin, end = np.searchsorted(banned.everywhere, [start, stop]).tolist()
    if end > begin:
        scores[:, torch.from_numpy(banned.everywhere[begin:end] - start)] = float("-inf")
