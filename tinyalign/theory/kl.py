"""Kullback-Leibler divergence where both laws are known: categorical, per token of a sequence, and closed forms."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from tinyalign.theory.estimate import Estimate
from tinyalign.theory.kl_monte_carlo import monte_carlo_kl
from tinyalign.theory.likelihood import log_normalizer

__all__ = ["categorical_kl", "kl_divergence", "sequence_kl"]

_EITHER = ("probs", "logits", "covariance_matrix", "precision_matrix", "scale_tril")


def kl_divergence(
    p: Any,
    q: Any,
    *,
    inputs: Literal["probs", "logits"] = "probs",
    mask: Any = None,
    samples: int = 10_000,
    method: str = "fitted",
    seed: int | None = None,
) -> Estimate:
    """Compute KL(p || q) in the best way that what is given allows.

    Tables of probabilities or logits are treated exactly; two ``torch.distributions`` by their closed form, or by Monte
    Carlo with the fitted control variate where torch knows none.

    Args:
        p: probabilities, logits, or a ``torch.distributions.Distribution``.
        q: the same kind.
        inputs: whether tables hold ``"probs"`` or ``"logits"``.
        mask: True where a row counts, of p and q broadcast; they are averaged, and the others may hold anything.
        samples: Monte Carlo draws from p, where no closed form exists.
        method: Monte Carlo estimator (``"fitted"``, ``"k1"``, ``"k2"``, ``"k3"``).
        seed: seed of the draws; None uses torch's global generator.

    Shape:
        p, q: (V,) or (..., V). mask: (...). samples of the result: one KL per row that counts.

    Units:
        nats. Zero in q where p is not: inf.

    Raises:
        ValueError: shapes disagree, probabilities are negative or unnormalised, or the mask leaves nothing.
        TypeError: a distribution is mixed with a table.

    Source:
        Cover and Thomas 2006, section 2.3; Schulman 2020, "Approximating KL divergence", for the Monte Carlo names.

    Example:
        >>> round(kl_divergence([0.5, 0.5], [0.9, 0.1]).value, 6)
        0.510826
        >>> from torch.distributions import Normal
        >>> round(kl_divergence(Normal(0.0, 1.0), Normal(1.0, 1.0)).value, 6)
        0.5
    """
    laws = [isinstance(law, Distribution) for law in (p, q)]
    if any(laws):
        if not all(laws):
            raise TypeError(
                f"kl_divergence: p and q must both be distributions or both tables, got {type(p).__name__} and "
                f"{type(q).__name__}. Convert one of them."
            )
        return _between_laws(p, q, samples, method, seed)
    one, two = _pair(p, q)
    shape = one.shape[:-1]
    kept = torch.ones(shape, dtype=torch.bool, device=one.device)
    if mask is not None:
        kept = torch.as_tensor(mask, device=one.device).bool()
        if kept.shape != shape:
            raise ValueError(
                f"kl_divergence: mask must have shape {tuple(shape)}, got {tuple(kept.shape)}. Give one flag a row."
            )
        if not bool(kept.any()):
            raise ValueError("kl_divergence: mask must keep at least one row, got none. Check the label mask.")
    rows = _kept_rows(one, two, kept, inputs)
    value = float(rows.mean())
    return Estimate(value, value, value, method="exact", n=len(rows), samples=rows.cpu().numpy(), std_error=0.0)


def categorical_kl(p: Any, q: Any, *, inputs: Literal["probs", "logits"] = "probs", chunk: int = 16384) -> Tensor:
    """Compute KL(p || q) of each row exactly, in log space and at least float32.

    Args:
        p: probabilities or logits; -inf logits are impossible outcomes.
        q: the same.
        inputs: ``"probs"`` or ``"logits"``.
        chunk: vocabulary entries converted at a time.

    Shape:
        p, q: (..., V), broadcast against each other. returns: (...).

    Units:
        nats; inf where q excludes what p allows, never NaN.

    Raises:
        ValueError: shapes disagree, a row is not a law, or an unknown ``inputs``.

    Example:
        >>> categorical_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).tolist()
        [inf]
    """
    if inputs not in ("probs", "logits"):
        raise ValueError(
            f"categorical_kl: inputs must be 'probs' or 'logits', got {inputs!r}. Say what the tables hold."
        )
    one, two = _pair(p, q)
    _check_rows(one, "p", inputs)
    _check_rows(two, "q", inputs)
    wide = torch.float64 if torch.float64 in (one.dtype, two.dtype) else torch.float32
    if inputs == "logits":
        over, under = log_normalizer(one.to(wide), chunk=chunk), log_normalizer(two.to(wide), chunk=chunk)
    total = torch.zeros(one.shape[:-1], dtype=torch.float64, device=one.device)
    for part, other in zip(torch.split(one, chunk, -1), torch.split(two, chunk, -1), strict=True):
        if inputs == "logits":
            log_p, log_q = part.to(wide) - over.unsqueeze(-1), other.to(wide) - under.unsqueeze(-1)
        else:
            log_p, log_q = part.to(wide).log(), other.to(wide).log()
        weight = log_p.double().exp()
        ratio = torch.where(weight > 0, log_p.double() - log_q.double(), 0.0)
        total += torch.where(weight > 0, weight * ratio, 0.0).sum(-1)
    return total


def sequence_kl(p_logits: Tensor, q_logits: Tensor, mask: Any = None, *, chunk: int = 16384) -> Estimate:
    """Compute the KL per sequence: the sum over its positions of the KL between next-token laws.

    The positions are those of one given text (teacher forcing); averaged over texts drawn from p this is the KL between
    the two models' laws over sequences.

    Args:
        p_logits: next-token logits of the first model.
        q_logits: of the second.
        mask: True at positions that count; the others may hold anything.
        chunk: vocabulary entries converted at a time.

    Shape:
        p_logits, q_logits: (B, T, V). mask: (B, T). samples of the result: (B,), the sum of each sequence.

    Units:
        nats per sequence; ``details["per_token"]`` holds the ratio of sums.

    Raises:
        ValueError: shapes disagree, or a sequence has no position that counts.

    Source:
        Cover and Thomas 2006, theorem 2.5.3 (the chain rule of relative entropy).

    Example:
        >>> sequence_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).value
        0.0
    """
    if p_logits.ndim != 3 or p_logits.shape != q_logits.shape:
        raise ValueError(
            f"sequence_kl: p_logits and q_logits must share one shape (B, T, V), got {tuple(p_logits.shape)} and "
            f"{tuple(q_logits.shape)}. Run both models on the same tokens."
        )
    one, two = _pair(p_logits, q_logits)
    kept = torch.as_tensor(True if mask is None else mask, device=one.device).bool()
    if mask is None:
        kept = kept.expand(one.shape[:2])
    if kept.shape != one.shape[:2]:
        raise ValueError(
            f"sequence_kl: mask must have shape {tuple(one.shape[:2])}, got {tuple(kept.shape)}. Give one flag a token."
        )
    counts = kept.sum(dim=1)
    if int(counts.min()) == 0:
        raise ValueError(
            f"sequence_kl: mask must keep a token in every row, got none in row {int(counts.argmin())}. "
            "Drop that sequence."
        )
    per_token = _kept_rows(one, two, kept, "logits", chunk)
    sums = torch.zeros(len(counts), dtype=per_token.dtype, device=per_token.device)
    sums = sums.index_add(0, kept.nonzero()[:, 0], per_token)
    value = float(sums.mean())
    return Estimate(
        value,
        value,
        value,
        method="exact per position",
        n=len(sums),
        samples=sums.cpu().numpy(),
        details={"per_token": float(sums.sum() / counts.sum()), "tokens": int(counts.sum())},
    )


def _pair(p: Any, q: Any) -> tuple[Tensor, Tensor]:
    """Bring both tables to one shape and device."""
    one, two = (_table(values, name) for name, values in (("p", p), ("q", q)))
    if one.shape[-1] != two.shape[-1]:
        raise ValueError(
            f"categorical_kl: p and q must have one alphabet, got {one.shape[-1]} and {two.shape[-1]} outcomes. "
            "Use one tokenizer or pad the smaller table with zero probability."
        )
    one, two = torch.broadcast_tensors(one, two.to(one.device))  # type: ignore[no-untyped-call]
    return one, two


def _table(values: Any, name: str) -> Tensor:
    table = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    # Half precision stays: by its own rounding it may miss a sum of 1.
    if not table.is_floating_point() or (table.dtype == torch.float32 and not isinstance(values, Tensor)):
        table = table.double()
    if table.ndim == 0 or table.shape[-1] == 0:
        raise ValueError(
            f"categorical_kl: {name} must have shape (..., V), got {tuple(table.shape)}. Give a row of outcomes."
        )
    return table


def _kept_rows(
    one: Tensor, two: Tensor, kept: Tensor, inputs: Literal["probs", "logits"], chunk: int = 16384
) -> Tensor:
    """KL of the rows that count, in order, (rows,): the others may hold anything."""
    one, two = (table.detach() if bool(kept.all()) else table.detach()[kept] for table in (one, two))
    return categorical_kl(one, two, inputs=inputs, chunk=chunk).reshape(-1)


def _check_rows(table: Tensor, name: str, inputs: str) -> None:
    table = table.detach()
    if bool(torch.isnan(table).any()) or bool(torch.isposinf(table).any()):
        raise ValueError(f"categorical_kl: {name} must not hold NaN or +inf, got some. Repair the table first.")
    if inputs == "logits":
        if bool(torch.isneginf(table).all(dim=-1).any()):
            raise ValueError(
                f"categorical_kl: {name} must allow an outcome in every row, got one of -inf only. Mask it."
            )
        return
    low = float(table.min())
    worst = float((table.double().sum(dim=-1) - 1.0).abs().max())
    tolerance = max(1e-6, 4.0 * float(torch.finfo(table.dtype).eps) * math.sqrt(table.shape[-1]))
    if low < 0 or worst > tolerance:
        raise ValueError(
            f"categorical_kl: {name} must hold probabilities that sum to 1, got a minimum of {low:.3g} and a sum "
            f"off by {worst:.3g}. Normalise it, or pass inputs='logits'."
        )


def _between_laws(p: Any, q: Any, samples: int, method: str, seed: int | None) -> Estimate:
    # Differences of nearly equal terms lose what single precision has, torch's own for Python numbers.
    one, two = _in_double(p), _in_double(q)
    if one is None or two is None:
        one, two = p, q
    try:
        closed = torch.distributions.kl_divergence(one, two)
    except NotImplementedError:
        return _sampled(p, q, samples, method, seed)
    rows = closed.detach().double().reshape(-1)
    if bool(torch.isnan(rows).any()):
        return _sampled(p, q, samples, method, seed)
    value = float(rows.mean())
    return Estimate(value, value, value, method="closed form", n=len(rows), samples=rows.cpu().numpy(), std_error=0.0)


def _in_double(law: Distribution) -> Distribution | None:
    """Rebuild the law from its parameters in float64; None where its constructor asks for what it does not keep."""
    kind = type(law)
    if not kind.__module__.startswith("torch.distributions"):  # what others' constructors make of a parameter is theirs
        return None
    asked = inspect.signature(kind).parameters
    # Of parameters that follow from one another (probs, logits) a law sets first the one that it was made from.
    source = next((name for name in _lazy(law) if name in asked), None)
    given: dict[str, Any] = {}
    for name, parameter in asked.items():
        if name == "validate_args" or (source is not None and name != source and name in _EITHER):
            continue
        value = getattr(law, "base_dist" if name == "base_distribution" else name, parameter.default)
        if isinstance(value, Distribution):
            value = _in_double(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().double()
        if value is None or value is inspect.Parameter.empty:
            return None
        given[name] = value
    return kind(**given, validate_args=False)


def _lazy(law: Distribution) -> Iterator[str]:
    """Names among the parameters that follow from one another that a law, or one it is made of, has set, in order."""
    for name, value in vars(law).items():
        if name in _EITHER:
            yield name
        elif isinstance(value, Distribution):
            yield from _lazy(value)


def _sampled(p: Any, q: Any, samples: int, method: str, seed: int | None) -> Estimate:
    if seed is None:
        draws = p.sample((samples,))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draws = p.sample((samples,))
    return monte_carlo_kl(_log_prob(p, draws), _log_prob(q, draws), method=method)


def _log_prob(law: Any, draws: Tensor) -> Tensor:
    """Log-density of each draw, -inf where the law's support does not hold it."""
    inside = law.support.check(draws)
    density = torch.full(
        draws.shape[: draws.ndim - len(law.event_shape)], -torch.inf, dtype=draws.dtype, device=draws.device
    )
    apart = inside.reshape(inside.shape + (1,) * (draws.ndim - inside.ndim))
    safe = torch.where(apart, draws, _within(law, draws))
    density = torch.where(inside, law.log_prob(safe), density)
    return density.reshape(len(draws), -1).sum(dim=1)


def _within(law: Any, draws: Tensor) -> Tensor:
    """Return some point of the law's support in place of every draw."""
    inside: Tensor = law.sample().expand(draws.shape).to(draws)
    return inside
