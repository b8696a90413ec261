"""Intervals for means and ratios of sums over clustered samples.

Questions about one image are not independent, so the image is the unit that is resampled. The default is the
studentised cluster bootstrap: it keeps its coverage where the differences are skewed, which the percentile
family does not; where there are too few clusters for any bootstrap it gives way to Student's t.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

__all__ = [
    "IntervalMethod",
    "RatioInterval",
    "entropy_interval",
    "information_interval",
    "inverted_interval",
    "ratio_interval",
]

FloatArray = NDArray[np.float64]
IntervalMethod = Literal["bootstrap-t", "bca", "t"]
FEW_CLUSTERS = 30
_BOOTSTRAP_CLUSTERS = range(10, 5001)  # fewer cannot be resampled; with more, every method gives the same


class RatioInterval(NamedTuple):
    """A ratio of sums with its cluster-robust interval."""

    value: float
    low: float
    high: float
    std_error: float
    n_clusters: int
    warnings: tuple[str, ...]


def ratio_interval(
    numerator: FloatArray,
    denominator: FloatArray,
    clusters: NDArray[np.int64],
    *,
    level: float = 0.95,
    method: IntervalMethod = "bootstrap-t",
    draws: int = 2000,
    seed: int = 0,
) -> RatioInterval:
    """Estimate sum(numerator) / sum(denominator) with an interval over whole clusters.

    With a denominator of ones this is the mean per sample; with token counts the mean per token.

    Args:
        numerator: per-sample amounts, such as paired differences of summed NLL.
        denominator: per-sample weights (ones, token counts, byte counts).
        clusters: cluster number of each sample, 0..G-1.
        level: nominal coverage.
        method: ``"bootstrap-t"`` (on each side the wider of the studentised bootstrap and t, which holds the nominal
            coverage under skew and unequal clusters), ``"bca"``, or ``"t"`` with G - 1 degrees of freedom.
        draws: bootstrap draws.
        seed: seed of the resampling.

    Shape:
        numerator, denominator, clusters: (n,).

    Raises:
        ValueError: an unknown method.

    Source:
        Efron and Tibshirani 1993, chapters 12 (studentised) and 14 (BCa); the variance of a ratio of cluster sums is
        the delete-one-cluster jackknife (Cochran 1977, section 6.7; CR3 in MacKinnon et al. 2023).

    Example:
        >>> import numpy as np
        >>> result = ratio_interval(np.array([1.0, 3.0, 2.0, 2.0]), np.ones(4), np.arange(4), method="t")
        >>> result.value, result.n_clusters
        (2.0, 4)
    """
    if method not in ("bootstrap-t", "bca", "t"):
        raise ValueError(
            f"ratio_interval: method must be 'bootstrap-t', 'bca' or 't', got {method!r}. Use one of the three."
        )
    count = int(clusters.max()) + 1
    top = np.bincount(clusters, weights=numerator, minlength=count).astype(np.float64)
    bottom = np.bincount(clusters, weights=denominator, minlength=count).astype(np.float64)
    value = float(top.sum() / bottom.sum())
    warnings: list[str] = []
    if count < 2:
        warnings.append("one_cluster: all samples share one cluster, so no interval exists; sample more images")
        return RatioInterval(value, math.nan, math.nan, math.nan, count, tuple(warnings))
    if count < FEW_CLUSTERS:
        warnings.append(f"few_clusters: {count} clusters; intervals need about {FEW_CLUSTERS} to keep their coverage")
    error = _standard_error(top, bottom)
    if error <= 1e-12 * abs(value) or not math.isfinite(error):
        return RatioInterval(value, value, value, 0.0, count, tuple(warnings))
    half = float(stats.t.ppf(0.5 + level / 2, count - 1)) * error
    low, high = value - half, value + half
    if method == "bca" and count in _BOOTSTRAP_CLUSTERS:
        low, high = _bca(top, bottom, value, level, draws, seed)
    elif method == "bootstrap-t" and count in _BOOTSTRAP_CLUSTERS:
        lower, upper = _studentised(top, bottom, value, error, level, draws, seed)
        low, high = min(low, lower), max(high, upper)
    return RatioInterval(value, low, high, error, count, tuple(warnings))


def _standard_error(top: FloatArray, bottom: FloatArray) -> float:
    """Delete-one-cluster jackknife error of sum(top) / sum(bottom).

    Unlike the linearised one it does not shrink when a few large clusters carry the estimate.
    """
    count = len(top)
    leave_out = (top.sum() - top) / (bottom.sum() - bottom)
    centred = leave_out - top.sum() / bottom.sum()
    return float(np.sqrt((count - 1) / count * (centred**2).sum()))


def _linearised_error(top: FloatArray, bottom: FloatArray) -> float:
    count = len(top)
    residual = top - top.sum() / bottom.sum() * bottom
    return float(np.sqrt((residual**2).sum() * count / (count - 1)) / bottom.sum())


def _resample(top: FloatArray, bottom: FloatArray, draws: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Return bootstrap ratios and their standard errors, in blocks that keep memory small."""
    rng = np.random.default_rng(seed)
    count = len(top)
    block = max(1, min(draws, 4_000_000 // count))
    value = top.sum() / bottom.sum()
    residual = top - value * bottom  # centred first: the sums of squares below would cancel otherwise
    columns = np.stack([residual, bottom, residual**2, residual * bottom, bottom**2], axis=1)
    ratios, errors = [], []
    for start in range(0, draws, block):
        size = min(block, draws - start)
        picks = rng.integers(0, count, size=(size, count))
        picks += np.arange(size)[:, None] * count
        weights = np.bincount(picks.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        sums = weights @ columns
        shift = sums[:, 0] / sums[:, 1]
        spread = sums[:, 2] - 2 * shift * sums[:, 3] + shift**2 * sums[:, 4]
        ratios.append(value + shift)
        errors.append(np.sqrt(np.maximum(spread, 0.0) * count / (count - 1)) / np.abs(sums[:, 1]))
    return np.concatenate(ratios), np.concatenate(errors)


def _studentised(
    top: FloatArray, bottom: FloatArray, value: float, error: float, level: float, draws: int, seed: int
) -> tuple[float, float]:
    ratios, errors = _resample(top, bottom, draws, seed)
    linearised = _linearised_error(top, bottom)  # the pivots' own scale; the jackknife scales the interval
    kept = errors > 1e-12 * linearised
    pivots = (ratios[kept] - value) / errors[kept]
    upper, lower = np.quantile(pivots, [0.5 + level / 2, 0.5 - level / 2])
    return value - float(upper) * error, value - float(lower) * error


def _bca(top: FloatArray, bottom: FloatArray, value: float, level: float, draws: int, seed: int) -> tuple[float, float]:
    ratios, _ = _resample(top, bottom, draws, seed)
    equal = np.abs(ratios - value) <= 1e-12 * max(abs(value), float(np.ptp(ratios)))  # but for rounding
    below = (np.sum(~equal & (ratios < value)) + 0.5 * np.sum(equal)) / len(ratios)
    bias = float(special.ndtri(np.clip(below, 0.5 / len(ratios), 1 - 0.5 / len(ratios))))
    leave_out = (top.sum() - top) / (bottom.sum() - bottom)
    centred = leave_out.mean() - leave_out
    spread = float((centred**2).sum())
    acceleration = float((centred**3).sum()) / (6.0 * spread**1.5) if spread > 0 else 0.0
    quantiles = special.ndtri([0.5 - level / 2, 0.5 + level / 2])
    adjusted = special.ndtr(bias + (bias + quantiles) / (1 - acceleration * (bias + quantiles)))
    low, high = np.quantile(ratios, adjusted)
    return float(low), float(high)


def information_interval(value: float, local: FloatArray, freedom: int, level: float) -> tuple[float, float, float]:
    """Invert the test of each hypothesis about an information estimated by maximum likelihood.

    The variance of such an estimate is Var(log ratio) / n far from independence and freedom / (2 n^2) at it. Taking it
    at the estimate would make the interval cover independence always; taking it at the hypothesis, as Wilson does for
    proportions, keeps the nominal coverage throughout.

    Args:
        value: the bias-corrected estimate.
        local: fitted log ratios of the samples, whose mean is the plug-in estimate.
        freedom: parameters that are zero at independence.
        level: nominal coverage.

    Shape:
        local: (n,).

    Returns:
        Lower and upper end and the standard error at the estimate.

    Source:
        Wilson 1927 for the inversion; Brillinger 2004 for the two variances.
    """
    n = len(local)
    plugin = max(float(local.mean()), 1e-300)
    # Close to independence the variance of the log ratio is twice its mean.
    slope = float(local.var()) / plugin / n if plugin > 1e-12 else 2.0 / n
    return inverted_interval(value, slope, freedom / (2.0 * n**2), level)


def inverted_interval(value: float, slope: float, floor: float, level: float) -> tuple[float, float, float]:
    """Invert the test of each amount of information under which the estimate has variance slope * amount + floor.

    Args:
        value: the estimate.
        slope: variance of the estimate a nat of the truth.
        floor: variance of the estimate where the truth is zero.
        level: nominal coverage.

    Returns:
        Lower and upper end and the standard error at the estimate.
    """
    quantile = float(special.ndtri(0.5 + level / 2))
    centre = 2 * value + quantile**2 * slope
    root = math.sqrt(max(centre**2 - 4 * (value**2 - quantile**2 * floor), 0.0))
    at_zero = quantile * math.sqrt(floor)
    low = value - at_zero if value < at_zero else (centre - root) / 2
    high = value + at_zero if value < -at_zero else (centre + root) / 2
    return low, high, math.sqrt(slope * max(value, 0.0) + floor)


def entropy_interval(
    value: float, surprise: FloatArray, ceiling: float, freedom: int, level: float
) -> tuple[float, float, float]:
    """Interval of an entropy: what it lacks to its ceiling is an information, which is zero where outcomes are even.

    Args:
        value: the corrected estimate.
        surprise: minus the log frequency of each sample's outcome.
        ceiling: the entropy of even outcomes.
        freedom: frequencies that are free.
        level: nominal coverage.

    Shape:
        surprise: (n,).

    Returns:
        Lower and upper end and the standard error at the estimate.
    """
    low, high, error = information_interval(ceiling - value, ceiling - surprise, freedom, level)
    return ceiling - high, ceiling - low, error
