"""Entropy from samples: counts with bias corrections, and nearest neighbours for continuous data."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma, xlogy

from tinyalign.theory._input import as_labels, as_matrix, as_numpy, check_level
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.intervals import entropy_interval
from tinyalign.theory.inversion import CELLS, simulated_entropy
from tinyalign.theory.neighbours import kth_distances, neighbour_interval

__all__ = ["DISCRETE_METHODS", "discrete_entropy", "entropy", "knn_entropy"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
DISCRETE_METHODS = ("plugin", "miller_madow", "grassberger", "chao_shen")
_BIASED = 0.2  # standard errors of bias that cost the interval about one of its 95 %
_FEW = 10  # samples an outcome, below which the standard error is too small as well
_BIASED_DIMENSIONS = 2
_MANY = 1000  # samples in two dimensions, from which a bias shows where it is more than the noise
_UNEVEN = 2.0  # between the scales of two columns, from which a cube is no fair neighbourhood
_SHARING = 0.8  # of the noise of neighbours: what sharing them adds to its variance, over laws of 1 and 2 columns


def entropy(
    x: Any,
    *,
    method: Literal["auto", "plugin", "miller_madow", "grassberger", "chao_shen", "knn"] = "auto",
    k: int = 4,
    level: float = 0.95,
) -> Estimate:
    """Estimate the entropy of samples: in nats for labels, differential for continuous data.

    Args:
        x: labels (integers, strings, booleans) or continuous samples (floats).
        method: ``"auto"`` takes Miller-Madow for labels (Grassberger where they are undersampled)
            and Kozachenko-Leonenko for floats; or one by name.
        k: neighbours of the continuous estimator.
        level: nominal coverage.

    Shape:
        x: (n,) labels, or (n,) or (n, d) floats.

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, too few samples, or an unknown method.

    Source:
        Miller 1955 and Madow 1948; Grassberger 2003, arXiv physics/0307138; Kozachenko and Leonenko 1987.

    Example:
        >>> round(entropy(["a", "b", "a", "b"], method="plugin").value, 4)
        0.6931
    """
    check_level(level, "entropy")
    if method not in ("auto", "knn", *DISCRETE_METHODS):
        names = ", ".join(("auto", *DISCRETE_METHODS, "knn"))
        raise ValueError(f"entropy: method must be one of {names}, got {method!r}. Use one of them.")
    continuous = as_numpy(x).dtype.kind == "f"
    if method == "knn" or (method == "auto" and continuous):
        return knn_entropy(x, k=k, level=level)
    labels = as_labels(x, "entropy", "x")
    counts = np.bincount(labels)
    names_values = {name: discrete_entropy(counts, name) for name in DISCRETE_METHODS}
    warnings = undersampling_warnings(counts)
    chosen = ("grassberger" if warnings else "miller_madow") if method == "auto" else method
    n, outcomes = len(labels), int(np.count_nonzero(counts))
    surprise = -np.log(counts / n)[labels]
    value = names_values[chosen]
    if outcomes == 1:
        line = "constant: all samples are one outcome; what was not seen is not in the interval"
        low, high = min(value, 0.0), max(value, 0.0)  # the corrections miss zero where samples are few
        return Estimate(value, low, high, method=chosen, n=n, warnings=(line,), level=level, std_error=0.0)
    expected = entropy_interval(names_values["miller_madow"], surprise, math.log(outcomes), outcomes - 1, level)
    low, high, error = simulated_entropy(counts, expected[:2], level) if outcomes <= CELLS else expected
    # The interval is that of the entropy whatever the correction, and reaches as far as the estimates.
    low, high = min(low, value, names_values["miller_madow"]), max(high, value, names_values["miller_madow"])
    warnings += bias_warnings(counts, jackknife_shift(counts), error)
    return Estimate(
        value,
        low,
        high,
        method=chosen,
        n=n,
        samples=surprise + (value - surprise.mean()),
        candidates=names_values,
        warnings=warnings,
        level=level,
        std_error=error,
        details={"outcomes": outcomes},
    )


def discrete_entropy(counts: Any, method: str = "grassberger") -> float:
    """Compute the entropy of a law from counts of its outcomes.

    Args:
        counts: (m,) how often each outcome was seen.
        method: ``"plugin"``, ``"miller_madow"``, ``"grassberger"`` or ``"chao_shen"``.

    Units:
        nats.

    Raises:
        ValueError: negative or no counts, or an unknown method.

    Source:
        Miller 1955; Grassberger 2003, arXiv physics/0307138, equation 27; Chao and Shen 2003.

    Example:
        >>> round(discrete_entropy([50, 50], "plugin"), 4)
        0.6931
    """
    table = as_numpy(counts).astype(np.float64).ravel()
    if not np.isfinite(table).all() or (table < 0).any() or table.sum() < 1:
        raise ValueError(
            f"discrete_entropy: counts must be at least 0 with a positive sum, got {table[:5]}. Count again."
        )
    table = table[table > 0]
    n = float(table.sum())
    share = table / n
    plugin = float(-(share * np.log(share)).sum())
    if method == "plugin":
        return plugin
    if method == "miller_madow":
        return float(plugin + (len(table) - 1) / (2.0 * n))
    if method == "grassberger":
        return float(math.log(n) - (table * _grassberger(table)).sum() / n)
    if method == "chao_shen":
        return _chao_shen(table)
    raise ValueError(
        f"discrete_entropy: method must be one of {', '.join(DISCRETE_METHODS)}, got {method!r}. Use one of them."
    )


def _grassberger(counts: FloatArray) -> FloatArray:
    """G(n) = psi(n) + (-1)^n / 2 (psi((n + 1) / 2) - psi(n / 2)), which replaces log n."""
    sign = np.where(counts % 2 == 0, 1.0, -1.0)
    return np.asarray(digamma(counts) + 0.5 * sign * (digamma((counts + 1) / 2) - digamma(counts / 2)))


def _chao_shen(counts: FloatArray) -> float:
    """Horvitz-Thompson over the estimated coverage 1 - (singletons) / n."""
    n = counts.sum()
    singles = float((counts == 1).sum())
    if singles == n:
        singles = n - 1  # all distinct: coverage zero would leave nothing to sum
    share = (1.0 - singles / n) * counts / n
    seen = -np.expm1(n * np.log1p(-np.minimum(share, 1 - 1e-15)))
    return float(-(share * np.log(share) / seen).sum())


def undersampling_warnings(counts: Any) -> tuple[str, ...]:
    """Say where the sample is too small for its alphabet: few observations per outcome, or many seen only once."""
    table = np.asarray(counts)
    table = table[table > 0]
    n, singles = table.sum(), (table == 1).sum()
    if n < 5 * len(table) or singles > 0.1 * n:
        return (
            f"undersampled: {n} samples over {len(table)} outcomes, {singles} seen once; the corrections disagree and "
            "a bias of the order of their spread is left",
        )
    return ()


def jackknife_shift(counts: Any) -> float:
    """By how much the jackknife's entropy exceeds Miller and Madow's: about half of what is left of the bias.

    Source:
        Zahl 1977, "Jackknifing an index of diversity".
    """
    table = np.asarray(counts, dtype=np.float64)
    table = table[table > 0]
    n = table.sum()
    if n < 2:
        return 0.0
    amount = xlogy(table, table)
    fewer = math.log(n - 1) - (amount.sum() - amount + xlogy(table - 1, table - 1)) / (n - 1)
    plugin = math.log(n) - amount.sum() / n
    jackknife = n * plugin - (n - 1) / n * (table * fewer).sum()
    return float(jackknife - plugin - (len(table) - 1) / (2 * n))


def bias_warnings(counts: Any, shift: float, error: float) -> tuple[str, ...]:
    """Say where a bias is left that the interval does not hold.

    Args:
        counts: how often each outcome was seen.
        shift: by how much the jackknife exceeds Miller and Madow's.
        error: standard error of the estimate.
    """
    n, outcomes = int(np.sum(counts)), int(np.count_nonzero(counts))
    if abs(shift) <= _BIASED * error and n >= _FEW * outcomes:
        return ()
    return (
        f"undersampled: {n} samples over {outcomes} outcomes; the jackknife moves Miller and Madow's estimate by "
        f"{shift:+.3f} nats, and the interval does not hold what bias is left",
    )


def knn_entropy(x: Any, *, k: int = 4, level: float = 0.95) -> Estimate:
    """Estimate differential entropy from distances to the k-th neighbour (max-norm).

    Args:
        x: continuous samples.
        k: which neighbour.
        level: nominal coverage; the interval extrapolates the variance from disjoint subsets, as duplicates make a
            bootstrap of neighbours invalid.

    Shape:
        x: (n,) or (n, d).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, or n at most k.

    Source:
        Kozachenko and Leonenko 1987; Holmes and Nemenman 2019, arXiv 1903.09280, and
        Delattre and Fournier 2017, arXiv 1602.07440, for the variance.

    Example:
        >>> draws = np.random.default_rng(0).uniform(size=2000)
        >>> abs(knn_entropy(draws).value) < 0.1
        True
    """
    points = as_matrix(x, "knn_entropy", "x", minimum=k + 1)
    warnings = duplicate_warnings(points, "x")
    if warnings and len(np.unique(points, axis=0)) <= k:
        return Estimate(-math.inf, -math.inf, -math.inf, method="knn", n=len(points), warnings=warnings, level=level)
    points, stretched = _evened(points)
    # A term is the log-density, which its neighbours share nothing of, and noise of variance psi'(k), which they share.
    local, spread = neighbour_interval(
        lambda rows, ks: [term + stretched for term in _local_entropy(points[rows], ks)], len(points), k, level,
        shared=1.0, added=_SHARING * float(polygamma(1, k)),
    )  # fmt: skip
    value = float(local.mean())
    if points.shape[1] > (_BIASED_DIMENSIONS if len(points) >= _MANY else 1):
        warnings += (
            f"dimension: {points.shape[1]} dimensions; nearest neighbours are biased at this sample size, and the "
            "interval does not hold all of it",
        )
    return Estimate(
        value,
        value - spread.half,
        value + spread.half,
        method="knn",
        n=len(points),
        samples=local,
        warnings=warnings + spread.warnings,
        level=level,
        std_error=spread.error,
        details={"k": k},
    )


def _evened(points: FloatArray) -> tuple[FloatArray, float]:
    """Divide columns of unequal scale by the distance of their quartiles, and return the entropy that it takes off."""
    scale = np.subtract(*np.quantile(points, [0.75, 0.25], axis=0))
    scale[scale == 0] = 1.0
    if scale.max() < _UNEVEN * scale.min():
        return points, 0.0
    return points / scale, float(np.log(scale).sum())


def _local_entropy(points: FloatArray, ks: list[int]) -> list[FloatArray]:
    n, width = points.shape
    radii = np.maximum(kth_distances(points, ks), 1e-300)
    return [digamma(n) - digamma(k) + width * np.log(2 * radius) for k, radius in zip(ks, radii.T, strict=True)]


def duplicate_warnings(points: FloatArray, name: str) -> tuple[str, ...]:
    """Say where continuous data hold repeated or constant values, which no neighbour estimator expects."""
    warnings = []
    spread = np.ptp(points, axis=0)
    if (spread == 0).any():
        warnings.append(f"constant: {int((spread == 0).sum())} of {points.shape[1]} columns of {name} do not vary")
    distinct = 1 + int(np.count_nonzero(np.diff(np.sort(points[:, 0]))))
    if distinct < len(points) and points.shape[1] > 1:
        distinct = len(np.unique(points, axis=0))
    repeated = 1.0 - distinct / len(points)
    if repeated > 0.01:
        warnings.append(
            f"ties: {repeated:.0%} of the rows of {name} repeat another; treat them as labels, or the estimate is wrong"
        )
    return tuple(warnings)
