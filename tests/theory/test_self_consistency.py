"""Laws that estimators must keep whatever the samples are: independence, processing, copies, monotone maps, order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyalign.theory import (
    conditional_mutual_information,
    discrete_information,
    entropy,
    kl_from_samples,
    knn_entropy,
    mixed_ksg,
    mutual_information,
    ross,
)

SEEDS = st.integers(0, 9999)


def correlated(n: int, rho: float, seed: int, width: int = 1) -> tuple[np.ndarray, np.ndarray]:
    x, e = np.random.default_rng(seed).normal(size=(2, n, width))
    return x, rho * x + np.sqrt(1 - rho**2) * e


def draw(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two independent samples of 500."""
    if kind == "heavy":
        return tuple(rng.standard_cauchy((2, 500)))
    if kind == "labels":
        return tuple(rng.integers(0, 4, (2, 500)))
    if kind == "label and continuous":
        return rng.normal(size=(500, 2)), rng.integers(0, 3, 500)
    if kind == "mixture":
        return tuple(np.where(rng.uniform(size=(2, 500)) < 0.5, 0.0, rng.normal(size=(2, 500))))
    return tuple(rng.normal(size=(2, 500, 2)))


@pytest.mark.parametrize("kind", ["continuous", "heavy", "labels", "label and continuous", "mixture"])
def test_independence_contains_zero(kind: str) -> None:
    """25 draws each: at 95 % fewer than 20 hold zero once in three thousand trials."""
    held = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        x, y = draw(kind, rng)
        result = mutual_information(x, y)
        held += result.low <= 0.0 <= result.high
    assert held >= 20


@settings(max_examples=8)
@given(SEEDS, st.floats(0.3, 0.9))
def test_processing_adds_nothing(seed: int, rho: float) -> None:
    x, y = correlated(2000, rho, seed)
    noisy = y + np.random.default_rng(seed + 1).normal(size=y.shape)
    clear, processed = mutual_information(x, y), mutual_information(x, noisy)
    assert processed.value < clear.value + 2 * (clear.std_error + processed.std_error)
    coarse = discrete_information(np.floor(x[:, 0]), np.floor(y[:, 0]).astype(int) // 2, method="plugin")
    fine = discrete_information(np.floor(x[:, 0]), np.floor(y[:, 0]).astype(int), method="plugin")
    assert coarse.value <= fine.value + 1e-12  # exact for the law of the sample itself


@pytest.mark.parametrize("kind", ["normal", "heavy", "labels"])
def test_two_independent_copies_hold_twice_as_much(kind: str) -> None:
    single, double = [], []
    for seed in range(3):
        sides = [correlated(3000, 0.7, 10 * seed + copy) for copy in range(2)]
        if kind == "heavy":
            sides = [(np.sinh(3 * x), y**5) for x, y in sides]
        if kind == "labels":
            sides = [(np.digitize(x, [-0.5, 0.5]), np.digitize(y, [0.0])) for x, y in sides]
        single.append(np.mean([mutual_information(x, y).value for x, y in sides]))
        double.append(mutual_information(*(np.hstack(side) for side in zip(*sides, strict=True))).value)
    assert np.mean(double) == pytest.approx(2 * np.mean(single), abs=0.03)


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([np.exp, np.arctan, lambda z: z**3, lambda z: -z]), st.integers(1, 3))
def test_monotone_maps_of_columns_change_nothing(seed: int, change: object, width: int) -> None:
    """Where no rotation is undone, the whole estimate depends on ranks alone; a falling map turns them around."""
    x, y = correlated(400, 0.6, seed, width)
    plain, mapped = mutual_information(x, y), mutual_information(change(x), y)  # type: ignore[operator]
    assert mapped.method == plain.method
    assert mapped.value == pytest.approx(plain.value, abs=1e-6 if plain.method in ("copula", "student") else 0.1)


@settings(max_examples=15)
@given(SEEDS)
def test_order_of_samples_and_of_sides_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = correlated(300, 0.7, seed)
    labels = (y[:, 0] > 0).astype(int)
    order = rng.permutation(300)
    assert ross(x[order], labels[order]).value == pytest.approx(ross(x, labels).value, abs=1e-9)
    assert mixed_ksg(y[order], x[order]).value == pytest.approx(mixed_ksg(x, y).value, abs=1e-9)
    assert knn_entropy(x[order]).value == pytest.approx(knn_entropy(x).value, abs=1e-9)
    copula = [mutual_information(a, b, method="copula").value for a, b in ((x, y), (y[order], x[order]))]
    assert copula[0] == pytest.approx(copula[1], abs=1e-9)
    assert kl_from_samples(x[order], y).candidates["plain"] == pytest.approx(kl_from_samples(x, y).candidates["plain"])


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1)), min_size=4, max_size=80))
def test_plugin_obeys_the_chain_rule_and_its_bounds(records: list[tuple[int, int, int]]) -> None:
    x, y, z = np.array(records).T
    plain = {"method": "plugin"}
    both = discrete_information(x, np.stack([y, z], axis=1), **plain).value
    with_z = discrete_information(x, z, **plain).value
    # I(X; Y, Z) = I(X; Z) + I(X; Y | Z), the last by summing over the values of z.
    given_z = sum(
        (z == value).mean() * discrete_information(x[z == value], y[z == value], **plain).value for value in set(z)
    )
    assert both == pytest.approx(with_z + given_z, abs=1e-9)
    most = min(entropy(x, method="plugin").value, entropy(np.stack([y, z], axis=1), method="plugin").value)
    assert -1e-12 <= both <= most + 1e-9


@settings(max_examples=6)
@given(SEEDS)
@example(1086)  # there the choice of estimator hung on eigenvectors of an identity
def test_divergence_does_not_see_units_or_shifts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.normal(size=(2, 400, 2)) * [[[1.0]], [[1.3]]]
    first, second = kl_from_samples(p, q), kl_from_samples(100 * p + 7, 100 * q + 7)
    assert second.value == pytest.approx(first.value, abs=1e-6)
    assert kl_from_samples(p, p + 0.0).candidates["gaussian"] == pytest.approx(0.0, abs=0.02)


def test_conditioning_on_the_common_cause_leaves_nothing() -> None:
    rng = np.random.default_rng(0)
    cause = rng.integers(0, 3, 5000)
    x, y = ((cause + (rng.uniform(size=5000) < 0.2)) % 3 for _ in range(2))
    assert mutual_information(x, y).value > 0.2
    result = conditional_mutual_information(x, y, cause)
    assert result.low <= 0.0 <= result.high
