"""A memory bank in Milvus: a file on this machine, a server, or a cluster, behind the same calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory import inputs
from tinyalign.memory.bank import MemoryBank
from tinyalign.memory.collection import CALLER, ROWS_AT_ONCE, Collection
from tinyalign.memory.contents import BankSpec, Contents
from tinyalign.memory.errors import BankError
from tinyalign.memory.exclusion import padded_ids
from tinyalign.memory.fingerprint import Fingerprint, checked_fingerprint, require_match
from tinyalign.memory.retrieval import Hits, Limits, Neighbours
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
    Changes are durable at once or with ``commit``, as the server has it configured.

    Args:
        uri: a path ending in ``.db`` (embedded milvus-lite), or the address of a server.
        key_dim: width of the keys; may be left out for a collection that exists.
        value_shape: shape of one value; likewise.
        collection: name of the collection.
        metric: ``cosine`` or ``ip``.
        fingerprint: as in ``MemoryBank``; stored with the collection.
        index: Milvus's index of the keys, such as ``{"index_type": "HNSW", "params": {"M": 32}}``; exact when absent.
        token: of the server.

    Raises:
        ImportError: pymilvus is not installed.
        BankError: the collection does not exist and no sizes were given, or it is something else.
    """

    def __init__(
        self,
        uri: str,
        key_dim: int | None = None,
        value_shape: Sequence[int] | None = None,
        *,
        collection: str = "tinyalign",
        metric: str = "cosine",
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
            shape = tuple(int(size) for size in value_shape)
            spec = BankSpec(int(key_dim), shape, metric, torch.float32, torch.float16)
            prints = checked_fingerprint(fingerprint, CALLER)
            self._collection.create(spec, prints, dict(index or {"index_type": "FLAT"}))
        found: tuple[BankSpec, Fingerprint] = self._collection.open()
        self._spec, self.fingerprint = found
        known = self._spec.key_dim, self._spec.value_shape
        asked = known[0] if key_dim is None else key_dim, known[1] if value_shape is None else tuple(value_shape)
        if asked != known:
            raise BankError(
                f"{CALLER}: sizes must be those of {collection!r}, {known}, got {asked}. "
                "Leave them out, or choose another collection."
            )
        self._checks = Contents(self._spec)  # holds no entries; prepares keys and queries as a bank does

    key_dim = property(lambda self: self._spec.key_dim, doc="Width of keys and queries.")
    value_shape = property(lambda self: self._spec.value_shape, doc="Shape of one value.")
    metric = property(lambda self: self._spec.metric, doc="``cosine`` or ``ip``.")

    def __len__(self) -> int:
        return self._collection.count()

    def __contains__(self, entry_id: object) -> bool:
        if isinstance(entry_id, bool) or not isinstance(entry_id, (int, np.integer)):
            return False
        return bool(self._collection.present([int(entry_id)]))

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
        *,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
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
        *,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
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
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= MOST_RESULTS:
            raise ValueError(f"{caller}: k must be an integer from 0 to {MOST_RESULTS}, got {k!r}. Ask for that many.")
        checked = inputs.float_rows(queries, (self.key_dim,), caller, "queries")
        if not len(self):
            raise BankError(f"{caller}: the bank must hold entries, got 0. Add some first.")
        checked = self._checks.searchable(checked, caller, "queries").to(torch.float32)
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
        device = queries.device
        return Neighbours(scores.to(device), hits.to(device), (hits >= 0).to(device)), rows

    def _expression(self, where: Filter, caller: str) -> str:
        if isinstance(where, str):
            return where
        if isinstance(where, Tensor):
            ids = self.ids
            if where.dtype != torch.bool or where.shape != ids.shape:
                raise ValueError(
                    f"{caller}: where must be a bool tensor of shape ({len(ids)},), got {where.dtype} "
                    f"{tuple(where.shape)}. Give one flag per entry, in the order of bank.ids."
                )
            kept = ids[where.cpu()].tolist()
        else:
            kept = [int(row["id"]) for row in self._collection.all(["id", "note"]) if where(_note(row))]
        if len(kept) > MOST_LISTED:
            raise BankError(
                f"{caller}: where must keep at most {MOST_LISTED} entries when it is no expression, got {len(kept)}. "
                "Say it as an expression, such as 'note[\"year\"] > 2000'."
            )
        return f"id in {sorted(kept)}"

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return values of ids of any shape and a mask, False (values zero) where the id is -1."""
        return self._values(ids, {}, f"{CALLER}.gather")

    def _values(self, ids: Tensor, rows: dict[int, Any], caller: str) -> tuple[Tensor, Tensor]:
        wanted = inputs.query_ids(ids, caller)
        known = {entry: row for entry, row in rows.items() if "value" in row}
        asked = [entry for entry in np.unique(wanted[wanted != -1]).tolist() if entry not in known]
        known.update(self._collection.rows(asked, ["value"], caller))
        values = torch.zeros(wanted.size, self._spec.value_size, dtype=torch.float16)
        for place, entry in enumerate(wanted.reshape(-1).tolist()):
            if entry != -1:
                values[place] = self._collection.value(known[entry])
        mask = torch.from_numpy(wanted != -1)
        return values.reshape(*wanted.shape, *self.value_shape).to(ids.device), mask.to(ids.device)

    def keys(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Return stored keys (n, D) as float32."""
        wanted = inputs.query_ids(ids, f"{CALLER}.keys").reshape(-1).tolist()
        rows = self._collection.rows(wanted, ["key"], f"{CALLER}.keys")
        return torch.tensor(np.asarray([rows[entry]["key"] for entry in wanted], dtype=np.float32))

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
            FingerprintMismatch: the bank was made by something else.
        """
        require_match(self.fingerprint, bank.fingerprint, f"{CALLER}.add_bank")
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


def _hidden(ids: np.ndarray | None, groups: np.ndarray | None, row: int) -> tuple[set[int], set[int]]:
    own = set() if ids is None else {each for each in ids[row].tolist() if each >= 0}
    return own, set() if groups is None else {each for each in groups[row].tolist() if each >= 0}


def _joined(allowed: str, ids: set[int], groups: set[int]) -> str:
    parts = [f"{name} not in {sorted(hidden)}" for name, hidden in (("id", ids), ("group", groups)) if hidden]
    return " and ".join([*([f"({allowed})"] if allowed else []), *parts])


def _note(row: Mapping[str, Any]) -> dict[str, Any]:
    note = row["note"]
    return note if isinstance(note, dict) else decode_note(note if isinstance(note, bytes) else str(note).encode())
