"""What every module of this package keeps: copies, pickles, meta tensors, 16 bit, compilation, untouched inputs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tinyalign.perceiver import (
    FoldedPixelPerceiver,
    PerceiverCompressor,
    PerceiverEncoder,
    PerceiverPretrainer,
    PerceiverSizes,
    PixelPerceiver,
)
from tinyalign.perceiver.layers import PerceiverLayer
from tinyalign.perceiver.pixels import CaptionTokens
from tinyalign.perceiver.reader import LatentReader

SIZES = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)


def small_encoder(**arguments):
    return PerceiverEncoder(
        12, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2, qk_channels=8, v_channels=8, **arguments
    )


def compressor(**arguments):
    return PerceiverCompressor(12, vocab_size=40, sizes=SIZES, **arguments)


def pair():
    text_mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    return torch.randn(3, 6, 12), torch.randint(0, 40, (3, 5)), None, text_mask


def pixel_perceiver(**arguments):
    encoder = PerceiverEncoder(516, num_latents=2, num_self_attends=1, **arguments)
    return PixelPerceiver(encoder, image_size=4, vocab_size=300, max_text_tokens=8, **arguments)


CASES = {
    "layer": (
        lambda **a: PerceiverLayer(8, qk_channels=8, v_channels=8, num_heads=2, **a),
        lambda: (torch.randn(3, 4, 8),),
    ),
    "encoder": (small_encoder, lambda: (torch.randn(3, 6, 12), torch.rand(3, 6) < 0.7)),
    "balanced compressor": (compressor, pair),
    "joint compressor": (lambda **a: compressor(fusion="joint", **a), pair),
    "reader": (
        lambda **a: LatentReader(8, 5, hidden_dim=16, num_heads=2, **a),
        lambda: (torch.randn(3, 4, 8), torch.arange(7)[None]),
    ),
    "caption tokens": (lambda **a: CaptionTokens(40, 8, **a), lambda: (torch.randint(0, 40, (3, 5)),)),
    "pixels": (pixel_perceiver, lambda: (torch.rand(3, 3, 4, 4), torch.randint(0, 300, (3, 5)))),
}


@pytest.fixture(params=CASES)
def case(request):
    build, inputs = CASES[request.param]
    return build, inputs()


def test_copies_and_pickles_compute_the_same(case):
    build, inputs = case
    module = build().eval()
    expected = module(*inputs)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*inputs), expected)


def test_runs_on_meta_without_drawing_weights(case):
    build, inputs = case
    module = build(device="meta")
    assert {weight.device.type for weight in module.state_dict().values()} == {"meta"}
    out = module(*(None if tensor is None else tensor.to("meta") for tensor in inputs))
    assert out.shape == build()(*inputs).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_is_built_in_any_precision(case, dtype):
    build, inputs = case
    module = build(dtype=dtype)
    assert {w.dtype for w in module.state_dict().values() if w.is_floating_point()} == {dtype}
    moved = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs]
    out = module(*moved)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_inputs_are_left_as_they_were_and_rows_are_independent(case):
    build, inputs = case
    module = build().eval()
    before = [None if tensor is None else tensor.clone() for tensor in inputs]
    together = module(*inputs)
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    for row in range(3):
        one = [t if t is None or t.shape[0] == 1 else t[row : row + 1] for t in inputs]
        torch.testing.assert_close(module(*one), together[row : row + 1], atol=1e-6, rtol=0)


def test_compiles_as_one_graph(case):
    build, inputs = case
    module = build().eval()
    torch.compiler.reset()
    whole = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(*inputs), module(*inputs))


def test_gradients_reach_every_weight(case):
    build, inputs = case
    module = build()
    out = module(*inputs)
    (out * torch.randn_like(out)).sum().backward()
    assert [name for name, weight in module.named_parameters() if weight.grad is None] == []


def test_folding_survives_a_copy():
    folded = FoldedPixelPerceiver(pixel_perceiver(), chunk=5)
    image = torch.rand(2, 3, 4, 4)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(image), folded(image))
    assert not folded(image).requires_grad


def test_autocast_runs_forward_and_backward():
    pretrainer = PerceiverPretrainer(compressor(), hidden_dim=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pretrainer(*pair()).loss
    loss.backward()
    exact = pretrainer(*pair()).loss
    assert abs(loss.item() / exact.item() - 1) < 0.2
