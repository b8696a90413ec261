"""Measure the memory bank against faiss, torch, a naive loop and the machine's limits, all in one run.

Prints CPU milliseconds of one thread and ratios to the reference of each table; absolute numbers drift with the
machine, ratios much less. ``--entries 5000`` is a quick look, ``--only gather`` one part of it; ``--no-hnsw`` leaves
out the graph, which takes its time to build. Milvus is measured where pymilvus and milvus-lite are installed, a GPU
where there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyalign.memory import MemoryBank
from tinyalign.memory.certified import int8_pays

WIDTH, SHAPE, K = 1152, (32, 96), 5
BATCHES = (1, 16, 256)
TIE = 1e-5  # what rounding a unit key to fp16 moves a score by


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Least CPU time of some runs after one to warm up."""
    run()
    best = math.inf
    for _ in range(repeats):
        begin = time.process_time()
        run()
        best = min(best, time.process_time() - begin)
    return best * 1e3


def each(run: Callable[[Tensor], Any], inputs: list[Tensor]) -> None:
    for one in inputs:
        run(one)


def line(name: str, *cells: object) -> None:
    print(f"  {name:<44}" + "".join(f"{cell!s:>14}" for cell in cells))


def clustered(count: int, seed: int) -> Tensor:
    """Unit keys in 1,000 clusters: within one, cosines are about 0.67."""
    centers = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(1000, (count,), generator=generator)
    return F.normalize(centers[which] + 0.7 * torch.randn(count, WIDTH, generator=generator), dim=-1)


def search(keys: Tensor, bank: MemoryBank, hnsw: bool) -> None:
    print(f"\nSearch, {len(keys)} keys of width {WIDTH}, k = {K}: CPU ms, ratio to torch in parentheses, recall@{K}")
    line("", *(f"batch {batch}" for batch in BATCHES), "recall", f"within {TIE:g}")
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(keys.numpy())
    threshold = faiss.cvar.distance_compute_blas_threshold

    def faiss_flat(queries: Tensor, least: int) -> Any:
        faiss.cvar.distance_compute_blas_threshold = least
        try:
            return flat.search(queries.numpy(), K)
        finally:
            faiss.cvar.distance_compute_blas_threshold = threshold

    methods: dict[str, Callable[[Tensor], Any]] = {
        "torch product and top-k, fp32": lambda q: (q @ keys.T).topk(K).indices,
        "faiss flat, as it comes": lambda q: faiss_flat(q, threshold)[1],
        "faiss flat, BLAS at every size": lambda q: faiss_flat(q, 1)[1],
        "numpy product and argpartition": lambda q: np.argpartition(q.numpy() @ keys.numpy().T, -K, axis=1)[:, -K:],
        "MemoryBank exact, fp16 keys": lambda q: bank.neighbours(q, K).ids,
        "MemoryBank exact, 16 ids excluded": lambda q: bank.neighbours(q, K, exclude_ids=hidden[: len(q)]).ids,
        "MemoryBank exact, 16 ids and groups": lambda q: (
            bank.neighbours(q, K, exclude_ids=hidden[: len(q)], exclude_groups=hidden[: len(q)]).ids
        ),
        "MemoryBank certified": lambda q: bank.neighbours(q, K, method="certified").ids,
        "torch, keys as int16 times a scale of their own": lambda q: (q @ rounded.T).topk(K).indices,
        "limit: the product alone": lambda q: q @ keys.T,
        "limit: read every fp32 byte": lambda _: keys.view(-1).sum(),
        "limit: read every fp16 byte": lambda _: (
            bank._contents.table.segments[0].columns.keys.view(torch.float32).sum()
        ),
    }
    scales = keys.abs().amax(1, keepdim=True) / 32767
    rounded = (keys / scales).round_().mul_(scales)
    hidden = torch.randint(len(keys), (max(BATCHES), 16), generator=torch.Generator().manual_seed(3)) + 10 * len(keys)
    factories = [("IVF1024,Flat", {"nprobe": 64}), ("IVF256,RaBitQ", {"nprobe": 64})]
    factories += [("HNSW32", {"efSearch": 200})] if hnsw else []
    queries = {batch: clustered(batch, seed=batch) for batch in BATCHES}
    exact = {batch: (q.double() @ keys.double().T).topk(K) for batch, q in queries.items()}
    repeats = {1: 15, 16: 7, 256: 2}

    def row(name: str, run: Callable[[Tensor], Any], reference: dict[int, float]) -> dict[int, float]:
        spent = {batch: milliseconds(partial(run, queries[batch]), repeats[batch]) for batch in BATCHES}
        found = [torch.as_tensor(run(queries[batch])) for batch in BATCHES] if not name.startswith("limit") else []
        hits = near = 0
        for batch, ids in zip(BATCHES, found, strict=False):
            hits += int((ids[:, :, None] == exact[batch].indices[:, None]).any(-1).sum())
            scores = (keys[ids].double() * queries[batch][:, None].double()).sum(-1)
            near += int((scores > exact[batch].values[:, -1:] - TIE).sum())
        recall = [f"{count / (K * sum(BATCHES)):.4f}" for count in (hits, near)] if found else ["-", "-"]
        base = reference or spent
        line(name, *(f"{spent[b]:.1f} ({spent[b] / base[b]:.2f})" for b in BATCHES), *recall)
        return spent

    reference: dict[int, float] = {}
    for name, run in methods.items():
        spent = row(name, run, reference)
        reference = reference or spent
    for factory, parameters in factories:
        begin = time.perf_counter()
        bank.build_index(factory, candidates=100, parameters=parameters)
        seconds = time.perf_counter() - begin
        row(
            f"{factory} {parameters}, {seconds:.0f} s",
            lambda q: bank.neighbours(q, K, method="approximate").ids,
            reference,
        )
    print(f"  certified is searched in int8 here: {int8_pays()} (otherwise exactly, by floats)")
    print(f"  keys at rest: {bank.keys().numel() * 2 / 1e6:.0f} MB; faiss flat: {bank.keys().numel() * 4 / 1e6:.0f} MB")


def random_values(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for begin in range(0, count, 4096):
        yield torch.randn(min(4096, count - begin), *SHAPE, generator=generator)


def read_bytes() -> int:
    """Bytes this process has made the disk deliver (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(each.split()[1]) for each in lines if each.startswith("read_bytes"))


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*.bin"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def in_one_piece(table: Tensor, room: Tensor, at: Tensor) -> Tensor:
    return room.copy_(table[int(at) : int(at) + len(room)])


def gather(folder: Path, count: int) -> None:
    row_bytes = 2 * math.prod(SHAPE)
    print(f"\nGather, {count} values of {row_bytes} bytes (fp16), {K} random ones per query")
    generator = torch.Generator().manual_seed(2)
    if Path("/proc/self/io").exists():
        for batch in (16, 256):
            drop_cache(folder)
            bank = MemoryBank.load(folder)
            ids = torch.randint(count, (batch, K), generator=generator)
            before, begin = read_bytes(), time.perf_counter()
            bank.gather(ids)
            spent, payload = (time.perf_counter() - begin) * 1e3, batch * K * row_bytes
            line(f"cold, batch {batch}", f"{spent:.1f} ms", f"{(read_bytes() - before) / payload:.2f}x payload")
            del bank
    if hasattr(os, "posix_fadvise"):
        drop_cache(folder)  # what was read page by page stays in small pages
    for path in folder.rglob("values.bin"):
        path.read_bytes()
    bank = MemoryBank.load(folder)
    loaded = bank.gather(bank.ids)[0].float()[:, None]
    raw = bank._contents.table.segments[0].columns.values

    def naive(ids: Tensor) -> Tensor:
        """As the paper's release does: values one by one by faiss's row numbers, joined per query, then per batch."""
        return torch.cat([torch.cat([loaded[row] for row in rows], dim=1) for rows in ids.numpy()]).half()

    for batch in (16, 256):
        draws = [torch.randint(count, (batch, K), generator=generator) for _ in range(20)]
        room = torch.empty(batch * K, raw.shape[1], dtype=raw.dtype)
        starts = [torch.randint(max(count - batch * K, 1), (), generator=generator) for _ in range(20)]
        runs: list[tuple[str, Callable[[Tensor], Any], list[Tensor]]] = [
            ("the release's loop over fp32, to fp16", naive, draws),
            ("MemoryBank, mapped", bank.gather, draws),
            ("limit: index_select of the rows", lambda ids: raw.index_select(0, ids.reshape(-1)), draws),
            ("limit: as many rows in one piece", partial(in_one_piece, raw, room), starts),
        ]
        loop = math.nan
        for name, run, inputs in runs:
            spent = milliseconds(partial(each, run, inputs), 3) / len(inputs)
            loop = spent if math.isnan(loop) else loop
            line(f"warm, batch {batch}: {name}", f"{spent:.3f} ms", f"{loop / spent:.1f}x less")


RANK = """
import sys, torch
from pathlib import Path
from tinyalign.memory import MemoryBank

def memory():
    # Anonymous memory of this process, and its share of the bank's files; libraries' pages come and go with others.
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            ours = sys.argv[1] in line
        elif first == "Anonymous:" or (first == "Pss:" and ours):
            total += int(line.split()[1]) * 1024
    return total

torch.set_num_threads(1)
torch.randn(256, 256) @ torch.randn(256, 256)
start = memory()
bank = MemoryBank.load(sys.argv[1])
for ids in bank.ids.split(128):
    bank.gather(ids)
bank.neighbours(torch.ones(1, bank.key_dim), 1)
print("read", flush=True)
input()
print(memory() - start, flush=True)
input()
"""


def shared_memory(folder: Path) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        return
    size = sum(path.stat().st_size for path in folder.rglob("*.bin"))
    print("\nMemory of two ranks that have both read every key and value, beside half the files")
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(folder)], **pipe) for _ in range(2)]  # type: ignore
    for rank in ranks:
        rank.stdout.readline()
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()
        line(
            "memory of its own and share of the files",
            f"{int(rank.stdout.readline()) / 1e6:.0f} MB",
            f"{size / 2e6:.0f} MB",
        )
    for rank in ranks:
        rank.communicate("\n")


def durability(folder: Path) -> None:
    print("\nLoading and verifying")
    begin = time.perf_counter()
    bank = MemoryBank.load(folder)
    line("load, mapped", f"{(time.perf_counter() - begin) * 1e3:.1f} ms")
    bank.verify()
    report = bank.verify()
    line("verify, cached files", f"{report.bytes / 1e9 / report.seconds:.1f} GB/s")
    if hasattr(os, "posix_fadvise"):
        drop_cache(folder)
        report = bank.verify()
        line("verify, from the disk", f"{report.bytes / 1e9 / report.seconds:.1f} GB/s")


def quantisation() -> None:
    print("\nValues in int8: error over the spread of the values (what tells entries apart), bytes per value")
    generator = torch.Generator().manual_seed(4)
    common, own = 10 * torch.randn(SHAPE, generator=generator), torch.randn(4000, *SHAPE, generator=generator)
    values = common + own  # a common part of ten times the spread, as latents have
    spread = (values - values.mean(0)).square().mean().sqrt()
    keys = torch.randn(4000, 8, generator=generator)
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        bank = MemoryBank(8, SHAPE, value_dtype=dtype)
        ids = bank.add(keys, values)
        error = (bank.gather(ids)[0].float() - values).square().mean().sqrt() / spread
        name = str(dtype).removeprefix("torch.") + (", a scale per entry" if dtype == torch.int8 else "")
        line(name, f"{error:.5f}", dtype.itemsize * math.prod(SHAPE))
    center = values.mean(0)
    scales = (values - center).abs().amax(0) / 127
    error = (((values - center) / scales).round() * scales + center - values).square().mean().sqrt() / spread
    line("int8, a scale per channel (for comparison)", f"{error:.5f}", math.prod(SHAPE))


def on_milvus(keys: Tensor, count: int = 2000) -> None:
    """The same contract over embedded Milvus, at a size it fills in seconds."""
    if not (importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite")):
        print("\nMilvus: pymilvus and milvus-lite are not installed")
        return
    from tinyalign.memory import MilvusMemoryBank

    count = min(count, len(keys))
    print(f"\nMilvus (embedded milvus-lite), {count} entries: wall ms per call, values included, beside MemoryBank")
    bank = MemoryBank(WIDTH, SHAPE)
    bank.add(keys[:count], torch.cat(list(random_values(count))))
    with tempfile.TemporaryDirectory() as name:
        remote = MilvusMemoryBank(str(Path(name) / "bank.db"), WIDTH, SHAPE)
        begin = time.perf_counter()
        remote.add_bank(bank)
        line("fill", f"{time.perf_counter() - begin:.1f} s")
        for batch in (1, 16):
            queries, cells = clustered(batch, seed=batch), []
            for each_bank in (remote, bank):
                for exclude in ({}, {"exclude_ids": torch.arange(batch)}):
                    each_bank.search(queries, K, **exclude)
                    begin = time.perf_counter()
                    each_bank.search(queries, K, **exclude)
                    cells.append((time.perf_counter() - begin) * 1e3)
            line(f"batch {batch}: Milvus, with exclusion", f"{cells[0]:.1f}", f"{cells[1]:.1f}")
            line(f"batch {batch}: MemoryBank, with exclusion", f"{cells[2]:.1f}", f"{cells[3]:.1f}")
        remote.close()


def on_cuda(bank: MemoryBank) -> None:
    """Search on the device, beside the product alone."""
    if not torch.cuda.is_available():
        print("\nCUDA: no device")
        return
    print(f"\nResident on {torch.cuda.get_device_name()}: device ms per call")
    moved = bank.to("cuda")
    keys = bank.keys().to("cuda", bank.key_dtype)
    for batch in BATCHES:
        queries = clustered(batch, seed=batch).cuda()
        hidden = torch.arange(batch, device="cuda")
        runs: dict[str, Callable[[], Any]] = {
            "search, values included": lambda q=queries: moved.search(q, K),
            "search, ids excluded": lambda q=queries, h=hidden: moved.search(q, K, exclude_ids=h),
            "limit: the product alone, 16 bits": lambda q=queries: q.to(keys.dtype) @ keys.T,
        }
        for name, run in runs.items():
            run()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                run()
            end.record()
            torch.cuda.synchronize()
            line(f"batch {batch}: {name}", f"{begin.elapsed_time(end) / 20:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument(
        "--only", action="append", help="memory, files, gather, int8, milvus, cuda or search; all if none"
    )
    parser.add_argument("--hnsw", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, help="where the bank is written; a temporary folder otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    keys = clustered(options.entries, seed=0)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "bank"
        bank = MemoryBank(WIDTH, SHAPE)
        begin = time.perf_counter()
        for part, values in zip(keys.split(4096), random_values(options.entries), strict=True):
            bank.add(part, values)
        added = time.perf_counter()
        bank.save(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.bin"))
        print(f"{options.entries} entries: added in {added - begin:.1f} s, saved {size / 1e6:.0f} MB in ", end="")
        print(f"{time.perf_counter() - added:.1f} s")
        del bank
        parts: dict[str, Callable[[], None]] = {
            "memory": lambda: shared_memory(folder),
            "files": lambda: durability(folder),
            "gather": lambda: gather(folder, options.entries),
            "int8": quantisation,
            "milvus": lambda: on_milvus(keys),
            "cuda": lambda: on_cuda(MemoryBank.load(folder)),
            "search": lambda: search(keys, MemoryBank.load(folder), options.hnsw),
        }
        for part_name in options.only or parts:
            parts[part_name]()


if __name__ == "__main__":
    main()
