"""Estimators of how much information a model uses, with units, intervals and known validity."""

from tinyalign.theory.collect import collect_nll
from tinyalign.theory.emi import (
    conditional_v_information,
    delta_emi,
    effective_mutual_information,
    pvi,
    v_information,
)
from tinyalign.theory.estimate import Bounds, Estimate
from tinyalign.theory.likelihood import sequence_nll
from tinyalign.theory.nll import NLLTable, TableMismatch
from tinyalign.theory.null_input import NullInput, train_null_input

__all__ = [
    "Bounds",
    "Estimate",
    "NLLTable",
    "NullInput",
    "TableMismatch",
    "collect_nll",
    "conditional_v_information",
    "delta_emi",
    "effective_mutual_information",
    "pvi",
    "sequence_nll",
    "train_null_input",
    "v_information",
]
