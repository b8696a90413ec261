"""All entries of a bank as one numbered list over its segments, with the removed ones marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.lookup import IdLookup
from tinyalign.memory.rooms import Rooms
from tinyalign.memory.segment import Columns, FixedSegment, GrowingSegment, Segment


class RowSource(Protocol):
    """What writing a segment needs to know of entries."""

    @property
    def has_scales(self) -> bool:
        """True when each entry has a scale of its own."""
        ...

    @property
    def has_notes(self) -> bool:
        """True when some entry may have metadata."""
        ...

    def live_rows(self) -> np.ndarray:
        """Row numbers of the entries, ascending."""
        ...

    def gather(self, rows: Tensor, column: str) -> Tensor:
        """Return one column at row numbers (n,)."""
        ...

    def note(self, row: int) -> bytes:
        """Return the metadata of one row as JSON bytes."""
        ...


class RowTable:
    """Rows are numbered through the segments in order; a removed row keeps its number until the bank is compacted.

    Finding an id is a look-up over the fixed segments plus a dict over the growing one, so neither a mapped bank of
    half a million entries nor many small adds ever build a large dict.
    """

    def __init__(self, template: Columns) -> None:
        self._template = template
        self._segments: list[Segment] = []
        self._dead = np.zeros(0, dtype=np.int64)  # sorted row numbers
        self._recent: dict[int, int] = {}  # id -> row, for the growing segment
        self._lookup: IdLookup | None = None  # of the live fixed rows
        self._joined: dict[str, np.ndarray] = {}
        self.rooms = Rooms()  # for what is gathered
        self.version = 0  # counts every change
        self.changed = False  # rows were removed since the table was made

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in row order."""
        return tuple(self._segments)

    @property
    def dead(self) -> np.ndarray:
        """Sorted row numbers of removed entries."""
        return self._dead

    @property
    def total(self) -> int:
        """Rows, removed ones included."""
        return sum(len(segment) for segment in self._segments)

    @property
    def has_scales(self) -> bool:
        """True when each entry has a scale of its own (int8 values)."""
        return self._template.scales is not None

    @property
    def has_notes(self) -> bool:
        """True when some entry may have metadata."""
        return any(segment.has_notes for segment in self._segments)

    def __len__(self) -> int:
        return self.total - len(self._dead)

    def blocks(self) -> Iterator[tuple[int, Columns]]:
        """Yield each segment's first row number and columns."""
        start = 0
        for segment in self._segments:
            yield start, segment.columns
            start += len(segment)

    def attach(self, segment: FixedSegment) -> None:
        """Put a segment that no longer changes after the last one."""
        if self._segments and isinstance(self._segments[-1], GrowingSegment):
            self._segments[-1] = self._segments[-1].frozen()
            self._recent = {}
        self._segments.append(segment)
        self._forget()

    def mark_dead(self, rows: np.ndarray) -> None:
        """Take over rows that were removed earlier."""
        self._dead = np.union1d(self._dead, rows).astype(np.int64)
        self._forget()

    def append(self, added: Columns, notes: Sequence[bytes] | None) -> None:
        """Put entries into the growing segment."""
        if not self._segments or not isinstance(self._segments[-1], GrowingSegment):
            self._segments.append(GrowingSegment(self._template))
        first = self.total
        segment = self._segments[-1]
        assert isinstance(segment, GrowingSegment)
        segment.append(added, notes)
        self._recent.update(zip(added.ids.tolist(), range(first, self.total), strict=True))
        self._joined.clear()
        self.version += 1

    def remove(self, rows: np.ndarray) -> None:
        """Mark rows as removed."""
        gone = set(rows.tolist())
        self._recent = {key: row for key, row in self._recent.items() if row not in gone}
        self.changed = self.changed or len(rows) > 0
        self.mark_dead(rows)

    def _forget(self) -> None:
        self._lookup = None
        self._joined.clear()
        self.version += 1

    def column(self, name: str) -> np.ndarray:
        """Return ``ids`` or ``groups`` of every row, removed ones included; to be read, not written."""
        if name not in self._joined:
            parts = [getattr(segment.columns, name).numpy() for segment in self._segments]
            # A bank's one segment is read where it is: half a million ids are 4 MB that ranks share.
            self._joined[name] = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        return self._joined[name]

    def live_rows(self) -> np.ndarray:
        """Row numbers of the entries that were not removed, ascending."""
        rows = np.arange(self.total, dtype=np.int64)
        return np.delete(rows, self._dead) if len(self._dead) else rows

    def _known(self) -> IdLookup:
        if self._lookup is None:
            growing = bool(self._segments) and isinstance(self._segments[-1], GrowingSegment)
            fixed = self.total - (len(self._segments[-1]) if growing else 0)
            rows, ids = np.arange(fixed, dtype=np.int64), self.column("ids")[:fixed]
            if len(self._dead):
                rows = np.delete(rows, self._dead[self._dead < fixed])
                ids = ids[rows]
            self._lookup = IdLookup(ids, rows)
        return self._lookup

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id, -1 where the bank has none; any shape."""
        flat = ids.reshape(-1)
        found = self._known().find(flat)
        if self._recent:
            for position in np.flatnonzero(found < 0).tolist():
                found[position] = self._recent.get(int(flat[position]), -1)
        return found.reshape(ids.shape)

    def rows_of_groups(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return every pair (position in ``groups``, row of that group), removed rows included."""
        if "group_order" not in self._joined:
            order = np.argsort(self.column("groups"), kind="stable")
            self._joined["group_order"] = order
            self._joined["group_sorted"] = self.column("groups")[order]
        known, order = self._joined["group_sorted"], self._joined["group_order"]
        begin, end = np.searchsorted(known, groups, "left"), np.searchsorted(known, groups, "right")
        counts = np.where(groups < 0, 0, end - begin)
        positions = np.repeat(np.arange(len(groups)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return positions, order[np.repeat(begin, counts) + within]

    def gather(self, rows: Tensor, column: str) -> Tensor:
        """Return one column at row numbers (n,), all of them valid."""
        template = getattr(self._template, column)
        out = self.rooms.empty((rows.shape[0], *template.shape[1:]), template.dtype)
        if len(self._segments) == 1:
            return self._take(self._segments[0], rows, column, out)
        start = 0
        for segment in self._segments:
            at = ((rows >= start) & (rows < start + len(segment))).nonzero().squeeze(1)
            if at.numel():
                part = self.rooms.empty((at.shape[0], *template.shape[1:]), template.dtype)
                out[at] = self._take(segment, rows[at] - start, column, part)
            start += len(segment)
        return out

    @staticmethod
    def _take(segment: Segment, rows: Tensor, column: str, out: Tensor) -> Tensor:
        table: Tensor = getattr(segment.columns, column)
        if column == "values" and isinstance(segment, FixedSegment):
            segment.expect(rows)
        return torch.index_select(table, 0, rows, out=out)

    def columns_at(self, rows: Tensor) -> Columns:
        """Return every column at row numbers (n,)."""
        names = [name for name, column in zip(Columns._fields, self._template, strict=True) if column is not None]
        found: dict[str, Tensor] = {name: self.gather(rows, name) for name in names}
        return Columns(found["keys"], found["values"], found["ids"], found["groups"], found.get("scales"))

    def note(self, row: int) -> bytes:
        """Return the metadata of one row as JSON bytes."""
        for segment in self._segments:
            if row < len(segment):
                return segment.note(row)
            row -= len(segment)
        raise IndexError(row)
