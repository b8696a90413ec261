"""Nearest-neighbour mutual information: KSG 1 and 2, labels (Ross), mixtures (Gao) and the conditional form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from tinyalign.theory._input import as_labels, as_matrix, check_level
from tinyalign.theory.copula import normal_scores
from tinyalign.theory.counting import count_within, counts_within
from tinyalign.theory.entropies import duplicate_warnings
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.neighbours import BIASED, CLEAR, SHARED, kth_distance, kth_distances, neighbour_interval

__all__ = ["conditional_ksg", "ksg", "ksg_local", "ksg_terms", "mixed_ksg", "ross", "small_warning"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_BIASED_DIMENSIONS = 3
_SMALL = 500
_HEAVY = 0.1  # of the samples that share a value, from which it is an atom
_APART = 1e4  # between atoms, in standard deviations


def ksg(
    x: Any, y: Any, *, k: int = 4, variant: Literal[1, 2] = 1, standardize: bool = True, level: float = 0.95
) -> Estimate:
    """Estimate mutual information of continuous samples from nearest neighbours.

    Args:
        x: samples.
        y: samples, row by row with x.
        k: which neighbour.
        variant: KSG 1 (cubes) or 2 (rectangles).
        standardize: give every column unit variance first.
        level: nominal coverage; the interval extrapolates the variance from disjoint subsets and holds no bias.

    Shape:
        x: (n,) or (n, dx). y: (n,) or (n, dy).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths, n at most k, or an unknown variant.

    Source:
        Kraskov, Stoegbauer and Grassberger 2004, arXiv cond-mat/0305641, equations 8 and 9.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=2000)
        >>> bool(abs(ksg(x, x + rng.normal(size=2000)).value - 0.5 * np.log(2)) < 0.06)
        True
    """
    check_level(level, "ksg")
    if variant not in (1, 2):
        raise ValueError(f"ksg: variant must be 1 or 2, got {variant!r}. Use 1 for low bias, 2 for low variance.")
    left, right = paired(x, y, k, "ksg")
    warnings = duplicate_warnings(left, "x") + duplicate_warnings(right, "y")
    if standardize:
        left, right = _unit(left), _unit(right)
    warnings += dimension_warning(left.shape[1], right.shape[1]) + small_warning(len(left))
    found = _finish(
        lambda rows, ks: ksg_local(left[rows], right[rows], ks, variant), len(left), k, level, f"ksg{variant}", warnings
    )
    return found if warnings else _against_ranks(found, left, right, k, variant)


def _against_ranks(found: Estimate, x: FloatArray, y: FloatArray, k: int, variant: int) -> Estimate:
    """Hold the estimate against that on normal scores: information does not change with the margins, a bias does."""
    assert found.samples is not None
    apart = found.samples - ksg_local(normal_scores(x), normal_scores(y), [k], variant)[0]
    moved = float(apart.mean())
    if abs(moved) < max(CLEAR * float(apart.std()) / math.sqrt(found.n), BIASED * found.std_error):
        return found
    line = (
        f"bias: the same neighbours on ranks find {-moved:+.3f} nats more; heavy tails or skew of the margins bias the "
        "estimate, and the interval is widened by as much"
    )
    return replace(found, low=found.low - abs(moved), high=found.high + abs(moved), warnings=(*found.warnings, line))


def ksg_local(x: FloatArray, y: FloatArray, ks: list[int], variant: int = 1) -> list[FloatArray]:
    """Compute the per-sample terms whose mean is the KSG estimate, for several k in one search.

    Args:
        x: samples.
        y: samples, row by row with x.
        ks: the neighbours.
        variant: KSG 1 or 2.

    Shape:
        x: (n, dx). y: (n, dy). returns: one (n,) for each k.
    """
    joint = np.hstack([x, y])
    if variant == 2:
        return [_rectangles(x, y, joint, k) for k in ks]
    return list(ksg_terms(x, y, kth_distances(joint, ks), ks, None).T)


def ksg_terms(x: FloatArray, y: FloatArray, radii: FloatArray, ks: list[int], rows: IntArray | None) -> FloatArray:
    """KSG 1 terms from the distances to the neighbours ``ks``, one column each."""
    n = len(x)
    table = _digamma_table(n)
    inside_x, inside_y = counts_within(x, radii, rows=rows), counts_within(y, radii, rows=rows)
    return np.asarray(table[n] + table[ks] - table[inside_x + 1] - table[inside_y + 1])


def _digamma_table(n: int) -> FloatArray:
    """Digamma of 0 .. n: the harmonic numbers less Euler's constant; place 0 is never read."""
    table = np.zeros(n + 1)
    np.cumsum(1.0 / np.arange(1, n), out=table[2:])
    return np.asarray(table - np.euler_gamma)


def _rectangles(x: FloatArray, y: FloatArray, joint: FloatArray, k: int) -> FloatArray:
    from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  # its stubs lack it

    near = cKDTree(joint).query(joint, k + 1, p=np.inf)[1][:, 1:]
    reach_x = np.abs(x[near] - x[:, None]).max(axis=(1, 2))
    reach_y = np.abs(y[near] - y[:, None]).max(axis=(1, 2))
    inside_x = np.maximum(count_within(x, reach_x, strict=False), 1)
    inside_y = np.maximum(count_within(y, reach_y, strict=False), 1)
    return np.asarray(digamma(k) - 1 / k + digamma(len(x)) - digamma(inside_x) - digamma(inside_y))


def ross(x: Any, labels: Any, *, k: int = 4, level: float = 0.95) -> Estimate:
    """Estimate mutual information between continuous samples and labels.

    Labels seen at most once carry no neighbour and are left out, with a warning.

    Args:
        x: continuous samples.
        labels: one label per sample.
        k: which neighbour within a label.
        level: nominal coverage.

    Shape:
        x: (n,) or (n, d). labels: (n,).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths, or n at most k.

    Source:
        Ross 2014, PLoS ONE 9(2), e87357.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 2, 1000)
        >>> bool(abs(ross(rng.normal(size=1000) + 20 * labels, labels).value - np.log(2)) < 0.01)
        True
    """
    points = _unit(as_matrix(x, "ross", "x", minimum=k + 1))
    codes = as_labels(labels, "ross", "labels")
    _same_length(points, codes, "ross", "x", "labels")
    warnings = duplicate_warnings(points, "x") + dimension_warning(points.shape[1], 1)
    lonely = np.bincount(codes)[codes] < 2
    if lonely.any():
        warnings += (f"rare_labels: {int(lonely.sum())} samples are the only one of their label and are left out",)
        points, codes = points[~lonely], np.unique(codes[~lonely], return_inverse=True)[1]
    if len(points) <= k:
        raise ValueError(
            f"ross: labels must repeat, got {len(points)} samples of repeated labels. Treat y as continuous."
        )

    def local(rows: IntArray, ks: list[int]) -> list[FloatArray]:
        return [_ross_local(points[rows], codes[rows], near) for near in ks]

    return _finish(local, len(points), k, level, "ross", warnings)


def _ross_local(points: FloatArray, codes: IntArray, k: int) -> FloatArray:
    n = len(points)
    radius, within, used = np.zeros(n), np.zeros(n), np.ones(n)
    for label in np.unique(codes):
        rows = np.flatnonzero(codes == label)
        if len(rows) < 2:
            continue
        near = min(k, len(rows) - 1)
        radius[rows] = kth_distance(points[rows], near)
        within[rows], used[rows] = len(rows), near
    kept = within > 0
    counts = count_within(points, radius) + 1.0
    local = digamma(n) + digamma(used) - digamma(np.maximum(within, 1)) - digamma(counts)
    return np.asarray(local[kept])


def mixed_ksg(x: Any, y: Any, *, k: int = 4, level: float = 0.95) -> Estimate:
    """Estimate mutual information of any mixture of discrete and continuous values, ties included.

    Args:
        x: samples.
        y: samples, row by row with x.
        k: which neighbour.
        level: nominal coverage.

    Shape:
        x: (n,) or (n, dx). y: (n,) or (n, dy).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths, or n at most k.

    Source:
        Gao, Kannan, Oh and Viswanath 2017, arXiv 1709.06212, algorithm 1, with digamma in place of
        log (n + 1) as in the authors' code. Values that hold a tenth of the samples or more are set apart first: a ball
        around a continuous value would otherwise swallow a whole atom, which biases the estimate upward.

    Example:
        >>> x = np.repeat([0.0, 1.0], 200)
        >>> bool(abs(mixed_ksg(x, x).value - np.log(2)) < 0.02)
        True
    """
    left, right = paired(x, y, k, "mixed_ksg")
    left, right = _unit(left), _unit(right)

    def local(rows: IntArray, ks: list[int]) -> list[FloatArray]:
        return [_mixed_local(left[rows], right[rows], near) for near in ks]

    # Pairs that repeat share their neighbours exactly, and their terms have no noise of neighbours.
    _, place, count = np.unique(np.hstack([left, right]), axis=0, return_inverse=True, return_counts=True)
    tied = float((count[place.reshape(-1)] > k).mean())
    warnings = dimension_warning(left.shape[1], right.shape[1]) + small_warning(len(left))
    if tied == 1.0:
        warnings += ("labels: every pair of values repeats; as integers they are counted, which is more exact",)
    return _finish(local, len(left), k, level, "mixed_ksg", warnings, shared=1.0 + (SHARED - 1.0) * (1.0 - tied))


def _mixed_local(x: FloatArray, y: FloatArray, k: int) -> FloatArray:
    parted = _atoms_apart(x), _atoms_apart(y)
    if all(part is None for part in parted):
        return _tied_local(x, y, k)[0]
    left, right = (side if part is None else part for side, part in zip((x, y), parted, strict=True))
    local, radius = _tied_local(left, right, k)
    # Where fewer than k others share both atoms, the neighbours stay those of the values as they were.
    lonely = radius >= 0.5 * _APART
    return np.where(lonely, _tied_local(x, y, k)[0], local) if lonely.any() else local


def _atoms_apart(x: FloatArray) -> FloatArray | None:
    """Add a column that tells the heavy values of each column apart; None where there are none."""
    marks = np.zeros_like(x)
    for column in range(x.shape[1]):
        values, places, counts = np.unique(x[:, column], return_inverse=True, return_counts=True)
        heavy = np.flatnonzero(counts >= _HEAVY * len(x))
        if len(values) > 1 and len(heavy):
            number = np.zeros(len(values))
            number[heavy] = np.arange(1, len(heavy) + 1)
            marks[:, column] = _APART * number[places.reshape(-1)]
    return np.hstack([x, marks]) if marks.any() else None


def _tied_local(x: FloatArray, y: FloatArray, k: int) -> tuple[FloatArray, FloatArray]:
    """Terms of the mixture estimator and the radius of each."""
    joint = np.hstack([x, y])
    radius = kth_distance(joint, k)
    tied = radius == 0
    near = np.full(len(x), float(k))
    inside_x, inside_y = (count_within(part, radius) + 1.0 for part in (x, y))
    if tied.any():
        # At radius zero the closed balls hold the ties, the sample itself included.
        rows = np.flatnonzero(tied)
        zero = np.zeros(len(rows))
        for part, counts in ((joint, near), (x, inside_x), (y, inside_y)):
            counts[rows] = count_within(part, zero, strict=False, rows=rows) + 1.0
    return np.asarray(digamma(near) + np.log(len(x)) - digamma(inside_x) - digamma(inside_y)), radius


def conditional_ksg(x: Any, y: Any, z: Any, *, k: int = 4, level: float = 0.95) -> Estimate:
    """Estimate I(X; Y | Z) of continuous samples from nearest neighbours.

    Args:
        x: samples.
        y: samples.
        z: what is given.
        k: which neighbour.
        level: nominal coverage.

    Shape:
        x, y, z: (n,) or (n, d).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths, or n at most k.

    Source:
        Frenzel and Pompe 2007; Vejmelka and Palus 2008.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> z = rng.normal(size=1500)
        >>> abs(conditional_ksg(z + rng.normal(size=1500), z + rng.normal(size=1500), z).value) < 0.05
        True
    """
    left, right = paired(x, y, k, "conditional_ksg")
    given = as_matrix(z, "conditional_ksg", "z")
    _same_length(left, given, "conditional_ksg", "x", "z")
    warnings = duplicate_warnings(left, "x") + duplicate_warnings(right, "y") + duplicate_warnings(given, "z")
    left, right, given = _unit(left), _unit(right), _unit(given)
    warnings += dimension_warning(left.shape[1] + given.shape[1], right.shape[1])

    def local(rows: IntArray, ks: list[int]) -> list[FloatArray]:
        return [_conditional_local(left[rows], right[rows], given[rows], near) for near in ks]

    return _finish(local, len(left), k, level, "conditional_ksg", warnings)


def _conditional_local(x: FloatArray, y: FloatArray, z: FloatArray, k: int) -> FloatArray:
    radius = kth_distance(np.hstack([x, y, z]), k)
    counts = (count_within(part, radius) + 1 for part in (np.hstack([x, z]), np.hstack([y, z]), z))
    with_x, with_y, alone = counts
    return np.asarray(digamma(k) - digamma(with_x) - digamma(with_y) + digamma(alone))


def paired(x: Any, y: Any, k: int, where: str) -> tuple[FloatArray, FloatArray]:
    """Return both samples as matrices of equal length above k."""
    if k < 1:
        raise ValueError(f"{where}: k must be at least 1, got {k}. Use 3 to 10.")
    left, right = as_matrix(x, where, "x"), as_matrix(y, where, "y")
    _same_length(left, right, where, "x", "y")
    if len(left) <= k:
        raise ValueError(f"{where}: x must hold more than k = {k} samples, got {len(left)}. Collect more or lower k.")
    return left, right


def dimension_warning(left: int, right: int) -> tuple[str, ...]:
    """Say where nearest neighbours are known to be biased at ordinary sample sizes."""
    if left + right <= _BIASED_DIMENSIONS:
        return ()
    return (
        f"dimension: {left}+{right} dimensions; nearest-neighbour estimates are biased toward zero there and the "
        "interval does not hold that bias",
    )


def small_warning(n: int) -> tuple[str, ...]:
    """Say where sharp edges, heavy tails and atoms bias neighbours by as much as noise hides."""
    if n >= _SMALL:
        return ()
    return (f"small: {n} samples are too few to tell a bias of the neighbours from their noise; take {_SMALL} or more",)


def _same_length(left: Any, right: Any, where: str, one: str, two: str) -> None:
    if len(left) != len(right):
        raise ValueError(
            f"{where}: {one} and {two} must have equal lengths, got {len(left)} and {len(right)}. Pair them row by row."
        )


def _unit(x: FloatArray) -> FloatArray:
    spread = x.std(axis=0)
    return np.asarray((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0))


def _finish(
    local: Callable[[IntArray, list[int]], list[FloatArray]], n: int, k: int, level: float, method: str,
    warnings: tuple[str, ...], *, shared: float = SHARED,
) -> Estimate:  # fmt: skip
    terms, spread = neighbour_interval(local, n, k, level, shared=shared)
    value = float(terms.mean())
    return Estimate(
        value,
        value - spread.half,
        value + spread.half,
        method=method,
        n=n,
        samples=terms,
        warnings=warnings + spread.warnings,
        level=level,
        std_error=spread.error,
        details={"k": k},
    )
