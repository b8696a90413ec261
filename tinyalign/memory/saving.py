"""Saving, committing, compacting, merging and opening banks: from contents to generations on disk and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tinyalign.memory.blockfile import tensor_bytes, write_blocks
from tinyalign.memory.codec import KEY_DTYPES, VALUE_DTYPES, ValueCodec, dtype_name
from tinyalign.memory.contents import BankSpec, Contents
from tinyalign.memory.errors import BankError, StaleBankError
from tinyalign.memory.fingerprint import Fingerprint, checked_fingerprint, require_match
from tinyalign.memory.lock import writer_lock
from tinyalign.memory.manifest import POINTERS, Manifest, SegmentEntry
from tinyalign.memory.rows import RowSource
from tinyalign.memory.segment import GrowingSegment
from tinyalign.memory.store import (
    ROWS_PER_WRITE,
    current,
    new_segment,
    open_generation,
    prepare,
    publish,
    sweep,
    write_rows,
)

LASTING = ("center", "transform")  # what later generations go on using
MOST_SEGMENTS = 32  # each one open costs a few file handles


@dataclass(frozen=True)
class Home:
    """The directory and generation that a bank in memory continues."""

    directory: Path
    manifest: Manifest
    mapped: bool


class Loaded(NamedTuple):
    """A bank as read from disk."""

    contents: Contents
    fingerprint: Fingerprint
    home: Home


def load(path: Path, *, mapped: bool, caller: str) -> Loaded:
    """Open the current generation of a saved bank."""
    opened = open_generation(path, caller, mapped=mapped)
    manifest = opened.manifest
    spec = BankSpec(
        manifest.key_dim,
        manifest.value_shape,
        manifest.metric,
        KEY_DTYPES[manifest.key_dtype],
        VALUE_DTYPES[manifest.value_dtype],
    )
    contents = Contents(spec, opened.center, manifest.next_id, opened.transform)
    for segment in opened.segments:
        contents.table.attach(segment)
    contents.table.mark_dead(opened.dead)
    return Loaded(contents, dict(manifest.fingerprint), Home(path, manifest, mapped))


def save_all(
    contents: Contents,
    fingerprint: Fingerprint,
    path: Path,
    caller: str,
    expected: Home | None = None,
    codec: ValueCodec | None = None,
    table: RowSource | None = None,
) -> Manifest:
    """Write every live entry as one new segment and make it the whole of the next generation.

    ``codec`` stores the values in another dtype; an int8 one without a center gets the mean of all entries. ``table``
    takes the place of the contents' own rows.
    """
    table = contents.table if table is None else table
    fingerprint = checked_fingerprint(fingerprint, caller)
    prepare(path, caller)
    with writer_lock(path, caller):
        before = current(path, caller) if expected is None else _unchanged(expected, caller)
        sweep(path, before)
        generation = before.generation + 1 if before else 1
        with new_segment(path, generation, caller) as folder:
            rows = table.live_rows()
            codec = _fitted(contents, rows, codec)
            entry = _write_segment(contents, rows, folder, codec=codec, table=table)
        manifest = _manifest(contents, fingerprint, generation, (entry,) if entry.files else (), codec=codec)
        publish(path, manifest, caller)
    return manifest


def commit(contents: Contents, fingerprint: Fingerprint, home: Home, caller: str) -> Manifest:
    """Write what was added and removed since the last generation as the next one."""
    fingerprint = checked_fingerprint(fingerprint, caller)
    with writer_lock(home.directory, caller):
        before = _unchanged(home, caller)
        sweep(home.directory, before)
        generation = before.generation + 1
        kept = before.segments[: fold_point([segment.rows for segment in before.segments])]
        base = sum(segment.rows for segment in kept)
        rows, dead = contents.table.live_rows(), contents.table.dead
        names = {segment.name for segment in kept}
        pointers = {r: n for r, n in before.pointers.items() if r in LASTING and n in names}
        with new_segment(home.directory, generation, caller) as folder:
            new = rows[rows >= base]
            entry = _write_segment(contents, new, folder, removed=dead[dead < base], present=pointers.keys())
        kept = tuple(segment for segment in kept if segment.rows or segment.name in pointers.values())
        segments = (*kept, *([entry] if entry.files else []))
        manifest = _manifest(contents, fingerprint, generation, segments, pointers)
        publish(home.directory, manifest, caller)
    return manifest


def fold_point(rows: Sequence[int]) -> int:
    """Return how many segments the next generation keeps as they are; those after it are written anew, joined.

    Nothing is joined up to ``MOST_SEGMENTS``; beyond, the shortest run of last segments that the one before it
    outweighs twice, so that over many commits each entry is rewritten a logarithmic number of times.
    """
    if len(rows) < MOST_SEGMENTS:
        return len(rows)
    behind = 0
    for kept in range(len(rows), 0, -1):
        if behind and rows[kept - 1] >= 2 * behind and kept < MOST_SEGMENTS // 2:
            return kept
        behind += rows[kept - 1]
    return 0


def _unchanged(home: Home, caller: str) -> Manifest:
    before = current(home.directory, caller)
    if before is None or before.to_json() != home.manifest.to_json():
        found = "no bank" if before is None else f"generation {before.generation}"
        raise StaleBankError(
            f"{caller}: {home.directory} must still be at generation {home.manifest.generation}, got {found}. "
            "Another process has written it since: load it again and repeat the changes."
        )
    return before


def _fitted(contents: Contents, rows: np.ndarray, codec: ValueCodec | None) -> ValueCodec | None:
    if codec is None or not codec.quantised or codec.center is not None or not len(rows):
        return codec
    total = torch.zeros(contents.spec.value_size, dtype=torch.float64)
    for at in range(0, len(rows), ROWS_PER_WRITE):
        total += contents.values_at(torch.from_numpy(rows[at : at + ROWS_PER_WRITE])).to(torch.float64).sum(0)
    return ValueCodec(codec.dtype, (total / len(rows)).to(torch.float32))


def _write_segment(
    contents: Contents,
    rows: np.ndarray,
    folder: Path,
    removed: np.ndarray | None = None,
    codec: ValueCodec | None = None,
    present: Collection[str] = (),
    table: RowSource | None = None,
) -> SegmentEntry:
    recode = None if codec is None else lambda chunk: codec.encode(contents.values_at(chunk))
    files = write_rows(contents.table if table is None else table, rows, folder, recode) if len(rows) else {}
    center = (codec or contents.codec).center
    if center is not None and "center" not in present:
        files["center.bin"] = write_blocks(folder / "center.bin", [tensor_bytes(center)])
    if contents.transform is not None and "transform" not in present:
        packed = tensor_bytes(contents.transform.packed())
        files["transform.bin"] = write_blocks(folder / "transform.bin", [packed])
    if removed is not None and len(removed):
        files["removed.bin"] = write_blocks(folder / "removed.bin", [tensor_bytes(torch.from_numpy(removed))])
    return SegmentEntry(folder.name, len(rows), files)


def _manifest(
    contents: Contents,
    fingerprint: Fingerprint,
    generation: int,
    segments: tuple[SegmentEntry, ...],
    kept_pointers: Mapping[str, str] | None = None,
    codec: ValueCodec | None = None,
) -> Manifest:
    spec = contents.spec
    last = segments[-1] if segments else None
    pointers = dict(kept_pointers or {})
    pointers.update({role: last.name for role in POINTERS if last is not None and f"{role}.bin" in last.files})
    return Manifest(
        generation=generation,
        key_dim=spec.key_dim,
        value_shape=spec.value_shape,
        metric=spec.metric,
        key_dtype=dtype_name(spec.key_dtype),
        value_dtype=dtype_name(codec.dtype if codec else spec.value_dtype),
        next_id=contents.next_id,
        segments=segments,
        pointers=pointers,
        fingerprint=dict(fingerprint),
    )


def pending(contents: Contents, fingerprint: Fingerprint, home: Home) -> bool:
    """Say whether anything was changed since the generation on disk."""
    stored = sum(segment.rows for segment in home.manifest.segments)
    return contents.table.total != stored or contents.table.changed or fingerprint != home.manifest.fingerprint


def compacted(contents: Contents) -> Contents:
    """Copy the live entries into one run of rows."""
    compact = Contents(contents.spec, contents.codec.center, contents.next_id, contents.transform)
    _copy_rows(compact, contents)
    return compact


def merged(banks: Sequence[tuple[Contents, Fingerprint]], caller: str) -> Contents:
    """Join the entries of banks of one kind, in their order, without copying keys or values where possible."""
    if not banks:
        raise BankError(f"{caller}: banks must hold at least one bank, got none. Pass the banks to join.")
    first, print_ = banks[0]
    for position, (other, theirs) in enumerate(banks[1:], start=1):
        if other.spec != first.spec:
            raise BankError(
                f"{caller}: banks must agree, got {other.spec} at {position} beside {first.spec}. Rebuild one."
            )
        require_match(print_, theirs, caller)
        if other.transform != first.transform:
            raise BankError(f"{caller}: banks must share one key transform, got another at {position}. Rebuild one.")
    joined = Contents(first.spec, first.codec.center, max(bank.next_id for bank, _ in banks), first.transform)
    for bank, _ in banks:
        _join(joined, bank)
    ids = joined.table.column("ids")[joined.table.live_rows()]
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) != len(ids):
        twice = int(distinct[counts > 1][0])
        raise BankError(f"{caller}: banks must not share ids, got {twice} in two of them. Remove it from one.")
    return joined


def _join(joined: Contents, bank: Contents) -> None:
    same = bank.codec.center is joined.codec.center or (
        bank.codec.center is not None
        and joined.codec.center is not None
        and torch.equal(bank.codec.center, joined.codec.center)
    )
    if not bank.codec.quantised or same:
        offset = joined.table.total
        for segment in bank.table.segments:
            joined.table.attach(segment.frozen() if isinstance(segment, GrowingSegment) else segment)
        joined.table.mark_dead(bank.table.dead + offset)
        return
    _copy_rows(joined, bank, recode=True)


def _copy_rows(target: Contents, source: Contents, *, recode: bool = False) -> None:
    live = source.table.live_rows()
    for at in range(0, len(live), ROWS_PER_WRITE):
        rows = torch.from_numpy(live[at : at + ROWS_PER_WRITE])
        columns = source.table.columns_at(rows)
        if recode:
            stored, scales = target.codec.encode(source.values_at(rows))
            columns = columns._replace(values=stored, scales=scales)
        target.table.append(columns, [source.table.note(row) for row in rows.tolist()])
