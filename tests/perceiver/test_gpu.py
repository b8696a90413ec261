"""Every kernel on a CUDA device against the formula in float64 on the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from tinyalign._attention.backends import AttentionSpec, Xformers
from tinyalign._attention.dispatch import attend_packed
from tinyalign._attention.packing import pack
from tinyalign.connectors import RAGConnector
from tinyalign.perceiver import (
    LossWeights,
    PerceiverCompressor,
    PerceiverEncoder,
    PerceiverPretrainer,
    PerceiverSizes,
    attend,
    attention_report,
    use_attention_backend,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["xformers", "sdpa", "reference", "auto"]
# Relative to the largest value: a few unit roundoffs of each dtype. TF32 is off, see the fixture.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _full_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def need(backend, dtype, mask, width):
    """Skip where xformers itself says no, with its own reasons; nothing else may be skipped."""
    if backend == "xformers":
        reasons = Xformers().reasons_against(AttentionSpec("cuda", dtype, width, width, mask))
        if reasons:
            pytest.skip("; ".join(reasons)[:300])


def tensors(dtype, width, keys=45, batch=3, heads=8, queries=32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, length, width, generator=generator, dtype=torch.float64).to(dtype)
        for length in (queries, keys, keys)
    )
    return q, k, v


def masks(kind, keys=45, batch=3):
    if kind == "none":
        return None
    lengths = torch.tensor([keys, keys // 3, 0 if kind == "with an empty row" else 1])
    return torch.arange(keys)[None] < lengths[:batch, None]


def assert_near(got, expected, dtype, factor=1.0):
    error = (got.double().cpu() - expected).abs().max().item()
    assert error <= factor * TOLERANCE[dtype] * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["none", "ragged", "with an empty row"])
@pytest.mark.parametrize("width", [16, 64])
def test_forward_and_backward_equal_float64(dtype, backend, mask, width):
    need(backend, dtype, "none" if mask == "none" else "dense", width)
    q, k, v = tensors(dtype, width)
    keep = masks(mask)
    upstream = torch.randn(3, 8, 32, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wide = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    expected = attend(*wide, keep=keep, backend="reference")
    expected.backward(upstream)
    there = [tensor.cuda().requires_grad_() for tensor in (q, k, v)]
    got = attend(*there, keep=None if keep is None else keep.cuda(), backend=backend)
    got.backward(upstream.to(dtype).cuda())
    assert got.dtype == dtype
    assert_near(got, expected.detach(), dtype)
    for ours, theirs in zip(there, wide, strict=True):
        assert ours.grad.isfinite().all()
        assert_near(ours.grad, theirs.grad, dtype, factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_rows_packed_equal_masked(dtype, backend):
    need(backend, dtype, "packed", 16)
    q, k, v = tensors(dtype, 16)
    keep = masks("with an empty row")
    expected = attend(q.double(), k.double(), v.double(), keep=keep, scale=0.3, backend="reference")
    tokens = torch.zeros(3, 45, 1, device="cuda")
    packed = pack(tokens, keep.cuda())
    flat_k, flat_v = (t.cuda().transpose(1, 2)[packed.keep].detach().requires_grad_() for t in (k, v))
    queries = q.cuda().requires_grad_()
    got = attend_packed(queries, flat_k, flat_v, packed, scale=0.3, backend=backend)
    assert_near(got, expected, dtype)
    got.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (queries, flat_k, flat_v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["xformers", "sdpa", "reference"])
def test_the_encoder_at_table_3_sizes_equals_the_cpu(dtype, backend):
    """Head width 12 is padded to 16 in the weights for 16 bit; the weights themselves stay as they are."""
    need(backend, dtype, "dense", 16 if dtype != torch.float32 else 12)
    torch.manual_seed(0)
    encoder = PerceiverEncoder(128)
    for weight in encoder.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    inputs = torch.randn(3, 100, 128)
    mask = torch.arange(100)[None] < torch.tensor([100, 37, 1])[:, None]
    rounded = encoder.to(dtype).double()
    expected = rounded(inputs.to(dtype).double(), mask).detach()
    there = encoder.to(dtype).cuda()
    with use_attention_backend(backend):
        got = there(inputs.to(dtype).cuda(), mask.cuda())
        got.square().sum().backward()
    assert_near(got.detach(), expected, dtype, factor=10.0)  # nine layers
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in there.parameters())
    assert there.cross_attention.query.weight.shape == (96, 96)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compressor_packs_ragged_captions_and_agrees_with_the_cpu(dtype):
    sizes = PerceiverSizes(num_self_attends=2)
    compressor = PerceiverCompressor(48, vocab_size=100, sizes=sizes).to(dtype)
    image, text = torch.randn(4, 30, 48).to(dtype), torch.randint(0, 100, (4, 17))
    text_mask = torch.arange(17)[None] < torch.tensor([17, 4, 0, 9])[:, None]
    expected = compressor.double()(image.double(), text, None, text_mask).detach()
    there = compressor.to(dtype).cuda()
    got = there(image.cuda(), text.cuda(), None, text_mask.cuda())
    assert_near(got.detach(), expected, dtype, factor=10.0)
    assert any(spec.mask == "packed" for spec in attention_report("cuda", dtype, head_dim=16).ran)


def test_autocast_pads_for_the_dtype_that_runs():
    torch.manual_seed(0)
    encoder = PerceiverEncoder(128, num_self_attends=1).cuda()
    inputs = torch.randn(2, 40, 128, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = encoder(inputs)
    assert_near(got.detach(), encoder(inputs).detach().double().cpu(), torch.bfloat16, factor=4.0)
    assert AttentionSpec("cuda", torch.bfloat16, 16, 16, "none") in attention_report("cuda").ran


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains_compressor_and_pooling(dtype):
    """Learned queries and latents stay float32 where what they read does not."""
    torch.manual_seed(0)
    compressor = PerceiverCompressor(48, text_dim=24, sizes=PerceiverSizes(num_self_attends=1)).cuda()
    connector = RAGConnector(96, 32, num_tokens=8, gate=True).cuda()
    image, text = torch.randn(4, 30, 48, device="cuda"), torch.randn(4, 17, 24, device="cuda")
    text_mask = torch.arange(17, device="cuda") < torch.tensor([[17], [4], [0], [9]], device="cuda")
    found, scores = torch.ones(4, 1, dtype=torch.bool, device="cuda"), torch.rand(4, 1, device="cuda")
    expected = connector(compressor(image, text, None, text_mask)[:, None], found, scores).tokens.detach()
    with torch.autocast("cuda", dtype=dtype):
        got = connector(compressor(image, text, None, text_mask)[:, None], found, scores).tokens
    assert_near(got.detach(), expected.double().cpu(), dtype, factor=10.0)
    got.float().square().sum().backward()
    for weight in (*compressor.parameters(), *connector.parameters()):
        assert weight.grad is None or weight.grad.isfinite().all()


def test_the_seed_gives_the_same_weights_on_the_device():
    here, there = PerceiverCompressor(48, vocab_size=100), PerceiverCompressor(48, vocab_size=100, device="cuda")
    assert here.fingerprint() == there.fingerprint()


def test_compiles_whole_on_the_device():
    torch.compiler.reset()
    encoder = PerceiverEncoder(128, num_self_attends=1).cuda().eval()
    inputs = torch.randn(2, 40, 128, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(encoder, fullgraph=True)(inputs), encoder(inputs), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [96, 64])
def test_pooled_retrieval_tokens_equal_the_cpu(dtype, backend, width):
    need(backend, dtype, "dense", width)
    torch.manual_seed(0)
    connector = RAGConnector(width, 32, num_tokens=8).to(dtype)
    latents, mask = torch.randn(3, 5, 32, width).to(dtype), torch.arange(5) < torch.tensor([[5], [2], [0]])
    expected = connector.double()(latents.double(), mask).tokens.detach()
    there = connector.to(dtype).cuda()
    with use_attention_backend(backend):
        got = there(latents.cuda(), mask.cuda()).tokens
        got.square().sum().backward()
    assert_near(got.detach(), expected, dtype, factor=4.0)
    assert all(weight.grad.isfinite().all() for weight in there.parameters())


def test_a_training_step_waits_for_the_device_once_at_most():
    """The first step learns the scale of the features; with one cross-attention the later ones never look."""
    compressor = PerceiverCompressor(48, vocab_size=100, fusion="joint", sizes=PerceiverSizes(num_self_attends=1))
    pretrainer = PerceiverPretrainer(
        compressor, num_patches=8, caption_dropout=0.3, mixed_captions=0.5, loss_weights=LossWeights(contrastive=1.0)
    ).cuda()
    image, text = torch.randn(4, 30, 48, device="cuda"), torch.randint(0, 100, (4, 17), device="cuda")
    text_mask = torch.ones(4, 17, dtype=torch.bool, device="cuda")
    pretrainer(image, text, None, text_mask).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pretrainer(image, text, None, text_mask).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_id_outside_the_table_is_named_while_not_training():
    compressor = PerceiverCompressor(48, vocab_size=100, sizes=PerceiverSizes(num_self_attends=1)).cuda().eval()
    with pytest.raises(ValueError, match="ids from 0 to 99, got 100 at row 0, place 1"):
        compressor(torch.randn(1, 3, 48, device="cuda"), torch.tensor([[5, 100]], device="cuda"))


def test_nothing_waits_for_the_device_without_a_mask():
    """A synchronisation inside the forward pass would stall a training step."""
    encoder = PerceiverEncoder(128, num_self_attends=1).cuda().half()
    inputs = torch.randn(2, 40, 128, device="cuda", dtype=torch.float16)
    mask = torch.ones(2, 40, dtype=torch.bool, device="cuda")
    encoder(inputs, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(inputs, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
