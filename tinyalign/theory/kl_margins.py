"""KL(p || q) from samples by columns: the divergence of each margin on a line, and that of the two copulas.

Neighbours on a line have hardly any bias, whatever the law, and what ties the columns together is most often an
ellipse: KL(p || q) = sum of the margins' divergences + E_p[log c_p - log c_q], with Gaussian copulas c_p and c_q.
Samples of the fitted pair of laws are the data's own columns in another order, so that nearest neighbours in all
columns can be held against it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from tinyalign.theory.copula import fit_gaussian, normal_scores, rank_columns
from tinyalign.theory.neighbours import kth_distances

__all__ = ["FEW_COLUMNS", "SHARING", "Margins", "margins_divergence", "redraw"]

FloatArray = NDArray[np.float64]
FEW_COLUMNS = 4  # up to which near neighbours are taken on each margin
_KS = {True: (4, 16), False: (16, 64)}  # many columns add up the noise of near neighbours
_POWER = 0.75  # of k / n, with which the bias on a line grows: between a smooth law's and an edge's
_DEPENDENT = 4.0  # standard errors of the squared correlations
SHARING = 1.5  # samples of p share neighbours within p and in q: by how much that raises errors of mean terms


class Margins(NamedTuple):
    """The divergence of margins and Gaussian copulas.

    Attributes:
        value: KL of the fitted laws, in nats.
        gap: by how much the sum over the margins changes between the two numbers of neighbours.
        gap_error: standard error of the gap.
        samples: (n,) log ratios of the margins and copulas at the samples of p.
    """

    value: float
    gap: float
    gap_error: float
    samples: FloatArray


def margins_divergence(p: FloatArray, q: FloatArray) -> Margins:
    """Estimate KL(p || q) of laws with any margins and Gaussian copulas.

    Args:
        p: samples of p.
        q: samples of q.

    Shape:
        p: (n, d). q: (m, d).
    """
    width = p.shape[1]
    limit = min(len(p) - 1, len(q))
    near, far = (min(k, limit) for k in _KS[width <= FEW_COLUMNS])
    terms = np.zeros((len(p), 2))
    for column in range(width):
        own = np.maximum(kth_distances(p[:, column : column + 1], [near, far]), 1e-300)
        other = np.maximum(_across(p[:, column], q[:, column], [near, far]), 1e-300)
        terms += np.log(other) - np.log(own) + math.log(len(q) / (len(p) - 1))
    gap = float(terms[:, 0].mean() - terms[:, 1].mean())
    share = 1.0 / ((far / near) ** _POWER - 1.0) if far > near else 0.0
    local = terms[:, 0] + share * (terms[:, 0] - terms[:, 1])
    if width > 1:
        local = local + _copulas(p, q)
    gap_error = SHARING * float((terms[:, 0] - terms[:, 1]).std()) / math.sqrt(len(p))
    return Margins(float(local.mean()), gap, gap_error, local)


def redraw(points: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Draw from the law with the margins of the points and their Gaussian copula: their columns in another order."""
    correlation = _correlation(normal_scores(points))
    values, vectors = np.linalg.eigh(correlation)
    drawn = rng.normal(size=points.shape) @ (vectors * np.sqrt(np.maximum(values, 0.0))).T
    return np.asarray(np.take_along_axis(np.sort(points, axis=0), rank_columns(drawn), axis=0))


def _across(asked: FloatArray, values: FloatArray, ks: list[int]) -> FloatArray:
    """Distances from each point on a line to the k-th of other values: a window of the sorted values holds them."""
    width = max(ks)
    line = np.concatenate([np.full(width, -np.inf), np.sort(values), np.full(width, np.inf)])
    place = np.searchsorted(line[width:-width], asked)
    window = np.abs(line[place[:, None] + np.arange(2 * width)] - asked[:, None])
    return np.asarray(np.partition(window, [k - 1 for k in ks], axis=1)[:, [k - 1 for k in ks]])


def _copulas(p: FloatArray, q: FloatArray) -> FloatArray:
    """Ratio log c_p - log c_q of the Gaussian copulas at the samples of p, unbiased in the mean, (n,)."""
    scores_p, scores_q = normal_scores(p), normal_scores(q)
    # Where a sample of p stands among those of q, on the normal scale.
    place = np.stack(
        [
            0.5 * (np.searchsorted(line, x) + np.searchsorted(line, x, "right"))
            for line, x in zip(np.sort(q.T), p.T, strict=True)
        ],
        axis=1,
    )
    across = ndtri((place + 0.5) / (len(q) + 1))
    total = np.zeros(len(p))
    for own, at, sign in ((scores_p, scores_p, 1.0), (scores_q, across, -1.0)):
        correlation = _correlation(own)
        if np.array_equal(correlation, np.eye(len(correlation))):
            continue
        inverse = np.linalg.inv(correlation) - np.eye(len(correlation))
        total += sign * -0.5 * (np.einsum("nd,de,ne->n", at, inverse, at) + np.linalg.slogdet(correlation)[1])
        # The determinant of estimated correlations is too small by about half of their number over n, on each side.
        total -= sign * 0.25 * len(correlation) * (len(correlation) - 1) / len(own)
    return total


def _correlation(scores: FloatArray) -> FloatArray:
    """Correlations of normal scores; the identity where they could be noise."""
    found = fit_gaussian(scores, 1).correlation
    width = len(found)
    count = width * (width - 1) / 2
    squares = len(scores) * float((found**2).sum() - width) / 2
    if count == 0 or squares - count < _DEPENDENT * math.sqrt(2 * count):
        return np.eye(width)
    return found
