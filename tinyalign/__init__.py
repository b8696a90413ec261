"""Retrieval-augmented alignment for small vision-language models, measured against its controls.

The parts are small ``torch.nn.Module``s that work alone; ``tinyalign.models`` composes them. Nothing is imported
until it is asked for: ``from tinyalign.memory import MemoryBank`` loads neither transformers nor the other packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_SUBMODULE_OF: dict[str, str] = {}

__all__ = ["__version__", *_SUBMODULE_OF]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _SUBMODULE_OF:
        return getattr(import_module(_SUBMODULE_OF[name]), name)
    raise AttributeError(f"module 'tinyalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
