"""Nearest neighbours under the max-norm: a window on a line, trees in few dimensions, blocks of a matrix in many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  # its stubs lack it

from tinyalign.theory.counting import TREE_DIMENSIONS, chebyshev_tree, distance_blocks

__all__ = [
    "BIASED",
    "CLEAR",
    "SHARED",
    "Spread",
    "kth_distance",
    "kth_distances",
    "neighbour_interval",
    "subset_interval",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# Neighbouring samples share neighbours, so a mean of their terms varies more than if they were independent: 1.2 to 1.4
# times over smooth and edged laws of 1 to 4 columns (benchmarks/interval_coverage.py).
SHARED = 1.27
_TERMS_FREEDOM = 30  # degrees of freedom that the spread of the terms is worth beside that over subsets
_SUBSET = 25  # samples a neighbour that a subset needs: smaller ones vary less than 1 / n says
_WIDE = 16  # times as many neighbours, and at most a part of n by it, show a bias
CLEAR = 2.0  # standard errors of what they change
BIASED = 0.25  # standard errors of the estimate


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


class Spread(NamedTuple):
    """Standard error of a mean of neighbours' terms, half of its interval, and what the interval does not hold."""

    error: float
    half: float
    warnings: tuple[str, ...]


def neighbour_interval(
    local: Callable[[IntArray, list[int]], list[FloatArray]], n: int, k: int, level: float, *, shared: float = SHARED,
    added: float = 0.0,
) -> tuple[FloatArray, Spread]:  # fmt: skip
    """Terms of a nearest-neighbour estimate, its standard error and its interval.

    The error is that of the mean of the terms, pooled with the spread over disjoint subsets where these are large
    enough. A bias cannot be seen at one k: it is read off the change from some to many more neighbours, whose
    noise is not that of the estimate, and where it is clear it widens the interval and is said.

    Args:
        local: from row numbers and neighbours to the terms of each.
        n: number of samples.
        k: which neighbour.
        level: nominal coverage.
        shared: by how much sharing neighbours raises the error of the mean.
        added: what it adds to the variance of a term.

    Source:
        Holmes and Nemenman 2019, arXiv 1903.09280, for the subsets and for comparing neighbours.
    """
    wide = min(_WIDE * k, n // _WIDE)
    middle = round(math.sqrt(k * wide))
    terms, *coarse = local(np.arange(n), [k, middle, wide] if k < middle < wide else [k])
    count = len(terms)
    error = shared * math.sqrt((float(terms.var(ddof=1)) + added) / count)
    freedom = float(_TERMS_FREEDOM)
    if n >= 3 * _SUBSET * (k + 1):
        parts = min(10, n // (_SUBSET * (k + 1)))
        of_subsets, _ = subset_interval(lambda rows: float(local(rows, [k])[0].mean()), n, k, level, subsets=parts)
        freedom += parts - 1
        error = math.sqrt((_TERMS_FREEDOM * error**2 + (parts - 1) * of_subsets**2) / freedom)
    half = float(stats.t.ppf(0.5 + level / 2, min(freedom, count - 1))) * error
    if not coarse:
        return terms, Spread(error, half, ())
    apart = coarse[0] - coarse[1]
    drift = float(apart.mean())
    # At sharp edges the bias grows with the root of k, elsewhere faster.
    bias = drift / (math.sqrt(wide / k) - math.sqrt(middle / k))
    if abs(drift) <= CLEAR * SHARED * float(apart.std()) / math.sqrt(count) or abs(bias) < max(BIASED * error, 1e-9):
        return terms, Spread(error, half, ())
    line = (
        f"bias: the estimate moves by {-drift:+.3f} nats from k = {middle} to {wide}; edges, strong dependence or "
        f"dimension bias it, by up to about {bias:.3f} nats at k = {k}, by which the interval is widened"
    )
    return terms, Spread(error, half + abs(bias), (line,))
