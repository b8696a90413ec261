"""The manifest of a saved bank: what it holds, checked before anything else is opened."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from tinyalign.memory.codec import KEY_DTYPES, VALUE_DTYPES
from tinyalign.memory.errors import BankCorruptedError, BankError
from tinyalign.memory.fingerprint import Fingerprint, checked_fingerprint

FORMAT = "tinyalign-memory-bank"
VERSION = 1
MANIFEST = "manifest.json"
SEGMENTS = "segments"
BLOCK_BYTES = 1 << 20
METRICS = ("cosine", "ip")
SEGMENT_NAME = re.compile(r"[0-9]{8}-[0-9a-f]{8}")
COLUMN_FILES = {"keys.bin", "values.bin", "ids.bin", "groups.bin"}
OPTIONAL_FILES = {"scales.bin", "notes.bin", "note_offsets.bin", "removed.bin", "center.bin", "transform.bin"}
POINTERS = ("removed", "center", "transform")
LARGEST_MANIFEST = 1 << 28
LARGEST_COUNT = 1 << 48


@dataclass(frozen=True)
class FileEntry:
    """Size of a file and the xxh3-64 of each block of ``BLOCK_BYTES``, as hex digits one after the other."""

    size: int
    checksums: str


@dataclass(frozen=True)
class SegmentEntry:
    """One immutable run of rows: a directory under ``segments``."""

    name: str
    rows: int
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Manifest:
    """Everything a loader needs to know, and nothing it must trust: sizes are compared with the files."""

    generation: int
    key_dim: int
    value_shape: tuple[int, ...]
    metric: str
    key_dtype: str
    value_dtype: str
    next_id: int
    segments: tuple[SegmentEntry, ...]
    pointers: dict[str, str] = field(default_factory=dict)  # which segment holds removed.bin, center.bin, ...
    fingerprint: Fingerprint = field(default_factory=dict)

    @property
    def value_size(self) -> int:
        """Numbers in one value."""
        return math.prod(self.value_shape)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``manifest.json``, its own checksum included."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "block_bytes": BLOCK_BYTES,
            "generation": self.generation,
            "key_dim": self.key_dim,
            "value_shape": list(self.value_shape),
            "metric": self.metric,
            "key_dtype": self.key_dtype,
            "value_dtype": self.value_dtype,
            "next_id": self.next_id,
            "pointers": dict(self.pointers),
            "fingerprint": dict(self.fingerprint),
            "segments": [
                {
                    "name": s.name,
                    "rows": s.rows,
                    "files": {n: {"bytes": f.size, "xxh3": f.checksums} for n, f in s.files.items()},
                }
                for s in self.segments
            ],
        }
        content["checksum"] = _digest(content)
        return content


def _digest(content: Mapping[str, Any]) -> str:
    body = {name: value for name, value in content.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(directory: Path, caller: str) -> Manifest:
    """Read and check ``manifest.json``; every way in which it can be wrong is a ``BankError`` that names it."""
    path = directory / MANIFEST
    if not path.is_file():
        raise BankError(
            f"{caller}: path must be a saved bank, got {str(directory)!r} without {MANIFEST}. "
            "Save one with MemoryBank.save(path) or build_memory_bank."
        )
    if path.stat().st_size > LARGEST_MANIFEST:
        raise BankCorruptedError(
            f"{caller}: {path} must stay under {LARGEST_MANIFEST} bytes, got {path.stat().st_size}. "
            "Use another copy of the bank."
        )
    raw = path.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BankCorruptedError(f"{caller}: {path} must be JSON, got {error}. Restore it from a copy.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BankCorruptedError(f"{caller}: {path} must be a {FORMAT}, got something else. Restore it from a copy.")
    if content.get("version") != VERSION:
        raise BankError(
            f"{caller}: {path} must have format version {VERSION}, got {content.get('version')!r}. Update tinyalign."
        )
    if content.get("checksum") != _digest(content) or not raw.endswith(b"\n"):  # what is written last
        raise BankCorruptedError(
            f"{caller}: {path} must match its own checksum, got an edit or damage. Restore it from a copy."
        )
    try:
        return _parse(content, caller)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BankCorruptedError(
            f"{caller}: {path} must describe a bank, got {error}. Restore it from a copy."
        ) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"the constant {name}")


def _rule(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _count(value: Any, what: str) -> int:
    _rule(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT, what)
    return int(value)


def _parse(content: dict[str, Any], caller: str) -> Manifest:
    _rule(content["block_bytes"] == BLOCK_BYTES, "an unknown block size")
    _rule(content["metric"] in METRICS, "an unknown metric")
    _rule(content["key_dtype"] in KEY_DTYPES, "an unknown key dtype")
    _rule(content["value_dtype"] in VALUE_DTYPES, "an unknown value dtype")
    shape = tuple(_count(size, "a value shape that is not counts") for size in content["value_shape"])
    _rule(0 < math.prod(shape) <= LARGEST_COUNT, "an empty or enormous value shape")
    key_dim = _count(content["key_dim"], "a key width that is not a count")
    _rule(key_dim > 0, "keys of width 0")
    next_id = content["next_id"]
    _rule(isinstance(next_id, int) and 0 <= next_id <= 1 << 63, "a next id that is not one")
    _rule(isinstance(content["pointers"], dict), "pointers that are not named")
    manifest = Manifest(
        generation=_count(content["generation"], "a generation that is not a count"),
        key_dim=key_dim,
        value_shape=shape,
        metric=content["metric"],
        key_dtype=content["key_dtype"],
        value_dtype=content["value_dtype"],
        next_id=next_id,
        segments=tuple(_segment(entry) for entry in content["segments"]),
        pointers=dict(content["pointers"]),
        fingerprint=checked_fingerprint(content["fingerprint"], caller),
    )
    names = [segment.name for segment in manifest.segments]
    _rule(len(set(names)) == len(names), "a segment twice")
    for segment in manifest.segments:
        _check_sizes(manifest, segment)
    for role, name in manifest.pointers.items():
        _rule(role in POINTERS and name in names, f"a pointer {role!r} to no segment")
        owner = manifest.segments[names.index(name)]
        _rule(f"{role}.bin" in owner.files, f"a pointer {role!r} to a segment without the file")
    _rule(
        (content["value_dtype"] != "int8")
        or "center" in manifest.pointers
        or not any(segment.rows for segment in manifest.segments),
        "int8 values without a center",
    )
    return manifest


def transform_size(numbers: int, key_dim: int) -> int:
    """Return the closest size from above that a key transform to ``key_dim`` can have: a mean, or mean and matrix."""
    return numbers if numbers == key_dim else -(-max(numbers, 1) // (1 + key_dim)) * (1 + key_dim)


def _segment(entry: Any) -> SegmentEntry:
    name = entry["name"]
    _rule(isinstance(name, str) and SEGMENT_NAME.fullmatch(name) is not None, f"a segment called {name!r}")
    files = {}
    for file, facts in entry["files"].items():
        _rule(file in COLUMN_FILES | OPTIONAL_FILES, f"a file called {file!r}")
        size = _count(facts["bytes"], "a file size that is not a count")
        checksums = facts["xxh3"]
        blocks = -(-size // BLOCK_BYTES)
        _rule(isinstance(checksums, str) and len(checksums) == 16 * blocks, f"checksums of {file!r} that do not fit")
        files[file] = FileEntry(size, checksums)
    return SegmentEntry(name, _count(entry["rows"], "a row count that is not one"), files)


def _check_sizes(manifest: Manifest, segment: SegmentEntry) -> None:
    key_bytes = KEY_DTYPES[manifest.key_dtype].itemsize * manifest.key_dim
    value_bytes = VALUE_DTYPES[manifest.value_dtype].itemsize * manifest.value_size
    expected: dict[str, Callable[[], int]] = {
        "keys.bin": lambda: key_bytes * segment.rows,
        "values.bin": lambda: value_bytes * segment.rows,
        "ids.bin": lambda: 8 * segment.rows,
        "groups.bin": lambda: 8 * segment.rows,
        "scales.bin": lambda: 4 * segment.rows,
        "note_offsets.bin": lambda: 8 * (segment.rows + 1),
        "center.bin": lambda: 4 * manifest.value_size,
        "transform.bin": lambda: 4 * transform_size(segment.files["transform.bin"].size // 4, manifest.key_dim),
    }
    for name, size in expected.items():
        if name in segment.files:
            _rule(segment.files[name].size == size(), f"a size of {name!r} that does not fit its rows")
    _rule(not segment.rows or segment.files.keys() >= COLUMN_FILES, "rows without their files")
    _rule(not segment.rows or manifest.value_dtype != "int8" or "scales.bin" in segment.files, "int8 without scales")
    _rule(("notes.bin" in segment.files) == ("note_offsets.bin" in segment.files), "notes without offsets")
    if "removed.bin" in segment.files:
        _rule(segment.files["removed.bin"].size % 8 == 0, "a list of removed rows cut in the middle")
