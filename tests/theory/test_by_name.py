"""Estimators asked for by name, odd inputs, and every refusal that no other file provokes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Laplace, StudentT

from tinyalign.theory import (
    Estimate,
    NLLTable,
    classifier_information,
    decompose,
    delta_emi,
    discrete_information,
    effective_mutual_information,
    entropy,
    kl_divergence,
    kl_from_samples,
    knn_entropy,
    ksg,
    monte_carlo_kl,
    mutual_information,
    ross,
)


def pair(n: int = 300, rho: float = 0.7, width: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, e = np.random.default_rng(seed).normal(size=(2, n, width))
    return x, rho * x + np.sqrt(1 - rho**2) * e


def test_a_name_gives_the_estimator_of_that_name() -> None:
    x, y = pair()
    labels = (y[:, 0] > 0).astype(int)
    assert mutual_information(x, y, "ksg").value == ksg(x, y).value
    assert mutual_information(x, y, "ksg1", k=7).value == ksg(x, y, k=7, variant=1).value
    assert mutual_information(x, y, "ksg2").value == ksg(x, y, variant=2).value
    assert mutual_information(x, labels, "ross").value == ross(x, labels).value
    assert mutual_information(labels, x, "classifier").value == classifier_information(x, labels).value
    assert mutual_information(x, y, "surrogate").method == "surrogate"
    heavy = np.random.default_rng(1).normal(size=(3000, 2)) / np.sqrt(
        np.random.default_rng(2).chisquare(2, (3000, 1)) / 2
    )
    student = mutual_information(heavy[:, 0], heavy[:, 1], "student")
    assert student.method == "student"
    assert student.details["freedom"] == pytest.approx(2.0, rel=0.3)
    assert mutual_information(labels, labels, "grassberger").method == "grassberger"


def test_columns_that_repeat_others_add_nothing_and_are_said() -> None:
    x, y = pair(2000, width=2)
    once = mutual_information(x, y)
    for more in (np.exp(x[:, :1]), np.full((2000, 1), 4.0)):
        again = mutual_information(np.hstack([x, more]), np.hstack([y, -y]))
        assert again.value == pytest.approx(once.value, abs=1e-9)
        assert again.warned("copies")
        assert (again.details["dimensions"], once.details["dimensions"]) == ((2, 2), (2, 2))
    assert not once.warned("copies")


def test_rare_labels_beside_many_columns_are_said() -> None:
    x = np.random.default_rng(0).normal(size=(200, 6))
    labels = np.r_[np.repeat([0, 1], 97), [2, 2, 2, 3, 3, 3]]
    result = mutual_information(x, labels)
    assert result.method == "ross"
    assert result.warned("rare_labels")
    assert not mutual_information(x[:, :2], labels).warned("rare_labels")


def test_repeated_rows_of_several_columns_are_counted() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 2))
    assert knn_entropy(np.vstack([rows, rows])).warned("ties")
    assert not knn_entropy(np.stack([np.repeat(rng.normal(size=50), 2), rng.normal(size=100)], axis=1)).warned("ties")


def test_single_precision_tables_are_read_in_double() -> None:
    p, q = np.array([0.3, 0.7], dtype=np.float32), np.array([0.6, 0.4], dtype=np.float32)
    expected = float((p.astype(float) * np.log(p.astype(float) / q.astype(float))).sum())
    assert kl_divergence(p, q).value == pytest.approx(expected, rel=1e-12)


def test_without_a_seed_the_global_generator_draws() -> None:
    p, q = StudentT(torch.tensor(5.0)), Laplace(0.0, 1.0)
    torch.manual_seed(3)
    first = kl_divergence(p, q, samples=200).value
    assert kl_divergence(p, q, samples=200).value != first
    torch.manual_seed(3)
    assert kl_divergence(p, q, samples=200).value == first


def test_one_draw_that_carries_the_ratio_is_said() -> None:
    log_p = np.zeros(400)
    log_q = np.full(400, np.log(0.75))
    log_q[7] = np.log(100.75)  # mean(q / p) = 1, a quarter of it from one draw
    result = monte_carlo_kl(log_p, log_q)
    assert (result.method, result.warned("support_check")) == ("k1", True)
    assert "one draw carries 25%" in result.warnings[0]


def test_corrections_and_dimensions_of_divergences_are_said() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(600, 8)), rng.normal(size=(600, 8)) + 0.8
    assert kl_from_samples(p, q, method="surrogate").warned("bias")
    assert kl_from_samples(p, q, method="plain").warned("dimension")
    assert not kl_from_samples(p[:, :1], q[:, :1] - 0.8, method="plain").warnings
    for width in (1, 2, 3):
        few = kl_from_samples(p[:, :width], q[:, :width] - 0.8, method="plain")
        assert few.warned("dimension") == (width > 2)


def test_an_uncertain_entropy_widens_even_an_exact_loss() -> None:
    known = Estimate(3.0, 2.8, 3.2, std_error=0.1)
    result = effective_mutual_information([1.0, 1.0, 1.0], known)
    assert result.value == 2.0
    assert (result.low, result.high) == pytest.approx((2.0 - 0.195996, 2.0 + 0.195996), abs=1e-5)


def test_intervals_are_as_wide_as_their_level_says() -> None:
    x, y = pair(600)
    labels = np.digitize(y[:, 0], [-1.0, 0.0, 1.0])
    for level, quantile in ((0.95, 1.959964), (0.5, 0.67449)):
        counted = entropy(labels, level=level)
        # Each end is an entropy that the estimate would just reject: the variance there is that of the surprise, in
        # proportion to what is lacking to even outcomes, and 3 / (2 n^2) at evenness. Skew and 400 draws: a tenth.
        share = np.bincount(labels) / len(labels)
        lacking = float(share @ np.log(4 * share))
        slope = float(share @ np.log(share) ** 2 - (share @ np.log(share)) ** 2) / lacking / len(labels)
        for end in (counted.low, counted.high):
            variance = slope * (np.log(4) - end) + 3 / (2 * len(labels) ** 2)
            assert abs(end - counted.value) == pytest.approx(quantile * np.sqrt(variance), rel=0.1)
        bound = classifier_information(x, labels, level=level)
        assert bound.high - bound.low == pytest.approx(2 * quantile * bound.std_error, rel=1e-5)


def test_tables_go_through_emi_and_its_decomposition() -> None:
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 2, (3, 60))
    base, augmented, teacher = (NLLTable(row, np.full(60, 2), groups=np.arange(60) // 2) for row in losses)
    emi = effective_mutual_information(base, 3.0, per="token", interval="t")
    assert (emi.value, emi.unit) == (pytest.approx(3.0 - losses[0].sum() / 120), "nats/token")
    assert emi.n_clusters == 30
    split = decompose(base, augmented, teacher, retrieval="stochastic", interval="t")
    floor = (losses[0] - losses[1] - losses[2]).mean()
    assert split.delta_error.lower.value == pytest.approx(floor)
    assert split.delta_error.upper.value == pytest.approx((losses[0] - losses[1]).mean())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="nll_a must hold at least 1 samples, got 0"):
        delta_emi([], [])
    with pytest.raises(ValueError, match=r"discrete_information: method must be one of auto, plugin, .* got 'ross'"):
        discrete_information([1, 2], [1, 2], method="ross")
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
        mutual_information([0.1, 0.2], [0.1, 0.2], level=95)
    with pytest.raises(ValueError, match=r"x must be finite, got 1 NaN or infinite of 2 values"):
        ross([np.inf, 1.0], [0, 1])
    with pytest.raises(ValueError, match="p_samples must be finite, got 2 NaN"):
        kl_from_samples(np.full((2, 1), np.nan), np.zeros((9, 1)))
    with pytest.raises(TypeError, match="x must be numeric, got dtype"):
        ksg(["a", "b"], [1.0, 2.0])
