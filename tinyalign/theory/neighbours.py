"""Nearest neighbours and counts in balls under the max-norm: trees in few dimensions, blocks of a matrix in many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import cKDTree

__all__ = ["count_within", "kth_distance", "kth_distances", "subset_interval"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_TREE_DIMENSIONS = 12
_BLOCK = 256
_LEAF = 15


def kth_distance(points: FloatArray, k: int, queries: FloatArray | None = None) -> FloatArray:
    """Compute each point's distance to its k-th other point; with ``queries``, their distance to the k-th point.

    Shape:
        points: (n, d). queries: (m, d). returns: (n,) or (m,).

    Example:
        >>> kth_distance(np.array([[0.0], [1.0], [3.0]]), 1).tolist()
        [1.0, 1.0, 2.0]
    """
    return kth_distances(points, [k], queries)[:, 0]


def kth_distances(points: FloatArray, ks: list[int], queries: FloatArray | None = None) -> FloatArray:
    """Compute the distances to several neighbours at once, (n, len(ks)); a point is not its own neighbour."""
    own = 1 if queries is None else 0
    asked = points if queries is None else queries
    width = points.shape[1]
    if width == 1 and queries is None:
        return _line_distances(points[:, 0], ks)
    if width <= 2:
        return np.asarray(cKDTree(points).query(asked, [k + own for k in ks], p=np.inf)[0])
    if width <= _TREE_DIMENSIONS:
        found = _tree(points).query(asked, max(ks) + own)[0]
        return np.asarray(found[:, [k + own - 1 for k in ks]])
    columns = []
    for block in _distance_blocks(asked, points):
        near = block.topk(max(ks) + own, dim=1, largest=False).values
        columns.append(near[:, [k + own - 1 for k in ks]].double().numpy())
    return np.concatenate(columns)


def count_within(
    points: FloatArray, radius: FloatArray, *, strict: bool = True, rows: IntArray | None = None
) -> IntArray:
    """Count the other points within each point's own radius.

    Args:
        points: samples.
        radius: one per sample that is asked for.
        strict: count distances below the radius, not equal to it.
        rows: the samples that are asked for; None asks for all.

    Shape:
        points: (n, d). radius: (n,) or (len(rows),). returns: like radius.

    Example:
        >>> count_within(np.array([[0.0], [1.0], [3.0]]), np.array([1.5, 2.5, 1.0])).tolist()
        [1, 2, 0]
    """
    asked = points if rows is None else points[rows]
    if points.shape[1] == 1:
        return _line_counts(points[:, 0], asked[:, 0], radius, strict)
    if points.shape[1] <= _TREE_DIMENSIONS:
        reach = np.nextafter(radius, 0.0) if strict else radius
        found = _tree(points).query_radius(asked, reach, count_only=True)
        return np.maximum(np.asarray(found, dtype=np.int64) - 1, 0)
    counts = []
    limits = torch.from_numpy(np.ascontiguousarray(radius)).float()
    for start, block in zip(range(0, len(asked), _BLOCK), _distance_blocks(asked, points), strict=True):
        limit = limits[start : start + _BLOCK, None]
        inside = block < limit if strict else block <= limit
        counts.append(inside.sum(dim=1).numpy())
    return np.maximum(np.concatenate(counts).astype(np.int64) - 1, 0)


def _tree(points: FloatArray) -> Any:
    """A tree that counts without listing; imported late, as scikit-learn writes to the environment."""
    from sklearn.neighbors import KDTree

    return KDTree(points, metric="chebyshev", leaf_size=_LEAF)


def _line_distances(values: FloatArray, ks: list[int]) -> FloatArray:
    """k-th neighbour on a line: a window of sorted values holds it."""
    order = np.argsort(values, kind="stable")
    line = values[order]
    width = max(ks)
    padded = np.concatenate([np.full(width, -np.inf), line, np.full(width, np.inf)])
    n = len(line)
    gaps = np.stack([np.abs(padded[shift : shift + n] - line) for shift in range(2 * width + 1) if shift != width])
    gaps.sort(axis=0)
    result = np.empty((n, len(ks)))
    result[order] = gaps[[k - 1 for k in ks]].T
    return result


def _line_counts(values: FloatArray, asked: FloatArray, radius: FloatArray, strict: bool) -> IntArray:
    line = np.sort(values)
    order = np.argsort(asked)  # sorted queries walk the line once
    centre, reach = asked[order], radius[order]
    # A neighbour at the radius itself must not be lost or won by the rounding of centre + reach.
    slack = 4 * np.finfo(np.float64).eps * (np.abs(centre) + reach)
    reach = reach - slack if strict else reach + slack
    if strict:
        inside = np.searchsorted(line, centre + reach, "left") - np.searchsorted(line, centre - reach, "right")
    else:
        inside = np.searchsorted(line, centre + reach, "right") - np.searchsorted(line, centre - reach, "left")
    counts = np.empty(len(asked), dtype=np.int64)
    counts[order] = np.maximum(inside - 1, 0)
    return counts


def _distance_blocks(queries: FloatArray, points: FloatArray) -> _Blocks:
    return _Blocks(torch.from_numpy(np.ascontiguousarray(queries)).float(), torch.from_numpy(points.T.copy()).float())


class _Blocks:
    """Rows of the max-norm distance matrix, a block at a time; one column is folded in after the other."""

    def __init__(self, queries: torch.Tensor, columns: torch.Tensor) -> None:
        self.queries, self.columns = queries, columns

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.queries), _BLOCK):
            rows = self.queries[start : start + _BLOCK]
            farthest = (rows[:, :1] - self.columns[0]).abs_()
            for column in range(1, self.columns.shape[0]):
                torch.maximum(farthest, (rows[:, column, None] - self.columns[column]).abs_(), out=farthest)
            yield farthest


def subset_interval(
    estimate: Callable[[IntArray], float], n: int, k: int, level: float, *, subsets: int = 10, seed: int = 0
) -> tuple[float, float]:
    """Extrapolate the standard error of an estimate at n from disjoint random subsets.

    A bootstrap would put points at distance zero from their own copies. The variance of a mean of local terms falls
    as 1/n, so the spread over m disjoint subsets of n/m points, divided by m, is that of the whole.

    Args:
        estimate: from row numbers to a value.
        n: number of samples.
        k: neighbours that a subset must hold.
        level: nominal coverage.
        subsets: number of them; fewer where a subset would hold under 4 (k + 1) points.
        seed: of the random split.

    Returns:
        The standard error and the Student quantile that goes with it; NaN and NaN where n is too small.

    Source:
        Holmes and Nemenman 2019, arXiv 1903.09280.
    """
    parts = min(subsets, n // (4 * (k + 1)))
    if parts < 3:
        return float("nan"), float("nan")
    order = np.random.default_rng(seed).permutation(n)
    values = np.array([estimate(np.sort(rows)) for rows in np.array_split(order, parts)])
    error = float(values.std(ddof=1) / np.sqrt(parts))
    return error, float(stats.t.ppf(0.5 + level / 2, parts - 1))
