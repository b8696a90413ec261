"""The kernels behind `attend`, each a small record that says what it cannot run and runs the rest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyalign._attention.packing import PackedTokens, unpack

_WIDTH_MULTIPLE = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}
# cuDNN's backward gives NaN query gradients on H100/H200 for some masked lengths (pytorch issue 196678).
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

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """In float32 at least, whatever the dtype of the inputs: the result is rounded once."""
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
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

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """The mask goes in as bool; on CUDA it lies in rows of a multiple of eight, which the kernels ask for."""
        if keep is None or not q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
        keep = aligned_rows(keep)
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
        with sdpa_kernel(_WITHOUT_CUDNN):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)

    def run_packed(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, scale: float) -> Tensor:
        """Torch's variable-length flash kernel where it exists (16 bit on CUDA), else through the padded form."""
        if not _varlen_takes(q, v):
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

    Installed does not mean runnable: the wheel may be built for another CUDA. One real call per device and dtype
    decides, and its error is the reason given.
    """

    name = "xformers"

    def __init__(self) -> None:
        self._probed: dict[tuple[torch.dtype, str], str] = {}

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
        key = (spec.dtype, spec.mask)
        if key not in self._probed:
            self._probed[key] = self._probe(*key)
        return (self._probed[key],) if self._probed[key] else ()

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """Tokens before heads, and the mask as an additive bias of the full shape, as the library wants them."""
        bias = None
        if keep is not None:
            shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            additive = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, float("-inf"))
            bias = aligned_rows(additive).expand(shape)
        out: Tensor = _xformers_ops().memory_efficient_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias, scale=scale
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

    def _probe(self, dtype: torch.dtype, mask: str) -> str:
        """The error of a trial call in words, or an empty string."""
        try:
            self._trial_call(dtype, mask)
        except ImportError as error:
            return f"it is not installed or does not load ({error}); pip install 'tinyalign-vlm[xformers]'"
        except AttributeError as error:
            return f"this version lacks the operator ({error})"
        except Exception as error:  # noqa: BLE001  any failure of a foreign kernel is a reason, not a crash
            return f"a trial call failed ({type(error).__name__}: {' '.join(str(error).split())})"
        return ""

    def _trial_call(self, dtype: torch.dtype, mask: str) -> None:
        """One call over 16 tokens, waited for."""
        q = torch.zeros(1, 1, 16, 16, dtype=dtype, device="cuda")
        keep = torch.ones(1, 16, dtype=torch.bool, device="cuda")
        if mask == "packed":
            starts = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
            flat = q[0].transpose(0, 1)
            self.run_packed(q, flat, flat, PackedTokens(flat, keep, starts, [16], ~keep.any(1)), 0.25)
        else:
            self.run(q, q, q, keep[:, None, None] if mask == "dense" else None, 0.25)
        torch.cuda.synchronize()


def _xformers_ops() -> Any:
    """`xformers.ops`; its first import may warn about kernels that it cannot load, which the trial call finds out."""
    with _quiet("xformers"):
        import xformers.ops

    return xformers.ops


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


def _varlen_takes(q: Tensor, v: Tensor) -> bool:
    width = q.shape[3]
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and width == v.shape[-1] and width % 8 == 0


def aligned_rows(tensor: Tensor) -> Tensor:
    """The same tensor as a slice of a wider one whose rows hold a multiple of eight entries."""
    length = tensor.shape[-1]
    if length % 8 == 0:
        return tensor.contiguous()
    return F.pad(tensor, (0, -length % 8))[..., :length]
