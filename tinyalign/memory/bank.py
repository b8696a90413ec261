"""The memory bank: keys to search, values to retrieve, ids and groups that say who may retrieve what."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory import copying, inputs, retrieval, saving
from tinyalign.memory.approximate import FaissIndex
from tinyalign.memory.contents import Contents, spec_for
from tinyalign.memory.errors import BankError
from tinyalign.memory.fingerprint import Fingerprint, checked_fingerprint, require_match
from tinyalign.memory.refresh import DriftReport, Encode, Records, check_bank, refresh_bank
from tinyalign.memory.resident import ResidentBank
from tinyalign.memory.retrieval import Entry, Hits, Limits, Neighbours, Where
from tinyalign.memory.transform import KeyTransform
from tinyalign.memory.verification import VerifyReport, verified


class MemoryBank:
    """Keys to search and values to retrieve, kept exact, durable and free of leaks.

    ``ids`` are the caller's sample ids, ``groups`` tie duplicates (one image, several captions) together; both can be
    excluded per query, so that a sample never retrieves itself or its twins. Search is exact over the keys as stored. A
    bank lives in memory until ``save``; a loaded one is mapped, and ``commit`` makes later changes durable.

    Args:
        key_dim: width D of keys and queries.
        value_shape: shape of one value, (L, D_v) for latents.
        metric: ``cosine`` (keys and queries are brought to unit length) or ``ip``, the inner product.
        value_dtype: float16, bfloat16, float32, or int8 (centred, one scale per entry).
        key_dtype: float16, bfloat16 or float32.
        fingerprint: plain fields that say what made keys (``key.*``), values (``value.*``) and data (``data.*``).
        transform: centring or whitening, applied to keys and queries of width ``key_dim`` and saved with the bank.

    Raises:
        ValueError: a size is not positive, or the metric or a dtype is unknown.
        TypeError: the fingerprint holds something other than plain values.

    Example:
        >>> bank = MemoryBank(key_dim=4, value_shape=(2, 3))
        >>> bank.add(torch.eye(4), torch.ones(4, 2, 3), ids=[10, 11, 12, 13]).tolist()
        [10, 11, 12, 13]
        >>> hits = bank.search(torch.eye(4)[:1], k=2, exclude_ids=[10])
        >>> bool((hits.ids != 10).all()), tuple(hits.values.shape)
        (True, (1, 2, 2, 3))
    """

    def __init__(
        self,
        key_dim: int,
        value_shape: Sequence[int],
        *,
        metric: str = "cosine",
        value_dtype: torch.dtype = torch.float16,
        key_dtype: torch.dtype = torch.float16,
        fingerprint: Mapping[str, Any] | None = None,
        transform: KeyTransform | None = None,
    ) -> None:
        spec = spec_for(key_dim, value_shape, metric, key_dtype, value_dtype, transform)
        self._contents = Contents(spec, transform=transform)
        self._home: saving.Home | None = None
        self.fingerprint: Fingerprint = checked_fingerprint(fingerprint, "MemoryBank")

    def __len__(self) -> int:
        return len(self._contents.table)

    def __contains__(self, entry_id: object) -> bool:
        if not inputs.is_whole(entry_id):
            return False
        return bool(self._contents.table.find(np.asarray([entry_id], dtype=np.int64))[0] >= 0)

    def __repr__(self) -> str:
        return f"MemoryBank({len(self)} entries, {self._contents.spec.describe()}, generation {self.generation})"

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBank:
        return _bank_of(copying.copied(self._contents, self.fingerprint, self._home))

    def __reduce__(self) -> tuple[Any, ...]:
        return copying.reduced(_restore, self._contents, self.fingerprint, self._home)

    @property
    def key_dim(self) -> int:
        """Width D of keys and queries."""
        return self._contents.input_dim

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of one value."""
        return self._contents.spec.value_shape

    @property
    def metric(self) -> str:
        """``cosine`` or ``ip``."""
        return self._contents.spec.metric

    @property
    def key_dtype(self) -> torch.dtype:
        """How keys are stored."""
        return self._contents.spec.key_dtype

    @property
    def value_dtype(self) -> torch.dtype:
        """How values are stored."""
        return self._contents.spec.value_dtype

    @property
    def ids(self) -> Tensor:
        """Ids of all entries, (M,) int64, in row order."""
        table = self._contents.table
        return torch.from_numpy(table.column("ids")[table.live_rows()])

    @property
    def groups(self) -> Tensor:
        """Groups of all entries, (M,) int64, -1 for none."""
        table = self._contents.table
        return torch.from_numpy(table.column("groups")[table.live_rows()])

    @property
    def generation(self) -> int:
        """Number of the generation on disk that this object continues; 0 in memory."""
        return self._home.manifest.generation if self._home else 0

    @property
    def path(self) -> Path | None:
        """The directory that this bank was loaded from or saved to."""
        return self._home.directory if self._home else None

    def add(
        self,
        keys: Tensor,
        values: Tensor,
        ids: Sequence[int] | Tensor | None = None,
        groups: Sequence[int] | Tensor | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Tensor:
        """Add entries; returns their ids. Nothing changes when anything is wrong with them.

        Args:
            keys: made by what ``fingerprint`` says, from frozen features.
            values: latents of the same entries.
            ids: distinct numbers from 0; the next free ones when absent.
            groups: entries of one group are duplicates of one another; -1 for none.
            metadata: one JSON-like dict or None per entry.

        Shape:
            keys: (M, D). values: (M, *value_shape). ids, groups: (M,). returns: (M,) int64.

        Raises:
            ValueError: a shape does not fit, a number is not finite or zero, an id is there already.
            TypeError: keys or values are not floating point, or ids or groups not integers.
        """
        return self._contents.append(keys, values, ids, groups, metadata, "MemoryBank.add")

    def remove(self, ids: Sequence[int] | Tensor) -> int:
        """Remove entries by id; returns how many. An id that the bank lacks is an error, and nothing changes."""
        rows = np.unique(self._contents.rows_of(ids, "MemoryBank.remove"))
        self._contents.table.remove(rows)
        return len(rows)

    def search(
        self,
        queries: Tensor,
        k: int = 5,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
        *,
        where: Where | None = None,
        max_score: float | None = None,
        method: str = "exact",
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Hits:
        """Return the k best entries of each query and their values, best first.

        Args:
            queries: any float dtype and device; results come back on that device.
            k: how many; where fewer are left, ``mask`` is False.
            exclude_ids: what each query must not retrieve: (B,), (B, E) padded with -1, or one list per query.
            exclude_groups: the same for groups.
            where: keep only entries whose metadata it accepts, or for which a bool (M,) tensor in row order is True.
            max_score: leave out entries above this score, such as near-duplicates of the query.
            method: ``exact``; ``certified``, as exact and faster where the processor multiplies int8 matrices fast, for
                a copy of the keys in int8; or ``approximate``, by the index of ``build_index``.
            fingerprint: what made the queries; its ``key.`` fields must equal the bank's.

        Shape:
            queries: (B, D). returns: scores, ids, mask (B, k); values (B, k, *value_shape).

        Raises:
            ValueError: the bank is empty, k negative, a query of another width, not finite or (cosine) zero.
            FingerprintMismatch: the queries were made by something else.
        """
        found = self.neighbours(
            queries, k, exclude_ids=exclude_ids, exclude_groups=exclude_groups, where=where,
            max_score=max_score, method=method, fingerprint=fingerprint,
        )  # fmt: skip
        return Hits(found.scores, found.ids, self.gather(found.ids)[0], found.mask)

    def neighbours(
        self,
        queries: Tensor,
        k: int = 5,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
        *,
        where: Where | None = None,
        max_score: float | None = None,
        method: str = "exact",
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Neighbours:
        """Return what ``search`` returns, without reading any value."""
        if fingerprint is not None:
            require_match(self.fingerprint, fingerprint, retrieval.CALLER, "key.")
        checked = retrieval.checked_queries(self._contents, queries, k)
        limits = Limits(exclude_ids, exclude_groups, where, max_score)
        top = retrieval.top_rows(self._contents, checked, int(k), limits, method)
        device = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
        return retrieval.as_neighbours(self._contents, top, device)

    def build_index(self, factory: str, *, candidates: int = 0, parameters: Mapping[str, float] | None = None) -> None:
        """Build a faiss index over the entries for ``method="approximate"``; it holds until entries change.

        Args:
            factory: a faiss factory string: ``HNSW32``, ``IVF1024,Flat``, ``IVF1024,RaBitQ``, ...
            candidates: rows it proposes per query, re-ranked exactly by the stored keys; k + 8 at least.
            parameters: by faiss's names, such as ``{"nprobe": 64}``.

        Raises:
            BankError: the bank is empty, or faiss refuses the string or a parameter.
        """
        if not len(self):
            raise BankError("MemoryBank.build_index: the bank must hold entries, got 0. Add some first.")
        self._contents.index = FaissIndex(self._contents.table, factory, candidates, dict(parameters or {}))

    def recall(self, queries: Tensor, k: int = 5, *, method: str = "approximate") -> float:
        """Return the share of the exact k neighbours that another method finds; equal scores count as found."""
        exact, other = self.neighbours(queries, k), self.neighbours(queries, k, method=method)
        kth = exact.scores.masked_fill(~exact.mask, float("inf")).amin(1, keepdim=True)
        found = (other.mask & (other.scores >= kth)).sum()
        return float(found / exact.mask.sum().clamp_min(1))

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of ids of any shape, and a mask that is False (values zero) where the id is -1.

        Shape:
            ids: (B, K), int64. returns: values (B, K, *value_shape), mask (B, K), on the device of ``ids``.
        """
        return retrieval.values_of(self._contents, ids)

    def to(self, device: Any, *, values: bool = True) -> ResidentBank:
        """Copy the entries to a device, or split them over a list of devices, for search that never leaves them."""
        places = [torch.device(each) for each in (device if isinstance(device, (list, tuple)) else [device])]
        return ResidentBank(self._contents, places, values=values, fingerprint=self.fingerprint)

    def keys(self, ids: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return stored (transformed) keys as float32, (n, D), for the given ids or all entries."""
        rows = self._contents.table.live_rows() if ids is None else self._contents.rows_of(ids, "MemoryBank.keys")
        return self._contents.keys_at(torch.from_numpy(rows))

    def project(self, queries: Tensor) -> Tensor:
        """Return queries (B, D) as they are compared with ``keys()``: transformed, of unit length for cosine."""
        return retrieval.checked_queries(self._contents, queries, 0)

    def metadata(self, ids: Sequence[int] | Tensor) -> list[dict[str, Any]]:
        """Return the metadata of entries, an empty dict where they have none."""
        return self._contents.notes_at(self._contents.rows_of(ids, "MemoryBank.metadata"))

    def __getitem__(self, entry_id: int) -> Entry:
        return retrieval.entry_of(self._contents, entry_id)

    def content_hash(self) -> str:
        """Return 32 hex digits that name the keys and ids of all entries; saving and compacting leave it as it is."""
        return self._contents.content_hash()

    def require_fingerprint(self, other: Mapping[str, Any], prefix: str = "") -> None:
        """Raise ``FingerprintMismatch`` naming each field (under ``prefix``) in which ``other`` differs."""
        require_match(self.fingerprint, other, "MemoryBank.require_fingerprint", prefix)

    def save(self, path: str | Path) -> Path:
        """Make the bank durable at ``path`` and continue from there; a bank that stands there is replaced in one step.

        Raises:
            BankError: the path holds something else, the disk is full, or (``BankLockedError``) another process writes.
            TypeError: a field of ``fingerprint`` is not a plain value.
        """
        directory = Path(path).absolute()
        if self._home is not None and directory == self._home.directory:
            self.commit()
            return directory
        saving.save_all(self._contents, self.fingerprint, directory, "MemoryBank.save")
        self._reopen(directory, mapped=True, caller="MemoryBank.save")
        return directory

    def commit(self) -> int:
        """Write what was added and removed as the next generation; returns its number.

        Raises:
            BankError: another process is writing (``BankLockedError``) or has committed since (``StaleBankError``).
            TypeError: a field of ``fingerprint`` is not a plain value.
        """
        caller = "MemoryBank.commit"
        home = self._saved(caller)
        if saving.pending(self._contents, self.fingerprint, home):
            saving.commit(self._contents, self.fingerprint, home, caller)
            self._reopen(home.directory, mapped=home.mapped, caller=caller)
        return self.generation

    def compact(self) -> int:
        """Rewrite the entries without the removed ones, as one segment; returns how many rows were dropped."""
        dropped = self._contents.table.total - len(self)
        if (home := self._home) is None:
            self._contents = saving.compacted(self._contents)
            return dropped
        saving.save_all(self._contents, self.fingerprint, home.directory, "MemoryBank.compact", expected=home)
        self._reopen(home.directory, mapped=home.mapped, caller="MemoryBank.compact")
        return dropped

    def check(self, encode: Encode, n: int = 64, *, records: Records = None, seed: int = 0) -> DriftReport:
        """Encode ``n`` sampled entries again and report how far keys and values have drifted from the stored ones.

        ``encode`` gets ``records[id]`` (a mapping or a function) of each, or their metadata when there are no records.
        """
        return check_bank(self._contents, encode, n, records, seed)

    def refresh(
        self,
        encode: Encode,
        *,
        part: str = "both",
        records: Records = None,
        fingerprint: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        commit_every: int = 4096,
        resume: bool = True,
        progress: bool = True,
    ) -> int:
        """Encode all entries again into the next generation: ``keys``, ``values`` or ``both``; returns its number.

        The fields of ``fingerprint`` replace the bank's; what moves though its fields stay is warned of. When killed it
        loses at most ``commit_every`` records and is continued by the same encoder, unless ``resume`` is False.
        """
        where = "MemoryBank.refresh"
        home = self._saved(where)
        self.commit()
        prints = {**self.fingerprint, **checked_fingerprint(fingerprint, where)}
        unnamed = refresh_bank(
            self._contents, self._home or home, prints, encode, part=part, records=records,
            batch_size=batch_size, commit_every=commit_every, resume=resume, progress=progress,
        )  # fmt: skip
        self._reopen(home.directory, mapped=home.mapped, caller=where)
        for message in unnamed:
            warnings.warn(message, stacklevel=2)
        return self.generation

    def verify(self) -> VerifyReport:
        """Read every file of the generation and compare checksums; an error names what differs or was replaced."""
        return verified(self._saved("MemoryBank.verify"))

    def _saved(self, caller: str) -> saving.Home:
        if self._home is None:
            raise BankError(f"{caller}: the bank must have been saved, got one in memory. Call save(path) first.")
        return self._home

    def _reopen(self, directory: Path, *, mapped: bool, caller: str) -> None:
        self._contents, self.fingerprint, self._home = saving.load(directory, mapped=mapped, caller=caller)

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True) -> MemoryBank:
        """Open a saved bank, mapped so that processes share its pages, or (``mmap=False``) read into memory.

        Raises:
            BankError: there is no bank, or (``BankCorruptedError``) a file is missing or has another size.
        """
        return _bank_of(saving.load(Path(path).absolute(), mapped=mmap, caller="MemoryBank.load"))

    @classmethod
    def merge(cls, banks: Sequence[MemoryBank]) -> MemoryBank:
        """Join banks of one kind and one fingerprint into a bank in memory, entries in the order of ``banks``.

        Raises:
            BankError: there are none, they were made differently, or an id is in two of them.
        """
        joined = saving.merged([(b._contents, b.fingerprint) for b in banks], "MemoryBank.merge")
        return _bank_of((joined, dict(banks[0].fingerprint), None))


def _bank_of(parts: copying.Parts) -> MemoryBank:
    bank = MemoryBank.__new__(MemoryBank)
    bank._contents, bank.fingerprint, bank._home = parts
    return bank


def _restore(*state: Any) -> MemoryBank:
    return _bank_of(copying.restored(*state))
