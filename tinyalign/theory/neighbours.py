"""Nearest neighbours under the max-norm: a window on a line, trees in few dimensions, blocks of a matrix in many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  # its stubs lack it

from tinyalign.theory.counting import TREE_DIMENSIONS, chebyshev_tree, distance_blocks

__all__ = ["kth_distance", "kth_distances", "subset_interval"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


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
    if width <= TREE_DIMENSIONS:
        found = chebyshev_tree(points).query(asked, max(ks) + own)[0]
        return np.asarray(found[:, [k + own - 1 for k in ks]])
    picked = torch.tensor([k + own - 1 for k in ks])
    near = [
        block.topk(max(ks) + own, dim=1, largest=False).indices[:, picked] for block in distance_blocks(asked, points)
    ]
    # Blocks find the neighbours in single precision; their distances are taken again in double.
    rows = torch.cat(near).numpy()
    return np.stack([np.abs(points[column] - asked).max(axis=1) for column in rows.T], axis=1)


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
