"""Every term of equations (1) to (5), exactly, where the law of the world is written down."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, xlogy

from tinyalign.theory._input import as_numpy
from tinyalign.theory.estimate import Estimate

__all__ = ["EMITerms", "emi_terms", "irreducible_error", "weighted_accuracy"]

FloatArray = NDArray[np.float64]


class EMITerms(NamedTuple):
    """Terms of equations (1) to (5), in nats.

    Args:
        entropy: H(L).
        conditional_entropy: H(L | X).
        mutual_information: I(X; L).
        irreducible_error: eps, the KL of the model from the law.
        cross_entropy: of the model, H(L | X) + eps.
        effective_mutual_information: I(X; L) - eps.
    """

    entropy: float
    conditional_entropy: float
    mutual_information: float
    irreducible_error: float
    cross_entropy: float
    effective_mutual_information: float


def emi_terms(law: Any, model: Any, weights: Any = None) -> EMITerms:
    """Compute H(L), H(L|X), I(X; L), eps, CE and I_eff exactly from a law and a model in tables.

    Args:
        law: joint p(x, l), or rows p(l | x) together with ``weights``.
        model: q(l | x); with a leading axis, one table per parameter value theta, of which the best is taken.
        weights: p(x); None where ``law`` is a joint table, or where its rows p(l | x) are equally likely.

    Shape:
        law: (X, L). model: (X, L) or (T, X, L). weights: (X,).

    Units:
        nats.

    Raises:
        ValueError: probabilities that are negative, not finite or do not sum to one, or shapes that disagree.

    Source:
        Hu et al. 2025, TinyAlign, equations (1) to (5), with eps = min over theta of E[KL].

    Example:
        >>> terms = emi_terms([[0.5, 0.0], [0.0, 0.5]], [[0.9, 0.1], [0.1, 0.9]])
        >>> round(terms.mutual_information, 4), round(terms.effective_mutual_information, 4)
        (0.6931, 0.5878)
    """
    joint, tables = _law_and_models(law, model, weights, "emi_terms")
    inputs = joint.sum(axis=1, keepdims=True)
    labels = joint.sum(axis=0)
    entropy = float(-xlogy(labels, labels).sum())
    conditional = float(-xlogy(joint, joint).sum() + xlogy(inputs, inputs).sum())
    errors = rel_entr(joint, inputs * tables).sum(axis=(1, 2))
    error = float(errors.min())
    mutual = float(rel_entr(joint, inputs * labels).sum())
    with np.errstate(divide="ignore"):
        logs = np.log(tables[int(errors.argmin())])
    loss = float(-np.where(joint > 0, joint * np.where(joint > 0, logs, 0.0), 0.0).sum())
    return EMITerms(entropy, conditional, mutual, error, loss, entropy - loss)


def irreducible_error(law: Any, model: Any, weights: Any = None) -> Estimate:
    """Compute eps = min over theta of E_x KL(p(l|x) || q_theta(l|x)), exactly where the law is known.

    Equation (2) of the paper prints the minimum inside the expectation; one theta serves all inputs, so it stands
    outside here, and CE = H(L|X) + eps is then an equality.

    Args:
        law: joint p(x, l), or rows p(l | x) with ``weights``.
        model: q(l | x), with an optional leading axis over theta.
        weights: p(x); None where ``law`` is a joint table, or where its rows p(l | x) are equally likely.

    Shape:
        law: (X, L). model: (X, L) or (T, X, L). weights: (X,). samples: (X,), the KL of each input.

    Units:
        nats.

    Raises:
        ValueError: probabilities that are negative, not finite or do not sum to one, or shapes that disagree.

    Source:
        Hu et al. 2025, TinyAlign, equation (2).

    Example:
        >>> irreducible_error([[0.5, 0.5]], [[0.5, 0.5]]).value
        0.0
    """
    joint, tables = _law_and_models(law, model, weights, "irreducible_error")
    inputs = joint.sum(axis=1, keepdims=True)
    divergences = rel_entr(joint, inputs * tables).sum(axis=2)  # (T, X), weighted by p(x)
    best = int(divergences.sum(axis=1).argmin())
    value = float(divergences[best].sum())
    per_input = np.divide(divergences[best], inputs[:, 0], out=np.zeros(len(joint)), where=inputs[:, 0] > 0)
    return Estimate(
        value, value, value, method="exact", n=len(joint), samples=per_input, std_error=0.0, details={"theta": best}
    )


def weighted_accuracy(accuracies: Any, counts: Any) -> float:
    """Average benchmark accuracies with their numbers of questions as weights (equation 8).

    Args:
        accuracies: one per benchmark.
        counts: questions in each benchmark.

    Raises:
        ValueError: unequal lengths, a value that is not finite, or no questions at all.

    Source:
        Hu et al. 2025, TinyAlign, equation (8).

    Example:
        >>> weighted_accuracy([0.8, 0.5], [100, 200])
        0.6
    """
    scores, sizes = as_numpy(accuracies).astype(np.float64), as_numpy(counts).astype(np.float64)
    if scores.ndim != 1 or scores.shape != sizes.shape:
        raise ValueError(
            f"weighted_accuracy: counts must have the shape of accuracies {scores.shape}, got {sizes.shape}. Give one "
            "count per benchmark."
        )
    if not np.isfinite(scores).all() or not np.isfinite(sizes).all() or (sizes < 0).any() or sizes.sum() <= 0:
        raise ValueError(
            f"weighted_accuracy: counts must be non-negative with a positive sum and all values finite, got {sizes} "
            f"for {scores}. Drop benchmarks without questions or results."
        )
    return float((scores * sizes).sum() / sizes.sum())


def _law_and_models(law: Any, model: Any, weights: Any, where: str) -> tuple[FloatArray, FloatArray]:
    table = as_numpy(law).astype(np.float64)
    tables = as_numpy(model).astype(np.float64)
    if table.ndim != 2:
        raise ValueError(f"{where}: law must have shape (X, L), got {table.shape}. Give one row per input.")
    if weights is None:
        joint = table
        rows_are_laws = len(table) > 1 and np.allclose(table.sum(axis=1), 1.0, atol=1e-6)
        joint = table / len(table) if rows_are_laws else table
    else:
        share = as_numpy(weights).astype(np.float64)
        if share.shape != (len(table),):
            raise ValueError(f"{where}: weights must have shape ({len(table)},), got {share.shape}. Give p(x) per row.")
        _require_law(table, "law", where, axis=1)
        joint = table * share[:, None]
    _require_law(joint, "law" if weights is None else "weights", where, axis=None)
    if tables.ndim == 2:
        tables = tables[None]
    if tables.ndim != 3 or tables.shape[1:] != joint.shape:
        raise ValueError(
            f"{where}: model must have shape {joint.shape} or (T, *{joint.shape}), got {as_numpy(model).shape}. "
            "Give q(l | x) with the rows and columns of the law."
        )
    _require_law(tables, "model", where, axis=2)
    return joint, tables


def _require_law(table: FloatArray, name: str, where: str, axis: int | None) -> None:
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(f"{where}: {name} must hold finite probabilities of at least 0, got {table.min()}. Repair it.")
    worst = float(np.abs(table.sum(axis=axis) - 1.0).max())
    if worst > 1e-6:
        raise ValueError(
            f"{where}: {name} must sum to 1{'' if axis is None else ' in every row'}, got an error of {worst:.3g}. "
            "Normalise it first."
        )
