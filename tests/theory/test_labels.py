"""Labels against features, and mixtures of atoms and densities, against laws with known values."""

from __future__ import annotations

import numpy as np
import pytest

from tinyalign.theory import classifier_information, mixed_ksg, mutual_information


def label_truth(means: np.ndarray, n: int = 200_000) -> float:
    """Monte Carlo of ln p(y | x) / p(y) with equal classes; its own error is below 0.003."""
    rng = np.random.default_rng(99)
    labels = rng.integers(0, len(means), n)
    x = rng.normal(size=(n, means.shape[1])) + means[labels]
    logits = x @ means.T - 0.5 * (means**2).sum(1)
    return float(np.log(len(means)) + (logits[np.arange(n), labels] - np.log(np.exp(logits).sum(1))).mean())


@pytest.mark.parametrize(("width", "spread"), [(1, 1.0), (2, 1.0), (64, 0.25)])
def test_label_against_features(width: int, spread: float) -> None:
    means = np.random.default_rng(4).normal(size=(4, width)) * spread
    truth = label_truth(means)
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, 5000)
    x = rng.normal(size=(5000, width)) + means[labels]
    result = mutual_information(x, labels)
    assert result.value == pytest.approx(truth, abs=0.05)
    assert mutual_information(labels, x).value == result.value
    if width == 64:
        assert result.candidates["ross"] < truth - 0.1
        assert result.method == "classifier (linear)"  # the law of normal classes with one covariance
        assert result.details["extrapolated"] > 0.005
        best = max(value for name, value in result.candidates.items() if name not in ("ross", result.method))
        assert result.value > best
        assert result.value == pytest.approx(classifier_information(x, labels).samples.mean(), abs=1e-9)


def test_ross_sees_classes_that_no_linear_boundary_parts() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 4000)
    x = np.where(labels == 1, rng.choice([-2.0, 0.0, 2.0], 4000), rng.choice([-1.0, 1.0], 4000))
    result = mutual_information(x + 0.1 * rng.normal(size=4000), labels)
    assert result.method == "ross"
    assert result.value == pytest.approx(np.log(2), abs=0.02)
    assert result.candidates["classifier (linear)"] < 0.1


def test_mixture_of_atoms_and_densities() -> None:
    """X is 0 half of the time, else normal; Y adds a unit normal. h(Y) by quadrature."""
    grid = np.linspace(-12, 12, 8001)
    density = sum(0.5 * np.exp(-(grid**2) / 2 / v) / np.sqrt(2 * np.pi * v) for v in (1, 2))
    truth = -np.trapezoid(density * np.log(density), grid) - 0.5 * np.log(2 * np.pi * np.e)
    values = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = np.where(rng.uniform(size=3000) < 0.5, 0.0, rng.normal(size=3000))
        result = mutual_information(x, x + rng.normal(size=3000))
        values.append(result.value)
    assert result.method == "mixed_ksg"
    assert result.warned("ties")
    assert np.mean(values) == pytest.approx(truth, abs=0.05)
    pure = np.repeat([0.0, 1.0, 2.0, 3.0], 100)
    assert mixed_ksg(pure, pure).value == pytest.approx(np.log(4), abs=0.02)


def test_labels_that_features_nearly_determine_are_said_to_be() -> None:
    """A normal at +-s: at s = 1 errors are common, at 3 one in a thousand, at 5 none will be seen."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    for apart, said in ((1.0, False), (3.0, True), (5.0, True)):
        result = classifier_information(rng.normal(size=1000) + apart * (2 * labels - 1), labels)
        assert result.warned("saturated") is said
        assert mutual_information(rng.normal(size=1000) + apart * (2 * labels - 1), labels).warned("saturated") is said
