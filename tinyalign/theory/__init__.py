"""Estimators of how much information a model uses, with units, intervals and known validity."""

from tinyalign.theory.classifier import classifier_information
from tinyalign.theory.collect import collect_nll
from tinyalign.theory.decompose import Decomposition, LevelBounds, decompose, level_bounds
from tinyalign.theory.discrete import discrete_information, table_information
from tinyalign.theory.emi import (
    conditional_v_information,
    delta_emi,
    effective_mutual_information,
    pvi,
    v_information,
)
from tinyalign.theory.entropy import discrete_entropy, entropy, knn_entropy
from tinyalign.theory.estimate import Bounds, Estimate
from tinyalign.theory.information import conditional_mutual_information, mutual_information
from tinyalign.theory.kl import categorical_kl, kl_divergence, sequence_kl
from tinyalign.theory.kl_monte_carlo import monte_carlo_kl
from tinyalign.theory.kl_samples import kl_from_samples
from tinyalign.theory.ksg import conditional_ksg, ksg, mixed_ksg, ross
from tinyalign.theory.likelihood import sequence_nll
from tinyalign.theory.neural import JointCritic, SeparableCritic, club_upper_bound, neural_information
from tinyalign.theory.nll import NLLTable, TableMismatch
from tinyalign.theory.null_input import NullInput, train_null_input
from tinyalign.theory.world import EMITerms, emi_terms, irreducible_error, weighted_accuracy

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
