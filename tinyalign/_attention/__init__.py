"""Attention with a choice of kernels, shared by the Perceiver and the pooling of the connectors.

It lies below the packages that use it, since these never import each other. `tinyalign.perceiver` publishes its names.
"""

from __future__ import annotations

from tinyalign._attention.backends import AttentionSpec, compute_dtype, padded_width, without_autocast
from tinyalign._attention.dispatch import (
    AttentionBackendError,
    AttentionReport,
    attend,
    attend_packed,
    attention_report,
    packs,
    use_attention_backend,
)
from tinyalign._attention.packing import PackedTokens, pack, unpack

__all__ = [
    "AttentionBackendError",
    "AttentionReport",
    "AttentionSpec",
    "PackedTokens",
    "attend",
    "attend_packed",
    "attention_report",
    "compute_dtype",
    "pack",
    "packs",
    "padded_width",
    "unpack",
    "use_attention_backend",
    "without_autocast",
]
