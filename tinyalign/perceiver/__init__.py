"""The Perceiver: exact encoder, compressor of image and caption, its training without a language model."""

from __future__ import annotations

from tinyalign._attention import (
    AttentionBackendError,
    AttentionReport,
    attend,
    attention_report,
    use_attention_backend,
)
from tinyalign.perceiver.compressor import PerceiverCompressor, PerceiverSizes
from tinyalign.perceiver.diagnostics import (
    CompressorDiagnostics,
    CompressorRecord,
    StoredValue,
    compressor_diagnostics,
)
from tinyalign.perceiver.encoder import PerceiverEncoder
from tinyalign.perceiver.pixels import PixelPerceiver, caption_bytes
from tinyalign.perceiver.pixels_folded import FoldedPixelPerceiver
from tinyalign.perceiver.pretrainer import LossWeights, PerceiverPretrainer, PretrainOutput
from tinyalign.perceiver.reconstruction import ReconstructionReport, evaluate_reconstruction

__all__ = [
    "AttentionBackendError",
    "AttentionReport",
    "CompressorDiagnostics",
    "CompressorRecord",
    "FoldedPixelPerceiver",
    "LossWeights",
    "PerceiverCompressor",
    "PerceiverEncoder",
    "PerceiverPretrainer",
    "PerceiverSizes",
    "PixelPerceiver",
    "PretrainOutput",
    "ReconstructionReport",
    "StoredValue",
    "attend",
    "attention_report",
    "caption_bytes",
    "compressor_diagnostics",
    "evaluate_reconstruction",
    "use_attention_backend",
]
