"""Mutual information of whatever is given: chooses an estimator by type and dimension, and shows the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tinyalign.theory._input import as_labels, as_numpy, check_level
from tinyalign.theory.classifier import classifier_information
from tinyalign.theory.continuous import continuous_information
from tinyalign.theory.discrete import conditional_discrete_information, discrete_information
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.nearest import conditional_ksg, ksg, mixed_ksg, paired, ross

__all__ = ["conditional_mutual_information", "mutual_information"]

_CONTINUOUS = ("ksg", "ksg1", "ksg2", "copula", "student", "surrogate")
_DISCRETE = ("plugin", "miller_madow", "grassberger", "chao_shen", "null_adjusted")
_LABELLED = ("ross", "classifier")
METHODS = ("auto", *_CONTINUOUS, *_DISCRETE, *_LABELLED, "mixed")
_TIED = 0.1  # share of repeated values from which a float column counts as a mixture
_ROSS_DIMENSIONS = 3
_CLEARLY = 1.5  # standard errors


def mutual_information(x: Any, y: Any, method: str = "auto", *, k: int = 4, level: float = 0.95) -> Estimate:
    """Estimate the mutual information between two samples.

    Integers, strings and booleans are labels, floats are continuous. ``"auto"`` takes for two continuous samples an
    elliptical copula where nearest neighbours agree with it and corrected nearest neighbours elsewhere; for labels
    counts with Miller and Madow's correction; for a label and a continuous sample a cross-fitted classifier, or Ross's
    neighbours where they find clearly more; for floats that repeat Gao's mixture estimator. What was not chosen stands
    in ``.candidates``, and a warning says where the literature or the data say that the method fails.

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
    kinds = _kind(x), _kind(y)
    if method in _DISCRETE or (method == "auto" and kinds == ("label", "label")):
        return discrete_information(x, y, method=method, level=level)
    if method == "mixed" or (method == "auto" and "tied" in kinds):
        return _with_ties(x, y, kinds, k, level)
    if method in _LABELLED or (method == "auto" and "label" in kinds):
        return _labelled(x, y, kinds, method, k, level)
    if method in ("ksg", "ksg1", "ksg2"):
        return ksg(x, y, k=k, variant=2 if method == "ksg2" else 1, level=level)
    left, right = paired(x, y, 3, "mutual_information")
    if len(left) < 50:
        small = ksg(left, right, k=min(k, len(left) - 1), level=level)
        line = f"small: {len(left)} samples are too few to test or correct an estimate"
        return replace(small, warnings=(*small.warnings, line))
    return continuous_information(left, right, level=level, method=method)


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
    if {_kind(x), _kind(y), _kind(z)} != {"label"}:
        return conditional_ksg(x, y, z, k=k, level=level)
    where = "conditional_mutual_information"
    codes = [as_labels(part, where, name) for part, name in ((x, "x"), (y, "y"), (z, "z"))]
    if len({len(part) for part in codes}) != 1:
        lengths = ", ".join(str(len(part)) for part in codes)
        raise ValueError(f"{where}: x, y and z must have equal lengths, got {lengths}. Pair them row by row.")
    return conditional_discrete_information(*codes, level=level)


def _kind(values: Any) -> str:
    """Return "label", "continuous" or "tied" (floats of which many repeat)."""
    array = as_numpy(values)
    if not array.size:
        return "continuous"  # and refused where it is read
    if array.dtype.kind != "f":
        return "label"
    flat = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
    # One float column with many repeats is enough: a mixture estimator reads the ordinary columns as well.
    for column in flat.T[:8]:
        distinct = len(np.unique(column[:2000]))
        if 1 < distinct < (1 - _TIED) * min(len(column), 2000):
            return "tied"
    return "continuous"


def _with_ties(x: Any, y: Any, kinds: tuple[str, str], k: int, level: float) -> Estimate:
    left, right = (
        as_labels(part, "mutual_information", name) if kind == "label" else part
        for part, kind, name in ((x, kinds[0], "x"), (y, kinds[1], "y"))
    )
    result = mixed_ksg(left, right, k=k, level=level)
    line = "ties: values repeat, so the data were read as a mixture of discrete and continuous parts"
    return replace(result, warnings=(*result.warnings, line) if "tied" in kinds else result.warnings)


def _labelled(x: Any, y: Any, kinds: tuple[str, str], method: str, k: int, level: float) -> Estimate:
    if kinds[0] == "label" and kinds[1] != "label":
        x, y = y, x
    points = as_numpy(x)
    width = 1 if points.ndim < 2 else points.shape[1]
    if method == "ross":
        return ross(x, y, k=k, level=level)
    if method == "classifier":
        return classifier_information(x, y, level=level)
    near = ross(x, y, k=k, level=level)
    candidates = {"ross": near.value}
    counts = np.bincount(as_labels(y, "mutual_information", "y"))
    if len(counts) < 2 or counts.min() < 10:
        line = "rare_labels: a label has fewer than 10 samples, so no classifier was cross-fitted"
        return replace(
            near, candidates=candidates, warnings=(*near.warnings, line) if width > _ROSS_DIMENSIONS else near.warnings
        )
    bound = classifier_information(x, y, level=level)
    candidates.update(bound.candidates)
    # Both err toward zero; the classifier has less noise, so neighbours must exceed it clearly to be preferred.
    if near.value > bound.value + _CLEARLY * bound.std_error:
        return replace(near, candidates=candidates)
    return replace(bound, candidates={**candidates, bound.method: bound.value})
