"""Neural bounds: formulas against loops, the held-out value against a known law, the ceiling said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyalign.theory import JointCritic, SeparableCritic, club_upper_bound, neural_information
from tinyalign.theory.neural import _bound_value, _objective

RHO = 0.8
TRUTH = -0.5 * np.log1p(-(RHO**2))


def pair(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, e = np.random.default_rng(seed).normal(size=(2, n, 1))
    return x, RHO * x + np.sqrt(1 - RHO**2) * e


class ExactCritic(nn.Module):
    """The log density ratio of the law itself, plus a parameter that training could only worsen."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u, v = x, y.T
        quadratic = (RHO**2 * (u**2 + v**2) - 2 * RHO * u * v) / (2 * (1 - RHO**2))
        return TRUTH - quadratic + 0 * self.offset


def test_bounds_equal_their_loops() -> None:
    scores = torch.randn(6, 6, dtype=torch.float64) * 3
    n, s = 6, scores.numpy()
    off = [s[i, j] for i in range(n) for j in range(n) if i != j]
    joint = np.mean(np.diag(s))
    expected = {
        "infonce": np.mean([s[i, i] - np.log(np.mean(np.exp(s[i]))) for i in range(n)]),
        "dv": joint - np.log(np.mean(np.exp(off))),
        "nwj": joint - np.mean(np.exp(np.array(off) - 1)),
        "smile": joint - np.log(np.mean(np.exp(np.clip(off, -5, 5)))),
    }
    for name, value in expected.items():
        assert _bound_value(scores, name)[0] == pytest.approx(value), name
    for name in ("dv", "nwj"):
        assert _objective(scores, name).item() == pytest.approx(expected[name]), name
    assert _objective(scores, "infonce").item() == pytest.approx(expected["infonce"] - np.log(n))


@pytest.mark.parametrize("bound", ["infonce", "dv", "smile"])
def test_the_exact_critic_reaches_the_information(bound: str) -> None:
    x, y = pair(4000)
    result = neural_information(x, y, bound=bound, critic=ExactCritic(), steps=1)
    assert abs(result.value - TRUTH) < 4 * result.std_error
    assert result.low < TRUTH < result.high
    assert result.kind == "lower"


def test_nwj_is_tight_at_one_plus_the_log_ratio() -> None:
    class Shifted(ExactCritic):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) + 1

    result = neural_information(*pair(4000), bound="nwj", critic=Shifted(), steps=1)
    assert abs(result.value - TRUTH) < 4 * result.std_error


@pytest.mark.parametrize("critic", [SeparableCritic, JointCritic])
def test_trained_critics_find_most_and_report_what_they_did_not_train_on(critic: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x, y = pair(1500, 1)
    result = neural_information(x, y, critic=critic(1, 1, hidden=32), steps=300, batch_size=64)
    assert 0.6 * TRUTH < result.value < TRUTH + 3 * result.std_error
    assert result.details["held_out"] == 300


def test_memorising_the_training_part_shows_and_does_not_count() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 200, 8))
    result = neural_information(x, y, steps=150)
    assert result.value < 0.3
    assert result.details["on_training_samples"] > result.value + 0.3 or result.value < 0.05


def test_the_ceiling_is_reported() -> None:
    x = np.random.default_rng(0).normal(size=(300, 4))
    result = neural_information(x, x, steps=250)
    assert result.details["ceiling"] == pytest.approx(np.log(60))
    assert result.value <= np.log(60) + 1e-9
    assert result.warned("ceiling")
    assert not neural_information(*pair(300), steps=10).warned("ceiling")


def test_club_bounds_from_above_where_its_family_holds_the_law() -> None:
    result = club_upper_bound(*pair(5000, 2), steps=600, batch_size=64)
    # With the true q the bound is rho^2 / (1 - rho^2).
    assert abs(result.value - RHO**2 / (1 - RHO**2)) < 4 * result.std_error
    assert result.kind == "upper"
    assert result.low > TRUTH
    assert result.warned("club")


def test_seeds_fix_the_result_and_leave_the_global_generator_alone() -> None:
    x, y = pair(200)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = neural_information(x, y, steps=5, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.value == neural_information(x, y, steps=5, seed=3).value
    assert first.value != neural_information(x, y, steps=5, seed=4).value


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="bound must be one of infonce, dv, nwj, smile, got 'mine'"):
        neural_information(*pair(100), bound="mine")
    with pytest.raises(ValueError, match="x must hold more than k = 49 samples, got 20"):
        neural_information(*pair(20))


def test_units_of_the_columns_do_not_matter() -> None:
    x, y = pair(200)
    wide = np.hstack([x, y**2])
    small = neural_information(1e-3 * wide + 5.0, 1e4 * y, steps=20)
    assert small.value == pytest.approx(neural_information(wide, y, steps=20).value, abs=1e-3)
