"""Which batches a rank encodes, and how ranks wait for one another through files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinyalign._files import write_json
from tinyalign.memory.errors import BankError

WHERE = "build_memory_bank"


class Share(NamedTuple):
    """The records from ``begin`` to ``end`` are this rank's; borders fall between batches."""

    rank: int
    ranks: int
    begin: int
    end: int

    def folder(self, work: Path, rank: int | None = None) -> Path:
        """Return where a rank keeps its finished entries."""
        return work / f"shard-{self.rank if rank is None else rank:05d}-of-{self.ranks:05d}"

    def marker(self, work: Path, rank: int | None = None) -> Path:
        """Return the file that says a rank has finished."""
        folder = self.folder(work, rank)
        return folder.with_name(f"{folder.name}.done.json")

    def finished(self, work: Path) -> list[dict[str, Any] | None]:
        """Return what each rank left in its marker, None where there is none yet."""
        found: list[dict[str, Any] | None] = []
        for rank in range(self.ranks):
            marker = self.marker(work, rank)
            found.append(json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None)
        return found

    def other_counts(self, work: Path) -> list[int]:
        """Return over how many other ranks killed builds have left entries."""
        named = (re.match(r"shard-\d{5}-of-(\d{5})", path.name) for path in work.glob("shard-*"))
        return sorted({int(found[1]) for found in named if found} - {self.ranks})

    def finish(self, work: Path, timeout: float) -> None:
        """On rank 0: tell the others that the bank is published, wait until they saw it, and clean up."""
        if self.ranks > 1:
            write_json(self._published(work), {})
            others = [self._left(work, rank) for rank in range(1, self.ranks)]
            wait_until(lambda: all(other.exists() for other in others), timeout, "the other ranks to see the bank")
        discard(work)

    def follow(self, work: Path, timeout: float) -> None:
        """On the other ranks: wait until the bank is published."""
        wait_until(self._published(work).exists, timeout, "rank 0 to publish the bank")
        self._left(work, self.rank).touch()

    def _published(self, work: Path) -> Path:
        # The number of ranks is part of the name: what a killed build of fewer or more left says nothing here.
        return work / f"published-of-{self.ranks:05d}.json"

    def _left(self, work: Path, rank: int) -> Path:
        return work / f"left-{rank:05d}-of-{self.ranks:05d}"


def share_of(num_records: int, batch_size: int, environ: Mapping[str, str] | None = None) -> Share:
    """Return this process's share: the process group's rank if there is one, else the launcher's environment."""
    environ = os.environ if environ is None else environ
    rank, ranks = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
    if not 0 <= rank < ranks:
        raise BankError(f"{WHERE}: RANK must be from 0 to WORLD_SIZE - 1, got {rank} of {ranks}. Launch with torchrun.")
    batches = -(-num_records // batch_size)
    begin, end = (min(r * batches // ranks * batch_size, num_records) for r in (rank, rank + 1))
    return Share(rank, ranks, begin, end)


def discard(work: Path) -> None:
    """Delete a build's folder; renamed first, so that a kill in between leaves nothing that looks like a build."""
    aside = work.with_name(f"{work.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(work, aside)
    shutil.rmtree(aside, ignore_errors=True)


def start_anew(work: Path, share: Share) -> None:
    """Delete what a killed build left; several ranks need a process group to agree on the moment."""
    import torch.distributed as dist

    if share.ranks == 1:
        discard(work)
        return
    if not (dist.is_available() and dist.is_initialized()):
        if work.exists():
            raise BankError(
                f"{WHERE}: resume=False must find no leftovers when several ranks build, got {str(work)!r}. "
                "Delete that folder before launching, or call torch.distributed.init_process_group first."
            )
        return
    dist.barrier()
    if share.rank == 0:
        discard(work)
    dist.barrier()


def wait_until(holds: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll until ``holds`` returns True."""
    deadline, pause = time.monotonic() + timeout, 0.01
    while not holds():
        if time.monotonic() > deadline:
            raise BankError(
                f"{WHERE}: waiting for {what} must end within {timeout:.0f} s, got no sign. See their logs."
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)
