"""The kernels behind `attend`, each a small record that says what it cannot run and runs the rest."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_WIDTH_MULTIPLE = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}
# cuDNN's backward gives NaN query gradients on H100/H200 for some masked lengths (pytorch issue 196678).
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionSpec(NamedTuple):
    """The static facts of a call that decide which kernel can run it."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    masked: bool


class Backend(Protocol):
    """A kernel: `reasons_against` is empty when `run` can take the call."""

    @property
    def name(self) -> str:
        """Name used in `attend(backend=...)`."""

    def reasons_against(self, spec: AttentionSpec) -> tuple[str, ...]:
        """Every reason why this kernel cannot run such a call."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """Attention over (B, H, tokens, width); `keep` has four axes and no row without a key."""


class Reference:
    """The formula written out, for checks and for devices without a fused kernel."""

    name = "reference"

    def reasons_against(self, spec: AttentionSpec) -> tuple[str, ...]:
        """Never any: it runs everywhere."""
        del spec
        return ()

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """Softmax in float32 at least, whatever the dtype of the inputs."""
        scores = (q @ k.transpose(-1, -2)) * scale
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
        return scores.softmax(dim=-1, dtype=wide).to(v.dtype) @ v


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


class Xformers:
    """`xformers.ops.memory_efficient_attention` on CUDA (the extra ``[xformers]``).

    Installed does not mean runnable: the wheel may be built for another CUDA. One real call per device and dtype
    decides, and its error is the reason given.
    """

    name = "xformers"

    def __init__(self) -> None:
        self._probed: dict[tuple[torch.dtype, bool], str] = {}

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
        key = (spec.dtype, spec.masked)
        if key not in self._probed:
            self._probed[key] = self._probe(*key)
        return (self._probed[key],) if self._probed[key] else ()

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        """Tokens before heads, and the mask as an additive bias of the full shape, as the library wants them."""
        import xformers.ops as ops

        bias = None
        if keep is not None:
            shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            additive = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, float("-inf"))
            bias = aligned_rows(additive).expand(shape)
        out: Tensor = ops.memory_efficient_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias, scale=scale
        )
        return out.transpose(1, 2)

    def _probe(self, dtype: torch.dtype, masked: bool) -> str:
        """The error of a trial call in words, or an empty string."""
        try:
            self._trial_call(dtype, masked)
        except ImportError:
            return "it is not installed (pip install 'tinyalign-vlm[xformers]')"
        except AttributeError as error:
            return f"this version lacks the operator ({error})"
        except Exception as error:  # noqa: BLE001  any failure of a foreign kernel is a reason, not a crash
            first_line = (str(error).strip().splitlines() or [""])[0]
            return f"a trial call failed ({type(error).__name__}: {first_line})"
        return ""

    def _trial_call(self, dtype: torch.dtype, masked: bool) -> None:
        """One call over 16 tokens, waited for."""
        q = torch.zeros(1, 1, 16, 16, dtype=dtype, device="cuda")
        keep = torch.ones(1, 1, 1, 16, dtype=torch.bool, device="cuda") if masked else None
        self.run(q, q, q, keep, 0.25)
        torch.cuda.synchronize()


def aligned_rows(tensor: Tensor) -> Tensor:
    """The same tensor as a slice of a wider one whose rows hold a multiple of eight entries."""
    length = tensor.shape[-1]
    if length % 8 == 0:
        return tensor.contiguous()
    return F.pad(tensor, (0, -length % 8))[..., :length]
