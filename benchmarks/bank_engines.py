"""Try engines that could hold a bank beyond one machine: values in the same call, exclusions, speed, size on disk.

Each engine that is installed holds the same entries (keys of width 1152, values of 32 x 96 numbers) in its embedded
form and answers the same 16 queries, each with ids and a group of its own to leave out, values included. What a call
cannot do at once is done by asking for more and dropping it here, and said so. Recall is against a full sort with the
exclusions applied. ``pip install pymilvus milvus-lite qdrant-client lancedb chromadb duckdb`` brings all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tinyalign.memory import MemoryBank, MilvusMemoryBank

WIDTH, SHAPE, K, QUERIES = 1152, (32, 96), 5, 16
SIZE = SHAPE[0] * SHAPE[1]
PART = 500


class Data(NamedTuple):
    keys: np.ndarray  # (M, WIDTH) float32, unit length
    values: np.ndarray  # (M, SIZE) float16
    groups: np.ndarray
    queries: np.ndarray
    hidden_ids: np.ndarray  # (QUERIES, 4)
    hidden_groups: np.ndarray  # (QUERIES, 1)


Answer = tuple[np.ndarray, np.ndarray]  # ids (B, K), values (B, K, SIZE)
Engine = Callable[[Data, Path], Callable[[], Answer]]


def parts(data: Data) -> list[slice]:
    return [slice(at, min(at + PART, len(data.keys))) for at in range(0, len(data.keys), PART)]


def first_allowed(data: Data, row: int, hits: list[tuple[int, int, Any]]) -> list[tuple[int, Any]]:
    """Drop what a query must not see from (id, group, value), best first."""
    own, groups = set(data.hidden_ids[row].tolist()), set(data.hidden_groups[row].tolist())
    return [(entry, value) for entry, group, value in hits if entry not in own and group not in groups][:K]


def answer(found: list[list[tuple[int, Any]]]) -> Answer:
    ids = np.array([[entry for entry, _ in row] for row in found])
    return ids, np.array([[value for _, value in row] for row in found], dtype=np.float32)


def files(data: Data, folder: Path) -> Callable[[], Answer]:
    bank = MemoryBank(WIDTH, SHAPE)
    values = torch.from_numpy(data.values).reshape(-1, *SHAPE)
    bank.add(torch.from_numpy(data.keys), values, groups=data.groups)
    bank.save(folder / "bank")
    return over_contract(bank, data)


def milvus(data: Data, folder: Path) -> Callable[[], Answer]:
    bank = MilvusMemoryBank(str(folder / "bank.db"), WIDTH, SHAPE)
    values = torch.from_numpy(data.values).reshape(-1, *SHAPE)
    for part in parts(data):
        bank.add(torch.from_numpy(data.keys[part]), values[part], range(part.start, part.stop), data.groups[part])
    bank.commit()
    return over_contract(bank, data)


def over_contract(bank: Any, data: Data) -> Callable[[], Answer]:
    queries, ids, groups = (torch.from_numpy(each) for each in (data.queries, data.hidden_ids, data.hidden_groups))

    def ask() -> Answer:
        hits = bank.search(queries, K, exclude_ids=ids, exclude_groups=groups)
        return hits.ids.numpy(), hits.values.flatten(2).float().numpy()

    return ask


def qdrant(data: Data, folder: Path) -> Callable[[], Answer]:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(folder / "qdrant"))
    sizes = {
        "key": models.VectorParams(size=WIDTH, distance=models.Distance.COSINE),
        "value": models.VectorParams(size=SIZE, distance=models.Distance.DOT, datatype=models.Datatype.FLOAT16),
    }
    client.create_collection("bank", vectors_config=sizes)
    for part in parts(data):
        client.upsert(
            "bank",
            [
                models.PointStruct(
                    id=n, vector={"key": data.keys[n].tolist(), "value": data.values[n].astype("f4").tolist()},
                    payload={"group": int(data.groups[n])},
                )
                for n in range(part.start, part.stop)
            ],
        )  # fmt: skip
    requests = [
        models.QueryRequest(
            query=data.queries[row].tolist(), using="key", limit=K, with_vector=["value"],
            filter=models.Filter(must_not=[
                models.HasIdCondition(has_id=data.hidden_ids[row].tolist()),
                models.FieldCondition(key="group", match=models.MatchAny(any=data.hidden_groups[row].tolist())),
            ]),
        )
        for row in range(QUERIES)
    ]  # fmt: skip

    def ask() -> Answer:
        found = client.query_batch_points("bank", requests)
        return answer([[(int(hit.id), hit.vector["value"]) for hit in row.points] for row in found])

    return ask


def lance(data: Data, folder: Path) -> Callable[[], Answer]:
    import lancedb
    import pyarrow as pa

    def table(part: slice) -> pa.Table:
        keys = pa.FixedSizeListArray.from_arrays(pa.array(data.keys[part].reshape(-1)), WIDTH)
        values = pa.FixedSizeListArray.from_arrays(pa.array(data.values[part].reshape(-1)), SIZE)
        ids = pa.array(range(part.start, part.stop))
        return pa.table({"id": ids, "group": pa.array(data.groups[part]), "key": keys, "value": values})

    database = lancedb.connect(str(folder / "lance"))
    store = database.create_table("bank", table(parts(data)[0]))
    for part in parts(data)[1:]:
        store.add(table(part))

    def ask() -> Answer:
        found = []
        for row in range(QUERIES):  # one filter per call
            listed = ", ".join(map(str, data.hidden_ids[row].tolist()))
            groups = ", ".join(map(str, data.hidden_groups[row].tolist()))
            query = store.search(data.queries[row], vector_column_name="key").distance_type("cosine")
            query = query.where(f"id not in ({listed}) and `group` not in ({groups})", prefilter=True).limit(K)
            hits = query.select(["id", "value", "_distance"]).to_arrow()
            found.append(list(zip(hits["id"].to_pylist(), hits["value"].to_pylist(), strict=True)))
        return answer(found)

    return ask


def chroma(data: Data, folder: Path) -> Callable[[], Answer]:
    import chromadb

    client = chromadb.PersistentClient(str(folder / "chroma"), chromadb.config.Settings(anonymized_telemetry=False))
    store = client.create_collection("bank", configuration={"hnsw": {"space": "cosine", "ef_search": 200}})
    for part in parts(data):
        store.add(
            ids=[str(n) for n in range(part.start, part.stop)],
            embeddings=data.keys[part],
            metadatas=[{"group": int(group)} for group in data.groups[part]],
            documents=[value.tobytes().hex() for value in data.values[part]],  # one vector per entry: values as text
        )

    def ask() -> Answer:
        more = K + data.hidden_ids.shape[1] + 8
        hits = store.query(query_embeddings=data.queries, n_results=more, include=["documents", "metadatas"])
        found = []
        for row in range(QUERIES):
            listed = zip(hits["ids"][row], hits["metadatas"][row], hits["documents"][row], strict=True)
            allowed = first_allowed(data, row, [(int(entry), note["group"], text) for entry, note, text in listed])
            found.append([(entry, np.frombuffer(bytes.fromhex(text), np.float16)) for entry, text in allowed])
        return answer(found)

    return ask


def duck(data: Data, folder: Path) -> Callable[[], Answer]:
    import duckdb
    import pyarrow as pa

    base = duckdb.connect(str(folder / "bank.duckdb"))
    base.execute(f"create table bank (id bigint, grp bigint, key float[{WIDTH}], value float[{SIZE}])")
    for part in parts(data):
        keys = pa.FixedSizeListArray.from_arrays(pa.array(data.keys[part].reshape(-1)), WIDTH)
        values = pa.FixedSizeListArray.from_arrays(pa.array(data.values[part].astype("f4").reshape(-1)), SIZE)
        rows = pa.table(
            [pa.array(range(part.start, part.stop)), pa.array(data.groups[part]), keys, values], list("abcd")
        )
        base.register("rows", rows)
        base.execute("insert into bank select * from rows")
    order = f"order by array_inner_product(key, ?::float[{WIDTH}]) desc limit {K}"
    text = f"select id, value from bank where not list_contains(?, id) and not list_contains(?, grp) {order}"

    def ask() -> Answer:
        lists = [(data.hidden_ids[row].tolist(), data.hidden_groups[row].tolist()) for row in range(QUERIES)]
        return answer(
            [base.execute(text, [*lists[row], data.queries[row].tolist()]).fetchall() for row in range(QUERIES)]
        )

    return ask


# name -> module it needs, how it is filled and asked, exclusions per query, how it goes beyond one machine
ENGINES: dict[str, tuple[str, Engine, str, str]] = {
    "MemoryBank": ("tinyalign", files, "in the scores", "no"),
    "Milvus (milvus-lite)": ("milvus_lite", milvus, "over-fetch, else filter", "cluster"),
    "Qdrant (local mode)": ("qdrant_client", qdrant, "filter per query", "cluster"),
    "LanceDB": ("lancedb", lance, "filter, call per query", "object store"),
    "Chroma": ("chromadb", chroma, "over-fetch", "server"),
    "DuckDB": ("duckdb", duck, "filter, call per query", "no"),
}


def made(entries: int) -> tuple[Data, np.ndarray]:
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((max(entries // 100, 4), WIDTH), dtype=np.float32)
    keys = centers[draw.integers(len(centers), size=entries)] + 0.7 * draw.standard_normal((entries, WIDTH), dtype="f4")
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    own = draw.choice(entries, QUERIES, replace=False)
    queries = keys[own] + 0.01 * draw.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    groups = np.arange(entries) // 3
    near = np.argsort(-(queries @ keys.T), axis=1)
    data = Data(
        keys,
        draw.standard_normal((entries, SIZE)).astype(np.float16),
        groups,
        queries,
        near[:, :4],
        groups[own][:, None],
    )
    scores = queries.astype(np.float64) @ keys.T.astype(np.float64)
    for row in range(QUERIES):
        scores[row, data.hidden_ids[row]] = -np.inf
        scores[row, np.isin(groups, data.hidden_groups[row])] = -np.inf
    return data, np.argsort(-scores, axis=1)[:, :K]


def tried(engine: Engine, data: Data, expected: np.ndarray, folder: Path) -> list[str]:
    begin = time.perf_counter()
    ask = engine(data, folder)
    filled = time.perf_counter() - begin
    ids, values = ask()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        ask()
        times.append(time.perf_counter() - begin)
    recall = np.mean([len(set(got.tolist()) & set(best.tolist())) / K for got, best in zip(ids, expected, strict=True)])
    exact = bool((values == data.values[ids].astype(np.float32)).all())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [f"{filled:.1f}", f"{min(times) * 1e3:.0f}", f"{size / 1e6:.0f}", f"{recall:.3f}", "yes" if exact else "no"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=3000)
    options = parser.parse_args()
    os.environ["ANONYMIZED_TELEMETRY"] = "False"
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data, expected = made(options.entries)
    print(
        f"{options.entries} entries, keys {WIDTH}, values {SHAPE}; {QUERIES} queries, k = {K}, values in the answer\n"
    )
    columns = [
        "fill, s",
        "16 queries, ms",
        "MB on disk",
        f"recall@{K}",
        "values equal",
        "exclusions",
        "beyond one machine",
    ]
    print("| " + " | ".join(["engine, embedded", *columns]) + " |\n|" + " --- |" * (1 + len(columns)))
    for name, (module, engine, exclusions, beyond) in ENGINES.items():
        if importlib.util.find_spec(module) is None:
            print(f"| {name} | not installed |" + " |" * (len(columns) - 1))
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            cells = tried(engine, data, expected, folder)
        except Exception as error:  # noqa: BLE001 (one engine's failure is a result, too)
            cells = [f"failed: {type(error).__name__}: {error}"[:80].replace("\n", " "), *[""] * 4]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print("| " + " | ".join([name, *cells, exclusions, beyond]) + " |", flush=True)


if __name__ == "__main__":
    main()
