"""Retrieval-augmented alignment for small vision-language models, measured against its controls.

The parts are small ``torch.nn.Module``s that work alone; ``tinyalign.models`` composes them. Nothing is imported
until it is asked for: ``from tinyalign.memory import MemoryBank`` loads neither transformers nor the other packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "connectors": ("MLPConnector", "RAGConnector"),
    "memory": ("AttentionPooledKey", "MemoryBank", "build_memory_bank", "leakage_report", "precompute_neighbours"),
    "perceiver": ("PerceiverCompressor", "PerceiverEncoder", "PerceiverPretrainer", "attend"),
    "models": (
        "PairEncoder",
        "TinyAlignConfig",
        "TinyAlignProcessor",
        "TinyAlignVLM",
        "attach_memory",
        "splice_tokens",
    ),
    "theory": (
        "collect_nll",
        "conditional_v_information",
        "delta_emi",
        "effective_mutual_information",
        "v_information",
    ),
    "data": ("DigitScenes", "LlavaCollator", "LlavaDataset"),
}
_SUBMODULE_OF = {name: f"{__name__}.{package}" for package, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_SUBMODULE_OF]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _SUBMODULE_OF:
        return getattr(import_module(_SUBMODULE_OF[name]), name)
    raise AttributeError(f"module 'tinyalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
