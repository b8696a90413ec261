"""Reading a saved bank in full and naming what is not as it was written."""

from __future__ import annotations

import time
from typing import NamedTuple

from tinyalign.memory.errors import BankCorruptedError, StaleBankError
from tinyalign.memory.saving import Home
from tinyalign.memory.store import current, damage


class VerifyReport(NamedTuple):
    """What ``verify`` read.

    Args:
        generation: of the manifest.
        files: how many were read.
        bytes: how many those hold.
        seconds: how long it took.
    """

    generation: int
    files: int
    bytes: int
    seconds: float


def verified(home: Home) -> VerifyReport:
    """Check every file of the generation that ``home`` continues against its checksums."""
    caller = "MemoryBank.verify"
    begin = time.perf_counter()
    now = current(home.directory, caller)  # the manifest itself must still be whole
    problems = damage(home.directory, home.manifest)
    if problems and now is not None and now.to_json() != home.manifest.to_json():
        raise StaleBankError(
            f"{caller}: {home.directory} must still be at generation {home.manifest.generation}, got generation "
            f"{now.generation}. Another process has written it since: load it again and verify that."
        )
    if problems:
        raise BankCorruptedError(
            f"{caller}: {home.directory} must be as it was written, got {'; '.join(problems)}. Restore it from a copy."
        )
    files = [file for segment in home.manifest.segments for file in segment.files.values()]
    return VerifyReport(
        home.manifest.generation, len(files), sum(file.size for file in files), time.perf_counter() - begin
    )
