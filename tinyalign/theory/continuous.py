"""Mutual information of continuous samples: fit an elliptical copula, test it with nearest neighbours, correct it.

The copula has the error of maximum likelihood but may be the wrong law; nearest neighbours assume nothing but are noisy
and biased in many dimensions. The difference between the two, less the same difference on draws of the fitted law,
estimates the divergence of the data from that law, and the bias of the neighbours cancels in it. Where it is within
its noise, the copula's value is returned; otherwise it is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyalign.theory.copula import (
    EllipticalCopula,
    canonical_variates,
    fit_gaussian,
    fit_student,
    normal_scores,
)
from tinyalign.theory.entropies import duplicate_warnings
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.intervals import information_interval
from tinyalign.theory.nearest import ksg_local
from tinyalign.theory.neighbours import subset_interval

__all__ = ["continuous_information"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_KS = [4, 16]
_CHECK_K = 10
_THIN = 1500  # samples whose neighbours are counted to test a law in more than three dimensions
_WHOLE = 5  # columns a side up to which neighbours are searched in all of them
_PAIRS = 3  # leading canonical pairs beyond that
_TURN = 0.04  # nats that a rotation must add: heavy tails alone make the two differ by less
_REJECT = 3.0  # standard errors of the divergence
_NOISE = {2: 0.005}  # nats by which k = 4 and 16 differ without bias at a few thousand samples
_NOISE_ELSEWHERE = 0.015
# Neighbouring samples share neighbours, so the mean of their terms varies more than if they were independent.
_SHARED = 1.3
# Bias of KSG on a bivariate normal of information I at n samples: slope * I * (5000 / n)^power, fitted to simulations
# over correlations 0 to 0.98 and n from 2,000 to 10,000 (tests/theory/test_continuous.py repeats one of them).
_SINGULAR = 0.6  # of the loss ln(16 / 4) between k = 4 and 16 that a curve without noise shows
_DETERMINISTIC = (
    "deterministic: x and y are nearly functions of one another; the information is infinite, or larger than this many "
    "samples can measure"
)
_PLANE_BIAS = {4: (0.0110, 0.42), 16: (0.0155, 0.40)}


@dataclass(frozen=True)
class _Check:
    """Nearest neighbours against one fitted law: how far the data are from it, in nats."""

    law: EllipticalCopula
    divergence: float
    error: float

    @property
    def accepted(self) -> bool:
        return bool(self.divergence < _REJECT * self.error)


class _Search:
    """Nearest neighbours of the data on normal scores: every law over the same columns shares one search."""

    def __init__(self, points: FloatArray, split: int) -> None:
        self.points, self.split = points, split
        self.found: dict[tuple[tuple[int, ...], bool], list[FloatArray]] = {}

    def terms(self, ks: list[int], rows: IntArray | None) -> list[FloatArray]:
        key = (tuple(ks), rows is None)
        if key not in self.found:
            self.found[key] = _terms(self.points, self.split, ks, rows)
        return self.found[key]


def _terms(points: FloatArray, split: int, ks: list[int], rows: IntArray | None) -> list[FloatArray]:
    capped = [min(k, len(points) - 2) for k in ks]
    return ksg_local(points[:, :split], points[:, split:], capped, rows=rows)


def continuous_information(x: FloatArray, y: FloatArray, *, level: float = 0.95, method: str = "auto") -> Estimate:
    """Estimate I(X; Y) of continuous samples, (n, dx) and (n, dy), with all candidates shown.

    Args:
        x: samples.
        y: samples, row by row with x.
        level: nominal coverage.
        method: ``"auto"``, or one of ``"copula"``, ``"student"``, ``"surrogate"`` without choosing.
    """
    n = len(x)
    warnings = duplicate_warnings(x, "x") + duplicate_warnings(y, "y")
    x, y = x[:, np.ptp(x, axis=0) > 0], y[:, np.ptp(y, axis=0) > 0]
    if not x.shape[1] or not y.shape[1]:
        return Estimate(0.0, 0.0, 0.0, method="constant", n=n, warnings=warnings, level=level)
    left, right = _representation(x, y)
    split = left.shape[1]
    gaussian = fit_gaussian(np.hstack([left, right]), split)
    strongest = float(gaussian.leading(1).correlation[0, 1])
    if 1.0 - strongest**2 < 1e-4:
        warnings += (_DETERMINISTIC,)
    if 1.0 - strongest**2 < 1e-10:
        return Estimate(math.inf, math.log(n), math.inf, method="deterministic", n=n, warnings=warnings, level=level)
    if method == "copula":
        return _parametric(gaussian, "copula", {}, warnings, level)
    if method == "student":
        student = fit_student(gaussian.points, split, start=gaussian.correlation)
        return _parametric(student, "student", {}, warnings, level)
    smooth, radial = _smooth_test(gaussian)
    checks = {}
    search = _Search(gaussian.points, split) if _reduced(gaussian) is gaussian else None
    if radial:
        student = fit_student(gaussian.points, split, start=gaussian.correlation)
        if student.log_density > gaussian.log_density + 10 / n:
            checks["student"] = _check(student, search)
    if "student" not in checks or not checks["student"].accepted:
        checks["copula"] = _check(gaussian, search)
    candidates = {key: item.law.information for key, item in checks.items()}
    if method == "auto":
        candidates["copula"] = gaussian.information
        for name, check in checks.items():
            if check.accepted and (smooth or name == "student"):
                return _parametric(check.law, name, candidates, warnings, level)
    closest = min(checks.values(), key=lambda item: item.divergence)
    return _corrected(closest, search, candidates, warnings, level)


def _representation(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Normal scores of the columns, or of the canonical variates where these hold more linear information.

    Both maps are invertible. The second undoes rotations of coordinates that are skewed or heavy-tailed.
    """
    plain = normal_scores(x), normal_scores(y)
    if max(x.shape[1], y.shape[1]) == 1:
        return plain
    deviation_x, deviation_y = x.std(axis=0), y.std(axis=0)
    left, right, _ = canonical_variates(x / deviation_x, y / deviation_y)
    turned = normal_scores(left), normal_scores(right)
    values = [fit_gaussian(np.hstack(pair), pair[0].shape[1]).information for pair in (plain, turned)]
    return turned if values[1] > values[0] + _TURN else plain


def _check(law: EllipticalCopula, search: _Search | None) -> _Check:
    """Measure the divergence of the data from a law with nearest neighbours, on the leading canonical pairs."""
    small = _reduced(law)
    n = law.n
    search = search or _Search(normal_scores(small.points), small.split)
    if len(small.correlation) == 2:
        terms = search.terms(_KS, None)
        ratio = small.pointwise()
        raw = [float((term - ratio).mean()) for term in terms]
        error = _SHARED * float((terms[1] - ratio).std()) / math.sqrt(n)
        bias = _plane_bias(small.information, n, _KS[1])
        return _Check(law, raw[1] - bias, error)
    rows = np.random.default_rng(0).permutation(n)[: _THIN if len(small.correlation) > 3 else n]
    data = search.terms([_CHECK_K], rows)[0] - small.pointwise(small.points[rows])
    drawn = _on_draws(small, [_CHECK_K], rows)[0]
    error = math.sqrt(float(data.var() + drawn.var()) / len(rows))
    return _Check(law, float(data.mean() - drawn.mean()), error)


def _on_draws(law: EllipticalCopula, ks: list[int], rows: IntArray | None) -> list[FloatArray]:
    """Neighbour terms less the log ratio on draws of the law itself: pure bias and noise of the neighbours."""
    points = law.draw(law.n)
    terms = _terms(normal_scores(points), law.split, ks, rows)
    ratio = law.pointwise(points if rows is None else points[rows])
    return [term - ratio for term in terms]


def _reduced(law: EllipticalCopula) -> EllipticalCopula:
    width = len(law.correlation)
    return law if max(law.split, width - law.split) <= _WHOLE else law.leading(_PAIRS)


def _plane_bias(information: float, n: int, k: int) -> float:
    """Expected KSG error in 1+1 dimensions along a smooth ridge that holds this much information."""
    slope, power = _PLANE_BIAS[k]
    return float(slope * (5000 / n) ** power * max(information, 0.0))


def _smooth_test(law: EllipticalCopula) -> tuple[bool, bool]:
    """Test the Gaussian copula with Hermite moments of the canonical pairs; say also if tails look radial.

    Returns:
        Whether the moments fit (each has variance 1 / n under the law), and whether the squared radius varies more
        than it should, as under a Student copula.

    Source:
        Neyman 1937 (smooth tests); Mardia 1970 (kurtosis).
    """
    small = law.leading(_WHOLE)
    n, s = law.n, small.split
    pairs = min(s, len(small.correlation) - s)
    u = small.points[:, :pairs]
    rho = np.diag(small.correlation[:pairs, s : s + pairs])
    e = (small.points[:, s : s + pairs] - rho * u) / np.sqrt(np.maximum(1 - rho**2, 1e-12))
    u2, e2 = (u**2 - 1) / math.sqrt(2), (e**2 - 1) / math.sqrt(2)
    u3, e3 = (u**3 - 3 * u) / math.sqrt(6), (e**3 - 3 * e) / math.sqrt(6)
    moments = np.stack([(a * b).mean(axis=0) for a, b in ((u, e2), (u2, e), (u2, e2), (u, e3), (u3, e))])
    statistic = n * float((moments**2).sum())
    count = moments.size
    # Wilson-Hilferty: the cube root of a chi-square over its degrees is nearly normal.
    deviation = ((statistic / count) ** (1 / 3) - (1 - 2 / (9 * count))) / math.sqrt(2 / (9 * count))
    width = len(small.correlation)
    whitened = np.hstack([u, e]) if pairs * 2 == width else small.points
    radius = (whitened**2).sum(axis=1)
    d = whitened.shape[1]
    kurtosis = (float((radius**2).mean()) - d * (d + 2)) / math.sqrt(8 * d * (d + 2) / n)
    return deviation < 3.5, kurtosis > 4.0 or float(moments[2].max()) * math.sqrt(n) > 4.0


def _parametric(
    law: EllipticalCopula, name: str, candidates: dict[str, float], warnings: tuple[str, ...], level: float
) -> Estimate:
    value = law.information
    local = law.pointwise()
    left, right = law.split, len(law.correlation) - law.split
    low, high, error = information_interval(value, local, left * right, level)
    return Estimate(
        value,
        low,
        high,
        method=name,
        n=law.n,
        samples=local,
        candidates=candidates or {name: value},
        warnings=warnings,
        level=level,
        std_error=error,
        details={"freedom": law.freedom, "dimensions": (left, right)},
    )


def _corrected(
    check: _Check,
    search: _Search | None,
    candidates: dict[str, float],
    warnings: tuple[str, ...],
    level: float,
) -> Estimate:
    """The law's information plus the divergence of the data from it, extrapolated to no neighbours."""
    law, small = check.law, _reduced(check.law)
    n, width = law.n, len(small.correlation)
    search = search or _Search(normal_scores(small.points), small.split)
    terms = search.terms(_KS, None)
    ratio = float(small.pointwise().mean())
    raw = [float(item.mean()) - ratio for item in terms]
    divergences: FloatArray = np.array(raw)
    if width > 2 and check.divergence < 0.5 * ratio:
        # A law that explains most of the information shares most of the neighbours' bias.
        rows = np.random.default_rng(0).permutation(n)[:_THIN]
        divergences -= [item.mean() for item in _on_draws(small, _KS, rows)]
    # The bias of a neighbour estimate grows as (k / n)^(2 / d) in many dimensions, and on the plane, where it comes
    # from sharp edges, between the powers 1 / 2 and 1.
    reach = [k ** min(2.0 / width, 0.75) for k in _KS]
    gap = divergences[0] - divergences[1]
    extrapolated = divergences[0] + gap * reach[0] / (reach[1] - reach[0])
    trust = gap**2 / (gap**2 + _NOISE.get(width, _NOISE_ELSEWHERE) ** 2) if gap > 0 else 0.0
    settled = divergences[1] if width > 2 else 0.25 * divergences[0] + 0.75 * divergences[1]
    if width == 2:
        settled -= _plane_bias(ratio + float(settled), n, _KS[1])
    divergence = float(trust * extrapolated + (1 - trust) * settled)
    shift = divergence - raw[0]
    if float(gap) > _SINGULAR * math.log(_KS[1] / _KS[0]):
        warnings += (_DETERMINISTIC,)
    value = float(law.pointwise().mean()) + divergence
    left, right = search.points[:, : small.split], search.points[:, small.split :]

    def part(rows: IntArray) -> float:
        return float(ksg_local(left[rows], right[rows], [min(_KS[0], len(rows) - 1)])[0].mean())

    error, quantile = subset_interval(part, n, _KS[0], level)
    half = quantile * error + 0.5 * abs(float(gap))
    doubt = max(abs(float(gap)), abs(shift))
    warnings += (
        f"bias: no elliptical copula fits, so nearest neighbours were used, corrected by {shift:+.3f} nats; a bias "
        f"of up to about {doubt:.3f} nats is only partly in the interval",
    )
    dimensions = (law.split, len(law.correlation) - law.split)
    if small is not law:
        warnings += (
            f"dimension: {dimensions[0]}+{dimensions[1]} dimensions without an elliptical copula; what lies beyond the "
            f"leading {_PAIRS} canonical pairs is taken as elliptical",
        )
    return Estimate(
        value,
        value - half,
        value + half,
        method="surrogate",
        n=n,
        candidates={**candidates, "ksg": float(terms[0].mean()), "surrogate": value},
        warnings=warnings,
        level=level,
        std_error=error,
        details={"k": tuple(_KS), "divergence": divergence, "dimensions": dimensions},
    )
