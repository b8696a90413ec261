"""Linear probes and spectra: what a fixed set of vectors says, measured with closed forms only."""

from __future__ import annotations

import torch
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-2, 10))


class RidgeProbe:
    """Ridge regression whose penalty is chosen by the leave-one-group-out error, in closed form and float64.

    Inputs are standardised and targets centred with the statistics of the training rows. Works with more columns than
    rows.

    Args:
        inputs: training inputs.
        targets: training targets.
        groups: rows that belong together (captions of one image) are left out together; None leaves out single rows.

    Shape:
        inputs: (n, p). targets: (n, q). groups: (n,), long. returns of a call: (m, q), float64.

    Raises:
        ValueError: fewer than two rows, or not as many targets as inputs.

    Source:
        Leave-out residuals of ridge regression from the hat matrix H, (I - H_gg)^-1 r_g: Golub, Heath and Wahba, 1979,
        for blocks.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> probe = RidgeProbe(x[:40], x[:40] @ torch.tensor([[1.0], [2.0], [0.0]]))
        >>> bool((probe(x[40:]) - x[40:] @ torch.tensor([[1.0], [2.0], [0.0]])).abs().max() < 0.01)
        True
    """

    def __init__(self, inputs: Tensor, targets: Tensor, groups: Tensor | None = None) -> None:
        if inputs.dim() != 2 or targets.dim() != 2 or len(inputs) != len(targets) or len(inputs) < 2:
            raise ValueError(
                "RidgeProbe: inputs and targets must be matrices with the same number of rows, at least 2, got "
                f"{tuple(inputs.shape)} and {tuple(targets.shape)}. Flatten the values and pair them with targets."
            )
        inputs, targets = inputs.double(), targets.double()
        self.mean = inputs.mean(0)
        spread = inputs.std(0)
        # Rounding noise of a column that never changes must not be blown up to unit variance.
        self.scale = torch.where(spread > 1e-6 * spread.max().clamp(min=1e-300), 1.0 / spread, 0.0)
        self.offset = targets.mean(0)
        rows, centred = self._standardise(inputs), targets - self.offset
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        values, turned = values.clamp(min=0.0), vectors.T @ centred
        groups = torch.arange(len(inputs)) if groups is None else groups
        blocks = [torch.nonzero(groups == group).flatten() for group in torch.unique(groups)]
        self.errors: dict[float, float] = {}  # penalty to mean squared leave-out error
        for penalty in PENALTIES:
            shrink = values / (values + penalty)
            residual = centred - vectors @ (shrink[:, None] * turned)
            error = 0.0
            for rows_out in blocks:
                part = vectors[rows_out]
                hat = (part * shrink) @ part.T + 1.0 / len(inputs)  # the mean is fitted too
                identity = torch.eye(len(rows_out), dtype=hat.dtype)
                error += float(torch.linalg.solve((1.0 + 1e-9) * identity - hat, residual[rows_out]).square().sum())
            self.errors[penalty] = error / targets.numel()
        self.penalty = min(self.errors, key=self.errors.__getitem__)
        self.weight = rows.T @ (vectors @ (turned / (values + self.penalty)[:, None]))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Predicted targets, (m, q) in float64."""
        predicted: Tensor = self._standardise(inputs.double()) @ self.weight + self.offset
        return predicted

    def _standardise(self, inputs: Tensor) -> Tensor:
        return (inputs - self.mean) * self.scale


def area_under_roc(scores: Tensor, labels: Tensor) -> Tensor:
    """Chance that a positive row scores above a negative one, ties half: 0.5 says nothing, 1 says all.

    Args:
        scores: one column per question.
        labels: True where the answer is yes; every column needs both answers.

    Shape:
        scores: (n, q). labels: (n, q), bool. returns: (q,), float64.

    Source:
        Mann and Whitney, 1947.

    Example:
        >>> import torch
        >>> scores, labels = torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([[0], [0], [1], [1]]).bool()
        >>> area_under_roc(scores, labels).item()
        0.75
    """
    areas = []
    for column, wanted in zip(scores.double().T, labels.T, strict=True):
        positive, negative = column[wanted], column[~wanted]
        above = (positive[:, None] > negative[None]).double() + 0.5 * (positive[:, None] == negative[None]).double()
        areas.append(above.mean())
    return torch.stack(areas)


def explained_variance(predicted: Tensor, targets: Tensor, mean: Tensor) -> float:
    """1 - squared error over squared distance from `mean`, the best constant guess of the training rows.

    Example:
        >>> import torch
        >>> explained_variance(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]]), torch.zeros(1))
        1.0
    """
    error = (predicted.double() - targets.double()).square().sum()
    return 1.0 - float(error / (targets.double() - mean.double()).square().sum())


def effective_rank(vectors: Tensor) -> float:
    """Exponential of the entropy of the normalised eigenvalues of the covariance: in how many directions they spread.

    Zero where they do not spread at all, but for rounding.

    Shape:
        vectors: (n, p).

    Source:
        Roy and Vetterli, 2007, "The effective rank", on the covariance's eigenvalues.

    Example:
        >>> import torch
        >>> round(effective_rank(torch.cat((torch.eye(3), -torch.eye(3)))), 6)
        3.0
    """
    centred = vectors.double() - vectors.double().mean(0)
    energy = torch.linalg.svdvals(centred).square()
    if energy.sum() <= 1e-24 * vectors.double().square().sum():
        return 0.0
    share = energy / energy.sum()
    return float(torch.exp(torch.special.entr(share).sum()))


def spread_over_norm(vectors: Tensor) -> float:
    """Root mean square distance from the mean, over the root mean square length; 0 when nothing moves.

    Shape:
        vectors: (n, p).

    Example:
        >>> import torch
        >>> spread_over_norm(torch.tensor([[3.0], [5.0]]))  # 1 / sqrt(17)
        0.242...
    """
    wide = vectors.double()
    spread = (wide - wide.mean(0)).square().sum(1).mean().sqrt()
    return float(spread / wide.square().sum(1).mean().sqrt()) if spread else 0.0
