"""Mutual information of continuous samples: fit an elliptical copula, test it with nearest neighbours, correct it.

The copula has the error of maximum likelihood but may be the wrong law; nearest neighbours assume nothing but are noisy
and biased in many dimensions. The difference between the two, less the same difference on draws of the fitted law,
estimates the divergence of the data from that law, and the bias of the neighbours cancels in it. Where it is within
its noise, the copula's value is returned; otherwise it is added.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from tinyalign.theory.copula import EllipticalCopula, canonical_variates, fit_gaussian, fit_student, normal_scores
from tinyalign.theory.divergence import PLANE_KS, THIN, Divergence, Search, extrapolated, plane_divergence
from tinyalign.theory.entropies import duplicate_warnings
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.hidden import hidden_columns, hidden_direction, hidden_pool
from tinyalign.theory.intervals import information_interval
from tinyalign.theory.neighbours import SHARED
from tinyalign.theory.smooth import rank_departure, smooth_test, squares_departure

__all__ = ["continuous_information"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_FEW = 500  # samples below which weak noise with edges, or weak skew, passes for a normal law
_WHOLE = 16  # columns up to which neighbours are searched in all of them
_PAIRS = 3  # leading canonical pairs beyond that
_TURN = 0.04  # nats that a rotation must add: heavy tails alone make the two differ by less
_MANY = 8  # columns from which neighbours of more samples pay
_SEEN = 4  # columns up to which neighbours see what a single pair hides
_PAIR_REJECT = 4.5  # standard errors by which a canonical pair must differ from the law
_REJECT = 3.0  # standard errors by which pairs of columns must hold more than a law of rotated ones
_MIXING = 2500  # samples up to which that is looked at
_DOUBTED = 2.0  # the same where moments already speak against the law
_DEPARTED = 6.0  # standard errors by which ranks must differ from a law
_HINT = 1.0  # standard errors of the neighbours that then speak against it as well
_RANKS = 2.9  # times 1 / n: noise of normal scores
_COPY = 1e-9  # variance of a column's normal scores that others leave
_SINGULAR = 0.6  # of the loss ln(16 / 4) between k = 4 and 16 that a curve without noise shows
_DETERMINISTIC = (
    "deterministic: x and y are nearly functions of one another; the information is infinite, or larger than this many "
    "samples can measure"
)


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
    numbers = [np.flatnonzero(np.ptp(side, axis=0) > 0) for side in (x, y)]
    x, y = x[:, numbers[0]], y[:, numbers[1]]
    if not x.shape[1] or not y.shape[1]:
        return Estimate(0.0, 0.0, 0.0, method="constant", n=n, warnings=warnings, level=level)
    scores = normal_scores(x), normal_scores(y)
    kept = [_own_columns(side) for side in scores]
    copies = x.shape[1] + y.shape[1] - len(kept[0]) - len(kept[1])
    if copies:
        x, y, scores = x[:, kept[0]], y[:, kept[1]], (scores[0][:, kept[0]], scores[1][:, kept[1]])
        numbers = [side[columns] for side, columns in zip(numbers, kept, strict=True)]
        warnings += (f"copies: {copies} columns are functions of others on their side and were left out",)
    gaussian = _fitted(x, y, scores)
    strongest = float(gaussian.leading(1).correlation[0, 1])
    if 1.0 - strongest**2 < 1e-4:
        warnings += (_DETERMINISTIC,)
    if 1.0 - strongest**2 < 1e-10:
        return Estimate(math.inf, math.log(n), math.inf, method="deterministic", n=n, warnings=warnings, level=level)
    if method == "copula":
        return _parametric(gaussian, "copula", {}, warnings, level)
    if method == "student":
        student = fit_student(gaussian.points, gaussian.split, start=gaussian)
        return _parametric(student, "student", {}, warnings, level)
    moments = smooth_test(gaussian)
    laws: dict[str, EllipticalCopula] = {"copula": gaussian}
    checks: dict[str, Divergence] = {"copula": _check(gaussian, None)}
    if moments.radial:
        student = fit_student(gaussian.points, gaussian.split, start=gaussian, refine=False)
        check = _check(student, checks["copula"])
        if not check.far:
            student = fit_student(gaussian.points, gaussian.split, start=student)
            check = _check(student, checks["copula"])
        if student.log_density > gaussian.log_density + 10 / n:
            laws["student"] = student
            checks["student"] = check
    candidates = {name: law.information for name, law in laws.items()}
    if method == "auto":
        if n < _FEW:
            warnings += (f"small: {n} samples are too few to tell a law from its likes; take {_FEW} or more",)
        wide = len(gaussian.correlation) > _SEEN
        turned = not np.array_equal(gaussian.points[:, 0], scores[0][:, 0])
        if "student" in laws and _holds(laws["student"], checks["student"]):
            found = _parametric(laws["student"], "student", candidates, warnings, level)
            pooled = hidden_pool(laws["student"]) if wide else None
            if pooled:
                found = replace(found, warnings=(*found.warnings, f"law: {pooled.said}; look at the other candidates"))
            found = _pairwise(found, laws["student"]) if wide else found
            return _against_columns(found, scores) if turned else found
        if not moments.turned and (moments.fits or wide) and _holds(gaussian, checks["copula"]):
            found = _parametric(gaussian, "copula", candidates, warnings, level)
            if len(gaussian.correlation) == 2:
                return found
            if wide:
                found = _pairwise(found, gaussian, doubted=not moments.fits)
            found = _with_hidden(found, gaussian, None if turned else numbers)
            return _against_columns(found, scores) if turned else found
    return _corrected(gaussian, checks["copula"], candidates, warnings, level)


def _own_columns(scores: FloatArray) -> list[int]:
    """Columns whose normal scores are no combination of those before them: the others add nothing."""
    columns = list(range(scores.shape[1]))
    correlation = scores.T @ scores / len(scores)
    if len(columns) == 1 or float(np.linalg.eigvalsh(correlation)[0]) > _COPY:
        return columns
    kept: list[int] = []
    for column in columns:
        known = correlation[np.ix_(kept, [column])][:, 0]
        left = 1.0 - known @ np.linalg.solve(correlation[np.ix_(kept, kept)], known) if kept else 1.0
        if left > _COPY:
            kept.append(column)
    return kept


def _fitted(x: FloatArray, y: FloatArray, scores: tuple[FloatArray, FloatArray] | None = None) -> EllipticalCopula:
    """Fit normal scores of the columns, or of the canonical variates where these hold more linear information.

    Both maps are invertible. The second undoes rotations of coordinates that are skewed or heavy-tailed.
    """
    split = x.shape[1]
    plain = fit_gaussian(np.hstack(scores or (normal_scores(x), normal_scores(y))), split)
    if max(split, y.shape[1]) == 1:
        return plain
    left, right, _ = canonical_variates(x / x.std(axis=0), y / y.std(axis=0))
    turned = fit_gaussian(normal_scores(np.hstack([left, right])), left.shape[1])
    return turned if turned.information > plain.information + _TURN else plain


def _check(law: EllipticalCopula, other: Divergence | None) -> Divergence:
    """The law beside the neighbours of the data; laws over the same columns share one search."""
    small = _reduced(law)
    width = len(small.correlation)
    if other is not None and small is law:
        return Divergence(law, other.search)
    points = law.points if math.isinf(law.freedom) and small is law else normal_scores(small.points)
    return Divergence(small, Search(points, small.split, head=len(points) if width == 2 else THIN))


def _holds(law: EllipticalCopula, check: Divergence) -> bool:
    """Whether neighbours accept the law; where ranks speak clearly against it, a hint of theirs is enough."""
    if not check.accepted:
        return False
    value, error = check.measured
    return value < _HINT * error or rank_departure(law)[0] < _DEPARTED


def _reduced(law: EllipticalCopula) -> EllipticalCopula:
    return law if len(law.correlation) <= _WHOLE else law.leading(_PAIRS)


def _parametric(
    law: EllipticalCopula, name: str, candidates: dict[str, float], warnings: tuple[str, ...], level: float
) -> Estimate:
    local = law.pointwise()
    # Ranks bias the degrees of freedom upward; the mean log ratio moves with them far less than the law's own value.
    value = law.information + _rank_bias(law) if math.isinf(law.freedom) else float(local.mean()) - law.bias
    left, right = law.split, len(law.correlation) - law.split
    low, high, error = information_interval(value, local, left * right, level)
    departure, doubted = rank_departure(law)
    if doubted:
        warnings += (
            f"law: ranks of the leading canonical pairs depart from the fitted {name} law by {departure:.1f} standard "
            "errors; the interval takes the law for granted, so look at the other candidates",
        )
    if len(law.correlation) > _WHOLE and math.isinf(law.freedom):
        departure, doubted = squares_departure(law)
        if doubted:
            warnings += (
                f"law: squares of a column of x and one of y move together by {departure:.1f} standard errors beyond "
                "the copula, in more columns than neighbours can search; what they share may not be in the value",
            )
    return Estimate(
        value,
        low,
        high,
        method=name,
        n=law.n,
        samples=local,
        candidates={**candidates, name: value},
        warnings=warnings,
        level=level,
        std_error=error,
        details={"freedom": law.freedom, "dimensions": (left, right)},
    )


def _rank_bias(law: EllipticalCopula) -> float:
    """What normal scores of ranks lose of a strong correlation, in nats, of one column a side.

    They stand off the samples' own scores by a noise, which counts beside what the correlation leaves. Its size was
    fitted to simulations over correlations 0.6 to 0.99 and n of 300 to 5,000 (tests/theory/test_continuous.py repeats
    one of them).
    """
    if len(law.correlation) > 2:
        return 0.0
    square = float(law.correlation[0, 1]) ** 2
    left = max(1.0 - square, 1e-12)
    return 0.5 * math.log1p(_RANKS * square * left**-0.75 / law.n)


def _pairwise(found: Estimate, law: EllipticalCopula, *, doubted: bool = False) -> Estimate:
    """Add what the leading canonical pairs hold beyond the law, where neighbours in all columns saw nothing.

    In many columns neighbours miss a pair that is bound by something other than an ellipse; in its own plane they
    measure it.

    Args:
        found: the law's own estimate.
        law: the law.
        doubted: moments speak against the law, so less is asked of the neighbours.
    """
    small = law.leading(_PAIRS)
    added, errors = 0.0, []
    for pair in range(min(small.split, len(small.correlation) - small.split) if doubted else 1):
        value, error, clear = plane_divergence(small, pair)
        if clear > (_DOUBTED if doubted else _PAIR_REJECT):
            added += value
            errors.append(error)
    if not errors and not doubted:
        return found
    line = (
        f"bias: the leading canonical pairs are not those of an elliptical copula; nearest neighbours in their planes "
        f"added {added:+.3f} nats, and what the other columns hold is taken as elliptical"
    )
    return _raised(found, added, errors, line)


def _raised(found: Estimate, added: float, errors: list[float], *lines: str) -> Estimate:
    error = math.hypot(found.std_error, *errors)
    value, half = found.value + added, float(ndtri(0.5 + found.level / 2)) * error
    return replace(
        found, value=value, low=value - half, high=value + half, std_error=error, method="surrogate", samples=None,
        candidates={**found.candidates, "surrogate": value}, warnings=(*found.warnings, *lines),
    )  # fmt: skip


def _with_hidden(found: Estimate, law: EllipticalCopula, numbers: list[IntArray] | None) -> Estimate:
    """Add what single columns, or one direction a side, hold beyond the law, where nothing was added before."""
    screens = [hidden_pool(law)]
    if len(law.correlation) > _SEEN:
        screens += [hidden_columns(law, numbers), hidden_direction(law)]
    seen = [hidden for hidden in screens if hidden is not None]
    if not seen:
        return found
    if found.value != found.candidates["copula"]:
        lines = [f"law: {hidden.said}; this may be in the value only in part" for hidden in seen]
        return replace(found, warnings=(*found.warnings, *lines))
    added, errors = 0.0, []
    for hidden in seen:
        measured = [plane_divergence(fit_gaussian(normal_scores(plane), 1), 0) for plane in hidden.planes]
        clear = [(value, error) for value, error, sure in measured if sure > _DOUBTED]
        total = sum(value for value, _ in clear)
        if total > added:
            added, errors = total, [error for _, error in clear]
    lines = [
        f"law: {hidden.said}; nearest neighbours in such planes added {added:+.3f} nats in all, and what else is bound "
        "otherwise than by the copula is not in the value"
        for hidden in seen
    ]
    if not errors:
        return replace(found, warnings=(*found.warnings, *lines))
    return _raised(found, added, errors, *lines)


def _against_columns(found: Estimate, scores: tuple[FloatArray, FloatArray]) -> Estimate:
    """Where the law is one of rotated columns and samples are few, hold it against pairs of the columns themselves.

    A rotation of many independent pairs mixes them, until they look normal. What nearly uncorrelated pairs hold in
    their planes is a part of the information.
    """
    plain = fit_gaussian(np.hstack(scores), scores[0].shape[1])
    pooled = hidden_pool(plain) if found.n <= _MIXING else None
    if pooled is None:
        return found
    measured = [plane_divergence(fit_gaussian(normal_scores(plane), 1), 0) for plane in pooled.planes]
    more = plain.information + sum(value for value, _, _ in measured) - found.value
    errors = [error for _, error, _ in measured]
    if more < _REJECT * math.hypot(found.std_error, *errors):
        return found
    line = (
        f"law: {len(measured)} pairs of single columns hold {more:.3f} nats more in their planes than the law of "
        "rotated columns in all; this was added"
    )
    return _raised(found, more, errors, line)


def _corrected(
    law: EllipticalCopula,
    check: Divergence,
    candidates: dict[str, float],
    warnings: tuple[str, ...],
    level: float,
) -> Estimate:
    """The law's information plus the divergence of the data from it, extrapolated to no neighbours."""
    n, width = law.n, len(check.law.correlation)
    if len(law.correlation) > _MANY:
        check = check.on_more()
    ratio = float(check.law.pointwise().mean())
    raw = check.search.nearest - ratio
    # All samples say how far the nearest neighbours are off, the head how that grows with k.
    divergences = raw + (check.missed - check.missed[:, :1]).mean(axis=0)
    if width > 2 and divergences[-1] < 0.5 * ratio:
        # A law that explains most of the information shares most of the neighbours' bias.
        divergences -= check.drawn.mean(axis=0)
    gap = float(divergences[0] - divergences[-1])
    divergence = extrapolated(divergences, width, n, ratio, check.noise)
    shift = divergence - raw
    if gap > _SINGULAR * math.log(PLANE_KS[-1] / PLANE_KS[0]):
        warnings += (_DETERMINISTIC,)
    value = float(law.pointwise().mean()) + divergence
    error = SHARED * float(check.search.terms[:, 0].std()) / math.sqrt(n)
    half = float(ndtri(0.5 + level / 2)) * error + 0.5 * abs(gap)
    doubt = max(abs(gap), abs(shift))
    warnings += (
        f"bias: no elliptical copula fits, so nearest neighbours were used, corrected by {shift:+.3f} nats; a bias "
        f"of up to about {doubt:.3f} nats is only partly in the interval",
    )
    dimensions = (law.split, len(law.correlation) - law.split)
    if check.law is not law:
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
        candidates={**candidates, "ksg": check.search.nearest, "surrogate": value},
        warnings=warnings,
        level=level,
        std_error=error,
        details={"k": tuple(check.search.ks), "divergence": divergence, "dimensions": dimensions},
    )
