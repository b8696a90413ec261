"""Laws whose mutual information or divergence is known, for benchmarks/mutual_information.py.

Families of the estimators' literature (Kraskov et al. 2004; Czyz et al. 2023) with parameters of our own, so that
nothing is tuned to a published list. A law is hard where its tails are heavy, where it is bent, rotated or padded with
noise, or where no elliptical copula holds it in many columns. Truths are
closed forms, or quadratures over one or two variables.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.special import digamma, gammaln, ndtr

Samples = tuple[np.ndarray, np.ndarray]
Map = Callable[[np.ndarray], np.ndarray]
Draw = Callable[[np.random.Generator, int], Samples]


class Law(NamedTuple):
    """A joint law: its name, its class, I(X; Y) in nats and its sampler."""

    name: str
    hard: bool
    truth: float
    sample: Draw


def same(z: np.ndarray) -> np.ndarray:
    return z


def mapped(law: Law, name: str, left: Map, right: Map | None = None, *, hard: bool = False) -> Law:
    """The law after invertible maps of its sides, which keep the information."""

    def sample(rng: np.random.Generator, n: int) -> Samples:
        x, y = law.sample(rng, n)
        return left(x), (right or left)(y)

    return Law(name, hard, law.truth, sample)


def normal(name: str, correlations: list[float], width: int = 0, *, right: int = 0) -> Law:
    """Correlated pairs of normals beside columns of noise."""
    rho = np.zeros(max(width, len(correlations)))
    rho[: len(correlations)] = correlations

    def sample(rng: np.random.Generator, n: int) -> Samples:
        x, e = rng.normal(size=(2, n, len(rho)))
        return x, (rho * x + np.sqrt(1 - rho**2) * e)[:, : right or None]

    return Law(name, False, float(-0.5 * np.log1p(-(rho[: right or None] ** 2)).sum()), sample)


def dense(name: str, width: int, share: float) -> Law:
    """One common factor behind every column of both sides."""
    covariance = np.full((2 * width, 2 * width), share) + (1 - share) * np.eye(2 * width)
    parts = (covariance[:width, :width], covariance[width:, width:], covariance)
    left, right, both = (np.linalg.slogdet(part)[1] for part in parts)

    def sample(rng: np.random.Generator, n: int) -> Samples:
        z = np.sqrt(share) * rng.normal(size=(n, 1)) + np.sqrt(1 - share) * rng.normal(size=(n, 2 * width))
        return z[:, :width], z[:, width:]

    return Law(name, False, float(0.5 * (left + right - both)), sample)


def student(name: str, freedom: float, correlations: list[float], width: int = 0) -> Law:
    rho = np.zeros(max(width, len(correlations)))
    rho[: len(correlations)] = correlations

    def f(a: float) -> float:
        return float(gammaln(a / 2) - a / 2 * digamma(a / 2))

    radial = f(freedom) + f(freedom + 2 * len(rho)) - 2 * f(freedom + len(rho))

    def sample(rng: np.random.Generator, n: int) -> Samples:
        x, e = rng.normal(size=(2, n, len(rho)))
        scale = np.sqrt(freedom / rng.chisquare(freedom, n))[:, None]
        return x * scale, (rho * x + np.sqrt(1 - rho**2) * e) * scale

    return Law(name, True, float(-0.5 * np.log1p(-(rho**2)).sum()) + radial, sample)


def turn(width: int, seed: int) -> Map:
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    return lambda z: z @ rotation


def cube(z: np.ndarray) -> np.ndarray:
    return np.asarray(z * np.sqrt(np.abs(z)))


def wiggle(z: np.ndarray) -> np.ndarray:
    return np.asarray(z + 0.35 * np.sin(1.6 * z) + 0.1 * np.sin(3.1 * z + 1.0))


def two_humps(z: np.ndarray) -> np.ndarray:
    return np.asarray(np.sign(z) * (1.0 + np.abs(z) ** 0.7))


def spiral(speed: float) -> Map:
    """Turn the first two columns by an angle that grows with the squared radius: it keeps volumes."""

    def bend(z: np.ndarray) -> np.ndarray:
        angle = speed * (z**2).sum(axis=1)
        turned = z.copy()
        turned[:, 0] = np.cos(angle) * z[:, 0] - np.sin(angle) * z[:, 1]
        turned[:, 1] = np.sin(angle) * z[:, 0] + np.cos(angle) * z[:, 1]
        return turned

    return bend


def roll(z: np.ndarray) -> np.ndarray:
    angle = 1.5 * np.pi * (1 + 2 * ndtr(z))
    return np.hstack([angle * np.cos(angle), angle * np.sin(angle)])


def padded(columns: int, seed: int) -> Callable[[Law], Draw]:
    """Columns of noise beside both sides, then a rotation of each."""

    def wrap(law: Law) -> Draw:
        def sample(rng: np.random.Generator, n: int) -> Samples:
            sides = law.sample(rng, n)
            wide = [np.hstack([side, rng.normal(size=(n, columns))]) for side in sides]
            return turn(wide[0].shape[1], seed)(wide[0]), turn(wide[1].shape[1], seed + 1)(wide[1])

        return sample

    return wrap


def uniform_noise(rng: np.random.Generator, n: int, width: float) -> Samples:
    x = rng.uniform(size=(n, 1))
    return x, x + rng.uniform(-width, width, (n, 1))


def uniform_noise_truth(width: float) -> float:
    return width - np.log(2 * width) if width <= 0.5 else 1 / (4 * width)


def gamma_exponential(rng: np.random.Generator, n: int, shape: float) -> Samples:
    x = rng.gamma(shape, size=(n, 1))
    return x, rng.exponential(size=(n, 1)) / x


def pareto(rng: np.random.Generator, n: int, shape: float) -> Samples:
    x, y = rng.exponential(size=(2, n, 1)) / rng.gamma(shape, size=(n, 1))
    return x, y


GRID = np.linspace(-5, 5, 2001)


def entropy_on(values: np.ndarray, density: np.ndarray) -> float:
    density = density / np.trapezoid(density, values)
    return float(-np.trapezoid(density * np.log(density + 1e-300), values))


def curve(name: str, bend: Map, noise: float, *, uniform: float = 0.0) -> Law:
    """Y = f(X) + noise with X standard normal, or uniform on +-uniform; h(Y) by quadrature."""
    grid = GRID if not uniform else np.linspace(-uniform, uniform, 4001)
    weight = np.exp(-0.5 * grid**2) if not uniform else np.ones_like(grid)
    centre = bend(grid)
    values = np.linspace(centre.min() - 6 * noise, centre.max() + 6 * noise, 3001)
    density = np.array([(weight * np.exp(-0.5 * ((v - centre) / noise) ** 2)).sum() for v in values])
    truth = entropy_on(values, density) - 0.5 * np.log(2 * np.pi * np.e * noise**2)

    def sample(rng: np.random.Generator, n: int) -> Samples:
        x = rng.uniform(-uniform, uniform, (n, 1)) if uniform else rng.normal(size=(n, 1))
        return x, bend(x) + noise * rng.normal(size=(n, 1))

    return Law(name, False, truth, sample)


def product(name: str, noise: float, columns: int) -> Law:
    """Y is the product of two columns of X plus noise; nothing is correlated."""
    values = np.linspace(-30, 30, 12001)
    weight = np.exp(-0.5 * GRID**2)
    spread = GRID**2 + noise**2
    density = sum(w * np.exp(-0.5 * values**2 / v) / np.sqrt(v) for w, v in zip(weight, spread, strict=True))
    truth = entropy_on(values, np.asarray(density)) - 0.5 * np.log(2 * np.pi * np.e * noise**2)

    def sample(rng: np.random.Generator, n: int) -> Samples:
        x = rng.normal(size=(n, columns))
        return x, (x[:, 0] * x[:, 1] + noise * rng.normal(size=n))[:, None]

    return Law(name, True, truth, sample)


def mixture(name: str, means: list[tuple[float, float]], correlations: list[float], scale: float) -> Law:
    """Equal normals of one column a side, of some scale, at these means; I by quadrature on a plane."""
    centre, rho = np.array(means), np.array(correlations)
    reach = float(np.abs(centre).max() + 5 * scale)
    line = np.linspace(-reach, reach, 1201)
    u, v = np.meshgrid(line, line, indexing="ij")
    density = np.zeros_like(u)
    for (a, b), r in zip(centre, rho, strict=True):
        s, t = (u - a) / scale, (v - b) / scale
        density += np.exp(-0.5 * (s**2 - 2 * r * s * t + t**2) / (1 - r**2)) / np.sqrt(1 - r**2)
    density /= density.sum()
    edges = density.sum(axis=1, keepdims=True) * density.sum(axis=0, keepdims=True)
    kept = density > 0
    truth = float((density[kept] * np.log(density[kept] / edges[kept])).sum())

    def sample(rng: np.random.Generator, n: int) -> Samples:
        pick = rng.integers(0, len(rho), n)
        x, e = rng.normal(size=(2, n))
        y = rho[pick] * x + np.sqrt(1 - rho[pick] ** 2) * e
        return (scale * x + centre[pick, 0])[:, None], (scale * y + centre[pick, 1])[:, None]

    return Law(name, True, truth, sample)


def beside(name: str, laws: list[Law], *, hard: bool = False) -> Law:
    """Independent laws side by side: their information adds."""

    def sample(rng: np.random.Generator, n: int) -> Samples:
        sides = [law.sample(rng, n) for law in laws]
        return np.hstack([x for x, _ in sides]), np.hstack([y for _, y in sides])

    return Law(name, hard, sum(law.truth for law in laws), sample)


def rotated(name: str, law: Law, seed: int, width: int) -> Law:
    return mapped(law, name, turn(width, seed), turn(width, seed + 1), hard=True)


def with_noise(name: str, law: Law, columns: int, seed: int) -> Law:
    return Law(name, True, law.truth, padded(columns, seed)(law))


def heavy(law: Law) -> Law:
    return law._replace(hard=True)


_X = mixture("crossing ridges", [(0, 0), (0, 0)], [0.95, -0.95], 1.0)
_CLUSTERS = mixture("four clusters", [(-2, -1), (2, 1), (0.5, -2), (-0.5, 2)], [0.0, 0.6, -0.5, 0.3], 0.6)
_WAVES = mixture("seven clusters", [(3 * i, 2.5 * (i % 2) + i) for i in range(-3, 4)], [0.5] * 7, 0.7)
_BAND = Law("", True, uniform_noise_truth(0.15), partial(uniform_noise, width=0.15))
_TWO = normal("", [0.8, 0.65])

LAWS = [
    normal("normal .88", [0.88]),
    normal("normal .5", [0.5]),
    normal("normal -.3", [-0.3]),
    normal("normal .97", [0.97]),
    normal("independent 1+1", [0.0]),
    mapped(normal("", [0.6]), "lognormal margins", np.exp),
    mapped(normal("", [0.8]), "uniform margins", ndtr),
    mapped(normal("", [0.7]), "half-cube 1+1", cube),
    mapped(normal("", [0.65]), "wiggly 1+1", wiggle),
    mapped(normal("", [0.82]), "two humps 1+1", two_humps, same),
    *(
        Law(f"uniform noise {w}", False, uniform_noise_truth(w), partial(uniform_noise, width=w))
        for w in (0.08, 0.3, 0.9)
    ),
    Law("gamma-exponential 2", False, float(digamma(3.0) - np.log(2.0)), partial(gamma_exponential, shape=2.0)),
    Law("gamma-exponential .7", False, float(digamma(1.7) - np.log(0.7)), partial(gamma_exponential, shape=0.7)),
    Law("Pareto 1.5", False, float(np.log(2.5 / 1.5) - 1 / 2.5), partial(pareto, shape=1.5)),
    curve("parabola", np.square, 0.4, uniform=1.5),
    curve("sine", lambda z: np.sin(4 * z), 0.3, uniform=1.5),
    curve("cubic", lambda z: z**3 / 3 - z, 0.5),
    normal("pairs 2+2", [0.7, 0.5]),
    normal("pairs 3+3", [0.85, 0.4], 3),
    normal("pairs 4+4", [0.8, 0.8], 4),
    normal("normal 3+1", [0.7], 3, right=1),
    dense("dense 2+2", 2, 0.5),
    dense("dense 3+3", 3, 0.4),
    dense("dense 5+5", 5, 0.5),
    mapped(normal("", [0.8, 0.6], 3), "uniform margins 3+3", ndtr),
    mapped(normal("", [0.8, 0.7], 5), "half-cube 5+5", cube),
    normal("independent 3+3", [0.0], 3),
    dense("dense 25+25", 25, 0.5),
    normal("pairs 25+25", [0.6] * 8, 25),
    dense("dense 50+50", 50, 0.3),
    student("Student 1, 1+1", 1, [0.0]),
    student("Student 2, 1+1, .75", 2, [0.75]),
    student("Student 1, 2+2", 1, [0.0, 0.0]),
    student("Student 2, 2+2, .7", 2, [0.7, 0.7]),
    student("Student 3, 3+3", 3, [0.7, 0.0, 0.0]),
    mapped(student("", 2, [0.6] * 3), "asinh Student 2, 3+3", np.arcsinh, hard=True),
    mapped(student("", 1, [0.75]), "asinh Student 1, 1+1", np.arcsinh, hard=True),
    student("Student 3, 5+5", 3, [0.7] * 5),
    mapped(student("", 2, [0.5, 0.5], 5), "asinh Student 2, 5+5", np.arcsinh, hard=True),
    rotated("rotated 10+10", normal("", [0.9, 0.8, 0.7, 0.6, 0.5], 10), 1, 10),
    rotated("rotated half-cube 5+5", mapped(normal("", [0.85, 0.75], 5), "", cube), 5, 5),
    rotated("rotated lognormal 4+4", mapped(normal("", [0.8, 0.7], 4), "", lambda z: np.exp(0.6 * z)), 9, 4),
    with_noise("padded half-cube 6+6", mapped(normal("", [0.9, 0.7]), "", cube), 4, 3),
    with_noise("padded uniform noise 4+4", _BAND, 3, 7),
    with_noise("padded normal 16+16", _TWO, 14, 11),
    mapped(_TWO, "spiral 2+2", spiral(0.35), same, hard=True),
    mapped(normal("", [0.8, 0.7], 3), "spiral 3+3", spiral(0.3), spiral(-0.2), hard=True),
    mapped(normal("", [0.85, 0.6], 5), "spiral 5+5", spiral(0.2), same, hard=True),
    mapped(normal("", [0.8, 0.8], 25), "spiral 25+25", spiral(0.02), same, hard=True),
    mapped(mapped(normal("", [0.7] * 4, 25), "", cube), "half-cube 25+25", same, hard=True),
    mapped(normal("", [0.8]), "swiss roll 2+1", roll, ndtr, hard=True),
    mapped(normal("", [0.5]), "weak swiss roll 2+1", roll, ndtr, hard=True),
    _X,
    _CLUSTERS,
    _WAVES,
    beside("ridges beside clusters 2+2", [_X, _CLUSTERS], hard=True),
    beside("ridges beside noise 3+3", [_X, normal("", [0.0], 2)], hard=True),
    product("product 2+1", 0.4, 2),
    product("product 4+1", 0.4, 4),
    heavy(beside("Student 1 beside normal 3+3", [student("", 1, [0.0]), normal("", [0.7], 2)])),
    rotated("rotated 128+128", normal("", list(np.linspace(0.9, 0.05, 24)), 128), 21, 128),
]  # fmt: skip
