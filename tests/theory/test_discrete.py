"""Entropy and information of labels against tables, three-line loops and alphabets too large for the sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.theory import (
    conditional_mutual_information,
    discrete_entropy,
    entropy,
    knn_entropy,
    mutual_information,
    table_information,
)
from tinyalign.theory.entropies import jackknife_shift, undersampling_warnings


def table_of(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(rows * columns)).reshape(rows, columns)


def naive_information(joint: np.ndarray) -> float:
    total = 0.0
    for x in range(joint.shape[0]):
        for y in range(joint.shape[1]):
            if joint[x, y] > 0:
                total += joint[x, y] * np.log(joint[x, y] / joint[x].sum() / joint[:, y].sum())
    return total


def draw(joint: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    cells = np.random.default_rng(seed).choice(joint.size, n, p=joint.ravel())
    return cells // joint.shape[1], cells % joint.shape[1]


@given(st.integers(0, 9999), st.integers(1, 6), st.integers(1, 6))
def test_tables_are_exact(seed: int, rows: int, columns: int) -> None:
    joint = table_of(seed, rows, columns)
    assert table_information(joint) == pytest.approx(naive_information(joint), abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60))
def test_plugin_equals_the_table_of_frequencies(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs).T
    joint = np.zeros((4, 4))
    np.add.at(joint, (x, y), 1 / len(x))
    result = mutual_information(x, y, method="plugin")
    assert result.value == pytest.approx(naive_information(joint), abs=1e-9)
    assert result.samples.mean() == pytest.approx(result.value, abs=1e-9)


def test_corrections_equal_their_formulas() -> None:
    counts = np.array([4, 2, 1, 1])
    share = counts / 8
    plugin = -(share * np.log(share)).sum()
    assert discrete_entropy(counts, "plugin") == pytest.approx(plugin)
    assert discrete_entropy(counts, "miller_madow") == pytest.approx(plugin + 3 / 16)
    # Grassberger's G in its recursive form: G(1) = -gamma - ln 2, G(2) = 2 + G(1), G(2n+2) = G(2n) + 2/(2n+1).
    g1 = -np.euler_gamma - np.log(2)
    g = {1: g1, 2: 2 + g1, 4: 2 + g1 + 2 / 3}
    assert discrete_entropy(counts, "grassberger") == pytest.approx(np.log(8) - sum(c * g[c] for c in counts) / 8)
    adjusted = (1 - 2 / 8) * share
    expected = -sum(p * np.log(p) / (1 - (1 - p) ** 8) for p in adjusted)
    assert discrete_entropy(counts, "chao_shen") == pytest.approx(expected)


def test_corrections_remove_most_of_the_plugins_bias() -> None:
    joint = table_of(2, 8, 8)
    truth = naive_information(joint)
    errors = {name: [] for name in ("plugin", "miller_madow", "grassberger", "chao_shen")}
    for seed in range(20):
        values = mutual_information(*draw(joint, 400, seed), method="plugin").candidates
        for name, found in errors.items():
            found.append(values[name] - truth)
    plugin = np.mean(errors["plugin"])
    assert plugin > 0.04
    assert abs(np.mean(errors["grassberger"])) < plugin / 3
    assert abs(np.mean(errors["miller_madow"])) < plugin / 3


@pytest.mark.parametrize("rows", [2, 5])
def test_interval_covers_for_dependent_and_independent_labels(rows: int) -> None:
    """100 repetitions: three binomial errors below 95 % is 0.88."""
    for joint in (table_of(5, rows, rows), np.outer(np.full(rows, 1 / rows), np.full(rows, 1 / rows))):
        truth = naive_information(joint)
        hits = [mutual_information(*draw(joint, 1000, seed)) for seed in range(100)]
        assert not any(result.warnings for result in hits)
        assert 0.88 <= np.mean([result.low <= truth <= result.high for result in hits])


@pytest.mark.parametrize(
    "share",
    [[0.5, 0.5], [0.9, 0.1], [0.1] * 10, [i / 55 for i in range(1, 11)]],
    ids=["2", "2, uneven", "10", "skewed"],
)
def test_entropy_interval_covers_even_and_uneven_outcomes(share: list[float]) -> None:
    """300 repetitions: three binomial errors around 95 %."""
    truth = -float(np.sum(share * np.log(share)))
    hits = [entropy(np.random.default_rng(seed).choice(len(share), 200, p=share)) for seed in range(300)]
    assert not any(result.warnings for result in hits)
    assert 0.912 <= np.mean([result.low <= truth <= result.high for result in hits]) <= 0.988


@pytest.mark.parametrize("rows", [2, 8])
def test_information_of_a_copy_is_its_entropy_with_its_interval(rows: int) -> None:
    x = np.random.default_rng(rows).integers(0, rows, 400)
    alone, copy, part = entropy(x), mutual_information(x, x), mutual_information(x, 2 * x + (np.arange(400) % 2))
    finer, one = 2 * x + (np.arange(400) % 2), np.zeros(400, dtype=int)
    given = [conditional_mutual_information(left, right, one) for left, right in ((x, x), (x, finer), (finer, x))]
    for result in (copy, part, *given):
        assert (result.value, result.low, result.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-9)
        assert result.warned("deterministic")


def test_conditional_interval_covers_and_independent_labels_have_none_of_it() -> None:
    """100 repetitions: three binomial errors below 95 %."""
    hits = []
    for seed in range(100):
        z, x, y = np.random.default_rng(seed).integers(0, 3, (3, 400))
        result = conditional_mutual_information((x + z) % 3, (y + z) % 3, z)
        hits.append(result.low <= 0 <= result.high)
        assert result.samples is not None
        assert result.samples.mean() == pytest.approx(result.value, abs=1e-9)
    assert np.mean(hits) >= 0.88
    with_one = conditional_mutual_information(x, y, np.ones(400, dtype=int))
    plain = mutual_information(x, y)
    assert (with_one.value, with_one.low, with_one.high) == pytest.approx((plain.value, plain.low, plain.high))


def test_a_bias_that_is_left_is_said() -> None:
    law = 1 / np.arange(1, 61)
    few, many = (np.random.default_rng(0).choice(60, n, p=law / law.sum()) for n in (400, 20_000))
    assert entropy(few).warned("undersampled")
    assert not entropy(many).warnings
    # The jackknife by leaving out each sample in turn.
    counts = np.array([7, 3, 1])
    plugin = discrete_entropy(counts, "plugin")
    left = [discrete_entropy(counts - np.eye(3, dtype=int)[i], "plugin") for i in range(3)]
    jackknife = 11 * plugin - 10 * (counts @ left) / 11
    assert jackknife_shift(counts) == pytest.approx(jackknife - discrete_entropy(counts, "miller_madow"))
    assert jackknife_shift([1]) == 0.0


def test_undersampled_means_fewer_than_five_samples_an_outcome_or_a_tenth_seen_once() -> None:
    assert not undersampling_warnings([5, 5, 5, 5])
    assert undersampling_warnings([5, 5, 5, 4])
    assert not undersampling_warnings([9, 1])
    assert undersampling_warnings([8, 1])


def test_a_constant_shares_nothing() -> None:
    for method in ("auto", "plugin", "null_adjusted"):
        result = mutual_information(np.zeros(100, dtype=int), np.arange(100) % 4, method=method)
        assert result.value == pytest.approx(0.0, abs=1e-12)
    assert mutual_information(np.zeros(100, dtype=int), np.arange(100) % 4).std_error == 0.0
    for side in (np.arange(100) % 4, np.random.default_rng(0).normal(size=100)):
        for result in (mutual_information(side, np.zeros(100, dtype=int)), mutual_information(["a"] * 100, side)):
            assert result.warned("constant")
            assert (result.value, result.low, result.high) == (pytest.approx(0.0, abs=1e-12),) * 3


def test_a_copy_of_two_labels_keeps_its_entropy_when_shuffles_are_taken_out() -> None:
    x = np.arange(60) % 2
    assert mutual_information(x, x, method="null_adjusted").value == pytest.approx(np.log(2))


def test_continuous_samples_get_the_fourth_neighbour_unless_told() -> None:
    x = np.random.default_rng(0).normal(size=200)
    assert entropy(x).value == knn_entropy(x).value == knn_entropy(x, k=4).value
    assert entropy(x, k=5).value == knn_entropy(x, k=5).value != entropy(x).value


def test_one_outcome_has_no_entropy_and_no_interval() -> None:
    result = entropy(["a"] * 20)
    assert (result.value, result.low, result.high, result.std_error) == (0.0, 0.0, 0.0, 0.0)
    assert result.warned("constant")
    for count in (1, 2, 3):  # Grassberger's correction of so few is off to either side
        few = entropy(["a"] * count)
        assert few.low <= 0.0 <= few.high
        assert few.low <= few.value <= few.high


def test_too_large_an_alphabet_is_said_and_shuffled_labels_give_nothing() -> None:
    weights = 1 / np.arange(1, 501)
    rng = np.random.default_rng(0)
    x, y = rng.choice(500, (2, 3000), p=weights / weights.sum())
    result = mutual_information(x, y)
    assert result.warned("undersampled")
    assert result.warned("null")
    assert result.candidates["plugin"] > 0.8
    assert result.candidates["chao_shen"] > 0.4
    assert abs(result.value) < 0.1  # one twentieth of the plug-in value
    copy = mutual_information(x, x, method="null_adjusted")
    assert copy.value == pytest.approx(copy.candidates["plugin"])


def test_labels_of_any_kind_and_joint_labels() -> None:
    x = np.array([0, 1] * 100)
    words = np.where(x == 1, "yes", "no")
    assert mutual_information(x, words, method="plugin").value == pytest.approx(np.log(2))
    assert mutual_information(x.astype(bool), words, method="plugin").value == pytest.approx(np.log(2))
    first, second = np.random.default_rng(0).integers(0, 2, (2, 4000))
    parity = first ^ second
    assert abs(mutual_information(first, parity).value) < 0.01
    pair = np.stack([first, second], axis=1)
    assert mutual_information(pair, parity).value == pytest.approx(np.log(2), abs=0.01)
    # I(first; parity | second) = ln 2, by the chain rule.
    assert conditional_mutual_information(first, parity, second).value == pytest.approx(np.log(2), abs=0.01)


def test_entropy_chooses_by_type_and_shows_its_candidates() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 2000)
    result = entropy(labels)
    assert result.value == pytest.approx(np.log(4), abs=0.005)
    assert result.method == "miller_madow"
    assert set(result.candidates) == {"plugin", "miller_madow", "grassberger", "chao_shen"}
    assert not result.warnings
    assert entropy(np.arange(50)).warned("undersampled")
    assert entropy(np.random.default_rng(0).normal(size=500)).method == "knn"


@pytest.mark.parametrize(
    ("sampler", "truth"),
    [
        (lambda r: r.normal(size=(4000, 1)), 0.5 * np.log(2 * np.pi * np.e)),
        (lambda r: r.normal(size=(4000, 3)) * 2, 1.5 * np.log(2 * np.pi * np.e * 4)),
        (lambda r: r.uniform(size=(4000, 2)) * [2, 5], np.log(10)),
        (lambda r: r.exponential(3.0, (4000, 1)), 1 + np.log(3)),
    ],
)
def test_neighbours_find_differential_entropy(sampler, truth: float) -> None:  # type: ignore[no-untyped-def]
    results = [knn_entropy(sampler(np.random.default_rng(seed))) for seed in range(4)]
    assert np.mean([result.value for result in results]) == pytest.approx(truth, abs=0.05)
    assert sum(result.low <= truth <= result.high for result in results) >= 3
    shifted = knn_entropy(3.0 * sampler(np.random.default_rng(0)))
    width = sampler(np.random.default_rng(0)).shape[1]
    assert shifted.value == pytest.approx(results[0].value + width * np.log(3), abs=1e-6)


def test_repeated_and_many_columns_are_warned_of() -> None:
    rng = np.random.default_rng(0)
    assert knn_entropy(np.round(rng.normal(size=500), 1)).warned("ties")
    for width in (1, 2, 3, 8):
        assert knn_entropy(rng.normal(size=(1000, width))).warned("dimension") == (width > 2)
    constant = knn_entropy(np.zeros(50))
    assert constant.value == -np.inf
    assert constant.warned("constant")


def test_scales_of_columns_are_added_to_their_entropy() -> None:
    x = np.random.default_rng(0).normal(size=(2000, 2))
    even = knn_entropy(x)
    for scale in ([1.0, 1e6], [1e-6, 1e6], [3.0, 1.0]):
        found = knn_entropy(x * scale)
        assert found.value == pytest.approx(even.value + np.log(scale).sum(), abs=0.02)
        assert found.high - found.low == pytest.approx(even.high - even.low, rel=0.2)
    assert knn_entropy(np.hstack([x[:, :1], 1e-3 * x[:, 1:]])).samples.mean() < 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="x must be numeric, got dtype complex128"):
        mutual_information(np.ones(20) + 1j, np.arange(20.0))
    with pytest.raises(TypeError, match="y must hold labels that can be ordered, got dtype object"):
        mutual_information(np.random.default_rng(0).normal(size=20), np.array(["a", None] * 10, dtype=object))
    with pytest.raises(ValueError, match="x and y must have equal lengths, got 2 and 3"):
        mutual_information([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"method must be one of auto, plugin, .* got 'median'"):
        entropy([1, 2], method="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"method must be one of plugin, .* got 'auto'"):
        discrete_entropy([1, 2], "auto")
    with pytest.raises(ValueError, match="counts must be at least 0 with a positive sum"):
        discrete_entropy([0, 0])
    with pytest.raises(
        ValueError, match=r"joint must be a table of probabilities that sum to 1, got shape \(1, 2\) and sum 0\.9"
    ):
        table_information([[0.5, 0.4]])
    with pytest.raises(ValueError, match=r"x must have shape \(n,\) or \(n, d\), got \(0,\)"):
        entropy(np.array([], dtype=int))
    with pytest.raises(ValueError, match="x must hold at least 5 samples, got 3"):
        knn_entropy([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="x, y and z must have equal lengths, got 2, 2, 3"):
        conditional_mutual_information([1, 2], [1, 2], [1, 2, 3])
