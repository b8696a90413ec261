"""A memory bank in Milvus: a file on this machine, a server, or a cluster, behind the same calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from tinyalign.memory import inputs
from tinyalign.memory.bank import MemoryBank
from tinyalign.memory.collection import CALLER, ROWS_AT_ONCE, Collection
from tinyalign.memory.contents import BankSpec, Contents, spec_for
from tinyalign.memory.errors import BankError
from tinyalign.memory.exclusion import padded_ids
from tinyalign.memory.fingerprint import Fingerprint, checked_fingerprint, require_match
from tinyalign.memory.retrieval import Entry, Hits, Limits, Neighbours
from tinyalign.memory.segment import decode_note

MOST_RESULTS = 16_384  # Milvus's own limit on one search
MOST_LISTED = 65_536  # ids in one filter expression
SPARE = 16

Filter = Callable[[dict[str, Any]], bool] | Tensor | str


class MilvusMemoryBank:
    """The contract of ``MemoryBank`` over a Milvus collection, for banks beyond one machine.

    Keys are a vector field, values another (float16 on a server, float32 in milvus-lite, which has no other); ids and
    groups are numbers, metadata is JSON. A query's exclusions are met by asking for more neighbours and, where too few
    remain, by a filter of its own. Values come back in the same call as long as few more are asked for than are wanted.
    Changes are durable at once or with ``commit``, as the server has it configured. There are no generations: what a
    neighbour table is tied to is ``content_hash``, which reads all keys.

    Args:
        uri: a path ending in ``.db`` (embedded milvus-lite), or the address of a server.
        key_dim: width of the keys; may be left out for a collection that exists.
        value_shape: shape of one value; likewise.
        collection: name of the collection.
        metric: ``cosine`` (when absent) or ``ip``; may be left out for a collection that exists.
        fingerprint: as in ``MemoryBank``; stored with a new collection, compared with that of one that exists.
        index: Milvus's index of the keys in a new collection, such as ``{"index_type": "HNSW", "params": {"M": 32}}``;
            exact when absent.
        token: of the server.

    Raises:
        ImportError: pymilvus is not installed.
        BankError: the collection does not exist and no sizes were given, or it is something else.
        FingerprintMismatch: the collection that exists was made by something else.
    """

    generation = 0  # as of a MemoryBank that was not saved
    key_dtype, value_dtype = torch.float32, torch.float16

    def __init__(
        self,
        uri: str,
        key_dim: int | None = None,
        value_shape: Sequence[int] | None = None,
        *,
        collection: str = "tinyalign",
        metric: str | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        index: Mapping[str, Any] | None = None,
        token: str = "",
    ) -> None:
        self._collection = Collection(uri, collection, token)
        if not self._collection.exists():
            if key_dim is None or value_shape is None:
                raise BankError(
                    f"{CALLER}: collection must exist, or key_dim and value_shape be given, got {collection!r} in "
                    f"{uri!r}. Give the sizes to create it."
                )
            spec = spec_for(key_dim, value_shape, metric or "cosine", self.key_dtype, self.value_dtype, None)
            prints = checked_fingerprint(fingerprint, CALLER)
            self._collection.create(spec, prints, dict(index or {"index_type": "FLAT"}))
        found: tuple[BankSpec, Fingerprint] = self._collection.open()
        self._spec, self.fingerprint = found
        known = self.key_dim, self.value_shape, self.metric
        given = key_dim, None if value_shape is None else tuple(value_shape), metric
        asked = tuple(ours if theirs is None else theirs for ours, theirs in zip(known, given, strict=True))
        if asked != known:
            raise BankError(
                f"{CALLER}: sizes and metric must be those of {collection!r}, {known}, got {asked}. "
                "Leave them out, or choose another collection."
            )
        if fingerprint is not None:
            require_match(self.fingerprint, fingerprint, CALLER)
        self._checks = Contents(self._spec)  # holds no entries; prepares keys and queries as a bank does

    key_dim = property(lambda self: self._spec.key_dim, doc="Width of keys and queries.")
    value_shape = property(lambda self: self._spec.value_shape, doc="Shape of one value.")
    metric = property(lambda self: self._spec.metric, doc="``cosine`` or ``ip``.")

    def __len__(self) -> int:
        return self._collection.count()

    def __contains__(self, entry_id: object) -> bool:
        if not inputs.is_whole(entry_id):
            return False
        return bool(self._collection.present([int(entry_id)]))

    def __getitem__(self, entry_id: int) -> Entry:
        where = f"{CALLER}[id]"
        (wanted,) = inputs.query_ids([entry_id], where).tolist()
        row = self._collection.rows([wanted], ["group", "key", "value", "note"], where)[wanted]
        key, value = torch.tensor(np.asarray(row["key"], dtype=np.float32)), self._collection.value(row)
        return Entry(key, value.reshape(self.value_shape), wanted, int(row["group"]), _note(row))

    @property
    def ids(self) -> Tensor:
        """Ids of all entries, ascending."""
        return torch.tensor(sorted(int(row["id"]) for row in self._collection.all(["id"])), dtype=torch.int64)

    @property
    def groups(self) -> Tensor:
        """Groups of all entries, in the order of ``ids``."""
        pairs = sorted((int(row["id"]), int(row["group"])) for row in self._collection.all(["id", "group"]))
        return torch.tensor([group for _, group in pairs], dtype=torch.int64)

    def add(
        self,
        keys: Tensor,
        values: Tensor,
        ids: Sequence[int] | Tensor | None = None,
        groups: Sequence[int] | Tensor | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Tensor:
        """Add entries as ``MemoryBank.add`` does; everything is checked before anything is sent."""
        where = f"{CALLER}.add"
        staged = Contents(self._spec)
        if ids is None and len(self):
            staged.next_id = int(self.ids.max()) + 1
        added = staged.append(keys, values, ids, groups, metadata, where)
        known = self._collection.present(added.tolist())
        if known:
            raise ValueError(
                f"{where}: ids must be new, got {min(known)} which the bank holds. Remove that entry first."
            )
        for at in range(0, len(added), ROWS_AT_ONCE):
            rows = torch.arange(at, min(at + ROWS_AT_ONCE, len(added)))
            columns = staged.table.columns_at(rows)
            stored = columns.values if self._collection.half else columns.values.float()
            entries = zip(rows.tolist(), columns.keys.numpy(), stored.numpy(), strict=True)
            self._collection.client.insert(
                self._collection.name,
                [
                    {
                        "id": int(columns.ids[row - at]),
                        "group": int(columns.groups[row - at]),
                        "key": key,
                        "value": value,
                        "note": decode_note(staged.table.note(row)),
                    }
                    for row, key, value in entries
                ],
            )
        return added

    def remove(self, ids: Sequence[int] | Tensor) -> int:
        """Remove entries by id; an id that the bank lacks is an error, and nothing changes."""
        wanted = np.unique(inputs.query_ids(ids, f"{CALLER}.remove").reshape(-1)).tolist()
        self._collection.rows(wanted, [], f"{CALLER}.remove")
        for at in range(0, len(wanted), ROWS_AT_ONCE):
            self._collection.client.delete(self._collection.name, ids=wanted[at : at + ROWS_AT_ONCE])
        return len(wanted)

    def search(
        self,
        queries: Tensor,
        k: int = 5,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
        *,
        where: Filter | None = None,
        max_score: float | None = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Hits:
        """Return the k best entries of each query and their values, as ``MemoryBank.search`` does.

        ``where`` may also be an expression of Milvus over ``id``, ``group`` and ``note["field"]``, which the server
        evaluates; a function or a bool tensor is turned into a list of ids here, for banks of up to 65,536 such.
        """
        limits = Limits(exclude_ids, exclude_groups, None, max_score)
        found, rows = self._best(queries, k, limits, where, fingerprint, ("value",))
        return Hits(found.scores, found.ids, self._values(found.ids, rows, f"{CALLER}.search")[0], found.mask)

    def neighbours(
        self,
        queries: Tensor,
        k: int = 5,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
        *,
        where: Filter | None = None,
        max_score: float | None = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Neighbours:
        """Return what ``search`` returns, without values."""
        return self._best(queries, k, Limits(exclude_ids, exclude_groups, None, max_score), where, fingerprint)[0]

    def _best(
        self,
        queries: Tensor,
        k: int,
        limits: Limits,
        where: Filter | None,
        fingerprint: Mapping[str, Any] | None,
        fields: tuple[str, ...] = (),
    ) -> tuple[Neighbours, dict[int, Any]]:
        caller = f"{CALLER}.search"
        if fingerprint is not None:
            require_match(self.fingerprint, fingerprint, caller, "key.")
        if not inputs.is_whole(k) or not 0 <= k <= MOST_RESULTS:
            raise ValueError(f"{caller}: k must be an integer from 0 to {MOST_RESULTS}, got {k!r}. Ask for that many.")
        k = int(k)
        checked = self._projected(queries, caller)
        if not len(self):
            raise BankError(f"{caller}: the bank must hold entries, got 0. Add some first.")
        count = checked.shape[0]
        ids = padded_ids(limits.exclude_ids, count, caller, "exclude_ids")
        groups = padded_ids(limits.exclude_groups, count, caller, "exclude_groups")
        allowed = "" if where is None else self._expression(where, caller)
        scores, hits, rows = torch.zeros(count, k), torch.full((count, k), -1), dict[int, Any]()
        if count and k:
            hidden = [_hidden(ids, groups, row) for row in range(count)]
            extra = max(len(own) + SPARE * bool(group) for own, group in hidden)
            limit = min(k + extra, MOST_RESULTS)
            fields = ("id", "group", *(fields if limit <= 2 * k else ()))
            most = limits.max_score
            for row, found in enumerate(self._collection.search(checked, limit, allowed, fields, most)):
                own, group = hidden[row]
                kept = [hit for hit in found if hit["id"] not in own and hit["entity"]["group"] not in group][:k]
                if len(kept) < k and len(found) == limit:
                    expression = _joined(allowed, own, group)
                    kept = next(iter(self._collection.search(checked[row : row + 1], k, expression, fields, most)))
                for place, hit in enumerate(kept):
                    hits[row, place], scores[row, place] = int(hit["id"]), float(hit["distance"])
                    rows[int(hit["id"])] = hit["entity"]
        device = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
        return Neighbours(scores.to(device), hits.to(device), (hits >= 0).to(device)), rows

    def _expression(self, where: Filter, caller: str) -> str:
        if isinstance(where, str):
            return where
        if callable(where):
            kept = [int(row["id"]) for row in self._collection.all(["id", "note"]) if where(_note(row))]
        else:
            ids = self.ids
            flags = inputs.as_flags(where)
            if flags is None or flags.dtype != torch.bool or flags.shape != ids.shape:
                found = repr(where) if flags is None else f"{flags.dtype} {tuple(flags.shape)}"
                raise ValueError(
                    f"{caller}: where must be a bool tensor of shape ({len(ids)},), got {found}. Give one flag per "
                    "entry, in the order of bank.ids, a function of the metadata or an expression."
                )
            kept = ids[flags.cpu()].tolist()
        if len(kept) > MOST_LISTED:
            raise BankError(
                f"{caller}: where must keep at most {MOST_LISTED} entries when it is no expression, got {len(kept)}. "
                "Say it as an expression, such as 'note[\"year\"] > 2000'."
            )
        return f"id in {sorted(kept)}"

    def _projected(self, queries: Any, caller: str) -> Tensor:
        rows = inputs.float_rows(queries, (self.key_dim,), caller, "queries")
        return self._checks.searchable(rows, caller, "queries").to(torch.float32)

    def project(self, queries: Tensor) -> Tensor:
        """Return queries (B, D) as they are compared with ``keys()``: of unit length for cosine."""
        return self._projected(queries, f"{CALLER}.project")

    def gather(self, ids: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return values of ids of any shape and a mask, False (values zero) where the id is -1."""
        return self._values(ids, {}, f"{CALLER}.gather")

    def _values(self, ids: Any, rows: dict[int, Any], caller: str) -> tuple[Tensor, Tensor]:
        wanted = inputs.query_ids(ids, caller)
        known = {entry: row for entry, row in rows.items() if "value" in row}
        asked = [entry for entry in np.unique(wanted[wanted != -1]).tolist() if entry not in known]
        known.update(self._collection.rows(asked, ["value"], caller))
        values = torch.zeros(wanted.size, self._spec.value_size, dtype=torch.float16)
        for place, entry in enumerate(wanted.reshape(-1).tolist()):
            if entry != -1:
                values[place] = self._collection.value(known[entry])
        mask = torch.from_numpy(wanted != -1)
        device = ids.device if isinstance(ids, Tensor) else torch.device("cpu")
        return values.reshape(*wanted.shape, *self.value_shape).to(device), mask.to(device)

    def keys(self, ids: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return stored keys as float32, (n, D), for the given ids or all entries in the order of ``ids``."""
        wanted = inputs.query_ids(self.ids if ids is None else ids, f"{CALLER}.keys").reshape(-1).tolist()
        rows = self._collection.rows(wanted, ["key"], f"{CALLER}.keys")
        keys = np.asarray([rows[entry]["key"] for entry in wanted], dtype=np.float32)
        return torch.tensor(keys.reshape(-1, self.key_dim))

    def content_hash(self) -> str:
        """Return 32 hex digits that name the keys and ids of all entries; it reads them all, some at a time."""
        total = 0
        for row in self._collection.all(["id", "key"]):  # in no order: each is named alone, and the names are added
            key = np.asarray(row["key"], dtype=np.float32).tobytes()
            total += xxhash.xxh3_128_intdigest(int(row["id"]).to_bytes(8, "little") + key)
        return xxhash.xxh3_128_hexdigest(f"{self.key_dim}|{self.metric}|{total}".encode())

    def require_fingerprint(self, other: Mapping[str, Any], prefix: str = "") -> None:
        """Raise ``FingerprintMismatch`` naming each field (under ``prefix``) in which ``other`` differs."""
        require_match(self.fingerprint, other, f"{CALLER}.require_fingerprint", prefix)

    def metadata(self, ids: Sequence[int] | Tensor) -> list[dict[str, Any]]:
        """Return the metadata of entries, an empty dict where they have none."""
        wanted = inputs.query_ids(ids, f"{CALLER}.metadata").reshape(-1).tolist()
        rows = self._collection.rows(wanted, ["note"], f"{CALLER}.metadata")
        return [_note(rows[entry]) for entry in wanted]

    def commit(self) -> None:
        """Ask the server to write out what it holds in memory."""
        self._collection.client.flush(self._collection.name)

    def close(self) -> None:
        """End the connection."""
        self._collection.client.close()

    def add_bank(self, bank: MemoryBank) -> int:
        """Copy all entries of a bank; returns how many.

        Raises:
            BankError: the bank has another metric, or a key transform, which would be missing when queries come.
            FingerprintMismatch: the bank was made by something else.
        """
        where = f"{CALLER}.add_bank"
        if bank.metric != self.metric:
            raise BankError(
                f"{where}: bank must have metric {self.metric!r}, got {bank.metric!r}. Choose another collection."
            )
        if bank._contents.transform is not None:
            raise BankError(
                f"{where}: bank must have no key transform, got one, and a collection keeps none. "
                "Add bank.keys(ids) with add(), and search with bank.project(queries)."
            )
        require_match(self.fingerprint, bank.fingerprint, where)
        ids, groups = bank.ids, bank.groups
        for at in range(0, len(ids), ROWS_AT_ONCE):
            part = ids[at : at + ROWS_AT_ONCE]
            notes = bank.metadata(part)
            self.add(bank.keys(part), bank.gather(part)[0], part, groups[at : at + ROWS_AT_ONCE], notes)
        return len(ids)

    def to_bank(self) -> MemoryBank:
        """Copy all entries into a bank in memory, ids ascending."""
        bank = MemoryBank(self.key_dim, self.value_shape, metric=self.metric, fingerprint=self.fingerprint)
        ids, groups = self.ids, self.groups
        for at in range(0, len(ids), ROWS_AT_ONCE):
            part = ids[at : at + ROWS_AT_ONCE]
            values, _ = self.gather(part)
            bank.add(self.keys(part), values, part, groups[at : at + ROWS_AT_ONCE], self.metadata(part))
        return bank


AnyBank = MemoryBank | MilvusMemoryBank


def _hidden(ids: np.ndarray | None, groups: np.ndarray | None, row: int) -> tuple[set[int], set[int]]:
    own = set() if ids is None else {each for each in ids[row].tolist() if each >= 0}
    return own, set() if groups is None else {each for each in groups[row].tolist() if each >= 0}


def _joined(allowed: str, ids: set[int], groups: set[int]) -> str:
    parts = [f"{name} not in {sorted(hidden)}" for name, hidden in (("id", ids), ("group", groups)) if hidden]
    return " and ".join([*([f"({allowed})"] if allowed else []), *parts])


def _note(row: Mapping[str, Any]) -> dict[str, Any]:
    note = row["note"]
    return note if isinstance(note, dict) else decode_note(note if isinstance(note, bytes) else str(note).encode())
