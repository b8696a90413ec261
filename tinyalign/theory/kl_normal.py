"""Normal laws fitted to samples: their divergence without the bias of its estimate, its interval, and draws of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from tinyalign.theory.intervals import inverted_interval

__all__ = ["Normal", "closed_interval", "draw_normal", "fit_normal", "gaussian_kl", "looks_normal", "normal_log_ratio"]

FloatArray = NDArray[np.float64]
_FLAT = 1e-6  # share of a spread under which it is none


class Normal(NamedTuple):
    """The moments of n samples."""

    mean: FloatArray
    covariance: FloatArray
    n: int


def gaussian_kl(p: Any, q: Any) -> float:
    """KL between two normal laws whose moments were estimated, less the expected bias of the estimates."""
    width, n, m = len(p.mean), p.n, q.n
    value = 0.5 * (
        _trace_ratio(p.covariance, q.covariance, m) - width + _log_det(q.covariance, m) - _log_det(p.covariance, n)
    )
    gap = p.mean - q.mean
    factor = (m - width - 2) / (m - 1)
    noise = width / n * float(np.trace(np.linalg.solve(q.covariance, p.covariance))) * factor / width + width / m
    return float(value + 0.5 * (factor * gap @ np.linalg.solve(q.covariance, gap) - noise))


def _trace_ratio(p: FloatArray, q: FloatArray, m: int) -> float:
    """Trace of q^-1 p with the inverse-Wishart bias of the estimated inverse taken out."""
    return float((m - len(q) - 2) / (m - 1) * np.trace(np.linalg.solve(q, p)))


def _log_det(covariance: FloatArray, n: int) -> float:
    """Log-determinant of the true covariance behind an estimate from n samples, unbiased."""
    width = len(covariance)
    bias = digamma((n - np.arange(1, width + 1)) / 2) + math.log(2.0 / (n - 1))
    return float(np.linalg.slogdet(covariance)[1] - bias.sum())


def fit_normal(x: FloatArray) -> Normal:
    """Return the moments of samples, (n, d)."""
    return Normal(x.mean(axis=0), np.atleast_2d(np.cov(x.T)), len(x))


def draw_normal(law: Normal, rng: np.random.Generator, n: int) -> FloatArray:
    """Return n samples of the law, (n, d)."""
    return np.asarray(law.mean + rng.normal(size=(n, len(law.mean))) @ _root(law.covariance).T)


def _root(covariance: FloatArray) -> FloatArray:
    """Cholesky's. Eigenvectors of what is whitened already turn with its rounding, and what is drawn by them too."""
    floor = _FLAT**2 * max(float(np.diag(covariance).max()), 1e-300)
    return np.asarray(np.linalg.cholesky(covariance + floor * np.eye(len(covariance))), dtype=np.float64)


def normal_log_ratio(x: FloatArray, p: Normal, q: Normal) -> FloatArray:
    """Return log p - log q at each sample, (n,)."""
    result = np.zeros(len(x))
    for law, sign in ((p, 1.0), (q, -1.0)):
        centred = x - law.mean
        distance = np.einsum("nd,nd->n", centred @ np.linalg.inv(law.covariance), centred)
        result -= sign * 0.5 * (distance + np.linalg.slogdet(law.covariance)[1])
    return result


def looks_normal(x: FloatArray, law: Normal) -> bool:
    """Mardia's kurtosis and the third and fourth moments of each whitened column."""
    n, width = x.shape
    z = np.linalg.solve(_root(law.covariance), (x - law.mean).T).T
    radius = (z**2).sum(axis=1)
    kurtosis = abs(float((radius**2).mean()) - width * (width + 2)) / math.sqrt(8 * width * (width + 2) / n)
    skew = np.abs((z**3).mean(axis=0)).max() / math.sqrt(6.0 / n)
    tails = np.abs((z**4).mean(axis=0) - 3).max() / math.sqrt(24.0 / n)
    limit = 2.8 + 0.5 * math.log(width)
    return bool(kurtosis < limit and skew < limit and tails < limit + 0.2)


def closed_interval(value: float, p: Normal, q: Normal, level: float) -> tuple[float, float, float]:
    """Interval of the closed form: the delta method on both means and covariances, and chi-squares at equal laws."""
    inverse_q = np.linalg.inv(q.covariance)
    gap = p.mean - q.mean
    slope_mean = inverse_q @ gap
    slope_p = 0.5 * (inverse_q - np.linalg.inv(p.covariance))
    slope_q = 0.5 * (inverse_q - inverse_q @ (p.covariance + np.outer(gap, gap)) @ inverse_q)
    variance = slope_mean @ p.covariance @ slope_mean / p.n + slope_mean @ q.covariance @ slope_mean / q.n
    for derivative, law in ((slope_p, p), (slope_q, q)):
        moved = derivative @ law.covariance
        variance += 2.0 * float(np.trace(moved @ moved)) / law.n
    width, sizes = len(p.mean), 1 / p.n + 1 / q.n
    volume_p, volume_q = (float(np.linalg.slogdet(law.covariance)[1]) for law in (p, q))
    plugin = 0.5 * (float(np.trace(inverse_q @ p.covariance) + gap @ slope_mean) - width + volume_q - volume_p)
    slope = float(variance) / plugin if plugin > 1e-9 else 2.0 * sizes
    return inverted_interval(value, slope, 0.25 * width * (width + 3) * sizes**2, level)
