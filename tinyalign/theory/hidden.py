"""Dependence that hides in many columns: single pairs, or one direction a side, that a Gaussian copula does not hold.

Neighbours in all columns lose sight of one bound pair among noise. Here every pair of columns is held against the
fitted law by sines and cosines, whose moments under it are closed forms, and every direction by squares.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from tinyalign.theory.copula import EllipticalCopula
from tinyalign.theory.smooth import pooled_departure

__all__ = ["Hidden", "hidden_columns", "hidden_direction", "hidden_pool"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_FINE, _COARSE = (1.0, 2.0, 3.0, 4.5), (1.5, 3.0)  # angular frequencies on normal scores
_PAIRS = 1000  # of columns, up to which the finer ones are used
_WORK = 6e8  # products of features and rows, beyond which rows are left out
_LEVEL = 5e-4  # chance of finding a pair under the law
_APART = 0.2  # correlation of columns on one side up to which what they hold is added up
_WIDEST = 16  # columns of a side whose products are searched, and pairs that are pooled
_POOLED = 6.0  # standard errors by which ranks of many pairs depart together
_EDGE = 2.3  # noise of the largest canonical correlation of random squares, by the size of the two sets of them


class Hidden(NamedTuple):
    """What depends beyond the law.

    Attributes:
        said: which columns or directions, and how clearly.
        planes: (n, 2) samples of both sides of pairs of them, with no column in common, the clearest first.
    """

    said: str
    planes: list[FloatArray]


def hidden_columns(law: EllipticalCopula, numbers: list[IntArray] | None = None) -> Hidden | None:
    """Find pairs of columns whose characteristic function is not that of the Gaussian copula; None where all fit.

    Args:
        law: the law.
        numbers: which columns of x and of y its columns are, for what is said; None where they were turned.

    Source:
        Csoergo 1985, "Testing for independence by the empirical characteristic function", with the law's own
        correlations in place of none.
    """
    n, s = law.n, law.split
    d = len(law.correlation) - s
    frequencies = np.array(_FINE if s * d <= _PAIRS else _COARSE)
    size = 2 * len(frequencies)
    rows = slice(None, None, max(1, math.ceil(n * s * d * size**2 / _WORK)))
    # e^(i w z) of all columns: its real and imaginary part are the features.
    waves = np.exp(1j * law.points[rows, :, None] * frequencies)
    features = np.concatenate([np.imag(waves), np.real(waves)], axis=2)
    features -= features.mean(axis=0)
    left, right = features[:, :s].reshape(-1, s * size), features[:, s:].reshape(-1, d * size)
    count = len(left)
    mean = (left.T @ right / count).reshape(s, size, d, size)
    variance = ((left**2).T @ right**2 / count).reshape(s, size, d, size) - mean**2
    deviation = np.abs(mean - _expected(law.correlation[:s, s:], frequencies))
    deviation /= np.sqrt(np.maximum(variance, 1e-12) / count)
    clearest = deviation.max(axis=(1, 3))
    # Few rows seldom tell their own variance, which then is too small where the mean is far.
    clear = clearest > -float(stdtrit(count / 2, 0.5 * _LEVEL / deviation.size))
    if not clear.any():
        return None
    used = _apart(law, np.where(clear, clearest, 0.0), s)
    one, other = used[0] if numbers is None else (numbers[0][used[0][0]], numbers[1][used[0][1]])
    return Hidden(
        f"{'canonical ' if numbers is None else ''}columns {one} of x and {other} of y, the clearest of "
        f"{int(clear.sum())} such pairs, depend by {clearest.max():.1f} standard errors beyond the copula",
        [law.points[:, [one, s + other]] for one, other in used],
    )


def hidden_pool(law: EllipticalCopula) -> Hidden | None:
    """Find what the pairs of columns that correlate most hold beyond the law together; None where they fit it."""
    used = _apart(law, np.abs(law.correlation[: law.split, law.split :]), _WIDEST)
    departure = pooled_departure(law, used)
    if departure < _POOLED:
        return None
    said = f"ranks of {len(used)} pairs of columns depart together by {departure:.1f} standard errors from the copula"
    return Hidden(said, [law.points[:, [one, law.split + other]] for one, other in used])


def _apart(law: EllipticalCopula, score: FloatArray, most: int) -> list[tuple[int, int]]:
    """At most so many pairs of columns with a positive score, largest first, that hardly correlate on either side."""
    used: list[tuple[int, int]] = []
    s = law.split
    for place in np.argsort(-score, axis=None)[: int((score > 0).sum())]:
        one, other = divmod(int(place), score.shape[1])
        near = [max(abs(law.correlation[one, i]), abs(law.correlation[s + other, s + j])) for i, j in used]
        if max(near, default=0.0) < _APART:
            used.append((one, other))
        if len(used) == min(*score.shape, most):
            break
    return used


def _expected(correlation: FloatArray, frequencies: FloatArray) -> FloatArray:
    """Covariances of sines, then cosines, of standard normals with these correlations: (x, features, y, features)."""
    one, other = frequencies[:, None], frequencies[None, :]
    damped = -0.5 * (one**2 + other**2)
    turned = correlation[:, None, :, None] * (one * other)[None, :, None, :]
    plus, minus = (np.exp(damped[None, :, None, :] + sign * turned) for sign in (1, -1))
    none = np.zeros_like(plus)
    cosines = 0.5 * (plus + minus) - np.exp(damped)[None, :, None, :]
    return np.concatenate(
        [np.concatenate([0.5 * (plus - minus), none], axis=3), np.concatenate([none, cosines], axis=3)], axis=1
    )


def hidden_direction(law: EllipticalCopula) -> Hidden | None:
    """Find a quadratic form of x and one of y that correlate beyond the Gaussian law; None where none does.

    Products of two canonical columns correlate by the product of both correlations under the law. What is left of the
    cross-correlation of all products of x with all of y, both whitened, is noise whose largest singular value is known;
    a ring or a product stands out, however it was rotated. The clearest eigenvector of each form is its direction.

    Source:
        Johnstone 2008 (the largest canonical correlation of noise).
    """
    s = law.split
    widths = s, len(law.correlation) - s
    products = [width * (width + 1) // 2 for width in widths]
    if max(widths) > _WIDEST or sum(products) > law.n / 2:
        return None
    full = law.leading(max(widths))
    sides = full.points[:, :s], full.points[:, s:]
    places = [np.triu_indices(width) for width in widths]
    features, roots = [], []
    for side, (i, j) in zip(sides, places, strict=True):
        product = side[:, i] * side[:, j] / np.where(i == j, math.sqrt(2.0), 1.0)
        product -= product.mean(axis=0)
        values, vectors = np.linalg.eigh(product.T @ product / law.n)
        features.append(product)
        roots.append(vectors / np.sqrt(np.maximum(values, 1e-6)) @ vectors.T)
    rho = np.zeros(max(widths))
    rho[: min(widths)] = np.diag(full.correlation[: min(widths), s : s + min(widths)])
    (i, j), (k, m) = places
    expected = ((i[:, None] == k) & (j[:, None] == m)) * (rho[i] * rho[j])[:, None]
    u, singular, vt = np.linalg.svd(roots[0] @ (features[0].T @ features[1] / law.n) @ roots[1] - expected)
    edge = (math.sqrt(products[0]) + math.sqrt(products[1])) / math.sqrt(law.n)
    edge *= 1.0 + _EDGE * (products[0] * products[1]) ** (-1 / 3)
    if singular[0] < edge:
        return None
    pair = []
    for side, root, vector, (i, j) in zip(sides, roots, (u[:, 0], vt[0]), places, strict=True):
        form = np.zeros((side.shape[1], side.shape[1]))
        form[i, j] = root @ vector / np.where(i == j, math.sqrt(2.0), 1.0)
        values, vectors = np.linalg.eigh(form + form.T)
        pair.append(side @ vectors[:, np.abs(values).argmax()])
    return Hidden(
        f"squares of a direction of x and one of y correlate by {singular[0]:.2f} beyond the copula, where noise shows "
        f"no more than {edge:.2f}",
        [np.stack(pair, axis=1)],
    )
