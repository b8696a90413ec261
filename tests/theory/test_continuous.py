"""Continuous information against laws with known values: neighbours, copulas and the choice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import digamma, gammaln
from sklearn.feature_selection import mutual_info_regression

from tinyalign.theory import (
    classifier_information,
    conditional_ksg,
    conditional_mutual_information,
    ksg,
    mutual_information,
    ross,
)
from tinyalign.theory.copula import canonical_variates, fit_gaussian, fit_student, normal_scores
from tinyalign.theory.counting import count_within
from tinyalign.theory.divergence import plane_bias
from tinyalign.theory.nearest import ksg_local
from tinyalign.theory.neighbours import kth_distance
from tinyalign.theory.smooth import squares_departure


def gaussian(n: int, rhos: list[float], seed: int, extra: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Pairs of correlated normals beside columns of noise, and their information."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, len(rhos) + extra))
    r = np.array(rhos)
    y[:, : len(r)] = r * x[:, : len(r)] + np.sqrt(1 - r**2) * y[:, : len(r)]
    return x, y, float(-0.5 * np.log1p(-(r**2)).sum())


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def student_truth(freedom: float, left: int, right: int) -> float:
    def f(a: float) -> float:
        return gammaln(a / 2) - a / 2 * digamma(a / 2)

    return float(f(freedom) + f(freedom + left + right) - f(freedom + left) - f(freedom + right))


def student(n: int, freedom: float, left: int, right: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, left + right)) / np.sqrt(rng.chisquare(freedom, n) / freedom)[:, None]
    return z[:, :left], z[:, left:]


@pytest.mark.parametrize("width", [1, 2, 5, 14])
def test_neighbours_and_counts_equal_the_full_matrix(width: int) -> None:
    points = np.random.default_rng(0).normal(size=(300, width)).astype(np.float32).astype(np.float64)
    matrix = np.abs(points[:, None] - points[None]).max(axis=2)
    others = np.sort(np.where(np.eye(300, dtype=bool), np.inf, matrix), axis=1)
    np.testing.assert_allclose(kth_distance(points, 3), others[:, 2], rtol=1e-6)
    radius = np.quantile(others[:, :-1], 0.1, axis=1)
    expected = (matrix < radius[:, None]).sum(1) - 1
    np.testing.assert_array_equal(count_within(points, radius), expected)
    np.testing.assert_array_equal(count_within(points, radius[::7], rows=np.arange(0, 300, 7)), expected[::7])
    queries = np.random.default_rng(1).normal(size=(9, width)).astype(np.float32).astype(np.float64)
    direct = np.sort(np.abs(queries[:, None] - points[None]).max(axis=2), axis=1)[:, 1]
    np.testing.assert_allclose(kth_distance(points, 2, queries), direct, rtol=1e-6)


def test_a_neighbour_at_the_radius_is_outside_when_strict_and_inside_when_not() -> None:
    for width in (1, 2):
        points = np.repeat(np.array([[0.1], [0.3], [0.7], [1.9]]), width, axis=1)
        radius = kth_distance(points, 1)
        assert count_within(points, radius).tolist() == [0, 0, 0, 0]
        assert (count_within(points, radius, strict=False) >= 1).all()


def test_ksg_equals_scikit_learn_where_both_do_the_same() -> None:
    x, y, _ = gaussian(500, [0.7], 3)
    x, y = x / x.std(), y / y.std()
    theirs = mutual_info_regression(x, y[:, 0], n_neighbors=3, random_state=0)[0]
    assert ksg(x, y, k=3, standardize=False).value == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("variant", [1, 2])
def test_ksg_equals_its_formula_point_by_point(variant: int) -> None:
    x, y, _ = gaussian(60, [0.6, 0.3], 1)
    k, n, total = 3, 60, 0.0
    for i in range(n):
        dx, dy = np.abs(x - x[i]).max(1), np.abs(y - y[i]).max(1)
        order = np.argsort(np.maximum(dx, dy), kind="stable")[1 : k + 1]
        if variant == 1:
            radius = np.maximum(dx, dy)[order[-1]]
            total += digamma(k) - digamma((dx < radius).sum()) - digamma((dy < radius).sum())
        else:
            nx, ny = (dx <= dx[order].max()).sum() - 1, (dy <= dy[order].max()).sum() - 1
            total += digamma(k) - 1 / k - digamma(nx) - digamma(ny)
    expected = total / n + digamma(n)
    assert ksg(x, y, k=k, variant=variant, standardize=False).value == pytest.approx(expected, abs=1e-9)


def test_conditional_and_labelled_neighbours_equal_their_formulas_point_by_point() -> None:
    rng = np.random.default_rng(2)
    x, y, z = (column / column.std() for column in rng.normal(size=(3, 50)) + rng.normal(size=50))
    x, y, z = x - x.mean(), y - y.mean(), z - z.mean()
    dx, dy, dz = (np.abs(column[:, None] - column) for column in (x, y, z))
    joint = np.maximum(np.maximum(dx, dy), dz)
    k, total = 4, 0.0
    for i in range(50):
        radius = np.sort(joint[i])[k]
        counts = [(d[i] < radius).sum() for d in (np.maximum(dx, dz), np.maximum(dy, dz), dz)]
        total += digamma(k) - digamma(counts[0]) - digamma(counts[1]) + digamma(counts[2])
    assert conditional_ksg(x, y, z, k=k).value == pytest.approx(total / 50, abs=1e-9)

    labels, total = rng.integers(0, 3, 50), 0.0
    for i in range(50):
        own = np.sort(dx[i][labels == labels[i]])
        radius = own[k]
        total += digamma(50) + digamma(k) - digamma(len(own)) - digamma((dx[i] < radius).sum())
    assert ross(x, labels, k=k).value == pytest.approx(total / 50, abs=1e-9)


def test_gaussian_copula_has_no_bias_in_many_dimensions() -> None:
    """Independent 20 + 20 columns at n = 500: the plug-in is off by 0.4, its expectation is known."""
    values = []
    for seed in range(20):
        z = np.random.default_rng(seed).normal(size=(500, 40))
        values.append(fit_gaussian(normal_scores(z), 20).information)
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(20)
    law = fit_gaussian(normal_scores(z), 20)
    assert law.pointwise().mean() > 0.3


def test_student_copula_recovers_freedom_and_information() -> None:
    x, y = student(4000, 3.0, 2, 2, 0)
    law = fit_student(np.hstack([np.sinh(x), y**3]), 2)
    assert law.freedom == pytest.approx(3.0, rel=0.2)
    assert law.information == pytest.approx(student_truth(3.0, 2, 2), abs=0.03)
    assert fit_student(np.random.default_rng(0).normal(size=(3000, 2)), 1).freedom > 15


def test_leading_pairs_keep_the_information_of_a_rotated_law() -> None:
    x, y, truth = gaussian(4000, [0.9, 0.7], 0, extra=6)
    scores = normal_scores(np.hstack([x @ rotation(8, 1), y @ rotation(8, 2)]))
    law = fit_gaussian(scores, 8)
    small = law.leading(2)
    assert small.correlation.shape == (4, 4)
    assert small.information == pytest.approx(truth, abs=0.06)
    np.testing.assert_allclose(small.points.T @ small.points / 4000, small.correlation, atol=1e-8)


def test_canonical_variates_find_the_planted_pairs() -> None:
    x, y, _ = gaussian(4000, [0.9, 0.6], 0, extra=3)
    _, _, found = canonical_variates(x @ rotation(5, 1), y @ rotation(5, 2))
    np.testing.assert_allclose(found[:2], [0.9, 0.6], atol=0.03)
    assert found[2] < 0.1


def test_bias_formula_on_the_plane_equals_simulation() -> None:
    """What the module's constants say about KSG on a bivariate normal, simulated again with other seeds."""
    for rho in (0.6, 0.95):
        truth = -0.5 * np.log1p(-(rho**2))
        errors = []
        for seed in range(30):
            x, y, _ = gaussian(5000, [rho], 500 + seed)
            law = fit_gaussian(normal_scores(np.hstack([x, y])), 1)
            terms = ksg_local(law.points[:, :1], law.points[:, 1:], [4, 16])
            errors.append([term.mean() - law.pointwise().mean() for term in terms])
        for k, mean, error in zip((4, 16), np.mean(errors, 0), np.std(errors, 0) / np.sqrt(30), strict=True):
            assert mean == pytest.approx(plane_bias(truth, 5000, k), abs=4 * error + 0.001)


def test_auto_takes_the_copula_where_neighbours_agree_and_beats_them() -> None:
    ours, plain = [], []
    for seed in range(3):
        x, y, truth = gaussian(3000, [0.9, 0.8, 0.6], seed, extra=7)
        result = mutual_information(np.exp(x) @ np.diag(np.arange(1, 11.0)), y**3)
        assert result.method == "copula"
        ours.append(abs(result.value - truth))
        plain.append(abs(ksg(x, y).value - truth))
    assert np.mean(ours) < 0.05 < 0.3 < np.mean(plain)


def test_auto_undoes_a_rotation_of_skewed_columns() -> None:
    x, y, truth = gaussian(5000, [0.9, 0.7], 0, extra=4)
    x, y = (z * np.sqrt(np.abs(z)) for z in (x, y))
    x, y = x @ rotation(6, 3), y @ rotation(6, 4)
    result = mutual_information(x, y)
    assert result.value == pytest.approx(truth, abs=0.06)
    columns = fit_gaussian(normal_scores(np.hstack([x, y])), 6).information
    assert result.candidates["copula"] > columns + 0.03


def test_auto_sees_information_without_correlation() -> None:
    x, y = student(5000, 2.0, 3, 3, 0)
    result = mutual_information(x, np.arcsinh(y))
    assert result.method == "student"
    assert result.value == pytest.approx(student_truth(2.0, 3, 3), abs=0.05)
    assert abs(result.candidates["copula"]) < 0.02


@pytest.mark.parametrize("shape", ["ring", "uniform"])
def test_auto_corrects_neighbours_where_no_copula_fits(shape: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, 5000)
    if shape == "ring":
        y = x**2 + 0.15 * rng.normal(size=5000)
        grid = np.linspace(-1, 1, 4001)
        values = np.linspace(-1, 2.2, 2001)
        density = np.exp(-0.5 * ((values[:, None] - grid**2) / 0.15) ** 2).mean(1) / (0.15 * np.sqrt(2 * np.pi))
        truth = -np.trapezoid(density * np.log(density + 1e-300), values) - 0.5 * np.log(2 * np.pi * np.e * 0.15**2)
    else:
        y = x + rng.uniform(-0.2, 0.2, 5000)  # width 2, noise 0.4: I = 0.1 - ln 0.2
        truth = 0.1 - np.log(0.2)
    result = mutual_information(x, y)
    assert result.method == "surrogate"
    assert result.warned("bias")
    assert result.value == pytest.approx(truth, abs=0.06)
    assert result.low < truth < result.high
    assert abs(result.candidates["copula"] - truth) > 0.2


@pytest.mark.parametrize(("left", "right"), [(10, 1), (6, 6), (12, 4)])
def test_what_many_columns_hide_is_seen_without_correlation(left: int, right: int) -> None:
    """Y = X1 X2 + noise .4: h(Y) - h(noise) is .897 by quadrature; no canonical pair is correlated."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3000, left)), rng.normal(size=(3000, right))
    y[:, 0] = x[:, 0] * x[:, 1] + 0.4 * y[:, 0]
    result = mutual_information(x, y)
    assert result.method == "surrogate"
    assert result.value == pytest.approx(0.897, abs=0.35)
    assert result.warned("bias")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hint_of_neighbours_is_enough_where_ranks_speak_against_the_law(seed: int) -> None:
    """Two Cauchy columns beside correlated normals: one Student copula for all is .3 to .4 nats short."""
    heavy = student(2000, 1.0, 2, 2, seed)
    x, y, held = gaussian(2000, [0.6, 0.5], seed + 10)
    result = mutual_information(np.hstack([heavy[0], x]), np.hstack([heavy[1], y]))
    truth = student_truth(1.0, 2, 2) + held
    assert result.method == "surrogate"
    assert abs(result.value - truth) < abs(result.candidates["student"] - truth) - 0.1


@pytest.mark.parametrize("shape", ["product", "ring", "ring of y"])
def test_what_is_hidden_among_too_many_columns_for_neighbours_is_said(shape: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2000, 10))
    assert not mutual_information(x, y).warnings
    if shape == "product":
        y[:, 3] += 2 * x[:, 0] * x[:, 7]
    elif shape == "ring":
        y[:, 3] += 0.11 * x[:, 2] ** 2
    else:
        x[:, 3] += 0.11 * y[:, 2] ** 2
    result = mutual_information(x, y)
    assert result.method == ("surrogate" if shape == "product" else "copula")
    assert result.warned("law")
    assert "squares of a column" in result.warnings[0]
    assert "law: columns " in result.warnings[1]


def test_squares_of_a_strong_correlation_are_no_departure() -> None:
    found = [squares_departure(fit_gaussian(normal_scores(np.hstack(gaussian(1000, [0.9, 0.5], seed, 8)[:2])), 10))
             for seed in range(40)]  # fmt: skip
    assert sum(doubted for _, doubted in found) <= 3  # 1 % each


def test_independence_contains_zero_and_negatives_are_shown() -> None:
    """200 repetitions: four binomial errors around 95 %; an interval that always held zero would say nothing."""
    results = []
    for seed in range(200):
        x, y = np.random.default_rng(seed).normal(size=(2, 1000))
        results.append(mutual_information(x, y, method="copula"))
    held = np.mean([result.low <= 0.0 <= result.high for result in results])
    assert 0.89 <= held <= 0.99
    assert min(result.value for result in results) < 0


def test_monotone_maps_change_nothing() -> None:
    x, y, _ = gaussian(2000, [0.7], 5)
    plain = mutual_information(x, y)
    mapped = mutual_information(np.exp(2 * x), np.arctan(y))
    assert mapped.value == pytest.approx(plain.value, abs=1e-9)
    assert (mapped.low, mapped.high) == pytest.approx((plain.low, plain.high), abs=1e-9)


def test_two_independent_copies_hold_twice_the_information() -> None:
    rng = np.random.default_rng(0)
    x, y, _ = gaussian(4000, [0.7], 6)
    single = mutual_information(x, y)
    order = rng.permutation(4000)
    double = mutual_information(np.hstack([x, x[order]]), np.hstack([y, y[order]]))
    assert double.value == pytest.approx(2 * single.value, abs=0.03)


def test_processing_does_not_add_information() -> None:
    rng = np.random.default_rng(0)
    x, y, _ = gaussian(4000, [0.8], 7)
    noisy = y + rng.normal(size=y.shape)
    first, second = mutual_information(x, y), mutual_information(x, noisy)
    assert second.value < first.low


def test_tensors_and_arrays_give_the_same() -> None:
    x, y, _ = gaussian(500, [0.5], 8)
    from_tensor = mutual_information(torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)[:, 0])
    assert from_tensor.value == mutual_information(x, y[:, 0]).value


def test_conditional_information_of_a_chain_is_zero_and_of_a_collider_is_not() -> None:
    rng = np.random.default_rng(0)
    x, z, noise = rng.normal(size=(3, 3000))
    chain = conditional_ksg(z + x, z + noise, z)
    assert abs(chain.value) < 0.04
    # X and Y independent, Z = X + Y: given Z each fixes the other up to nothing; add noise to keep it finite.
    y = noise
    total = x + y + 0.5 * rng.normal(size=3000)
    # Joint normal: I(X;Y|Z) = -1/2 ln(1 - r^2), r the partial correlation of X and Y given Z.
    covariance = np.cov(np.stack([x, y, total]))
    precision = np.linalg.inv(covariance)
    r = -precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1])
    truth = -0.5 * np.log1p(-(r**2))
    assert conditional_mutual_information(x, y, total).value == pytest.approx(truth, abs=0.06)


def test_what_the_literature_warns_of_is_in_the_record() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5))
    assert ksg(x, x + rng.normal(size=x.shape)).warned("dimension")
    copied = mutual_information(x[:, 0], 2 * x[:, 0] + 1)
    assert (copied.value, copied.warned("deterministic")) == (np.inf, True)
    assert mutual_information(x[:, 0], x[:, 0] ** 2).warned("deterministic")
    assert not mutual_information(x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]).warned("deterministic")
    constant = mutual_information(np.ones(100), rng.normal(size=100))
    assert constant.value == 0.0
    assert constant.warned("constant")
    assert mutual_information(x[:20, 0], x[:20, 1]).warned("small")
    y = x[:, 0] + rng.normal(size=300)
    few = mutual_information(x[:, 0], y)
    assert few.method == "copula"
    assert few.warned("small")  # 300 samples do not tell the law
    assert not mutual_information(x[:, 0], y, method="copula").warned("small")  # whoever names it vouches for it
    enough = rng.normal(size=(500, 2))
    assert not mutual_information(enough[:, 0], enough.sum(axis=1)).warned("small")
    rare = ross(x[:, :1], np.r_[np.zeros(200, int), np.ones(99, int), 7])
    assert rare.warned("rare_labels")
    assert rare.n == 299


def test_bad_input_is_refused() -> None:
    x = np.random.default_rng(0).normal(size=60)
    with pytest.raises(ValueError, match="x must be finite, got 1 NaN or infinite of 60"):
        mutual_information(np.where(np.arange(60) == 3, np.nan, x), x)
    with pytest.raises(ValueError, match="x and y must have equal lengths, got 60 and 59"):
        mutual_information(x, x[1:])
    with pytest.raises(ValueError, match=r"method must be one of auto, ksg, .* got 'mine'"):
        mutual_information(x, x, method="mine")
    with pytest.raises(ValueError, match="x must hold more than k = 70 samples, got 60"):
        ksg(x, x, k=70)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        ksg(x, x, k=0)
    with pytest.raises(ValueError, match="variant must be 1 or 2, got 3"):
        ksg(x, x, variant=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must repeat, got 0 samples of repeated labels"):
        ross(x, np.arange(60))
    with pytest.raises(ValueError, match=r"every label must have at least 10 samples, .* got counts from 3 over 20"):
        classifier_information(x, np.arange(60) % 20)
    with pytest.raises(ValueError, match="x and labels must have equal lengths, got 60 and 2"):
        classifier_information(x, [0, 1])
    with pytest.raises(ValueError, match=r"x must have shape \(n,\) or \(n, d\), got \(2, 3, 4\)"):
        ksg(np.zeros((2, 3, 4)), np.zeros(2))


@pytest.mark.parametrize(("rho", "n"), [(0.9, 300), (0.97, 300), (0.97, 1000)])
def test_ranks_lose_nothing_of_a_strong_correlation_on_average(rho: float, n: int) -> None:
    """150 draws know the mean to 1 / sqrt(150) of a spread of about rho / sqrt(n); three of these."""
    values = []
    for seed in range(150):
        x, e = np.random.default_rng(seed).normal(size=(2, n))
        values.append(mutual_information(x, rho * x + np.sqrt(1 - rho**2) * e, method="copula").value)
    assert np.mean(values) == pytest.approx(-0.5 * np.log(1 - rho**2), abs=3 * rho / np.sqrt(150 * n))
