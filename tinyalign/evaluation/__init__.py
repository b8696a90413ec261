"""Asking a trained model benchmark questions, arm by arm; and what studies of many runs share.

Names are imported on first use: lmms-eval reads `tinyalign.evaluation.manifest` at its own start, without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyalign.evaluation.asking import Answer, Asker, Question
    from tinyalign.evaluation.local_tasks import local_task
    from tinyalign.evaluation.plots import ArmRow, page_figure, plot_arms
    from tinyalign.evaluation.report import write_report
    from tinyalign.evaluation.scores import exact_match, yes_no_scores
    from tinyalign.evaluation.studies import (
        KeptRuns,
        SeedComparison,
        compare_seeds,
        markdown_table,
        over_seeds,
        setting_name,
        write_csv,
    )

_MODULE_OF = {
    "Answer": "asking",
    "ArmRow": "plots",
    "Asker": "asking",
    "KeptRuns": "studies",
    "Question": "asking",
    "SeedComparison": "studies",
    "compare_seeds": "studies",
    "exact_match": "scores",
    "local_task": "local_tasks",
    "markdown_table": "studies",
    "over_seeds": "studies",
    "page_figure": "plots",
    "plot_arms": "plots",
    "setting_name": "studies",
    "write_csv": "studies",
    "write_report": "report",
    "yes_no_scores": "scores",
}

__all__ = [
    "Answer",
    "ArmRow",
    "Asker",
    "KeptRuns",
    "Question",
    "SeedComparison",
    "compare_seeds",
    "exact_match",
    "local_task",
    "markdown_table",
    "over_seeds",
    "page_figure",
    "plot_arms",
    "setting_name",
    "write_csv",
    "write_report",
    "yes_no_scores",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'tinyalign.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
