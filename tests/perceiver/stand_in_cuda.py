"""A CPU that answers to the name of a CUDA device, so that what only a GPU takes can be followed without one.

Tensors say that they are on CUDA. The kernels behind torch's attention and behind xformers are the formula, in front of
it the demands that the real ones make of dtypes, shapes, strides and offsets, as their sources state them. Waiting for
the device is an error, or a warning, when `torch.cuda.set_sync_debug_mode` asks for it. As a pytest plugin
(`-p stand_in_cuda`) it takes over every test. It knows nothing of speed, of rounding inside kernels, or of compiling.
"""

from __future__ import annotations

import contextlib
import sys
import types
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
WAITS = {"item", "tolist", "nonzero", "masked_select", "unique", "cpu", "numpy", "__bool__", "__int__", "__float__"}
HALF = (torch.float16, torch.bfloat16)
real_sdpa, real_autocast = F.scaled_dot_product_attention, torch.autocast


def demand(rule, what):
    if not rule:
        raise RuntimeError(f"the kernel refuses: {what}")


def elsewhere(value):
    """The CPU, where a CUDA device is meant."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class Device(TorchFunctionMode):
    """Everything that is asked of a tensor passes here."""

    waiting = "default"  # or "warn", or "error"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return DEVICE
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function is torch.device:
            return function(*args)
        name = getattr(function, "__name__", "")
        if self.waiting != "default" and (name in WAITS or (name == "__getitem__" and holds_a_mask(args[1]))):
            if self.waiting == "error":
                raise RuntimeError(f"called a synchronizing CUDA operation: {name}")
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        if name == "cuda":
            return args[0].clone()
        kwargs = {key: elsewhere(value) for key, value in (kwargs or {}).items()}
        return function(*(elsewhere(argument) for argument in args), **kwargs)


DEVICE_MODE = Device()


def holds_a_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


@contextlib.contextmanager
def inside_a_kernel():
    """What a kernel does on the device is no waiting."""
    before, DEVICE_MODE.waiting = DEVICE_MODE.waiting, "default"
    try:
        yield
    finally:
        DEVICE_MODE.waiting = before


def attention(q, k, v, bias, scale):
    """(M, H, d), (N, H, d), (N, H, e) and (H, M, N) to (M, H, e), differentiable."""
    scores = torch.einsum("mhd,nhd->hmn", q.float(), k.float()) * scale
    scores = scores if bias is None else scores + bias.float()
    return torch.einsum("hmn,nhe->mhe", scores.softmax(-1), v.float()).to(q.dtype)


def attention_back(q, k, v, scale, grad):
    """The gradients of q, k and v in closed form: autograd is off inside an operator."""
    wide = [tensor.float() for tensor in (q, k, v, grad)]
    share = (torch.einsum("mhd,nhd->hmn", *wide[:2]) * scale).softmax(-1)
    moved = torch.einsum("mhe,nhe->hmn", wide[3], wide[2])
    moved = share * (moved - (share * moved).sum(-1, keepdim=True)) * scale
    of_q, of_k = torch.einsum("hmn,nhd->mhd", moved, wide[1]), torch.einsum("hmn,mhd->nhd", moved, wide[0])
    return [part.to(q.dtype) for part in (of_q, of_k, torch.einsum("hmn,mhe->nhe", share, wide[3]))]


def spans(q, k, v, starts_q, starts_k, longest_q, longest_k):
    """Where rows begin, after what torch's flash kernel demands of packed rows."""
    for tensor in (q, k, v):
        demand(tensor.dim() == 3 and tensor.dtype == q.dtype and tensor.dtype in HALF, f"dtype {tensor.dtype}")
        width = tensor.shape[2]
        demand(tensor.stride(2) == 1 and width == q.shape[2] and width % 8 == 0 and width <= 256, f"width {width}")
    for starts in (starts_q, starts_k):
        demand(starts.dtype == torch.int32 and starts.is_contiguous(), f"starts of {starts.dtype}")
    one, other = starts_q.tolist(), starts_k.tolist()
    demand(len(one) == len(other) and one[-1] == len(q) and other[-1] == len(k) == len(v), "starts that miss tokens")
    demand(type(longest_q) is type(longest_k) is int, "lengths that are no numbers")
    rows = [(slice(*one[i : i + 2]), slice(*other[i : i + 2])) for i in range(len(one) - 1)]
    demand(all(0 < a.stop - a.start <= longest_q and 0 < b.stop - b.start <= longest_k for a, b in rows), "longest row")
    return rows


def flash_forward(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout, causal, debug, *, scale=None, **_):
    with inside_a_kernel():
        rows = spans(q, k, v, starts_q, starts_k, longest_q, longest_k)
        out = torch.cat([attention(q[a], k[b], v[b], None, scale or q.shape[2] ** -0.5) for a, b in rows])
        lse, nothing = torch.zeros(q.shape[1], len(q)), torch.empty(0)
        return out, lse, torch.zeros(2, dtype=torch.uint64), nothing, nothing


def flash_backward(grad, q, k, v, out, lse, starts_q, starts_k, longest_q, longest_k, *_, scale=None, **__):
    with inside_a_kernel():
        rows = spans(q, k, v, starts_q, starts_k, longest_q, longest_k)
        demand(grad.dtype == q.dtype and grad.shape == out.shape, f"gradient of {grad.dtype}")
        parts = [attention_back(q[a], k[b], v[b], scale or q.shape[2] ** -0.5, grad[a]) for a, b in rows]
        return tuple(torch.cat([part[i] for part in parts]) for i in range(3))


def demand_layout(tensor, what):
    """Rows of heads begin where a vector load can begin; the last axis is dense."""
    multiple = 4 if tensor.dtype == torch.float32 else 8
    begins = (tensor.storage_offset(), *(tensor.stride(axis) for axis in range(3) if tensor.shape[axis] > 1))
    demand(tensor.stride(-1) == 1 and not any(begin % multiple for begin in begins), f"{what} laid out as {begins}")


def sdpa(q, k, v, attn_mask=None, scale=None):
    """torch's choice on Hopper: cuDNN first where it is allowed, which before torch 2.12 fails on shared rows."""
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if q.shape[-1] % (4 if q.dtype == torch.float32 else 8) == 0:
        for tensor in (q, k, v):
            demand_layout(tensor, "attention")
    if q.dtype in HALF and torch.backends.cuda.cudnn_sdp_enabled():
        demand(not training, "cuDNN's backward may return NaN")
        demand(len(q) == 1 or all(tensor.stride(0) for tensor in (q, k, v)), "cuDNN Frontend error: stride 0")
    return real_sdpa(q, k, v, attn_mask=attn_mask, scale=scale)


class BlockDiagonalMask:
    def __init__(self, q_lengths, k_lengths):
        self.lengths = [*zip(q_lengths, k_lengths, strict=True)]

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert device == DEVICE
        assert all(type(length) is int for length in (*q_seqlen, *kv_seqlen))
        return cls(q_seqlen, kv_seqlen)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """What xformers 0.0.35 checks of its arguments, then the formula."""
    (batch, count, heads, width), keys = query.shape, key.shape[1]
    if any(len(tensor) != batch or tensor.dtype != query.dtype for tensor in (key, value)):
        raise ValueError("batch or dtype of query, key and value differ")
    if isinstance(attn_bias, BlockDiagonalMask) and batch != 1:
        raise ValueError("expected batch_size=1 when using block-diagonal bias")
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    flash = query.dtype in HALF and value.shape[3] == width and not isinstance(attn_bias, torch.Tensor)
    packed = isinstance(attn_bias, BlockDiagonalMask)
    if training and flash and packed and torch.are_deterministic_algorithms_enabled():
        raise NotImplementedError("operator is non-deterministic, but `torch.use_deterministic_algorithms` is set")
    try:
        for tensor in (query, key, value):
            demand_layout(tensor, "attention")
    except RuntimeError as error:
        raise NotImplementedError(f"no operator found: {error}") from None
    if packed:
        parts, q_start, k_start = [], 0, 0
        for q_length, k_length in attn_bias.lengths:
            q_stop, k_stop = q_start + q_length, k_start + k_length
            rows = query[0, q_start:q_stop], key[0, k_start:k_stop], value[0, k_start:k_stop]
            parts.append(attention(*rows, None, scale))
            q_start, k_start = q_stop, k_stop
        demand((q_start, k_start) == (count, keys), "lengths that miss tokens")
        return torch.cat(parts)[None]
    if attn_bias is not None:
        if tuple(attn_bias.shape) != (batch, heads, count, keys) or attn_bias.dtype != query.dtype:
            raise ValueError(f"invalid attention bias: {attn_bias.dtype} {tuple(attn_bias.shape)}")
        demand_layout(attn_bias, "bias")
    bias = [None] * batch if attn_bias is None else attn_bias
    return torch.stack([attention(query[i], key[i], value[i], bias[i], scale) for i in range(batch)])


class Autocast(contextlib.ExitStack):
    """Autocast of the device that is meant, and of the one that computes."""

    def __init__(self, device_type, dtype=None, enabled=True, **_):
        super().__init__()
        self.casts = [real_autocast(kind, dtype=dtype, enabled=enabled) for kind in ("cpu", "cuda")]

    def __enter__(self):
        for cast in self.casts:
            self.enter_context(cast)
        return super().__enter__()


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 1.0


def install(patch):
    """Put everything in place; `patch` is pytest's."""
    for name, kernel in (("forward", flash_forward), ("backward", flash_backward)):
        LIBRARY.impl(f"_flash_attention_{name}", kernel, "CPU")
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "get_device_capability": (9, 0),
        "get_device_name": "Stand-in",
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "_sleep": None,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    patch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(DEVICE_MODE, "waiting", mode))
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(F, "scaled_dot_product_attention", sdpa)
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, package.__version__ = ops, "stand-in"
    ops.memory_efficient_attention = memory_efficient_attention
    ops.fmha = types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask))
    patch.setitem(sys.modules, "xformers", package)
    patch.setitem(sys.modules, "xformers.ops", ops)


LIBRARY = torch.library.Library("aten", "IMPL")


def pytest_configure(config):
    install(pytest.MonkeyPatch())


@pytest.fixture(autouse=True)
def _on_the_stand_in():
    with DEVICE_MODE:
        yield
