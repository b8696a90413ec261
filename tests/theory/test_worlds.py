"""Eight small worlds written down as tables: every EMI term from the tables to 1e-9, and from records within its error.

The oracle sums over cells in plain Python; nothing here asks the library what it should be.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinyalign.theory import (
    Estimate,
    conditional_v_information,
    decompose,
    delta_emi,
    discrete_information,
    effective_mutual_information,
    emi_terms,
    entropy,
    irreducible_error,
    kl_divergence,
    level_bounds,
    table_information,
    v_information,
)

RECORDS = 20_000


def rows(weights: list[list[float]]) -> np.ndarray:
    table = np.array(weights, dtype=float)
    return table / table.sum(axis=1, keepdims=True)


# name: p(x), p(l | x), the base model, the augmented model; both models see x
WORLDS: dict[str, tuple[list[float], np.ndarray, np.ndarray, np.ndarray]] = {
    "fair coin, told": ([0.5, 0.5], rows([[1, 0], [0, 1]]), rows([[9, 1], [1, 9]]), rows([[99, 1], [1, 99]])),
    "independent": (
        [0.3, 0.7],
        rows([[2, 1, 1], [2, 1, 1]]),
        rows([[1, 1, 1], [1, 1, 1]]),
        rows([[2, 1, 1], [2, 1, 1]]),
    ),
    "noisy channel": ([0.5, 0.5], rows([[8, 2], [2, 8]]), rows([[6, 4], [4, 6]]), rows([[8, 2], [2, 8]])),
    "skewed inputs": (
        [0.9, 0.08, 0.02],
        rows([[5, 3, 2], [1, 8, 1], [1, 1, 8]]),
        rows([[5, 3, 2], [5, 3, 2], [5, 3, 2]]),
        rows([[5, 3, 2], [2, 7, 1], [2, 1, 7]]),
    ),
    "impossible cells": (
        [0.4, 0.6],
        rows([[1, 1, 0, 0], [0, 0, 1, 3]]),
        rows([[4, 4, 1, 1], [1, 1, 4, 4]]),
        rows([[8, 8, 1, 1], [1, 1, 4, 12]]),
    ),
    "worse than chance": ([0.5, 0.5], rows([[3, 1], [1, 3]]), rows([[1, 3], [3, 1]]), rows([[1, 1], [1, 1]])),
    "many labels": (
        [0.25] * 4,
        rows([[1 + 5 * (label % 4 == x) for label in range(12)] for x in range(4)]),
        rows([[1 + 2 * (label % 4 == x) for label in range(12)] for x in range(4)]),
        rows([[1 + 4 * (label % 4 == x) for label in range(12)] for x in range(4)]),
    ),
    "overconfident": ([0.6, 0.4], rows([[7, 3], [4, 6]]), rows([[7, 3], [4, 6]]), rows([[97, 3], [4, 96]])),
}


def oracle(inputs: list[float], law: np.ndarray, model: np.ndarray) -> dict[str, float]:
    labels = [sum(p * law[x, label] for x, p in enumerate(inputs)) for label in range(law.shape[1])]
    found = {"entropy": -sum(p * math.log(p) for p in labels if p > 0), "conditional": 0.0, "error": 0.0, "loss": 0.0}
    for x, weight in enumerate(inputs):
        for label in range(law.shape[1]):
            p = law[x, label]
            if p > 0:
                found["conditional"] -= weight * p * math.log(p)
                found["error"] += weight * p * math.log(p / model[x, label])
                found["loss"] -= weight * p * math.log(model[x, label])
    found["mutual"] = found["entropy"] - found["conditional"]
    found["emi"] = found["entropy"] - found["loss"]
    return found


def draw(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    inputs, law, _, _ = WORLDS[name]
    rng = np.random.default_rng(seed)
    x = rng.choice(len(inputs), RECORDS, p=inputs)
    return x, (rng.uniform(size=RECORDS)[:, None] > law.cumsum(axis=1)[x]).sum(axis=1)


def within(result: Estimate, truth: float, errors: float = 4.0) -> None:
    assert abs(result.value - truth) <= errors * result.std_error + 1e-9, (result, truth)


def test_there_are_eight() -> None:
    assert len(WORLDS) == 8


@pytest.mark.parametrize("name", WORLDS)
def test_identities_hold_to_1e_9_on_tables(name: str) -> None:
    inputs, law, base, augmented = WORLDS[name]
    joint = np.array(inputs)[:, None] * law
    for model in (base, augmented):
        truth, terms = oracle(inputs, law, model), emi_terms(law, model, inputs)
        exact = pytest.approx
        assert terms.entropy == exact(truth["entropy"], abs=1e-9)
        assert terms.conditional_entropy == exact(truth["conditional"], abs=1e-9)
        assert terms.mutual_information == exact(truth["mutual"], abs=1e-9)
        assert terms.mutual_information == exact(table_information(joint), abs=1e-9)
        assert terms.irreducible_error == exact(truth["error"], abs=1e-9)
        assert irreducible_error(joint, model).value == exact(truth["error"], abs=1e-9)
        assert terms.cross_entropy == exact(truth["loss"], abs=1e-9)
        assert terms.effective_mutual_information == exact(truth["mutual"] - truth["error"], abs=1e-9)
        per_input = kl_divergence(law, model).samples
        assert float(np.dot(inputs, per_input)) == exact(truth["error"], abs=1e-9)
    # Equation (6) with a memory that is a function of the inputs: the whole gain is error.
    gain = (
        emi_terms(joint, augmented).effective_mutual_information - emi_terms(joint, base).effective_mutual_information
    )
    assert gain == pytest.approx(oracle(inputs, law, base)["error"] - oracle(inputs, law, augmented)["error"], abs=1e-9)


@pytest.mark.parametrize("name", WORLDS)
def test_records_give_every_term_within_four_standard_errors(name: str) -> None:
    inputs, law, base, augmented = WORLDS[name]
    truth, better = oracle(inputs, law, base), oracle(inputs, law, augmented)
    x, label = draw(name)
    marginal = np.array(inputs) @ law
    losses = {"base": -np.log(base[x, label]), "augmented": -np.log(augmented[x, label])}
    null = -np.log(marginal[label])
    within(effective_mutual_information(losses["base"], truth["entropy"], interval="t"), truth["emi"])
    within(v_information(null, losses["base"], interval="t"), truth["emi"])
    within(conditional_v_information(null, losses["augmented"], interval="t"), better["emi"])
    gain = delta_emi(losses["base"], losses["augmented"], interval="t")
    within(gain, better["emi"] - truth["emi"])
    # Where the law is at an end, as for a fair coin, the error vanishes to first order and the bias is of order 1 / n.
    for result, exact in ((discrete_information(x, label), truth["mutual"]), (entropy(label), truth["entropy"])):
        assert abs(result.value - exact) <= 4 * result.std_error + 3 / RECORDS
    split = decompose(losses["base"], losses["augmented"], retrieval="deterministic", interval="t")
    assert split.delta_true.value == 0.0
    assert isinstance(split.delta_error, Estimate)
    assert split.delta_error.value == gain.value
    bounds = level_bounds(losses["base"], null, interval="t")
    error = bounds.irreducible_error
    assert error.low - 1e-9 <= truth["error"] <= error.high + 1e-9
    assert bounds.mutual_information.low <= truth["mutual"] <= bounds.mutual_information.high
