"""A run of bank entries: growing in memory, or fixed (usually mapped from files)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyalign.memory.errors import BankCorruptedError
from tinyalign.memory.pages import Pages


class Columns(NamedTuple):
    """The entries of a segment, column by column; n rows in each."""

    keys: Tensor  # (n, D) key dtype, of unit length for the cosine metric
    values: Tensor  # (n, V) value dtype, flattened
    ids: Tensor  # (n,) int64
    groups: Tensor  # (n,) int64, -1 for none
    scales: Tensor | None  # (n,) float32, for int8 values


class Notes:
    """Metadata of a segment's entries: JSON texts one after the other, and where each begins."""

    def __init__(self, text: Tensor, offsets: Tensor) -> None:
        self.text = text  # (bytes,) uint8
        self.offsets = offsets  # (n + 1,) int64

    def raw(self, row: int) -> bytes:
        """Return the JSON text of one entry; empty for no metadata."""
        begin, end = self.offsets[row : row + 2].tolist()
        return self.text[begin:end].numpy().tobytes()


def encode_note(note: Any) -> bytes:
    """Return an entry's metadata as JSON bytes; empty for None."""
    if note is None:
        return b""
    return json.dumps(note, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def decode_note(raw: bytes) -> dict[str, Any]:
    """Undo ``encode_note``; an entry without metadata has an empty dict."""
    if not raw:
        return {}
    try:
        note = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BankCorruptedError(
            f"MemoryBank.metadata: notes.bin must hold JSON, got {error}. Restore a copy."
        ) from error
    if not isinstance(note, dict):
        raise BankCorruptedError(f"MemoryBank.metadata: notes.bin must hold dicts, got {note!r:.40}. Restore a copy.")
    return note


class FixedSegment:
    """Entries that no longer change: mapped from files, or loaded whole."""

    def __init__(
        self, columns: Columns, notes: Notes | None = None, name: str | None = None, pages: Pages | None = None
    ) -> None:
        self.columns = columns
        self.notes = notes
        self.name = name
        self.pages = pages  # of the values

    def __len__(self) -> int:
        return int(self.columns.ids.shape[0])

    @property
    def has_notes(self) -> bool:
        """True when some entry has metadata."""
        return self.notes is not None

    def expect(self, rows: Tensor) -> None:
        """Announce that the values of rows (n,) are about to be read."""
        if self.pages is not None:
            self.pages.expect(rows.numpy(), self.columns.values.shape[1] * self.columns.values.element_size())

    def note(self, row: int) -> bytes:
        """Return the metadata of one row as JSON bytes."""
        return b"" if self.notes is None else self.notes.raw(row)


class GrowingSegment:
    """Entries in memory; appending doubles the room when it runs out, so that many small adds stay linear."""

    def __init__(self, template: Columns) -> None:
        self._room = Columns(*(None if c is None else c[:0].clone() for c in template))  # type: ignore[arg-type]
        self._rows = 0
        self._notes: dict[int, bytes] = {}
        self.name: str | None = None

    def __len__(self) -> int:
        return self._rows

    @property
    def has_notes(self) -> bool:
        """True when some entry has metadata."""
        return bool(self._notes)

    @property
    def columns(self) -> Columns:
        """Views of the rows filled so far."""
        return Columns(*(None if c is None else c[: self._rows] for c in self._room))  # type: ignore[arg-type]

    def append(self, added: Columns, notes: Sequence[bytes] | None) -> None:
        """Copy rows in after the last one."""
        count = int(added.ids.shape[0])
        needed = self._rows + count
        if needed > self._room.ids.shape[0]:
            self._grow(max(needed, 2 * int(self._room.ids.shape[0])))
        for room, new in zip(self._room, added, strict=True):
            if room is not None:
                assert new is not None
                room[self._rows : needed].copy_(new)
        for position, note in enumerate(notes or ()):
            if note:
                self._notes[self._rows + position] = note
        self._rows = needed

    def _grow(self, capacity: int) -> None:
        grown: list[Tensor | None] = []
        for room in self._room:
            if room is None:
                grown.append(None)
                continue
            larger = torch.empty((capacity, *room.shape[1:]), dtype=room.dtype)
            larger[: self._rows].copy_(room[: self._rows])
            grown.append(larger)
        self._room = Columns(*grown)  # type: ignore[arg-type]

    def note(self, row: int) -> bytes:
        """Return the metadata of one row as JSON bytes."""
        return self._notes.get(row, b"")

    def frozen(self) -> FixedSegment:
        """Return the rows filled so far as a segment that no longer changes; later appends do not reach it."""
        notes = None
        if self._notes:
            raw = [self.note(row) for row in range(self._rows)]
            offsets = torch.zeros(self._rows + 1, dtype=torch.int64)
            torch.cumsum(torch.tensor([len(note) for note in raw]), 0, out=offsets[1:])
            notes = Notes(torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8), offsets)
        return FixedSegment(self.columns, notes)


Segment = FixedSegment | GrowingSegment
