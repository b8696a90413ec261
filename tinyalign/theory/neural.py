"""Variational bounds on mutual information with trained critics, always evaluated on held-out samples."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from tinyalign.theory._input import as_numpy, check_level
from tinyalign.theory.estimate import Estimate
from tinyalign.theory.nearest import paired

__all__ = ["BOUNDS", "JointCritic", "SeparableCritic", "club_upper_bound", "neural_information"]

BOUNDS = ("infonce", "dv", "nwj", "smile")
_CLIP = 5.0


class SeparableCritic(nn.Module):
    """Score pairs by the inner product of two embeddings: cheap, as all pairs of a batch are one product.

    Args:
        x_dim: columns of x.
        y_dim: columns of y.
        hidden: width of the hidden layers.
        embed: width of the embeddings.

    Shape:
        x: (B, x_dim). y: (C, y_dim). returns: (B, C).

    Source:
        Poole et al. 2019, arXiv 1905.06922, section 3 (separable critics).

    Example:
        >>> SeparableCritic(3, 2)(torch.randn(5, 3), torch.randn(4, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, x_dim: int, y_dim: int, *, hidden: int = 128, embed: int = 32) -> None:
        super().__init__()
        self.left, self.right = _mlp(x_dim, hidden, embed), _mlp(y_dim, hidden, embed)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the score of every pair."""
        return self.left(x) @ self.right(y).T  # type: ignore[no-any-return]


class JointCritic(nn.Module):
    """Score pairs by one network over both: more expressive, and B times the cost.

    Args:
        x_dim: columns of x.
        y_dim: columns of y.
        hidden: width of the hidden layers.

    Shape:
        x: (B, x_dim). y: (C, y_dim). returns: (B, C).

    Source:
        Poole et al. 2019, arXiv 1905.06922, section 3 (joint critics).

    Example:
        >>> JointCritic(3, 2)(torch.randn(5, 3), torch.randn(4, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, x_dim: int, y_dim: int, *, hidden: int = 128) -> None:
        super().__init__()
        self.net = _mlp(x_dim + y_dim, hidden, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the score of every pair."""
        rows, columns = len(x), len(y)
        pairs = torch.cat([x.repeat_interleave(columns, 0), y.repeat(rows, 1)], dim=1)  # (B * C, dx + dy)
        return self.net(pairs).reshape(rows, columns)  # type: ignore[no-any-return]


class _Split(NamedTuple):
    train: Tensor
    choose: Tensor
    held: Tensor


def neural_information(
    x: Any,
    y: Any,
    *,
    bound: str = "infonce",
    critic: nn.Module | None = None,
    steps: int = 1000,
    batch_size: int = 256,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Bound mutual information from below with a trained critic.

    Three fifths of the samples train the critic, a fifth chooses the step, and the value comes from the last fifth,
    which neither saw. InfoNCE cannot exceed the logarithm of the held-out count, and no such bound from n samples can
    be trusted above ln n: both ceilings are in ``details``, and a warning says when a value comes near.

    Args:
        x: samples.
        y: samples, row by row with x.
        bound: ``"infonce"``, ``"dv"``, ``"nwj"`` or ``"smile"``.
        critic: any module from (B, dx) and (C, dy) to (B, C) scores; None makes a ``SeparableCritic``.
        steps: training steps.
        batch_size: pairs per step.
        level: nominal coverage of the interval around the bound (not around the information).
        seed: of the split, the batches and the critic made here.

    Shape:
        x: (n,) or (n, dx). y: (n,) or (n, dy).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths, fewer than 50 samples, or an unknown bound.

    Source:
        van den Oord et al. 2018 (InfoNCE); Donsker and Varadhan 1983, Belghazi et al. 2018 (DV); Nguyen et al. 2010
        (NWJ); Song and Ermon 2020, arXiv 1910.06222 (SMILE, clipped at 5); McAllester and Stratos 2020 (ln n).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(400, 1))
        >>> neural_information(x, x + rng.normal(size=(400, 1)), steps=20).kind
        'lower'
    """
    check_level(level, "neural_information")
    if bound not in BOUNDS:
        raise ValueError(
            f"neural_information: bound must be one of {', '.join(BOUNDS)}, got {bound!r}. Use one of them."
        )
    left, right, parts = _prepare(x, y, seed, "neural_information")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if critic is None:
            critic = SeparableCritic(left.shape[1], right.shape[1])
        _train(critic, left, right, parts, "js" if bound == "smile" else bound, steps, batch_size)
    with torch.no_grad():
        scores = critic(left[parts.held], right[parts.held]).double()
    n = len(parts.held)
    value, influence = _bound_value(scores, bound)
    error = float(influence.std(ddof=1) / math.sqrt(n))
    half = float(ndtri(0.5 + level / 2)) * error
    ceiling = math.log(n)
    warnings: tuple[str, ...] = ()
    if value > ceiling - 1.5:
        warnings += (
            f"ceiling: {value:.2f} nats is close to ln {n} = {ceiling:.2f}, above which {n} held-out samples "
            "bound nothing",
        )
    if bound == "smile":
        warnings += ("smile: clipping trades the bound's guarantee for variance; it may exceed the information",)
    with torch.no_grad():
        seen = critic(left[parts.train[:n]], right[parts.train[:n]]).double()
    return Estimate(
        value,
        value - half,
        value + half,
        kind="lower",
        method=f"{bound} (held out)",
        n=len(left),
        samples=influence,
        candidates={name: _bound_value(scores, name)[0] for name in BOUNDS},
        warnings=warnings,
        level=level,
        std_error=error,
        details={"ceiling": ceiling, "on_training_samples": _bound_value(seen, bound)[0], "held_out": n},
    )


def club_upper_bound(
    x: Any, y: Any, *, steps: int = 1000, batch_size: int = 256, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Estimate the contrastive log-ratio upper bound with a Gaussian q(y | x), on held-out samples.

    It bounds from above only as far as q fits p(y | x); a poor fit makes it anything.

    Args:
        x: samples.
        y: samples, row by row with x.
        steps: training steps.
        batch_size: pairs per step.
        level: nominal coverage.
        seed: of the split, the batches and the network.

    Shape:
        x: (n,) or (n, dx). y: (n,) or (n, dy).

    Units:
        nats.

    Raises:
        ValueError: NaN or inf, unequal lengths or fewer than 50 samples.

    Source:
        Cheng et al. 2020, arXiv 2006.12013, equation 8.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(400, 1))
        >>> club_upper_bound(x, x + rng.normal(size=(400, 1)), steps=20).kind
        'upper'
    """
    check_level(level, "club_upper_bound")
    left, right, parts = _prepare(x, y, seed, "club_upper_bound")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        law = _mlp(left.shape[1], 128, 2 * right.shape[1])
        critic = _GaussianCritic(law)
        _train(critic, left, right, parts, "likelihood", steps, batch_size)
    with torch.no_grad():
        scores = critic(left[parts.held], right[parts.held]).double().numpy()
    local = np.diag(scores) - scores.mean(axis=1)
    influence = np.diag(scores) - scores.mean(axis=1) - scores.mean(axis=0) + scores.mean()
    value, error = float(local.mean()), float(influence.std(ddof=1) / math.sqrt(len(local)))
    half = float(ndtri(0.5 + level / 2)) * error
    return Estimate(
        value, value - half, value + half, kind="upper", method="club (held out)", n=len(left), samples=local,
        warnings=("club: an upper bound only where the Gaussian q(y | x) fits",), level=level, std_error=error,
    )  # fmt: skip


class _GaussianCritic(nn.Module):
    """Log q(y | x) of every pair under a diagonal normal law."""

    def __init__(self, law: nn.Module) -> None:
        super().__init__()
        self.law = law

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean, log_std = self.law(x).chunk(2, dim=1)
        log_std = log_std.clamp(-6, 6)
        distance = (y[None] - mean[:, None]) / log_std[:, None].exp()
        return (-0.5 * distance**2 - log_std[:, None] - 0.5 * math.log(2 * math.pi)).sum(-1)  # type: ignore[no-any-return]


def _prepare(x: Any, y: Any, seed: int, where: str) -> tuple[Tensor, Tensor, _Split]:
    left, right = paired(as_numpy(x), as_numpy(y), 49, where)
    tensors = []
    for part in (left, right):
        spread = part.std(axis=0)
        tensors.append(torch.from_numpy((part - part.mean(axis=0)) / np.where(spread > 0, spread, 1.0)).float())
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))
    first, second = int(0.6 * len(left)), int(0.8 * len(left))
    return tensors[0], tensors[1], _Split(order[:first], order[first:second], order[second:])


def _train(critic: nn.Module, x: Tensor, y: Tensor, parts: _Split, goal: str, steps: int, batch_size: int) -> None:
    """Maximise the goal on the training part; keep the weights of the best step on the choosing part."""
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    size = min(batch_size, len(parts.train))
    best, kept = -math.inf, copy.deepcopy(critic.state_dict())
    for step in range(steps):
        rows = parts.train[torch.randint(len(parts.train), (size,))]
        loss = -_objective(critic(x[rows], y[rows]), goal)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(critic.parameters(), 5.0)
        optimizer.step()
        if step % 25 == 24 or step == steps - 1:
            with torch.no_grad():
                score = float(_objective(critic(x[parts.choose], y[parts.choose]), goal))
            if score > best:
                best, kept = score, copy.deepcopy(critic.state_dict())
    critic.load_state_dict(kept)


def _objective(scores: Tensor, goal: str) -> Tensor:
    joint = scores.diagonal()
    if goal == "likelihood":
        return joint.mean()
    if goal == "infonce":
        return (joint - scores.logsumexp(dim=1)).mean()
    others = scores[~torch.eye(len(scores), dtype=torch.bool, device=scores.device)]
    if goal == "dv":
        return joint.mean() - others.logsumexp(0) + math.log(len(others))
    if goal == "nwj":
        return joint.mean() - (others - 1).exp().mean()
    return -nn.functional.softplus(-joint).mean() - nn.functional.softplus(others).mean()


def _bound_value(scores: Tensor, bound: str) -> tuple[float, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return the bound on a square score matrix and the per-sample terms of its variance."""
    n = len(scores)
    joint = scores.diagonal()
    if bound == "infonce":
        local = joint - scores.logsumexp(dim=1) + math.log(n)
        return float(local.mean()), local.numpy()
    off = ~torch.eye(n, dtype=torch.bool)
    clipped = scores.clamp(-_CLIP, _CLIP) if bound == "smile" else scores
    weight = torch.where(off, (clipped - 1).exp(), 0.0)
    rows, columns = weight.sum(dim=1) / (n - 1), weight.sum(dim=0) / (n - 1)
    mean = rows.mean()
    if bound == "nwj":
        return float(joint.mean() - mean), (joint - rows - columns).numpy()
    return float(joint.mean() - mean.log() - 1), (joint - (rows + columns) / mean).numpy()


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
    )
