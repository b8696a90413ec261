"""Pairs of laws with known divergence and classes with known information, for benchmarks/mutual_information.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from known_laws import Draw, Law, Map, Samples
from scipy.special import digamma, gammaln

Columns = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


class Pair(NamedTuple):
    """Two laws over the same space: KL(p || q) in nats and a sampler of both."""

    name: str
    width: int
    truth: float
    sample: Draw


def columns_pair(name: str, width: int, truth: float, p: Columns, q: Columns) -> Pair:
    """Independent columns of one law on each side: the divergence of a column counts once for each."""

    def sample(rng: np.random.Generator, n: int) -> Samples:
        return p(rng, (n, width)), q(rng, (n, width))

    return Pair(name, width, width * truth, sample)


def on_line(p: Map, q: Map, reach: float) -> float:
    """KL of two log-densities on a line, by quadrature."""
    grid = np.linspace(-reach, reach, 400_001)
    one, two = p(grid), q(grid)
    return float(np.trapezoid(np.exp(one) * (one - two), grid))


def normal_pair(width: int, shift: float, scale: float, *, share: float = 0.0, mixed: bool = False) -> Pair:
    """N(0, A) against N(shift, scale^2 B); A has one common factor, and ``mixed`` turns both by one matrix."""
    covariance = np.full((width, width), share) + (1 - share) * np.eye(width)
    root = np.linalg.cholesky(covariance)
    trace, log_det = float(np.trace(covariance)), float(np.linalg.slogdet(covariance)[1])
    truth = 0.5 * ((trace + width * shift**2) / scale**2 - width + 2 * width * np.log(scale) - log_det)
    change = np.random.default_rng(width).normal(size=(width, width)) if mixed else np.eye(width)

    def sample(rng: np.random.Generator, n: int) -> Samples:
        p, q = rng.normal(size=(2, n, width))
        return p @ root.T @ change, (scale * q + shift) @ change

    return Pair(f"normal {width}, shift {shift}, scale {scale}, share {share}", width, truth, sample)


def laplace_pair(width: int, shift: float, scale: float) -> Pair:
    """KL of Laplace(0, 1) from Laplace(shift, scale): ln s + (|m| + e^-|m|) / s - 1."""
    truth = np.log(scale) + (abs(shift) + np.exp(-abs(shift))) / scale - 1
    return columns_pair(
        f"Laplace {width}, shift {shift}, scale {scale}", width, float(truth),
        lambda rng, size: rng.laplace(size=size), lambda rng, size: rng.laplace(shift, scale, size),
    )  # fmt: skip


def gamma_pair(width: int, one: float, two: float, rate: float) -> Pair:
    """KL of Gamma(one, 1) from Gamma(two, rate)."""
    truth = (one - two) * digamma(one) - gammaln(one) + gammaln(two) - two * np.log(rate) + one * (rate - 1)
    return columns_pair(
        f"gamma {width}, {one} from {two} at {rate}", width, float(truth),
        lambda rng, size: rng.gamma(one, 1.0, size), lambda rng, size: rng.gamma(two, 1 / rate, size),
    )  # fmt: skip


def student_pair(width: int, one: float, two: float, scale: float) -> Pair:
    def log_density(freedom: float, spread: float) -> Map:
        constant = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - 0.5 * np.log(freedom * np.pi) - np.log(spread)
        return lambda z: constant - (freedom + 1) / 2 * np.log1p((z / spread) ** 2 / freedom)

    truth = on_line(log_density(one, 1.0), log_density(two, scale), 400.0)
    return columns_pair(
        f"Student {width}, {one} from {two} at {scale}", width, truth,
        lambda rng, size: rng.standard_t(one, size), lambda rng, size: scale * rng.standard_t(two, size),
    )  # fmt: skip


def humps_pair(width: int, apart: float) -> Pair:
    """Two humps at +-apart against one wide normal."""
    spread = np.sqrt(1 + apart**2)

    def p(z: np.ndarray) -> np.ndarray:
        ends = np.logaddexp(-0.5 * (z - apart) ** 2, -0.5 * (z + apart) ** 2)
        return np.asarray(ends - np.log(2) - 0.5 * np.log(2 * np.pi))

    truth = on_line(p, lambda z: -0.5 * (z / spread) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(spread), 30.0)
    return columns_pair(
        f"humps {width}, apart {apart}", width, truth,
        lambda rng, size: rng.normal(size=size) + apart * rng.choice([-1.0, 1.0], size),
        lambda rng, size: spread * rng.normal(size=size),
    )  # fmt: skip


def lognormal_pair(width: int, shift: float, scale: float, share: float) -> Pair:
    """Exponentials of normals: the divergence of the normals."""
    plain = normal_pair(width, shift, scale, share=share)

    def sample(rng: np.random.Generator, n: int) -> Samples:
        p, q = plain.sample(rng, n)
        return np.exp(0.7 * p), np.exp(0.7 * q)

    return Pair(f"lognormal {width}, shift {shift}, scale {scale}, share {share}", width, plain.truth, sample)


PAIRS = [
    normal_pair(1, 1.0, 1.0), normal_pair(1, 0.0, 1.5), normal_pair(1, 2.2, 1.0),
    normal_pair(3, 0.5, 1.3), normal_pair(3, 1.0, 0.8), normal_pair(3, 1.3, 1.0),
    normal_pair(3, 0.0, 1.0, share=0.6),
    normal_pair(3, 0.6, 0.7, mixed=True), normal_pair(3, 0.0, 1.0), normal_pair(3, 0.0, 1.0, share=0.9),
    normal_pair(20, 0.2, 1.2), normal_pair(20, 0.3, 0.9), normal_pair(20, 0.5, 1.0),
    normal_pair(20, 0.1, 1.0, share=0.3),
    laplace_pair(1, 1.0, 1.0), laplace_pair(3, 0.5, 1.4), laplace_pair(3, 1.5, 1.0), laplace_pair(20, 0.3, 1.2),
    gamma_pair(1, 1.0, 1.0, 2.0), gamma_pair(3, 1.0, 1.0, 0.5), gamma_pair(3, 2.0, 3.5, 1.0),
    gamma_pair(20, 2.0, 2.5, 1.2),
    student_pair(1, 5.0, 3.0, 1.0), student_pair(3, 4.0, 6.0, 1.5), student_pair(20, 5.0, 8.0, 1.1),
    humps_pair(1, 2.0), humps_pair(3, 1.8), humps_pair(20, 1.3),
    lognormal_pair(3, 0.4, 1.2, 0.5), lognormal_pair(20, 0.2, 1.1, 0.2),
]  # fmt: skip


def classes(name: str, width: int, spread: float, count: int = 4, scale: float = 1.0) -> Law:
    """Normal classes at random means; the last one ``scale`` times as wide. I by a million draws, to .001."""
    means = np.random.default_rng(count + width).normal(size=(count, width)) * spread
    widths = np.r_[np.ones(count - 1), scale]

    def sample(rng: np.random.Generator, n: int) -> Samples:
        labels = rng.integers(0, count, n)
        return means[labels] + widths[labels, None] * rng.normal(size=(n, width)), labels

    parts = []
    for seed in range(10):
        x, labels = sample(np.random.default_rng(90_000 + seed), 1_000_000 // max(width, 10))
        distance = ((x[:, None] - means) ** 2).sum(axis=2) / widths**2
        logits = -0.5 * distance - width * np.log(widths)
        top = logits.max(axis=1, keepdims=True)
        normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        parts.append(np.log(count) + (logits[np.arange(len(x)), labels] - normaliser).mean())
    return Law(name, width > 8, float(np.mean(parts)), sample)


CLASSES = [
    classes("classes 1", 1, 1.0), classes("classes 2", 2, 0.8), classes("classes 3, unequal", 3, 0.5, scale=2.0),
    classes("classes 8", 8, 0.4), classes("two classes 8", 8, 0.3, 2), classes("classes 64", 64, 0.2),
    classes("ten classes 64", 64, 0.25, 10), classes("classes 64, unequal", 64, 0.1, scale=1.2),
]  # fmt: skip
