"""Columns whose values repeat: rounding is told from atoms and spread over its gaps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyalign.theory._input import column_generator

__all__ = ["Spread", "copied", "nearer_gaps", "spread_rounding"]

FloatArray = NDArray[np.float64]
_SEEN = 2000  # rows that are screened
_TIED = 0.01  # share of values that repeat another, from which a column is looked at
_FEW = 20  # values of a column below which all are atoms
_SHARE = 0.02  # of the samples, and
_COUNT = 20  # samples, and
_ABOVE = 4  # times the count of either neighbour: what an atom has among values that do not make it one by being few
_SAME = 1.05  # times as many records as values of a side, below which the values repeat with their records


class Spread(NamedTuple):
    """Samples whose rounding was spread.

    Attributes:
        values: (n, d) the samples; atoms are as they were.
        rounded: columns that were spread, in whole or beside atoms.
        atoms: columns with values that many samples share, or with few values.
    """

    values: FloatArray
    rounded: int
    atoms: int


def spread_rounding(x: FloatArray) -> Spread:
    """Spread values that repeat evenly over the gap to their neighbours, where the repeats look like rounding.

    Half precision, decimals and pixels repeat many values, each a little; a rectifier or a count repeats few, each
    often. A spread value still tells the rounded one, so that the information of the rounded values is kept, and no
    order is changed. The noise is drawn from each column's own content: equal columns stay equal, others are unrelated.

    Args:
        x: samples; without ties they are returned as they are.

    Shape:
        x: (n, d).

    Example:
        >>> values = np.random.default_rng(0).normal(size=(3000, 1)).round(2)
        >>> spread = spread_rounding(values)
        >>> spread.rounded, spread.atoms, len(np.unique(values)) < 700, len(np.unique(spread.values))
        (1, 0, True, 3000)
    """
    n = len(x)
    rows = np.random.default_rng(0).permutation(n)[:_SEEN] if n > _SEEN else slice(None)
    ordered = np.sort(x[rows], axis=0)
    repeated = (ordered[1:] == ordered[:-1]).mean(axis=0) if n > 1 else np.zeros(x.shape[1])
    columns = np.flatnonzero((repeated > _TIED) & (ordered[0] != ordered[-1]))
    if not len(columns):
        return Spread(x, 0, 0)
    values, rounded, atoms = x.copy(), 0, 0
    for column in columns:
        distinct, place, counts = np.unique(x[:, column], return_inverse=True, return_counts=True)
        padded = np.concatenate([[0], counts, [0]])
        heavy = (counts > _ABOVE * np.maximum(padded[:-2], padded[2:])) & (counts >= max(_SHARE * n, _COUNT))
        few = len(distinct) < _FEW
        light = (counts > 1) & ~heavy
        atoms += few or bool(heavy.any())
        if light.any() and not few:
            reach = np.where(light, nearer_gaps(distinct), 0.0)[place]
            values[:, column] += reach * column_generator(x[:, column]).uniform(-0.5, 0.5, n)
            rounded += 1
    return Spread(values, rounded, atoms)


def nearer_gaps(values: FloatArray) -> FloatArray:
    """Return how far each of two or more ascending values lies from the nearer of its neighbours, (n,)."""
    steps = np.diff(values)
    return np.asarray(np.minimum(np.append(steps, steps[-1]), np.append(steps[0], steps)))


def copied(x: FloatArray, y: FloatArray) -> float:
    """Return the share of records that repeat another, where values repeat because whole records do, and else 0."""
    both, left, right = (len(np.unique(part, axis=0)) for part in (np.hstack([x, y]), x, y))
    return 1.0 - both / len(x) if both < min(_SAME * max(left, right), (1.0 - _TIED) * len(x)) else 0.0
