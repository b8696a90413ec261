"""Bring what users pass (arrays, tensors on any device, lists) into checked numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_clusters", "as_labels", "as_matrix", "as_numpy", "as_vector", "check_level", "column_generator"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def as_numpy(values: Any) -> NDArray[Any]:
    """Return ``values`` as a numpy array; tensors of any dtype and device are detached and copied to the host."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.double()
        return np.asarray(values.numpy())
    return np.asarray(values)


def _floats(values: Any, where: str, name: str) -> FloatArray:
    array = as_numpy(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(
            f"{where}: {name} must be numeric, got dtype {array.dtype}. Pass numbers, or labels as integers."
        )
    array = array.astype(np.float64)
    bad = int(np.size(array) - np.isfinite(array).sum())
    if bad:
        raise ValueError(
            f"{where}: {name} must be finite, got {bad} NaN or infinite of {array.size} values. "
            "Drop or repair those records first."
        )
    return array


def as_vector(values: Any, where: str, name: str, *, minimum: int = 1) -> FloatArray:
    """Return a finite (n,) float64 vector."""
    array = _floats(values, where, name)
    if array.ndim != 1:
        raise ValueError(f"{where}: {name} must have shape (n,), got {array.shape}. Pass one value per sample.")
    if len(array) < minimum:
        raise ValueError(
            f"{where}: {name} must hold at least {minimum} samples, got {len(array)}. Collect more of them."
        )
    return array


def as_matrix(values: Any, where: str, name: str, *, minimum: int = 1) -> FloatArray:
    """Return a finite (n, d) float64 matrix; (n,) becomes (n, 1)."""
    array = _floats(values, where, name)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{where}: {name} must have shape (n,) or (n, d), got {array.shape}. Flatten each record.")
    if len(array) < minimum:
        raise ValueError(
            f"{where}: {name} must hold at least {minimum} samples, got {len(array)}. Collect more of them."
        )
    return array


def as_labels(values: Any, where: str, name: str) -> IntArray:
    """Return labels of any hashable kind as (n,) integers 0..m-1 in order of value; (n, d) rows are joint labels."""
    array = as_numpy(values)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"{where}: {name} must have shape (n,) or (n, d), got {array.shape}. Pass one label per sample."
        )
    if array.dtype.kind == "f":
        array = _floats(array, where, name)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    try:
        _, codes = np.unique(array, axis=0 if array.ndim == 2 else None, return_inverse=True)
    except TypeError as error:
        raise TypeError(
            f"{where}: {name} must hold labels that can be ordered, got dtype {array.dtype} ({error}). Use strings or "
            "integers, and name what is missing."
        ) from error
    return np.asarray(codes, dtype=np.int64).reshape(-1)


def as_clusters(groups: Any, n: int, where: str) -> IntArray:
    """Return (n,) cluster numbers 0..G-1; None makes every sample its own cluster."""
    if groups is None:
        return np.arange(n, dtype=np.int64)
    codes = as_labels(groups, where, "groups")
    if len(codes) != n:
        raise ValueError(f"{where}: groups must have one entry per sample ({n}), got {len(codes)}. Align them first.")
    return codes


def check_level(level: float, where: str) -> None:
    """Refuse a coverage outside (0, 1)."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"{where}: level must lie between 0 and 1, got {level}. Use 0.95 for a 95 % interval.")


def column_generator(column: FloatArray) -> np.random.Generator:
    """Return a generator seeded by the content of a column: what it draws for two columns is unrelated."""
    import xxhash

    return np.random.default_rng(xxhash.xxh3_64_intdigest(np.ascontiguousarray(column).tobytes()))
