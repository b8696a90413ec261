"""Paths that only a GPU takes, followed on the CPU with stand-ins; `test_gpu.py` runs the real ones."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tinyalign._attention import attend_packed, attention_report, dispatch, pack, packs, use_attention_backend
from tinyalign._attention.backends import AttentionSpec, Reference, Sdpa, Xformers, laid_out
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes


class Here(TorchFunctionMode):
    """What is asked for on CUDA is made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture
def claims_cuda(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


@pytest.fixture
def library(monkeypatch):
    """A stand-in for xformers that computes, and writes down what it was asked."""
    calls = []

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_lengths, k_lengths, *, device=None):
            return torch.block_diag(*(torch.ones(m, n) for m, n in zip(q_lengths, k_lengths, strict=True))).bool()

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        calls.append((tuple(q.shape), tuple(v.shape), q.dtype, None if attn_bias is None else attn_bias.dtype, scale))
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=attn_bias, scale=scale
        )
        return out.transpose(1, 2)

    ops, fmha, bias = type(sys)("xformers.ops"), type(sys)("xformers.ops.fmha"), type(sys)("attn_bias")
    ops.memory_efficient_attention, ops.fmha, fmha.attn_bias = memory_efficient_attention, fmha, bias
    bias.BlockDiagonalMask = BlockDiagonalMask
    package = type(sys)("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "dense", "packed"])
def test_the_trial_call_is_one_real_call_there_and_back_waited_for(monkeypatch, library, dtype, mask):
    waited, back = [], []
    run = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, **how: back.append(self.grad_fn) or run(self, **how))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append((len(library), bool(back))))
    backend, spec = Xformers(), AttentionSpec("cuda", dtype, 16, 24, mask)
    with Here(), torch.inference_mode():  # a search may be the first to ask, and training needs more
        assert backend.reasons_against(spec) == ()
        assert backend.reasons_against(spec) == ()
    bias = {"none": None, "dense": dtype, "packed": torch.bool}[mask]
    rows = (1, 16, 1) if mask == "packed" else (2, 8, 1)
    assert library == [((*rows, 16), (*rows, 24), dtype, bias, 0.25)]
    assert waited == [(1, True)]
    assert back[0] is not None


def test_a_kernel_that_cannot_train_is_no_kernel(monkeypatch, library):
    """xformers chooses the kernel of the backward pass while it runs the forward one, and may find none."""

    class NoWayBack(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("no operator found\nfor backward")

    ops = sys.modules["xformers.ops"]
    monkeypatch.setattr(ops, "memory_efficient_attention", lambda q, k, v, **_: NoWayBack.apply(q))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with Here():
        reasons = Xformers().reasons_against(AttentionSpec("cuda", torch.float32, 16, 16, "none"))
    assert reasons == ("a trial call failed (NotImplementedError: no operator found for backward)",)


def test_no_trial_is_made_while_a_graph_is_captured(monkeypatch, library):
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    backend, spec = Xformers(), AttentionSpec("cuda", torch.float16, 16, 16, "none")
    with Here():
        assert backend.reasons_against(spec) == ("no trial call was made before this CUDA graph's capture",)
        assert library == []
        capturing[0] = False
        assert backend.reasons_against(spec) == ()
        capturing[0] = True
        assert backend.reasons_against(spec) == ()
    assert len(library) == 1


def test_what_runs_on_cuda_is_xformers_once_its_trial_succeeds(monkeypatch, library):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "BACKENDS", {b.name: b for b in (Xformers(), Sdpa(), Reference())})
    with Here():
        report = attention_report("cuda", torch.float16, head_dim=16, mask="packed")
        assert (report.backend, report.chosen_by, report.reasons["xformers"]) == ("xformers", "auto", ())
        assert attention_report("cuda", torch.float16, head_dim=12).backend == "xformers"  # run as 16
        assert {shape[-1] for shape, *_ in library} == {16}
        assert attention_report("cuda", torch.float64, head_dim=16).backend == "sdpa"
        assert attention_report("cuda", torch.float32, head_dim=12).backend == "xformers"


def test_without_a_device_nothing_runs_on_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "BACKENDS", {b.name: b for b in (Xformers(), Sdpa(), Reference())})
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    report = attention_report("cuda")
    assert (report.backend, report.chosen_by) == (None, "auto")
    absent, missing = report.reasons["xformers"]
    assert "it is not installed or does not load" in missing
    assert report.reasons == {"xformers": (absent, missing), "sdpa": (absent,), "reference": (absent,)}
    assert f"nothing runs, asked for 'auto' (chosen by auto)\n  xformers: torch finds no CUDA device; {missing}" in str(
        report
    )


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.float16, 8), (torch.bfloat16, 8)])
def test_xformers_wants_widths_of_its_multiple(monkeypatch, dtype, multiple):
    backend = Xformers()
    monkeypatch.setattr(backend, "_trial_call", lambda spec: None)
    for width in range(1, 20):
        spec = AttentionSpec("cuda", dtype, width, 16, "none")
        for one in (spec, spec._replace(head_dim=16, value_dim=width)):
            assert bool(backend.reasons_against(one)) == (width % multiple != 0)


def test_packed_rows_may_be_none_at_all(monkeypatch):
    """A kernel for ragged rows asks for the longest one, and of none there is none."""
    monkeypatch.setattr(Sdpa, "packs", lambda self, spec: True)
    packed = pack(torch.zeros(0, 4, 3), torch.zeros(0, 4, dtype=torch.bool))
    got = attend_packed(torch.zeros(1, 2, 5, 4), torch.zeros(0, 2, 4), torch.zeros(0, 2, 6), packed)
    assert got.shape == (0, 2, 5, 6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_step_on_cuda_leaves_cudnn_out(monkeypatch, claims_cuda, training, masked):
    seen = []
    run = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, scale=None):
        seen.append((None if attn_mask is None else attn_mask.stride(-2), torch.backends.cuda.cudnn_sdp_enabled()))
        return run(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    keep = torch.tensor([True, True, False, True, True]).expand(2, 1, 1, 5) if masked else None
    for one in (0, 1, 2):
        qkv = [tensor.clone().requires_grad_(training and one == at) for at, tensor in enumerate((q, k, v))]
        got = Sdpa().run(*qkv, keep, 0.3)
        torch.testing.assert_close(got, Reference().run(*qkv, keep, 0.3))
    assert seen == [(8 if masked else None, before and not training)] * 3
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    seen.clear()
    with torch.no_grad():
        Sdpa().run(*(tensor.requires_grad_() for tensor in (q, k, v)), keep, 0.3)
    assert seen == [(8 if masked else None, before)]


@pytest.mark.parametrize("masked", [False, True])
def test_the_cuda_branch_compiles_whole(masked):
    """With shared queries and in training, over two shapes."""
    torch.compiler.reset()
    run = Sdpa().run_on_cuda
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for batch, keys in ((2, 5), (3, 9)):
        q, k = torch.randn(1, 2, 4, 8, requires_grad=True), torch.randn(batch, 2, keys, 8)
        keep = torch.arange(keys).expand(batch, 1, 1, keys) < keys - 1 if masked else None
        got, expected = (each(q.expand(batch, -1, -1, -1), k, k, keep, 0.3) for each in (compiled, run))
        torch.testing.assert_close(got, expected)
        one, other = (torch.autograd.grad(out.square().sum(), q)[0] for out in (got, expected))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("dtype", "widths", "takes"),
    [
        (torch.float16, (16, 16), True),
        (torch.bfloat16, (8, 8), True),
        (torch.float32, (16, 16), False),
        (torch.float16, (12, 12), False),
        (torch.float16, (16, 24), False),
        (torch.float16, (256, 256), True),
        (torch.float16, (264, 264), False),
    ],
)
def test_torch_s_varlen_kernel_gets_what_it_takes(monkeypatch, claims_cuda, dtype, widths, takes):
    spec = AttentionSpec("cuda", dtype, *widths, "packed")
    assert Sdpa().packs(spec) == takes
    assert not Sdpa().packs(spec._replace(device="cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))  # a T4 has no flash kernel
    assert not Sdpa().packs(spec)


class Packing(Reference):
    """A kernel that takes packed rows, or says why not."""

    def __init__(self, *reasons):
        self.reasons = reasons

    def reasons_against(self, spec):
        return self.reasons

    def packs(self, spec):
        return True


@pytest.mark.parametrize(
    ("backends", "asked", "expected"),
    [
        ({"one": Packing(), "other": Reference()}, "auto", True),
        ({"one": Packing("no"), "other": Reference()}, "auto", False),
        ({"one": Reference(), "other": Packing()}, "auto", False),
        ({"one": Reference(), "other": Packing()}, "other", True),
        ({"one": Reference(), "other": Packing("no")}, "other", False),
    ],
)
def test_packing_pays_where_the_kernel_that_would_run_spares_the_padding(monkeypatch, backends, asked, expected):
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    with use_attention_backend(asked):
        assert packs(AttentionSpec("cuda", torch.float32, 16, 16, "packed")) == expected


def test_a_wrong_name_in_the_environment_is_left_to_the_call(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "flash")
    assert not packs(AttentionSpec("cpu", torch.float32, 16, 16, "packed"))


def test_a_trial_is_made_anew_when_torch_is_told_to_be_deterministic(monkeypatch):
    """xformers picks its kernels by it, and one of them has no way back then."""
    asked = []

    def trial(spec):
        asked.append(torch.are_deterministic_algorithms_enabled())
        if asked[-1]:
            raise NotImplementedError("operator is non-deterministic")

    backend, spec = Xformers(), AttentionSpec("cuda", torch.float16, 16, 16, "packed")
    monkeypatch.setattr(backend, "_trial_call", trial)
    try:
        for deterministic in (False, True, False, True):
            torch.use_deterministic_algorithms(deterministic)
            assert bool(backend.reasons_against(spec)) == deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_what_kernels_cannot_read_in_place_is_copied(dtype):
    tensor = torch.randn(2, 3, 5, 16).to(dtype)
    wider = torch.nn.functional.pad(tensor, (1, 2))[..., 1:17]
    shared = tensor[:1].expand(2, -1, -1, -1)
    heads_last = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    for fine in (tensor, heads_last, tensor[:1].expand(1, -1, -1, -1)):
        assert laid_out(fine) is fine
    for odd in (shared, tensor[..., ::2], *(() if dtype == torch.float64 else (wider,))):
        assert torch.equal(laid_out(odd), odd)
        assert laid_out(odd).is_contiguous()
    assert dtype == torch.float64 or laid_out(narrow := wider[..., :7]) is narrow  # no copy would make this width fit


def test_ragged_captions_go_packed_where_that_pays_and_others_do_not(monkeypatch):
    sizes = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)
    compressor = PerceiverCompressor(12, vocab_size=40, sizes=sizes).eval()
    kernel = Packing()
    monkeypatch.setattr(dispatch, "BACKENDS", {"packing": kernel, "reference": Reference()})
    monkeypatch.setattr(dispatch, "_last_run", {})
    image, text = torch.randn(3, 6, 12), torch.randint(0, 40, (3, 5))
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])

    def kinds(*inputs):
        dispatch._last_run.clear()
        value = compressor(*inputs)
        return value, {spec.mask for spec in attention_report().ran}

    value, ran = kinds(image, text, None, mask)
    assert ran == {"none", "packed"}
    monkeypatch.setattr("tinyalign.perceiver.compressor.may_look", lambda *_, **__: False)  # a graph is being captured
    captured, ran = kinds(image, text, None, mask)
    torch.testing.assert_close(captured, value)
    assert ran == {"none", "dense"}
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "_last_run", {})
    padded, ran = kinds(image, text, None, mask)  # the CPU's own kernel would put the padding back
    torch.testing.assert_close(padded, value)
    assert ran == {"none", "dense"}
    monkeypatch.setattr(dispatch, "BACKENDS", {"packing": kernel, "reference": Reference()})
    whole, ran = kinds(image[:1], text[:1])
    torch.testing.assert_close(whole, value[:1])
    assert ran == {"none"}
    assert compressor(image[:0], text[:0], None, mask[:0]).shape == (0, 4, 8)
