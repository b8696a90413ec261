"""KL(p || q) from samples of both: fitted laws whose divergence is known, held against nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from tinyalign.theory._input import as_matrix, check_level
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.kl_margins import FEW_COLUMNS, SHARING, margins_divergence, redraw
from tinyalign.theory.kl_monte_carlo import tail_limit, tail_shape
from tinyalign.theory.kl_normal import (
    closed_interval,
    draw_normal,
    fit_normal,
    gaussian_kl,
    looks_normal,
    normal_log_ratio,
)
from tinyalign.theory.kl_ties import constant_warning, shared_warning, untied
from tinyalign.theory.nearest import small_warning
from tinyalign.theory.neighbours import kth_distances, neighbour_interval, subset_interval

__all__ = ["kl_from_samples"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_METHODS = ("auto", "knn", "plain", "gaussian", "margins", "surrogate")
_ACCEPT = 2.5  # standard errors
_DRAWS = 4  # of a fit that the first one rejects: one draw is as noisy as the data, and may be an odd one
_STEADY = 4  # times as many neighbours as the estimate has test a fit
# Of the nearest neighbours and of more, whose mean has less noise than its terms say: a fit shares most of it.
_SHARED = np.array([SHARING, 0.75])
_FAR = np.array([0.07, 0.02])  # of the divergence: what sharing the few neighbours far out in q adds to the error
_BIASED = 0.03  # nats
_CLEAR = 2.0  # standard errors
_CARRIED = 0.02  # nats
_FLAT = 1e-6  # share of a column's spread that others leave
_OUTSIDE = 0.01  # of the samples of p
_FULL = 10  # samples a column, from which a law of several columns can be fitted
_SMALLEST = 20  # neighbours that a subset of margins must be able to hold


def kl_from_samples(
    p_samples: Any, q_samples: Any, *, method: str = "auto", k: int = 4, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Estimate KL(p || q) from independent samples of p and of q.

    Both samples are fitted by normal laws, whose divergence has a closed form, or where they are not normal by their
    own margins with Gaussian copulas, whose divergence is measured column by column. Nearest neighbours on the samples,
    less nearest neighbours on draws of the two fitted laws, then measure what the fit missed, and the bias of the
    neighbours cancels. ``"auto"`` returns the fit where that difference is within its noise, and adds it elsewhere.
    Values that repeat are spread over their gaps first.

    Args:
        p_samples: samples of p.
        q_samples: samples of q.
        method: ``"auto"`` or ``"knn"``, which is the same: neighbours with the correction above; ``"plain"``
            (neighbours without it), ``"gaussian"`` (closed form of normal fits), ``"margins"`` (column by column, with
            Gaussian copulas) or ``"surrogate"`` (normal fits and what neighbours say they missed).
        k: which neighbour.
        level: nominal coverage.
        seed: seed of the surrogate draws.

    Shape:
        p_samples: (n,) or (n, d). q_samples: (m,) or (m, d).

    Units:
        nats. Nothing is clamped: near zero the estimate may be negative.

    Raises:
        ValueError: NaN or inf, unequal dimensions, n or m at most k or too small for what is fitted by name, or an
            unknown method.

    Source:
        Wang, Kulkarni and Verdu 2009, equation 5 (neighbours); the surrogate follows the same idea as for mutual
        information.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> result = kl_from_samples(rng.normal(size=(2000, 3)), rng.normal(size=(2000, 3)) + 1.0)
        >>> bool(abs(result.value - 1.5) < 0.15)
        True
    """
    check_level(level, "kl_from_samples")
    if method not in _METHODS:
        raise ValueError(
            f"kl_from_samples: method must be one of {', '.join(_METHODS)}, got {method!r}. Use one of them."
        )
    if k < 1:
        raise ValueError(f"kl_from_samples: k must be at least 1, got {k}. Use 3 to 10.")
    p = as_matrix(p_samples, "kl_from_samples", "p_samples", minimum=k + 2)
    q = as_matrix(q_samples, "kl_from_samples", "q_samples", minimum=k + 2)
    if p.shape[1] != q.shape[1]:
        raise ValueError(
            f"kl_from_samples: p_samples and q_samples must have one width, got {p.shape[1]} and {q.shape[1]}. "
            "Use the same features for both."
        )
    method = "auto" if method == "knn" else method
    warnings = constant_warning(p, "p_samples") + constant_warning(q, "q_samples")
    p, q, dropped = _own_columns(p, q)
    if dropped:
        warnings += (f"copies: {dropped} columns are constant or combinations of others in both and were left out",)
    n, width = p.shape
    if width == 0:
        return Estimate(0.0, 0.0, 0.0, method="constant", n=n, warnings=warnings, level=level)
    flat = [name for name, side in (("p_samples", p), ("q_samples", q)) if _degenerate(side)]
    if flat:
        warnings += (
            f"degenerate: {' and '.join(flat)} lie in fewer dimensions than both together, where the other law has no "
            "density; the divergence is infinite",
        )
        return Estimate(math.inf, math.inf, math.inf, method="degenerate", n=n, warnings=warnings, level=level)
    shared = shared_warning(p, q)
    p, q, rounded = untied(p, q)
    warnings += rounded or shared
    columns = p, q
    least = min(n, len(q))
    # Whitening by q changes no divergence and makes the max-norm balls fit.
    shift, root = q.mean(axis=0), _whitener(q, least >= _FULL * width)
    p, q = (p - shift) @ root, (q - shift) @ root
    law_p, law_q = fit_normal(p), fit_normal(q)
    normal = least > width + 2 and looks_normal(p, law_p) and looks_normal(q, law_q)
    # In many columns samples share so many neighbours that more of them make no sharper test.
    ks = [k] if normal or width > FEW_COLUMNS else [k, min(_STEADY * k, n - 1, len(q))]
    local = _local(p, q, ks)
    plain = float(local[:, 0].mean())
    if method == "plain" or (method == "auto" and least <= width + 2):
        warnings += _dimension(width) + small_warning(least)
        return _with_neighbours(plain, p, q, k, level, "plain", {}, warnings)
    if least <= width + 2:
        raise ValueError(
            f"kl_from_samples: p_samples and q_samples must hold more than {width + 2} samples each to fit {width} "
            f"columns, got {n} and {len(q)}. Collect more, or use method='plain'."
        )
    closed = gaussian_kl(law_p, law_q)
    rng = np.random.default_rng(seed)

    def missed_by_neighbours() -> FloatArray:
        drawn_p, drawn_q = draw_normal(law_p, rng, n), draw_normal(law_q, rng, len(q))
        return np.asarray(_local(drawn_p, drawn_q, [k]) - normal_log_ratio(drawn_p, law_p, law_q)[:, None])

    ratio_data = normal_log_ratio(p, law_p, law_q)
    missed, accepted = _missed(local[:, :1] - ratio_data[:, None], missed_by_neighbours, len(q), closed)
    surrogate = float(ratio_data.mean()) + missed
    candidates = {"plain": plain, "gaussian": closed, "surrogate": surrogate}
    if method == "gaussian" or (method == "auto" and normal and accepted):
        low, high, error = closed_interval(closed, law_p, law_q, level)
        return Estimate(
            closed, low, high, method="gaussian", n=n, samples=ratio_data, candidates=candidates, warnings=warnings,
            level=level, std_error=error,
        )  # fmt: skip
    if method == "surrogate" or (method == "auto" and normal):
        warnings += (
            f"bias: nearest neighbours needed a correction of {surrogate - plain:+.3f} nats; the interval does not "
            "hold what it missed",
        )
        return _with_neighbours(surrogate, p, q, k, level, "surrogate", candidates, warnings)
    if method == "auto" and least < _FULL * width:
        warnings += (
            f"dimension: {least} samples are too few to fit laws of {width} columns; nearest neighbours without a "
            "correction are given, and the interval does not hold their bias",
        )
        return _with_neighbours(plain, p, q, k, level, "plain", candidates, warnings)
    return _by_margins(columns, (shift, root), local, (method, ks, level), rng, candidates, warnings)


def _missed(data: FloatArray, drawn: Callable[[], FloatArray], m: int, value: float) -> tuple[float, bool]:
    """Compute the mean of what neighbours say beyond a fit, less the same on draws of the fit, and whether it is noise.

    Args:
        data: the terms on the data, at the nearest neighbours, which have less bias and are returned, and perhaps at
            more of them, which have less noise and are the sharper test.
        drawn: makes the terms on a draw of the fit.
        m: samples of q.
        value: divergence of the fit.

    Shape:
        data, drawn: (n, 1) or (n, 2).
    """
    means: list[FloatArray] = []
    variances: list[FloatArray] = []
    missed, accepted = np.zeros(2), False
    while not accepted and len(means) < _DRAWS:
        terms = drawn()
        means.append(terms.mean(axis=0))
        variances.append(terms.var(axis=0))
        missed = data.mean(axis=0) - np.mean(means, axis=0)
        variance = data.var(axis=0) + np.mean(variances, axis=0) / len(means)
        # Samples of p far from q share their few neighbours in q, which the per-sample spread does not show.
        tests = len(variance)
        noise = np.hypot(_SHARED[:tests] * np.sqrt(variance / min(len(data), m)), _FAR[:tests] * value)
        accepted = bool((np.abs(missed) < _ACCEPT * noise).all())
    return float(missed[0]), accepted


def _own_columns(p: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray, int]:
    """Leave out columns that do not vary, or are combinations of those before them, in both samples together."""
    both = np.vstack([p, q])
    spread = np.where(np.ptp(both, axis=0) > 0, both.std(axis=0), 0.0)
    centred = (both - both.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    own = np.abs(np.diag(np.linalg.qr(centred, mode="r"))) > _FLAT * math.sqrt(len(both))
    kept = np.zeros(len(spread), dtype=bool)
    kept[: len(own)] = own
    return p[:, kept], q[:, kept], int((~kept).sum())


def _degenerate(x: FloatArray) -> bool:
    spread = x.std(axis=0)
    if (spread == 0).any():
        return True
    values = np.linalg.eigvalsh(np.atleast_2d(np.corrcoef(x.T)))
    return len(x) > x.shape[1] and float(values[0]) < _FLAT**2


def _by_margins(
    columns: tuple[FloatArray, FloatArray], whitening: tuple[FloatArray, FloatArray], local: FloatArray,
    settings: tuple[str, list[int], float], rng: np.random.Generator, candidates: dict[str, float],
    warnings: tuple[str, ...],
) -> Estimate:  # fmt: skip
    """Margins and Gaussian copulas, plus what neighbours in all columns say that they miss."""
    p, q = columns
    method, ks, level = settings
    shift, root = whitening
    fitted = margins_divergence(p, q)
    value, name, missed = fitted.value, "margins", 0.0
    if method == "auto" and p.shape[1] > 1:

        def missed_by_neighbours() -> FloatArray:
            drawn_p, drawn_q = redraw(p, rng), redraw(q, rng)
            near = _local((drawn_p - shift) @ root, (drawn_q - shift) @ root, ks)
            return np.asarray(near - margins_divergence(drawn_p, drawn_q).both[:, : len(ks)])

        missed, accepted = _missed(local - fitted.both[:, : len(ks)], missed_by_neighbours, len(q), fitted.value)
        if not accepted:
            value, name = value + missed, "surrogate"
            warnings += (
                f"bias: neither normal laws nor margins with Gaussian copulas fit; nearest neighbours added "
                f"{missed:+.3f} nats to the latter, and the interval does not hold what they miss",
            )

    def part(rows: IntArray) -> float:
        return margins_divergence(p[rows], q[_in_step(rows, len(p), len(q))]).value

    error, quantile = subset_interval(part, len(p), _SMALLEST, level)
    if math.isnan(error):
        error, quantile = fitted.error, float(stdtrit(len(p) - 1, 0.5 + level / 2))
        warnings += small_warning(len(p))
    if abs(fitted.gap) > max(_BIASED, _CLEAR * fitted.gap_error):
        warnings += (
            f"bias: the sum over the margins moves by {fitted.gap:+.3f} nats with the number of neighbours; p has mass "
            "where q has few samples, and a bias of that order may be left",
        )
    if p.shape[1] > FEW_COLUMNS:
        warnings += (
            f"dimension: the divergences of {p.shape[1]} margins are added up, with a bias of some thousandths "
            "each that the interval does not hold",
        )
    outside = float(np.maximum(p < q.min(axis=0), p > q.max(axis=0)).mean(axis=0).max())
    if outside > _OUTSIDE:
        warnings += (
            f"support: {outside:.1%} of the samples of p lie beyond every sample of q in a column; what q gives them "
            "is not known, and the divergence may be far larger",
        )
    elif abs(fitted.tail) > max(_CARRIED, error):
        warnings += (
            f"support: {fitted.tail:+.3f} nats come from samples of p where q has hardly any; its tail was carried on "
            "as that of a normal law, which the interval takes for granted",
        )
    shape = tail_shape(fitted.samples)
    if shape > tail_limit(len(p)):
        warnings += (
            f"tail: the log ratio has large values under p (shape {shape:.2f}, {len(p)} samples), whose mean samples "
            "may miss; the interval may be too narrow, and at a shape near 1 or above the divergence may be infinite",
        )
    half = quantile * error
    return Estimate(
        value, value - half, value + half, method=name, n=len(p), samples=fitted.samples if name == "margins" else None,
        candidates={**candidates, "margins": fitted.value}, warnings=warnings, level=level, std_error=error,
        details={"k": ks[0], "m": len(q), "missed": missed},
    )  # fmt: skip


def _local(p: FloatArray, q: FloatArray, ks: list[int]) -> FloatArray:
    """Return d log(nu / rho) + log(m / (n - 1)), (n, len(ks)): distance to the k-th sample of q over that within p."""
    own = np.maximum(kth_distances(p, ks), 1e-300)
    other = np.maximum(kth_distances(q, ks, p), 1e-300)
    return np.asarray(p.shape[1] * (np.log(other) - np.log(own)) + math.log(len(q) / (len(p) - 1)))


def _whitener(x: FloatArray, whole: bool) -> FloatArray:
    """Undo the covariance, or the spread of each column where samples are too few to know more of it."""
    if not whole:
        return np.diag(1.0 / x.std(axis=0))
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(x.T)))
    floor = max(float(values[-1]), 1e-300) * 1e-12
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    return np.asarray(vectors * np.sign(largest) / np.sqrt(np.maximum(values, floor)))


def _dimension(width: int) -> tuple[str, ...]:
    if width <= 2:
        return ()
    return (f"dimension: {width} dimensions; plain nearest neighbours are biased and the interval does not hold that",)


def _in_step(rows: IntArray, n: int, m: int) -> IntArray:
    """Rows of q for a subset of the n rows of p: as large a part of the m."""
    return np.unique((rows * (m / n)).astype(np.int64))


def _with_neighbours(
    value: float, p: FloatArray, q: FloatArray, k: int, level: float, method: str, candidates: dict[str, float],
    warnings: tuple[str, ...],
) -> Estimate:  # fmt: skip

    def local(rows: IntArray, ks: list[int]) -> list[FloatArray]:
        chosen = _in_step(rows, len(p), len(q))
        most = min(len(rows) - 2, len(chosen) - 1)
        return list(_local(p[rows], q[chosen], [min(near, most) for near in ks]).T)

    _, spread = neighbour_interval(local, len(p), k, level, shared=SHARING)
    return Estimate(
        value,
        value - spread.half,
        value + spread.half,
        method=method,
        n=len(p),
        candidates=candidates or {method: value},
        warnings=warnings + spread.warnings,
        level=level,
        std_error=spread.error,
        details={"k": k, "m": len(q)},
    )
