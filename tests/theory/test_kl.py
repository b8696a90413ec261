"""Divergences against closed forms, three-line loops and laws whose support betrays the estimators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Cauchy,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    Independent,
    Laplace,
    LKJCholesky,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Poisson,
    StudentT,
    Uniform,
)

from tinyalign.theory import categorical_kl, kl_divergence, kl_from_samples, monte_carlo_kl, sequence_kl
from tinyalign.theory.kl_monte_carlo import tail_shape


def naive(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * np.log(a / b) if b > 0 else np.inf for a, b in zip(p, q, strict=True) if a > 0)


@given(st.integers(0, 9999), st.integers(2, 30))
def test_categorical_equals_the_sum_and_is_not_negative(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(size, 0.3), 2)
    value = kl_divergence(p, q).value
    assert value == pytest.approx(naive(p, q), abs=1e-9, rel=1e-9)
    assert value >= 0
    assert kl_divergence(p, p).value == pytest.approx(0.0, abs=1e-12)


def test_zero_in_q_is_infinite_and_zero_in_p_is_nothing() -> None:
    assert kl_divergence([0.5, 0.5], [1.0, 0.0]).value == np.inf
    assert kl_divergence([1.0, 0.0], [0.5, 0.5]).value == pytest.approx(np.log(2))
    assert kl_divergence([1.0, 0.0], [1.0, 0.0]).value == 0.0
    blocked = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert categorical_kl(blocked, torch.tensor([[1.0, 5.0, -torch.inf]]), inputs="logits").tolist() == [np.inf]
    assert categorical_kl(blocked, blocked, inputs="logits").tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("chunk", [3, 16384])
def test_logits_of_any_type_and_size_agree_with_torch(dtype: torch.dtype, chunk: int) -> None:
    p, q = (torch.randn(4, 50) * 20).to(dtype), (torch.randn(4, 50) * 20).to(dtype)
    wide_p, wide_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = (wide_p.exp() * (wide_p - wide_q)).sum(-1)
    torch.testing.assert_close(categorical_kl(p, q, inputs="logits", chunk=chunk), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_averaged_where_the_mask_says_so() -> None:
    p, q = np.array([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]]), np.array([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    result = kl_divergence(p, q, mask=[True, True, False])
    assert result.value == pytest.approx(naive(p[1], q[1]) / 2)
    assert result.n == 2
    assert result.samples.tolist() == pytest.approx([0.0, naive(p[1], q[1])])


@pytest.mark.parametrize("bad", [[0.0, 0.0], [np.nan, 1.0], [3.0, -1.0]])
def test_rows_that_do_not_count_may_hold_anything(bad: list[float]) -> None:
    p, q, mask = [[0.5, 0.5], bad], [[0.9, 0.1], bad], [True, False]
    assert kl_divergence(p, q, mask=mask).value == pytest.approx(naive(np.array(p[0]), np.array(q[0])))
    assert kl_divergence(p, q[0], mask=mask).value == pytest.approx(naive(np.array(p[0]), np.array(q[0])))
    with pytest.raises(ValueError, match="p must"):
        kl_divergence(p, q)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_positions_that_do_not_count_may_hold_anything(bad: float) -> None:
    p, q, mask = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([[True, False, True], [True, False, False]])
    clean = sequence_kl(p, q, mask)
    again = sequence_kl(p.masked_fill(~mask[..., None], bad), q, mask)
    assert again.samples.tolist() == clean.samples.tolist()
    with pytest.raises(ValueError, match="p must"):
        sequence_kl(p.masked_fill(~mask[..., None], bad), q)


def test_tables_that_ask_for_gradients_are_read_and_rows_keep_theirs() -> None:
    p, q = torch.randn(1, 2, 3, requires_grad=True), torch.zeros(1, 2, 3)
    assert sequence_kl(p, q).value == sequence_kl(p.detach(), q).value
    assert kl_divergence(p, q, inputs="logits").value == kl_divergence(p.detach(), q, inputs="logits").value
    assert kl_divergence(p.softmax(-1), q.softmax(-1)).samples.shape == (2,)
    assert categorical_kl(p, q, inputs="logits").requires_grad


def test_half_precision_probabilities_sum_to_one_within_their_rounding() -> None:
    law = np.random.default_rng(0).dirichlet(np.ones(1000), size=2).astype(np.float16)
    value = kl_divergence(law[0], law[1]).value
    assert value == pytest.approx(naive(law[0].astype(np.float64), law[1].astype(np.float64)), rel=1e-4)
    assert value == kl_divergence(*torch.tensor(law)).value


def test_sequences_sum_over_their_own_tokens() -> None:
    p, q = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    per_token = [
        [naive(a.softmax(-1).numpy(), b.softmax(-1).numpy()) for a, b in zip(x, y, strict=True)]
        for x, y in zip(p.double(), q.double(), strict=True)
    ]
    result = sequence_kl(p, q, mask)
    sums = [sum(per_token[0]), per_token[1][0]]
    assert result.samples.tolist() == pytest.approx(sums, rel=1e-5)
    assert result.value == pytest.approx(np.mean(sums), rel=1e-5)
    assert result.details["per_token"] == pytest.approx(sum(sums) / 4, rel=1e-5)


CLOSED = [
    (Normal(0.0, 1.0), Normal(1.0, 2.0), np.log(2) + (1 + 1) / 8 - 0.5),
    (Exponential(2.0), Exponential(0.5), np.log(4) + 0.25 - 1),
    (Uniform(0.0, 1.0), Uniform(-1.0, 3.0), np.log(4)),
    (Categorical(torch.tensor([0.5, 0.5])), Categorical(torch.tensor([0.9, 0.1])), -0.5 * np.log(4 * 0.09)),
    (Independent(Normal(torch.zeros(3), 1.0), 1), Independent(Normal(torch.ones(3), 1.0), 1), 1.5),
]


@pytest.mark.parametrize(("p", "q", "truth"), CLOSED)
def test_closed_forms(p: object, q: object, truth: float) -> None:
    assert kl_divergence(p, q).value == pytest.approx(truth, rel=1e-6)
    assert kl_divergence(p, q).method == "closed form"


BATCH = torch.arange(1.0, 21.0) / 7
NEAR = [
    (Normal(0.0, 1.0), Normal(0.01, 1.0)),
    (Poisson(3.0), Poisson(3.1)),
    (Dirichlet(BATCH), Dirichlet(BATCH + 0.01)),
    (Beta(2.0, 3.0), Beta(2.02, 3.01)),
    (Gamma(2.0, 3.0), Gamma(2.02, 3.01)),
    (Bernoulli(logits=torch.tensor(0.3)), Bernoulli(logits=torch.tensor(0.31))),
    (OneHotCategorical(logits=BATCH), OneHotCategorical(logits=BATCH * 1.01)),
    (Independent(Gumbel(BATCH, 1.0), 1), Independent(Gumbel(BATCH + 0.01, 1.0), 1)),
    (MultivariateNormal(BATCH, torch.eye(20) + 0.3), MultivariateNormal(BATCH + 0.01, torch.eye(20) + 0.3)),
]


@pytest.mark.parametrize(("p", "q"), NEAR)
def test_closed_forms_of_near_laws_keep_the_digits_of_their_parameters(p: Distribution, q: Distribution) -> None:
    """Against the same laws built anew in float64, from the numbers that the float32 ones hold."""

    def built(law: Distribution) -> Distribution:
        if isinstance(law, Independent):
            return Independent(built(law.base_dist), law.reinterpreted_batch_ndims)
        names = {MultivariateNormal: ["loc", "covariance_matrix"], Bernoulli: ["logits"], OneHotCategorical: ["logits"]}
        asked = names.get(type(law), list(law.arg_constraints))
        return type(law)(**{name: getattr(law, name).double() for name in asked})

    for name in ("probs", "precision_matrix"):
        getattr(p, name, None)  # what a law derives and keeps is no parameter of its own
    result = kl_divergence(p, q)
    assert result.value == pytest.approx(float(torch.distributions.kl_divergence(built(p), built(q))), rel=1e-6)
    assert result.method == "closed form"


def test_a_law_that_cannot_be_rebuilt_is_taken_as_it_is() -> None:
    class Kept(Normal):
        def __init__(self, centre: float) -> None:
            super().__init__(centre, 1.0)

    class Logged(Normal):
        def __init__(self, loc: float, scale: float, validate_args: bool | None = None) -> None:
            super().__init__(loc, torch.as_tensor(scale).exp(), validate_args=validate_args)

    assert kl_divergence(Kept(0.0), Kept(1.0)).value == 0.5
    assert kl_divergence(Logged(0.0, 1.0), Logged(1.0, 1.0)).value == pytest.approx(0.5 * np.exp(-2.0), rel=1e-6)
    assert kl_divergence(Normal(0.0, 1.0), Independent(Kept(1.0), 0)).value == pytest.approx(0.5, abs=0.1)


def test_laws_of_matrices_are_sampled() -> None:
    """The density of LKJ on 2 x 2: r ~ 2 Beta(c, c) - 1."""
    p, q = LKJCholesky(2, 1.0), LKJCholesky(2, 2.0)
    truth = kl_divergence(Beta(1.0, 1.0), Beta(2.0, 2.0)).value
    result = kl_divergence(p, q, seed=0)
    assert abs(result.value - truth) < 4 * result.std_error


def test_laws_without_a_closed_form_are_sampled() -> None:
    p, q = StudentT(torch.tensor(5.0, dtype=torch.float64)), Laplace(torch.zeros((), dtype=torch.float64), 1.0)
    grid = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
    truth = torch.trapezoid(p.log_prob(grid).exp() * (p.log_prob(grid) - q.log_prob(grid)), grid).item()
    result = kl_divergence(p, q, samples=20_000, seed=1)
    assert abs(result.value - truth) < 4 * result.std_error
    assert result.std_error < 0.01
    assert result.value == kl_divergence(p, q, samples=20_000, seed=1).value
    outside = kl_divergence(StudentT(torch.tensor(5.0)), Uniform(-1.0, 1.0), samples=500, seed=0)
    assert outside.value == np.inf
    assert outside.warned("support")


def normal_pair(shift: float, n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(1).normal(size=n)
    return -0.5 * draws**2, -0.5 * (draws - shift) ** 2


@pytest.mark.parametrize("method", ["fitted", "k1", "k3"])
def test_monte_carlo_is_unbiased_where_supports_agree(method: str) -> None:
    result = monte_carlo_kl(*normal_pair(0.5), method=method)
    assert abs(result.value - 0.125) < 4 * result.std_error
    assert result.low < 0.125 < result.high
    assert not result.warnings


def test_the_fitted_control_variate_is_never_noisier_than_k1_or_k3() -> None:
    for shift in (0.1, 0.5, 1.0):
        errors = {m: monte_carlo_kl(*normal_pair(shift), method=m).std_error for m in ("fitted", "k1", "k3")}
        assert errors["fitted"] <= 1.02 * min(errors["k1"], errors["k3"])


def test_k2_is_half_the_squared_log_ratio_and_says_it_is_biased() -> None:
    log_p, log_q = normal_pair(0.5)
    result = monte_carlo_kl(log_p, log_q, method="k2")
    assert result.value == pytest.approx(0.5 * np.mean((log_p - log_q) ** 2))
    assert result.warned("bias")


def test_nested_uniforms_betray_k3_and_not_the_default() -> None:
    log_p, log_q = np.zeros(2000), np.full(2000, -np.log(4))
    result = monte_carlo_kl(log_p, log_q)
    assert result.value == pytest.approx(np.log(4))
    assert (result.method, result.warned("support_check")) == ("k1", True)
    betrayed = monte_carlo_kl(log_p, log_q, method="k3")
    assert betrayed.value == pytest.approx(np.log(4) - 0.75)
    assert betrayed.warned("support_check")


def test_far_normals_fall_back_to_k1() -> None:
    result = monte_carlo_kl(*normal_pair(6.0))
    assert abs(result.value - 18.0) < 4 * result.std_error
    assert result.warned("support_check")


def test_monte_carlo_sums_tokens_of_a_sequence() -> None:
    log_p, log_q = np.full((3, 2), -1.0), np.array([[-1.0, -2.0], [-1.0, -2.5], [-1.5, -1.0]])
    assert monte_carlo_kl(log_p, log_q, method="k1").samples.tolist() == [1.0, 1.5, 0.5]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p must hold probabilities that sum to 1, .* off by 0\.5"):
        kl_divergence([0.2, 0.3], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"minimum of -0\.5"):
        kl_divergence([1.5, -0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="one alphabet, got 2 and 3 outcomes"):
        kl_divergence([0.5, 0.5], [0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match=r"p must not hold NaN or \+inf"):
        kl_divergence([float("nan"), 1.0], [0.5, 0.5])
    with pytest.raises(ValueError, match="p must allow an outcome in every row, got one of -inf only"):
        categorical_kl(torch.full((1, 2), -torch.inf), torch.zeros(1, 2), inputs="logits")
    with pytest.raises(ValueError, match="inputs must be 'probs' or 'logits', got 'odds'"):
        categorical_kl([0.5, 0.5], [0.5, 0.5], inputs="odds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"p must have shape \(\.\.\., V\), got \(\)"):
        categorical_kl(0.5, [0.5, 0.5])
    with pytest.raises(ValueError, match="mask must keep at least one row, got none"):
        kl_divergence([[0.5, 0.5]], [[0.5, 0.5]], mask=[False])
    with pytest.raises(ValueError, match=r"mask must have shape \(1,\), got \(2,\)"):
        kl_divergence([[0.5, 0.5]], [[0.5, 0.5]], mask=[False, True])
    with pytest.raises(TypeError, match="both be distributions or both tables, got Normal and list"):
        kl_divergence(Normal(0.0, 1.0), [0.5, 0.5])
    with pytest.raises(ValueError, match=r"share one shape \(B, T, V\), got \(1, 2, 3\) and \(1, 2, 4\)"):
        sequence_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="mask must keep a token in every row, got none in row 1"):
        sequence_kl(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3), [[True], [False]])
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 1\), got \(1, 1\)"):
        sequence_kl(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3), [[True]])
    with pytest.raises(ValueError, match="method must be one of fitted, k1, k2, k3, got 'k4'"):
        monte_carlo_kl([0.0, 0.0], [0.0, 0.0], method="k4")
    with pytest.raises(ValueError, match=r"share one shape .* got \(2,\) and \(3,\)"):
        monte_carlo_kl([0.0, 0.0], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="log_p must be finite at draws from p"):
        monte_carlo_kl([0.0, -np.inf], [0.0, 0.0])
    with pytest.raises(ValueError, match="one width, got 1 and 2"):
        kl_from_samples(np.zeros((50, 1)), np.zeros((50, 2)))
    with pytest.raises(ValueError, match="p_samples must hold at least 6 samples, got 3"):
        kl_from_samples(np.arange(3.0), np.arange(9.0))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        kl_from_samples(np.arange(9.0), np.arange(9.0), k=0)
    with pytest.raises(
        ValueError, match="method must be one of auto, knn, plain, gaussian, margins, surrogate, got 'kde'"
    ):
        kl_from_samples(np.arange(9.0), np.arange(9.0), method="kde")


@pytest.mark.parametrize(
    ("scale", "method", "code"), [(0.7, "fitted", None), (1.2, "fitted", "tail"), (2, "k1", "support_check")]
)
def test_a_wider_q_makes_the_control_variate_heavy_and_that_is_said(
    scale: float, method: str, code: str | None
) -> None:
    """The ratio of N(0, s) to N(0, 1) has a tail of shape 1 - 1 / s^2 under the latter: no variance from s = 1.41."""
    draws = np.random.default_rng(0).normal(size=4000)
    result = monte_carlo_kl(-0.5 * draws**2, -0.5 * (draws / scale) ** 2 - np.log(scale))
    assert result.method == method
    assert [line.partition(":")[0] for line in result.warnings] == ([code] if code else [])
    assert result.low < np.log(scale) + 0.5 / scale**2 - 0.5 < result.high


@pytest.mark.parametrize(
    ("p", "q", "said"),
    [
        (Cauchy(0.0, 1.0), Normal(0.0, 1.0), True),
        (StudentT(2.0), Normal(0.0, 1.0), True),
        (Laplace(-0.2, 0.8), Gumbel(0.1, 0.9), True),
        (Laplace(0.0, 1.0), StudentT(5.0), False),
        (Normal(0.0, 1.0), StudentT(9.0, 0.5), False),
    ],
)
def test_a_log_ratio_whose_mean_draws_miss_is_said_of_every_method(
    p: Distribution, q: Distribution, said: bool
) -> None:
    """Shapes of the tails of log p/q: 2 (an infinite divergence), 1, 0.89, and none."""
    for method in ("fitted", "k1", "k3"):
        result = kl_divergence(p, q, method=method, seed=0)
        assert any("log p/q" in line for line in result.warnings) == said
    assert (result.details["log_tail"] > 0.5) == said


@pytest.mark.parametrize(("n", "said"), [(20, False), (21, True)])
def test_twenty_draws_have_no_tail_of_the_log_ratio(n: int, said: bool) -> None:
    log_q = np.r_[np.linspace(-0.1, 0.1, n - 1), -1000.0]
    lines = monte_carlo_kl(np.zeros(n), log_q, method="k1").warnings
    assert any("log p/q" in line for line in lines) == said


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.45])
def test_the_shape_of_a_pareto_tail_is_found(shape: float) -> None:
    """Over 40 samples, whose shapes scatter by about 0.05."""
    found = [tail_shape(stats.genpareto.rvs(shape, size=20_000, random_state=seed)) for seed in range(40)]
    assert np.mean(found) == pytest.approx(shape, abs=0.03)
    assert tail_shape(np.ones(100)) == -np.inf
    assert tail_shape(np.r_[np.ones(99), np.inf]) == np.inf
    assert tail_shape(np.ones(3)) == np.inf


def test_few_skewed_draws_keep_their_coverage() -> None:
    """150 repetitions of 60 draws: three binomial errors below 95 % is 0.897; Student's t holds 0.88 of them."""
    hits = {"k3": [], "t": []}
    for seed in range(150):
        draws = np.random.default_rng(seed).normal(size=60)
        result = monte_carlo_kl(-0.5 * draws**2, -0.5 * (draws / 0.5) ** 2 - np.log(0.5), method="k3")
        truth = np.log(0.5) + 2 - 0.5
        hits["k3"].append(result.low <= truth <= result.high)
        hits["t"].append(abs(result.value - truth) <= 2.0 * result.std_error)
    assert np.mean(hits["k3"]) >= max(0.897, np.mean(hits["t"]))


def test_a_constant_log_ratio_has_an_exact_interval() -> None:
    result = monte_carlo_kl(np.zeros(100), np.full(100, -0.1), method="k1")
    assert (result.value, result.low, result.high) == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize(("n", "said"), [(20, False), (21, True)])
def test_one_draw_may_carry_the_ratio_of_twenty(n: int, said: bool) -> None:
    ratio = np.full(n, (n - 3.0) / (n - 1))
    ratio[5] = 3.0
    assert monte_carlo_kl(np.zeros(n), np.log(ratio)).warned("support_check") == said
