"""Centring and whitening keys, so that what all share no longer hides what tells them apart."""

from __future__ import annotations

import copy

import torch
import xxhash
from torch import Tensor

from tinyalign.memory.inputs import finite_rows, float_rows, is_whole, normalised
from tinyalign.memory.manifest import METRICS


class KeyTransform:
    """An affine map of keys and queries, ``(key - mean) @ projection``, saved with the bank that uses it.

    Pooled features share a large common part: their cosines crowd near 1, and a few keys become everybody's neighbour.
    Centring takes the mean away; whitening also gives every direction of the remaining spread an equal say, and may
    drop the weakest ones.

    Args:
        mean: (D,) what is subtracted.
        projection: (D, D') what follows; None for centring alone.

    Shape:
        keys: (M, D). returns: (M, D').

    Raises:
        ValueError: the sizes do not fit.

    Example:
        >>> keys = torch.randn(100, 8) + 5
        >>> transform = KeyTransform.fit(keys, whiten=True, dim=4)
        >>> tuple(transform(keys).shape)
        (100, 4)
    """

    def __init__(self, mean: Tensor, projection: Tensor | None = None) -> None:
        if mean.ndim != 1 or not mean.shape[0]:
            raise ValueError(f"KeyTransform: mean must have shape (D,), got {tuple(mean.shape)}. Use KeyTransform.fit.")
        if projection is not None and (projection.ndim != 2 or projection.shape[0] != mean.shape[0]):
            raise ValueError(
                f"KeyTransform: projection must have shape ({mean.shape[0]}, D'), got {tuple(projection.shape)}. "
                "Use KeyTransform.fit."
            )
        self.mean = mean.detach().to("cpu", torch.float32).clone()
        self.projection = None if projection is None else projection.detach().to("cpu", torch.float32).clone()

    @property
    def input_dim(self) -> int:
        """Width of the keys it takes."""
        return int(self.mean.shape[0])

    @property
    def output_dim(self) -> int:
        """Width of the keys it gives."""
        return self.input_dim if self.projection is None else int(self.projection.shape[1])

    @classmethod
    def fit(
        cls, keys: Tensor, *, metric: str = "cosine", whiten: bool = False, dim: int | None = None, floor: float = 1e-3
    ) -> KeyTransform:
        """Fit to a sample of keys.

        Args:
            keys: of the kind the bank will hold.
            metric: the bank's; for ``cosine`` keys are brought to unit length first.
            whiten: divide by the spread in every principal direction.
            dim: keep that many principal directions; all when absent. Implies a rotation.
            floor: share of the largest spread under which a direction is not blown up further.

        Shape:
            keys: (M, D).

        Raises:
            ValueError: there are no keys, one is not finite, ``dim`` is out of range or the metric unknown.
        """
        where = "KeyTransform.fit"
        if keys.ndim != 2 or not keys.shape[0]:
            raise ValueError(f"{where}: keys must have shape (M, D), got {tuple(keys.shape)}. Pass a sample of keys.")
        if metric not in METRICS:
            raise ValueError(f"{where}: metric must be 'cosine' or 'ip', got {metric!r}. Pass that of the bank.")
        if dim is not None and (not is_whole(dim) or not 1 <= dim <= keys.shape[1]):
            raise ValueError(f"{where}: dim must be from 1 to {keys.shape[1]}, got {dim}. Keep that many directions.")
        sample = finite_rows(float_rows(keys, (keys.shape[1],), where, "keys"), where, "keys")
        sample = (normalised(sample, where, "keys") if metric == "cosine" else sample).to(torch.float64)
        mean = sample.mean(0)
        if not whiten and dim is None:
            return cls(mean)
        centred = sample - mean
        spread, directions = torch.linalg.eigh(centred.T @ centred / sample.shape[0])  # ascending
        spread, directions = spread.flip(0).clamp_min(0)[:dim], directions.flip(1)[:, :dim]
        if whiten:
            deviations = spread.sqrt()
            directions = directions / deviations.clamp_min(float(deviations.max()) * floor or 1.0)
        return cls(mean, directions)

    def __call__(self, keys: Tensor) -> Tensor:
        """Map keys (n, D) to (n, D'), in float32 or better; by way of float64, so that batch mates do not show."""
        dtype = torch.promote_types(keys.dtype, torch.float32)
        wide = torch.float64 if keys.device.type == "cpu" else dtype
        centred = keys.to(wide) - self.mean.to(keys.device, wide)
        return (centred if self.projection is None else centred @ self.projection.to(keys.device, wide)).to(dtype)

    def to(self, device: torch.device | str) -> KeyTransform:
        """Return a copy on a device, for keys there."""
        moved = copy.copy(self)
        moved.mean = self.mean.to(device)
        moved.projection = None if self.projection is None else self.projection.to(device)
        return moved

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyTransform):
            return NotImplemented
        return torch.equal(self.packed(), other.packed())

    __hash__ = None  # type: ignore[assignment]

    def packed(self) -> Tensor:
        """Return mean and projection as one float32 vector, as they are saved."""
        parts = [self.mean] if self.projection is None else [self.mean, self.projection.reshape(-1)]
        return torch.cat(parts)

    def name(self) -> str:
        """Return 16 hex digits that name the map by content."""
        return xxhash.xxh3_64_hexdigest(self.packed().cpu().numpy().tobytes())

    @classmethod
    def unpacked(cls, packed: Tensor, output_dim: int) -> KeyTransform:
        """Undo ``packed`` for keys of width ``output_dim``."""
        size = packed.shape[0]
        if size == output_dim:
            return cls(packed)
        input_dim, left = divmod(size, 1 + output_dim)
        if left or not input_dim:
            raise ValueError(
                f"KeyTransform.unpacked: packed must fit width {output_dim}, got {size} numbers. Pass what "
                "`packed` gave."
            )
        return cls(packed[:input_dim], packed[input_dim:].reshape(input_dim, output_dim))
