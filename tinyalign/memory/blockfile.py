"""Files with a checksum for every block: written, mapped and verified."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from tinyalign.memory.manifest import BLOCK_BYTES, FileEntry
from tinyalign.memory.pages import Pages


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes without copying them (contiguous, on the CPU)."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def write_blocks(path: Path, parts: Iterable[memoryview]) -> FileEntry:
    """Write parts one after the other, sync them, and return the size and the checksum of every block."""
    digests: list[str] = []
    block = xxhash.xxh3_64()
    filled = size = 0
    with open(path, "xb", buffering=0) as stream:
        for part in parts:
            at = 0
            while at < len(part):
                taken = part[at : at + BLOCK_BYTES - filled]
                block.update(taken)
                at += len(taken)
                filled += len(taken)
                if filled == BLOCK_BYTES:
                    digests.append(block.hexdigest())
                    block.reset()
                    filled = 0
            size += len(part)
            _write_all(stream.fileno(), part)
        if filled:
            digests.append(block.hexdigest())
        os.fsync(stream.fileno())
    return FileEntry(size, "".join(digests))


def _write_all(handle: int, part: memoryview) -> None:
    while len(part):
        part = part[os.write(handle, part[: 1 << 26]) :]


def bad_blocks(path: Path, entry: FileEntry) -> list[str]:
    """Compare a file with its checksums; return what is wrong with it, in words."""
    if not path.is_file():
        return ["missing"]
    size = path.stat().st_size
    if size != entry.size:
        return [f"{size} bytes instead of {entry.size}"]
    bad = []
    room = bytearray(min(BLOCK_BYTES, size))
    with open(path, "rb", buffering=0) as stream:
        for number in range(len(entry.checksums) // 16):
            count = stream.readinto(room)
            digest = xxhash.xxh3_64_hexdigest(memoryview(room)[:count])
            if digest != entry.checksums[16 * number : 16 * number + 16]:
                bad.append(number)
    if not bad:
        return []
    listed = ", ".join(str(number) for number in bad[:8]) + (", ..." if len(bad) > 8 else "")
    return [f"{len(bad)} damaged block(s) of {BLOCK_BYTES} bytes: {listed}"]


def read_file(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Read a file into memory as a tensor."""
    room = torch.empty(shape, dtype=dtype)
    view = tensor_bytes(room)
    with open(path, "rb", buffering=0) as stream:
        at = 0
        while at < len(view):
            count = stream.readinto(view[at : at + (1 << 30)])
            if not count:
                raise EOFError(f"{path} ended early")
            at += count
    return room


def map_file(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Pages | None]:
    """Open a file as a tensor whose pages are shared with every process that maps it.

    The tensor must never be written to or handed out: its memory is read-only.
    """
    if not path.stat().st_size:
        return torch.empty(shape, dtype=dtype), None
    pages = Pages(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(pages.memory, dtype=dtype).reshape(shape), pages
