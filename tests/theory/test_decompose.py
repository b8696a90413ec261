"""Every EMI term of worlds written down as tables: identities to 1e-9, and from records within four standard errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.theory import (
    Bounds,
    Estimate,
    decompose,
    delta_emi,
    effective_mutual_information,
    emi_terms,
    irreducible_error,
    level_bounds,
    v_information,
    weighted_accuracy,
)


def naive_terms(joint: np.ndarray, model: np.ndarray) -> dict[str, float]:
    """Equations (1) to (5) cell by cell."""
    total = {"entropy": 0.0, "conditional": 0.0, "mutual": 0.0, "error": 0.0, "loss": 0.0}
    inputs, labels = joint.sum(1), joint.sum(0)
    for label in labels:
        total["entropy"] -= label * np.log(label) if label else 0.0
    for x in range(joint.shape[0]):
        for label in range(joint.shape[1]):
            p = joint[x, label]
            if p == 0:
                continue
            given_x = p / inputs[x]
            total["conditional"] -= p * np.log(given_x)
            total["mutual"] += p * np.log(p / inputs[x] / labels[label])
            total["error"] += p * np.log(given_x / model[x, label])
            total["loss"] -= p * np.log(model[x, label])
    return total


def world(seed: int, inputs: int = 5, labels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    joint = rng.dirichlet(np.full(inputs * labels, 0.5)).reshape(inputs, labels)
    return joint, rng.dirichlet(np.ones(labels), size=inputs)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 6))
def test_terms_equal_the_sums_and_the_papers_identities(seed: int, inputs: int, labels: int) -> None:
    joint, model = world(seed, inputs, labels)
    terms, naive = emi_terms(joint, model), naive_terms(joint, model)
    assert terms.entropy == pytest.approx(naive["entropy"], abs=1e-9)
    assert terms.conditional_entropy == pytest.approx(naive["conditional"], abs=1e-9)
    assert terms.mutual_information == pytest.approx(naive["mutual"], abs=1e-9)
    assert terms.irreducible_error == pytest.approx(naive["error"], abs=1e-9)
    assert terms.cross_entropy == pytest.approx(naive["loss"], abs=1e-9)
    # Equations (2) to (5).
    assert terms.cross_entropy == pytest.approx(terms.conditional_entropy + terms.irreducible_error, abs=1e-9)
    assert terms.cross_entropy == pytest.approx(
        terms.entropy - terms.mutual_information + terms.irreducible_error, abs=1e-9
    )
    assert terms.effective_mutual_information == pytest.approx(
        terms.mutual_information - terms.irreducible_error, abs=1e-9
    )
    assert terms.irreducible_error >= -1e-12


def test_records_of_a_world_lie_within_four_standard_errors() -> None:
    joint, model = world(3)
    terms = emi_terms(joint, model)
    cells = np.random.default_rng(0).choice(joint.size, 20_000, p=joint.ravel())
    x, label = cells // 4, cells % 4
    emi = effective_mutual_information(-np.log(model[x, label]), terms.entropy, interval="t")
    assert abs(emi.value - terms.effective_mutual_information) < 4 * emi.std_error
    null = joint.sum(0)
    usable = v_information(-np.log(null[label]), -np.log(model[x, label]), interval="t")
    # A null model that knows p(l) has no error, so V-information and EMI agree.
    assert abs(usable.value - terms.effective_mutual_information) < 4 * usable.std_error


def test_one_theta_serves_all_inputs() -> None:
    """Two thetas, each right for one input: the paper's E[min] would be zero, min E is not."""
    law = np.array([[0.9, 0.1], [0.1, 0.9]])
    thetas = np.array([[[0.9, 0.1], [0.9, 0.1]], [[0.1, 0.9], [0.1, 0.9]]])
    expected = 0.5 * (0.1 * np.log(1 / 9) + 0.9 * np.log(9))
    result = irreducible_error(law, thetas, [0.5, 0.5])
    assert result.value == pytest.approx(expected, abs=1e-12)
    assert result.samples.tolist() == pytest.approx([0.0, 2 * expected], abs=1e-12)
    assert irreducible_error(law, thetas, [0.8, 0.2]).value == pytest.approx(0.4 * expected, abs=1e-12)
    assert emi_terms(law, thetas, [0.8, 0.2]).irreducible_error == pytest.approx(0.4 * expected, abs=1e-12)
    assert irreducible_error(law, thetas).value == pytest.approx(expected, abs=1e-12)


def test_a_model_that_excludes_what_happens_has_infinite_error() -> None:
    terms = emi_terms([[0.5, 0.5]], [[1.0, 0.0]])
    assert terms.irreducible_error == np.inf
    assert terms.cross_entropy == np.inf
    assert emi_terms([[1.0, 0.0]], [[1.0, 0.0]]).cross_entropy == 0.0


def three_models(n: int, seed: int, extra: bool) -> tuple[np.ndarray, ...]:
    """X is a bit, R another; L depends on both, so R is new information unless ``extra`` is False (R copies X)."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2, n)
    r = rng.integers(0, 2, n) if extra else x
    truth = np.array([[0.9, 0.6], [0.4, 0.05]])  # p(l = 1 | x, r)
    given_both = truth[x, r] if extra else truth[x, x]
    label = rng.uniform(size=n) < given_both
    given_x = truth.mean(axis=1)[x] if extra else given_both

    def nll(p: np.ndarray) -> np.ndarray:
        return -np.log(np.where(label, p, 1 - p))

    blunt = 0.5 * given_x + 0.25  # the base model: right direction, too timid
    return nll(blunt), nll(0.8 * given_both + 0.1), nll(given_x), nll(given_x) - nll(given_both)


def test_deterministic_retrieval_adds_exactly_nothing_and_says_why() -> None:
    base, augmented, _, _ = three_models(4000, 0, extra=False)
    split = decompose(base, augmented, retrieval="deterministic")
    assert isinstance(split.delta_true, Estimate)
    assert (split.delta_true.value, split.delta_true.low, split.delta_true.high) == (0.0, 0.0, 0.0)
    assert "independent of the test pair" in split.reason
    gain = delta_emi(base, augmented)
    assert (split.delta_error.value, split.delta_error.low) == (gain.value, gain.low)
    assert split.delta_emi.value == gain.value > 0


def test_stochastic_bounds_hold_the_truth_and_tighten_with_a_teacher() -> None:
    base, augmented, teacher, pointwise = three_models(40_000, 1, extra=True)
    true_gain = pointwise.mean()
    reduction = (base - augmented).mean() - true_gain
    split = decompose(base, augmented, teacher, retrieval="stochastic")
    assert isinstance(split.delta_error, Bounds)
    assert split.delta_error.low <= reduction <= split.delta_error.high
    assert split.delta_true.low == 0.0 <= true_gain <= split.delta_true.high
    assert split.delta_error.lower.value == pytest.approx((base - augmented - teacher).mean())
    without = decompose(base, augmented, retrieval="stochastic")
    assert without.delta_error.low < split.delta_error.low
    assert "does not identify" in split.reason
    weak = decompose(base, augmented, base + 1.0, retrieval="stochastic")
    assert weak.delta_emi.warned("weak_teacher")
    assert not split.delta_emi.warned("weak_teacher")


def test_level_bounds_hold_the_levels_of_a_world() -> None:
    joint, model = world(11)
    terms = emi_terms(joint, model)
    cells = np.random.default_rng(4).choice(joint.size, 20_000, p=joint.ravel())
    x, label = cells // 4, cells % 4
    conditional = joint / joint.sum(1, keepdims=True)
    teacher = 0.9 * conditional + 0.1 / 4
    bounds = level_bounds(-np.log(model[x, label]), -np.log(joint.sum(0)[label]), -np.log(teacher[x, label]))
    assert bounds.irreducible_error.low <= terms.irreducible_error <= bounds.irreducible_error.high
    assert bounds.irreducible_error.lower.value > 0.5 * terms.irreducible_error
    assert bounds.conditional_entropy.low <= terms.conditional_entropy <= bounds.conditional_entropy.high
    assert bounds.mutual_information.low <= terms.mutual_information <= bounds.mutual_information.high
    for none in (bounds.conditional_entropy.lower, bounds.mutual_information.lower):
        assert (none.value, none.low, none.high) == (0.0, 0.0, 0.0)
    emi = bounds.effective_mutual_information
    assert emi.low <= terms.effective_mutual_information <= emi.high


def test_weighted_accuracy_is_equation_eight() -> None:
    assert weighted_accuracy([0.5, 1.0, 0.0], [10, 30, 60]) == pytest.approx((5 + 30) / 100)


@pytest.mark.parametrize(
    ("scores", "counts"),
    [([0.5, np.nan], [1, 1]), ([0.5, 0.5], [1, np.inf]), ([0.5, 0.5], [2, -1]), ([0.5, 0.5], [0, 0])],
)
def test_accuracies_that_cannot_be_weighted_are_refused(scores: list[float], counts: list[float]) -> None:
    with pytest.raises(ValueError, match="counts must be non-negative with a positive sum and all values finite"):
        weighted_accuracy(scores, counts)


def test_bad_worlds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"emi_terms: law must sum to 1, got an error of 0\.5"):
        emi_terms([[0.25, 0.25]], [[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"model must sum to 1 in every row, got an error of 0\.1"):
        emi_terms([[0.5, 0.5]], [[0.5, 0.6]])
    with pytest.raises(ValueError, match=r"model must hold finite probabilities of at least 0, got -0\.5"):
        irreducible_error([[0.5, 0.5]], [[-0.5, 1.5]])
    with pytest.raises(ValueError, match=r"model must have shape \(1, 2\) or .* got \(1, 3\)"):
        irreducible_error([[0.5, 0.5]], [[0.2, 0.3, 0.5]])
    with pytest.raises(ValueError, match=r"law must have shape \(X, L\), got \(2,\)"):
        irreducible_error([0.5, 0.5], [[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"weights must have shape \(2,\), got \(3,\)"):
        irreducible_error([[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]], [0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match=r"weights must sum to 1, got an error of 0\.5"):
        irreducible_error([[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]], [0.2, 0.3])
    with pytest.raises(ValueError, match="retrieval must be 'deterministic' or 'stochastic', got 'random'"):
        decompose([1.0], [1.0], retrieval="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"counts must have the shape of accuracies \(1,\), got \(2,\)"):
        weighted_accuracy([0.5], [1, 2])
    with pytest.raises(ValueError, match="counts must be non-negative with a positive sum"):
        weighted_accuracy([0.5], [0])
