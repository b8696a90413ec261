"""How often a query would retrieve itself, a twin or a near-duplicate: with exclusion, and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinyalign.memory.milvus import AnyBank
from tinyalign.memory.retrieval import Neighbours


class LeakageCounts(NamedTuple):
    """What the k neighbours of each query are.

    Args:
        self_hits: neighbours that are the query's own entry.
        group_hits: neighbours of the same group that are not the sample itself.
        near_duplicates: neighbours from the given score on that are neither.
        self_rate: share of queries with at least one such hit.
        group_rate: likewise.
        near_duplicate_rate: likewise.
    """

    self_hits: int
    group_hits: int
    near_duplicates: int
    self_rate: float
    group_rate: float
    near_duplicate_rate: float


class LeakageReport(NamedTuple):
    """Leakage of a set of queries, without any exclusion and with ids and groups excluded.

    Args:
        num_queries: how many were asked.
        k: neighbours of each.
        near_duplicate_score: from which score on a neighbour counts as a near-duplicate.
        without_exclusion: what everybody would retrieve.
        with_exclusion: what is left once ids and groups are excluded.
    """

    num_queries: int
    k: int
    near_duplicate_score: float
    without_exclusion: LeakageCounts
    with_exclusion: LeakageCounts

    def __str__(self) -> str:
        lines = [f"{self.num_queries} queries, k={self.k}: queries that retrieve"]
        for name, counts in (("without exclusion", self.without_exclusion), ("with exclusion", self.with_exclusion)):
            lines.append(
                f"  {name}: themselves {counts.self_rate:.1%}, another of their group {counts.group_rate:.1%}, "
                f"a near-duplicate (score >= {self.near_duplicate_score}) {counts.near_duplicate_rate:.1%}"
            )
        return "\n".join(lines)


def leakage_report(
    bank: AnyBank,
    queries: Tensor,
    ids: Tensor | Sequence[int],
    groups: Tensor | Sequence[int] | None = None,
    *,
    k: int = 5,
    near_duplicate_score: float = 0.99,
) -> LeakageReport:
    """Count self hits, group hits and near-duplicates among the k neighbours of each query.

    Args:
        bank: what is searched.
        queries: of the samples ``ids``.
        ids: the samples' ids; a self hit is a neighbour of the same id.
        groups: the samples' groups; a group hit is a neighbour of the same group that is not the sample itself.
        k: neighbours per query.
        near_duplicate_score: a neighbour (not the sample itself, not of its group) from this score on counts as a
            near-duplicate.

    Shape:
        queries: (B, D). ids, groups: (B,).

    Raises:
        ValueError: there are no queries, or not as many ids or groups as queries.

    Example:
        >>> from tinyalign.memory import MemoryBank
        >>> bank = MemoryBank(4, (1, 2))
        >>> ids = bank.add(torch.eye(4), torch.ones(4, 1, 2))
        >>> report = leakage_report(bank, torch.eye(4), ids, k=1)
        >>> report.without_exclusion.self_hits, report.with_exclusion.self_hits
        (4, 0)
    """
    where = "leakage_report"
    count = queries.shape[0]
    if not count:
        raise ValueError(f"{where}: queries must hold at least one row, got 0. Pass the training queries.")
    sample_ids = _column(ids, count, where, "ids")
    sample_groups = torch.full((count,), -1) if groups is None else _column(groups, count, where, "groups")
    plain = bank.neighbours(queries, k)
    excluded = bank.neighbours(queries, k, exclude_ids=sample_ids, exclude_groups=sample_groups)
    group_of = _group_lookup(bank)
    return LeakageReport(
        num_queries=count,
        k=k,
        near_duplicate_score=near_duplicate_score,
        without_exclusion=_counts(plain, sample_ids, sample_groups, group_of, near_duplicate_score),
        with_exclusion=_counts(excluded, sample_ids, sample_groups, group_of, near_duplicate_score),
    )


def _column(values: Tensor | Sequence[int], count: int, where: str, name: str) -> Tensor:
    column = torch.as_tensor(values).cpu().to(torch.int64)
    if tuple(column.shape) != (count,):
        raise ValueError(f"{where}: {name} must have shape ({count},), got {tuple(column.shape)}. Give one per query.")
    return column


def _group_lookup(bank: AnyBank) -> tuple[Tensor, Tensor]:
    ids, order = bank.ids.sort()
    return ids, bank.groups[order]


def _counts(
    found: Neighbours, ids: Tensor, groups: Tensor, group_of: tuple[Tensor, Tensor], threshold: float
) -> LeakageCounts:
    known, their_groups = group_of
    hit_ids, mask, scores = found.ids.cpu(), found.mask.cpu(), found.scores.cpu()
    at = torch.searchsorted(known, hit_ids.clamp_min(0)).clamp_max(len(known) - 1)
    hit_groups = their_groups[at]
    itself = mask & (hit_ids == ids[:, None])
    twin = mask & ~itself & (hit_groups == groups[:, None]) & (groups[:, None] >= 0)
    close = mask & ~itself & ~twin & (scores >= threshold)
    return LeakageCounts(
        *(int(hits.sum()) for hits in (itself, twin, close)),
        *(float(hits.any(1).double().mean()) for hits in (itself, twin, close)),
    )
