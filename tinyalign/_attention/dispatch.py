"""One attention function over interchangeable kernels: who runs is chosen per call, and a mask is never dropped."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tinyalign._attention.backends import AttentionSpec, Backend, Reference, Sdpa, Xformers, compute_dtype, padded_width
from tinyalign._attention.packing import PackedTokens

ENVIRONMENT_VARIABLE = "TINYALIGN_ATTENTION_BACKEND"

# The order in which "auto" asks. xformers comes first because only who installed the extra has it; on the CPU and
# under torch.compile it always declines.
BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in (Xformers(), Sdpa(), Reference())}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("tinyalign_attention_backend", default=None)
_last_run: dict[AttentionSpec, tuple[str, str]] = {}


class AttentionBackendError(ValueError):
    """A backend was asked for by name and cannot run the call; the message gives every reason."""


class AttentionReport(NamedTuple):
    """What would run for one kind of call, why, and why each other backend would not.

    Args:
        backend: the one that would run; None when such a call would raise.
        chosen_by: what named it: an argument, a ``with`` block, the environment, or auto.
        reasons: why each backend could not; empty for those that can.
        ran: the calls made so far in this process, with backend and who chose it.
        asked: what was asked for, a backend's name or "auto".
    """

    backend: str | None
    chosen_by: str
    reasons: dict[str, tuple[str, ...]]
    ran: dict[AttentionSpec, tuple[str, str]]
    asked: str = "auto"

    def __str__(self) -> str:
        lines = [f"{self.backend} runs (chosen by {self.chosen_by})"]
        if self.backend is None:
            lines = [f"nothing runs, asked for {self.asked!r} (chosen by {self.chosen_by})"]
        for name, reasons in self.reasons.items():
            lines.append(f"  {name}: " + ("available" if not reasons else "; ".join(reasons)))
        lines += [f"  ran {name} ({chosen_by}): {spec}" for spec, (name, chosen_by) in self.ran.items()]
        return "\n".join(lines)


def _requested() -> tuple[str, str]:
    """The backend asked for outside the call. Under torch.compile this is read once, when the graph is traced."""
    forced = _forced.get()
    if forced is not None:
        return forced, "use_attention_backend"
    return os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE


# What torch.compiler.assume_constant_result sets. Calling it would import the compiler, which changes the environment
# and the warning filters of everyone who imports this package.
_requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(spec: AttentionSpec, backend: str) -> tuple[Backend, str]:
    name, chosen_by = (backend, "the argument") if backend != "auto" else _requested()
    if name == "auto":
        able = [candidate for candidate in BACKENDS.values() if not candidate.reasons_against(spec)]
        return able[0], "auto"  # the reference is always among them
    if name not in BACKENDS:
        raise AttentionBackendError(
            f"attend: backend must be one of {['auto', *BACKENDS]}, got {name!r} from {chosen_by}. "
            "Name one of these or leave the choice to 'auto'."
        )
    reasons = BACKENDS[name].reasons_against(spec)
    if reasons:
        raise AttentionBackendError(
            f"attend: backend must be able to run the call, got {name!r} from {chosen_by}, which cannot: "
            f"{'; '.join(reasons)}. Use backend='auto' to fall back."
        )
    return BACKENDS[name], chosen_by


@contextmanager
def use_attention_backend(backend: str) -> Iterator[None]:
    """Force the attention backend inside a ``with`` block; an argument of `attend` itself still wins.

    Args:
        backend: "auto", "xformers", "sdpa" or "reference". "auto" undoes an outer block or the environment.

    Raises:
        AttentionBackendError: no backend has this name.

    Example:
        >>> import torch
        >>> q = torch.ones(1, 1, 2, 4)
        >>> with use_attention_backend("reference"):
        ...     attend(q, q, q).shape
        torch.Size([1, 1, 2, 4])
    """
    if backend != "auto" and backend not in BACKENDS:
        raise AttentionBackendError(
            f"use_attention_backend: backend must be one of {['auto', *BACKENDS]}, got {backend!r}. "
            "Name one of these or leave the choice to 'auto'."
        )
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T scale) v, through the best kernel that can run the call.

    Who decides: the argument, then `use_attention_backend`, then the environment variable
    ``TINYALIGN_ATTENTION_BACKEND``, then "auto". "auto" falls back silently; a backend asked for by name that cannot
    run the call raises with every reason. A query that may look at no key gives zeros, never NaN. Under autocast q, k
    and v take its dtype. Keys and values must be finite where the mask hides them too: zero times NaN is NaN.

    Args:
        q: queries.
        k: keys.
        v: values; their width may differ from that of the keys.
        keep: which keys count. None keeps all.
        scale: factor on the scores; None is ``head_dim ** -0.5``.
        backend: "auto", "xformers", "sdpa" or "reference".

    Shape:
        q: (B, H, M, d) or (1, H, M, d), float. k: (B, H, N, d). v: (B, H, N, e). keep: (B, N), bool, or anything
        with four axes that broadcasts to (B, H, M, N). returns: (B, H, M, e).

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: tensors of different dtype or of integers, or a mask that is not boolean.
        AttentionBackendError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
        >>> v = torch.tensor([1.0, 3.0, 50.0]).view(1, 1, 3, 1)
        >>> attend(q, k, v, keep=torch.tensor([[True, True, False]])).item()
        2.0
    """
    q, k, v = (tensor.to(compute_dtype(tensor)) for tensor in (q, k, v))  # autocast treats attention as a product
    _check(q, k, v, keep)
    if q.shape[0] != k.shape[0]:
        q = q.expand(k.shape[0], -1, -1, -1)
    spec = AttentionSpec(q.device.type, q.dtype, q.shape[3], v.shape[3], "none" if keep is None else "dense")
    chosen, chosen_by = _choose(spec, backend)
    if q.shape[0] == 0 or k.shape[2] == 0:  # no rows or no keys: some kernels cannot be launched over nothing
        return v.new_zeros(*q.shape[:3], v.shape[3])
    some = None
    if keep is not None:
        keep = keep[:, None, None, :] if keep.dim() == 2 else keep
        # A row without keys would be NaN in some kernels: let it look everywhere, then blank the result.
        some = keep.any(dim=-1, keepdim=True)
        keep = keep | ~some
    if not torch.compiler.is_compiling():
        _last_run[spec] = (chosen.name, chosen_by)
    out = chosen.run(q, k, v, keep, q.shape[3] ** -0.5 if scale is None else scale)
    return out if some is None else out.masked_fill(~some, 0.0)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """`attend` over ragged rows whose padding was left out: the same result as with the mask.

    xformers runs it as a block-diagonal mask, torch as variable-length flash attention (16 bit on CUDA); anything else
    goes through the padded form. The choice is made as in `attend`.

    Args:
        q: queries.
        k: keys of all rows, end to end.
        v: values of all rows.
        packed: which token belongs to which row.
        scale: factor on the scores; None is ``head_dim ** -0.5``.
        backend: "auto", "xformers", "sdpa" or "reference".

    Shape:
        q: (B, H, M, d) or (1, H, M, d). k: (total, H, d). v: (total, H, e). returns: (B, H, M, e).

    Raises:
        ValueError: keys that are not as many as the packed tokens.
        AttentionBackendError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> from tinyalign._attention.packing import pack
        >>> packed = pack(torch.tensor([[[1.0], [3.0]], [[5.0], [9.0]]]), torch.tensor([[True, True], [True, False]]))
        >>> q, k = torch.zeros(1, 1, 1, 4), torch.zeros(3, 1, 4)
        >>> attend_packed(q, k, packed.tokens[:, None], packed).flatten().tolist()
        [2.0, 5.0]
    """
    total = packed.tokens.shape[0]
    if k.dim() != 3 or v.dim() != 3 or k.shape[0] != total or v.shape[0] != total:
        raise ValueError(
            f"attend_packed: k and v must have shape ({total}, heads, width), one per packed token, got "
            f"{tuple(k.shape)} and {tuple(v.shape)}. Project the packed tokens."
        )
    q = q.expand(packed.keep.shape[0], -1, -1, -1)
    spec = AttentionSpec(q.device.type, q.dtype, q.shape[3], v.shape[2], "packed")
    chosen, chosen_by = _choose(spec, backend)
    if q.shape[0] == 0:
        return v.new_zeros(*q.shape[:3], v.shape[2])
    _last_run[spec] = (chosen.name, chosen_by)
    out = chosen.run_packed(q, k, v, packed, q.shape[3] ** -0.5 if scale is None else scale)
    return out.masked_fill(packed.empty[:, None, None, None], 0.0)


def packs(spec: AttentionSpec) -> bool:
    """Whether a call over packed rows would run without their padding; where it would not, packing is work for nothing.

    Never raises: a backend asked for by name that cannot run packed rows may still run padded ones.
    """
    name, _ = _requested()
    asked = BACKENDS.values() if name == "auto" else [BACKENDS[name]] if name in BACKENDS else []
    return next((backend.packs(spec) for backend in asked if not backend.reasons_against(spec)), False)


def attention_report(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    head_dim: int = 12,
    mask: Literal["none", "dense", "packed"] = "none",
) -> AttentionReport:
    """Say which attention kernel runs for a kind of call and why the others do not.

    Args:
        device: where the tensors are.
        dtype: their dtype.
        head_dim: width of a head; the Perceiver of the paper has 96 / 8 = 12. As its layers do, this counts as 16 on
            CUDA in 16 bit; `attend` itself takes widths as they are.
        mask: "none"; "dense", a boolean mask; or "packed", ragged rows without their padding.

    Example:
        >>> report = attention_report("cpu")
        >>> report.backend
        'sdpa'
        >>> report.reasons["xformers"]
        ('it has no kernels for cpu tensors',)
    """
    kind = torch.device(device).type
    width = padded_width(head_dim, kind, dtype)
    spec = AttentionSpec(kind, dtype, width, width, mask)
    absent = ("torch finds no CUDA device",) if kind == "cuda" and not torch.cuda.is_available() else ()
    reasons = {name: absent + backend.reasons_against(spec) for name, backend in BACKENDS.items()}
    asked, chosen_by = _requested()
    able = [name for name, against in reasons.items() if not against and asked in ("auto", name)]
    runs = able[0] if able else None
    return AttentionReport(runs, "auto" if asked == "auto" else chosen_by, reasons, dict(_last_run), asked)


def _check(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"attend: {name} must have four axes (batch, heads, tokens, width), got shape {tuple(tensor.shape)}. "
                "Split the heads first."
            )
    if q.dtype != k.dtype or k.dtype != v.dtype or not q.is_floating_point():
        raise TypeError(
            f"attend: q, k and v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}. Cast them to one."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "attend: k and v must share batch, heads and tokens, and q and k heads and width, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}. Check the projections that made them."
        )
    if q.shape[3] == 0:
        raise ValueError(
            f"attend: q and k must have a width of at least 1, got {tuple(q.shape)}. Check the head width."
        )
    if q.shape[0] not in (1, k.shape[0]):
        raise ValueError(
            f"attend: q must have the batch of k or a batch of 1, got {q.shape[0]} and {k.shape[0]}. Expand it."
        )
    if keep is None:
        return
    if keep.dtype != torch.bool:
        raise TypeError(
            f"attend: keep must be boolean, True = keep, got {keep.dtype}. Use `mask.bool()`, or `mask == 0` for an "
            "additive one."
        )
    full = (k.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = (
        tuple(keep.shape) == (full[0], full[3])
        if keep.dim() == 2
        else keep.dim() == 4
        and keep.shape[3] == full[3]
        and all(size in (1, whole) for size, whole in zip(keep.shape, full, strict=True))
    )
    if not fits:
        raise ValueError(
            f"attend: keep must have shape {(full[0], full[3])} or broadcast to {full}, got {tuple(keep.shape)}. "
            "Give one row of key positions per batch row."
        )
