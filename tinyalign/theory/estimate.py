"""The record that every estimator of this package returns: a value, how sure it is, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bounds", "Estimate", "Kind", "convert_unit"]

Kind = Literal["point", "lower", "upper", "usable"]
_KINDS = ("point", "lower", "upper", "usable")
_NATS_IN = {"nats": 1.0, "bits": math.log(2.0), "hartleys": math.log(10.0)}


def convert_unit(value: float, source: str, target: str) -> float:
    """Convert an amount of information between units, such as ``"nats/token"`` to ``"bits/token"``.

    Args:
        value: the amount, in ``source``.
        source: ``"nats"``, ``"bits"`` or ``"hartleys"``, alone or followed by ``"/token"`` or ``"/byte"``.
        target: the same; a bare word keeps the denominator of ``source``.

    Raises:
        ValueError: an unknown unit, or a change of denominator (nats per token are not nats per sequence).

    Example:
        >>> round(convert_unit(1.0, "bits", "nats"), 6)
        0.693147
    """
    return value * _factor(source, target)


def _split(unit: str) -> tuple[str, str]:
    word, _, denominator = unit.partition("/")
    if word not in _NATS_IN or denominator not in ("", "token", "byte"):
        raise ValueError(
            f"convert_unit: unit must be one of {', '.join(_NATS_IN)}, alone or followed by '/token' or '/byte', "
            f"got {unit!r}. Use for example 'nats' (per sequence) or 'bits/byte'."
        )
    return word, denominator


def _factor(source: str, target: str) -> float:
    source_word, source_per = _split(source)
    target_word, target_per = _split(target)
    if "/" in target and target_per != source_per:
        raise ValueError(
            f"convert_unit: target must count per {source_per or 'sequence'} as the source does, got "
            f"{source!r} to {target!r}. Compute the estimate again with the wanted per=."
        )
    return _NATS_IN[source_word] / _NATS_IN[target_word]


class _Constant(dict[str, Any]):
    """A dictionary that cannot be written; unlike a mapping proxy it is pickled and dumped as any other."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Estimate: candidates and details must stay as they were found, got a write. Copy with dict().")

    __setitem__ = __delitem__ = __ior__ = pop = popitem = clear = _refuse
    update: Any = _refuse
    setdefault: Any = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _Constant, (dict(self),)


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimated amount of information with its interval, unit and origin.

    Nothing is clamped: a negative estimate of a quantity that cannot be negative is shown as it came out. ``low`` and
    ``high`` are NaN where no valid interval is known, and a warning then says so.

    Attributes:
        value: the estimate, in ``unit``.
        low: lower end of the interval at ``level``.
        high: upper end of the interval at ``level``.
        kind: how ``value`` relates to the mutual information that it speaks of: ``"point"`` estimates the quantity
            itself, ``"lower"`` and ``"upper"`` bound it, ``"usable"`` is predictive (V-) information, which is neither.
        method: the estimator, in a word.
        unit: ``"nats"`` or ``"bits"``, per sequence or record unless ``"/token"`` or ``"/byte"`` follows.
        n: number of samples.
        n_clusters: number of independent clusters among them.
        samples: (n,) per-sample values behind the estimate, where they exist.
        candidates: other estimates of the same quantity by name, in ``unit``.
        warnings: ``"code: what is wrong and what to do"`` lines; empty when the method is within its validity.
        level: nominal coverage of the interval.
        std_error: standard error of ``value``; NaN where unknown.
        details: further numbers that a reader may want (k, folds, ceilings, ...).

    Shape:
        samples: (n,), float64.

    Raises:
        ValueError: an unknown kind or unit.

    Example:
        >>> gain = Estimate(0.5, 0.4, 0.6, method="t", n=100)
        >>> gain.to("bits").unit, round(gain.to("bits").value, 4)
        ('bits', 0.7213)
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    kind: Kind = "point"
    method: str = ""
    unit: str = "nats"
    n: int = 0
    n_clusters: int | None = None
    samples: NDArray[np.float64] | None = field(default=None, repr=False)
    candidates: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    level: float = 0.95
    std_error: float = math.nan
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(
                f"Estimate: kind must be one of {', '.join(_KINDS)}, got {self.kind!r}. Choose one of them."
            )
        _split(self.unit)
        if self.samples is not None:
            frozen = np.array(self.samples, dtype=np.float64)
            frozen.flags.writeable = False
            object.__setattr__(self, "samples", frozen)
        for name in ("candidates", "details"):
            object.__setattr__(self, name, _Constant(getattr(self, name)))

    def __float__(self) -> float:
        return float(self.value)

    def to(self, unit: str) -> Estimate:
        """Return the same estimate in another unit (``"bits"``, ``"nats"``, ``"hartleys"``)."""
        factor = _factor(self.unit, unit)
        denominator = _split(self.unit)[1]
        return replace(
            self,
            value=self.value * factor,
            low=self.low * factor,
            high=self.high * factor,
            std_error=self.std_error * factor,
            samples=None if self.samples is None else self.samples * factor,
            candidates={name: value * factor for name, value in self.candidates.items()},
            unit=_split(unit)[0] + (f"/{denominator}" if denominator else ""),
        )

    def warned(self, code: str) -> bool:
        """Return whether a warning with this code is in the record."""
        return any(line.partition(":")[0] == code for line in self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON types, without the per-sample values; NaN and inf become None."""
        record = {
            name: getattr(self, name)
            for name in ("value", "low", "high", "kind", "method", "unit", "n", "n_clusters", "level", "std_error")
        }
        record["candidates"] = dict(self.candidates)
        record["warnings"] = list(self.warnings)
        return {name: _plain(item) for name, item in record.items()}

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f}{interval} {self.unit} ({self.method}, n={self.n})"


@dataclass(frozen=True, eq=False)
class Bounds:
    """A quantity that the data only bound: a lower and an upper estimate, each with its own interval.

    Attributes:
        lower: estimate of the lower bound.
        upper: estimate of the upper bound.
        reason: why the quantity is not identified, and what would identify it.

    Example:
        >>> eps = Bounds(Estimate(0.1, 0.05, 0.15, kind="lower"), Estimate(0.4, 0.3, 0.5, kind="upper"), "no teacher")
        >>> eps.low, eps.high
        (0.05, 0.5)
    """

    lower: Estimate
    upper: Estimate
    reason: str = ""

    @property
    def low(self) -> float:
        """Lower confidence end of the lower bound."""
        return self.lower.low

    @property
    def high(self) -> float:
        """Upper confidence end of the upper bound."""
        return self.upper.high

    @property
    def unit(self) -> str:
        """Unit of both bounds."""
        return self.lower.unit

    def to(self, unit: str) -> Bounds:
        """Return the same bounds in another unit."""
        return replace(self, lower=self.lower.to(unit), upper=self.upper.to(unit))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
