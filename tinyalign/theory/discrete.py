"""Mutual information between labels, with the corrections for finite samples side by side."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from tinyalign.theory._input import as_labels, as_numpy
from tinyalign.theory.entropies import (
    DISCRETE_METHODS,
    bias_warnings,
    discrete_entropy,
    jackknife_shift,
    undersampling_warnings,
)
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.intervals import entropy_interval, information_interval
from tinyalign.theory.inversion import CELLS, simulated_entropy, simulated_information

__all__ = ["conditional_discrete_information", "discrete_information", "table_information"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_PERMUTATIONS = 5


def discrete_information(x: Any, y: Any, *, method: str = "auto", level: float = 0.95, seed: int = 0) -> Estimate:
    """Estimate mutual information between two label columns.

    Where every joint outcome is seen often, Miller and Madow's correction is used: Grassberger's is as good on average
    and flickers with the parity of each count. Where it is not, all corrections leave a
    bias that grows with the alphabet; the plug-in value is then rescaled so that shuffled labels give zero and a copy
    gives its entropy ("null_adjusted"), and the record says so.

    Args:
        x: labels.
        y: labels, row by row with x.
        method: ``"auto"``, ``"plugin"``, ``"miller_madow"``, ``"grassberger"``, ``"chao_shen"`` or ``"null_adjusted"``.
        level: nominal coverage.
        seed: seed of the shuffles behind the null value.

    Shape:
        x, y: (n,) labels, or (n, d) rows that are joint labels.

    Units:
        nats.

    Raises:
        ValueError: unequal lengths, NaN, or an unknown method.

    Source:
        Miller 1955; Grassberger 2003; Chao and Shen 2003; the rescaling is the adjusted mutual information of Vinh et
        al. 2010 with the smaller entropy as its maximum.

    Example:
        >>> discrete_information([0, 0, 1, 1] * 50, ["a", "a", "b", "b"] * 50, method="plugin").value.__round__(4)
        0.6931
    """
    methods = (*DISCRETE_METHODS, "null_adjusted")
    if method not in ("auto", *methods):
        names = ", ".join(("auto", *methods))
        raise ValueError(f"discrete_information: method must be one of {names}, got {method!r}. Use one of them.")
    left, right = as_labels(x, "discrete_information", "x"), as_labels(y, "discrete_information", "y")
    if len(left) != len(right):
        raise ValueError(
            f"discrete_information: x and y must have equal lengths, got {len(left)} and {len(right)}. "
            "Pair them row by row."
        )
    n = len(left)
    cells = left * (int(right.max()) + 1) + right
    _, cell, joint = np.unique(cells, return_inverse=True, return_counts=True)
    count_x, count_y = np.bincount(left), np.bincount(right)
    values = {name: _from_counts(count_x, count_y, joint, name) for name in DISCRETE_METHODS}
    warnings = undersampling_warnings(joint)
    null = math.nan
    if warnings or method == "null_adjusted":
        null = _shuffled(left, right, seed)
        ceiling = min(discrete_entropy(count_x, "plugin"), discrete_entropy(count_y, "plugin"))
        room = ceiling - null
        values["null_adjusted"] = (values["plugin"] - null) * ceiling / room if room > 1e-9 else 0.0
    chosen = ("null_adjusted" if warnings else "miller_madow") if method == "auto" else method
    local = np.log(joint[cell] / n) - np.log(count_x[left] / n) - np.log(count_y[right] / n)
    value = values[chosen]
    if chosen == "null_adjusted":
        warnings += (f"null: labels shuffled against each other give {null:.3f} nats, which this value takes out",)
        low, high, error = information_interval(value, local, (len(count_x) - 1) * (len(count_y) - 1), level)
    else:
        shift = jackknife_shift(count_x) + jackknife_shift(count_y) - jackknife_shift(joint)
        codes = np.zeros_like(left), left, right
        low, high, error, said = _interval(values["miller_madow"], local, codes, shift, level)
        warnings += said
        # The interval is that of the information whatever the correction, and reaches as far as the estimate.
        low, high = min(low, value), max(high, value)
    if min(left.max(), right.max()) == 0:
        warnings += ("constant: all labels of a side are one, which nothing can say more of",)
    return Estimate(
        value,
        low,
        high,
        method=chosen,
        n=n,
        samples=local + (value - float(local.mean())),
        candidates=values,
        warnings=warnings,
        level=level,
        std_error=error,
        details={"cells": len(joint), "null": null},
    )


def conditional_discrete_information(x: IntArray, y: IntArray, z: IntArray, *, level: float = 0.95) -> Estimate:
    """Estimate I(X; Y | Z) of label codes from counts, with Miller and Madow's correction.

    Args:
        x: labels 0..a-1.
        y: labels 0..b-1.
        z: labels 0..c-1, what is given.
        level: nominal coverage.

    Shape:
        x, y, z: (n,).

    Units:
        nats.

    Source:
        Cover and Thomas 2006, section 2.5 (the chain rule).

    Example:
        >>> z = np.repeat([0, 1], 500)
        >>> round(conditional_discrete_information(z, z, z).value, 6)
        0.0
    """
    n = len(z)
    alone = np.bincount(z)
    with_x, with_y = (z * (int(side.max()) + 1) + side for side in (x, y))
    (at_x, count_x), (at_y, count_y), (at, count) = (
        np.unique(codes, return_inverse=True, return_counts=True)[1:]
        for codes in (with_x, with_y, with_x * (int(y.max()) + 1) + y)
    )
    local = np.log(alone[z]) + np.log(count[at]) - np.log(count_x[at_x]) - np.log(count_y[at_y])
    parts = ((1, count_x), (1, count_y), (-1, count), (-1, alone))
    value = sum(sign * discrete_entropy(counts, "miller_madow") for sign, counts in parts)
    shift = sum(sign * jackknife_shift(counts) for sign, counts in parts)
    low, high, error, said = _interval(value, local, (z, x, y), shift, level)
    warnings = undersampling_warnings(count) + said
    return Estimate(
        value,
        low,
        high,
        method="chain rule, miller_madow",
        n=n,
        samples=local + (value - float(local.mean())),
        warnings=warnings,
        level=level,
        std_error=error,
    )


def _interval(
    value: float, local: FloatArray, codes: tuple[IntArray, IntArray, IntArray], shift: float, level: float
) -> tuple[float, float, float, tuple[str, ...]]:
    """Interval of I(X; Y | Z), its standard error and what it does not hold.

    Args:
        value: the estimate with Miller and Madow's correction.
        local: fitted log ratios of the samples.
        codes: labels of z, x and y.
        shift: by how much the jackknife exceeds ``value``.
        level: nominal coverage.
    """
    _, many, other = (int(side.max()) + 1 for side in codes)
    cells, counts = np.unique((codes[0] * many + codes[1]) * other + codes[2], return_counts=True)
    layer, row, column = cells // (many * other), cells // other, cells // (many * other) * other + cells % other
    rows, columns = (np.bincount(np.unique(side) // size) for side, size in ((row, many), (column, other)))
    if len(cells) in (rows.sum(), columns.sum()):
        # Given z, one side is a function of the other: the information is the entropy of that side.
        outcomes = columns if len(cells) == rows.sum() else rows
        if outcomes.max() == 1:
            return value, value, 0.0, ()
        ceiling = float(np.log(outcomes)[codes[0]].mean())
        low, high, error = entropy_interval(value, local, ceiling, int((outcomes - 1).sum()), level)
        if len(outcomes) == 1 and outcomes[0] <= CELLS:
            sizes = np.bincount(codes[2] if outcomes is columns else codes[1])
            low, high, error = simulated_entropy(sizes, (low, high), level)
            low, high = min(low, value), max(high, value)
        line = (
            f"deterministic: one side is a function of the other in these {len(local)} samples; the interval is that "
            "of its entropy, and exceptions too rare to be seen are not in it"
        )
        return low, high, error, (line,)
    low, high, error = information_interval(value, local, int(((rows - 1) * (columns - 1)).sum()), level)
    shape = int(layer.max()) + 1, many, other
    if math.prod(shape) > CELLS:
        return low, high, error, bias_warnings(counts, shift, error)
    table = np.zeros(shape, dtype=np.int64)
    table.reshape(-1)[cells] = counts
    found = simulated_information(table, (low, high), level)
    return min(found.low, value), max(found.high, value), found.error, ()


def table_information(joint: Any) -> float:
    """Compute mutual information exactly from a joint table of probabilities.

    Args:
        joint: the table; it sums to one.

    Shape:
        joint: (X, Y).

    Units:
        nats.

    Raises:
        ValueError: not a table of probabilities that sum to one.

    Example:
        >>> round(table_information([[0.5, 0.0], [0.0, 0.5]]), 6)
        0.693147
    """
    table = as_numpy(joint).astype(np.float64)
    if table.ndim != 2 or not np.isfinite(table).all() or (table < 0).any() or abs(table.sum() - 1.0) > 1e-6:
        raise ValueError(
            f"table_information: joint must be a table of probabilities that sum to 1, got shape {table.shape} and sum "
            f"{table.sum():.6g}. Normalise it first."
        )
    product = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True)
    return float(rel_entr(table, product).sum())


def _from_counts(count_x: IntArray, count_y: IntArray, joint: IntArray, method: str) -> float:
    parts = (discrete_entropy(counts, method) for counts in (count_x, count_y, joint))
    left, right, both = parts
    return left + right - both


def _shuffled(left: IntArray, right: IntArray, seed: int) -> float:
    """Mean plug-in information of the labels when y is shuffled."""
    rng = np.random.default_rng(seed)
    width = int(right.max()) + 1
    margins = discrete_entropy(np.bincount(left), "plugin") + discrete_entropy(np.bincount(right), "plugin")
    total = 0.0
    for _ in range(_PERMUTATIONS):
        counts = np.unique(left * width + rng.permutation(right), return_counts=True)[1]
        total += margins - discrete_entropy(counts, "plugin")
    return total / _PERMUTATIONS
