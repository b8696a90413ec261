"""One writer per bank: a lock on a file inside it, which the system releases when the owner ends, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tinyalign.memory.errors import BankError, BankLockedError


@contextlib.contextmanager
def writer_lock(directory: Path, caller: str) -> Iterator[None]:
    """Hold the bank's lock while the block runs, or raise ``BankLockedError`` naming who holds it."""
    try:
        import fcntl
    except ImportError as error:  # pragma: no cover
        raise BankError(
            f"{caller}: the system must be Linux or macOS to lock files, got {os.name!r}. Write the bank "
            "on one of them."
        ) from error
    if not directory.is_dir():
        raise BankError(f"{caller}: {directory} must be there, got no such directory. Save the bank to another path.")
    path = directory / "lock"
    with open(path, "a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BankLockedError(
                f"{caller}: {directory} must have one writer at a time, got a second one; {_owner(path)} holds it. "
                "Wait until that process has committed, or end it."
            ) from error
        stream.seek(0)
        stream.truncate()
        json.dump(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%FT%TZ", time.gmtime())}, stream
        )
        stream.flush()
        yield


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
