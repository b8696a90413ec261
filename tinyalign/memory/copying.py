"""Copying and pickling banks: a saved one travels as its path, another as its entries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyalign.memory.contents import BankSpec, Contents
from tinyalign.memory.fingerprint import Fingerprint
from tinyalign.memory.saving import Home, compacted, load, merged, pending
from tinyalign.memory.segment import Columns

Parts = tuple[Contents, Fingerprint, Home | None]


def copied(contents: Contents, fingerprint: Fingerprint, home: Home | None) -> Parts:
    """Return a bank of its own over the same entries; what no longer changes is shared, mapped pages included."""
    twin = merged([(contents, {})], "MemoryBank")
    twin.table.changed = contents.table.changed
    return twin, dict(fingerprint), home


def reduced(
    make: Callable[..., Any], contents: Contents, fingerprint: Fingerprint, home: Home | None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return what pickle needs: the path of a bank that is as it was saved, else everything the bank holds."""
    if home is not None and not pending(contents, fingerprint, home):
        return make, (str(home.directory), home.mapped)
    whole = compacted(contents)
    rows = whole.table.live_rows()
    notes = [whole.table.note(row) for row in rows.tolist()] if whole.table.has_notes else None
    columns = [tuple(part) for _, part in whole.table.blocks()]
    facts = (whole.spec, whole.codec.center, whole.next_id, whole.transform)
    return make, (facts, columns, notes, dict(fingerprint))


def restored(*state: Any) -> Parts:
    """Undo ``reduced``. A bank that stood in memory, or had changes that were not committed, comes back in memory."""
    if len(state) == 2:
        path, mapped = state
        return load(Path(path), mapped=mapped, caller="MemoryBank.load")
    facts, columns, notes, fingerprint = state
    spec: BankSpec = facts[0]
    contents = Contents(spec, *facts[1:])
    for part in columns:
        contents.table.append(Columns(*part), notes)
    return contents, fingerprint, None
