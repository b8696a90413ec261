"""Checks at the boundary: one form for every error, ``<where>: <argument> must <rule>, got <value>. <what to do>``."""

from __future__ import annotations


def check_positive(where: str, name: str, value: int, *, least: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}: {name} must be an integer of at least {least}, got {value!r}. Pass such a number.")


def check_last_dim(where: str, name: str, tensor: object, width: int, shape: str) -> None:
    """Raise unless ``tensor`` is one, has the rank that ``shape`` spells out and ends in ``width``."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}. Use torch.as_tensor({name}).")
    rank = shape.count(",") + 1
    if tensor.dim() != rank or tensor.shape[-1] != width:
        raise ValueError(
            f"{where}: {name} must have shape {shape} with last size {width}, got {tuple(tensor.shape)}. "
            f"Check which features you pass, or build the module with that width."
        )


def check_mask(where: str, name: str, mask: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``mask`` is a boolean tensor of exactly ``shape``."""
    import torch

    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(mask).__name__}. Use torch.as_tensor({name}).")
    if mask.dtype != torch.bool:
        raise TypeError(f"{where}: {name} must be boolean with True = keep, got {mask.dtype}. Use mask.bool().")
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"{where}: {name} must have shape {shape}, got {tuple(mask.shape)}. Build it beside the tensor."
        )
