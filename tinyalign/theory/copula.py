"""Elliptical copulas: mutual information in closed form after a rank transform, exact bias included.

Mutual information is blind to monotone maps of single coordinates, so ranks lose nothing. Where the copula is Gaussian
or Student's, its parameters give the information with the error of maximum likelihood, in any dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, gammaln, ndtr, ndtri, stdtrit

from tinyalign.theory._input import column_generator

__all__ = ["EllipticalCopula", "canonical_variates", "fit_gaussian", "fit_student", "normal_scores", "rank_columns"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_FEW = 1000  # samples, ranked among themselves, that the first search reads
_STEP = 0.25  # in log degrees of freedom, where the likelihood is close to a parabola
_GRID = (0.7, 1.5, 3.2, 7.0, 15.0, 32.0)


@dataclass(frozen=True)
class EllipticalCopula:
    """A fitted copula of (x, y) with Gaussian or Student margins.

    Attributes:
        correlation: (d, d) dispersion with unit diagonal, x first.
        split: number of columns of x.
        n: samples behind the fit.
        freedom: degrees of freedom; inf is the Gaussian.
        points: (n, d) the samples on the copula's own margins.
        log_density: mean log copula density of the samples, for choosing between fits.
    """

    correlation: FloatArray
    split: int
    n: int
    freedom: float
    points: FloatArray
    log_density: float

    @property
    def information(self) -> float:
        """Mutual information of the fitted law, less its expected bias, in nats."""
        value = _gaussian_information(self.correlation, self.split) - self.bias
        if np.isfinite(self.freedom):
            value += _radial_information(self.freedom, self.split, len(self.correlation) - self.split)
        return value

    @property
    def bias(self) -> float:
        """Expected bias of the information from the determinants of estimated correlations, in nats."""
        width = len(self.correlation)
        left, right = self.split, width - self.split
        return _log_det_bias(self.n, left) + _log_det_bias(self.n, right) - _log_det_bias(self.n, width)

    def pointwise(self, points: FloatArray | None = None) -> FloatArray:
        """Compute log p(x, y) / p(x) p(y) of the fitted law at points on its margins, (n,)."""
        z = self.points if points is None else points
        joint = _log_density(z, self.correlation, self.freedom)
        s = self.split
        left = _log_density(z[:, :s], self.correlation[:s, :s], self.freedom)
        right = _log_density(z[:, s:], self.correlation[s:, s:], self.freedom)
        return joint - left - right

    def draw(self, n: int, seed: int = 0) -> FloatArray:
        """Draw n points of the fitted law, (n, d)."""
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(n, len(self.correlation))) @ _root(self.correlation).T
        if np.isfinite(self.freedom):
            z *= np.sqrt(self.freedom / rng.chisquare(self.freedom, n))[:, None]
        return z

    def leading(self, pairs: int) -> EllipticalCopula:
        """Return the law of the leading canonical pairs: elliptical laws stay so under linear maps."""
        s = self.split
        left, right = _root(self.correlation[:s, :s]), _root(self.correlation[s:, s:])
        left_map, right_map = np.linalg.inv(left).T, np.linalg.inv(right).T
        u, singular, vt = np.linalg.svd(left_map.T @ self.correlation[:s, s:] @ right_map)
        left_map, right_map = (left_map @ u)[:, :pairs], (right_map @ vt.T)[:, :pairs]
        points = np.hstack([self.points[:, :s] @ left_map, self.points[:, s:] @ right_map])
        width = left_map.shape[1] + right_map.shape[1]
        correlation = np.eye(width)
        for pair in range(min(left_map.shape[1], right_map.shape[1])):
            other = left_map.shape[1] + pair
            correlation[pair, other] = correlation[other, pair] = singular[pair]
        return EllipticalCopula(correlation, left_map.shape[1], self.n, self.freedom, points, np.nan)


def rank_columns(x: FloatArray) -> IntArray:
    """Rank each column, 0..n-1; ties at random, as their order of appearance would tie two columns together.

    Shape:
        x: (n, d). returns: (n, d).
    """
    ranks = np.empty(x.shape, dtype=np.int64)
    numbers = np.arange(len(x))
    for column in range(x.shape[1]):
        values = x[:, column]
        order = np.argsort(values, kind="stable")
        if bool((np.diff(values[order]) == 0).any()):
            mixed = column_generator(values).permutation(len(x))
            order = mixed[np.argsort(values[mixed], kind="stable")]
        ranks[order, column] = numbers
    return ranks


def normal_scores(x: FloatArray) -> FloatArray:
    """Replace each column by the standard normal quantiles of its ranks, with unit variance.

    Example:
        >>> normal_scores(np.array([[3.0], [100.0], [1.0]])).round(3).ravel().tolist()
        [0.0, 1.225, -1.225]
    """
    return _normal_quantiles(len(x))[rank_columns(x)]


def fit_gaussian(scores: FloatArray, split: int) -> EllipticalCopula:
    """Fit the Gaussian copula to normal scores (columns of x first)."""
    n = len(scores)
    correlation = np.asarray(scores.T @ scores / n)
    density = -0.5 * np.linalg.slogdet(correlation)[1]
    return EllipticalCopula(correlation, split, n, np.inf, scores, float(density))


def fit_student(
    x: FloatArray, split: int, *, start: EllipticalCopula | None = None, refine: bool = True
) -> EllipticalCopula:
    """Fit a Student copula: degrees of freedom by profile likelihood, dispersion by expectation-maximisation.

    Args:
        x: samples of any margins, columns of x first.
        split: number of columns of x.
        start: a law to start from; the degrees of freedom are searched on a part of the samples where it is Gaussian.
        refine: search again on all samples; without it the law is good enough to be rejected.

    Source:
        Demarta and McNeil 2005, section 4; the information is that of Arellano-Valle et al. 2013, equation 12.
    """
    n = len(x)
    ranks = rank_columns(x)
    start = start or fit_gaussian(_normal_quantiles(n)[ranks], split)
    correlation, freedom = start.correlation, float(np.log(start.freedom))
    if np.isinf(freedom):
        few = ranks if n <= _FEW else rank_columns(ranks[:: n // _FEW].astype(np.float64))
        scores = [_profile(few, candidate, correlation, 2)[0] for candidate in _GRID]
        freedom = _vertex(np.log(_GRID), np.array(scores))
    for _ in range(3 if refine else 0):
        around = freedom + _STEP * np.array([-1.0, 0.0, 1.0])
        values = [_profile(ranks, float(np.exp(at)), correlation, 1)[0] for at in around]
        freedom = _vertex(around, np.array(values))
        if values[1] == max(values):
            break
    # A start that is a Student law, or a fit that will be refined, is close enough for two steps.
    steps = 4 if refine and np.isinf(start.freedom) else 2
    density, points, correlation = _profile(ranks, float(np.exp(freedom)), correlation, steps)
    return EllipticalCopula(correlation, split, n, float(np.exp(freedom)), points, density)


def _vertex(at: FloatArray, values: FloatArray) -> float:
    """Top of the parabola through the best value and its two neighbours; the best place itself at an end."""
    best = int(values.argmax())
    if not 0 < best < len(at) - 1:
        return float(at[best])
    left, right = at[best - 1 : best + 2 : 2] - at[best]
    fall_left, fall_right = values[best - 1 : best + 2 : 2] - values[best]
    curvature = (fall_left / left - fall_right / right) / (left - right)
    slope = fall_left / left - curvature * left
    return float(at[best] - slope / (2 * curvature)) if curvature < 0 else float(at[best])


def canonical_variates(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Rotate x and y to uncorrelated columns, leading pairs first; an invertible map keeps the information.

    Directions without variance are dropped.

    Shape:
        x: (n, dx). y: (n, dy). returns: (n, rx), (n, ry) and the canonical correlations.
    """
    left, right = _whiten(x), _whiten(y)
    u, singular, vt = np.linalg.svd(left.T @ right / len(x))
    return left @ u, right @ vt.T, singular


def _whiten(x: FloatArray) -> FloatArray:
    centred = x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    kept = values > max(values[-1], 1e-300) * 1e-10
    return np.asarray(centred @ (vectors[:, kept] / np.sqrt(values[kept])))


def _normal_quantiles(n: int) -> FloatArray:
    quantiles = ndtri((np.arange(n) + 0.5) / n)
    return np.asarray(quantiles / quantiles.std())


def _student_quantiles(n: int, freedom: float) -> FloatArray:
    """Student quantiles of the ranks of n samples.

    The exact ones are slow; between 257 of them, asinh is nearly linear in the normal quantile (error below 5e-5).
    """
    scores, nodes, chances = _lower_half(n)
    half = np.sinh(np.interp(scores, nodes, np.arcsinh(stdtrit(freedom, chances))))
    quantiles = np.concatenate([half, -half[: n // 2][::-1]])
    if n % 2:
        quantiles[n // 2] = 0.0
    return np.asarray(quantiles)


@lru_cache(maxsize=4)
def _lower_half(n: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Normal quantiles of the lower ranks of n samples, 257 nodes over them, and the chances of these."""
    scores = ndtri((np.arange((n + 1) // 2) + 0.5) / n)
    nodes = np.linspace(scores[0], 0.0, 257)
    return scores, nodes, ndtr(nodes)


def _profile(
    ranks: IntArray, freedom: float, correlation: FloatArray, steps: int
) -> tuple[float, FloatArray, FloatArray]:
    """Return the mean log copula density at these degrees of freedom, the points and the dispersion."""
    n = len(ranks)
    quantiles = _student_quantiles(n, freedom)
    z = quantiles[ranks]
    width = z.shape[1]
    for _ in range(steps):
        weight = (freedom + width) / (freedom + _distance(z, correlation))
        scatter = (z * weight[:, None]).T @ z
        scale = np.sqrt(np.diag(scatter))
        correlation = scatter / np.outer(scale, scale)
    margins = _log_density(quantiles[:, None], np.eye(1), freedom)[ranks].sum(axis=1)
    return float((_log_density(z, correlation, freedom) - margins).mean()), z, correlation


def _log_density(z: FloatArray, correlation: FloatArray, freedom: float) -> FloatArray:
    width = z.shape[1]
    distance = _distance(z, correlation)
    log_det = np.linalg.slogdet(correlation)[1]
    if not np.isfinite(freedom):
        return np.asarray(-0.5 * (width * np.log(2 * np.pi) + log_det + distance))
    constant = gammaln((freedom + width) / 2) - gammaln(freedom / 2) - 0.5 * width * np.log(freedom * np.pi)
    return np.asarray(constant - 0.5 * log_det - 0.5 * (freedom + width) * np.log1p(distance / freedom))


def _distance(z: FloatArray, correlation: FloatArray) -> FloatArray:
    if z.shape[1] == 1:
        return np.asarray(z[:, 0] ** 2)
    root = np.linalg.inv(_root(correlation))
    return np.asarray(((z @ root.T) ** 2).sum(axis=1))


def _root(correlation: FloatArray) -> FloatArray:
    try:
        return np.asarray(np.linalg.cholesky(correlation), dtype=np.float64)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(correlation)
        return np.asarray(np.linalg.cholesky(vectors * np.maximum(values, 1e-12) @ vectors.T))


def _gaussian_information(correlation: FloatArray, split: int) -> float:
    parts = (correlation[:split, :split], correlation[split:, split:], correlation)
    left, right, joint = (np.linalg.slogdet(part)[1] for part in parts)
    return float(0.5 * (left + right - joint))


def _log_det_bias(n: int, width: int) -> float:
    """Half the expected log-determinant of a sample covariance of n points around a known truth."""
    return float(0.5 * (digamma((n - np.arange(1, width + 1)) / 2) + np.log(2.0 / (n - 1))).sum())


def _radial_information(freedom: float, left: int, right: int) -> float:
    def term(a: float) -> float:
        return float(gammaln(a / 2) - a / 2 * digamma(a / 2))

    return term(freedom) + term(freedom + left + right) - term(freedom + left) - term(freedom + right)
