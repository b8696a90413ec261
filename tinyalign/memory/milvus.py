"""A memory bank in Milvus: a file on this machine, a server, or a cluster, behind the same calls."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory import inputs
from tinyalign.memory.bank import MemoryBank
from tinyalign.memory.contents import BankSpec, Contents
from tinyalign.memory.errors import BankError, UnknownIdError
from tinyalign.memory.exclusion import padded_ids
from tinyalign.memory.fingerprint import Fingerprint, checked_fingerprint, require_match
from tinyalign.memory.retrieval import Hits, Neighbours
from tinyalign.memory.segment import decode_note

CALLER = "MilvusMemoryBank"
FORMAT = "tinyalign-milvus-bank"
PROPERTY = "tinyalign.bank"  # milvus-lite drops a collection's description, and keeps its properties
ROWS_AT_ONCE = 512  # entries per insert or read: 3 MB of values of the paper's size
MOST_RESULTS = 16_384  # Milvus's own limit on one search
SPARE = 16


class MilvusMemoryBank:
    """The contract of ``MemoryBank`` over a Milvus collection, for banks beyond one machine.

    Keys are a vector field, values another (float16 on a server, float32 in milvus-lite, which has no other); ids,
    groups and metadata are scalar fields. A query's exclusions are met by asking for more neighbours and, where too few
    remain, by a filter of its own. Changes are durable at once or with ``commit``, as the server has it configured.

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
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise ImportError(f"{CALLER}: pymilvus must be installed. Install tinyalign-vlm[milvus].") from error
        self.collection = collection
        self._embedded = str(uri).endswith(".db")
        self._client: Any = MilvusClient(uri=str(uri), token=token)
        if not self._client.has_collection(collection):
            if key_dim is None or value_shape is None:
                raise BankError(
                    f"{CALLER}: collection must exist, or key_dim and value_shape be given, got {collection!r} in "
                    f"{uri!r}. Give the sizes to create it."
                )
            shape = tuple(int(size) for size in value_shape)
            BankSpec(int(key_dim), shape, metric, torch.float32, torch.float16)  # its checks
            facts = {
                "format": FORMAT,
                "version": 1,
                "metric": metric,
                "key_dim": int(key_dim),
                "value_shape": list(shape),
                "fingerprint": checked_fingerprint(fingerprint, CALLER),
            }
            self._create(facts, dict(index or {"index_type": "FLAT"}))
        self._read_facts(key_dim, value_shape)
        self._client.load_collection(collection)

    def _create(self, facts: dict[str, Any], index: dict[str, Any]) -> None:
        from pymilvus import DataType

        def create(value_type: Any) -> None:
            schema = self._client.create_schema(
                auto_id=False, enable_dynamic_field=False, description=json.dumps(facts, sort_keys=True)
            )
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("group", DataType.INT64)
            schema.add_field("key", DataType.FLOAT_VECTOR, dim=facts["key_dim"])
            schema.add_field("value", value_type, dim=math.prod(facts["value_shape"]))
            schema.add_field("note", DataType.VARCHAR, max_length=65_535)
            indexes = self._client.prepare_index_params()
            indexes.add_index("key", metric_type="IP", **index)
            indexes.add_index("value", metric_type="IP", index_type="FLAT")  # Milvus wants one on every vector field
            kept = {PROPERTY: json.dumps(facts, sort_keys=True)} if self._embedded else None
            self._client.create_collection(self.collection, schema=schema, index_params=indexes, properties=kept)

        if self._embedded:  # milvus-lite has no 16-bit vectors
            create(DataType.FLOAT_VECTOR)
        else:
            create(DataType.FLOAT16_VECTOR)

    def _read_facts(self, key_dim: int | None, value_shape: Sequence[int] | None) -> None:
        from pymilvus import DataType

        found = self._client.describe_collection(self.collection)
        try:
            facts = json.loads(found["description"] or found["properties"][PROPERTY])
            known = facts["format"] == FORMAT
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise BankError(
                f"{CALLER}: collection must be a memory bank, got {self.collection!r}. Choose another name."
            )
        shape = tuple(facts["value_shape"])
        asked = (facts["key_dim"] if key_dim is None else key_dim, shape if value_shape is None else tuple(value_shape))
        if asked != (facts["key_dim"], shape):
            raise BankError(
                f"{CALLER}: sizes must be those of {self.collection!r}, {(facts['key_dim'], shape)}, got {asked}. "
                "Leave them out, or choose another collection."
            )
        self._spec = BankSpec(facts["key_dim"], shape, facts["metric"], torch.float32, torch.float16)
        self._checks = Contents(self._spec)  # holds no entries; prepares keys and queries as a bank does
        self.fingerprint: Fingerprint = checked_fingerprint(facts["fingerprint"], CALLER)
        types = {field["name"]: field["type"] for field in found["fields"]}
        self._half = types["value"] == DataType.FLOAT16_VECTOR

    key_dim = property(lambda self: self._spec.key_dim, doc="Width of keys and queries.")
    value_shape = property(lambda self: self._spec.value_shape, doc="Shape of one value.")
    metric = property(lambda self: self._spec.metric, doc="``cosine`` or ``ip``.")

    def __len__(self) -> int:
        rows = self._query("", ["count(*)"])
        return int(rows[0]["count(*)"])

    def __contains__(self, entry_id: object) -> bool:
        if isinstance(entry_id, bool) or not isinstance(entry_id, (int, np.integer)):
            return False
        return bool(self._rows([int(entry_id)], ["id"]))

    def _query(self, expression: str, fields: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._client.query(
            self.collection, filter=expression, output_fields=fields, consistency_level="Strong"
        )
        return found

    def _rows(self, ids: Sequence[int], fields: list[str]) -> dict[int, dict[str, Any]]:
        found = {}
        for at in range(0, len(ids), ROWS_AT_ONCE):
            for row in self._query(f"id in {list(ids[at : at + ROWS_AT_ONCE])}", ["id", *fields]):
                found[int(row["id"])] = row
        return found

    def _all(self, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
        cursor = self._client.query_iterator(self.collection, ROWS_AT_ONCE, filter="id >= 0", output_fields=fields)
        while batch := cursor.next():
            yield batch
        cursor.close()

    @property
    def ids(self) -> Tensor:
        """Ids of all entries, ascending."""
        return torch.tensor(sorted(int(row["id"]) for batch in self._all(["id"]) for row in batch), dtype=torch.int64)

    @property
    def groups(self) -> Tensor:
        """Groups of all entries, in the order of ``ids``."""
        pairs = sorted((int(row["id"]), int(row["group"])) for batch in self._all(["id", "group"]) for row in batch)
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
        if ids is None and keys.shape[0]:
            staged.next_id = int(self.ids.max()) + 1 if len(self) else 0
        added = staged.append(keys, values, ids, groups, metadata, where)
        known = self._rows(added.tolist(), ["id"])
        if known:
            raise ValueError(
                f"{where}: ids must be new, got {min(known)} which the bank holds. Remove that entry first."
            )
        for at in range(0, len(added), ROWS_AT_ONCE):
            rows = torch.arange(at, min(at + ROWS_AT_ONCE, len(added)))
            columns = staged.table.columns_at(rows)
            stored = columns.values if self._half else columns.values.float()
            entries = zip(rows.tolist(), columns.keys.numpy(), stored.numpy(), strict=True)
            self._client.insert(
                self.collection,
                [
                    {
                        "id": int(columns.ids[row - at]),
                        "group": int(columns.groups[row - at]),
                        "key": key,
                        "value": value,
                        "note": staged.table.note(row).decode(),
                    }
                    for row, key, value in entries
                ],
            )
        return added

    def remove(self, ids: Sequence[int] | Tensor) -> int:
        """Remove entries by id; an id that the bank lacks is an error, and nothing changes."""
        wanted = np.unique(inputs.query_ids(ids, f"{CALLER}.remove").reshape(-1)).tolist()
        self._found(wanted, ["id"], f"{CALLER}.remove")
        for at in range(0, len(wanted), ROWS_AT_ONCE):
            self._client.delete(self.collection, ids=wanted[at : at + ROWS_AT_ONCE])
        return len(wanted)

    def _found(self, ids: Sequence[int], fields: list[str], where: str) -> dict[int, dict[str, Any]]:
        rows = self._rows(ids, fields)
        missing = [entry for entry in ids if entry not in rows]
        if missing:
            raise UnknownIdError(f"{where}: ids must be in the bank, got {missing[0]}. Ask `id in bank` first.")
        return rows

    def search(
        self,
        queries: Tensor,
        k: int = 5,
        *,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Hits:
        """Return the k best entries of each query and their values, as ``MemoryBank.search`` does."""
        found = self.neighbours(
            queries, k, exclude_ids=exclude_ids, exclude_groups=exclude_groups, fingerprint=fingerprint
        )
        values, _ = self.gather(found.ids)
        return Hits(found.scores, found.ids, values, found.mask)

    def neighbours(
        self,
        queries: Tensor,
        k: int = 5,
        *,
        exclude_ids: Any = None,
        exclude_groups: Any = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Neighbours:
        """Return what ``search`` returns, without values."""
        where = f"{CALLER}.search"
        if fingerprint is not None:
            require_match(self.fingerprint, fingerprint, where, "key.")
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= MOST_RESULTS:
            raise ValueError(f"{where}: k must be an integer from 0 to {MOST_RESULTS}, got {k!r}. Ask for that many.")
        checked = inputs.float_rows(queries, (self.key_dim,), where, "queries")
        if not len(self):
            raise BankError(f"{where}: the bank must hold entries, got 0. Add some first.")
        checked = self._checks.searchable(checked, where, "queries").to(torch.float32)
        count = checked.shape[0]
        ids = padded_ids(exclude_ids, count, where, "exclude_ids")
        groups = padded_ids(exclude_groups, count, where, "exclude_groups")
        scores, hits = torch.zeros(count, k), torch.full((count, k), -1)
        if count and k:
            hidden = [_hidden(ids, groups, row) for row in range(count)]
            extra = max(len(own) + SPARE * bool(group) for own, group in hidden)
            limit = min(k + extra, MOST_RESULTS)
            for row, found in enumerate(self._ask(checked, limit, "")):
                own, group = hidden[row]
                kept = [hit for hit in found if hit[0] not in own and hit[1] not in group][:k]
                if len(kept) < k and len(found) == limit:
                    kept = next(iter(self._ask(checked[row : row + 1], k, _filter(own, group))))
                for place, (entry, _, score) in enumerate(kept):
                    hits[row, place], scores[row, place] = entry, score
        device = queries.device
        return Neighbours(scores.to(device), hits.to(device), (hits >= 0).to(device))

    def _ask(self, queries: Tensor, limit: int, expression: str) -> Iterator[list[tuple[int, int, float]]]:
        found = self._client.search(
            self.collection,
            data=list(queries.numpy()),
            anns_field="key",
            limit=limit,
            filter=expression,
            output_fields=["id", "group"],
            consistency_level="Strong",
        )
        for row in found:
            yield [(int(hit["id"]), int(hit["entity"]["group"]), float(hit["distance"])) for hit in row]

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return values of ids of any shape and a mask, False (values zero) where the id is -1."""
        wanted = inputs.query_ids(ids, f"{CALLER}.gather")
        asked = np.unique(wanted[wanted != -1]).tolist()
        rows = self._found(asked, ["value"], f"{CALLER}.gather")
        values = torch.zeros(wanted.size, self._spec.value_size, dtype=torch.float16)
        for place, entry in enumerate(wanted.reshape(-1).tolist()):
            if entry != -1:
                values[place] = self._value(rows[entry])
        mask = torch.from_numpy(wanted != -1)
        return values.reshape(*wanted.shape, *self.value_shape).to(ids.device), mask.to(ids.device)

    def _value(self, row: dict[str, Any]) -> Tensor:
        value = row["value"]
        value = value[0] if isinstance(value, list) and isinstance(value[0], bytes) else value
        if isinstance(value, bytes):
            return torch.frombuffer(bytearray(value), dtype=torch.float16)
        return torch.as_tensor(np.asarray(value, dtype=np.float32)).to(torch.float16)

    def keys(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Return stored keys (n, D) as float32."""
        wanted = inputs.query_ids(ids, f"{CALLER}.keys").reshape(-1).tolist()
        rows = self._found(wanted, ["key"], f"{CALLER}.keys")
        return torch.tensor(np.asarray([rows[entry]["key"] for entry in wanted], dtype=np.float32))

    def metadata(self, ids: Sequence[int] | Tensor) -> list[dict[str, Any]]:
        """Return the metadata of entries, an empty dict where they have none."""
        wanted = inputs.query_ids(ids, f"{CALLER}.metadata").reshape(-1).tolist()
        rows = self._found(wanted, ["note"], f"{CALLER}.metadata")
        return [decode_note(rows[entry]["note"].encode()) for entry in wanted]

    def commit(self) -> None:
        """Ask the server to write out what it holds in memory."""
        self._client.flush(self.collection)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

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


def _filter(ids: set[int], groups: set[int]) -> str:
    parts = [f"{name} not in {sorted(hidden)}" for name, hidden in (("id", ids), ("group", groups)) if hidden]
    return " and ".join(parts)
