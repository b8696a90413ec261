"""Dependence of a single pair among columns of noise, which neighbours in all columns do not see."""

from __future__ import annotations

import numpy as np
import pytest

from tinyalign.theory import mutual_information
from tinyalign.theory.copula import fit_gaussian, normal_scores
from tinyalign.theory.hidden import _expected, hidden_columns, hidden_direction, hidden_pool

WAVE = 0.8616  # I(X; sin 3 X + 0.3 E) of normals, by quadrature over both
RING = 0.4382  # of a ring of radius 1 and noise 0.15, by quadrature over both


def padded(law: str, n: int, width: int, seed: int, *, rotated: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, width))
    if law == "wave":
        y[:, 0] = np.sin(3 * x[:, 0]) + 0.3 * rng.normal(size=n)
    else:
        angle = rng.uniform(0, 2 * np.pi, n)
        x[:, 0], y[:, 0] = np.cos(angle) + 0.15 * x[:, 0], np.sin(angle) + 0.15 * y[:, 0]
    if rotated:
        x, y = (side @ np.linalg.qr(rng.normal(size=(width, width)))[0] for side in (x, y))
    return x, y


@pytest.mark.parametrize(("width", "n"), [(4, 500), (7, 2000), (10, 5000)])
def test_one_wave_among_noise_is_measured_and_named(width: int, n: int) -> None:
    x, y = padded("wave", n, width, 1)
    order = np.r_[1:width, 0]
    result = mutual_information(x[:, order], y)
    assert result.value == pytest.approx(WAVE, abs=4.0 / np.sqrt(n))
    assert result.candidates["copula"] < 0.1
    assert f"law: columns {width - 1} of x and 0 of y, the clearest of 1 such pairs" in " ".join(result.warnings)


@pytest.mark.parametrize(("width", "n"), [(4, 1000), (7, 2000), (10, 5000)])
def test_a_rotated_ring_among_noise_is_measured(width: int, n: int) -> None:
    x, y = padded("ring", n, width, 1, rotated=True)
    result = mutual_information(x, y)
    assert result.value == pytest.approx(RING, abs=4.0 / np.sqrt(n))
    assert "law: squares of a direction" in " ".join(result.warnings)


def test_independent_waves_add_up_and_copies_of_one_do_not() -> None:
    x, y = padded("wave", 3000, 6, 0)
    more, again = padded("wave", 3000, 1, 5)
    assert mutual_information(np.hstack([x, more]), np.hstack([y, again])).value == pytest.approx(2 * WAVE, abs=0.15)
    noise = 0.05 * np.random.default_rng(2).normal(size=(2, 3000, 1))
    twice = mutual_information(np.hstack([x, x[:, :1] + noise[0]]), np.hstack([y, y[:, :1] + noise[1]]))
    assert twice.value == pytest.approx(WAVE, abs=0.15)


def test_columns_keep_their_numbers_beside_constants_and_copies() -> None:
    x, y = padded("wave", 2000, 6, 3)
    wide = np.hstack([np.ones((2000, 1)), x[:, 1:], x[:, 1:2], x[:, :1]])
    result = mutual_information(wide, y)
    assert "law: columns 7 of x and 0 of y" in " ".join(result.warnings)
    assert result.warned("copies")


@pytest.mark.parametrize(("n", "split", "width"), [(80, 3, 6), (300, 5, 10), (300, 1, 9), (1000, 4, 8)])
def test_gaussian_copulas_are_hardly_ever_accused(n: int, split: int, width: int) -> None:
    """200 draws, of correlations from none to nearly singular; at one in a thousand two are accused once in fifty."""
    accused = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        factors = rng.normal(size=(width, int(width * (1.1, 1.5, 3.0, 30.0)[seed % 4]) + 1))
        z = rng.normal(size=(n, factors.shape[1])) @ factors.T
        law = fit_gaussian(normal_scores(z), split)
        accused += hidden_columns(law) is not None or hidden_direction(law) is not None
    assert accused <= 1


@pytest.mark.parametrize("rho", [-0.7, 0.0, 0.4, 0.99])
def test_moments_of_sines_are_those_of_normals(rho: float) -> None:
    at, weight = np.polynomial.hermite_e.hermegauss(80)
    weight = np.outer(weight, weight) / (2 * np.pi)
    u, v = at[:, None], rho * at[:, None] + np.sqrt(1 - rho**2) * at[None, :]
    frequencies = np.array([1.0, 3.0])
    found = _expected(np.array([[rho]]), frequencies)[0, :, 0, :]
    waves = [np.sin, np.sin, np.cos, np.cos]
    for row, (f, a) in enumerate(zip(waves, np.tile(frequencies, 2), strict=True)):
        for column, (g, b) in enumerate(zip(waves, np.tile(frequencies, 2), strict=True)):
            left, right = f(a * u) + 0 * v, g(b * v)
            moment = (weight * left * right).sum() - (weight * left).sum() * (weight * right).sum()
            assert found[row, column] == pytest.approx(moment, abs=1e-9)


def copies(law: str, n: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if law == "band":
        x = rng.uniform(size=(n, pairs))
        return x, x + rng.uniform(-1, 1, (n, pairs))
    u, w = rng.uniform(size=(2, n, pairs))
    return u, ((w ** (-3 / 4) - 1) * u**-3 + 1) ** (-1 / 3)  # Clayton, theta = 3


@pytest.mark.parametrize(("law", "pairs", "truth"), [("band", 2, 0.25), ("band", 8, 0.25), ("clayton", 8, 0.6374)])
def test_many_pairs_that_each_depart_a_little_are_seen_together(law: str, pairs: int, truth: float) -> None:
    """Independent copies of one law, of which too few samples show each alone; truths: 1 / 4, and by quadrature."""
    errors = []
    for seed in range(4):
        result = mutual_information(*copies(law, 500, pairs, seed))
        assert result.warnings
        errors.append(result.value - pairs * truth)
    assert abs(np.mean(errors)) < 0.4 * pairs * truth  # the copula alone lacks .53 of the band's


def test_copies_of_normals_are_seldom_pooled_against_the_law() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x, e = rng.normal(size=(2, 200, 6))
        rho = (0.0, 0.5, 0.9, 0.99)[seed % 4]
        z = np.hstack([x, rho * x + np.sqrt(1 - rho**2) * e])
        assert hidden_pool(fit_gaussian(normal_scores(z), 6)) is None
