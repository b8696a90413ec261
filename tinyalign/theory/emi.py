"""Effective mutual information, predictive V-information and their paired differences, from per-sample NLLs.

The paper's equation (5) is I_eff = H(L) - CE: the Barber-Agakov lower bound on I(X; L) with the model as q. With H(L)
replaced by the cross-entropy of a *trained* null-input model the difference is predictive V-information, which exceeds
I_eff by the null model's own error. Both have their own name here; only differences between models are identified
without H(L).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyalign.theory._input import as_clusters, as_vector, check_level
from tinyalign.theory.estimate import Bounds, Estimate, Kind, convert_unit
from tinyalign.theory.intervals import IntervalMethod, ratio_interval
from tinyalign.theory.nll import NLLTable, Per

__all__ = ["conditional_v_information", "delta_emi", "effective_mutual_information", "pvi", "v_information"]

FloatArray = NDArray[np.float64]
_UNIT = {"sequence": "nats", "token": "nats/token", "byte": "nats/byte"}


def pvi(nll_null: Any, nll_input: Any) -> FloatArray:
    """Compute pointwise V-information: per-sample nats that the input adds to predicting the target.

    Negative where the input misled the model. Per sequence: the sum over the target's tokens.

    Args:
        nll_null: per-sample summed NLL of the null-input model (array, tensor or NLLTable).
        nll_input: the same targets given the input.

    Shape:
        returns: (n,), in the order of ``nll_input``.

    Units:
        nats.

    Raises:
        ValueError: lengths differ or a value is not finite.
        TableMismatch: the tables hold other samples, targets or tokenizers.

    Source:
        Ethayarajh et al. 2022, arXiv 2110.08420, definition 2.

    Example:
        >>> pvi([2.0, 3.0], [1.0, 3.5]).tolist()
        [1.0, -0.5]
    """
    return _paired(nll_null, nll_input, "sequence", "pvi", ("nll_null", "nll_input"))[0]


def v_information(
    nll_null: Any,
    nll_input: Any,
    groups: Any = None,
    *,
    per: Per = "sequence",
    level: float = 0.95,
    interval: IntervalMethod = "bootstrap-t",
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate predictive V-information CE(null) - CE(input) with a cluster-robust interval.

    It equals EMI plus the null model's error, so it is at least EMI. The null model must have been *trained* on the
    null input (see ``NullInput``): a blank image shown to a model that never saw one adds its own error.

    Args:
        nll_null: per-sample summed NLL of the null-input model.
        nll_input: the same targets given the input.
        groups: cluster of each sample in the order of ``nll_input``; None uses a table's own groups.
        per: ``"sequence"`` (the paper's L), ``"token"`` or ``"byte"``; the last two need tables.
        level: nominal coverage.
        interval: ``"bootstrap-t"``, ``"bca"`` or ``"t"``.
        draws: bootstrap draws.
        seed: seed of the bootstrap.

    Units:
        nats per sequence, token or byte.

    Raises:
        ValueError: lengths differ, a value is not finite, or counts are missing for ``per``.
        TableMismatch: the tables do not speak of the same targets.

    Source:
        Xu et al. 2020, arXiv 2002.10689, definition 2.

    Example:
        >>> result = v_information([2.0, 3.0, 2.5, 2.5], [1.0, 1.5, 1.5, 1.0], interval="t")
        >>> result.value, result.kind
        (1.25, 'usable')
    """
    names = ("nll_null", "nll_input")
    return _difference(nll_null, nll_input, groups, per, level, interval, draws, seed, "v_information", names, "usable")


def conditional_v_information(
    nll_without: Any,
    nll_with: Any,
    groups: Any = None,
    *,
    per: Per = "sequence",
    level: float = 0.95,
    interval: IntervalMethod = "bootstrap-t",
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate what one input adds given the rest: CE(instruction only) - CE(image and instruction).

    The headline number for a vision-language model, because most of CE(null) - CE(full) is the instruction. Both
    models must have been trained on what they are shown.

    Args:
        nll_without: per-sample summed NLL without the input in question.
        nll_with: the same targets with it.
        groups: cluster of each sample in the order of ``nll_with``; None uses a table's own groups.
        per: ``"sequence"``, ``"token"`` or ``"byte"``.
        level: nominal coverage.
        interval: ``"bootstrap-t"``, ``"bca"`` or ``"t"``.
        draws: bootstrap draws.
        seed: seed of the bootstrap.

    Units:
        nats per sequence, token or byte.

    Raises:
        ValueError: lengths differ, a value is not finite, or counts are missing for ``per``.
        TableMismatch: the tables do not speak of the same targets.

    Source:
        Hewitt et al. 2021, arXiv 2109.09234, equation 3.

    Example:
        >>> conditional_v_information([2.0, 3.0, 2.5], [1.0, 1.5, 1.5], interval="t").value.__round__(4)
        1.1667
    """
    names = ("nll_without", "nll_with")
    return _difference(
        nll_without, nll_with, groups, per, level, interval, draws, seed, "conditional_v_information", names, "usable"
    )


def delta_emi(
    nll_a: Any,
    nll_b: Any,
    groups: Any = None,
    *,
    per: Per = "sequence",
    level: float = 0.95,
    interval: IntervalMethod = "bootstrap-t",
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate EMI(b) - EMI(a), positive when b uses more information than a; paired and clustered.

    H(L) cancels, so this difference is identified by cross-entropy alone. The interval speaks of new samples for these
    two trained models; it is conditional on their training runs.

    Args:
        nll_a: per-sample summed NLL of the first model.
        nll_b: the same targets under the second model.
        groups: cluster of each sample in the order of ``nll_b``; None uses a table's own groups.
        per: ``"sequence"``, ``"token"`` or ``"byte"``.
        level: nominal coverage.
        interval: ``"bootstrap-t"``, ``"bca"`` or ``"t"``.
        draws: bootstrap draws.
        seed: seed of the bootstrap.

    Units:
        nats per sequence, token or byte.

    Raises:
        ValueError: lengths differ, a value is not finite, or counts are missing for ``per``.
        TableMismatch: the tables do not speak of the same targets.

    Source:
        Hu et al. 2025, TinyAlign, equations (5) and (6).

    Example:
        >>> delta_emi([2.0, 3.0, 2.5], [1.0, 1.5, 1.5], interval="t").value.__round__(4)
        1.1667
    """
    return _difference(
        nll_a, nll_b, groups, per, level, interval, draws, seed, "delta_emi", ("nll_a", "nll_b"), "point"
    )


def effective_mutual_information(
    nll_input: Any,
    entropy: Any,
    groups: Any = None,
    *,
    per: Per = "sequence",
    level: float = 0.95,
    interval: IntervalMethod = "bootstrap-t",
    draws: int = 2000,
    seed: int = 0,
) -> Estimate | Bounds:
    """Estimate I_eff = H(L) - CE where H(L) is known, or bound it where H(L) is bounded.

    Args:
        nll_input: per-sample summed NLL given the input.
        entropy: H(L) as a number in nats, as an ``Estimate`` (its unit is honoured and its error added), as
            ``(low, high)``, or as a ``Bounds``. An Estimate of kind ``"upper"`` or ``"lower"`` gives one-sided bounds.
        groups: cluster of each sample; None uses a table's own groups.
        per: ``"sequence"``, ``"token"`` or ``"byte"``; the unit in which ``entropy`` counts as well.
        level: nominal coverage.
        interval: ``"bootstrap-t"``, ``"bca"`` or ``"t"``.
        draws: bootstrap draws.
        seed: seed of the bootstrap.

    Units:
        nats per sequence, token or byte.

    Raises:
        ValueError: a value is not finite, the bounds are reversed, or ``entropy`` counts per something else.
        TypeError: no entropy.

    Source:
        Hu et al. 2025, TinyAlign, equations (4) and (5); Barber and Agakov 2003.

    Example:
        >>> effective_mutual_information([1.0, 1.5, 0.5], entropy=3.0, interval="t").value
        2.0
        >>> bounds = effective_mutual_information([1.0, 1.5, 0.5], entropy=(2.0, 3.0), interval="t")
        >>> bounds.lower.value, bounds.upper.value
        (1.0, 2.0)
    """
    where = "effective_mutual_information"
    loss = _mean(nll_input, groups, per, level, interval, draws, seed, where)
    if isinstance(entropy, Bounds):
        return _bounded(loss, entropy.lower, entropy.upper, where)
    if entropy is None:
        raise TypeError(
            f"{where}: entropy must be a number, (low, high) or an estimate, got None. Give at least bounds."
        )
    if isinstance(entropy, (tuple, list)):
        if len(entropy) != 2:
            raise ValueError(
                f"{where}: entropy must be one number or (low, high), got {len(entropy)} entries. Give two."
            )
        return _bounded(loss, entropy[0], entropy[1], where)
    if isinstance(entropy, Estimate) and entropy.kind == "upper":
        return _bounded(loss, -math.inf, entropy, where)
    if isinstance(entropy, Estimate) and entropy.kind == "lower":
        return _bounded(loss, entropy, math.inf, where)
    return _subtract_from(entropy, loss, "lower", where)


def _bounded(loss: Estimate, low: Any, high: Any, where: str) -> Bounds:
    if float(low) > float(high):
        raise ValueError(
            f"{where}: entropy must be given as (low, high), got {float(low)} above {float(high)}. Swap them."
        )
    reason = (
        "H(L) is only bounded, and cross-entropy alone does not identify it: the level of EMI is bounded, "
        "differences between models (delta_emi) are not affected"
    )
    return Bounds(_subtract_from(low, loss, "lower", where), _subtract_from(high, loss, "upper", where), reason)


def _subtract_from(entropy: Any, loss: Estimate, kind: Kind, where: str) -> Estimate:
    """Return entropy - loss; an independent error of the entropy widens the interval."""
    level_value, entropy_error, warnings = entropy, 0.0, list(loss.warnings)
    if isinstance(entropy, Estimate):
        if entropy.unit.partition("/")[2] != loss.unit.partition("/")[2]:
            raise ValueError(
                f"{where}: entropy must count in {loss.unit} as the loss does, got {entropy.unit}. Estimate both with "
                "the same per=."
            )
        if entropy.unit != loss.unit:
            warnings.append(f"unit: entropy was given in {entropy.unit} and converted to {loss.unit}")
        level_value = convert_unit(entropy.value, entropy.unit, loss.unit)
        error = convert_unit(entropy.std_error, entropy.unit, loss.unit)
        entropy_error = error if math.isfinite(error) else 0.0
        warnings.extend(entropy.warnings)
    value = float(level_value)
    if math.isnan(value):
        raise ValueError(f"{where}: entropy must be a number, got NaN. Give H(L) or its bounds in nats.")
    ratio = math.hypot(loss.std_error, entropy_error) / loss.std_error if loss.std_error > 0 else 1.0
    below, above = (loss.high - loss.value) * ratio, (loss.value - loss.low) * ratio
    if loss.std_error == 0.0 and entropy_error > 0:
        below = above = 1.959964 * entropy_error
    centre = value - loss.value
    return replace(
        loss,
        value=centre,
        low=centre - below,
        high=centre + above,
        kind=kind,
        method="entropy - cross_entropy",
        samples=None if loss.samples is None or not math.isfinite(value) else _share(value, loss),
        std_error=math.hypot(loss.std_error, entropy_error),
        warnings=tuple(warnings),
        details={"cross_entropy": loss.value, "entropy": value},
    )


def _share(entropy: float, loss: Estimate) -> FloatArray:
    """Per-sample entropy minus NLL; their ratio of sums is the estimate."""
    assert loss.samples is not None
    return np.asarray(entropy * loss.details["weights"] - loss.samples)


def _mean(
    nll: Any, groups: Any, per: Per, level: float, interval: IntervalMethod, draws: int, seed: int, where: str
) -> Estimate:
    check_level(level, where)
    if isinstance(nll, NLLTable):
        values, weights, clusters = nll.nll, nll.weights(per), nll.clusters(groups)
    else:
        values = as_vector(nll, where, "nll_input")
        weights, clusters = _ones(len(values), per, where), as_clusters(groups, len(values), where)
    return _summary(values, weights, clusters, per, level, interval, draws, seed, "cross_entropy", "upper")


def _difference(
    first: Any,
    second: Any,
    groups: Any,
    per: Per,
    level: float,
    interval: IntervalMethod,
    draws: int,
    seed: int,
    where: str,
    names: tuple[str, str],
    kind: Kind,
) -> Estimate:
    check_level(level, where)
    values, weights, table = _paired(first, second, per, where, names)
    clusters = table.clusters(groups) if table is not None else as_clusters(groups, len(values), where)
    return _summary(values, weights, clusters, per, level, interval, draws, seed, where, kind)


def _paired(
    first: Any, second: Any, per: Per, where: str, names: tuple[str, str]
) -> tuple[FloatArray, FloatArray, NLLTable | None]:
    """Return per-sample first - second in the order of second, the weights, and second where it is a table."""
    if isinstance(first, NLLTable) and isinstance(second, NLLTable):
        return first.aligned_to(second, per).nll - second.nll, second.weights(per), second
    if isinstance(first, NLLTable) or isinstance(second, NLLTable):
        raise TypeError(
            f"{where}: {names[0]} and {names[1]} must both be NLLTables or both arrays, got "
            f"{type(first).__name__} and {type(second).__name__}. An array has no ids to align a table with."
        )
    one, two = as_vector(first, where, names[0]), as_vector(second, where, names[1])
    if len(one) != len(two):
        raise ValueError(
            f"{where}: {names[0]} and {names[1]} must have equal lengths, got {len(one)} and {len(two)}. "
            "Both must hold the same samples in the same order."
        )
    return one - two, _ones(len(one), per, where), None


def _ones(n: int, per: Per, where: str) -> FloatArray:
    if per != "sequence":
        raise ValueError(
            f"{where}: per must be 'sequence' for plain arrays, got {per!r}. Pass NLLTables, which carry the counts."
        )
    return np.ones(n)


def _summary(
    values: FloatArray,
    weights: FloatArray,
    clusters: NDArray[np.int64],
    per: Per,
    level: float,
    interval: IntervalMethod,
    draws: int,
    seed: int,
    method: str,
    kind: Kind,
) -> Estimate:
    result = ratio_interval(values, weights, clusters, level=level, method=interval, draws=draws, seed=seed)
    return Estimate(
        result.value,
        result.low,
        result.high,
        kind=kind,
        method=f"{method}, {interval} over {result.n_clusters} clusters",
        unit=_UNIT[per],
        n=len(values),
        n_clusters=result.n_clusters,
        samples=values,
        warnings=result.warnings,
        level=level,
        std_error=result.std_error,
        details={"weights": weights},
    )
