"""Divergences from samples that mislead neighbours: far tails, values that repeat, copies, and the names of methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tinyalign.theory import kl_from_samples
from tinyalign.theory.kl_margins import _beyond
from tinyalign.theory.kl_ties import untied


@pytest.mark.parametrize(("freedom", "truth", "within"), [(3, 0.19458, 0.05), (5, 0.04715, 0.02)])
def test_normal_tails_of_q_are_carried_on_to_samples_of_p_far_out(freedom: int, truth: float, within: float) -> None:
    """Student's t against a normal law of its variance, by quadrature; neighbours alone are 0.1 and 0.025 too low."""
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        q = rng.normal(0, np.sqrt(freedom / (freedom - 2)), 5000)
        found.append(kl_from_samples(rng.standard_t(freedom, 5000), q))
    assert np.mean([result.value for result in found]) == pytest.approx(truth, abs=within)
    assert np.mean([result.candidates["plain"] for result in found]) < truth - 0.8 * within
    if freedom == 3:
        assert all(result.warned("support") or result.warned("tail") for result in found)


def test_a_tail_is_carried_on_only_where_it_is_like_a_normal_one() -> None:
    places = (np.arange(2000) + 0.5) / 2000
    far = np.array([5.0, -0.1, -6.0, 1.0])
    rows, values = _beyond(far, stats.norm.ppf(places))
    assert rows.tolist() == [0, 2]
    np.testing.assert_allclose(values, stats.norm.logpdf(far[rows]), atol=0.6)
    assert [len(_beyond(10 * far, law.ppf(places))[0]) for law in (stats.uniform, stats.t(3), stats.expon)] == [0, 0, 0]
    assert len(_beyond(far, stats.norm.ppf(places[::18]))[0]) == 0
    assert len(_beyond(np.zeros(5), stats.norm.ppf(places))[0]) == 0
    scores = stats.norm.ppf(places)
    lighter = _beyond(far, np.sign(scores) * np.abs(scores) ** 0.85)[1]  # its density falls as exp(-x^2.35 / 2)
    assert lighter[0] > -0.5 * 5.0 ** (2 / 0.85) + 2


def test_light_tails_need_no_warning() -> None:
    rng = np.random.default_rng(0)
    for p, q in (
        (rng.laplace(size=5000), rng.laplace(0.7, 1.0, 5000)),
        (rng.laplace(size=5000), rng.normal(0, np.sqrt(2), 5000)),
        (rng.uniform(size=5000), rng.uniform(-0.2, 1.2, 5000)),
        (rng.standard_t(5, 5000), rng.standard_t(5, 5000) + 0.5),
    ):
        assert not kl_from_samples(p, q).warnings


def rounded(how: str, x: np.ndarray) -> object:
    if how in ("float16", "bfloat16"):
        return torch.tensor(x).to(getattr(torch, how))
    return x.round(int(how))


@pytest.mark.parametrize("how", ["1", "3", "float16", "bfloat16"])
def test_rounded_columns_keep_their_divergence(how: str) -> None:
    rng = np.random.default_rng(0)
    p, q = rng.laplace(size=(5000, 3)), rng.laplace(0.5, 1.0, (5000, 3))
    exact = kl_from_samples(p, q)
    result = kl_from_samples(rounded(how, p), rounded(how, q))
    assert result.value == pytest.approx(exact.value, abs=0.06)
    assert result.low < 3 * (0.5 + np.exp(-0.5) - 1) < result.high
    assert [line.partition(":")[0] for line in result.warnings] == ["rounded"]
    assert result.value == kl_from_samples(rounded(how, p), rounded(how, q)).value


def test_pixels_of_one_law_have_no_divergence() -> None:
    """Twelve columns of few values, dark ones among them, whose means differ by what rounding in a sum leaves."""
    rng = np.random.default_rng(0)
    pixels = np.maximum(rng.normal(0.5, 0.4, (1000, 12)) + rng.normal(size=(1000, 1)) * 0.2, 0.0)
    values = (pixels * 60).astype(int) / 255 + rng.choice([0.0, 1e-16], size=(1000, 12))
    result = kl_from_samples(values[:500], values[500:])
    assert abs(result.value) < 0.5
    assert result.low < 0 < result.high
    assert result.warned("rounded")


def test_atoms_are_part_of_a_divergence() -> None:
    """Counts of Poisson laws, 3 ln(3 / 4) + 1, and rectified normals: the divergence of the atoms and of the rest."""
    rng = np.random.default_rng(0)
    counts = kl_from_samples(rng.poisson(3.0, 5000), rng.poisson(4.0, 5000))
    assert counts.low < 3 * np.log(3 / 4) + 1 < counts.high
    # 3 / 10 is not 3 * 0.1, and the same value yet.
    tenths = kl_from_samples(rng.poisson(3.0, 5000) / 10, rng.poisson(4.0, 5000) * 0.1)
    assert tenths.low < 3 * np.log(3 / 4) + 1 < tenths.high
    p, q = stats.norm(0.0, 1.0), stats.norm(0.5, 1.0)
    line = np.linspace(0, 8, 4001)
    truth = p.cdf(0) * np.log(p.cdf(0) / q.cdf(0)) + np.trapezoid(p.pdf(line) * (p.logpdf(line) - q.logpdf(line)), line)
    one, two = np.maximum(p.rvs(5000, random_state=rng), 0.0), np.maximum(q.rvs(5000, random_state=rng), 0.0)
    assert kl_from_samples(one, two).value == pytest.approx(truth, abs=0.05)


def test_few_rounded_samples_have_an_interval() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(40, 3)).round(1), rng.normal(size=(400, 3)).round(1)
    p[:, 2], q[:, 2] = np.arange(40) < 2, np.arange(400) < 9
    result = kl_from_samples(p, q)
    assert np.isfinite([result.value, result.low, result.high]).all()
    assert result.low < result.value < result.high
    assert result.warned("small")


def test_samples_too_few_for_a_fit_are_left_to_neighbours() -> None:
    """Columns of correlated exponentials: 250 samples of 48 columns, and fewer samples than columns."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(48, 48))
    p, q = (rng.exponential(size=(250, 48)) @ mixing for _ in range(2))
    few = kl_from_samples(p, q)
    assert few.method == "plain"
    assert few.warned("dimension")
    assert abs(few.value) < 2
    fewer = kl_from_samples(p[:40], q)
    assert (fewer.method, fewer.warned("small")) == ("plain", True)
    assert abs(fewer.value) < 10
    for method in ("gaussian", "margins", "surrogate"):
        with pytest.raises(ValueError, match="must hold more than 50 samples each to fit 48 columns, got 40 and 250"):
            kl_from_samples(p[:40], q, method=method)


def test_values_that_do_not_repeat_are_left_as_they_are() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(50, 2)), rng.normal(size=(60, 2))
    same = untied(p, q)
    assert np.array_equal(same[0], p)
    assert np.array_equal(same[1], q)
    assert same[2] == ()
    q[:30, 0] = 0.25
    spread = untied(p, q)
    assert np.array_equal(spread[0], p)
    assert np.array_equal(spread[1][30:], q[30:])
    others = np.r_[p[:, 0], q[30:, 0]]
    assert 0 < np.abs(spread[1][:30, 0] - 0.25).max() <= 0.5 * np.abs(others - 0.25).min()
    assert "1 of 2 columns repeat" in spread[2][0]


def test_samples_that_both_laws_share_are_said() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 2)), rng.normal(size=(300, 2))
    lines = kl_from_samples(x, x).warnings
    assert lines[0].startswith("shared: 100% of the rows of p_samples")
    assert not any(line.startswith("rounded") for line in lines)
    assert kl_from_samples(x, np.vstack([x[:50], y])).warned("shared")
    assert not kl_from_samples(x, y).warned("shared")
    assert not kl_from_samples(x.round(), y.round()).warned("shared")
    assert not kl_from_samples(x, np.c_[x[:, 0], y[:, 1]]).warned("shared")


def test_neighbours_are_corrected_unless_they_are_asked_for_plain() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(1500, 20)), rng.normal(size=(1500, 20)) + 0.3
    auto, knn, plain = (kl_from_samples(p, q, method=method) for method in ("auto", "knn", "plain"))
    assert (knn.value, knn.method, knn.low) == (auto.value, auto.method, auto.low)
    assert plain.value == auto.candidates["plain"]
    assert abs(auto.value - 0.9) < 0.15 < abs(plain.value - 0.9)


def test_a_tie_far_out_does_not_join_the_values_between() -> None:
    rng = np.random.default_rng(1)
    marked = rng.normal(size=(2, 5000))
    marked[0] += 1
    marked[:, :5] = 1e5
    assert kl_from_samples(marked[0], marked[1]).value == pytest.approx(0.5, abs=0.08)
    cauchy = rng.standard_cauchy((2, 20000))
    cauchy[0] += 1
    single = kl_from_samples(*cauchy.astype(np.float32)).value
    assert single == pytest.approx(kl_from_samples(*cauchy).value, abs=0.005)
    assert single == pytest.approx(np.log(1.25), abs=0.03)


def test_values_are_not_spread_by_the_noise_that_made_them() -> None:
    """Data of the generator that every example uses: its numbers must not come back."""
    rng = np.random.default_rng(0)
    p, q = rng.choice(4, 5000, p=[0.4, 0.3, 0.2, 0.1]).astype(float), rng.choice(4, 5000, p=[0.25] * 4).astype(float)
    assert kl_from_samples(p, q).value == pytest.approx(0.1064, abs=0.05)
    rng = np.random.default_rng(0)
    p, q = (rng.random(5000) < 0.3).astype(float), (rng.random(5000) < 0.5).astype(float)
    assert kl_from_samples(p, q).value == pytest.approx(0.0823, abs=0.05)


@pytest.mark.parametrize("value", [0.1, 0.3, 1e6 + 0.1])
def test_a_column_that_never_varies_is_left_out(value: float) -> None:
    """A mean of equal numbers is seldom that number: their standard deviation is not zero."""
    pair = np.random.default_rng(0).normal(size=(2, 300, 2))
    pair[:, :, 1] = value
    result = kl_from_samples(pair[0], pair[1])
    assert result.warned("copies")
    assert result.value == kl_from_samples(pair[0, :, :1], pair[1, :, :1]).value


def test_rounded_values_that_meet_by_chance_are_no_copies() -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        pair = rng.normal(size=(2, 700, 3)).round(1)
        result = kl_from_samples(pair[0], pair[1])
        assert result.warned("rounded")
        assert not result.warned("shared")
