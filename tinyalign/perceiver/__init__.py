"""The Perceiver: exact encoder, compressor of image and caption, its training without a language model."""

from __future__ import annotations

from tinyalign.perceiver.attention import (
    AttentionBackendError,
    AttentionReport,
    attend,
    attention_report,
    use_attention_backend,
)
from tinyalign.perceiver.compressor import PerceiverCompressor, PerceiverSizes
from tinyalign.perceiver.encoder import PerceiverEncoder
from tinyalign.perceiver.pretrainer import PerceiverPretrainer, PretrainOutput

__all__ = [
    "AttentionBackendError",
    "AttentionReport",
    "PerceiverCompressor",
    "PerceiverEncoder",
    "PerceiverPretrainer",
    "PerceiverSizes",
    "PretrainOutput",
    "attend",
    "attention_report",
    "use_attention_backend",
]
