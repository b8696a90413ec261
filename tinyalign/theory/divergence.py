"""How far samples are from a fitted copula, in nats: nearest neighbours on the data against the law itself.

Every law over the same columns shares one search of the data; what a law alone can answer (draws of it, and their
neighbours) is computed when a decision needs it and kept.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tinyalign.theory.copula import EllipticalCopula, normal_scores
from tinyalign.theory.counting import chebyshev_tree
from tinyalign.theory.nearest import ksg_terms

__all__ = ["Divergence", "Search", "extrapolated", "plane_bias", "plane_divergence"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
PLANE_KS, SPACE_KS = [4, 16], [4, 8, 16]
THIN = 1500  # samples whose neighbours test a law in more than two dimensions
_THICK = 3000  # the same for measuring what is missed in many columns, where extrapolation amplifies noise
_CLEAR = 0.05  # nats: neighbours are biased toward zero there, so more than this on top of a law speaks against it
_REJECT = 3.0  # standard errors of the divergence
_SHARED = 1.3  # at k = 16 more neighbours are shared than at the 4 of `neighbours.SHARED`
# Bias of KSG on a bivariate normal of information I at n samples: slope * I * (5000 / n)^power, fitted to simulations
# over correlations 0 to 0.98 and n from 2,000 to 10,000 (tests/theory/test_continuous.py repeats one of them).
_PLANE_BIAS = {4: (0.0110, 0.42), 16: (0.0155, 0.40)}


class Search:
    """Nearest-neighbour terms of samples on normal scores.

    A part of them (the head) has the terms of several neighbours; the others get those of the nearest alone, when they
    are needed.
    """

    def __init__(self, points: FloatArray, split: int, *, head: int = THIN) -> None:
        self.points, self.split = points, split
        n, width = points.shape
        self.ks = [min(k, n - 2) for k in (PLANE_KS if width == 2 else SPACE_KS)]
        order = np.random.default_rng(0).permutation(n)
        self.head = order[:head]
        self._rest = order[len(self.head) :]
        self._tree = chebyshev_tree(points)

    @cached_property
    def terms(self) -> FloatArray:
        """The (len(head), len(ks)) terms of the head."""
        return self._of(self.head, self.ks)

    @cached_property
    def nearest(self) -> float:
        """Mean term of the nearest neighbours (the first of ``ks``) over all samples: the KSG estimate."""
        total = float(self.terms[:, 0].sum())
        if len(self._rest):
            total += float(self._of(self._rest, self.ks[:1]).sum())
        return total / len(self.points)

    def grown(self, head: int) -> Search:
        """Return the same search with more samples in its head."""
        added = self._rest[: max(head - len(self.head), 0)]
        if not len(added):
            return self
        more = copy(self)
        more.head, more._rest = np.concatenate([self.head, added]), self._rest[len(added) :]
        more.terms = np.vstack([self.terms, self._of(added, self.ks)])
        return more

    def _of(self, rows: IntArray, ks: list[int]) -> FloatArray:
        radii = self._tree.query(self.points[rows], max(ks) + 1)[0][:, ks]
        x, y = self.points[:, : self.split], self.points[:, self.split :]
        return ksg_terms(x, y, radii, ks, rows)


@dataclass
class Divergence:
    """One fitted law beside the neighbours of the data.

    Attributes:
        law: the law, over columns that neighbours can be searched in.
        search: neighbours of the data on the same columns.
        draws: samples of a draw of the law whose neighbours say what is pure bias.
    """

    law: EllipticalCopula
    search: Search
    draws: int = THIN // 2

    def on_more(self) -> Divergence:
        """Return the same with neighbours of more samples and of more draws."""
        return Divergence(self.law, self.search.grown(_THICK), _THICK)

    @property
    def accepted(self) -> bool:
        """Whether the data are within the noise of the law."""
        value, error = self.measured
        return bool(value < _REJECT * error)

    @property
    def far(self) -> bool:
        """Whether the data are so far from the law that no bias of the neighbours explains it."""
        coarse = self.missed[:, 1:].mean(axis=1)
        error = _SHARED * float(coarse.std()) / math.sqrt(len(coarse))
        return bool(float(coarse.mean()) > max(_CLEAR, 2 * _REJECT * error))

    @cached_property
    def measured(self) -> tuple[float, float]:
        """The divergence and its standard error, less the neighbours' bias under the law."""
        n = len(self.missed)
        if len(self.search.ks) == 2:
            error = _SHARED * float(self.missed[:, 1].std()) / math.sqrt(n)
            bias = plane_bias(self.law.information, self.law.n, PLANE_KS[1])
            return float(self.missed[:, 1].mean()) - bias, error
        coarse = self.missed[:, 1:].mean(axis=1)
        value, error = float(coarse.mean()), _SHARED * float(coarse.std()) / math.sqrt(n)
        if self.far:
            return value, error
        drawn = self.drawn[:, 1:].mean(axis=1)
        error = math.sqrt(float(coarse.var()) / n + float(drawn.var()) / len(drawn))
        return value - float(drawn.mean()), error

    @cached_property
    def missed(self) -> FloatArray:
        """Neighbour terms of the head less the law's log ratio there, (m, len(ks))."""
        head = self.search.head
        return np.asarray(self.search.terms - self.law.pointwise(self.law.points[head])[:, None])

    @property
    def noise(self) -> float:
        """Standard error of the difference between the nearest and the farthest neighbours' estimates."""
        apart = self.search.terms[:, 0] - self.search.terms[:, -1]
        return _SHARED * float(apart.std()) / math.sqrt(len(apart))

    @cached_property
    def drawn(self) -> FloatArray:
        """The same on draws of the law itself: pure bias and noise of the neighbours."""
        points = self.law.draw(self.law.n)
        search = Search(normal_scores(points), self.law.split, head=self.draws)
        return np.asarray(search.terms - self.law.pointwise(points[search.head])[:, None])


def plane_bias(information: float, n: int, k: int) -> float:
    """Expected KSG error in 1+1 dimensions along a smooth ridge that holds this much information."""
    slope, power = _PLANE_BIAS[k]
    return float(slope * (5000 / n) ** power * max(information, 0.0))


def plane_divergence(law: EllipticalCopula, pair: int) -> tuple[float, float, float]:
    """Measure one canonical pair of a law in the plane, where neighbours are nearly without bias.

    Returns:
        The divergence of the pair from the law's own, extrapolated to no neighbours; its standard error; and how many
        standard errors the divergence is above zero before it is extrapolated.
    """
    s = law.split
    columns = [pair, s + pair]
    points = law.points[:, columns]
    own = EllipticalCopula(law.correlation[np.ix_(columns, columns)], 1, law.n, law.freedom, points, np.nan)
    check = Divergence(own, Search(normal_scores(points), 1, head=law.n))
    value, error = check.measured
    ratio = float(own.pointwise().mean())
    return extrapolated(check.missed.mean(axis=0), 2, law.n, ratio, check.noise), error, value / error


def extrapolated(divergences: FloatArray, width: int, n: int, ratio: float, noise: float) -> float:
    """Extrapolate divergences at each k to no neighbours.

    Where k hardly matters there is no bias to speak of and the estimates are averaged; where it does, the bias is taken
    to grow as a power of k.

    Args:
        divergences: one per k, the nearest neighbours first.
        width: columns in which neighbours were searched.
        n: number of samples.
        ratio: what the law itself says of the information.
        noise: standard error of the difference between the nearest and the farthest neighbours.
    """
    gap = float(divergences[0] - divergences[-1])
    trust = gap**2 / (gap**2 + noise**2) if gap > 0 else 0.0
    near = 0.25 if width == 2 else 0.5
    settled = float(near * divergences[0] + (1 - near) * divergences[-1])
    if width == 2:
        settled -= plane_bias(ratio + settled, n, PLANE_KS[1])
    sharp = float(divergences[0]) + gap / (_growth(width) - 1.0)
    return trust * sharp + (1 - trust) * settled


def _growth(width: int) -> float:
    """By how much the bias grows from k = 4 to k = 16.

    It grows as a power of k / n: 3 / 4 on the plane, where it comes from sharp edges, and from 1 / 1 in three columns
    to 1 / 9 in ten, slower than the radius squared because most of what is missed has saturated. The powers were fitted
    to simulated spirals, ridges, clusters, products and Student laws. What three values of k say of the power itself is
    mostly noise.
    """
    if width == 2:
        return float(4.0**0.75)
    return float(4.0 ** (1.0 / max(width - 2.3 + 0.35 * max(width - 6, 0), 1.0)))
