"""Mutual information of whatever is given: chooses an estimator by type and dimension, and shows the others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyalign.theory._input import as_labels, as_matrix, as_numpy, check_level
from tinyalign.theory.classifier import classifier_information
from tinyalign.theory.continuous import continuous_information
from tinyalign.theory.discrete import conditional_discrete_information, discrete_information
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.nearest import conditional_ksg, ksg, mixed_ksg, paired, ross
from tinyalign.theory.rounding import copied, spread_rounding

__all__ = ["conditional_mutual_information", "mutual_information"]

FloatArray = NDArray[np.float64]
_CONTINUOUS = ("ksg", "ksg1", "ksg2", "copula", "student", "surrogate")
_DISCRETE = ("plugin", "miller_madow", "grassberger", "chao_shen", "null_adjusted")
_LABELLED = ("ross", "classifier")
METHODS = ("auto", *_CONTINUOUS, *_DISCRETE, *_LABELLED, "mixed")
_RARE = 10  # samples of a label below which no classifier is cross-fitted
_FAITHFUL = 4  # columns up to which the mixture estimator is taken as it is
_WHOLE = 16  # columns up to which it is computed
_ROSS_DIMENSIONS = 3
_CLEARLY = 1.5  # standard errors
_DETERMINED = 0.5  # of what rounded values can hold: from there on the other side may be what was rounded


def mutual_information(x: Any, y: Any, method: str = "auto", *, k: int = 4, level: float = 0.95) -> Estimate:
    """Estimate the mutual information between two samples.

    Integers, strings and booleans are labels, floats are continuous. ``"auto"`` takes for two continuous samples an
    elliptical copula where nearest neighbours agree with it and corrected nearest neighbours elsewhere; for labels
    counts with Miller and Madow's correction; for a label and a continuous sample a cross-fitted classifier, or
    neighbours where they find clearly more. Floats that repeat as rounding does (half precision, decimals, pixels) are
    spread over their rounding gaps; where they repeat as atoms do (a rectifier's zeros) Gao's mixture estimator is
    used, beyond four columns only where ranks do not find more. What was not chosen stands in ``.candidates``, and a
    warning says where the literature or the data say that the method fails.

    Args:
        x: samples.
        y: samples, row by row with x.
        method: ``"auto"``, or for continuous data ``"ksg"``, ``"ksg1"``, ``"ksg2"``, ``"copula"``, ``"student"``,
            ``"surrogate"``; for labels ``"plugin"``, ``"miller_madow"``, ``"grassberger"``, ``"chao_shen"``,
            ``"null_adjusted"``; for a label and a continuous sample ``"ross"``, ``"classifier"``; ``"mixed"``.
        k: neighbours, where a method by name counts them.
        level: nominal coverage.

    Shape:
        x: (n,) or (n, dx). y: (n,) or (n, dy).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths, too few samples, or an unknown or unfitting method.
        TypeError: complex numbers, or labels that cannot be ordered.

    Source:
        Kraskov et al. 2004; Ross 2014; Gao et al. 2017; Grassberger 2003; Czyz et al. 2023, arXiv 2306.11078.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=2000)
        >>> result = mutual_information(x, x + rng.normal(size=2000))
        >>> result.method, bool(abs(result.value - 0.5 * np.log(2)) < 0.05)
        ('copula', True)
    """
    check_level(level, "mutual_information")
    if method not in METHODS:
        raise ValueError(
            f"mutual_information: method must be one of {', '.join(METHODS)}, got {method!r}. Use one of them."
        )
    if method in _DISCRETE:
        return discrete_information(x, y, method=method, level=level)
    if method == "mixed":
        return mixed_ksg(*(_codes(side) for side in (x, y)), k=k, level=level)
    left, right = _sides(x, y)
    kinds = left.kind, right.kind
    if kinds == ("label", "label") and method == "auto":
        found = discrete_information(x, y, level=level)
    elif method in _LABELLED or (method == "auto" and "label" in kinds):
        points, labels = (right, x) if kinds[0] == "label" and kinds[1] != "label" else (left, y)
        found = _labelled(points, labels, method, k, level)
    elif method == "auto" and "tied" in kinds:
        found = _mixture(left.values, right.values, k, level)
    else:
        found = _continuous(left.values, right.values, method, k, level)
    return _said(found, left, right)


def conditional_mutual_information(x: Any, y: Any, z: Any, *, k: int = 4, level: float = 0.95) -> Estimate:
    """Estimate I(X; Y | Z): by the chain rule on counts for labels, by nearest neighbours otherwise.

    Args:
        x: samples.
        y: samples.
        z: what is given.
        k: neighbours.
        level: nominal coverage.

    Shape:
        x, y, z: (n,) or (n, d).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths or too few samples.

    Source:
        Cover and Thomas 2006, section 2.5 (the chain rule); Mesner and Shalizi 2021, arXiv 1912.00387 (neighbours).

    Example:
        >>> z = np.repeat([0, 1], 500)
        >>> round(conditional_mutual_information(z, z, z).value, 6)
        0.0
    """
    check_level(level, "conditional_mutual_information")
    sides = [_read(part, name) for part, name in ((x, "x"), (y, "y"), (z, "z"))]
    if {side.kind for side in sides} != {"label"}:
        return _said(conditional_ksg(*(side.values for side in sides), k=k, level=level), *sides)
    where = "conditional_mutual_information"
    codes = [as_labels(part, where, name) for part, name in ((x, "x"), (y, "y"), (z, "z"))]
    if len({len(part) for part in codes}) != 1:
        lengths = ", ".join(str(len(part)) for part in codes)
        raise ValueError(f"{where}: x, y and z must have equal lengths, got {lengths}. Pair them row by row.")
    return _said(conditional_discrete_information(*codes, level=level), *sides)


class _Side(NamedTuple):
    """What was given, as ``"label"``, ``"continuous"``, ``"rounded"`` (and spread) or ``"tied"`` (with atoms)."""

    values: Any
    kind: str
    warnings: tuple[str, ...] = ()
    entropy: float = math.inf  # of rounded values on a line, in nats: more cannot be said of them


def _read(values: Any, name: str) -> _Side:
    array = as_numpy(values)
    if array.size and array.dtype.kind not in "fc":
        return _Side(values, "label")
    if not array.size or array.dtype.kind == "c" or array.ndim not in (1, 2) or not np.isfinite(array).all():
        return _Side(values, "continuous")  # and refused where it is read
    matrix = as_matrix(array, "mutual_information", name)
    values, rounded, atoms = spread_rounding(matrix)
    columns = matrix.shape[1]
    if atoms == columns and not rounded and np.unique(matrix, axis=0, return_counts=True)[1].min() >= _RARE:
        return _Side(matrix, "label", (f"ties: all values of {name} repeat often, so they were read as labels",))
    lines: tuple[str, ...] = ()
    if rounded:
        lines += (
            f"rounded: {rounded} of {columns} columns of {name} repeat values as rounding does; they were spread over "
            "their rounding gaps, which keeps what the rounded values say",
        )
    if atoms:
        lines += (
            f"ties: {atoms} of {columns} columns of {name} hold values that many samples share, so they were read as a "
            "mixture of discrete and continuous parts",
        )
    entropy = math.inf
    if rounded and columns == 1:
        shares = np.unique(matrix, return_counts=True)[1] / len(matrix)
        entropy = float(-(shares * np.log(shares)).sum())
    return _Side(values, "tied" if atoms else "rounded" if rounded else "continuous", lines, entropy)


def _sides(x: Any, y: Any) -> tuple[_Side, _Side]:
    left, right = _read(x, "x"), _read(y, "y")
    if all(any(line.startswith("rounded") for line in side.warnings) for side in (left, right)):
        x, y = as_matrix(x, "mutual_information", "x"), as_matrix(y, "mutual_information", "y")
        share = copied(x, y) if len(x) == len(y) else 0.0
        if share:
            line = (
                f"ties: {share:.0%} of the records repeat another; drop copies, or the estimate and interval are wrong"
            )
            return _Side(x, "tied", (line,)), _Side(y, "tied")
    return left, right


def _said(found: Estimate, *sides: _Side) -> Estimate:
    lines = tuple(line for side in sides for line in side.warnings)
    least = min(side.entropy for side in sides)
    if found.value > _DETERMINED * least:
        lines += (
            f"law: the information nears the {least:.2f} nats that rounded values hold; where one side is a rounded "
            "function of the other it is all of them, which spreading hides. Try method='mixed'",
        )
    return replace(found, warnings=found.warnings + lines) if lines else found


def _codes(values: Any) -> Any:
    return values if as_numpy(values).dtype.kind == "f" else as_labels(values, "mutual_information", "labels")


def _continuous(x: Any, y: Any, method: str, k: int, level: float) -> Estimate:
    if method in ("ksg", "ksg1", "ksg2"):
        return ksg(x, y, k=k, variant=2 if method == "ksg2" else 1, level=level)
    left, right = paired(x, y, 3, "mutual_information")
    if len(left) < 50:
        small = ksg(left, right, k=min(k, len(left) - 1), level=level)
        line = f"small: {len(left)} samples are too few to test or correct an estimate"
        return replace(small, warnings=(*small.warnings, line))
    return continuous_information(left, right, level=level, method=method)


def _mixture(x: FloatArray, y: FloatArray, k: int, level: float) -> Estimate:
    """Gao's estimator beside that of ranks whose ties are broken at random, which keeps the information as well."""
    width = x.shape[1] + y.shape[1]
    ranked = _continuous(x, y, "auto", k, level)
    candidates = {**ranked.candidates, ranked.method: ranked.value}
    line = "law: ranks whose ties are broken at random were read; atoms on both sides make them say too much"
    ranked = replace(ranked, warnings=(*ranked.warnings, line))
    if width > _WHOLE:  # where neighbours find next to nothing
        return replace(ranked, candidates=candidates)
    near = mixed_ksg(x, y, k=k, level=level)
    # In few columns neighbours see the mixture; in more they lose most of it.
    better = width > _FAITHFUL and ranked.value > near.value + _CLEARLY * near.std_error
    return replace(ranked if better else near, candidates={**candidates, near.method: near.value})


def _labelled(side: _Side, labels: Any, method: str, k: int, level: float) -> Estimate:
    x, codes = as_numpy(side.values), as_labels(labels, "mutual_information", "y")
    matrix = as_matrix(x, "mutual_information", "x")
    same = codes.max() == 0 or not np.ptp(matrix, axis=0).any()
    if method == "auto" and same and len(codes) == len(x):
        line = "constant: all labels, or all features, are one value, which nothing can say more of"
        return Estimate(0.0, 0.0, 0.0, method="constant", n=len(codes), warnings=(line,), level=level, std_error=0.0)
    if method == "classifier":
        return classifier_information(x, labels, level=level)
    width = 1 if x.ndim < 2 else x.shape[1]
    if method == "auto" and side.kind == "tied" and width <= _WHOLE:
        near = mixed_ksg(x, codes, k=k, level=level)
    else:
        near = ross(x, labels, k=k, level=level)
    if method == "ross":
        return near
    candidates = {near.method: near.value}
    counts = np.bincount(codes)
    if len(counts) < 2 or counts.min() < _RARE:
        line = f"rare_labels: a label has fewer than {_RARE} samples, so no classifier was cross-fitted"
        return replace(
            near, candidates=candidates, warnings=(*near.warnings, line) if width > _ROSS_DIMENSIONS else near.warnings
        )
    bound = classifier_information(x, codes, level=level)
    candidates.update(bound.candidates)
    # Both err toward zero; the classifier has less noise, so neighbours must exceed it clearly to be preferred.
    if near.value > bound.value + _CLEARLY * bound.std_error:
        return replace(near, candidates=candidates)
    return replace(bound, candidates={**candidates, bound.method: bound.value})
