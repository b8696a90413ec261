"""Samples of two laws whose values repeat: rounding and atoms are spread over their gaps, in both laws alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinyalign.theory._input import column_generator
from tinyalign.theory.rounding import nearer_gaps

__all__ = ["constant_warning", "shared_warning", "untied"]

FloatArray = NDArray[np.float64]
_TIED = 0.01  # of the values or rows, from which it is said
_SAME = 1e-12  # of the distance of a column's quartiles: values that rounding in a sum keeps apart


def untied(p: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray, tuple[str, ...]]:
    """Spread values that repeat evenly over the gap to the next value.

    Half precision, decimals and pixels put samples at distance zero, where neighbours see an infinite density. What is
    spread still tells the value that it was, in both laws by the same rule, so that no divergence changes. The noise is
    drawn from each column's own content.

    Args:
        p: samples of p.
        q: samples of q.

    Returns:
        Both samples and what is to be said of them; without a repeated value they are returned as they are.

    Shape:
        p: (n, d). q: (m, d).

    Example:
        >>> x = np.random.default_rng(0).normal(size=(2, 500, 1)).round(1)
        >>> p, _, warnings = untied(x[0], x[1])
        >>> len(np.unique(p)), bool(np.abs(p - x[0]).max() < 0.2), warnings[0][:7]
        (500, True, 'rounded')
    """
    both = np.vstack([p, q])
    rounded = 0
    for column in range(both.shape[1]):
        values, place, counts = np.unique(both[:, column], return_inverse=True, return_counts=True)
        if len(values) == len(both):
            continue
        low, high = np.quantile(both[:, column], [0.25, 0.75])
        apart = np.diff(values, prepend=-np.inf) > _SAME * ((high - low) or values[-1] - values[0])
        group = (np.cumsum(apart) - 1)[place.reshape(-1)]
        values, counts = values[apart], np.bincount(group)
        reach = np.where(counts > 1, nearer_gaps(values), 0.0)[group]
        both[:, column] = values[group] + reach * column_generator(both[:, column]).uniform(-0.5, 0.5, len(both))
        rounded += any(len(np.unique(side)) < (1 - _TIED) * len(side) for side in np.split(group, [len(p)]))
    if not rounded:
        return both[: len(p)], both[len(p) :], ()
    line = (
        f"rounded: {rounded} of {both.shape[1]} columns repeat values; these were spread over the gaps between them, "
        "which is right for rounding and for atoms. Copies of whole records are to be dropped instead"
    )
    return both[: len(p)], both[len(p) :], (line,)


def shared_warning(p: FloatArray, q: FloatArray) -> tuple[str, ...]:
    """Say where samples of p are samples of q as well, although neither repeats its own."""
    if np.isin(p[:, 0], q[:, 0]).mean() <= _TIED:
        return ()
    rows = [[row.tobytes() for row in np.ascontiguousarray(side)] for side in (p, q)]
    own, other = (set(side) for side in rows)
    shared = float(np.mean([row in other for row in rows[0]]))
    repeated = max(1 - len(own) / len(p), 1 - len(other) / len(q))
    if shared <= _TIED or repeated > _TIED:
        return ()
    return (
        f"shared: {shared:.0%} of the rows of p_samples are rows of q_samples too; the distance of zero to a copy "
        "biases the estimate down. Draw the samples apart",
    )


def constant_warning(points: FloatArray, name: str) -> tuple[str, ...]:
    """Say which columns do not vary."""
    constant = int((np.ptp(points, axis=0) == 0).sum())
    return (f"constant: {constant} of {points.shape[1]} columns of {name} do not vary",) if constant else ()
