"""Every kernel on a CUDA device against the formula in float64 on the CPU. Run with `pytest -m gpu`.

Without a GPU `test_gpu_rehearsal.py` runs these tests on a stand-in.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from tinyalign._attention import AttentionSpec, attend_packed, dispatch, pack
from tinyalign._attention.backends import Xformers
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


def tensors(dtype, width, keys=45, batch=3, heads=8, queries=32, value_width=None):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, length, size, generator=generator, dtype=torch.float64).to(dtype)
        for length, size in ((queries, width), (keys, width), (keys, value_width or width))
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


def check_both_ways(there, wide, keep, dtype, backend):
    """Values and gradients of `attend` on the device against float64."""
    expected = attend(*wide, keep=keep, backend="reference")
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected.backward(upstream)
    got = attend(*there, keep=None if keep is None else keep.cuda(), backend=backend)
    got.backward(upstream.to(dtype).cuda())
    assert got.dtype == dtype
    assert_near(got, expected.detach(), dtype)
    for ours, theirs in zip(there, wide, strict=True):
        assert ours.grad.isfinite().all()
        assert_near(ours.grad, theirs.grad, dtype, factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["none", "ragged", "with an empty row"])
@pytest.mark.parametrize("width", [16, 64])
def test_forward_and_backward_equal_float64(dtype, backend, mask, width):
    need(backend, dtype, "none" if mask == "none" else "dense", width)
    q, k, v = tensors(dtype, width)
    wide = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    there = [tensor.cuda().requires_grad_() for tensor in (q, k, v)]
    check_both_ways(there, wide, masks(mask), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["none", "ragged"])
def test_values_of_another_width_and_one_set_of_queries(dtype, backend, mask):
    """The latents of a Perceiver are one set of queries for the whole batch."""
    if backend == "xformers" and (reasons := Xformers().reasons_against(spec_of(dtype, mask, 16, 24))):
        pytest.skip("; ".join(reasons)[:300])
    q, k, v = tensors(dtype, 16, value_width=24)
    wide = [tensor.double().requires_grad_() for tensor in (q[:1], k, v)]
    there = [tensor.cuda().requires_grad_() for tensor in (q[:1], k, v)]
    check_both_ways(there, wide, masks(mask), dtype, backend)


def spec_of(dtype, mask, width, value_width):
    return AttentionSpec("cuda", dtype, width, value_width, "none" if mask == "none" else "dense")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_something_wider_are_taken(dtype, backend):
    """Heads that begin at odd places, which no kernel reads."""
    need(backend, dtype, "dense", 16)
    q, k, v = (torch.nn.functional.pad(tensor, (1, 2)) for tensor in tensors(dtype, 16))
    wide = [tensor[..., 1:17].double().requires_grad_() for tensor in (q, k, v)]
    expected = attend(*wide, keep=masks("ragged"), backend="reference")
    there = [tensor.cuda()[..., 1:17] for tensor in (q, k, v)]
    assert_near(attend(*there, keep=masks("ragged").cuda(), backend=backend), expected.detach(), dtype)
    shared = [there[0], *(tensor[:1].expand(3, -1, -1, -1) for tensor in there[1:])]
    expected = attend(wide[0], *(tensor[:1].expand(3, -1, -1, -1) for tensor in wide[1:]), backend="reference")
    assert_near(attend(*shared, backend=backend), expected.detach(), dtype)


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
    expected, unmasked = (rounded(inputs.to(dtype).double(), keep).detach() for keep in (mask, None))
    there = encoder.to(dtype).cuda()
    with use_attention_backend(backend):
        got = there(inputs.to(dtype).cuda(), mask.cuda())
        got.square().sum().backward()
        with torch.no_grad():  # where other kernels may run
            assert_near(there(inputs.to(dtype).cuda(), mask.cuda()), expected, dtype, factor=10.0)
            assert_near(there(inputs.to(dtype).cuda()), unmasked, dtype, factor=10.0)
    assert_near(got.detach(), expected, dtype, factor=10.0)  # nine layers
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in there.parameters())
    assert there.cross_attention.query.weight.shape == (96, 96)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["xformers", "sdpa", "reference"])
def test_the_compressor_packs_where_that_spares_work_and_agrees_with_the_cpu(monkeypatch, dtype, backend):
    need(backend, dtype, "packed", 16 if dtype != torch.float32 else 12)
    sizes = PerceiverSizes(num_self_attends=2)
    compressor = PerceiverCompressor(48, vocab_size=100, sizes=sizes).to(dtype)
    image, text = torch.randn(4, 30, 48).to(dtype), torch.randint(0, 100, (4, 17))
    text_mask = torch.arange(17)[None] < torch.tensor([17, 4, 0, 9])[:, None]
    expected = compressor.double()(image.double(), text, None, text_mask)
    expected.square().sum().backward()
    grads = {name: weight.grad for name, weight in compressor.named_parameters()}
    compressor.zero_grad(set_to_none=True)
    there = compressor.to(dtype).cuda()
    monkeypatch.setattr(dispatch, "_last_run", {})
    with use_attention_backend(backend):
        got = there(image.cuda(), text.cuda(), None, text_mask.cuda())
        got.float().square().sum().backward()
    assert_near(got.detach(), expected.detach(), dtype, factor=10.0)
    for name, weight in there.named_parameters():
        assert_near(weight.grad, grads[name], dtype, factor=20.0)
    packs = backend == "xformers" or (backend == "sdpa" and dtype != torch.float32)
    assert {spec.mask for spec in attention_report("cpu").ran} == {"none", "packed" if packs else "dense"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_deterministic_step_takes_a_kernel_that_can(dtype):
    """What was tried before torch was told to be deterministic says nothing about what may run after."""
    q, k, v = tensors(dtype, 16)
    keep = masks("ragged").cuda()
    packed = pack(torch.zeros(3, 45, 1, device="cuda"), keep)
    flat = [tensor.cuda().transpose(1, 2)[packed.keep] for tensor in (k, v)]
    results = []
    for deterministic in (False, True, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            leaves = [tensor.clone().requires_grad_() for tensor in (q.cuda(), *flat)]
            out = attend_packed(*leaves, packed)
            out.float().square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for first, second, third in zip(*results, strict=True):
        assert_near(second, first.double().cpu(), dtype, factor=4.0)
        assert torch.equal(second, third)


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


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch cannot compile for CUDA")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole_on_the_device(training, masked):
    torch.compiler.reset()
    encoder = PerceiverEncoder(128, num_self_attends=1).cuda().requires_grad_(training)
    inputs = torch.randn(2, 40, 128, device="cuda")
    mask = torch.arange(40, device="cuda") < torch.tensor([[40], [7]], device="cuda") if masked else None
    compiled, plain = torch.compile(encoder, fullgraph=True)(inputs, mask), encoder(inputs, mask)
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)
    if training:
        weights = list(encoder.parameters())
        ours, theirs = (torch.autograd.grad(out.square().sum(), weights) for out in (compiled, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


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


def waits(run):
    """How often the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("fusion", "backend", "expected"), [("joint", "auto", 0), ("balanced", "sdpa", 0)])
def test_a_training_step_waits_only_to_pack(fusion, backend, expected):
    """The first step learns the scale of the features; the later ones look only where captions are packed."""
    compressor = PerceiverCompressor(48, vocab_size=100, fusion=fusion, sizes=PerceiverSizes(num_self_attends=1))
    pretrainer = PerceiverPretrainer(
        compressor, num_patches=8, caption_dropout=0.3, mixed_captions=0.5, loss_weights=LossWeights(contrastive=1.0)
    ).cuda()
    image, text = torch.randn(4, 30, 48, device="cuda"), torch.randint(0, 100, (4, 17), device="cuda")
    text_mask = torch.ones(4, 17, dtype=torch.bool, device="cuda")
    with use_attention_backend(backend):
        pretrainer(image, text, None, text_mask).loss.backward()
        assert waits(lambda: pretrainer(image, text, None, text_mask).loss.backward()) == expected


def test_packing_waits_once():
    tokens, keep = torch.randn(3, 45, 8, device="cuda"), masks("with an empty row").cuda()
    assert waits(lambda: pack(tokens, keep)) == 1


def test_an_id_outside_the_table_is_named_while_not_training():
    compressor = PerceiverCompressor(48, vocab_size=100, sizes=PerceiverSizes(num_self_attends=1)).cuda().eval()
    with pytest.raises(ValueError, match="ids from 0 to 99, got 100 at row 0, place 1"):
        compressor(torch.randn(1, 3, 48, device="cuda"), torch.tensor([[5, 100]], device="cuda"))


def test_encoding_never_waits():
    """A synchronisation inside the forward pass would stall a training step."""
    encoder = PerceiverEncoder(128, num_self_attends=1).cuda().half()
    inputs = torch.randn(2, 40, 128, device="cuda", dtype=torch.float16)
    mask = torch.ones(2, 40, dtype=torch.bool, device="cuda")
    encoder(inputs, mask)
    assert waits(lambda: encoder(inputs, mask)) == 0
