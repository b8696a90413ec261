"""From a caller's request to rows: checks, exclusion, the search itself, and the hits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory import inputs
from tinyalign.memory.approximate import FaissIndex
from tinyalign.memory.certified import CertifiedSearch, int8_pays
from tinyalign.memory.contents import Contents
from tinyalign.memory.errors import BankError, UnknownIdError
from tinyalign.memory.exclusion import banned_rows, padded_ids
from tinyalign.memory.search import Bounds, TopRows, exact_top_rows, few_rows
from tinyalign.memory.segment import decode_note

CALLER = "MemoryBank.search"
FEW = 0.1  # a filter that leaves less than this share of the entries gathers them first

Where = Callable[[dict[str, Any]], bool] | Tensor


class Hits(NamedTuple):
    """What ``search`` found, best first. Where fewer than k entries were left: mask False, id -1, score 0, value zeros.

    Args:
        scores: cosine or inner product with the query.
        ids: of the entries.
        values: of the entries.
        mask: True where there is an entry.

    Shape:
        scores: (B, K), float32. ids: (B, K), int64. values: (B, K, *value_shape). mask: (B, K), bool.
    """

    scores: Tensor  # (B, K) float32
    ids: Tensor  # (B, K) int64
    values: Tensor  # (B, K, *value_shape)
    mask: Tensor  # (B, K) bool


class Neighbours(NamedTuple):
    """What ``neighbours`` found: ``Hits`` without the values.

    Args:
        scores: cosine or inner product with the query.
        ids: of the entries; -1 where there is none.
        mask: True where there is an entry.

    Shape:
        scores: (B, K), float32. ids: (B, K), int64. mask: (B, K), bool.
    """

    scores: Tensor  # (B, K) float32
    ids: Tensor  # (B, K) int64
    mask: Tensor  # (B, K) bool


class Entry(NamedTuple):
    """One entry of a bank.

    Args:
        key: as it is stored, in float32.
        value: as it is stored; int8 is turned back.
        id: of the sample.
        group: -1 for none.
        metadata: empty where none was given.

    Shape:
        key: (D,). value: as the bank's ``value_shape``.
    """

    key: Tensor  # (D,) float32
    value: Tensor  # value_shape
    id: int
    group: int
    metadata: dict[str, Any]


class Limits(NamedTuple):
    """What a search must leave out."""

    exclude_ids: Any = None
    exclude_groups: Any = None
    where: Where | None = None
    max_score: float | None = None


METHODS = ("exact", "certified", "approximate")


def checked_queries(contents: Contents, queries: Any, k: Any) -> Tensor:
    """Return queries (B, D) on the CPU as float32, of unit length for cosine."""
    if not inputs.is_whole(k) or k < 0:
        raise ValueError(f"{CALLER}: k must be an integer from 0, got {k!r}. Ask for that many neighbours.")
    checked = inputs.float_rows(queries, (contents.input_dim,), CALLER, "queries")
    if not len(contents.table):
        raise BankError(f"{CALLER}: the bank must hold entries, got 0. Add some, or build it with build_memory_bank.")
    return contents.searchable(checked, CALLER, "queries").to(torch.float32).contiguous()


def top_rows(contents: Contents, queries: Tensor, k: int, limits: Limits, method: str = "exact") -> TopRows:
    """Return the best rows of checked queries within the limits; filters and score limits are searched exactly."""
    if method not in METHODS:
        raise ValueError(f"{CALLER}: method must be one of {', '.join(METHODS)}, got {method!r}. Choose one of them.")
    table, count = contents.table, queries.shape[0]
    ids = padded_ids(limits.exclude_ids, count, CALLER, "exclude_ids")
    groups = padded_ids(limits.exclude_groups, count, CALLER, "exclude_groups")
    max_score = _checked_score(limits.max_score)
    if limits.where is None and max_score is None and method != "exact":
        banned = banned_rows(table, ids, groups, table.dead)
        if method == "approximate":
            return current_index(contents).top_rows(queries, table, k, banned)
        if int8_pays() and contents.spec.key_dim > 1:  # torch's int8 product is wrong at width 1
            longest = contents.longest_key()
            return current_certificates(contents).top_rows(queries, table, k, banned, Bounds(None, longest))
    everywhere = table.dead
    if limits.where is not None:
        allowed = allowed_rows(contents, limits.where)
        if len(allowed) < FEW * table.total and max_score is None:
            return few_rows(queries, table, k, allowed, banned_rows(table, ids, groups, table.dead))
        everywhere = np.setdiff1d(np.arange(table.total), allowed, assume_unique=True)
    bounds = Bounds(max_score, contents.longest_key())
    return exact_top_rows(queries, table, k, banned_rows(table, ids, groups, everywhere), bounds)


def _checked_score(max_score: Any) -> float | None:
    if max_score is None:
        return None
    if isinstance(max_score, bool) or not isinstance(max_score, (int, float, np.number)) or max_score != max_score:
        raise ValueError(
            f"{CALLER}: max_score must be a number, got {max_score!r}. Pass a score such as 0.98, or None."
        )
    return float(max_score)


def current_index(contents: Contents) -> FaissIndex:
    """Return the approximate index, or say that there is none for the entries as they are."""
    if contents.index is None or contents.index.version != contents.table.version:
        state = "none" if contents.index is None else f"{contents.index.factory!r} of entries that have changed since"
        raise BankError(f"{CALLER}: the bank must have an index for 'approximate', got {state}. Call build_index.")
    return contents.index


def current_certificates(contents: Contents) -> CertifiedSearch:
    """Return the int8 copies of the keys, made anew when entries have changed."""
    if contents.certified is None or contents.certified.version != contents.table.version:
        contents.certified = CertifiedSearch(contents.table)
    return contents.certified


def allowed_rows(contents: Contents, where: Where) -> np.ndarray:
    """Return the live rows that a filter keeps, ascending."""
    live = contents.table.live_rows()
    if not callable(where):
        flags = inputs.as_flags(where)
        if flags is None or flags.dtype != torch.bool or tuple(flags.shape) != (len(live),):
            found = repr(where) if flags is None else f"{flags.dtype} {tuple(flags.shape)}"
            raise ValueError(
                f"{CALLER}: where must be a bool tensor of shape ({len(live)},), got {found}. "
                "Give one flag per entry, in the order of bank.ids, or a function of the metadata."
            )
        kept: np.ndarray = live[flags.cpu().numpy()]
        return kept
    keep = [bool(where(decode_note(contents.table.note(row)))) for row in live.tolist()]
    chosen: np.ndarray = live[np.asarray(keep, dtype=bool)]
    return chosen


def as_neighbours(contents: Contents, top: TopRows, device: torch.device) -> Neighbours:
    """Turn rows into ids, on the device of the queries."""
    mask = top.rows >= 0
    known = torch.from_numpy(contents.table.column("ids"))
    ids = known[top.rows.clamp_min(0)].masked_fill(~mask, -1)
    return Neighbours(top.scores.masked_fill(~mask, 0.0).to(device), ids.to(device), mask.to(device))


def values_of(contents: Contents, ids: Any) -> tuple[Tensor, Tensor]:
    """Return the values of ids of any shape, and which are not -1."""
    wanted = inputs.query_ids(ids, "MemoryBank.gather")
    rows = contents.table.find(wanted)
    absent = rows < 0
    unknown = absent & (wanted != -1)
    if unknown.any():
        raise UnknownIdError(
            f"MemoryBank.gather: ids must be in the bank or -1, got {int(wanted[unknown][0])}. "
            "Make neighbour tables anew after removing entries."
        )
    device = ids.device if isinstance(ids, Tensor) else torch.device("cpu")
    values = contents.values_at(torch.from_numpy(np.where(absent, 0, rows).reshape(-1)))
    if absent.any():
        values[torch.from_numpy(absent.reshape(-1))] = 0
    values = values.reshape(*wanted.shape, *contents.spec.value_shape)
    return values.to(device), torch.from_numpy(~absent).to(device)


def entry_of(contents: Contents, entry_id: int) -> Entry:
    """Return one entry by its id."""
    rows = contents.rows_of([entry_id], "MemoryBank[id]")
    at = torch.from_numpy(rows)
    return Entry(
        key=contents.keys_at(at)[0],
        value=contents.values_at(at)[0].reshape(contents.spec.value_shape),
        id=int(entry_id),
        group=int(contents.table.column("groups")[rows[0]]),
        metadata=contents.notes_at(rows)[0],
    )
