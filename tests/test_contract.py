"""One contract for every public module: what holds of each of them, whatever it computes."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tinyalign.connectors import MLPConnector, RAGConnector
from tinyalign.memory import AttentionPooledKey
from tinyalign.perceiver import PerceiverCompressor, PerceiverEncoder, PerceiverSizes

PACKAGES = ("connectors", "memory", "perceiver", "theory", "data", "models")
SIZES = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)
B = 3


class Case(NamedTuple):
    """How to build a module, what to feed it, and the place of its mask and of what the mask covers (None: no mask)."""

    build: Callable[..., nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    masked: tuple[int, int] | None = None


def ragged(width: int) -> Tensor:
    return torch.arange(width) < torch.tensor([[width], [1], [2]])


CASES = {
    "MLPConnector": Case(lambda **a: MLPConnector(6, 8, **a), lambda: (torch.randn(B, 5, 6),)),
    "MLPConnector deep": Case(lambda **a: MLPConnector(6, 8, depth=4, **a), lambda: (torch.randn(B, 5, 6),)),
    "RAGConnector": Case(
        lambda **a: RAGConnector(6, 8, **a), lambda: (torch.randn(B, 3, 4, 6), ragged(3)), masked=(0, 1)
    ),
    "RAGConnector pooled, gated, ranked": Case(
        lambda **a: RAGConnector(6, 8, num_tokens=2, gate=True, num_ranks=3, **a),
        lambda: (torch.randn(B, 3, 4, 6), ragged(3), torch.rand(B, 3)),
        masked=(0, 1),
    ),
    "RAGConnector gated": Case(
        lambda **a: RAGConnector(6, 8, gate=True, **a),
        lambda: (torch.randn(B, 3, 4, 6), ragged(3), torch.rand(B, 3)),
        masked=(0, 1),
    ),
    "AttentionPooledKey": Case(
        lambda **a: AttentionPooledKey(alpha=0.4),
        lambda: (torch.randn(B, 5, 6), torch.randn(B, 3, 6), ragged(5), None),
        masked=(0, 2),
    ),
    "PerceiverEncoder": Case(
        lambda **a: PerceiverEncoder(
            6, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2, qk_channels=8, v_channels=8, **a
        ),
        lambda: (torch.randn(B, 5, 6), ragged(5)),
        masked=(0, 1),
    ),
    "PerceiverCompressor": Case(
        lambda **a: PerceiverCompressor(6, vocab_size=20, sizes=SIZES, **a),
        lambda: (torch.randn(B, 5, 6), torch.randint(0, 20, (B, 4)), ragged(5), None),
        masked=(0, 2),
    ),
}
# Modules with tests of their own, and why the contract above does not fit them.
ELSEWHERE = {
    "PerceiverPretrainer": "returns losses over a batch: tests/perceiver/test_contract.py",
    "PixelPerceiver": "pixels in, one kernel tested against another: tests/perceiver/test_contract.py",
    "FoldedPixelPerceiver": "a frozen copy of PixelPerceiver: tests/perceiver/test_pixels.py",
    "TinyAlignVLM": "composed: tests/models/test_vlm.py and its neighbours",
    "VisionFeatures": "wraps a tower: tests/models/test_vision.py",
    "PairEncoder": "frozen parts together: tests/models/test_pair_encoder.py",
    "AttachedVLM": "wraps a user's model: tests/models/test_attach.py",
    "NullInput": "a prompt for another model: tests/theory/test_collect.py",
    "JointCritic": "trained inside an estimator: tests/theory/test_neural.py",
    "SeparableCritic": "trained inside an estimator: tests/theory/test_neural.py",
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def rows(inputs: tuple[Any, ...], index: Any) -> tuple[Any, ...]:
    return tuple(value[index] if isinstance(value, Tensor) else value for value in inputs)


def public_modules() -> dict[str, type[nn.Module]]:
    packages = [importlib.import_module(f"tinyalign.{package}") for package in PACKAGES]
    values = {name: getattr(package, name) for package in packages for name in package.__all__}
    return {name: value for name, value in values.items() if isinstance(value, type) and issubclass(value, nn.Module)}


def test_every_public_module_is_held_to_a_contract():
    assert public_modules().keys() == {name.split()[0] for name in CASES} | ELSEWHERE.keys()


def test_rows_are_independent_and_inputs_untouched(case):
    module, inputs = case.build().eval(), case.inputs()
    before = copy.deepcopy(inputs)
    whole = tensors(module(*inputs))
    for row in range(B):
        alone = tensors(module(*rows(inputs, slice(row, row + 1))))
        for one, many in zip(alone, whole, strict=True):
            torch.testing.assert_close(one[0], many[row], rtol=1e-5, atol=1e-6)
    for now, then in zip(inputs, before, strict=True):
        assert now is None or torch.equal(now, then)


def test_what_a_mask_hides_changes_nothing(case):
    if case.masked is None:
        pytest.skip("takes no mask")
    module, inputs = case.build().eval(), list(case.inputs())
    data, mask = case.masked
    expected = tensors(module(*inputs))
    hidden = ~inputs[mask]
    garbage = inputs[data].clone()
    garbage[hidden] = 1e6
    inputs[data] = garbage
    for one, other in zip(tensors(module(*inputs)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_reach_every_parameter(case):
    module, inputs = case.build(), case.inputs()
    first = tensors(module(*inputs))[0]
    if not list(module.parameters()):
        pytest.skip("has no parameters")
    (first * torch.randn_like(first)).sum().backward()
    # A bias of attention keys shifts every logit of a query alike, and softmax does not see it.
    unseen = {name for name, _ in module.named_parameters() if name.endswith("key.bias")}
    without = {name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert without <= unseen


def test_copies_compute_the_same_to_the_bit(case, tmp_path):
    module, inputs = case.build().eval(), case.inputs()
    expected = tensors(module(*inputs))
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    loaded = case.build().eval()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        for one, other in zip(tensors(twin(*inputs)), expected, strict=True):
            assert torch.equal(one, other)


def test_is_built_on_the_meta_device(case):
    module = case.build(device="meta")
    assert {weight.device.type for weight in module.parameters()} <= {"meta"}
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in case.build().named_parameters()]


def test_computes_in_bfloat16(case):
    module, inputs = case.build().eval(), case.inputs()
    expected = tensors(module(*inputs))[0]
    half = tuple(v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs)
    output = tensors(case.build(dtype=torch.bfloat16).eval().to(torch.bfloat16)(*half))[0]
    assert output.dtype == torch.bfloat16
    assert output.shape == expected.shape
    module = copy.deepcopy(module).to(torch.bfloat16)
    spread = expected.abs().max().clamp(min=1e-3)
    # bfloat16 keeps 8 bits; a few layers add up to a few times 2^-8 of the largest entry.
    assert (tensors(module(*half))[0].float() - expected).abs().max() < 0.05 * spread


def test_compiles_in_one_graph(case):
    module, inputs = case.build().eval(), case.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for one, other in zip(tensors(compiled(*inputs)), tensors(module(*inputs)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", public_modules())
def test_constructors_stay_small(name):
    limit = {"PerceiverEncoder": 10}  # Table 3's sizes, one argument each, device and dtype
    assert len(inspect.signature(public_modules()[name]).parameters) <= limit.get(name, 8)
