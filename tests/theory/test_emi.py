"""EMI and V-information against worlds written down as tables, and the paired interval against repeated sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tinyalign.theory import (
    Bounds,
    Estimate,
    NLLTable,
    TableMismatch,
    conditional_v_information,
    delta_emi,
    effective_mutual_information,
    pvi,
    v_information,
)
from tinyalign.theory.intervals import _resample

# p(x, l) of a small world, and a model q(l | x) that is wrong on purpose.
JOINT = np.array([[0.30, 0.10, 0.05], [0.05, 0.25, 0.25]])
MODEL = np.array([[0.60, 0.25, 0.15], [0.20, 0.40, 0.40]])


def exact_terms() -> dict[str, float]:
    inputs, labels = JOINT.sum(1), JOINT.sum(0)
    entropy = -np.sum(labels * np.log(labels))
    loss = -np.sum(JOINT * np.log(MODEL))
    return {"entropy": entropy, "loss": loss, "emi": entropy - loss, "inputs": inputs, "labels": labels}


def whole_world(scale: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Every cell repeated in proportion: the empirical law is the law itself."""
    cells = np.repeat(np.arange(6), np.round(JOINT.ravel() * scale).astype(int))
    return cells // 3, cells % 3


def test_emi_of_a_world_equals_its_tables() -> None:
    x, label = whole_world()
    truth = exact_terms()
    result = effective_mutual_information(-np.log(MODEL[x, label]), truth["entropy"], interval="t")
    assert result.value == pytest.approx(truth["emi"], abs=1e-12)
    assert result.samples.mean() == pytest.approx(truth["emi"], abs=1e-12)
    assert (result.kind, result.unit, result.n) == ("lower", "nats", 20)


def test_v_information_is_emi_plus_the_null_models_error() -> None:
    x, label = whole_world()
    truth = exact_terms()
    null = np.array([0.5, 0.3, 0.2])
    result = v_information(-np.log(null[label]), -np.log(MODEL[x, label]), interval="t")
    null_error = np.sum(truth["labels"] * np.log(truth["labels"] / null))
    assert result.value == pytest.approx(truth["emi"] + null_error, abs=1e-12)
    assert result.kind == "usable"


def test_sampled_emi_lies_within_four_standard_errors() -> None:
    rng = np.random.default_rng(7)
    cells = rng.choice(6, size=20_000, p=JOINT.ravel())
    truth = exact_terms()
    result = effective_mutual_information(-np.log(MODEL[cells // 3, cells % 3]), truth["entropy"], interval="t")
    assert abs(result.value - truth["emi"]) < 4 * result.std_error
    assert result.std_error == pytest.approx(np.std(result.samples) / np.sqrt(20_000), rel=1e-3)


def test_bounds_on_the_entropy_become_bounds_on_emi() -> None:
    nll = np.array([1.0, 2.0, 3.0, 2.0])
    bounds = effective_mutual_information(nll, (3.0, 5.0), interval="t")
    assert isinstance(bounds, Bounds)
    assert (bounds.lower.value, bounds.upper.value) == (1.0, 3.0)
    assert bounds.low < 1.0 < 3.0 < bounds.high
    assert "not" in bounds.reason
    upper_only = effective_mutual_information(nll, Estimate(5.0, kind="upper"), interval="t")
    assert (upper_only.lower.value, upper_only.upper.value) == (-np.inf, 3.0)
    lower_only = effective_mutual_information(nll, Estimate(3.0, kind="lower"), interval="t")
    assert (lower_only.lower.value, lower_only.upper.value) == (1.0, np.inf)
    assert effective_mutual_information(nll, Bounds(Estimate(3.0), Estimate(5.0))).upper.value == 3.0


def test_an_entropy_in_bits_is_converted_and_said_and_its_error_widens_the_interval() -> None:
    nll = np.array([1.0, 2.0, 3.0, 2.0])
    plain = effective_mutual_information(nll, 4 * np.log(2), interval="t")
    bits = effective_mutual_information(nll, Estimate(4.0, unit="bits", std_error=1.0), interval="t")
    assert bits.value == pytest.approx(plain.value)
    assert bits.warned("unit")
    assert bits.std_error == pytest.approx(np.hypot(plain.std_error, np.log(2)))
    assert bits.high - bits.low > plain.high - plain.low
    with pytest.raises(ValueError, match="entropy must count in nats as the loss does, got nats/token"):
        effective_mutual_information(nll, Estimate(4.0, unit="nats/token"))


def test_negative_results_are_shown_as_they_are() -> None:
    assert v_information([1.0, 1.0, 1.5], [2.0, 2.5, 2.0], interval="t").value == pytest.approx(-1.0)
    assert effective_mutual_information([3.0, 3.0], 1.0, interval="t").value == -2.0


def test_delta_emi_is_positive_when_b_is_better_and_h_of_l_cancels() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2.0, size=200), rng.gamma(1.5, size=200)
    result = delta_emi(a, b)
    emi_a, emi_b = (effective_mutual_information(nll, 7.0).value for nll in (a, b))
    assert result.value == pytest.approx(emi_b - emi_a)
    assert result.low < result.value < result.high
    assert conditional_v_information(a, b).value == pytest.approx(result.value)
    np.testing.assert_allclose(pvi(a, b), a - b)
    np.testing.assert_allclose(result.samples, a - b)


def test_pairing_removes_what_both_models_share() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.gamma(4.0, size=500)
    a, b = difficulty + rng.normal(0, 0.1, 500), difficulty - 0.05 + rng.normal(0, 0.1, 500)
    unpaired = np.sqrt(a.var() / 500 + b.var() / 500)
    assert delta_emi(a, b).std_error < 0.2 * unpaired


def test_clusters_widen_the_interval_as_their_correlation_says() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(300), 8)
    difference = rng.normal(size=300)[groups] + rng.normal(size=2400)
    clustered = delta_emi(difference, np.zeros(2400), groups, interval="t")
    naive = delta_emi(difference, np.zeros(2400), interval="t")
    # Design effect 1 + (m - 1) rho with m = 8 and rho = 1/2; the sampling error of a variance ratio is about 10 %.
    assert (clustered.std_error / naive.std_error) ** 2 == pytest.approx(4.5, rel=0.25)
    assert (clustered.n, clustered.n_clusters, naive.n_clusters) == (2400, 300, 2400)


@pytest.mark.parametrize("interval", ["bootstrap-t", "bca", "t"])
def test_clustered_interval_covers(interval: str) -> None:
    """300 repetitions: the binomial error of the coverage is 1.3 %, so four of them are allowed."""
    hits = 0
    for repetition in range(300):
        rng = np.random.default_rng(repetition)
        groups = np.repeat(np.arange(80), 4)
        difference = 0.3 + rng.normal(size=80)[groups] + rng.gumbel(size=320) - np.euler_gamma
        result = delta_emi(difference, np.zeros(320), groups, interval=interval, draws=400, seed=repetition)
        hits += result.low <= 0.3 <= result.high
    assert 0.90 <= hits / 300 <= 0.985


def test_one_cluster_has_no_interval_and_few_clusters_are_warned_of() -> None:
    single = delta_emi([1.0, 2.0], [0.0, 0.0], [5, 5])
    assert np.isnan(single.low)
    assert single.warned("one_cluster")
    assert delta_emi(np.ones(10), np.zeros(10)).warned("few_clusters")
    assert not delta_emi(np.arange(40.0), np.zeros(40)).warned("few_clusters")


def table(nll: list[float], **columns: object) -> NLLTable:
    return NLLTable(np.array(nll), **{"tokens": [1, 2, 3], "sample_ids": [10, 20, 30], **columns})


def test_tables_give_ratios_of_sums_per_token_and_per_byte() -> None:
    a = table([3.0, 4.0, 5.0], bytes=[4, 4, 8])
    b = table([2.0, 2.0, 2.0], bytes=[4, 4, 8])
    assert delta_emi(a, b, interval="t").value == 2.0
    assert delta_emi(a, b, per="token", interval="t").value == 1.0
    per_byte = delta_emi(a, b, per="byte", interval="t")
    assert (per_byte.value, per_byte.unit, per_byte.to("bits").unit) == (6 / 16, "nats/byte", "bits/byte")


def test_rows_are_aligned_by_sample_id() -> None:
    a = NLLTable([1.0, 2.0, 3.0], [1, 2, 3], sample_ids=[10, 20, 30])
    b = NLLTable([30.0, 10.0, 20.0], [3, 1, 2], sample_ids=[30, 10, 20])
    np.testing.assert_array_equal(pvi(a, b), [3.0 - 30.0, 1.0 - 10.0, 2.0 - 20.0])
    np.testing.assert_array_equal(b - a, [27.0, 9.0, 18.0])


def test_tables_of_other_targets_samples_or_tokenizers_refuse() -> None:
    a = table([1.0, 2.0, 3.0], targets=[7, 8, 9], tokenizer="one")
    with pytest.raises(TableMismatch, match=r"different tokens for sample 30"):
        delta_emi(a, table([1.0, 2.0, 3.0], tokens=[1, 2, 4]))
    with pytest.raises(TableMismatch, match=r"different targets for sample 20"):
        a - table([1.0, 2.0, 3.0], targets=[7, 0, 9])
    with pytest.raises(TableMismatch, match=r"1 only in 'x' and 1 only in ''"):
        v_information(a, table([1.0, 2.0, 3.0], sample_ids=[10, 20, 31], condition="x"))
    other = table([1.0, 2.0, 3.0], targets=[1, 2, 3], tokens=[2, 2, 2], tokenizer="two", bytes=[5, 6, 7])
    with pytest.raises(TableMismatch, match="one tokenizer, got 'one' and 'two'"):
        delta_emi(a, other)
    mine = table([1.0, 2.0, 3.0], targets=[7, 8, 9], tokenizer="one", bytes=[5, 6, 7])
    assert delta_emi(mine, other, per="byte", interval="t").value == 0.0


def test_arrays_and_tables_are_not_mixed_and_lengths_must_agree() -> None:
    with pytest.raises(TypeError, match="must both be NLLTables or both arrays, got NLLTable and list"):
        delta_emi(table([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="equal lengths, got 2 and 3"):
        pvi([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="per must be 'sequence' for plain arrays, got 'token'"):
        delta_emi([1.0], [2.0], per="token")
    with pytest.raises(ValueError, match=r"nll_a must be finite, got 1 NaN or infinite of 2"):
        delta_emi([1.0, float("nan")], [2.0, 1.0])
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
        delta_emi([1.0], [2.0], level=95)
    with pytest.raises(ValueError, match=r"groups must have one entry per sample \(2\), got 3"):
        delta_emi([1.0, 2.0], [2.0, 1.0], [0, 1, 2])
    with pytest.raises(ValueError, match="must be 'bootstrap-t', 'bca' or 't', got 'percentile'"):
        delta_emi([1.0, 3.0], [2.0, 1.0], interval="percentile")
    with pytest.raises(ValueError, match=r"given as \(low, high\), got 3.0 above 1.0"):
        effective_mutual_information([1.0, 2.0], (3.0, 1.0))
    with pytest.raises(ValueError, match=r"one number or \(low, high\), got 3 entries"):
        effective_mutual_information([1.0, 2.0], (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="entropy must be a number, got NaN"):
        effective_mutual_information([1.0, 2.0], float("nan"))
    with pytest.raises(ValueError, match=r"nll_input must have shape \(n,\), got \(1, 2\)"):
        effective_mutual_information([[1.0, 2.0]], 1.0)
    with pytest.raises(TypeError, match="nll_input must be numeric, got dtype"):
        effective_mutual_information(["a"], 1.0)


def test_tensors_of_any_float_type_are_taken() -> None:
    a, b = torch.tensor([2.0, 3.0], dtype=torch.bfloat16, requires_grad=True), torch.tensor([1.0, 1.0])
    assert delta_emi(a, b, torch.tensor([0, 1]), interval="t").value == 1.5


def test_too_few_clusters_for_a_bootstrap_fall_back_to_student() -> None:
    nll = np.array([1.0, 4.0, 2.0])
    assert delta_emi(nll, np.zeros(3)).high == delta_emi(nll, np.zeros(3), interval="t").high
    longer = np.arange(12.0) ** 2
    assert delta_emi(longer, np.zeros(12)).high != delta_emi(longer, np.zeros(12), interval="t").high


@given(st.lists(st.floats(0, 20), min_size=3, max_size=20), st.floats(-5, 5), st.integers(0, 99))
def test_shifting_one_model_shifts_estimate_and_interval(nll: list[float], shift: float, seed: int) -> None:
    zero = np.zeros(len(nll))
    plain = delta_emi(nll, zero, draws=50, seed=seed)
    moved = delta_emi(np.array(nll) + shift, zero, draws=50, seed=seed)
    assert moved.value == pytest.approx(plain.value + shift, abs=1e-9)
    assert moved.high == pytest.approx(plain.high + shift, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=2, max_size=30))
def test_delta_is_antisymmetric(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    assert delta_emi(a, b, interval="t").value == pytest.approx(-delta_emi(b, a, interval="t").value, abs=1e-12)


def test_bca_equals_scipys_on_skewed_differences() -> None:
    """Both bootstraps have 20,000 draws: their quantiles agree within a fiftieth of the width."""
    gain = np.random.default_rng(3).lognormal(0, 1.0, 40)
    ours = delta_emi(gain, np.zeros(40), interval="bca", draws=20_000)
    theirs = stats.bootstrap((gain,), np.mean, method="BCa", n_resamples=20_000, random_state=0)
    low, high = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_bca_splits_resampled_means_that_equal_the_estimate() -> None:
    """Of ones and zeros a sixth of the resampled means equal the estimate; scipy counts half of them, too."""
    gain = np.repeat([0.0, 1.0], [20, 9])
    ours = delta_emi(gain, 0 * gain, interval="bca", draws=20_000)
    theirs = stats.bootstrap((gain,), np.mean, method="BCa", n_resamples=20_000, random_state=0)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=1e-9)


def test_few_clusters_are_fewer_than_thirty() -> None:
    for count, few in ((29, True), (30, False)):
        gain = np.random.default_rng(0).normal(size=2 * count)
        assert delta_emi(gain, 0 * gain, np.repeat(np.arange(count), 2)).warned("few_clusters") == few


def test_a_bootstrap_in_blocks_draws_as_often_as_it_is_asked() -> None:
    rng = np.random.default_rng(0)
    top, bottom = rng.uniform(1, 3, 50_000), rng.integers(5, 9, 50_000).astype(float)
    ratios, errors = _resample(top, bottom, 100, 0)  # blocks of 80 draws, then 20
    assert len(ratios) == len(errors) == 100
    assert ratios.std() == pytest.approx(float(np.median(errors)), rel=0.3)


def test_no_entropy_is_refused() -> None:
    with pytest.raises(TypeError, match=r"entropy must be a number, \(low, high\) or an estimate, got None"):
        effective_mutual_information([1.0, 2.0], None)
