"""Reading the small JSON that describes a table or report beside a bank."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tinyalign.memory.errors import BankCorruptedError, BankError
from tinyalign.memory.fingerprint import checked_fingerprint
from tinyalign.memory.manifest import BLOCK_BYTES, LARGEST_COUNT, LARGEST_MANIFEST


def read_facts(
    directory: Path, format_name: str, version: int, where: str, files: Collection[str] = ()
) -> dict[str, Any]:
    """Read ``table.json`` and check its format, version, counts and what it says of ``files``."""
    path = directory / "table.json"
    if not path.is_file():
        raise BankError(f"{where}: path must be a {format_name}, got {str(directory)!r}. Make it first.")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise BankCorruptedError(f"{where}: {path} must be small, got {path.stat().st_size} bytes. Make it anew.")
    try:
        facts = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BankCorruptedError(f"{where}: {path} must be JSON, got {error}. Make it anew.") from error
    if not isinstance(facts, dict) or facts.get("format") != format_name:
        raise BankCorruptedError(f"{where}: {path} must be a {format_name}, got something else. Make it anew.")
    if facts.get("version") != version:
        raise BankError(f"{where}: {path} must have version {version}, got {facts.get('version')!r}. Update tinyalign.")
    for name in ("rows", "k"):
        value = facts.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_COUNT:
            raise BankCorruptedError(f"{where}: {path} must have a count {name!r}, got {value!r}. Make it anew.")
    missing = {"content", "generation", "entries", "fingerprint", "files"} - facts.keys()
    if missing:
        raise BankCorruptedError(f"{where}: {path} must name {sorted(missing)[0]!r}, got nothing. Make it anew.")
    if not isinstance(facts["fingerprint"], dict):
        raise BankCorruptedError(f"{where}: {path} must hold a fingerprint of fields, got none. Make it anew.")
    try:
        checked_fingerprint(facts["fingerprint"], where)
    except TypeError as error:
        raise BankCorruptedError(f"{where}: {path} must hold plain fields, got another. Make it anew.") from error
    for name in files:
        entry = facts["files"].get(name) if isinstance(facts["files"], dict) else None
        if not _is_entry(entry):
            raise BankCorruptedError(
                f"{where}: {path} must name {name}, its bytes and checksums, got none of it. Make it anew."
            )
    return facts


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("xxh3"), str):
        return False
    size, sums = int(entry["bytes"]), str(entry["xxh3"])
    return 0 <= size <= LARGEST_COUNT and len(sums) == 16 * -(-size // BLOCK_BYTES)
