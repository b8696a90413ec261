"""AdamW under a one-cycle rate: the loop of every training that takes seconds or minutes on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinyalign._checks import check_positive

CLIP = 1.0


class Descent(NamedTuple):
    """How long and how fast.

    Args:
        steps: optimiser steps.
        rate: highest learning rate.
        warmup: share of the steps in which the rate rises.
        weight_decay: of AdamW.
        to_zero: whether the last step itself has the cycle's lowest rate, and not the one after it.
    """

    steps: int
    rate: float
    warmup: float = 0.05
    weight_decay: float = 0.05
    to_zero: bool = False


def descend(
    loss_of: Callable[[int], Tensor],
    weights: Iterable[Tensor],
    how: Descent,
    *,
    where: str = "descend",
    advice: str = "Lower the learning rate.",
    track: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> list[float]:
    """Minimise a loss and return its value before every step.

    Anything larger than a run of minutes belongs in Hugging Face's ``Trainer``.

    Args:
        loss_of: the loss of a step, by its number.
        weights: what trains; gradients are clipped to norm 1.
        how: steps and rates.
        where: begins the message of an error.
        advice: ends it.
        track: wraps the steps with a progress display.

    Raises:
        ValueError: no steps.
        RuntimeError: the loss is no longer finite.

    Example:
        >>> place = torch.zeros(1, requires_grad=True)
        >>> curve = descend(lambda step: (place - 1).square().sum(), [place], Descent(steps=200, rate=0.1))
        >>> round(curve[0], 1), round(curve[-1], 1)
        (1.0, 0.0)
    """
    check_positive(where, "steps", how.steps)
    trained = [weight for weight in weights if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=how.rate, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.rate, total_steps=how.steps + (not how.to_zero), pct_start=how.warmup
    )
    curve: list[float] = []
    for step in range(how.steps) if track is None else track(range(how.steps)):
        loss = loss_of(step)
        curve.append(loss.item())
        if not torch.isfinite(loss):
            raise RuntimeError(f"{where}: the loss must stay finite, got {curve[-1]} at step {step}. {advice}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
    return curve
