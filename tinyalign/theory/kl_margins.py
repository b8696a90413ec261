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
from scipy.special import digamma, ndtri

from tinyalign.theory.copula import fit_gaussian, normal_scores, rank_columns
from tinyalign.theory.neighbours import kth_distances

__all__ = ["FEW_COLUMNS", "SHARING", "Margins", "margins_divergence", "redraw"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
FEW_COLUMNS = 4  # up to which near neighbours are taken on each margin
_KS = {True: (4, 16), False: (16, 64)}  # many columns add up the noise of near neighbours
_POWER = 0.75  # of k / n, with which the bias on a line grows: between a smooth law's and an edge's
_DEPENDENT = 4.0  # standard errors of the squared correlations
_TAIL = 12  # samples of q that a tail is read from at least
_EDGE = 16  # from the last sample of q on its neighbours are few
_NORMAL = (0.8, 1.25)  # powers of the distance with which normal scores grow along a normal tail
SHARING = 1.5  # samples of p share neighbours within p and in q: by how much that raises errors of mean terms


class Margins(NamedTuple):
    """The divergence of margins and Gaussian copulas.

    Attributes:
        value: KL of the fitted laws, in nats.
        gap: by how much the sum over the margins changes between the two numbers of neighbours.
        gap_error: standard error of the gap.
        tail: by how much carrying on q's margins beyond their samples changed the value.
        samples: (n,) log ratios of the margins and copulas at the samples of p.
        coarse: (n,) the same from many neighbours on each margin: less noise, and more bias.
    """

    value: float
    gap: float
    gap_error: float
    tail: float
    samples: FloatArray
    coarse: FloatArray

    @property
    def error(self) -> float:
        """Standard error of the value, were it a mean of terms of its own."""
        return SHARING * float(self.samples.std(ddof=1)) / math.sqrt(len(self.samples))

    @property
    def both(self) -> FloatArray:
        """Both, (n, 2)."""
        return np.stack([self.samples, self.coarse], axis=1)


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
    share = 1.0 / ((far / near) ** _POWER - 1.0) if far > near else 0.0
    tail = 0.0
    for column in range(width):
        own = np.maximum(kth_distances(p[:, column : column + 1], [near, far]), 1e-300)
        other = np.maximum(_across(p[:, column], q[:, column], [near, far]), 1e-300)
        ratio = np.log(other) - np.log(own) + math.log(len(q) / (len(p) - 1))
        rows, log_q = _beyond(p[:, column], q[:, column])
        if len(rows):
            carried = digamma(near) - math.log(2 * (len(p) - 1)) - np.log(own[rows, 0]) - log_q
            tail += float((carried - ratio[rows, 0] - share * (ratio[rows, 0] - ratio[rows, 1])).sum()) / len(p)
            ratio[rows] = carried[:, None]
        terms += ratio
    gap = float(terms[:, 0].mean() - terms[:, 1].mean())
    copulas = _copulas(p, q) if width > 1 else 0.0
    local = terms[:, 0] + share * (terms[:, 0] - terms[:, 1]) + copulas
    gap_error = SHARING * float((terms[:, 0] - terms[:, 1]).std()) / math.sqrt(len(p))
    return Margins(float(local.mean()), gap, gap_error, tail, local, terms[:, 1] + copulas)


def _beyond(p: FloatArray, q: FloatArray) -> tuple[IntArray, FloatArray]:
    """Samples of p on a line beyond nearly all of q's, where q has a tail like a normal law's, and log q there.

    Neighbours take the density of q to fall off like the distance to its last samples. A normal tail falls much
    faster, and is carried on from its largest samples: their normal scores grow as a power near 1 of the distance to
    the median. Lighter ones end at an edge and heavier ones have samples far out; both are left to the neighbours.
    """
    centre = float(np.median(q))
    count = int(min(len(q) / 10, 3 * math.sqrt(len(q))))
    rows, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    if count < _TAIL:
        return rows[0], values[0]
    weights = np.arange(count, 0.0, -1.0)
    scores = np.log(-ndtri((weights - 0.375) / (len(q) + 0.25)))
    for sign in (1.0, -1.0):
        largest = np.sort(sign * (q - centre))[-count:]
        out = np.flatnonzero(sign * (p - centre) > largest[-min(_EDGE, count // 6)])
        if not len(out) or largest[0] <= 0:
            continue
        places = np.log(largest)
        middle = np.average([places, scores], axis=1, weights=weights)
        power = float(np.polyfit(places, scores, 1, w=np.sqrt(weights))[0])
        if not _NORMAL[0] < power < _NORMAL[1]:
            continue
        power = min(power, 1.0)
        distance = sign * (p[out] - centre)
        score = np.exp(middle[1] + power * (np.log(distance) - middle[0]))
        rows.append(out)
        values.append(np.log(score * power / distance) - 0.5 * (score**2 + math.log(2 * math.pi)))
    return np.concatenate(rows), np.concatenate(values)


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
