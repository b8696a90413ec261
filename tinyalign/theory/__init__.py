"""Estimators of how much information a model uses, with units, intervals and known validity.

Names are loaded when they are first used: scipy and scikit-learn, which change warning filters and the environment when
they are imported, stay away until an estimator needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyalign.theory.classifier import classifier_information
    from tinyalign.theory.collect import collect_nll
    from tinyalign.theory.decomposition import Decomposition, LevelBounds, decompose, level_bounds
    from tinyalign.theory.discrete import discrete_information, table_information
    from tinyalign.theory.emi import (
        conditional_v_information,
        delta_emi,
        effective_mutual_information,
        pvi,
        v_information,
    )
    from tinyalign.theory.entropies import discrete_entropy, entropy, knn_entropy
    from tinyalign.theory.estimate import Bounds, Estimate
    from tinyalign.theory.information import conditional_mutual_information, mutual_information
    from tinyalign.theory.kl import categorical_kl, kl_divergence, sequence_kl
    from tinyalign.theory.kl_monte_carlo import monte_carlo_kl
    from tinyalign.theory.kl_samples import kl_from_samples
    from tinyalign.theory.likelihood import sequence_nll
    from tinyalign.theory.nearest import conditional_ksg, ksg, mixed_ksg, ross
    from tinyalign.theory.neural import JointCritic, SeparableCritic, club_upper_bound, neural_information
    from tinyalign.theory.nll import NLLTable, TableMismatch
    from tinyalign.theory.null_input import NullInput, train_null_input
    from tinyalign.theory.world import EMITerms, emi_terms, irreducible_error, weighted_accuracy

_HOME = {
    "classifier": ("classifier_information",),
    "collect": ("collect_nll",),
    "decomposition": (
        "Decomposition",
        "LevelBounds",
        "decompose",
        "level_bounds",
    ),
    "discrete": (
        "discrete_information",
        "table_information",
    ),
    "emi": (
        "conditional_v_information",
        "delta_emi",
        "effective_mutual_information",
        "pvi",
        "v_information",
    ),
    "entropies": (
        "discrete_entropy",
        "entropy",
        "knn_entropy",
    ),
    "estimate": (
        "Bounds",
        "Estimate",
    ),
    "information": (
        "conditional_mutual_information",
        "mutual_information",
    ),
    "kl": (
        "categorical_kl",
        "kl_divergence",
        "sequence_kl",
    ),
    "kl_monte_carlo": ("monte_carlo_kl",),
    "kl_samples": ("kl_from_samples",),
    "nearest": (
        "conditional_ksg",
        "ksg",
        "mixed_ksg",
        "ross",
    ),
    "likelihood": ("sequence_nll",),
    "neural": (
        "JointCritic",
        "SeparableCritic",
        "club_upper_bound",
        "neural_information",
    ),
    "nll": (
        "NLLTable",
        "TableMismatch",
    ),
    "null_input": (
        "NullInput",
        "train_null_input",
    ),
    "world": (
        "EMITerms",
        "emi_terms",
        "irreducible_error",
        "weighted_accuracy",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Bounds",
    "Decomposition",
    "EMITerms",
    "Estimate",
    "JointCritic",
    "LevelBounds",
    "NLLTable",
    "NullInput",
    "SeparableCritic",
    "TableMismatch",
    "categorical_kl",
    "classifier_information",
    "club_upper_bound",
    "collect_nll",
    "conditional_ksg",
    "conditional_mutual_information",
    "conditional_v_information",
    "decompose",
    "delta_emi",
    "discrete_entropy",
    "discrete_information",
    "effective_mutual_information",
    "emi_terms",
    "entropy",
    "irreducible_error",
    "kl_divergence",
    "kl_from_samples",
    "knn_entropy",
    "ksg",
    "level_bounds",
    "mixed_ksg",
    "monte_carlo_kl",
    "mutual_information",
    "neural_information",
    "pvi",
    "ross",
    "sequence_kl",
    "sequence_nll",
    "table_information",
    "train_null_input",
    "v_information",
    "weighted_accuracy",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _MODULE_OF:
        return getattr(import_module(f"tinyalign.theory.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'tinyalign.theory' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
