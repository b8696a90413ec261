"""Intervals of nearest-neighbour estimates: their error, the bias they read off other neighbours, and coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tinyalign.theory import conditional_ksg, knn_entropy, ksg, mixed_ksg, mutual_information, ross
from tinyalign.theory.copula import normal_scores
from tinyalign.theory.neighbours import neighbour_interval, subset_interval


def terms(n: int, growth: float = 0.0, power: float = 0.5):  # type: ignore[no-untyped-def]
    """Normal terms; their mean is off by growth * k^power."""
    noise = np.random.default_rng(0).normal(size=n)
    return lambda rows, ks: [noise[rows] - growth * k**power for k in ks]


def test_the_error_pools_the_terms_with_disjoint_subsets() -> None:
    local = terms(1000)
    _, spread = neighbour_interval(local, 1000, 4, 0.95)
    of_terms = 1.27 * local(np.arange(1000), [4])[0].std(ddof=1) / np.sqrt(1000)
    of_subsets, quantile = subset_interval(lambda rows: local(rows, [4])[0].mean(), 1000, 4, 0.95, subsets=8)
    assert quantile == pytest.approx(stats.t.ppf(0.975, 7))
    assert spread.error == pytest.approx(np.sqrt((30 * of_terms**2 + 7 * of_subsets**2) / 37))
    assert spread.half == pytest.approx(stats.t.ppf(0.975, 37) * spread.error)
    assert not spread.warnings
    few = terms(100)
    _, alone = neighbour_interval(few, 100, 4, 0.95)  # no subset would hold 125
    assert alone.error == pytest.approx(1.27 * few(np.arange(100), [4])[0].std(ddof=1) / 10)


def test_subsets_have_the_spread_of_their_means() -> None:
    values = np.random.default_rng(1).normal(size=4000)
    errors = [subset_interval(lambda rows: values[rows].mean(), 4000, 4, 0.95, seed=seed)[0] for seed in range(40)]
    assert np.mean(errors) == pytest.approx(values.std() / np.sqrt(4000), rel=0.15)  # 3 of 0.24 / sqrt(40)
    assert np.isnan(subset_interval(lambda rows: values[rows].mean(), 59, 4, 0.95)).all()
    assert np.isfinite(subset_interval(lambda rows: values[rows].mean(), 60, 4, 0.95)).all()


@pytest.mark.parametrize("n", [1000, 20_000])
def test_a_bias_that_grows_with_the_neighbours_is_added_and_said(n: int) -> None:
    """Off by the root of k: what is added is the bias at k = 4 itself."""
    _, without = neighbour_interval(terms(n), n, 4, 0.95)
    _, spread = neighbour_interval(terms(n, growth=0.05), n, 4, 0.95)
    assert spread.half - without.half == pytest.approx(0.05 * 2)
    assert spread.warnings[0].startswith("bias: the estimate moves by -")
    assert "about 0.100 nats at k = 4" in spread.warnings[0]
    _, small = neighbour_interval(terms(n, growth=0.05 / n), n, 4, 0.95)
    assert not small.warnings


@pytest.mark.parametrize("kind", ["ksg", "entropy", "ross", "mixed", "conditional"])
def test_intervals_cover_without_a_warning(kind: str) -> None:
    """80 samples of independent columns: four binomial errors below 95 % is 0.85."""
    hits, truth = [], 0.5 * np.log(2 * np.pi * np.e) if kind == "entropy" else 0.0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        x, y, z = rng.normal(size=(3, 300))
        if kind == "entropy":
            result = knn_entropy(x)
        elif kind == "conditional":
            result = conditional_ksg(x, y, z)
        else:
            estimate = {"ksg": ksg, "ross": ross, "mixed": mixed_ksg}[kind]
            result = estimate(x, rng.integers(0, 3, 300) if kind == "ross" else y)
        hits.append(result.low <= truth <= result.high)
    assert 0.85 <= np.mean(hits)


def test_sharp_edges_and_atoms_are_said() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(size=2000)
    assert ksg(x, x + rng.uniform(-0.3, 0.3, 2000)).warned("bias")
    assert not ksg(x, rng.normal(size=2000)).warnings
    atoms = rng.integers(0, 3, (2, 500)).astype(float)
    assert mixed_ksg(*atoms).warned("labels")
    assert not mixed_ksg(atoms[0], rng.normal(size=500)).warned("labels")


def test_pairs_that_repeat_share_no_noise_of_neighbours() -> None:
    """Below 300 samples no subset is large enough, so the error is that of the terms alone."""
    rng = np.random.default_rng(0)
    apart, atoms = rng.normal(size=(2, 100)), rng.integers(0, 2, (2, 100)).astype(float)
    for sides, factor in ((apart, 1.27), (atoms, 1.0)):
        result = mixed_ksg(*sides)
        assert result.samples is not None
        assert result.std_error == pytest.approx(factor * result.samples.std(ddof=1) / 10)


@pytest.mark.parametrize("width", [1, 2])
def test_the_error_of_an_entropy_is_that_of_repeated_draws(width: int) -> None:
    """Even noise has no log-density that varies, a lognormal little else: 120 repetitions know a spread to 7 %."""
    for draw in (lambda rng, size: rng.uniform(size=size), lambda rng, size: np.exp(rng.normal(size=size))):
        found = [knn_entropy(draw(np.random.default_rng(seed), (400, width))) for seed in range(120)]
        spread = np.std([result.value for result in found])
        assert np.sqrt(np.mean([result.std_error**2 for result in found])) == pytest.approx(spread, rel=0.21)


def test_margins_that_bias_neighbours_are_said_and_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(2, 800))
    y = 0.6 * x + 0.8 * e
    truth = -0.5 * np.log(1 - 0.36)
    plain, bent = ksg(x, y), ksg(np.exp(2.5 * x), np.exp(2.5 * y))
    assert not plain.warnings
    assert bent.warned("bias")
    assert "on ranks find +" in bent.warnings[-1]
    assert bent.value < plain.value - 0.03
    assert bent.low <= truth <= bent.high
    moved = ksg(normal_scores(x[:, None]), normal_scores(y[:, None])).value - bent.value
    assert f"{moved:+.3f}" in bent.warnings[-1]
    assert ksg(x, y[:, None] + np.zeros((800, 3)) + 1e-3 * rng.normal(size=(800, 3))).warned("dimension")


def test_few_samples_and_two_columns_of_them_are_said() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 500))
    for estimator in (ksg, mixed_ksg):
        assert estimator(x[:499], y[:499]).warned("small")
        assert not estimator(x, y).warned("small")
    wide = rng.normal(size=(1000, 2))
    assert knn_entropy(wide[:999]).warned("dimension")
    assert not knn_entropy(wide).warned("dimension")
    assert not knn_entropy(wide[:300, :1]).warned("dimension")


def test_a_constant_label_has_no_information_and_no_bias_to_speak_of() -> None:
    result = mutual_information(np.random.default_rng(0).normal(size=600), np.ones(600, dtype=int))
    assert (result.value, result.low, result.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)
    assert [line.partition(":")[0] for line in result.warnings] == ["constant"]


@pytest.mark.parametrize("method", ["auto", "ksg", "copula"])
def test_empty_samples_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"x must (hold|have) .*got"):
        mutual_information([], [], method=method)
