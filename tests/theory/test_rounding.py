"""Values that repeat: rounding is no mixture, atoms are, and copies of records are said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyalign.theory import conditional_mutual_information, mutual_information
from tinyalign.theory.copula import normal_scores
from tinyalign.theory.rounding import spread_rounding


def normal(n: int = 4000, width: int = 1, rho: float = 0.8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, e = np.random.default_rng(seed).normal(size=(2, n, width))
    return x, rho * x + np.sqrt(1 - rho**2) * e


ROUNDED = {
    "half": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "decimals": lambda x: x.round(2),
    "pixels": lambda x: np.clip(40 * x + 128, 0, 255).astype(np.uint8) / 255,
}


@pytest.mark.parametrize("how", ROUNDED)
@pytest.mark.parametrize("width", [1, 5, 25])
def test_rounding_leaves_the_estimate_where_it_was(how: str, width: int) -> None:
    x, y = normal(width=width)
    exact, found = mutual_information(x, y), mutual_information(ROUNDED[how](x), ROUNDED[how](y))
    assert found.value == pytest.approx(exact.value, abs=0.005 * width)
    assert (found.method, set(found.candidates)) == (exact.method, set(exact.candidates))
    assert found.warned("rounded")
    assert not found.warned("ties")
    assert not exact.warned("rounded")


def test_rounding_of_a_curve_and_of_what_is_given() -> None:
    x, e = np.random.default_rng(1).normal(size=(2, 4000, 1))
    y = x**2 + 0.3 * e
    exact = mutual_information(x, y)
    for found in (mutual_information(x.round(2), y.round(2)), mutual_information(x, y.astype(np.float16))):
        assert found.value == pytest.approx(exact.value, abs=0.03)  # ksg on the repeats is .2 above
    given = conditional_mutual_information(x.round(2), y.round(2), e.round(2))
    assert given.value == pytest.approx(conditional_mutual_information(x, y, e).value, abs=0.1)
    assert given.warned("rounded")


@pytest.mark.parametrize("how", ["half", "decimals"])
def test_labels_against_rounded_columns(how: str) -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, 3000)
    x = rng.normal(size=(3000, 64)) + 0.25 * np.random.default_rng(4).normal(size=(4, 64))[labels]
    exact, found = mutual_information(x, labels), mutual_information(ROUNDED[how](x), labels)
    assert found.value == pytest.approx(exact.value, abs=0.01)
    assert found.method == exact.method == "classifier (linear)"
    atoms = mutual_information(np.maximum(x, 0), labels)
    assert atoms.method.startswith("classifier")
    assert atoms.warned("ties")


@pytest.mark.parametrize("column", [0, 24])
def test_one_column_of_atoms_does_not_hide_the_others(column: int) -> None:
    x, y = normal(width=25)
    x[:, column] = np.maximum(x[:, column], 0)
    result = mutual_information(x, y)
    assert result.value == pytest.approx(-12.5 * np.log(0.36), abs=0.4)
    assert result.warned("ties")


def test_atoms_of_few_columns_stay_a_mixture_with_its_candidates() -> None:
    x, y = normal()
    result = mutual_information(np.maximum(x, 0), y)
    assert result.method == "mixed_ksg"
    assert {"copula", "mixed_ksg"} <= set(result.candidates)
    assert result.candidates["mixed_ksg"] == result.value == pytest.approx(0.388, abs=0.04)  # by quadrature
    three_of_a_hundred = np.where(np.random.default_rng(2).uniform(size=(4000, 1)) < 0.03, 0.0, x)
    assert mutual_information(three_of_a_hundred, y).method == "mixed_ksg"


def test_atoms_of_independent_sides_are_broken_independently() -> None:
    x, y = (np.maximum(side, 0) for side in normal(rho=0.0))
    assert abs(float((normal_scores(x) * normal_scores(y)).mean())) < 4 / np.sqrt(4000)


def test_few_values_that_all_repeat_are_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 2000)
    x = rng.normal(size=(2000, 2)) + labels[:, None]
    for coded in (labels.astype(float), np.eye(3)[labels]):
        found = mutual_information(x, coded)
        assert found.value == pytest.approx(mutual_information(x, labels).value, abs=0.01)  # folds differ by order
        assert found.warned("ties")
        assert mutual_information(coded, labels).value == pytest.approx(mutual_information(labels, labels).value)


def test_copies_of_records_are_no_rounding() -> None:
    x, y = normal(1000, 2)
    for repeats in (2, 3):
        found = mutual_information(np.repeat(x, repeats, axis=0), np.repeat(y, repeats, axis=0))
        assert [line for line in found.warnings if "of the records repeat another" in line]
        assert not found.warned("rounded")
    some = np.r_[np.arange(1000), np.arange(100)]
    assert "ties: 9% of the records repeat another" in " ".join(mutual_information(x[some], y[some]).warnings)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), digits=st.integers(1, 3))
def test_spread_values_tell_the_rounded_ones(seed: int, digits: int) -> None:
    x = np.random.default_rng(seed).normal(size=(1500, 2)).round(digits)
    spread = spread_rounding(x)
    order = np.argsort(spread.values, axis=0)
    assert (np.diff(np.take_along_axis(x, order, axis=0), axis=0) >= 0).all()
    changed = spread.values != x
    for column in range(2):
        values, place, counts = np.unique(x[:, column], return_inverse=True, return_counts=True)
        assert (changed[:, column] <= (counts[place] > 1)).all()
        near = np.abs(values[:, None] - spread.values[:, column]).argmin(axis=0)
        assert (values[near] == x[:, column]).all()
    assert (spread.rounded, spread.atoms) == (2, 0)
    twice = spread_rounding(np.hstack([x, x[:, :1], x[:, :1] + 10])).values
    assert (twice[:, 0] == twice[:, 2]).all()
    assert not np.allclose(twice[:, 0] + 10, twice[:, 3], atol=0.1 * 10.0**-digits)


def test_what_does_not_repeat_is_returned_as_it_is() -> None:
    x = np.random.default_rng(0).normal(size=(3000, 3))
    for same in (x, x.astype(np.float32).astype(np.float64), np.ones((3000, 2))):
        assert spread_rounding(same).values is same


def test_a_rounded_function_of_the_other_side_is_said() -> None:
    z = np.random.default_rng(0).normal(size=1000)
    assert mutual_information(z, z.round(1)).warned("law")
    noisy = z + np.random.default_rng(1).normal(size=1000)
    assert not mutual_information(z, noisy.round(1)).warned("law")


def test_constants_beside_labels() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 600)
    for x, y in (
        (np.ones(600), labels),
        (labels, np.ones((600, 2))),
        (np.random.default_rng(1).normal(size=600), labels * 0),
    ):
        result = mutual_information(x, y)
        assert (result.value, result.low, result.high) == (0.0, 0.0, 0.0)
        assert result.warned("constant")
    with pytest.raises(ValueError, match="x must"):
        mutual_information(np.full(100, np.nan), np.zeros(100, int))
