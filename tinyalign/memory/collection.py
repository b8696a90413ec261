"""A Milvus collection laid out for a memory bank: what it holds, and rows in and out of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.contents import BankSpec
from tinyalign.memory.errors import BankError, UnknownIdError
from tinyalign.memory.fingerprint import Fingerprint, checked_fingerprint

FORMAT = "tinyalign-milvus-bank"
VERSION = 2
PROPERTY = "tinyalign.bank"  # milvus-lite drops a collection's description, and keeps its properties
ROWS_AT_ONCE = 512  # entries per insert or read: 3 MB of values of the paper's size
CALLER = "MilvusMemoryBank"


class Collection:
    """A collection ``id``, ``group``, ``key``, ``value``, ``note`` (JSON), and the facts of the bank it belongs to.

    Args:
        uri: a path ending in ``.db`` (embedded milvus-lite), or the address of a server.
        name: of the collection.
        token: of the server.
    """

    def __init__(self, uri: str, name: str, token: str) -> None:
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise ImportError(
                f"{CALLER}: pymilvus must be installed, got an import error. Install tinyalign-vlm[milvus]."
            ) from error
        self.name = name
        self.embedded = str(uri).endswith(".db")
        self.client: Any = MilvusClient(uri=str(uri), token=token)
        self.half = False

    def exists(self) -> bool:
        """Say whether the collection is there."""
        return bool(self.client.has_collection(self.name))

    def create(self, spec: BankSpec, fingerprint: Fingerprint, index: Mapping[str, Any]) -> None:
        """Make it, empty, for keys and values of these sizes."""
        from pymilvus import DataType

        facts = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "metric": spec.metric,
                "key_dim": spec.key_dim,
                "value_shape": list(spec.value_shape),
                "fingerprint": fingerprint,
            },
            sort_keys=True,
        )
        # milvus-lite has no 16-bit vectors
        value_type = DataType.FLOAT_VECTOR if self.embedded else DataType.FLOAT16_VECTOR
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False, description=facts)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("group", DataType.INT64)
        schema.add_field("key", DataType.FLOAT_VECTOR, dim=spec.key_dim)
        schema.add_field("value", value_type, dim=math.prod(spec.value_shape))
        schema.add_field("note", DataType.JSON)
        indexes = self.client.prepare_index_params()
        indexes.add_index("key", metric_type="IP", **index)
        indexes.add_index("value", metric_type="IP", index_type="FLAT")  # Milvus wants one on every vector field
        kept = {PROPERTY: facts} if self.embedded else None
        self.client.create_collection(self.name, schema=schema, index_params=indexes, properties=kept)

    def open(self) -> tuple[BankSpec, Fingerprint]:
        """Load the collection for searching and return what its bank was made with."""
        from pymilvus import DataType

        found = self.client.describe_collection(self.name)
        try:
            facts = json.loads(found["description"] or found["properties"][PROPERTY])
            known = facts["format"] == FORMAT
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise BankError(f"{CALLER}: collection must be a memory bank, got {self.name!r}. Choose another name.")
        if facts["version"] != VERSION:
            raise BankError(
                f"{CALLER}: collection must have format version {VERSION}, got {facts['version']!r}. "
                "Copy it with to_bank() of the release that wrote it."
            )
        types = {field["name"]: field["type"] for field in found["fields"]}
        self.half = types["value"] == DataType.FLOAT16_VECTOR
        spec = BankSpec(facts["key_dim"], tuple(facts["value_shape"]), facts["metric"], torch.float32, torch.float16)
        self.client.load_collection(self.name)
        return spec, checked_fingerprint(facts["fingerprint"], CALLER)

    def query(self, expression: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        """Return fields of the entries that an expression accepts."""
        found: list[dict[str, Any]] = self.client.query(
            self.name, filter=expression, output_fields=list(fields), consistency_level="Strong"
        )
        return found

    def count(self) -> int:
        """Return how many entries there are."""
        return int(self.query("", ["count(*)"])[0]["count(*)"])

    def present(self, ids: Sequence[int], fields: Sequence[str] = ()) -> dict[int, dict[str, Any]]:
        """Return fields of those of some ids that are there."""
        found = {}
        for at in range(0, len(ids), ROWS_AT_ONCE):
            for row in self.query(f"id in {list(ids[at : at + ROWS_AT_ONCE])}", ["id", *fields]):
                found[int(row["id"])] = row
        return found

    def rows(self, ids: Sequence[int], fields: Sequence[str], where: str) -> dict[int, dict[str, Any]]:
        """Return fields of some ids, all of which must be there."""
        rows = self.present(ids, fields)
        missing = [entry for entry in ids if entry not in rows]
        if missing:
            raise UnknownIdError(f"{where}: ids must be in the bank, got {missing[0]}. Ask `id in bank` first.")
        return rows

    def all(self, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield fields of every entry, in no order."""
        cursor = self.client.query_iterator(self.name, ROWS_AT_ONCE, filter="id >= 0", output_fields=list(fields))
        while batch := cursor.next():
            yield from batch
        cursor.close()

    def search(
        self, queries: Tensor, limit: int, expression: str, fields: Sequence[str], most: float | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield the best entries of each query: ``id``, ``distance`` and ``entity``, none scored above ``most``."""
        bounds = {} if most is None else {"params": {"radius": -3.0e38, "range_filter": most}}
        found = self.client.search(
            self.name,
            data=list(queries.numpy()),
            anns_field="key",
            limit=limit,
            filter=expression,
            output_fields=list(fields),
            search_params=bounds,
            consistency_level="Strong",
        )
        yield from found

    def value(self, row: Mapping[str, Any]) -> Tensor:
        """Return the value of a row, (V,) float16."""
        value = row["value"]
        value = value[0] if isinstance(value, list) and isinstance(value[0], bytes) else value
        if isinstance(value, bytes):
            return torch.frombuffer(bytearray(value), dtype=torch.float16)
        return torch.as_tensor(np.asarray(value, dtype=np.float32)).to(torch.float16)
