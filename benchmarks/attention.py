"""Attention kernels of the Perceiver: time, memory and share of the device's limit, against eager transformers.

Every backend that can run a workload runs it, in turns, in this process; what cannot run is listed with its reasons.
The limit of a workload is the longer of its arithmetic at the rate of a large matrix product and its reads and writes
at the rate of a large copy, both measured here first.

    python benchmarks/attention.py                    # the CUDA device if there is one, else the CPU
    python benchmarks/attention.py --output FILE      # also as JSON, with device and versions
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PerceiverConfig, PerceiverModel

from tinyalign._attention import attend_packed, pack
from tinyalign.perceiver import PerceiverEncoder, attend, attention_report, use_attention_backend

HEADS, LATENTS, WIDTH = 8, 32, 12
BATCH = {"cuda": 256, "cpu": 16}
ROUNDS = {"cuda": 50, "cpu": 9}
DTYPES = {"cuda": ["float32", "float16", "bfloat16"], "cpu": ["float32"]}
BACKENDS = ["xformers", "sdpa", "reference"]


class Workload(NamedTuple):
    name: str
    keys: int
    ragged: bool
    queries: int = LATENTS


WORKLOADS = [
    Workload("latents read 729 patches", 729, False),
    Workload("latents read ragged captions", 64, True),
    Workload("latents among themselves", LATENTS, False),
]


class Measured(NamedTuple):
    seconds: float
    peak_bytes: int | None


def measure(run: Callable[[], object], device: str) -> Measured:
    """Median time after three warm-ups, and on CUDA the peak of memory above what was held before."""
    for _ in range(3):
        run()
    if device == "cpu":
        times = []
        for _ in range(ROUNDS[device]):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return Measured(sorted(times)[len(times) // 2], None)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(ROUNDS[device]):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return Measured(sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() - held)


def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(operations per second of a large product, bytes per second of a large copy)."""
    side = 8192 if device == "cuda" else 1024
    left = torch.randn(side, side, device=device).to(dtype)
    product = measure(lambda: left @ left, device).seconds
    source = torch.empty(2**28 if device == "cuda" else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device).seconds
    return 2 * side**3 / product, 2 * source.numel() / copy


def eager_transformers(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """What transformers' `PerceiverSelfAttention` does between its projections, which do not belong to a kernel."""
    lowest = torch.finfo(dtype).min

    def run(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / WIDTH**0.5
        if keep is not None:
            scores = scores + torch.where(keep, 0.0, lowest).to(dtype)[:, None, None, :]
        return torch.matmul(torch.nn.Softmax(dim=-1)(scores), v)

    return run


def one_workload(workload: Workload, device: str, dtype: torch.dtype, limits: tuple[float, float]) -> dict[str, Any]:
    batch = BATCH[device]
    # 16-bit CUDA kernels take widths that are multiples of eight: the layers pad 12 to 16 in their weights.
    width = 16 if device == "cuda" and dtype != torch.float32 else WIDTH
    q = torch.randn(batch, HEADS, workload.queries, width, device=device).to(dtype)
    k, v = (torch.randn(batch, HEADS, workload.keys, width, device=device).to(dtype) for _ in range(2))
    keep, kept = None, float(batch * workload.keys)
    if workload.ragged:
        lengths = torch.randint(5, workload.keys + 1, (batch, 1), device=device)
        keep = torch.arange(workload.keys, device=device)[None] < lengths
        kept = float(keep.sum())
    operations = 4 * workload.queries * HEADS * WIDTH * kept
    moved = (2 * batch * workload.queries + 2 * kept) * HEADS * WIDTH * dtype.itemsize
    limit = max(operations / limits[0], moved / limits[1])
    eager = eager_transformers(dtype)
    sides: dict[str, Callable[[], object]] = {
        "transformers, eager": lambda: eager(q[..., :WIDTH], k[..., :WIDTH], v[..., :WIDTH], keep)
    }
    declined = {}
    for backend in BACKENDS:
        report = attention_report(device, dtype, head_dim=width, mask="dense" if workload.ragged else "none")
        if report.reasons[backend]:
            declined[backend] = report.reasons[backend]
            continue
        sides[backend] = lambda backend=backend: attend(q, k, v, keep=keep, scale=WIDTH**-0.5, backend=backend)
    if workload.ragged:
        packed = pack(torch.zeros(batch, workload.keys, 1, device=device), keep)
        flat_k, flat_v = (t.transpose(1, 2)[packed.keep] for t in (k, v))
        for backend in ("xformers", "sdpa"):
            if not attention_report(device, dtype, head_dim=width, mask="packed").reasons[backend]:
                sides[f"{backend}, packed"] = lambda backend=backend: attend_packed(
                    q, flat_k, flat_v, packed, scale=WIDTH**-0.5, backend=backend
                )
    with torch.inference_mode():
        measured = {name: measure(run, device) for name, run in sides.items()}
    return {"workload": workload.name, "limit": limit, "sides": measured, "declined": declined}


def whole_encoder(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The encoder at Table 3 sizes on projected patches, forward and backward."""
    config = PerceiverConfig(
        num_latents=32,
        d_latents=96,
        d_model=128,
        num_self_attends_per_block=8,
        num_self_attention_heads=8,
        num_cross_attention_heads=8,
        qk_channels=96,
        v_channels=96,
        attention_probs_dropout_prob=0.0,
    )
    theirs = PerceiverModel(config).to(device, dtype).train()
    ours = PerceiverEncoder.from_hf_state_dict(theirs.state_dict()).to(device, dtype)
    inputs = torch.randn(BATCH[device] // 4, 729, 128, device=device).to(dtype)
    hidden = theirs.embeddings(len(inputs))

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: forward().float().square().mean().backward()

    def forced(backend: str) -> Tensor:
        with use_attention_backend(backend):
            return ours(inputs)

    sides = {"transformers, eager": step(lambda: theirs.encoder(hidden, inputs=inputs).last_hidden_state)}
    for backend in BACKENDS:
        width = 16 if device == "cuda" and dtype != torch.float32 else WIDTH
        if not attention_report(device, dtype, head_dim=width).reasons[backend]:
            sides[backend] = step(lambda backend=backend: forced(backend))
    name = f"encoder, forward and backward, {len(inputs)} images"
    return {
        "workload": name,
        "limit": None,
        "sides": {n: measure(run, device) for n, run in sides.items()},
        "declined": {},
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n  {result['workload']}")
    base = result["sides"]["transformers, eager"]
    for name, measured in result["sides"].items():
        memory = "" if measured.peak_bytes is None else f"{measured.peak_bytes / 2**20:9.1f} MiB"
        share = "" if result["limit"] is None else f"{result['limit'] / measured.seconds:7.1%} of the limit"
        times = f"{measured.seconds * 1e6:10.1f} us  {base.seconds / measured.seconds:6.2f}x"
        print(f"    {name:22s} {times} {memory} {share}")
    for name, reasons in result["declined"].items():
        print(f"    {name:22s} does not run: {reasons[0][:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, one thread"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
    try:
        import xformers

        versions["xformers"] = xformers.__version__
    except ImportError:
        versions["xformers"] = None
    print(f"{name}; " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    results = {}
    for dtype_name in DTYPES[device]:
        dtype = getattr(torch, dtype_name)
        limits = rates(device, dtype)
        print(f"\n{dtype_name}: product {limits[0] / 1e12:.2f} TFLOP/s, copy {limits[1] / 1e9:.0f} GB/s")
        results[dtype_name] = [one_workload(workload, device, dtype, limits) for workload in WORKLOADS]
        results[dtype_name].append(whole_encoder(device, dtype))
        for result in results[dtype_name]:
            show(result)
        masked = attention_report(device, dtype, head_dim=16, mask="dense")
        print(f"\n  automatic choice for a masked call of width 16: {masked.backend}")
    if arguments.output:
        for rows in results.values():
            for row in rows:
                row["sides"] = {side: measured._asdict() for side, measured in row["sides"].items()}
        content = {"device": name, "versions": versions, "results": results}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")
        print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
