"""Attention kernels of the Perceiver: time, memory and share of the device's limit, against eager transformers.

Every backend that can run a workload runs it, in turns, in this process; what cannot run is listed with its reasons.
The limit of a workload is the longer of its arithmetic at the rate of a large matrix product and its reads and writes
at the rate of a large copy, both measured here first. On CUDA two times are taken: the device's own, with all launches
queued before it starts, which the share of the limit is of; and that of calls one after the other, launches included.

    python benchmarks/attention.py                  # the CUDA device if there is one, else the CPU
    python benchmarks/attention.py --output FILE    # elsewhere than benchmarks/results/attention-DEVICE.json
    python benchmarks/attention.py --smoke          # tiny sizes: whether it runs

The file holds device, versions, all times, and for each workload which backend was fastest and which "auto" takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PerceiverConfig, PerceiverModel

from tinyalign._attention import attend_packed, pack
from tinyalign.perceiver import PerceiverCompressor, PerceiverEncoder, attend, attention_report, use_attention_backend

HEADS, LATENTS, WIDTH = 8, 32, 12
DTYPES = {"cuda": ["float32", "float16", "bfloat16"], "cpu": ["float32"]}
BACKENDS = ["xformers", "sdpa", "reference"]
EAGER = "transformers, eager"
RESULTS = Path(__file__).parent / "results"


class Scale(NamedTuple):
    """How much is measured. `cycles` is how long the device sleeps while launches queue up, some 25 ms on an H200."""

    batch: int
    rounds: int
    product_side: int
    copy_bytes: int
    cycles: int = 0


SCALES = {"cuda": Scale(256, 50, 8192, 2**28, 50_000_000), "cpu": Scale(16, 9, 1024, 2**25)}
SMOKE = Scale(2, 1, 64, 2**10, 1000)


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
    """`seconds` of one call as it is made, `device_seconds` of the device alone, `peak_bytes` above what was held."""

    seconds: float
    device_seconds: float
    peak_bytes: int | None


def median(numbers: list[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]


def wall(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def measure(run: Callable[[], object], device: str, scale: Scale) -> Measured:
    """Medians after three warm-ups."""
    for _ in range(min(3, scale.rounds)):
        run()
    if device == "cpu":
        seconds = wall(run, scale.rounds)
        return Measured(seconds, seconds, None)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    calls = min(10, scale.rounds)

    def several_calls() -> None:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()

    seconds = wall(several_calls, scale.rounds // calls) / calls
    times = []
    for _ in range(scale.rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(scale.cycles)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return Measured(seconds, median(times), torch.cuda.max_memory_allocated() - held)


def rates(device: str, dtype: torch.dtype, scale: Scale) -> tuple[float, float]:
    """(operations per second of a large product, bytes per second of a large copy)."""
    side = scale.product_side
    left = torch.randn(side, side, device=device).to(dtype)
    product = measure(lambda: left @ left, device, scale).device_seconds
    source = torch.empty(scale.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, scale).device_seconds
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


def run_width(device: str, dtype: torch.dtype) -> int:
    """16-bit CUDA kernels take widths that are multiples of eight: the layers pad 12 to 16 in their weights."""
    return 16 if device == "cuda" and dtype != torch.float32 else WIDTH


def one_workload(
    workload: Workload, device: str, dtype: torch.dtype, limits: tuple[float, float], scale: Scale
) -> dict[str, Any]:
    batch, width = scale.batch, run_width(device, dtype)
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
    eager, narrow = eager_transformers(dtype), [tensor[..., :WIDTH].contiguous() for tensor in (q, k, v)]
    sides: dict[str, Callable[[], object]] = {EAGER: lambda: eager(*narrow, keep)}
    report = attention_report(device, dtype, head_dim=width, mask="dense" if workload.ragged else "none")
    for backend in BACKENDS:
        if not report.reasons[backend]:
            sides[backend] = lambda backend=backend: attend(q, k, v, keep=keep, scale=WIDTH**-0.5, backend=backend)
    declined = {backend: reasons for backend, reasons in report.reasons.items() if reasons}
    if workload.ragged:
        packed = pack(torch.zeros(batch, workload.keys, 1, device=device), keep)
        flat_k, flat_v = (t.transpose(1, 2)[packed.keep] for t in (k, v))
        for backend in ("xformers", "sdpa"):
            if not attention_report(device, dtype, head_dim=width, mask="packed").reasons[backend]:
                sides[f"{backend}, packed"] = lambda backend=backend: attend_packed(
                    q, flat_k, flat_v, packed, scale=WIDTH**-0.5, backend=backend
                )
    with torch.inference_mode():
        measured = {name: measure(run, device, scale) for name, run in sides.items()}
    return result(workload.name, limit, measured, declined, report.backend)


def result(
    name: str, limit: float | None, sides: dict[str, Measured], declined: dict[str, tuple[str, ...]], automatic: str
) -> dict[str, Any]:
    """A workload's measurements, the fastest backend that takes the call as it is, and what "auto" takes."""
    fastest = min((side for side in sides if side in BACKENDS), key=lambda side: sides[side].device_seconds)
    return {
        "workload": name,
        "limit": limit,
        "sides": sides,
        "declined": declined,
        "fastest": fastest,
        "automatic": automatic,
        "automatic over fastest": sides[automatic].device_seconds / sides[fastest].device_seconds,
    }


def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    return lambda: forward().float().square().mean().backward()


def whole_encoder(device: str, dtype: torch.dtype, scale: Scale) -> dict[str, Any]:
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
    inputs = torch.randn(max(1, scale.batch // 4), 729, 128, device=device).to(dtype)
    hidden = theirs.embeddings(len(inputs))

    def forced(backend: str) -> Tensor:
        with use_attention_backend(backend):
            return ours(inputs)

    sides = {EAGER: step(lambda: theirs.encoder(hidden, inputs=inputs).last_hidden_state)}
    report = attention_report(device, dtype, head_dim=run_width(device, dtype))
    for backend in BACKENDS:
        if not report.reasons[backend]:
            sides[backend] = step(lambda backend=backend: forced(backend))
    measured = {name: measure(run, device, scale) for name, run in sides.items()}
    return result(f"encoder, forward and backward, {len(inputs)} images", None, measured, {}, report.backend)


def heard_captions(device: str, dtype: torch.dtype, scale: Scale) -> dict[str, Any]:
    """A compressor hears its captions, forward and backward: masked, or packed with what packing costs."""
    compressor = PerceiverCompressor(8).to(device, dtype)
    words = torch.randn(scale.batch, 64, 128, device=device).to(dtype)
    mask = torch.arange(64, device=device)[None] < torch.randint(5, 65, (scale.batch, 1), device=device)

    def heard(backend: str, packed: bool) -> Tensor:
        with use_attention_backend(backend):
            return compressor.hear(words, mask, packed=packed)

    reasons = {
        packed: attention_report(device, dtype, head_dim=run_width(device, dtype), mask=kind)
        for packed, kind in ((False, "dense"), (True, "packed"))
    }
    sides: dict[str, Callable[[], object]] = {}
    for packed, report in reasons.items():
        for backend in BACKENDS[: 2 if packed else 3]:
            if not report.reasons[backend]:
                name = f"{backend}, packed" if packed else backend
                sides[name] = step(lambda backend=backend, packed=packed: heard(backend, packed))
    measured = {name: measure(run, device, scale) for name, run in sides.items()}
    name = f"ragged captions, forward and backward, {scale.batch} rows"
    return result(name, None, measured, {}, reasons[False].backend)


def show(found: dict[str, Any]) -> None:
    print(f"\n  {found['workload']}")
    base = found["sides"].get(EAGER, found["sides"][found["automatic"]])
    for name, measured in found["sides"].items():
        memory = "" if measured.peak_bytes is None else f"{measured.peak_bytes / 2**20:9.1f} MiB"
        share = "" if found["limit"] is None else f"{found['limit'] / measured.device_seconds:7.1%} of the limit"
        times = f"{measured.device_seconds * 1e6:10.1f} us  {base.device_seconds / measured.device_seconds:6.2f}x"
        print(f"    {name:22s} {times} {measured.seconds * 1e6:10.1f} us a call {memory} {share}")
    for name, reasons in found["declined"].items():
        print(f"    {name:22s} does not run: {reasons[0][:90]}")
    slower = found["automatic over fastest"]
    verdict = "the fastest" if slower == 1.0 else f"{slower:.2f}x the time of {found['fastest']}, the fastest"
    print(f"    auto takes {found['automatic']}: {verdict}")


def versions_of(device: str) -> dict[str, str | int | None]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "transformers": transformers.__version__,
    }
    try:
        import xformers

        versions["xformers"] = xformers.__version__
    except ImportError:
        versions["xformers"] = None
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the results go, as JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; writes only where --output says")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    scale = SMOKE if arguments.smoke else SCALES[device]
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, one thread"
    versions = versions_of(device)
    print(f"{name}; " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    results = {}
    for dtype_name in DTYPES[device]:
        dtype = getattr(torch, dtype_name)
        limits = rates(device, dtype, scale)
        print(f"\n{dtype_name}: product {limits[0] / 1e12:.2f} TFLOP/s, copy {limits[1] / 1e9:.0f} GB/s")
        results[dtype_name] = [one_workload(workload, device, dtype, limits, scale) for workload in WORKLOADS]
        results[dtype_name].append(whole_encoder(device, dtype, scale))
        results[dtype_name].append(heard_captions(device, dtype, scale))
        for found in results[dtype_name]:
            show(found)
    output = arguments.output
    if output is None and not arguments.smoke:
        output = RESULTS / f"attention-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    if output is None:
        return
    for rows in results.values():
        for row in rows:
            row["sides"] = {side: measured._asdict() for side, measured in row["sides"].items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"device": name, "versions": versions, "results": results}, indent=2) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
