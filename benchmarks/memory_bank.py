"""Measure the memory bank against faiss, torch, a naive loop and the machine's limits, all in one run.

Prints CPU milliseconds of one thread and ratios to the reference of each table; absolute numbers drift with the
machine, ratios much less. ``--entries 5000`` is a quick look, ``--entries 558000`` the paper's full set (9 GB of
memory, 10 GB of disk); ``--only gather`` is one part of it. With ``--folder`` the bank is kept for the next run.
``--index HNSW32:efSearch=200`` measures one faiss index and no other. A GPU is measured where there is one; other
engines by ``bank_engines.py``.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyalign.memory import MemoryBank, leakage_report
from tinyalign.memory.certified import int8_pays

WIDTH, SHAPE, K = 1152, (32, 96), 5
BATCHES = (1, 16, 256)
ROWS = 1 << 15  # worked on at once
INDEXES = ("IVF1024,Flat:nprobe=64", "IVF256,RaBitQ:nprobe=64", "IVF1024,PQ64:nprobe=64", "HNSW32:efSearch=200")
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


def cost(run: Callable[[Tensor], Any], inputs: list[Tensor]) -> tuple[float, ...]:
    """CPU ms, those of the user and of the system, and page faults; mean over ``inputs`` after as many to warm up.

    Each result lives until the next one is there, as in a training loop.
    """
    for one in inputs:
        result = run(one)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for one in inputs:
        result = run(one)
    after = resource.getrusage(resource.RUSAGE_SELF)
    del result
    user, system = 1e3 * (after.ru_utime - before.ru_utime), 1e3 * (after.ru_stime - before.ru_stime)
    return tuple(x / len(inputs) for x in (user + system, user, system, after.ru_minflt - before.ru_minflt))


def line(name: str, *cells: object) -> None:
    print(f"  {name:<44}" + "".join(f"{cell!s:>14}" for cell in cells))


def clustered(count: int, seed: int) -> Tensor:
    """Unit keys in 1,000 clusters: within one, cosines are about 0.67."""
    centers = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(1000, (count,), generator=generator)
    keys = torch.randn(count, WIDTH, generator=generator)
    for part, near in zip(keys.split(ROWS), which.split(ROWS), strict=True):
        part.copy_(F.normalize(centers[near] + 0.7 * part, dim=-1))
    return keys


def full_sort(queries: Tensor, keys: Tensor) -> torch.return_types.topk:
    """The best by products in float64, some keys at a time."""
    parts = [(queries.double() @ part.double().T).topk(min(K, len(part))) for part in keys.split(ROWS)]
    best = torch.cat([part.values for part in parts], 1).topk(K)
    rows = torch.cat([part.indices + ROWS * number for number, part in enumerate(parts)], 1)
    return torch.return_types.topk((best.values, rows.gather(1, best.indices)))


def search(keys: Tensor, bank: MemoryBank, indexes: Sequence[str]) -> None:
    """Exact search unless ``indexes`` are given."""
    print(f"\nSearch, {len(keys)} keys of width {WIDTH}, k = {K}: CPU ms, ratio to torch in parentheses, recall@{K}")
    line("", *(f"batch {batch}" for batch in BATCHES), "recall", f"within {TIE:g}")
    queries = {batch: clustered(batch, seed=batch) for batch in BATCHES}
    exact = {batch: full_sort(q, keys) for batch, q in queries.items()}
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

    reference = row("torch product and top-k, fp32", lambda q: (q @ keys.T).topk(K).indices, {})
    for index in indexes:
        factory, _, parameter = index.partition(":")
        name, _, value = parameter.partition("=")
        begin = time.process_time()
        bank.build_index(factory, candidates=100, parameters={name: float(value)})
        seconds = time.process_time() - begin
        row(f"{index}, {seconds:.0f} s", lambda q: bank.neighbours(q, K, method="approximate").ids, reference)
    if indexes:
        return
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(keys.numpy())
    threshold = faiss.cvar.distance_compute_blas_threshold

    def faiss_flat(queries: Tensor, least: int) -> Any:
        faiss.cvar.distance_compute_blas_threshold = least
        try:
            return flat.search(queries.numpy(), K)
        finally:
            faiss.cvar.distance_compute_blas_threshold = threshold

    hidden = torch.randint(len(keys), (max(BATCHES), 16), generator=torch.Generator().manual_seed(3)) + 10 * len(keys)
    methods: dict[str, Callable[[Tensor], Any]] = {
        "faiss flat, as it comes": lambda q: faiss_flat(q, threshold)[1],
        "faiss flat, BLAS at every size": lambda q: faiss_flat(q, 1)[1],
        "numpy product and argpartition": lambda q: np.argpartition(q.numpy() @ keys.numpy().T, -K, axis=1)[:, -K:],
        "MemoryBank exact, fp16 keys": lambda q: bank.neighbours(q, K).ids,
        "MemoryBank exact, 16 ids excluded": lambda q: bank.neighbours(q, K, exclude_ids=hidden[: len(q)]).ids,
        "MemoryBank exact, 16 ids and groups": lambda q: (
            bank.neighbours(q, K, exclude_ids=hidden[: len(q)], exclude_groups=hidden[: len(q)]).ids
        ),
        "MemoryBank certified": lambda q: bank.neighbours(q, K, method="certified").ids,
        "limit: the product alone": lambda q: q @ keys.T,
        "limit: read every fp32 byte": lambda _: keys.view(-1).sum(),
        "limit: read every fp16 byte": lambda _: (
            bank._contents.table.segments[0].columns.keys.view(torch.float32).sum()
        ),
    }
    for name, run in methods.items():
        row(name, run, reference)
    print(f"  certified is searched in int8 here: {int8_pays()} (otherwise exactly, by floats)")
    print(f"  keys at rest: {keys.numel() * 2 / 1e6:.0f} MB; faiss flat: {keys.numel() * 4 / 1e6:.0f} MB")


def leakage(bank: MemoryBank, count: int = 2000) -> None:
    print(f"\nLeakage report of {count} queries against {len(bank)} entries, beside one search of them")
    queries, ids = bank.keys(bank.ids[:count]), bank.ids[:count]
    once = milliseconds(lambda: bank.neighbours(queries, K), 1)
    spent = milliseconds(lambda: leakage_report(bank, queries, ids, ids // 5), 1)
    line("CPU s, in searches", f"{spent / 1e3:.1f}", f"{spent / once:.2f}")


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


GATHERS = (
    "the release's loop over fp32, to fp16",
    "MemoryBank, mapped",
    "torch: index_select of the rows",
    "limit: into memory that is there",
    "limit: rows fetched ahead (fbgemm)",
    "limit: as many rows in one piece",
)


def warm_gather(folder: Path, batch: int, name: str) -> tuple[float, ...]:
    """What one way costs in a process that does nothing else."""
    torch.set_num_threads(1)
    bank = MemoryBank.load(folder)
    raw = bank._contents.table.segments[0].columns.values
    room = torch.empty(batch * K, raw.shape[1], dtype=raw.dtype)
    loaded = raw.float().reshape(-1, 1, *SHAPE) if name == GATHERS[0] else raw
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randint(len(raw), (batch, K), generator=generator) for _ in range(40)]

    def naive(ids: Tensor) -> Tensor:
        """As the paper's release does: values one by one by faiss's row numbers, joined per query, then per batch."""
        return torch.cat([torch.cat([loaded[row] for row in rows], dim=1) for rows in ids.numpy()]).half()

    runs: tuple[Callable[[Tensor], Any], ...] = (
        naive,
        bank.gather,
        lambda ids: raw.index_select(0, ids.reshape(-1)),
        lambda ids: torch.index_select(raw, 0, ids.reshape(-1), out=room),
        lambda ids: F.embedding_bag(ids.reshape(-1, 1), raw, mode="sum"),  # sums of one row each: it prefetches
        lambda ids: room.copy_(raw.narrow(0, int(ids[0, 0]) % (len(raw) - len(room)), len(room))),
    )
    return min(cost(runs[GATHERS.index(name)], draws) for _ in range(5))


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
    for batch in (16, 256):
        line(f"warm, batch {batch}", "CPU ms", "user", "system", "faults", "times less")
        loop = math.nan
        for name in GATHERS:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                spent, *split, faults = process.apply(warm_gather, (folder, batch, name))
            loop = spent if name == GATHERS[0] else loop
            line(name, *(f"{x:.3f}" for x in (spent, *split)), f"{faults:.0f}", f"{loop / spent:.1f}")


RANK = """
import sys, torch
from pathlib import Path
from tinyalign.memory import MemoryBank, leakage_report

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
del ids; bank.neighbours(torch.ones(1, bank.key_dim), 1)  # the ids are ours and not the bank's
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


def written(keys: Tensor, folder: Path) -> None:
    """Write the bank in generations of some entries, joined at the end, so that its values never lie in memory."""
    begin = time.perf_counter()
    bank = MemoryBank(WIDTH, SHAPE)
    for number, (part, values) in enumerate(zip(keys.split(4096), random_values(len(keys)), strict=True), start=1):
        bank.add(part, values)
        if number % 32 == 0:
            bank.save(folder)
    bank.save(folder)
    if bank.generation > 1:
        bank.compact()
    size = sum(path.stat().st_size for path in folder.rglob("*.bin")) / 1e6
    print(f"{len(keys)} entries: {size:.0f} MB written in {time.perf_counter() - begin:.1f} s, values drawn meanwhile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument(
        "--only", action="append", help="memory, files, gather, int8, cuda, leakage, search or indexes; all if none"
    )
    parser.add_argument("--index", action="append", help="such as HNSW32:efSearch=200; several if none")
    parser.add_argument("--folder", type=Path, help="where the bank is, or is written and kept; temporary otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    keys = clustered(options.entries, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.folder or name) / f"bank-{options.entries}"
        if not folder.exists():
            written(keys, folder)
        parts: dict[str, Callable[[], None]] = {
            "memory": lambda: shared_memory(folder),
            "files": lambda: durability(folder),
            "gather": lambda: gather(folder, options.entries),
            "int8": quantisation,
            "cuda": lambda: on_cuda(MemoryBank.load(folder)),
            "leakage": lambda: leakage(MemoryBank.load(folder)),
            "search": lambda: search(keys, MemoryBank.load(folder), ()),
            "indexes": lambda: search(keys, MemoryBank.load(folder), options.index or INDEXES),
        }
        for part_name in options.only or parts:
            parts[part_name]()


if __name__ == "__main__":
    main()
