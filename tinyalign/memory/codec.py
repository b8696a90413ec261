"""How values are kept: as floats, or as centred int8 with one scale per entry."""

from __future__ import annotations

import torch
from torch import Tensor

KEY_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
VALUE_DTYPES = {**KEY_DTYPES, "int8": torch.int8}


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


class ValueCodec:
    """Turn float values into what is stored and back.

    int8 keeps ``round((value - center) / scale)`` with ``scale = max|value - center| / 127`` per entry, so that no
    entry saturates. The center is the mean over entries, position by position: most of a latent's norm is common to all
    entries, and centring spends the 8 bits on what differs. It is fixed by the first entries added.

    Args:
        dtype: what is stored; float16, bfloat16, float32 or int8.
        center: (V,) float32, for int8; fitted by the first ``encode`` when absent.

    Example:
        >>> codec = ValueCodec(torch.int8)
        >>> values = torch.linspace(-1, 1, 12).reshape(3, 4)
        >>> stored, scales = codec.encode(values)
        >>> bool((codec.decode(stored, scales) - values).abs().max() < 0.01)
        True
    """

    def __init__(self, dtype: torch.dtype, center: Tensor | None = None) -> None:
        self.dtype = dtype
        self.center = center

    @property
    def quantised(self) -> bool:
        """True when entries carry a scale of their own."""
        return self.dtype == torch.int8

    @property
    def decoded_dtype(self) -> torch.dtype:
        """The dtype that ``decode`` returns: the stored one, or float32 for int8."""
        return torch.float32 if self.quantised else self.dtype

    def fit(self, values: Tensor) -> Tensor:
        """Return the center that ``values`` (M, V) ask for, without keeping it."""
        return values.to(torch.float64).mean(0).to(torch.float32)

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Store float values (M, V): what goes to disk, and one float32 scale per entry for int8."""
        if not self.quantised:
            return values.to(self.dtype), None
        if self.center is None:
            self.center = self.fit(values)
        centred = values.to(torch.float32) - self.center
        scales = centred.abs().amax(-1).div(127).clamp_min(torch.finfo(torch.float32).tiny)
        return (centred / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales

    def decode(self, stored: Tensor, scales: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Return values (n, V) as ``decoded_dtype``; those of int8 are written to ``out`` if given."""
        if not self.quantised:
            return stored
        assert scales is not None
        assert self.center is not None
        out = torch.empty(stored.shape) if out is None else out
        return torch.addcmul(self.center, out.copy_(stored), scales[:, None], out=out)
