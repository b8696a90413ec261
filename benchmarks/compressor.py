"""What a value remembers: the paper's pixel encoder, patches in one cross-attention, balanced, and trained.

Reads LLaVA-format captions. Every compressor is measured on the same pairs, none of which trained it: half of the
images of `--measure`, the other half of which trains together with `--train`. Nothing is downloaded: patch features
are the principal components of 16 x 16 pixel patches (`--vision PATH` takes a vision tower saved by transformers).

    python benchmarks/compressor.py --measure coco_mini/captions_all.json:coco_mini/images
        --train nlvr/train_captions.json:nlvr/images

The untrained patch compressors are expected near chance (0.5) in word recovery when text shares a cross-attention with
the image, clearly above it when it has its own, and the trained one far above both.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyalign.models import VisionFeatures
from tinyalign.perceiver import (
    CompressorDiagnostics,
    CompressorRecord,
    FoldedPixelPerceiver,
    PerceiverCompressor,
    PerceiverPretrainer,
    PixelPerceiver,
    caption_bytes,
    compressor_diagnostics,
)

SIDE, PATCH, CHANNELS = 224, 16, 32
STEPS, BATCH, RATE = 900, 32, 1e-3
BAG_SHARE, MIXED_CAPTIONS = 3.0, 0.5  # the words themselves before their order, and more captions than there are
FEW = 100  # pairs of a second measurement: what a linear reader finds from few examples
MAX_PIXEL_RECORDS = 300  # the pixel encoder takes a tenth of a second per pair
SEED = 0


class Pair(NamedTuple):
    image: Path
    words: list[str]
    caption: str


def read_pairs(source: str) -> list[Pair]:
    """The last answer of each conversation, with its image."""
    annotations, folder = source.split(":")
    pairs = []
    for record in json.loads(Path(annotations).read_text(encoding="utf-8")):
        caption = record["conversations"][-1]["value"]
        pairs.append(Pair(Path(folder) / record["image"], re.findall(r"[a-z0-9]+", caption.lower()), caption))
    return pairs


def pixels(path: Path, side: int) -> Tensor:
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1)


def raw_patches(path: Path) -> Tensor:
    return torch.nn.functional.unfold(pixels(path, SIDE)[None], PATCH, stride=PATCH)[0].T


class PrincipalComponents:
    """Patch features without a network: the leading components of the training images' patches."""

    def __init__(self, paths: list[Path]) -> None:
        patches = torch.cat([raw_patches(path) for path in paths]).double()
        self.mean = patches.mean(0)
        covariance = (patches - self.mean).T @ (patches - self.mean) / len(patches)
        self.basis = torch.linalg.eigh(covariance).eigenvectors[:, -CHANNELS:]

    def __call__(self, path: Path) -> Tensor:
        return ((raw_patches(path).double() - self.mean) @ self.basis).float()


class VisionTower:
    """Patch features of a tower saved by transformers, from the layer before the last."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.tower = VisionFeatures(AutoModel.from_pretrained(folder, local_files_only=True)).requires_grad_(False)

    def __call__(self, path: Path) -> Tensor:
        with Image.open(path) as image:
            inputs = self.processor(images=image.convert("RGB"), return_tensors="pt")
        return self.tower(inputs["pixel_values"])[0]


def train(
    pretrainer: PerceiverPretrainer, features: dict[Path, Tensor], pairs: list[Pair], ids: dict[str, int], steps: int
) -> None:
    optimiser = torch.optim.AdamW(pretrainer.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(SEED)
    longest = max(len(pair.words) for pair in pairs)
    text = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        text[row, : len(pair.words)] = torch.tensor([ids[word] for word in pair.words])
        mask[row, : len(pair.words)] = True
    start = time.perf_counter()
    for step in range(1, steps + 1):
        rows = torch.randint(len(pairs), (BATCH,), generator=generator)
        images = torch.stack([features[pairs[row].image] for row in rows.tolist()])
        out = pretrainer(images, text[rows], None, mask[rows], generator=generator)
        optimiser.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(pretrainer.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            took = time.perf_counter() - start
            print(
                f"  step {step}: patches {out.image_loss:.3f}, words {out.text_loss:.3f} nats, {took:.0f} s", flush=True
            )


def show(rows: dict[str, CompressorDiagnostics], few: dict[str, CompressorDiagnostics]) -> None:
    print(
        "\n| compressor | image moves value | caption moves value | shared energy | effective rank "
        "| word recovery (AUC) | words found | patch R2 |"
    )
    print("| --- " * 8 + "|")
    for name, d in rows.items():
        print(
            f"| {name} | {d.image_sensitivity:.1e} | {d.caption_sensitivity:.1e} | {d.shared_energy:.3f} "
            f"| {d.effective_rank:.1f} | {d.word_recovery:.3f} | {d.words_found:.3f} | {d.patch_recovery:.3f} |"
        )
    last = next(reversed(rows.values()))
    print(
        f"\n{last.num_words} words asked of {last.num_records} pairs; who knows only which words are common finds "
        f"{last.words_found_by_frequency:.3f}"
    )
    names = list(few)
    print(f"\nword recovery (AUC) by what is stored\n\n| stored as | bytes per item | {' | '.join(names)} |")
    print("| --- " * (2 + len(names)) + "|")
    for form, stored in rows[names[0]].storage.items():
        recovered = " | ".join(f"{rows[name].storage[form].word_recovery:.3f}" for name in names)
        print(f"| {form} | {stored.bytes_per_item} | {recovered} |")
    asked = few[names[0]]
    print(f"\nfrom few examples: {asked.num_records} pairs, half of which train the probe, {asked.num_words} words\n")
    print(f"| | {' | '.join(names)} |\n" + "| --- " * (1 + len(names)) + "|")
    print(f"| word recovery (AUC) | {' | '.join(f'{few[name].word_recovery:.3f}' for name in names)} |")
    print(f"| words found | {' | '.join(f'{few[name].words_found:.3f}' for name in names)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", required=True, metavar="JSON:IMAGES", help="pairs to measure on, and half to train on"
    )
    parser.add_argument("--train", action="append", default=[], metavar="JSON:IMAGES", help="more pairs to train on")
    parser.add_argument("--vision", help="folder of a vision tower; principal components without it")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--bag-share", type=float, default=BAG_SHARE, help="PerceiverPretrainer's own default is 0.3")
    parser.add_argument("--mixed-captions", type=float, default=MIXED_CAPTIONS, help="its own default is 0")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    measured_pairs = read_pairs(arguments.measure)
    images = sorted({pair.image for pair in measured_pairs})
    kept_out = set(np.random.default_rng(SEED).permutation(images)[: len(images) // 2].tolist())
    training = [pair for pair in measured_pairs if pair.image not in kept_out and pair.words]
    training += [pair for source in arguments.train for pair in read_pairs(source) if pair.words]
    held_out = [pair for pair in measured_pairs if pair.image in kept_out and pair.words]
    extract = (
        VisionTower(arguments.vision)
        if arguments.vision
        else PrincipalComponents(sorted({pair.image for pair in training})[:400])
    )
    features = {path: extract(path) for path in {pair.image for pair in [*training, *held_out]}}
    ids = {word: index for index, word in enumerate(["<unknown>", *sorted({w for p in training for w in p.words})])}
    print(
        f"{len(training)} pairs train, {len(held_out)} measure; {len(ids)} words; features {extract.__class__.__name__}"
    )

    def records(limit: int | None = None) -> list[CompressorRecord]:
        return [
            CompressorRecord(
                features[pair.image],
                torch.tensor([ids.get(w, 0) for w in pair.words]),
                pair.words,
                None,
                str(pair.image),
            )
            for pair in held_out[:limit]
        ]

    dim = next(iter(features.values())).shape[1]
    rows, few = {}, {}
    folded = FoldedPixelPerceiver(PixelPerceiver(seed=SEED))
    seen = {path: pixels(path, 384) for path in {pair.image for pair in held_out}}
    byte_records = [
        record._replace(image=seen[pair.image], text=caption_bytes([pair.caption])[0][0], patches=record.image)
        for record, pair in zip(records(MAX_PIXEL_RECORDS), held_out, strict=False)
    ]
    rows["pixels, untrained (the release)"] = compressor_diagnostics(
        lambda image, text, _, mask: folded(image, text, mask), byte_records, batch_size=4, seed=SEED
    )
    joint = PerceiverCompressor(dim, vocab_size=len(ids), fusion="joint", seed=SEED).eval()
    sample = torch.stack([features[pair.image] for pair in training[:: max(1, len(training) // 128)]])
    joint.fit_image_scale(sample)
    rows["patches and text joint, untrained"] = compressor_diagnostics(joint, records(), seed=SEED)
    few["patches and text joint, untrained"] = compressor_diagnostics(joint, records(FEW), seed=SEED)
    balanced = PerceiverCompressor(dim, vocab_size=len(ids), seed=SEED).eval()
    balanced.fit_image_scale(sample)
    rows["balanced, untrained"] = compressor_diagnostics(balanced, records(), seed=SEED)
    few["balanced, untrained"] = compressor_diagnostics(balanced, records(FEW), seed=SEED)
    pretrainer = PerceiverPretrainer(
        balanced,
        bag_share=arguments.bag_share,
        mixed_captions=arguments.mixed_captions,
        num_patches=64,
        seed=SEED,
    )
    train(pretrainer.train(), features, training, ids, arguments.steps)
    balanced.eval()
    rows["balanced, trained"] = compressor_diagnostics(balanced, records(), seed=SEED)
    few["balanced, trained"] = compressor_diagnostics(balanced, records(FEW), seed=SEED)
    hidden = compressor_diagnostics(
        lambda image, text, mask, kept: balanced(image, text, mask, torch.zeros_like(kept)), records(), seed=SEED
    )
    rows["balanced, trained, caption hidden"] = hidden
    show(rows, few)


if __name__ == "__main__":
    main()
