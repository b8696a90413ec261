"""Split a change of EMI into true information and model error, as far as cross-entropy identifies the two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from tinyalign.theory._input import check_level
from tinyalign.theory.emi import _difference, _mean
from tinyalign.theory.estimate import Bounds, Estimate
from tinyalign.theory.intervals import IntervalMethod
from tinyalign.theory.nll import NLLTable, Per

__all__ = ["Decomposition", "LevelBounds", "decompose", "level_bounds"]

_Shared = tuple[Any, Per, float, IntervalMethod, int, int, str]
_DETERMINISTIC = (
    "E_R is a function of (X_V, X_I) and of a memory that is independent of the test pair, so I(E_R; L | X_V, X_I) = 0 "
    "and the whole change of EMI is reduced error"
)
_STOCHASTIC = (
    "E_R may carry information about L beyond (X_V, X_I): 0 <= delta I_true <= H(L | X_V, X_I) <= the cross-entropy of "
    "any model of L given (X_V, X_I), so cross-entropy bounds the split and does not identify it"
)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Terms of the paper's equation (6): delta_emi = delta_true + delta_error.

    Attributes:
        delta_emi: change of effective mutual information, identified.
        delta_true: change of true information, exactly zero or bounded.
        delta_error: reduction of the irreducible error eps (positive when retrieval lowers it).
        reason: why ``delta_true`` is what it is.
    """

    delta_emi: Estimate
    delta_true: Estimate | Bounds
    delta_error: Estimate | Bounds
    reason: str


def decompose(
    base: Any,
    augmented: Any,
    teacher: Any = None,
    *,
    retrieval: Literal["deterministic", "stochastic"] = "deterministic",
    groups: Any = None,
    per: Per = "sequence",
    level: float = 0.95,
    interval: IntervalMethod = "bootstrap-t",
) -> Decomposition:
    """Decompose the gain of a retrieval-augmented model over its base into true information and reduced error.

    With deterministic retrieval from an independent memory the true information cannot grow (the paper's
    "delta I_true > 0" needs the sample's own caption in the memory, or features in place of pixels), so the gain is
    reduced error. Otherwise only delta_EMI - CE_T <= delta_error <= delta_EMI holds, T being any model of the target
    given the base's inputs: the better the teacher, the tighter the bound.

    Args:
        base: per-sample summed NLL without retrieval.
        augmented: the same targets with retrieval.
        teacher: the same targets under a stronger model of the base's inputs; None uses the base itself.
        retrieval: ``"deterministic"`` where what is retrieved is a function of the inputs and of a memory independent
            of the test pairs; ``"stochastic"`` where that is not known.
        groups: cluster of each sample; None uses a table's own groups.
        per: ``"sequence"``, ``"token"`` or ``"byte"``.
        level: nominal coverage of every interval.
        interval: ``"bootstrap-t"``, ``"bca"`` or ``"t"``.

    Units:
        nats per sequence, token or byte.

    Raises:
        ValueError: lengths differ, a value is not finite, or an unknown ``retrieval``.
        TableMismatch: the tables do not speak of the same targets.

    Source:
        Hu et al. 2025, TinyAlign, equations (6) and (7). Deviation: eps is min over theta of the expected KL, since one
        theta serves all inputs.

    Example:
        >>> split = decompose([2.0, 3.0, 2.0], [1.0, 2.5, 1.5], interval="t")
        >>> split.delta_true.value, split.delta_error.value == split.delta_emi.value
        (0.0, True)
    """
    if retrieval not in ("deterministic", "stochastic"):
        raise ValueError(
            f"decompose: retrieval must be 'deterministic' or 'stochastic', got {retrieval!r}. Say 'stochastic' where "
            "the memory may hold the test pair's own target."
        )
    check_level(level, "decompose")
    shared: _Shared = (groups, per, level, interval, 2000, 0, "decompose")
    gain = _difference(base, augmented, *shared, ("base", "augmented"), "point")
    if retrieval == "deterministic":
        zero = Estimate(
            0.0, 0.0, 0.0, method="exact: " + _DETERMINISTIC, unit=gain.unit, n=gain.n, level=level, std_error=0.0
        )
        return Decomposition(gain, zero, replace(gain, method="delta_emi (delta_true = 0)"), _DETERMINISTIC)
    reference = base if teacher is None else teacher
    limit = _mean(reference, *shared)
    warnings = gain.warnings
    if teacher is not None and limit.value > _mean(base, *shared).value:
        warnings += ("weak_teacher: the teacher predicts worse than the base, whose own cross-entropy bounds tighter",)
    nothing = Estimate(
        0.0, 0.0, 0.0, kind="lower", method="exact: conditional information is not negative", unit=gain.unit
    )
    # delta_EMI - CE_T is one mean of paired per-sample values, so its interval keeps the pairing.
    floor = _difference(_less(base, reference), augmented, *shared, ("base", "augmented"), "lower")
    return Decomposition(
        replace(gain, warnings=warnings),
        Bounds(nothing, replace(limit, kind="upper", method="cross_entropy of the teacher"), _STOCHASTIC),
        Bounds(
            replace(floor, method="delta_emi - cross_entropy of the teacher"), replace(gain, kind="upper"), _STOCHASTIC
        ),
        _STOCHASTIC,
    )


def _less(base: Any, reference: Any) -> Any:
    """Base minus reference per sample, in the form of the base."""
    if isinstance(base, NLLTable) and isinstance(reference, NLLTable):
        return replace(base, nll=base.nll - reference.aligned_to(base).nll)
    from tinyalign.theory._input import as_vector

    return as_vector(base, "decompose", "base") - as_vector(reference, "decompose", "teacher")


@dataclass(frozen=True, eq=False)
class LevelBounds:
    """What cross-entropies say about the levels of equations (2) to (5).

    Attributes:
        conditional_entropy: H(L | X), between 0 and the best model's cross-entropy.
        irreducible_error: eps of the model, at least its distance to the teacher, at most its whole cross-entropy.
        mutual_information: I(X; L), between 0 and the null model's cross-entropy.
        effective_mutual_information: H(L) - CE, at most the V-information.
    """

    conditional_entropy: Bounds
    irreducible_error: Bounds
    mutual_information: Bounds
    effective_mutual_information: Bounds


def level_bounds(
    nll_input: Any,
    nll_null: Any,
    nll_teacher: Any = None,
    *,
    groups: Any = None,
    per: Per = "sequence",
    level: float = 0.95,
    interval: IntervalMethod = "bootstrap-t",
) -> LevelBounds:
    """Bound H(L|X), eps, I and EMI from the cross-entropies of a model, a null model and a stronger teacher.

    Every bound uses only that a cross-entropy exceeds the entropy it approximates and that discrete entropies are not
    negative; H(L) <= CE_null and H(L | X) <= CE_teacher.

    Args:
        nll_input: per-sample summed NLL of the model.
        nll_null: the same targets under a trained null-input model.
        nll_teacher: the same targets under a stronger model of the same inputs; None uses the model itself.
        groups: cluster of each sample; None uses a table's own groups.
        per: ``"sequence"``, ``"token"`` or ``"byte"``.
        level: nominal coverage.
        interval: ``"bootstrap-t"``, ``"bca"`` or ``"t"``.

    Units:
        nats per sequence, token or byte.

    Raises:
        ValueError: lengths differ or a value is not finite.
        TableMismatch: the tables do not speak of the same targets.

    Example:
        >>> bounds = level_bounds([1.0, 1.2, 1.1], [2.0, 2.5, 2.3], [0.5, 0.9, 0.7], interval="t")
        >>> round(bounds.irreducible_error.lower.value, 3), round(bounds.irreducible_error.upper.value, 3)
        (0.4, 1.1)
    """
    shared: _Shared = (groups, per, level, interval, 2000, 0, "level_bounds")
    teacher = nll_input if nll_teacher is None else nll_teacher
    loss, null, best = (_mean(nll, *shared) for nll in (nll_input, nll_null, teacher))
    gap = _difference(nll_input, teacher, *shared, ("nll_input", "nll_teacher"), "lower")
    usable = _difference(nll_null, nll_input, *shared, ("nll_null", "nll_input"), "upper")
    zero = Estimate(0.0, 0.0, 0.0, kind="lower", method="exact: entropies are not negative", unit=loss.unit)
    negative = replace(loss, value=-loss.value, low=-loss.high, high=-loss.low, kind="lower", samples=None)
    because = "levels need H(L) and H(L|X), which cross-entropy only bounds"
    return LevelBounds(
        Bounds(zero, replace(best, kind="upper"), because),
        Bounds(gap, replace(loss, kind="upper"), because + "; eps = CE - H(L|X)"),
        Bounds(zero, replace(null, kind="upper"), because + "; I <= H(L) <= CE_null"),
        Bounds(replace(negative, method="0 - cross_entropy"), usable, because + "; EMI = H(L) - CE <= CE_null - CE"),
    )
