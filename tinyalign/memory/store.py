"""Generations of a bank on disk: immutable segments, and one manifest whose replacement is the commit."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyalign._files import fsync_directory, write_json
from tinyalign.memory.blockfile import bad_blocks, map_file, read_file, tensor_bytes, write_blocks
from tinyalign.memory.codec import KEY_DTYPES, VALUE_DTYPES
from tinyalign.memory.errors import BankCorruptedError, BankError
from tinyalign.memory.manifest import MANIFEST, SEGMENTS, FileEntry, Manifest, SegmentEntry, read_manifest
from tinyalign.memory.pages import Pages
from tinyalign.memory.rows import RowSource
from tinyalign.memory.segment import Columns, FixedSegment, Notes
from tinyalign.memory.transform import KeyTransform

ROWS_PER_WRITE = 4096
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Opened(NamedTuple):
    """A generation as it was read: its segments, the removed rows, and the center of int8 values."""

    manifest: Manifest
    segments: list[FixedSegment]
    dead: np.ndarray
    center: Tensor | None
    transform: KeyTransform | None


def write_rows(
    table: RowSource,
    rows: np.ndarray,
    folder: Path,
    recode: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None,
) -> dict[str, FileEntry]:
    """Write the given rows of a table as the column files of a new segment.

    ``recode`` turns row numbers into values and scales of another value dtype; without it they are copied as they are.
    """
    files = {}

    def parts(name: str) -> Iterator[memoryview]:
        for at in range(0, len(rows), ROWS_PER_WRITE):
            chunk = torch.from_numpy(rows[at : at + ROWS_PER_WRITE])
            if recode is None or name not in ("values", "scales"):
                yield tensor_bytes(table.gather(chunk, name))
                continue
            column = recode(chunk)[name == "scales"]
            assert column is not None
            yield tensor_bytes(column)

    scaled = table.has_scales if recode is None else recode(torch.from_numpy(rows[:1]))[1] is not None
    for name in ("keys", "values", "ids", "groups", *(["scales"] if scaled else [])):
        files[f"{name}.bin"] = write_blocks(folder / f"{name}.bin", parts(name))
    notes = [table.note(row) for row in rows.tolist()] if table.has_notes else []
    if any(notes):
        offsets = torch.zeros(len(notes) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor([len(note) for note in notes]), 0, out=offsets[1:])
        files["notes.bin"] = write_blocks(folder / "notes.bin", (memoryview(note) for note in notes))
        files["note_offsets.bin"] = write_blocks(folder / "note_offsets.bin", [tensor_bytes(offsets)])
    return files


@contextmanager
def new_segment(directory: Path, generation: int, caller: str) -> Iterator[Path]:
    """Yield the folder of a segment being written; it is synced at the end, and gone if anything fails."""
    folder = directory / SEGMENTS / f"{generation:08d}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
        fsync_directory(folder)
        fsync_directory(folder.parent)
        fsync_directory(directory)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise BankError(
                f"{caller}: the disk of {directory} must have room for the new entries, got {error.strerror!r}. "
                "Free some space and commit again; the bank on disk is as it was."
            ) from error
        raise


def publish(directory: Path, manifest: Manifest, caller: str) -> None:
    """Make a generation the current one in a single rename, then delete what it no longer uses."""
    try:
        write_json(directory / MANIFEST, manifest.to_json())
    except OSError as error:
        if error.errno in NO_ROOM:
            raise BankError(
                f"{caller}: the disk of {directory} must have room for a manifest, got {error.strerror!r}. "
                "Free some space and commit again; the bank on disk is as it was."
            ) from error
        raise
    sweep(directory, manifest)


def sweep(directory: Path, manifest: Manifest | None) -> None:
    """Delete segments that the manifest does not name, and manifests that a killed writer left aside."""
    kept = {segment.name for segment in manifest.segments} if manifest else set()
    segments = directory / SEGMENTS
    for folder in segments.iterdir() if segments.is_dir() else ():
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    for aside in directory.glob(f".{MANIFEST}.*"):
        aside.unlink(missing_ok=True)


def prepare(directory: Path, caller: str) -> None:
    """Create the directory of a bank, or refuse one that holds something else."""
    if directory.is_file():
        raise BankError(f"{caller}: path must be a directory, got the file {str(directory)!r}. Choose another path.")
    directory.mkdir(parents=True, exist_ok=True)
    ours = {MANIFEST, SEGMENTS, "lock", "skipped.json"}
    strange = [e.name for e in os.scandir(directory) if e.name not in ours and not e.name.startswith(f".{MANIFEST}.")]
    if strange and not (directory / MANIFEST).exists():
        raise BankError(
            f"{caller}: path must be a bank or an empty directory, got {str(directory)!r} holding {strange[0]!r}. "
            "Choose another path."
        )


def current(directory: Path, caller: str) -> Manifest | None:
    """Return the manifest that a writer continues from; None where no generation was ever finished."""
    if not (directory / MANIFEST).exists():
        return None
    return read_manifest(directory, caller)


def open_generation(directory: Path, caller: str, *, mapped: bool) -> Opened:
    """Open the current generation; one that is replaced while it is being opened is opened anew."""
    for _ in range(16):
        manifest = read_manifest(directory, caller)
        try:
            return _open(directory, manifest, caller, mapped=mapped)
        except (BankCorruptedError, FileNotFoundError):
            if read_manifest(directory, caller).generation == manifest.generation:
                raise
    raise BankError(
        f"{caller}: {directory} must stay still long enough to be opened, got 16 new generations. Try again."
    )


def _open(directory: Path, manifest: Manifest, caller: str, *, mapped: bool) -> Opened:
    segments, small = [], {}
    first = 0
    for entry in manifest.segments:
        folder = directory / SEGMENTS / entry.name
        for name, file in entry.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file.size:
                found = "no such file" if size is None else f"{size}"
                raise BankCorruptedError(
                    f"{caller}: {path} must have {file.size} bytes, got {found}. Restore it from a copy."
                )
        for role, owner in manifest.pointers.items():
            if owner == entry.name:
                small[role] = _read_small(folder / f"{role}.bin", entry.files[f"{role}.bin"], caller)
        if entry.rows:
            segments.append(_open_segment(folder, manifest, entry, caller, mapped=mapped))
        first += entry.rows
    dead = small["removed"].view(torch.int64).numpy() if "removed" in small else np.zeros(0, dtype=np.int64)
    if len(dead) and (dead[0] < 0 or dead[-1] >= first or (dead[1:] <= dead[:-1]).any()):
        raise BankCorruptedError(
            f"{caller}: removed.bin of {directory} must list rows in order, got others. Restore a copy."
        )
    center = small["center"].view(torch.float32) if "center" in small else None
    packed = small["transform"].view(torch.float32) if "transform" in small else None
    transform = None if packed is None else KeyTransform.unpacked(packed, manifest.key_dim)
    return Opened(manifest, segments, dead, center, transform)


def _read_small(path: Path, entry: FileEntry, caller: str) -> Tensor:
    wrong = bad_blocks(path, entry)
    if wrong:
        raise BankCorruptedError(f"{caller}: {path} must match its checksum, got {wrong[0]}. Restore it from a copy.")
    return read_file(path, torch.uint8, (entry.size,))


def _open_segment(folder: Path, manifest: Manifest, entry: SegmentEntry, caller: str, *, mapped: bool) -> FixedSegment:
    n = entry.rows

    def large(name: str, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Pages | None]:
        return map_file(folder / name, dtype, shape) if mapped else (read_file(folder / name, dtype, shape), None)

    def small(name: str, dtype: torch.dtype) -> Tensor:
        return _read_small(folder / name, entry.files[name], caller).view(dtype)

    values, pages = large("values.bin", VALUE_DTYPES[manifest.value_dtype], n, manifest.value_size)
    keys, key_pages = large("keys.bin", KEY_DTYPES[manifest.key_dtype], n, manifest.key_dim)
    if key_pages is not None:
        key_pages.read_in_order()
    columns = Columns(
        keys=keys,
        values=values,
        ids=small("ids.bin", torch.int64),
        groups=small("groups.bin", torch.int64),
        scales=small("scales.bin", torch.float32) if "scales.bin" in entry.files else None,
    )
    notes = None
    if "notes.bin" in entry.files:
        text, _ = large("notes.bin", torch.uint8, entry.files["notes.bin"].size)
        offsets = small("note_offsets.bin", torch.int64)
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(text) or bool((offsets[1:] < offsets[:-1]).any()):
            raise BankCorruptedError(
                f"{caller}: {folder / 'note_offsets.bin'} must divide notes.bin, got others. Restore a copy."
            )
        notes = Notes(text, offsets)
    return FixedSegment(columns, notes, entry.name, pages)


def damage(directory: Path, manifest: Manifest) -> list[str]:
    """Read every file of a generation and name each that differs from what was written."""
    found = []
    for segment in manifest.segments:
        for name, entry in sorted(segment.files.items()):
            path = directory / SEGMENTS / segment.name / name
            found += [f"{path.relative_to(directory)}: {problem}" for problem in bad_blocks(path, entry)]
    return found
