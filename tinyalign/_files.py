"""Writing to disk so that a kill leaves the old state or the new one, never a mixture; and naming what was written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def fsync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def fsync_directory(path: Path) -> None:
    """Force a directory's entries to the disk; a no-op where directories cannot be opened (Windows)."""
    if os.name == "nt":  # pragma: no cover
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: aside, synced, then renamed over the old one."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``path`` when the block ends without an error.

    Whatever else stands in an old directory, under names that the new one does not have, stays there. The new directory
    is synced before it is renamed into place. POSIX cannot swap two non-empty directories in one step, so the old one
    is moved aside first and deleted last; a kill in between leaves what was not moved yet under ``.<name>.old-*``.

    Raises:
        FileExistsError: ``path`` is a file.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"save: path must be a directory, got the file {path}. Choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-"))
    try:
        yield fresh
        for entry in sorted(fresh.rglob("*")):
            fsync_directory(entry) if entry.is_dir() else fsync_file(entry)
        fsync_directory(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    os.chmod(fresh, 0o755)
    if path.exists():
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old-"))
        os.replace(path, aside)
        os.replace(fresh, path)
        for other in aside.iterdir():
            if not os.path.lexists(path / other.name):
                os.replace(other, path / other.name)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(fresh, path)
    fsync_directory(path.parent)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Name a set of tensors by content: 32 hex digits over names, dtypes, shapes and bytes, in name order."""
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
