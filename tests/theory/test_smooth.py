"""Moments that tell a Gaussian copula from others, and the laws that neighbours are held against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import stdtrit

from tinyalign.theory import ksg, mutual_information
from tinyalign.theory.continuous import _fitted
from tinyalign.theory.copula import EllipticalCopula, _student_quantiles, _vertex, fit_gaussian, normal_scores
from tinyalign.theory.divergence import Divergence, Search, extrapolated, plane_divergence
from tinyalign.theory.nearest import ksg_local
from tinyalign.theory.smooth import rank_departure, smooth_test


def pairs(n: int, rhos: list[float], seed: int, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rho = np.zeros(max(width, len(rhos)))
    rho[: len(rhos)] = rhos
    x, e = rng.normal(size=(2, n, len(rho)))
    return x, rho * x + np.sqrt(1 - rho**2) * e


def bent(x: np.ndarray, speed: float) -> np.ndarray:
    angle = speed * (x**2).sum(axis=1)
    turned = x.copy()
    turned[:, 0] = np.cos(angle) * x[:, 0] - np.sin(angle) * x[:, 1]
    turned[:, 1] = np.sin(angle) * x[:, 0] + np.cos(angle) * x[:, 1]
    return turned


@pytest.mark.parametrize(("width", "n"), [(1, 1000), (2, 1000), (6, 2000)])
def test_gaussian_copulas_are_seldom_doubted(width: int, n: int) -> None:
    """60 draws, of which at most two may be doubted; monotone maps of the columns change nothing."""
    found = [smooth_test(_fitted(np.exp(x), y**3)) for x, y in (pairs(n, [0.8] * width, seed) for seed in range(60))]
    assert sum(not moments.fits for moments in found) <= 2
    assert sum(moments.turned for moments in found) <= 1
    assert sum(moments.radial for moments in found) <= 2


@pytest.mark.parametrize("width", [2, 5, 25])
@pytest.mark.parametrize("side", [0, 1])
def test_a_spiral_is_seen_in_any_dimension(width: int, side: int) -> None:
    sides = list(pairs(4000, [0.8, 0.8], 0, width))
    sides[side] = bent(sides[side], 0.5 / width)
    assert smooth_test(_fitted(*sides)).turned
    assert mutual_information(*sides).warned("bias")


def test_a_band_of_even_noise_is_seen_and_students_tails_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(4000, 1))
    band = smooth_test(_fitted(x, x + rng.uniform(-0.15, 0.15, (4000, 1))))
    assert not band.fits
    z = rng.normal(size=(4000, 4)) / np.sqrt(rng.chisquare(2, 4000) / 2)[:, None]
    student = smooth_test(_fitted(z[:, :2], z[:, 2:]))
    assert (student.fits, student.radial) == (False, True)
    skewed = x - 0.5
    assert not smooth_test(_fitted(skewed, skewed**2 + 0.02 * rng.normal(size=(4000, 1)))).radial


def test_a_hidden_pair_is_measured_in_its_own_plane() -> None:
    """A band beside six columns of noise: neighbours in eight columns see nothing of what the ellipse misses."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(5000, 1))
    y = x + rng.uniform(-0.15, 0.15, (5000, 1))
    noise = rng.normal(size=(2, 5000, 3))
    result = mutual_information(np.hstack([x, noise[0]]), np.hstack([y, noise[1]]))
    assert result.method == "surrogate"
    assert result.warned("bias")
    assert result.value == pytest.approx(0.15 - np.log(0.3), abs=0.06)
    assert result.candidates["copula"] < 0.15 - np.log(0.3) - 0.08


def test_terms_of_a_search_are_those_of_ksg() -> None:
    x, y = pairs(2500, [0.7, 0.2], 0)
    search = Search(np.hstack([x, y]), 2)
    full = ksg_local(x, y, search.ks)
    np.testing.assert_allclose(search.terms, np.stack(full, axis=1)[search.head], atol=1e-12)
    assert len(search.head) < 2500
    assert search.nearest == pytest.approx(full[0].mean(), abs=1e-12)
    assert search.nearest == pytest.approx(ksg(x, y, standardize=False).value, abs=1e-9)


def test_divergence_is_within_noise_on_the_law_and_not_beside_it() -> None:
    x, y = pairs(4000, [0.8, 0.5], 0)
    law = fit_gaussian(normal_scores(np.hstack([x, y])), 2)
    check = Divergence(law, Search(law.points, 2))
    assert check.accepted
    assert not check.far
    value, error = check.measured
    assert abs(value) < 4 * error
    wrong = EllipticalCopula(np.eye(4), 2, law.n, np.inf, law.points, np.nan)
    beside = Divergence(wrong, check.search)
    assert beside.far
    assert not beside.accepted
    assert beside.measured[0] == pytest.approx(law.information, abs=0.1)


def test_in_the_plane_the_error_is_that_of_the_mean_of_neighbours_that_share_neighbours() -> None:
    x, y = pairs(2000, [0.6], 0)
    law = fit_gaussian(normal_scores(np.hstack([x, y])), 1)
    check = Divergence(law, Search(law.points, 1, head=2000))
    coarse = ksg_local(law.points[:, :1], law.points[:, 1:], [16])[0] - law.pointwise()
    value, error = check.measured
    assert error == pytest.approx(1.3 * coarse.std() / np.sqrt(2000), rel=1e-9)
    assert value == pytest.approx(coarse.mean() - 0.0155 * 2.5**0.4 * law.information, abs=1e-9)


def test_plane_divergence_of_each_pair() -> None:
    x, y = pairs(4000, [0.8, 0.5, 0.3], 0)
    law = fit_gaussian(normal_scores(np.hstack([x, y])), 3).leading(3)
    for pair in range(3):
        value, error, clear = plane_divergence(law, pair)
        assert abs(value) < 5 * error
        assert abs(clear) < 4


def test_plane_divergence_reads_the_pair_that_it_is_asked_for() -> None:
    """A ring is uncorrelated, so it is the second canonical pair beside a correlated one."""
    x, y = pairs(3000, [0.8, 0.0], 0)
    y[:, 1] = x[:, 1] ** 2 + 0.3 * y[:, 1]
    law = fit_gaussian(normal_scores(np.hstack([x, y])), 2).leading(2)
    first, second = (plane_divergence(law, pair) for pair in (0, 1))
    assert abs(first[0]) < 5 * first[1]
    assert second[0] > 0.5


def test_tails_that_no_single_pair_shows_are_seen_in_the_radius() -> None:
    """30 degrees of freedom in 5+5 columns: 1 / 26 in the moment of a pair, 240 / 26 in that of the squared radius."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(4000, 10))
        heavy = z * np.sqrt(30 / rng.chisquare(30, 4000))[:, None]
        assert smooth_test(fit_gaussian(normal_scores(heavy), 5)).radial
        assert not smooth_test(fit_gaussian(normal_scores(z), 5)).radial


def test_where_neighbours_carry_the_estimate_its_error_is_theirs() -> None:
    x = np.random.default_rng(0).normal(size=(1500, 2))
    ring = x[:, :1], x[:, :1] ** 2 + 0.3 * x[:, 1:]
    result = mutual_information(*ring)
    terms = ksg_local(normal_scores(ring[0]), normal_scores(ring[1]), [4])[0]
    assert result.method == "surrogate"
    assert result.std_error == pytest.approx(1.27 * terms.std() / np.sqrt(1500), rel=1e-6)


def test_a_grown_search_is_the_larger_one() -> None:
    points = normal_scores(np.random.default_rng(0).normal(size=(2000, 6)))
    grown, large = Search(points, 3, head=300).grown(800), Search(points, 3, head=800)
    np.testing.assert_array_equal(grown.terms, large.terms)
    np.testing.assert_array_equal(grown.head, large.head)
    assert grown.nearest == pytest.approx(large.nearest, abs=1e-12)
    assert grown.grown(800) is grown


def test_more_neighbours_bring_more_draws() -> None:
    points = normal_scores(np.random.default_rng(0).normal(size=(4000, 10)))
    check = Divergence(fit_gaussian(points, 5), Search(points, 5))
    more = check.on_more()
    assert (len(check.missed), len(check.drawn)) == (1500, 750)
    assert (len(more.missed), len(more.drawn)) == (3000, 3000)
    np.testing.assert_array_equal(more.missed[:1500], check.missed)


def test_extrapolation_recovers_a_power_law_and_leaves_a_flat_one() -> None:
    for width, power in ((5, 1 / 2.7), (6, 1 / 3.7), (8, 1 / 6.4), (10, 1 / 9.1)):
        bias = -0.05 * np.array([4.0, 8.0, 16.0]) ** power
        assert extrapolated(1.0 + bias, width, 5000, 0.0, 1e-4) == pytest.approx(1.0, abs=1e-3)
    flat = np.array([0.5, 0.5, 0.5])
    assert extrapolated(flat, 6, 5000, 0.0, 0.01) == pytest.approx(0.5)
    assert extrapolated(np.array([0.5, 0.5]), 2, 5000, 0.0, 0.01) == pytest.approx(0.5 - 0.0155 * 0.5)
    rising = np.array([0.50, 0.52, 0.54])
    assert extrapolated(rising, 4, 5000, 0.0, 0.01) == pytest.approx(0.52)


@pytest.mark.parametrize("freedom", [0.7, 2.0, 30.0])
@pytest.mark.parametrize("n", [1001, 4000])
def test_students_quantiles_between_the_nodes(freedom: float, n: int) -> None:
    exact = stdtrit(freedom, (np.arange(n) + 0.5) / n)
    np.testing.assert_allclose(np.arcsinh(_student_quantiles(n, freedom)), np.arcsinh(exact), atol=5e-5)


def test_the_top_of_a_parabola() -> None:
    at = np.array([-1.0, 0.2, 2.0, 5.0])
    assert _vertex(at, -((at - 0.7) ** 2)) == pytest.approx(0.7)
    assert _vertex(at, at) == 5.0
    assert _vertex(at, -at) == -1.0


def test_students_information_is_the_mean_log_ratio_less_its_bias() -> None:
    """The law's own value moves with the degrees of freedom, which ranks bias: by -0.009 here, of 0.432 nats."""
    errors = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(3000, 4)) / np.sqrt(rng.chisquare(1, 3000))[:, None]
        result = mutual_information(z[:, :2], z[:, 2:], method="student")
        assert result.samples is not None
        # Four correlations between the sides: each adds 1 / (2 n).
        assert result.value == pytest.approx(result.samples.mean() - 4 / 6000, abs=2e-5)
        errors.append(result.value - 0.4318)
    assert abs(np.mean(errors)) < 0.006 + 3 * 0.0135 * np.sqrt(5 / 3 / 12)


@pytest.mark.parametrize("freedom", [np.inf, 4.0])
@pytest.mark.parametrize("width", [1, 3])
def test_ranks_seldom_depart_from_the_law_that_drew_them(freedom: float, width: int) -> None:
    """40 draws, of which one in twenty may be doubted: more than eight once in three thousand trials."""
    doubted = 0
    for seed in range(40):
        x, y = pairs(600, [0.6] * width, seed)
        z = np.hstack([x, y])
        if np.isfinite(freedom):
            z /= np.sqrt(np.random.default_rng(seed).chisquare(freedom, (600, 1)) / freedom)
        doubted += rank_departure(replace(fit_gaussian(normal_scores(z), width), points=z, freedom=freedom))[1]
    assert doubted <= 8


def test_ranks_depart_where_the_law_does_not_hold() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.uniform(size=(1000, 1))
        band = mutual_information(x, x + rng.uniform(-1.0, 1.0, (1000, 1)), method="copula")
        assert band.warned("law")
        z = rng.normal(size=(1000, 6)) / np.sqrt(rng.chisquare(3, 1000) / 3)[:, None]
        scores = normal_scores(z)
        assert rank_departure(fit_gaussian(scores, 3))[1]  # Student's tails
        skewed = rng.exponential(size=(1000, 1))
        assert mutual_information(skewed, rng.exponential(size=(1000, 1)) / skewed, method="student").warned("law")


@pytest.mark.parametrize(("width", "freedom", "alone"), [(1, 9, "squares"), (3, 25, "kurtosis")])
def test_samples_look_radial_from_four_standard_errors_of_either_moment_on(
    width: int, freedom: float, alone: str
) -> None:
    """Mardia's kurtosis of all columns, and the product of the centred squares of a pair, each by its formula."""
    seen = {"kurtosis": 0, "squares": 0, "neither": 0}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(400, 2 * width)) / np.sqrt(rng.chisquare(freedom, 400) / freedom)[:, None]
        law = fit_gaussian(normal_scores(z), width).leading(width)
        rho = np.diag(law.correlation[:width, width:])
        u, v = law.points[:, :width], law.points[:, width:]
        e = (v - rho * u) / np.sqrt(1 - rho**2)
        d = 2 * width
        kurtosis = (np.mean((u**2 + e**2).sum(axis=1) ** 2) - d * (d + 2)) / np.sqrt(8 * d * (d + 2) / 400)
        squares = np.sqrt(400) * np.max(np.mean((u**2 - 1) * (e**2 - 1), axis=0)) / 2
        found = smooth_test(law)
        assert found.radial == ((kurtosis > 4 or squares > 4) and not found.turned)
        seen["kurtosis"] += 4 < kurtosis < 5 and squares < 4 and not found.turned
        seen["squares"] += 4 < squares < 5 and kurtosis < 4 and not found.turned
        seen["neither"] += max(kurtosis, squares) < 4
    assert min(seen[alone], seen["neither"]) >= 1


def test_neighbours_of_draws_are_taken_off_near_the_law_and_not_far_from_it() -> None:
    x, y = pairs(1500, [0.8, 0.5], 0)
    law = fit_gaussian(normal_scores(np.hstack([x, y])), 2)
    near = Divergence(law, Search(law.points, 2))
    coarse = near.missed[:, 1:].mean(axis=1)
    drawn = near.drawn[:, 1:].mean(axis=1)
    spread = np.sqrt(coarse.var() / len(coarse) + drawn.var() / len(drawn))
    assert not near.far
    assert near.measured == pytest.approx((coarse.mean() - drawn.mean(), spread))
    far = Divergence(EllipticalCopula(np.eye(4), 2, law.n, np.inf, law.points, np.nan), near.search)
    coarse = far.missed[:, 1:].mean(axis=1)
    assert far.far
    assert far.measured == pytest.approx((coarse.mean(), 1.3 * coarse.std() / np.sqrt(len(coarse))))
    assert "drawn" not in vars(far)  # what would not change the answer is not searched


def test_the_top_of_a_parabola_is_found_inside_and_the_place_itself_at_an_end() -> None:
    at = np.array([0.0, 1.0, 3.0, 4.0])
    assert _vertex(at, -((at - 2.5) ** 2)) == pytest.approx(2.5)
    assert _vertex(at, -at) == 0.0
    assert _vertex(at, at) == 4.0
