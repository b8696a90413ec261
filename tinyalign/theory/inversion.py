"""Intervals of informations from counts: each hypothesis is tested by simulation, those that pass are the interval.

The maximum-likelihood information of a table is biased upward, skewed, and near independence a chi-square. No multiple
of a standard error is right for all of that. Tables between the fitted one and the one without dependence are drawn
with each amount of information instead, and an amount is kept where the data look like a draw of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

__all__ = ["CELLS", "Inverted", "simulated_entropy", "simulated_information"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_Amount = Callable[[NDArray[Any]], FloatArray]  # p log p of frequencies, or of counts
CELLS = 150  # beyond which a table's information is close to normal and its drawing slow
_DRAWS = 400
_STEPS = 8  # hypotheses that are drawn; what lies between is a parabola through them
_REACH = 1.6  # by how much they span more than the interval that is expected
_FINE = 400
_PLACES = 61
_UNSEEN = 0.25  # of a sample
_NONE = 1e-4  # times 1 / n


class Inverted(NamedTuple):
    """The amounts of information that the data do not reject.

    Attributes:
        low: the smallest of them, negative where none at all is not rejected.
        high: the largest.
        error: standard deviation of the estimate at what was observed.
    """

    low: float
    high: float
    error: float


def simulated_information(table: IntArray, expected: tuple[float, float], level: float) -> Inverted:
    """Invert the test of each I(X; Y | Z) of a table of counts.

    Args:
        table: counts; one layer for each value of what is given.
        expected: a rough interval, which says where to look.
        level: nominal coverage.

    Shape:
        table: (Z, X, Y).

    Units:
        nats.

    Source:
        Neyman 1937 (intervals from tests); the acceptance region is symmetric about the mean of the draws, so that at
        independence, where the estimate cannot err downward, all of the error lies above.

    Example:
        >>> simulated_information(np.array([[[30, 20], [20, 30]]]), (0.0, 0.06), 0.95).low < 0.02
        True
    """
    n = int(table.sum())
    q = table / n
    layers = q.sum(axis=(1, 2), keepdims=True)
    r = q.sum(axis=2, keepdims=True) * q.sum(axis=1, keepdims=True) / np.where(layers > 0, layers, 1.0)

    def measure(tables: NDArray[Any], amount: _Amount) -> FloatArray:
        rows, columns = tables.sum(axis=-1), tables.sum(axis=-2)
        total = amount(tables).sum(axis=(-3, -2, -1)) + amount(tables.sum(axis=(-2, -1))).sum(axis=-1)
        return np.asarray(total - amount(rows).sum(axis=(-2, -1)) - amount(columns).sum(axis=(-2, -1)))

    return _inverted(q, r, n, measure, expected, level)


def simulated_entropy(counts: IntArray, expected: tuple[float, float], level: float) -> Inverted:
    """Invert the test of each entropy of outcomes, all of which were seen.

    What the entropy lacks to that of even outcomes is an information; the places of ``low`` and ``high`` are exchanged.

    Args:
        counts: how often each was seen.
        expected: a rough interval of the entropy.
        level: nominal coverage.

    Shape:
        counts: (m,).

    Units:
        nats.

    Example:
        >>> bool(simulated_entropy(np.array([50, 50]), (0.67, 0.71), 0.95).high > np.log(2) - 1e-9)
        True
    """
    n, ceiling = int(counts.sum()), math.log(len(counts))

    def measure(laws: NDArray[Any], amount: _Amount) -> FloatArray:
        lacking = amount(laws).sum(axis=-1) - amount(laws.sum(axis=-1))
        return np.asarray(ceiling * laws.sum(axis=-1) + lacking)

    lacks = (ceiling - expected[1], ceiling - expected[0])
    found = _inverted(counts / n, np.full(len(counts), 1 / len(counts)), n, measure, lacks, level)
    return Inverted(ceiling - found.high, ceiling - found.low, found.error)


def _inverted(
    q: FloatArray, r: FloatArray, n: int, measure: Callable[[NDArray[Any], _Amount], FloatArray],
    expected: tuple[float, float], level: float,
) -> Inverted:  # fmt: skip
    def exact(laws: FloatArray) -> FloatArray:
        return measure(laws, lambda p: xlogy(p, p))

    numbers = np.arange(n + 1.0)
    amounts = xlogy(numbers, numbers)  # draws are counts, whose logarithms need not be taken each time
    observed = float(exact(q))
    if observed < _NONE / n:  # no direction to go in
        return Inverted(*expected, 1.0 / n)
    low, high = (observed + _REACH * (end - observed) for end in expected)
    # Cells that were never seen keep the mass that would explain it; most often they are empty.
    tilt = np.divide(np.maximum(q, _UNSEEN / n), r, out=np.ones_like(r), where=r > 0)
    high = max(high, 4.0 / n)
    places = np.linspace(0.0, max(3.0, 2.0 * math.sqrt(high / observed)), _PLACES)  # 0: independent, 1: as observed
    path = r * tilt ** places.reshape(-1, *([1] * r.ndim))
    path /= path.sum(axis=tuple(range(1, path.ndim)), keepdims=True)
    roots = np.sqrt(np.maximum.accumulate(np.maximum(exact(path), 0.0)))
    rng = np.random.default_rng(0)
    rows, apart = [], []
    for root in np.linspace(math.sqrt(max(low, 0.0)), min(math.sqrt(high), float(roots[-1])), _STEPS):
        law = r * tilt ** np.interp(root, roots, places)
        law /= law.sum()
        drawn = rng.multinomial(n, law.ravel(), size=_DRAWS).reshape(-1, *law.shape)
        values = measure(drawn, amounts.__getitem__) / n
        rows.append((float(exact(law)), float(values.mean()), max(float(values.var()), (_NONE / n) ** 2)))
        apart.append(np.abs(values - values.mean()) / values.std() if values.std() > 0 else np.zeros(1))
    truth, means, variances = np.array(rows).T
    at = np.linspace(truth.min(), truth.max(), _FINE)
    spread = _parabola(truth, variances, variances)
    for _ in range(2):  # weights from what is noisy would favour what came out small
        spread = np.maximum(spread, 0.1 * variances)
        spread, variance = _parabola(truth, variances, spread), _parabola(truth, variances, spread, at)
    centre = _parabola(truth, means, np.sqrt(variances), at)
    # In standard deviations the limit hardly moves, from 2.0 of a chi-square to 1.96, so that all draws are pooled.
    width = float(np.quantile(np.concatenate(apart), level)) * np.sqrt(np.maximum(variance, 0.0))
    error = math.sqrt(float(np.interp(observed, at, np.maximum(variance, 0.0))))
    kept = at[np.abs(observed - centre) <= width]
    if not len(kept):  # less dependence than chance brings
        nearest = int(np.abs(observed - centre).argmin())
        return Inverted(observed - float(width[nearest]), observed + float(width[nearest]), error)
    # Where independence itself is kept the interval goes on below zero, as an estimate may.
    none = low <= 0.0 and kept[0] == at[0]
    return Inverted(min(0.0, expected[0]) if none else float(kept[0]), float(kept[-1]), error)


def _parabola(x: FloatArray, y: FloatArray, scale: FloatArray, at: FloatArray | None = None) -> FloatArray:
    """Parabola through y with errors in proportion to ``scale``, at x or elsewhere."""
    fitted = np.polyval(np.polyfit(x, y, 2, w=1.0 / scale), x if at is None else at)
    return np.asarray(fitted, dtype=np.float64)
