"""Asking a trained model benchmark questions, arm by arm, and what it was given to answer them.

Names are imported on first use: lmms-eval reads `tinyalign.evaluation.manifest` at its own start, without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyalign.evaluation.asking import Answer, Asker, Question
    from tinyalign.evaluation.local_tasks import local_task
    from tinyalign.evaluation.scores import exact_match, yes_no_scores

_MODULE_OF = {
    "Answer": "asking",
    "Asker": "asking",
    "Question": "asking",
    "exact_match": "scores",
    "local_task": "local_tasks",
    "yes_no_scores": "scores",
}

__all__ = ["Answer", "Asker", "Question", "exact_match", "local_task", "yes_no_scores"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'tinyalign.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
