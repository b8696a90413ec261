"""Intervals of counts against exact enumeration, and how often they hold what is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from tinyalign.theory import entropy, mutual_information, table_information
from tinyalign.theory.inversion import simulated_entropy, simulated_information


def coin(p: np.ndarray) -> np.ndarray:
    return np.asarray(-(p * np.log(p) + (1 - p) * np.log(1 - p)))


@pytest.mark.parametrize(("heads", "n"), [(30, 100), (9, 100), (120, 300)])
def test_the_entropy_of_a_coin_is_tested_as_its_enumerated_law_says(heads: int, n: int) -> None:
    counts = np.arange(1, n)
    seen = np.concatenate([[0.0], coin(counts / n), [0.0]])
    kept = []
    for p in np.linspace(0.005, 0.4999, 400):
        chance = binom.pmf(np.arange(n + 1), n, p)
        distance = np.abs(seen - chance @ seen)
        order = np.argsort(distance)
        reach = distance[order][np.searchsorted(np.cumsum(chance[order]), 0.95)]
        if distance[heads] <= reach:
            kept.append(float(coin(np.array(p))))
    value = float(coin(np.array(heads / n)))
    found = simulated_entropy(np.array([heads, n - heads]), (value - 0.15, value + 0.1), 0.95)
    width = max(kept) - min(kept)
    assert found.low == pytest.approx(min(kept), abs=0.1 * width)
    assert found.high == pytest.approx(max(kept), abs=0.1 * width)
    mean = binom.pmf(np.arange(n + 1), n, heads / n) @ seen
    spread = np.sqrt(binom.pmf(np.arange(n + 1), n, heads / n) @ (seen - mean) ** 2)
    assert found.error == pytest.approx(spread, rel=0.15)


TABLES = {
    "independent": np.outer([0.1, 0.2, 0.7], [0.5, 0.2, 0.3]),
    "nearly": np.full((2, 2), 0.25) + 0.02 * np.array([[1, -1], [-1, 1]]),
    "with empty cells": np.array([[0.2, 0.05, 0, 0], [0, 0.2, 0.05, 0], [0, 0, 0.2, 0.05], [0.05, 0, 0, 0.2]]),
    "nearly a copy": np.array([[0.47, 0.03], [0.03, 0.47]]),
    "few samples a cell": 0.3 * np.full((6, 6), 1 / 36) + 0.7 * np.eye(6) / 6,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_correction_has_the_interval_of_the_truth(name: str) -> None:
    """60 repetitions of 200 samples: below 50 once in a thousand trials at 95 %."""
    table = TABLES[name]
    truth = table_information(table)
    held = {"auto": 0, "plugin": 0, "chao_shen": 0}
    for seed in range(60):
        cells = np.random.default_rng(seed).choice(table.size, 200, p=table.ravel())
        x, y = np.divmod(cells, table.shape[1])
        for method in held:
            result = mutual_information(x, y, method=method if name != "few samples a cell" else "miller_madow")
            held[method] += result.low <= truth <= result.high
            assert result.low <= result.value <= result.high
    assert min(held.values()) >= 50


def test_a_wider_level_and_fewer_samples_widen_the_interval_and_nothing_changes_from_call_to_call() -> None:
    table = np.array([[[40, 20], [15, 45]]])
    rough = (0.01, 0.2)
    one, again = simulated_information(table, rough, 0.95), simulated_information(table, rough, 0.95)
    assert one == again
    wide, more = simulated_information(table, rough, 0.999), simulated_information(10 * table, rough, 0.95)
    assert wide.low < one.low < more.low < table_information(table[0] / 120) < more.high < one.high < wide.high
    assert more.error < 0.5 * one.error


def test_independence_is_held_and_dependence_is_not() -> None:
    even = simulated_information(np.array([[[30, 31], [30, 29]]]), (-0.01, 0.02), 0.95)
    assert even.low < 0 < even.high
    assert simulated_information(np.array([[[50, 10], [10, 50]]]), (0.1, 0.4), 0.95).low > 0.1
    exact = simulated_information(np.array([[[30, 30], [30, 30]]]), (-0.01, 0.02), 0.95)
    assert (exact.low, exact.high) == (-0.01, 0.02)  # no direction to look in: what was expected


def test_labels_that_determine_each_other_are_said_to() -> None:
    x = np.random.default_rng(0).integers(0, 4, 300)
    for left, right in ((x, x), (x, x // 2), (x // 2, x)):
        result = mutual_information(left, right)
        assert result.warned("deterministic")
        assert (result.low, result.high) == pytest.approx((entropy(right).low, entropy(right).high)) or left is not x
    x[0] = 3 - x[0]
    assert not mutual_information(np.r_[x, 0], np.r_[x, 1]).warned("deterministic")
    constant = mutual_information(x, np.zeros(300, dtype=int))
    assert constant.warned("constant")
    assert not constant.warned("deterministic")
