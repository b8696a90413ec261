"""What a value remembers: the paper's pixel encoder, patches in one cross-attention, balanced, and trained.

Reads LLaVA-format captions. Every compressor is measured on the same pairs, none of which trained it: half of the
images of `--measure` (`--half` says which), the other half of which trains together with `--train`. Nothing is
downloaded: patch features are the principal components of 16 x 16 pixel patches (`--vision PATH` takes a vision tower
saved by transformers).

    python benchmarks/compressor.py --measure coco_mini/captions_all.json:coco_mini/images
        --train nlvr/train_captions.json:nlvr/images --seeds 0 1 2

A seed draws the weights, the order of training and which half of the measured pairs trains the probes. Means over the
seeds are printed, with the range for the words; the release's encoder is slow and runs under the first seed alone.
`--setting BAG:MIXED` trains with other weights of the words out of order and other shares of mixed captions than the
trainer's own, several times for several; with `--results FILE` nothing is computed twice. Expected: near chance (0.5)
in word recovery where an untrained compressor reads text and image in one cross-attention, clearly above it where the
text has its own, and better again after training.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyalign.models import VisionFeatures
from tinyalign.perceiver import (
    CompressorDiagnostics,
    CompressorRecord,
    FoldedPixelPerceiver,
    LossWeights,
    PerceiverCompressor,
    PerceiverPretrainer,
    PixelPerceiver,
    caption_bytes,
    compressor_diagnostics,
)

SIDE, PATCH, CHANNELS = 224, 16, 32
STEPS, BATCH, RATE = 300, 32, 1e-3
FEW = 100  # pairs of a second measurement: what a linear reader finds from few examples
MAX_PIXEL_RECORDS = 300  # the pixel encoder takes a tenth of a second per pair
PIXELS, JOINT, BALANCED = "pixels, untrained (the release)", "patches and text joint, untrained", "balanced, untrained"
Row = dict[str, float]  # what one compressor showed under one seed


class Pair(NamedTuple):
    image: Path
    words: list[str]
    caption: str


class Setting(NamedTuple):
    """What decides how well a linear map reads new captions: weight of the words out of order, mixed captions."""

    bag: float
    mixed: float

    @classmethod
    def own(cls) -> Setting:
        """The trainer's defaults."""
        return cls(LossWeights().bag, inspect.signature(PerceiverPretrainer).parameters["mixed_captions"].default)

    @classmethod
    def parse(cls, text: str) -> Setting:
        bag, mixed = text.split(":")
        return cls(float(bag), float(mixed))

    @property
    def name(self) -> str:
        return f"balanced, trained, bag {self.bag:g}, mixed {self.mixed:g}"

    @property
    def hidden(self) -> str:
        return f"{self.name}, caption hidden"


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
    pretrainer: PerceiverPretrainer,
    features: dict[Path, Tensor],
    pairs: list[Pair],
    ids: dict[str, int],
    steps: int,
    seed: int,
) -> None:
    optimiser = torch.optim.AdamW(pretrainer.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
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


class Measurement:
    """Pairs to train on and pairs to measure on, with everything that no seed changes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        measured = read_pairs(arguments.measure)
        images = np.random.default_rng(0).permutation(sorted({pair.image for pair in measured}))
        middle = len(images) // 2
        kept_out = set((images[:middle] if arguments.half == 0 else images[middle:]).tolist())
        training = [pair for pair in measured if pair.image not in kept_out]
        training += [pair for source in arguments.train for pair in read_pairs(source)]
        self.training = [pair for pair in training if pair.words]
        self.held_out = [pair for pair in measured if pair.image in kept_out and pair.words]
        extract = (
            VisionTower(arguments.vision)
            if arguments.vision
            else PrincipalComponents(sorted({pair.image for pair in self.training})[:400])
        )
        self.features = {path: extract(path) for path in {pair.image for pair in [*self.training, *self.held_out]}}
        words = sorted({word for pair in self.training for word in pair.words})
        self.ids = {word: index for index, word in enumerate(["<unknown>", *words])}
        self.steps = arguments.steps
        sample = self.training[:: max(1, len(self.training) // 128)]
        self.sample = torch.stack([self.features[pair.image] for pair in sample])

    def records(self) -> list[CompressorRecord]:
        return [
            CompressorRecord(
                self.features[pair.image],
                torch.tensor([self.ids.get(word, 0) for word in pair.words]),
                pair.words,
                None,
                str(pair.image),
            )
            for pair in self.held_out
        ]

    def untrained(self, fusion: Literal["joint", "balanced"], seed: int) -> PerceiverCompressor:
        width = self.sample.shape[2]
        compressor = PerceiverCompressor(width, vocab_size=len(self.ids), fusion=fusion, seed=seed).eval()
        compressor.fit_image_scale(self.sample)
        return compressor

    def trained(self, setting: Setting, seed: int) -> PerceiverCompressor:
        compressor = self.untrained("balanced", seed)
        pretrainer = PerceiverPretrainer(
            compressor,
            loss_weights=LossWeights(bag=setting.bag),
            mixed_captions=setting.mixed,
            num_patches=64,
            seed=seed,
        )
        torch.manual_seed(seed)
        train(pretrainer.train(), self.features, self.training, self.ids, self.steps, seed)
        return compressor.eval()

    def pixels(self, seed: int) -> Row:
        folded = FoldedPixelPerceiver(PixelPerceiver(seed=seed))
        seen = {path: pixels(path, 384) for path in {pair.image for pair in self.held_out}}
        records = [
            record._replace(image=seen[pair.image], text=caption_bytes([pair.caption])[0][0], patches=record.image)
            for record, pair in zip(self.records()[:MAX_PIXEL_RECORDS], self.held_out, strict=False)
        ]
        return flat(compressor_diagnostics(folded, records, batch_size=4, seed=seed))

    def row(self, compressor: PerceiverCompressor, seed: int, *, hide: bool = False) -> Row:
        def values(image: Tensor, text: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
            return compressor(image, text, mask, torch.zeros_like(kept) if hide else kept)

        whole = flat(compressor_diagnostics(values, self.records(), seed=seed))
        few = flat(compressor_diagnostics(values, self.records()[:FEW], seed=seed))
        return whole | {f"few {name}": number for name, number in few.items()}


def flat(measured: CompressorDiagnostics) -> Row:
    fields = {name: value for name, value in measured._asdict().items() if name != "storage"}
    stored = {f"{form} recovery": value.word_recovery for form, value in measured.storage.items()}
    return fields | stored | {f"{form} bytes": value.bytes_per_item for form, value in measured.storage.items()}


def measure(arguments: argparse.Namespace) -> dict[str, list[Row]]:
    """Rows of every compressor, one per seed; those in the results file are not measured again."""
    made_with = f"{arguments.measure} {arguments.train} {arguments.vision} {arguments.steps} {arguments.half}"
    known: dict[tuple[str, int], Row] = {}
    if arguments.results and arguments.results.exists():
        lines = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        known = {(line["name"], line["seed"]): line["row"] for line in lines if line["made_with"] == made_with}
    data = Measurement(arguments)
    print(f"{len(data.training)} pairs train, {len(data.held_out)} measure; {len(data.ids)} words", flush=True)

    def once(name: str, seed: int, compute: Callable[[], Row]) -> None:
        if (name, seed) not in known:
            known[name, seed] = compute()
            if arguments.results:
                with arguments.results.open("a") as file:
                    line = {"made_with": made_with, "name": name, "seed": seed, "row": known[name, seed]}
                    file.write(json.dumps(line) + "\n")

    for seed in arguments.seeds:
        if seed == arguments.seeds[0] and not arguments.no_pixels:
            once(PIXELS, seed, lambda seed=seed: data.pixels(seed))
        once(JOINT, seed, lambda seed=seed: data.row(data.untrained("joint", seed), seed))
        once(BALANCED, seed, lambda seed=seed: data.row(data.untrained("balanced", seed), seed))
        for setting in arguments.setting:
            if (setting.hidden, seed) not in known:
                print(f"training: {setting.name}, seed {seed}", flush=True)
                compressor = data.trained(setting, seed)
                once(setting.name, seed, lambda c=compressor, seed=seed: data.row(c, seed))
                once(setting.hidden, seed, lambda c=compressor, seed=seed: data.row(c, seed, hide=True))
    names = [JOINT, BALANCED, *(name for setting in arguments.setting for name in (setting.name, setting.hidden))]
    names = names if arguments.no_pixels else [PIXELS, *names]
    return {name: [known[name, seed] for seed in arguments.seeds if (name, seed) in known] for name in names}


def mean(rows: list[Row], column: str) -> float:
    return float(np.mean([row[column] for row in rows]))


def spread(rows: list[Row], column: str) -> str:
    """The mean, and the range where there is more than one seed."""
    numbers = [row[column] for row in rows]
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    return f"{np.mean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"


def show(table: dict[str, list[Row]], trained: list[str]) -> None:
    print(
        "\n| compressor | image moves value | caption moves value | shared energy | effective rank "
        "| word recovery (AUC) | words found | patch R2 |"
    )
    print("| --- " * 8 + "|")
    for name, rows in table.items():
        print(
            f"| {name} | {mean(rows, 'image_sensitivity'):.1e} | {mean(rows, 'caption_sensitivity'):.1e} "
            f"| {mean(rows, 'shared_energy'):.3f} | {mean(rows, 'effective_rank'):.1f} "
            f"| {spread(rows, 'word_recovery')} | {spread(rows, 'words_found')} | {mean(rows, 'patch_recovery'):.3f} |"
        )
    asked = table[BALANCED]
    print(
        f"\n{mean(asked, 'num_words'):.0f} words asked of {mean(asked, 'num_records'):.0f} pairs; who knows only which "
        f"words are common finds {mean(asked, 'words_found_by_frequency'):.3f}"
    )
    names = [JOINT, BALANCED, *trained]
    print(f"\nword recovery (AUC) by what is stored\n\n| stored as | bytes per item | {' | '.join(names)} |")
    print("| --- " * (2 + len(names)) + "|")
    for form in ("fp32", "fp16", "int8", "int8 uncentred"):
        recovered = " | ".join(f"{mean(table[name], f'{form} recovery'):.3f}" for name in names)
        print(f"| {form} | {asked[0][f'{form} bytes']:.0f} | {recovered} |")
    print(f"\nfrom few examples: {FEW} pairs, half of which train the probe\n")
    print(f"| | {' | '.join(names)} |\n" + "| --- " * (1 + len(names)) + "|")
    for column, title in (("few word_recovery", "word recovery (AUC)"), ("few words_found", "words found")):
        print(f"| {title} | {' | '.join(spread(table[name], column) for name in names)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", required=True, metavar="JSON:IMAGES", help="pairs to measure on, and half to train on"
    )
    parser.add_argument("--train", action="append", default=[], metavar="JSON:IMAGES", help="more pairs to train on")
    parser.add_argument("--half", type=int, choices=(0, 1), default=0, help="of the images, which half measures")
    parser.add_argument("--vision", help="folder of a vision tower; principal components without it")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--setting", action="append", type=Setting.parse, metavar="BAG:MIXED", help="to train with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--no-pixels", action="store_true", help="leave the release's encoder out, which is slow")
    parser.add_argument("--results", type=Path, help="JSON lines that are added to, and not computed again")
    arguments = parser.parse_args()
    arguments.setting = arguments.setting or [Setting.own()]
    show(measure(arguments), [setting.name for setting in arguments.setting])


if __name__ == "__main__":
    main()
