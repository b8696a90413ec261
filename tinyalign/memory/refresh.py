"""Does the encoder still make the keys that the bank holds? And making them anew where it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.codec import ValueCodec
from tinyalign.memory.contents import Contents
from tinyalign.memory.encoding import SAME, BuildOptions, EncodedBatch, SkippedRecord, as_batch, encode_all
from tinyalign.memory.errors import BankError
from tinyalign.memory.fingerprint import Fingerprint, differing_fields
from tinyalign.memory.rows import RowTable
from tinyalign.memory.saving import Home, save_all
from tinyalign.memory.shards import discard

Encode = Callable[[list[Any]], EncodedBatch]
Records = Mapping[int, Any] | Callable[[int], Any] | None
PARTS = ("both", "keys", "values")


class DriftReport(NamedTuple):
    """How far recomputed entries lie from the stored ones; 0 is no drift, rounding in fp16 gives about 1e-6 and 1e-3.

    Args:
        num_entries: entries that were compared.
        key_mean: mean of one minus the cosine between the two keys; for metric ``ip``, of their distance over the
            stored one's norm.
        key_largest: the largest of them.
        value_mean: mean distance between the two values over the stored one's norm.
        value_largest: the largest of them.
        worst_id: the entry whose key or value moved most, by distance over the stored one's norm.
    """

    num_entries: int
    key_mean: float
    key_largest: float
    value_mean: float
    value_largest: float
    worst_id: int


def check_bank(contents: Contents, encode: Encode, n: int, records: Records, seed: int) -> DriftReport:
    """Encode ``n`` sampled entries again and compare keys and values with what is stored."""
    where = "MemoryBank.check"
    if n < 1:
        raise ValueError(f"{where}: n must be positive, got {n}. Sample at least one entry.")
    if not len(contents.table):
        raise BankError(f"{where}: the bank must hold entries, got 0. Add some first.")
    live = contents.table.live_rows()
    rows = np.sort(np.random.default_rng(seed).choice(live, size=min(n, len(live)), replace=False))
    ids = contents.table.column("ids")[rows]
    sampled = [_record(contents, records, int(row), int(entry)) for row, entry in zip(rows, ids, strict=True)]
    encoded = as_batch(encode(sampled), where)
    new_keys, old_keys = _pair(contents, rows, encoded, "keys", where)
    new_values, old_values = _pair(contents, rows, encoded, "values", where)
    keys, values = _distances(new_keys, old_keys), _distances(new_values, old_values)
    worst = int(ids[int(torch.maximum(keys, values).argmax())])
    if contents.spec.metric == "cosine":
        keys = 1 - torch.cosine_similarity(new_keys, old_keys, dim=-1)
    return DriftReport(
        len(rows), float(keys.mean()), float(keys.max()), float(values.mean()), float(values.max()), worst
    )


def _pair(contents: Contents, rows: np.ndarray, made: EncodedBatch, part: str, where: str) -> tuple[Tensor, Tensor]:
    """Return keys or values (n, width) as they were made now, and as they are stored."""
    at = torch.from_numpy(rows)
    new = torch.as_tensor(made.keys if part == "keys" else made.values).detach().cpu()
    if len(new) != len(rows):
        raise ValueError(f"{where}: encode must return {len(rows)} rows, got {len(new)}. Return one per record.")
    new, width = new.reshape(len(rows), -1), contents.input_dim if part == "keys" else contents.spec.value_size
    if new.shape[1] != width:
        raise BankError(f"{where}: {part} must hold {width} numbers, got {new.shape[1]}. Another encoder made them.")
    if part == "keys":
        return contents.stored_keys(new, where).double(), contents.keys_at(at).double()
    return new.double(), contents.values_at(at).double()


def _distances(new: Tensor, old: Tensor) -> Tensor:
    """Return how far rows lie apart, (n,), over the old ones' norms."""
    distances: Tensor = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return distances


def _record(contents: Contents, records: Records, row: int, entry: int) -> Any:
    if records is None:
        return contents.notes_at(np.asarray([row]))[0]
    return records(entry) if callable(records) else records[entry]


class _EntryRecords(Sequence[Any]):
    """The bank's entries as records to encode: what the caller looks up, and where the entry stands."""

    def __init__(self, contents: Contents, records: Records) -> None:
        self.contents, self.records = contents, records
        self.rows = contents.table.live_rows()
        self.ids = contents.table.column("ids")[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row, entry = int(self.rows[index]), int(self.ids[index])
        return row, _record(self.contents, self.records, row, entry)


def refresh_bank(
    contents: Contents,
    home: Home,
    fingerprint: Fingerprint,
    encode: Encode,
    *,
    part: str,
    records: Records,
    batch_size: int,
    commit_every: int,
    resume: bool,
    progress: bool,
) -> list[str]:
    """Encode every entry again and publish keys, values or both as the next generation; returns what to warn of."""
    where = "MemoryBank.refresh"
    if part not in PARTS:
        raise ValueError(f"{where}: part must be one of {', '.join(PARTS)}, got {part!r}. Say what to make anew.")
    table, entries = contents.table, _EntryRecords(contents, records)
    unnamed = _unnamed(home.manifest.fingerprint, fingerprint, part)
    moved: dict[str, float] = {}

    def again(batch: list[Any]) -> EncodedBatch:
        rows = np.asarray([row for row, _ in batch])
        made = as_batch(encode([record for _, record in batch]), where)
        for name in unnamed.difference(moved):
            moved[name] = _moved(contents, rows, made, name, where)
        keys = torch.ones(len(rows), 1) if part == "values" else made.keys
        values = torch.ones(len(rows), 1) if part == "keys" else made.values
        ids, groups = (table.column(name)[rows].tolist() for name in ("ids", "groups"))
        return EncodedBatch(keys, values, ids, groups, contents.notes_at(rows))

    def publish(made: Contents, _: list[SkippedRecord]) -> None:
        old, new = contents.spec, made.spec
        kept: tuple[str, ...] = ()
        if part == "both":
            spec = replace(new, metric=old.metric)
        elif part == "keys":
            kept = ("values", "scales")
            spec = replace(old, key_dim=new.key_dim)
        else:
            kept = ("keys",)
            spec = replace(old, value_shape=new.value_shape, value_dtype=new.value_dtype)
        final = Contents(spec, contents.codec.center if part == "keys" else None, contents.next_id, contents.transform)
        final.table = made.table
        codec = ValueCodec(torch.int8) if part != "keys" and old.value_dtype == torch.int8 else None
        patched = _Patchwork(made.table, table, kept)
        save_all(final, fingerprint, home.directory, where, expected=home, codec=codec, table=patched)

    spec = contents.spec
    options = BuildOptions(
        spec.metric, spec.value_dtype, spec.key_dtype, commit_every=commit_every, transform=contents.transform
    )
    if part == "values":
        options = options._replace(metric="ip", transform=None)  # the keys are placeholders
    plan: Fingerprint = {**fingerprint, "build.refresh": part, "build.from": contents.content_hash()}
    work = _workplace(home.directory, home.manifest.generation)
    encode_all(
        entries,
        again,
        work,
        plan,
        publish,
        batch_size=batch_size,
        options=options,
        resume=resume,
        progress=progress,
        where=where,
        called=lambda index: f"entry {entries.ids[index]}",
    )
    return [
        f"{where}: fingerprint must name what made the new {name}, got the old fields for {name} that moved by "
        f"{share:.2g} times their size. Set bank.fingerprint['{name[:-1]}.encoder'] or the like, and commit()."
        for name, share in sorted(moved.items())
        if share > SAME
    ]


def _unnamed(old: Fingerprint, new: Fingerprint, part: str) -> set[str]:
    """Return which of keys and values are made anew although the fields that name their maker stay as they are."""
    return {
        name
        for name, prefix in (("keys", "key."), ("values", "value."))
        if part in (name, "both")
        and any(field.startswith(prefix) for field in old)
        and not differing_fields(old, new, prefix)
    }


def _moved(contents: Contents, rows: np.ndarray, made: EncodedBatch, part: str, where: str) -> float:
    try:
        return float(_distances(*_pair(contents, rows, made, part, where)).mean())
    except BankError:  # of another width
        return math.inf


def _workplace(directory: Path, generation: int) -> Path:
    """Return where the refresh of a generation keeps finished entries, and delete what refreshes of others left.

    Those were killed after publishing, or overtaken by another change: nothing can come of them any more.
    """
    ours = re.compile(rf"\.{re.escape(directory.name)}\.refresh-(\d+)")
    for other in directory.parent.iterdir():
        found = ours.fullmatch(other.name)
        if found and int(found[1]) != generation:
            discard(other)
    return directory.with_name(f".{directory.name}.refresh-{generation}")


class _Patchwork:
    """New rows with some columns of the old ones, entry by entry."""

    def __init__(self, new: RowTable, old: RowTable, kept: tuple[str, ...]) -> None:
        self.new, self.old, self.kept = new, old, kept
        self.old_rows = torch.from_numpy(old.live_rows())

    @property
    def has_scales(self) -> bool:
        return self.old.has_scales if "scales" in self.kept else self.new.has_scales

    @property
    def has_notes(self) -> bool:
        return self.new.has_notes

    def live_rows(self) -> np.ndarray:
        return self.new.live_rows()

    def gather(self, rows: Tensor, column: str) -> Tensor:
        if column in self.kept:
            return self.old.gather(self.old_rows[rows], column)
        return self.new.gather(rows, column)

    def note(self, row: int) -> bytes:
        return self.new.note(row)
