"""The kernels behind `attend`, each a small record that says what it cannot run and runs the rest."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyalign._attention.packing import PackedTokens, unpack

_WIDTH_MULTIPLE = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}
# cuDNN's backward gives NaN on H100/H200 where all scores of a query are very low: for queries at some masked lengths
# (pytorch issue 196678), for keys and values under a single query (NVIDIA/cudnn-frontend issue 1072).
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionSpec(NamedTuple):
    """The static facts of a call that decide which kernel can run it."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    mask: Literal["none", "dense", "packed"]


class Backend(Protocol):
    """A kernel: `reasons_against` is empty when `run` can take the call."""

    @property
    def name(self) -> str:
        """Name used in `attend(backend=...)`."""
        ...

    def reasons_against(self, spec: AttentionSpec) -> tuple[str, ...]:
        """Every reason why this kernel cannot run such a call."""
        ...

    def packs(self, spec: AttentionSpec) -> bool:
        """Whether ragged rows run without their padding; if not, `run_packed` puts it back first."""
        ...

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """Attention over (B, H, tokens, width); `keep` has four axes and no row without a key."""
        ...

    def run_packed(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, scale: float) -> Tensor:
        """The same for q (B, H, M, d) and packed k, v (total, H, width)."""
        ...


class Reference:
    """The formula written out, for checks and for devices without a fused kernel."""

    name = "reference"

    def reasons_against(self, spec: AttentionSpec) -> tuple[str, ...]:
        """Never any: it runs everywhere."""
        del spec
        return ()

    def packs(self, spec: AttentionSpec) -> bool:
        """Never."""
        del spec
        return False

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """In float32 at least, whatever the dtype of the inputs: the result is rounded once."""
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        with without_autocast(q):
            scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
            if keep is not None:
                scores = scores.masked_fill(~keep, float("-inf"))
            return (scores.softmax(dim=-1) @ v.to(wide)).to(v.dtype)

    def run_packed(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, scale: float) -> Tensor:
        """Through the padded form."""
        return self.run(q, unpack(k, packed.keep), unpack(v, packed.keep), packed.keep[:, None, None, :], scale)


class Sdpa:
    """`torch.nn.functional.scaled_dot_product_attention`: flash, cuDNN, memory-efficient or plain, as torch decides."""

    name = "sdpa"

    def reasons_against(self, spec: AttentionSpec) -> tuple[str, ...]:
        """Never any: torch has a kernel for every device it supports."""
        del spec
        return ()

    def packs(self, spec: AttentionSpec) -> bool:
        """Through torch's flash kernels: 16 bit, equal widths, a multiple of 8 up to 256, and an Ampere or newer."""
        width, half = spec.head_dim, spec.dtype in (torch.float16, torch.bfloat16)
        fits = width == spec.value_dim and width % 8 == 0 and width <= 256
        return spec.device == "cuda" and half and fits and torch.cuda.get_device_capability() >= (8, 0)

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """The mask goes in as bool."""
        if q.is_cuda:
            return self.run_on_cuda(q, k, v, keep, scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)

    def run_on_cuda(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """The mask lies in rows of a multiple of eight, which the kernels ask for; cuDNN is left out of training."""
        q, k, v = laid_out(q), laid_out(k), laid_out(v)
        keep = None if keep is None else aligned_rows(keep)
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
        with sdpa_kernel(_WITHOUT_CUDNN):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)

    def run_packed(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, scale: float) -> Tensor:
        """Torch's variable-length flash kernel where it takes the call, else through the padded form."""
        if not self.packs(AttentionSpec(q.device.type, q.dtype, q.shape[3], v.shape[2], "packed")):
            return self.run(q, unpack(k, packed.keep), unpack(v, packed.keep), packed.keep[:, None, None, :], scale)
        batch, heads, count, width = q.shape
        starts = torch.arange(0, batch * count + 1, count, dtype=torch.int32, device=q.device)
        # The kernel of torch 2.10 knows only the scale width ** -0.5: what differs from that goes into the queries.
        rows = q.transpose(1, 2).reshape(batch * count, heads, width) * (scale * width**0.5)
        from torch.nn.attention.varlen import varlen_attn  # its import compiles and sets environment variables

        out = varlen_attn(rows, k, v, starts, packed.starts, count, max(packed.lengths))
        assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
        return out.view(batch, count, heads, width).transpose(1, 2)


class Xformers:
    """`xformers.ops.memory_efficient_attention` on CUDA (the extra ``[xformers]``).

    Installed does not mean runnable: the wheel may be built for another CUDA. One real call there and back, for each
    dtype, kind of mask and pair of widths, decides, and its error is the reason given.
    """

    name = "xformers"

    def __init__(self) -> None:
        self._probed: dict[tuple[AttentionSpec, bool], str] = {}

    def reasons_against(self, spec: AttentionSpec) -> tuple[str, ...]:
        """Static reasons first; xformers is imported only when none holds, so never for CPU tensors."""
        reasons = []
        if spec.device != "cuda":
            reasons.append(f"it has no kernels for {spec.device} tensors")
        multiple = _WIDTH_MULTIPLE.get(spec.dtype)
        if multiple is None:
            reasons.append(f"it does not take {spec.dtype}")
        elif spec.head_dim % multiple or spec.value_dim % multiple:
            reasons.append(
                f"head widths must be multiples of {multiple} in {spec.dtype}, got {spec.head_dim} and {spec.value_dim}"
            )
        if torch.compiler.is_compiling():
            reasons.append("torch.compile does not trace it")
        if reasons:
            return tuple(reasons)
        # Its flash kernel's way back refuses while torch is told to be deterministic.
        kind = spec, torch.are_deterministic_algorithms_enabled()
        if kind not in self._probed:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # a trial's wait would end it
                return ("no trial call was made before this CUDA graph's capture",)
            self._probed[kind] = self._probe(spec)
        return (self._probed[kind],) if self._probed[kind] else ()

    def packs(self, spec: AttentionSpec) -> bool:
        """Always."""
        del spec
        return True

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """Tokens before heads, and the mask as an additive bias of the full shape, as the library wants them."""
        bias = None
        if keep is not None:
            shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            additive = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, float("-inf"))
            bias = aligned_rows(additive).expand(shape)
        out: Tensor = _xformers_ops().memory_efficient_attention(
            *(laid_out(tensor).transpose(1, 2) for tensor in (q, k, v)), attn_bias=bias, scale=scale
        )
        return out.transpose(1, 2)

    def run_packed(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, scale: float) -> Tensor:
        """A block-diagonal mask over one long row: no bias tensor and no padding."""
        ops = _xformers_ops()
        batch, heads, count, width = q.shape
        bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens([count] * batch, packed.lengths, device=q.device)
        rows = q.transpose(1, 2).reshape(1, batch * count, heads, width)
        out: Tensor = ops.memory_efficient_attention(rows, k[None], v[None], attn_bias=bias, scale=scale)
        return out.view(batch, count, heads, -1).transpose(1, 2)

    def _probe(self, spec: AttentionSpec) -> str:
        """The error of a trial call in words, or an empty string."""
        try:
            with torch.inference_mode(False), torch.enable_grad():
                self._trial_call(spec)
        except ImportError as error:
            return f"it is not installed or does not load ({error}); pip install 'tinyalign-vlm[xformers]'"
        except AttributeError as error:
            return f"this version lacks the operator ({error})"
        except Exception as error:  # noqa: BLE001  any failure of a foreign kernel is a reason, not a crash
            return f"a trial call failed ({type(error).__name__}: {' '.join(str(error).split())})"
        return ""

    def _trial_call(self, spec: AttentionSpec) -> None:
        """One call over two rows of 8 tokens and its backward, waited for: training picks a kernel of its own."""
        _xformers_ops()  # first: that it is missing says more than that there is no device
        q = torch.zeros(2, 1, 8, spec.head_dim, dtype=spec.dtype, device="cuda", requires_grad=True)
        v = torch.zeros(2, 1, 8, spec.value_dim, dtype=spec.dtype, device="cuda", requires_grad=True)
        keep = torch.ones(2, 8, dtype=torch.bool, device="cuda")
        if spec.mask == "packed":
            starts = torch.tensor([0, 8, 16], dtype=torch.int32, device="cuda")
            flat_k, flat_v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, v))
            packed = PackedTokens(flat_k, keep, starts, [8, 8], ~keep.any(1))
            out = self.run_packed(q, flat_k, flat_v, packed, 0.25)
        else:
            out = self.run(q, q, v, keep[:, None, None] if spec.mask == "dense" else None, 0.25)
        out.sum().backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _xformers_ops() -> Any:
    """`xformers.ops`; its first import may warn about kernels that it cannot load, which the trial call finds out."""
    if "xformers.ops" in sys.modules:
        return sys.modules["xformers.ops"]
    with _quiet("xformers"):
        return importlib.import_module("xformers.ops")


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)

    def drop(_record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(drop)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype a matrix product of this tensor runs in, autocast considered."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64 and _autocasts(tensor):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def padded_width(width: int, device: str, dtype: torch.dtype) -> int:
    """Head width rounded up to what fused 16-bit CUDA kernels take (a multiple of 8, and 16 at least)."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16) or (width % 8 == 0 and width >= 16):
        return width
    return max(16, width + -width % 8)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which operations on this tensor keep the dtype they are given."""
    return torch.autocast(tensor.device.type, enabled=False) if _autocasts(tensor) else nullcontext()


def _autocasts(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return kind in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(kind)


def aligned_rows(tensor: Tensor) -> Tensor:
    """The same tensor as a slice of a wider one whose rows hold a multiple of eight entries."""
    length = tensor.shape[-1]
    if length % 8 == 0:
        return tensor.contiguous()
    return F.pad(tensor, (0, -length % 8))[..., :length]


def laid_out(tensor: Tensor) -> Tensor:
    """The tensor as CUDA kernels read it: copied where it cannot be read in place.

    That is a slice of something wider whose rows do not begin at a multiple of what is read at once, and rows that the
    whole batch shares: cuDNN refused these until pytorch pull request 175764, and torch's memory-efficient kernel has
    read shared keys wrongly (pytorch issue 191937).
    """
    multiple = _WIDTH_MULTIPLE.get(tensor.dtype, 1)
    offset = 0 if torch.compiler.is_compiling() else tensor.storage_offset()  # which torch.compile cannot trace
    begins = (offset, *tensor.stride()[:-1])
    shared = tensor.shape[0] > 1 and tensor.stride(0) == 0
    fits = tensor.stride(-1) == 1 and (tensor.shape[-1] % multiple or not any(begin % multiple for begin in begins))
    return tensor if fits and not shared else tensor.contiguous()
