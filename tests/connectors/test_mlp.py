"""MLPConnector against a written-out MLP, and projectors that people already have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tinyalign.connectors import MLPConnector


@settings(max_examples=25)
@given(depth=st.integers(1, 4), leading=st.lists(st.integers(0, 3), max_size=3))
def test_equals_a_chain_of_matrix_products(depth, leading):
    connector = MLPConnector(5, 7, depth=depth).double()
    features = torch.randn(*leading, 5, dtype=torch.float64)
    state = connector.state_dict()
    expected = features
    for layer in range(depth):
        if layer:
            expected = 0.5 * expected * (1 + torch.erf(expected / 2**0.5))
        expected = expected @ state[f"layers.{2 * layer}.weight"].T + state[f"layers.{2 * layer}.bias"]
    torch.testing.assert_close(connector(features), expected)


@pytest.mark.parametrize("prefix", ["", "model.mm_projector.", "connector._connector.", "module.model.mm_projector."])
def test_takes_the_weights_of_a_trained_projector(prefix):
    projector = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8))
    connector = MLPConnector.from_llava_state_dict({prefix + k: v for k, v in projector.state_dict().items()})
    features = torch.randn(2, 3, 6)
    assert torch.equal(connector(features), projector(features))


@pytest.mark.parametrize("prefix", ["", "mm_projector."])
def test_takes_a_linear_projector(prefix):
    projector = nn.Linear(6, 8).half()
    connector = MLPConnector.from_llava_state_dict({prefix + k: v for k, v in projector.state_dict().items()})
    assert connector.weight_dtype == torch.float16
    features = torch.randn(2, 6).half()
    torch.testing.assert_close(connector(features), F.linear(features, projector.weight, projector.bias))


def test_refuses_what_is_no_projector():
    square = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)}
    for state, said in (
        ({**square, "2.weight": torch.ones(5, 4), "2.bias": torch.ones(5)}, r"shapes \[\(4, 3\), \(5, 4\)\]"),
        ({**square, "readout.norm": torch.ones(4)}, "an entry 'readout.norm'"),
        ({"0.weight": torch.ones(4, 3)}, "0.weight"),
        ({**square, "1.weight": torch.ones(4), "1.bias": torch.ones(4)}, "1.weight"),
        ({}, r"entries \[\]"),
    ):
        with pytest.raises(ValueError, match=said):
            MLPConnector.from_llava_state_dict(state)


@pytest.mark.parametrize("sizes", [(0, 4, 2), (4, -1, 2), (4, 4, 0), (4, 4.0, 2), (True, 4, 2)])
def test_refuses_sizes_that_are_no_sizes(sizes):
    with pytest.raises(ValueError, match=r"MLPConnector: \w+ must be an integer of at least 1, got"):
        MLPConnector(sizes[0], sizes[1], depth=sizes[2])


def test_names_the_width_it_was_given():
    with pytest.raises(ValueError, match=r"last size 6, got \(2, 5\)"):
        MLPConnector(6, 8)(torch.zeros(2, 5))


def test_depth_may_come_after_the_widths():
    assert [tuple(w.shape) for w in MLPConnector(5, 7, 3).parameters() if w.dim() == 2] == [(7, 5), (7, 7), (7, 7)]


def test_two_layers_unless_told_otherwise():
    """The paper's connector, and LLaVA's `mlp2x_gelu`."""
    assert len([layer for layer in MLPConnector(6, 8).layers if isinstance(layer, nn.Linear)]) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_take_the_dtype_of_the_weights(dtype):
    connector, features = MLPConnector(6, 8), torch.randn(2, 6).to(dtype)
    assert torch.equal(connector(features), connector(features.float()))
    with pytest.raises(TypeError, match=r"MLPConnector.forward: features must be floating point, got torch.uint8"):
        connector(torch.zeros(2, 6, dtype=torch.uint8))
