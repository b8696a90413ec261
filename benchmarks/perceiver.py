"""How fast the Perceiver encodes: against transformers' eager classes and against its own matrix products alone.

Both sides run in this process, in turns, on the same input and weights; medians and ratios are printed.

    python benchmarks/perceiver.py                # everything
    python benchmarks/perceiver.py --part patches # 16 images of 729 x 1152 patch features
    python benchmarks/perceiver.py --part pixels  # the paper's pixel encoder, straightforward and folded
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import transformers
from transformers import PerceiverConfig, PerceiverModel
from transformers.models.perceiver.modeling_perceiver import (
    PerceiverImagePreprocessor,
    PerceiverMultimodalPreprocessor,
    PerceiverTextPreprocessor,
)

from tinyalign.perceiver import (
    FoldedPixelPerceiver,
    PerceiverCompressor,
    PerceiverEncoder,
    PixelPerceiver,
    caption_bytes,
)

BATCH, PATCHES, IMAGE_DIM, CAPTION = 16, 729, 1152, 32
ROUNDS = 15
PIXEL_ROUNDS = 3
CAPTION_TEXT = "a family is sitting down at a table to have cake"


def table_3(image_size: int = 384) -> PerceiverConfig:
    return PerceiverConfig(
        num_latents=32,
        d_latents=96,
        d_model=128,
        num_self_attends_per_block=8,
        num_blocks=1,
        num_self_attention_heads=8,
        num_cross_attention_heads=8,
        qk_channels=96,
        v_channels=96,
        image_size=image_size,
        vocab_size=30522,
        max_position_embeddings=512,
        attention_probs_dropout_prob=0.0,
    )


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; one untimed round first, then all sides in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}


def matrix_products(batch: int) -> Callable[[], None]:
    """Every matrix product of the encoder at Table 3 sizes, over ready operands, and nothing else."""
    tokens, latents = batch * PATCHES, batch * 32
    shapes = [(1, tokens, IMAGE_DIM, 128), (1, tokens, 128, 96), (1, tokens, 128, 96), (1, 32, 96, 96)]
    shapes += [(batch * 8, 32, 12, PATCHES), (batch * 8, 32, PATCHES, 12)] + [(1, latents, 96, 96)] * 3
    layer = [(1, latents, 96, 96)] * 6 + [(batch * 8, 32, 12, 32), (batch * 8, 32, 32, 12)]
    shapes += layer * 8
    operands = [(torch.randn(n, m, k), torch.randn(n, k, p), torch.empty(n, m, p)) for n, m, k, p in shapes]

    def run() -> None:
        for left, right, out in operands:
            if left.shape[0] == 1:
                torch.mm(left[0], right[0], out=out[0])
            else:
                torch.bmm(left, right, out=out)

    return run


def patches() -> None:
    features = torch.randn(BATCH, PATCHES, IMAGE_DIM)
    text = torch.randint(1, 30522, (BATCH, CAPTION))
    projection = torch.nn.Linear(IMAGE_DIM, 128)
    theirs = PerceiverModel(table_3()).eval()
    ours = PerceiverEncoder.from_hf_state_dict(theirs.state_dict()).eval()
    compressor = PerceiverCompressor(IMAGE_DIM).eval()
    with torch.inference_mode():
        apart = (theirs(projection(features)).last_hidden_state - ours(projection(features))).abs().max()
        hidden = theirs.embeddings(BATCH)
        seconds = in_turns(
            {
                "transformers, eager": lambda: theirs.encoder(hidden, inputs=projection(features)),
                "tinyalign encoder": lambda: ours(projection(features)),
                "its matrix products alone": matrix_products(BATCH),
                "tinyalign compressor, with captions": lambda: compressor(features, text),
            },
            ROUNDS,
        )
    print(f"\n{BATCH} images of {PATCHES} x {IMAGE_DIM} patch features, Table 3 sizes, fp32, one thread")
    print(f"largest difference between the two encoders: {apart:.1e}")
    for name, median in seconds.items():
        print(f"  {name:38s} {median * 1e3:8.1f} ms   {median / BATCH * 1e3:6.2f} ms per image")
    own = seconds["tinyalign encoder"]
    print(f"  tinyalign / transformers       {own / seconds['transformers, eager']:.3f}   (target: at most 1)")
    print(f"  tinyalign / matrix products    {own / seconds['its matrix products alone']:.3f}   (target: at most 1.3)")


def pixel_model() -> PerceiverModel:
    config = table_3()
    image = PerceiverImagePreprocessor(
        config,
        prep_type="conv1x1",
        spatial_downsample=1,
        out_channels=256,
        position_encoding_type="trainable",
        concat_or_add_pos="concat",
        project_pos_dim=256,
        trainable_position_encoding_kwargs={"num_channels": 256, "index_dims": 384**2},
    )
    both = PerceiverMultimodalPreprocessor(
        {"image": image, "text": PerceiverTextPreprocessor(config)}, min_padding_size=4
    )
    return PerceiverModel(config, input_preprocessor=both).eval()


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest since `forget_peak`."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def forget_peak() -> None:
    """Hand freed heap back to the system, then start the peak anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
        handle.write("5")


def pixel_side(side: str) -> None:
    """One side alone in a process of its own: seconds per image, and the peak above what it holds at rest."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = pixel_model()
    image = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(1))
    ids, mask = caption_bytes([CAPTION_TEXT])
    start = time.perf_counter()
    if side == "transformers":
        whole = torch.cat((torch.ones(1, 384**2), mask.float()), dim=1)

        def run() -> torch.Tensor:
            return model({"image": image, "text": ids}, attention_mask=whole).last_hidden_state
    else:
        pixels = PixelPerceiver.from_hf_state_dict(model.state_dict()).eval()
        encoder = FoldedPixelPerceiver(pixels) if side == "folded" else pixels
        del model, pixels

        def run() -> torch.Tensor:
            return encoder(image, ids, text_mask=mask)

    built = time.perf_counter() - start
    with torch.inference_mode():
        value = run()
        forget_peak()
        at_rest = memory("VmRSS")
        seconds = in_turns({side: run}, PIXEL_ROUNDS)[side]
    result = {"seconds": seconds, "at_rest": at_rest, "peak": memory("VmHWM") - at_rest, "built": built}
    print(json.dumps({**result, "value": value.flatten().tolist()}))


def pixels() -> None:
    sides = {}
    for side in ("transformers", "straightforward", "folded"):
        command = [sys.executable, __file__, "--side", side]
        sides[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("\nOne 384 x 384 image and caption through the pixel encoder (147,456 tokens), fp32, one thread")
    print("memory: the peak of a forward pass above the process at rest, as the kernel counts it")
    reference = sides["transformers"]
    for side, result in sides.items():
        apart = max(abs(a - b) for a, b in zip(reference["value"], result["value"], strict=True))
        print(
            f"  {side:16s} {result['seconds']:7.3f} s   {result['peak'] / 2**20:8.1f} MiB above rest   "
            f"{result['at_rest'] / 2**20:7.0f} MiB at rest   differs by {apart:.1e}"
        )
    folded = sides["folded"]
    for side in ("transformers", "straightforward"):
        print(
            f"  folded against {side}: {sides[side]['seconds'] / folded['seconds']:.1f}x less time (target: 6), "
            f"{sides[side]['peak'] / folded['peak']:.0f}x less memory (target: 30)"
        )
    print(f"  folding once takes {folded['built']:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "patches", "pixels"], default="all")
    parser.add_argument("--side", choices=["transformers", "straightforward", "folded"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        pixel_side(arguments.side)
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}")
    if arguments.part in ("all", "patches"):
        patches()
    if arguments.part in ("all", "pixels"):
        pixels()


if __name__ == "__main__":
    main()
