"""Smooth tests of a fitted Gaussian copula: moments that vanish under it, cheap in any dimension."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from tinyalign.theory.copula import EllipticalCopula

__all__ = ["Moments", "pooled_departure", "rank_departure", "smooth_test", "squares_departure"]

FloatArray = NDArray[np.float64]
_PAIRS = 5
_REJECT = 4.5  # standard errors
_LEVEL = 5e-4  # chance of calling an elliptical law turned
_ORDERS = 8  # of Legendre polynomials; of their products those of orders whose product is no larger
_SIZES = np.outer(np.arange(1, _ORDERS + 1), np.arange(1, _ORDERS + 1))
_USED = (_SIZES <= _ORDERS) & (_SIZES > 1)
_PRODUCTS = int(_USED.sum())
_DOUBT = 0.05  # chance of doubting the law that holds
_HIDDEN = 0.01  # chance of finding squares that move together under the law
_ELLIPTICAL = 5.5  # standard errors beyond which a moment speaks against every elliptical law


class Moments(NamedTuple):
    """What the moments say of a Gaussian copula.

    Attributes:
        fits: the moments of the leading canonical pairs are those of the law.
        turned: what one side says of the other depends on its radius.
        radial: the samples look like a Student copula: the squared radius varies more than it should, and the moments
            that vanish under every elliptical law do.
    """

    fits: bool
    turned: bool
    radial: bool


def smooth_test(law: EllipticalCopula) -> Moments:
    """Test a Gaussian copula with Hermite moments of its leading canonical pairs, each of variance 1 / n under the law.

    Source:
        Neyman 1937 (smooth tests); Mardia 1970 (kurtosis).
    """
    small = law.leading(_PAIRS)
    n, s = law.n, small.split
    width = len(small.correlation)
    pairs = min(s, width - s)
    rho = np.diag(small.correlation[:pairs, s : s + pairs])
    scale = np.sqrt(np.maximum(1 - rho**2, 1e-12))
    u, v = small.points[:, :pairs], small.points[:, s : s + pairs]
    e = (v - rho * u) / scale
    u2, e2 = (u**2 - 1) / math.sqrt(2), (e**2 - 1) / math.sqrt(2)
    u3, e3 = (u**3 - 3 * u) / math.sqrt(6), (e**3 - 3 * e) / math.sqrt(6)
    products = np.stack([u2 * e2, u * e2, u2 * e, u * e3, u3 * e])  # the second and third vanish under all ellipses
    moments = products.mean(axis=1)
    # A band of even noise, or clusters: the residuals of a pair are not normal.
    third, fourth = (e**3).mean(axis=0) / math.sqrt(6), (e**4 - 3).mean(axis=0) / math.sqrt(24)
    every = np.concatenate([moments, third[None], fourth[None]])
    statistic = n * float((every**2).sum())
    count = every.size
    deviation = _deviation(statistic, count)
    whitened = small.points.copy()
    whitened[:, s : s + pairs] = e
    radius = (whitened**2).sum(axis=1)
    d = whitened.shape[1]
    kurtosis = (float((radius**2).mean()) - d * (d + 2)) / math.sqrt(8 * d * (d + 2) / n)
    turns = _turns(law, e, (u - rho * v) / scale)
    skewed = np.abs(moments[1:3]) / (products[1:3].std(axis=1) / math.sqrt(n) + 1e-12)
    radial = kurtosis > 4.0 or float(moments[0].max()) * math.sqrt(n) > 4.0
    return Moments(deviation < _REJECT, turns, radial and not turns and float(skewed.max()) < _ELLIPTICAL)


def _turns(law: EllipticalCopula, of_y: FloatArray, of_x: FloatArray) -> bool:
    """Say whether what a side predicts of the other depends on its radius, as where it was bent into a spiral.

    The residuals of the leading pairs are held against every other canonical column of the other side times its centred
    squared radius.
    """
    full = law.leading(max(law.split, len(law.correlation) - law.split))
    for residual, columns in ((of_y, slice(0, law.split)), (of_x, slice(law.split, None))):
        white = full.points[:, columns]
        d = white.shape[1]
        if d == 1:
            continue
        turned = residual * (((white**2).sum(axis=1, keepdims=True) - d) / math.sqrt(2 * d))
        # The samples' own variance: tails as heavy as Student's are no turn.
        scores = np.abs(turned.T @ white) / np.sqrt((turned**2).T @ white**2)
        np.fill_diagonal(scores, 0.0)  # a pair's own column moves with its tails
        if float(scores.max()) > float(ndtri(1.0 - _LEVEL / scores.size)):
            return True
    return False


def rank_departure(law: EllipticalCopula) -> tuple[float, bool]:
    """Say how far the leading canonical pairs are from an elliptical law, Gaussian or Student's.

    Under the law what is left of one side after the other predicted it, over the spread that the other's radius gives
    it, is independent of the other. Products of Legendre polynomials of the ranks of both then have mean zero.

    Returns:
        The largest deviation over pairs and directions, in standard errors, and whether it speaks against the law.

    Source:
        Kallenberg and Ledwina 1999 (data-driven rank tests for independence), with a fixed set of products.
    """
    small = law.leading(_PAIRS)
    n, s = law.n, small.split
    pairs = min(s, len(small.correlation) - s)
    full = None
    if math.isfinite(law.freedom):
        cut = len(small.correlation) < len(law.correlation)
        full = law.leading(len(law.correlation)).points if cut else small.points
    worst = -math.inf
    for given, other, side in ((0, s, slice(0, law.split)), (s, 0, slice(law.split, None))):
        spread = np.ones(n)
        if full is not None:
            spread = np.sqrt(law.freedom + (full[:, side] ** 2).sum(axis=1))
        for pair in range(pairs):
            rho = float(small.correlation[pair, s + pair])
            known, answer = small.points[:, given + pair], small.points[:, other + pair]
            worst = max(worst, _deviation(_of_ranks(known, (answer - rho * known) / spread), _PRODUCTS))
    return worst, worst > float(ndtri(1.0 - _DOUBT / pairs))


def pooled_departure(law: EllipticalCopula, pairs: list[tuple[int, int]]) -> float:
    """Say how far the ranks of pairs of columns are from the law in all, in standard errors.

    Many pairs that each depart a little are seen together, where none is alone.

    Args:
        law: the law.
        pairs: columns of x and of y; those of different pairs are nearly uncorrelated.
    """
    found = []
    for swapped in (False, True):
        total = 0.0
        for one, other in pairs:
            known, answer = (law.split + other, one) if swapped else (one, law.split + other)
            u, v = law.points[:, known], law.points[:, answer]
            spread = np.sqrt(law.freedom + u**2) if math.isfinite(law.freedom) else 1.0
            total += _of_ranks(u, (v - float(law.correlation[known, answer]) * u) / spread)
        found.append(_deviation(total, _PRODUCTS * len(pairs)))
    return max(found)


def _of_ranks(known: FloatArray, left: FloatArray) -> float:
    """A chi-square of ``_PRODUCTS`` degrees of freedom where what is left is independent of what is known."""
    products = _legendre(known) @ _legendre(left).T
    return float((products[_USED] ** 2).sum()) / len(known)


def squares_departure(law: EllipticalCopula) -> tuple[float, bool]:
    """Say whether squares of single columns move together by more than a Gaussian law lets them.

    Where neighbours cannot fill all columns this is what is left to see of a product, a ring or clusters among them.
    Under the law the squares of two columns correlate by the square of their correlation, a square and a column not at
    all.

    Returns:
        The largest deviation over pairs of columns, in standard errors, and whether it speaks against the law.
    """
    n, s = law.n, law.split
    x, y = law.points[:, :s], law.points[:, s:]
    correlation = law.correlation[:s, s:]
    x2, y2 = (x**2 - 1) / math.sqrt(2), (y**2 - 1) / math.sqrt(2)
    worst = 0.0
    for left, right, expected in ((x2, y2, correlation**2), (x, y2, 0.0), (x2, y, 0.0)):
        mean = left.T @ right / n
        variance = (left**2).T @ right**2 / n - mean**2
        worst = max(worst, float((np.abs(mean - expected) / np.sqrt(variance / n)).max()))
    return worst, worst > float(ndtri(1.0 - 0.5 * _HIDDEN / (3 * correlation.size)))


def _legendre(values: FloatArray) -> FloatArray:
    """Orthonormal Legendre polynomials of the ranks, (orders, n)."""
    n = len(values)
    at = np.empty(n)
    at[np.argsort(values)] = (2.0 * np.arange(n) + 1.0) / n - 1.0
    found = [np.ones(n), at]
    for order in range(2, _ORDERS + 1):
        found.append(((2 * order - 1) * at * found[-1] - (order - 1) * found[-2]) / order)
    return np.stack([math.sqrt(2 * order + 1) * found[order] for order in range(1, _ORDERS + 1)])


def _deviation(statistic: float, count: int) -> float:
    """Standard errors of a chi-square: the cube root of it over its degrees is nearly normal (Wilson and Hilferty)."""
    return float(((statistic / count) ** (1 / 3) - (1 - 2 / (9 * count))) / math.sqrt(2 / (9 * count)))
