"""Checking what a caller hands to a bank, before anything of the bank changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.segment import encode_note

LARGEST_ID = 2**63 - 1


def float_rows(tensor: Any, width: tuple[int, ...], caller: str, name: str) -> Tensor:
    """Return a detached CPU float tensor (M, *width), or say what is wrong with its type or shape."""
    if isinstance(tensor, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(tensor))
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{caller}: {name} must be a tensor, got {type(tensor).__name__}. Convert it with torch.as_tensor."
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{caller}: {name} must be dense, got {tensor.layout}. Convert it with .to_dense().")
    if not tensor.is_floating_point():
        raise TypeError(f"{caller}: {name} must be floating point, got {tensor.dtype}. Convert it with .float().")
    if tensor.ndim != 1 + len(width) or tuple(tensor.shape[1:]) != width:
        expected = ", ".join(str(size) for size in width)
        raise ValueError(
            f"{caller}: {name} must have shape (M, {expected}), got {tuple(tensor.shape)}. "
            "Pass one row per entry, of the sizes the bank was made with."
        )
    return tensor.detach().to("cpu")


def first_bad_row(tensor: Tensor) -> int | None:
    """Return the first row that holds NaN or an infinity."""
    if bool(torch.isfinite(tensor.sum())):  # one pass; an overflowing sum only costs the second look
        return None
    bad = ~torch.isfinite(tensor).flatten(1).all(1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def finite_rows(tensor: Tensor, caller: str, name: str) -> Tensor:
    """Return the tensor if it is finite, or name the first row that is not."""
    row = first_bad_row(tensor)
    if row is not None:
        raise ValueError(
            f"{caller}: {name} must be finite, got NaN or infinity in row {row}. Look at what made that row."
        )
    return tensor


def normalised(keys: Tensor, caller: str, name: str) -> Tensor:
    """Return rows (M, D) as float32 of unit length; a row of zeros has no direction and is refused."""
    keys = keys.to(torch.float64 if keys.dtype == torch.float64 else torch.float32)
    largest = keys.abs().amax(-1, keepdim=True)  # scaling first keeps tiny and huge rows from under- and overflowing
    if bool((largest == 0).any()):
        row = int((largest[:, 0] == 0).nonzero()[0])
        raise ValueError(
            f"{caller}: {name} must be non-zero for metric 'cosine', got zeros in row {row}. "
            "Leave that row out, or use metric='ip'."
        )
    scaled = keys / largest
    lengths: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return (scaled / lengths).to(torch.float32)


def stored_as(tensor: Tensor, dtype: torch.dtype, caller: str, name: str) -> Tensor:
    """Cast to a storage dtype, refusing numbers beyond its range."""
    cast = tensor.to(dtype)
    row = first_bad_row(cast)
    if row is not None:
        largest = float(tensor[row].abs().max())
        raise ValueError(
            f"{caller}: {name} must stay within the range of {dtype}, got {largest:.4g} in row {row}. "
            f"Use {name[:-1]}_dtype=torch.float32 or torch.bfloat16."
        )
    return cast


def int_vector(values: Any, count: int, caller: str, name: str, least: int = 0) -> np.ndarray:
    """Return ``count`` int64 numbers, each at least ``least``."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64).reshape(-1)
    if array.dtype == np.bool_ or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{caller}: {name} must be integers, got {array.dtype}. Hash text with tinyalign.data.stable_id."
        )
    if array.ndim != 1 or len(array) != count:
        raise ValueError(f"{caller}: {name} must have shape ({count},), got {array.shape}. Pass one per entry.")
    if count and (int(array.min()) < least or int(array.max()) > LARGEST_ID):
        wrong = int(array.min()) if int(array.min()) < least else int(array.max())
        raise ValueError(f"{caller}: {name} must be from {least} to 2**63 - 1, got {wrong}. Number entries from 0.")
    return array.astype(np.int64)


def query_ids(ids: Any, caller: str) -> np.ndarray:
    """Return ids of any shape as int64; -1 (nothing) is allowed."""
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    array = np.asarray(ids)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype == np.bool_ or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{caller}: ids must be integers, got {array.dtype}. Pass the ids given to add().")
    return array.astype(np.int64)


def notes_of(metadata: Sequence[Mapping[str, Any] | None] | None, count: int, caller: str) -> list[bytes] | None:
    """Return metadata as JSON bytes, one per entry; None when there is none at all."""
    if metadata is None:
        return None
    if isinstance(metadata, (str, bytes, Mapping)) or not isinstance(metadata, Sequence) or len(metadata) != count:
        found = len(metadata) if isinstance(metadata, Sequence) else type(metadata).__name__
        raise ValueError(
            f"{caller}: metadata must be a list of {count} dicts, got {found}. Pass one dict or None per entry."
        )
    notes = []
    for row, note in enumerate(metadata):
        if note is not None and not isinstance(note, Mapping):
            raise TypeError(
                f"{caller}: metadata must be dicts, got {type(note).__name__} in row {row}. Pass a dict or None."
            )
        try:
            notes.append(encode_note(None if note is None else dict(note)))
            odd = next(_odd_keys(note), None)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"{caller}: metadata must be plain JSON values, got {error} in row {row}. Use text and numbers."
            ) from error
        if odd is not None:
            raise TypeError(
                f"{caller}: metadata must have text as keys, got {odd[0]!r} in row {row}. Write it as text."
            )
    return notes


def _odd_keys(value: Any) -> Iterator[tuple[Any]]:
    """Yield the keys that are no text, at any depth."""
    if isinstance(value, Mapping):
        yield from ((key,) for key in value if not isinstance(key, str))
    if isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _odd_keys(part)


def as_flags(where: Any) -> Tensor | None:
    """Return an array or list as a tensor; None where it is none, or holds what a tensor cannot."""
    if not isinstance(where, (Tensor, np.ndarray, list)):
        return None
    try:
        return torch.as_tensor(where)
    except (TypeError, ValueError, RuntimeError):
        return None


def is_whole(number: object) -> TypeGuard[int]:
    """Say whether something is an integer, Python's or NumPy's, and no bool."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)
