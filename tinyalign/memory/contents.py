"""What a bank holds, apart from where it is stored and how it is searched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from tinyalign.memory import inputs
from tinyalign.memory.approximate import FaissIndex
from tinyalign.memory.blockfile import tensor_bytes
from tinyalign.memory.certified import CertifiedSearch
from tinyalign.memory.codec import KEY_DTYPES, VALUE_DTYPES, ValueCodec, dtype_name
from tinyalign.memory.errors import UnknownIdError
from tinyalign.memory.manifest import METRICS
from tinyalign.memory.rows import RowTable
from tinyalign.memory.search import UNIT
from tinyalign.memory.segment import Columns, decode_note
from tinyalign.memory.transform import KeyTransform

HASHED_AT_ONCE = 4096
ROWS_MEASURED = 16384


@dataclass(frozen=True)
class BankSpec:
    """Sizes, metric and dtypes of a bank, checked."""

    key_dim: int
    value_shape: tuple[int, ...]
    metric: str
    key_dtype: torch.dtype
    value_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.key_dim < 1:
            raise ValueError(f"MemoryBank: key_dim must be positive, got {self.key_dim}. Give the width of the keys.")
        if not self.value_shape or min(self.value_shape) < 1:
            raise ValueError(f"MemoryBank: value_shape must be positive sizes, got {self.value_shape}. Give (L, D).")
        if self.metric not in METRICS:
            raise ValueError(f"MemoryBank: metric must be 'cosine' or 'ip', got {self.metric!r}. Choose one of them.")
        for name, dtype, known in (
            ("key_dtype", self.key_dtype, KEY_DTYPES),
            ("value_dtype", self.value_dtype, VALUE_DTYPES),
        ):
            if dtype not in known.values():
                choices = ", ".join(f"torch.{each}" for each in known)
                raise ValueError(f"MemoryBank: {name} must be one of {choices}, got {dtype}. Choose one of them.")

    @property
    def value_size(self) -> int:
        """Numbers in one value."""
        return math.prod(self.value_shape)

    def describe(self) -> str:
        """Say it in a line."""
        values = dtype_name(self.value_dtype)
        return f"key_dim={self.key_dim}, value_shape={self.value_shape}, metric={self.metric!r}, {values} values"

    def empty(self) -> Columns:
        """Return columns without rows, as a template."""
        return Columns(
            keys=torch.empty(0, self.key_dim, dtype=self.key_dtype),
            values=torch.empty(0, self.value_size, dtype=self.value_dtype),
            ids=torch.empty(0, dtype=torch.int64),
            groups=torch.empty(0, dtype=torch.int64),
            scales=torch.empty(0) if self.value_dtype == torch.int8 else None,
        )


def spec_for(
    key_dim: int,
    value_shape: Sequence[int],
    metric: str,
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    transform: KeyTransform | None,
) -> BankSpec:
    """Return the checked spec of a new bank; with a transform, keys are stored as wide as it makes them."""
    shape = tuple(value_shape) if isinstance(value_shape, Iterable) else None
    if not inputs.is_whole(key_dim):
        raise ValueError(f"MemoryBank: key_dim must be an integer, got {key_dim!r}. Give the width of the keys.")
    if shape is None or not all(map(inputs.is_whole, shape)):
        raise ValueError(f"MemoryBank: value_shape must be integers, got {value_shape!r}. Give (L, D).")
    if transform is not None and transform.input_dim != key_dim:
        found = transform.input_dim
        raise ValueError(f"MemoryBank: transform must take keys of width {key_dim}, got {found}. Fit it to those.")
    width = int(key_dim) if transform is None else transform.output_dim
    return BankSpec(width, tuple(int(size) for size in shape), metric, key_dtype, value_dtype)


class Contents:
    """Entries with their codec and the next free id."""

    def __init__(
        self, spec: BankSpec, center: Tensor | None = None, next_id: int = 0, transform: KeyTransform | None = None
    ) -> None:
        self.spec = spec
        self.transform = transform
        self.codec = ValueCodec(spec.value_dtype, center)
        self.table = RowTable(spec.empty())
        self.next_id = next_id
        self.certified: CertifiedSearch | None = None
        self._longest = (-1, 0.0)  # the table's version, and the length
        self.index: FaissIndex | None = None

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        ids: Sequence[int] | Tensor | None,
        groups: Sequence[int] | Tensor | None,
        metadata: Sequence[Mapping[str, Any] | None] | None,
        where: str,
    ) -> Tensor:
        """Check everything, then add; nothing changes when a check fails."""
        spec = self.spec
        keys = inputs.float_rows(keys, (self.input_dim,), where, "keys")
        values = inputs.float_rows(values, spec.value_shape, where, "values")
        count = keys.shape[0]
        if values.shape[0] != count:
            raise ValueError(
                f"{where}: values must have {count} rows as keys do, got {values.shape[0]}. Pass one per key."
            )
        new_ids = self._new_ids(ids, count, where)
        new_groups = (
            np.full(count, -1) if groups is None else inputs.int_vector(groups, count, where, "groups", least=-1)
        )
        notes = inputs.notes_of(metadata, count, where)
        if not count:
            return torch.from_numpy(new_ids)
        stored_keys = self.stored_keys(keys, where)
        values = inputs.finite_rows(values.reshape(count, -1), where, "values")
        if not self.codec.quantised:
            values = inputs.stored_as(values, spec.value_dtype, where, "values")
        stored, scales = self.codec.encode(values)
        added = Columns(stored_keys, stored, torch.from_numpy(new_ids), torch.from_numpy(new_groups), scales)
        self.table.append(added, notes)
        self.next_id = max(self.next_id, int(new_ids.max()) + 1)
        return torch.from_numpy(new_ids.copy())

    def stored_keys(self, keys: Tensor, where: str) -> Tensor:
        """Return keys as they are kept: finite, of unit length for cosine, in the key dtype."""
        return inputs.stored_as(self.searchable(keys, where, "keys"), self.spec.key_dtype, where, "keys")

    def longest_key(self) -> float:
        """Return a length that no stored key exceeds; for cosine one, for ip measured when entries have changed."""
        if self.spec.metric == "cosine":
            return UNIT
        if self._longest[0] != self.table.version:
            keys = (part for _, columns in self.table.blocks() for part in torch.split(columns.keys, ROWS_MEASURED))
            longest = max((float(part.float().norm(dim=-1).max()) for part in keys if len(part)), default=0.0)
            self._longest = (self.table.version, longest)
        return self._longest[1]

    @property
    def input_dim(self) -> int:
        """Width of the keys and queries that callers hand in."""
        return self.spec.key_dim if self.transform is None else self.transform.input_dim

    def searchable(self, rows: Tensor, where: str, name: str) -> Tensor:
        """Return keys or queries (n, input_dim) as they are compared: transformed, of unit length for cosine."""
        rows = inputs.finite_rows(rows, where, name)
        cosine = self.spec.metric == "cosine"
        rows = inputs.normalised(rows, where, name) if cosine else rows
        if self.transform is not None:
            rows = self.transform(rows)
            rows = inputs.normalised(rows, where, name) if cosine else rows
        return rows

    def _new_ids(self, ids: Sequence[int] | Tensor | None, count: int, where: str) -> np.ndarray:
        if ids is None:
            if self.next_id + count - 1 > inputs.LARGEST_ID:
                raise ValueError(f"{where}: ids must be given after an id of {self.next_id - 1}, got None. Pass ids.")
            return np.arange(self.next_id, self.next_id + count, dtype=np.int64)
        array = inputs.int_vector(ids, count, where, "ids")
        distinct, counts = np.unique(array, return_counts=True)
        if len(distinct) != count:
            twice = int(distinct[counts > 1][0])
            raise ValueError(f"{where}: ids must be distinct, got {twice} twice. Tie duplicates together by groups.")
        known = self.table.find(array) >= 0
        if known.any():
            raise ValueError(
                f"{where}: ids must be new, got {int(array[known][0])} which the bank holds. Remove that entry first."
            )
        return array

    def rows_of(self, ids: Any, where: str) -> np.ndarray:
        """Return the rows of ids (n,), all of which must be there."""
        wanted = inputs.query_ids(ids, where).reshape(-1)
        rows = self.table.find(wanted)
        if (rows < 0).any():
            missing = int(wanted[rows < 0][0])
            raise UnknownIdError(f"{where}: ids must be in the bank, got {missing}. Ask `id in bank` first.")
        return rows

    def values_at(self, rows: Tensor) -> Tensor:
        """Return decoded values (n, V) at row numbers."""
        if not self.table.total:
            return torch.zeros(rows.numel(), self.spec.value_size, dtype=self.codec.decoded_dtype)
        stored = self.table.gather(rows, "values")
        if not self.codec.quantised:
            return stored
        out = self.table.rooms.empty(stored.shape, torch.float32)
        return self.codec.decode(stored, self.table.gather(rows, "scales"), out)

    def keys_at(self, rows: Tensor) -> Tensor:
        """Return stored keys (n, D) as float32 at row numbers."""
        if not rows.numel():
            return torch.empty(0, self.spec.key_dim)
        return self.table.gather(rows, "keys").to(torch.float32)

    def content_hash(self) -> str:
        """Name keys and ids of the live entries by content, whatever segments they lie in."""
        rows = self.table.live_rows()
        digest = xxhash.xxh3_128(f"{self.spec.key_dim}|{self.spec.key_dtype}|{self.spec.metric}|{len(rows)}|".encode())
        digest.update(self.table.column("ids")[rows].tobytes())
        for at in range(0, len(rows), HASHED_AT_ONCE):
            digest.update(tensor_bytes(self.table.gather(torch.from_numpy(rows[at : at + HASHED_AT_ONCE]), "keys")))
        return digest.hexdigest()

    def notes_at(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Return metadata at row numbers, an empty dict where there is none."""
        return [decode_note(self.table.note(row)) for row in rows.tolist()]
