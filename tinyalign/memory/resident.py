"""A bank on a device: keys and values resident, search by matrix products, no step back to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.contents import Contents
from tinyalign.memory.errors import BankError
from tinyalign.memory.exclusion import padded_ids
from tinyalign.memory.fingerprint import require_match
from tinyalign.memory.inputs import is_whole
from tinyalign.memory.retrieval import Hits, Neighbours
from tinyalign.memory.search import SPARE

CALLER = "ResidentBank.search"
ROWS_AT_ONCE = 1 << 17  # scores of one pass: 512 kB per query


class _Shard(NamedTuple):
    """Some entries on one device."""

    keys: Tensor  # (n, D)
    values: Tensor | None  # (n, V)
    scales: Tensor | None
    center: Tensor | None
    ids: Tensor  # (n,)
    groups: Tensor  # (n,)


class ResidentBank:
    """A copy of a bank's entries on one or several devices, made by ``MemoryBank.to``.

    ``search`` finds what ``MemoryBank.search`` finds with the same arguments, but launches only device work: no result
    is looked at on the host, shapes depend on arguments alone, and a query that is not finite or (cosine) zero finds
    nothing instead of raising. It takes no ``where``, ``max_score`` and ``method``: those stay with ``MemoryBank``.
    With several devices the entries are split evenly; the queries travel to each and the best of all come back.

    Args:
        contents: what the bank holds.
        devices: where to put it; one shard of the entries on each.
        values: False leaves the values out, for ``neighbours`` alone.
        fingerprint: of the bank.

    Raises:
        BankError: the bank is empty.
        ValueError: there are no devices.

    Example:
        >>> from tinyalign.memory import MemoryBank
        >>> bank = MemoryBank(2, (1,))
        >>> ids = bank.add(torch.eye(2), torch.ones(2, 1), ids=[7, 8])
        >>> bank.to("cpu").search(torch.eye(2), k=1).ids.flatten().tolist()
        [7, 8]
    """

    def __init__(
        self,
        contents: Contents,
        devices: Sequence[torch.device],
        *,
        values: bool = True,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        if not len(contents.table):
            raise BankError("MemoryBank.to: the bank must hold entries, got 0. Add some first.")
        if not len(devices):
            raise ValueError("MemoryBank.to: device must name at least one device, got []. Pass 'cuda' or a list.")
        self.spec, self.input_dim = contents.spec, contents.input_dim
        self.fingerprint = dict(fingerprint or {})
        # From the host, the transform would be copied, and waited for, at every search.
        self._transform = None if contents.transform is None else contents.transform.to(devices[0])
        rows = torch.from_numpy(contents.table.live_rows())
        ids = torch.from_numpy(contents.table.column("ids"))[rows]
        order = ids.argsort()  # sorted within each shard, so that an id is found by bisection
        self._shards = []
        size = -(-len(rows) // len(devices))
        for number, device in enumerate(devices):
            mine = order[number * size : (number + 1) * size]
            if len(mine):
                self._shards.append(_load(contents, rows[mine], device, values=values))
        self.num_entries = len(rows)

    def __len__(self) -> int:
        return self.num_entries

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the shards are."""
        return tuple(shard.keys.device for shard in self._shards)

    @property
    def num_bytes(self) -> int:
        """Memory of keys, values and ids on all devices."""
        tensors = [t for shard in self._shards for t in shard if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int = 5,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
        *,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Hits:
        """Return the k best entries of each query and their values, as ``MemoryBank.search`` does."""
        found = self.neighbours(queries, k, exclude_ids, exclude_groups, fingerprint=fingerprint)
        values, _ = self.gather(found.ids)
        return Hits(found.scores, found.ids, values, found.mask)

    def neighbours(
        self,
        queries: Tensor | np.ndarray,
        k: int = 5,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
        *,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Neighbours:
        """Return the k best entries of each query without their values."""
        if fingerprint is not None:
            require_match(self.fingerprint, fingerprint, CALLER, "key.")
        if not is_whole(k) or k < 0:
            raise ValueError(f"{CALLER}: k must be an integer from 0, got {k!r}. Ask for that many neighbours.")
        k = int(k)
        if isinstance(queries, np.ndarray):
            queries = torch.from_numpy(np.ascontiguousarray(queries))
        if not isinstance(queries, Tensor):
            raise TypeError(
                f"{CALLER}: queries must be a tensor, got {type(queries).__name__}. Convert it with torch.as_tensor."
            )
        if queries.ndim != 2 or queries.shape[1] != self.input_dim or not queries.is_floating_point():
            raise ValueError(
                f"{CALLER}: queries must be float (B, {self.input_dim}), got {queries.dtype} "
                f"{tuple(queries.shape)}. Pass one row per query."
            )
        device = queries.device
        ids = self._padded(exclude_ids, queries, "exclude_ids")
        groups = self._padded(exclude_groups, queries, "exclude_groups")
        queries = self._projected(queries)
        found = [_top(shard, queries, k, ids, groups) for shard in self._shards]
        scores = torch.cat([scores.to(device, non_blocking=True) for scores, _ in found], dim=1)
        hits = torch.cat([ids.to(device, non_blocking=True) for _, ids in found], dim=1)
        best, at = scores.topk(min(k, scores.shape[1]))
        short = k - best.shape[1]
        best = torch.nn.functional.pad(best, (0, short), value=float("-inf"))
        hits = torch.nn.functional.pad(hits.gather(1, at), (0, short), value=-1)
        mask = best.isfinite()
        return Neighbours(best.masked_fill(~mask, 0.0), hits.masked_fill(~mask, -1), mask)

    def _projected(self, queries: Tensor) -> Tensor:
        """Return queries as they are compared: transformed, of unit length for cosine, zeros as NaN."""
        cosine = self.spec.metric == "cosine"
        queries = queries if queries.dtype == torch.float64 else queries.to(torch.float32)
        queries = _unit(queries) if cosine else queries
        if self._transform is not None:
            queries = self._transform(queries)
            queries = _unit(queries) if cosine else queries
        return queries.to(torch.float32)

    def _padded(self, exclude: Any, queries: Tensor, name: str) -> Tensor | None:
        if exclude is None:
            return None
        if not isinstance(exclude, Tensor):
            table = padded_ids(exclude, queries.shape[0], CALLER, name)
            assert table is not None
            exclude = torch.from_numpy(table)
        if exclude.ndim == 1:
            exclude = exclude[:, None]
        if exclude.ndim != 2 or exclude.shape[0] != queries.shape[0] or exclude.is_floating_point():
            raise ValueError(
                f"{CALLER}: {name} must be integers with one row per query, got {exclude.dtype} {tuple(exclude.shape)}."
                " Pass (B,) or (B, E) padded with -1."
            )
        padded: Tensor = exclude.to(queries.device, torch.int64, non_blocking=True)
        return padded

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return values of ids of any shape and a mask, False (values zero) where the bank has no such id."""
        flat, dtype = ids.reshape(-1), torch.float32 if self.spec.value_dtype == torch.int8 else self.spec.value_dtype
        values = torch.zeros(flat.shape[0], self.spec.value_size, dtype=dtype, device=ids.device)
        mask = torch.zeros(flat.shape[0], dtype=torch.bool, device=ids.device)
        for shard in self._shards:
            if shard.values is None:
                raise ValueError(
                    "ResidentBank.gather: the bank must have been moved with values=True, got values=False. "
                    "Move it again, or use neighbours()."
                )
            at, known = _find(shard.ids, flat.to(shard.ids.device, non_blocking=True))
            part = shard.values.index_select(0, at)
            if shard.scales is not None:
                assert shard.center is not None
                part = torch.addcmul(shard.center, part.to(torch.float32), shard.scales[at, None])
            part, known = part.to(ids.device, non_blocking=True), known.to(ids.device, non_blocking=True)
            values, mask = torch.where(known[:, None], part, values), mask | known
        return values.reshape(*ids.shape, *self.spec.value_shape), mask.reshape(ids.shape)


def _unit(rows: Tensor) -> Tensor:
    scaled = rows / rows.abs().amax(-1, keepdim=True)  # keeps tiny and huge rows from under- and overflowing
    lengths: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / lengths


def _load(contents: Contents, rows: Tensor, device: torch.device, *, values: bool) -> _Shard:
    columns = contents.table.columns_at(rows)
    move = {name: None if t is None else t.to(device) for name, t in columns._asdict().items()}
    center = contents.codec.center
    return _Shard(
        keys=move["keys"],  # type: ignore[arg-type]
        values=move["values"] if values else None,
        scales=move["scales"],
        center=None if center is None else center.to(device),
        ids=move["ids"],  # type: ignore[arg-type]
        groups=move["groups"],  # type: ignore[arg-type]
    )


def _find(known: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.searchsorted(known, ids).clamp_max(known.shape[0] - 1)
    return at, known[at] == ids


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    if keys.dtype == torch.float32:
        return queries @ keys.T
    if queries.device.type != "cuda":
        return queries @ keys.T.to(torch.float32)
    # Two 16-bit halves of each query in one product of 16-bit inputs and float32 sums: the keys are read once, as they
    # are, and the scores keep about 16 (bfloat16) or 22 (float16) bits.
    high = queries.to(keys.dtype)
    low = (queries - high.to(torch.float32)).to(keys.dtype)
    both = torch.mm(torch.cat([high, low]), keys.T, out_dtype=torch.float32)
    return both[: queries.shape[0]] + both[queries.shape[0] :]


def _top(shard: _Shard, queries: Tensor, k: int, ids: Tensor | None, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    device = shard.keys.device
    queries = queries.to(device, non_blocking=True)
    best = queries.new_full((queries.shape[0], 0), float("-inf"))
    rows = torch.zeros(queries.shape[0], 0, dtype=torch.int64, device=device)
    hidden = None
    if ids is not None:
        at, known = _find(shard.ids, ids.to(device, non_blocking=True))
        hidden = torch.where(known, at, -1)
    for start in range(0, shard.keys.shape[0], ROWS_AT_ONCE):
        keys = shard.keys[start : start + ROWS_AT_ONCE]
        size = keys.shape[0]
        scores = torch.nn.functional.pad(_products(queries, keys), (0, 1), value=float("-inf"))
        if hidden is not None:  # what lies in another block is written to the column after the last
            here = (hidden >= start) & (hidden < start + size)
            scores.scatter_(1, torch.where(here, hidden - start, size), float("-inf"))
        scores = scores[:, :size]
        for column in range(0 if groups is None else groups.shape[1]):
            assert groups is not None
            group = groups[:, column : column + 1].to(device, non_blocking=True)
            scores.masked_fill_((shard.groups[start : start + size] == group) & (group >= 0), float("-inf"))
        found, at = scores.topk(min(k + SPARE, size))
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, at + start], dim=1)
        best, at = best.topk(min(k + SPARE, best.shape[1]))
        rows = rows.gather(1, at)
    exact = (shard.keys[rows].to(torch.float64) * queries[:, None].to(torch.float64)).sum(-1).to(torch.float32)
    exact, at = exact.masked_fill(best == float("-inf"), float("-inf")).topk(min(k, best.shape[1]))
    return exact, shard.ids[rows.gather(1, at)]
