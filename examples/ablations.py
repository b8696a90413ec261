r"""The paper's ablations, and those it lacks, on scenes of handwritten digits: every cell with seeds and intervals.

    python examples/ablations.py                        # all tables, 3 seeds; runs/ablations/*.csv and *.png
    python examples/ablations.py --only bank_size top_k --seeds 5

Tower, language model and data are the quickstart's; each cell trains the connectors once per seed, from the same seed
and on the same batches, and is measured on held-out scenes of other handwriting. Tables: `arms` (the controls),
`bank_size` (the paper's Table 5), `encoder` (Table 6: which vision encoder made the bank), `top_k` (Table 7), `key`
(what entries are found by), `value` (what they hold), `exclusion` (may a sample retrieve itself in training) and
`reader` (how well the language model reads, and how many pairs the connectors have).

A finished cell is kept in OUTPUT/cells.jsonl and not run again after a kill, unless constants below or parts changed.
Expect `bank` a fifth under the baseline in `arms`, and its controls near it; docs/explanation/what-reproduces.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn
from torch.nn import functional as F

from tinyalign.data import DigitScenes, Sample
from tinyalign.evaluation import ArmRow, KeptRuns, compare_seeds, markdown_table, plot_arms, setting_name, write_csv
from tinyalign.memory import AttentionPooledKey, FingerprintMismatch, KeyTransform, MemoryBank, SentenceTransformerKey
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignVLM
from tinyalign.models.digit_parts import DigitParts, DigitRecipe, load_binding_reader, load_digit_parts
from tinyalign.models.frozen import (
    FoundNeighbours,
    FrozenSamples,
    caption_recall,
    compress_samples,
    find_neighbours,
    freeze_samples,
    frozen_bank,
    pixel_latents,
)
from tinyalign.models.frozen_training import SMALL_SIZES, fit_frozen, fit_small_compressor, score_frozen
from tinyalign.perceiver import FoldedPixelPerceiver, PerceiverCompressor, PixelPerceiver
from tinyalign.perceiver.encoder import PerceiverEncoder
from tinyalign.perceiver.pixels import TOKEN_CHANNELS
from tinyalign.theory import NLLTable

BANK, TRAIN, HELDOUT = 8000, 512, 400  # scenes; no handwriting is shared between the three
STEPS, BATCH, RATE = 120, 16, 2e-3
COMPRESSOR_STEPS = 300
ALPHA = 0.4
OTHER_TOWER = {"seed": 1, "tower_steps": 800, "language_steps": 1}  # only its tower is used
FULL = -1  # the whole bank, all pairs
TOKENS = 9  # of a caption, its end included
XLABEL = "held-out nats per token (dots: seeds; line: 95 %, paired with the baseline)"
Keys = Callable[[FrozenSamples], Tensor]
console = Console(width=112)


class Cell(NamedTuple):
    """One setting; the defaults are the method as the quickstart runs it."""

    arm: str = "bank"
    k: int = 5
    entries: int = FULL
    key: str = "image"
    value: str = "trained"
    tower: str = "A"  # that the model sees with and asks by
    bank_tower: str = "A"  # that made the bank
    own_pairs: bool = False  # whether the training pairs are in the bank too (and excluded one by one)
    pooled: int | None = None  # retrieval tokens, if pooled to a fixed number
    reader: str = "plain"  # the language model; "binding" also reads which colour is whose
    pairs: int = FULL  # to train on

    def baseline(self) -> Cell:
        """What this cell is compared with."""
        return Cell(arm="off", reader=self.reader, pairs=self.pairs)


METHOD, BASELINE = Cell(), Cell(arm="off")
TABLES: dict[str, tuple[str, dict[str, Cell]]] = {
    "arms": ("The method and its controls", {
        "off (baseline)": BASELINE, "bank": METHOD, "shuffled": Cell(arm="shuffled"), "random": Cell(arm="random"),
        "constant": Cell(arm="constant"), "prompt": Cell(arm="prompt"),
    }),
    "bank_size": ("Bank size (the paper's Table 5)", {
        "500": Cell(entries=500), "2000": Cell(entries=2000), "8000": METHOD, "no bank": BASELINE,
    }),
    "encoder": ("Which encoder made the bank (the paper's Table 6)", {
        "A asks A": METHOD, "A, no bank": BASELINE,
        "B, no bank": Cell(arm="off", tower="B", bank_tower="B"), "B asks B": Cell(tower="B", bank_tower="B"),
        "B asks A, forced": Cell(tower="B"), "B, random of A": Cell(arm="random", tower="B"),
    }),
    "top_k": ("Neighbours K (the paper's Table 7)", {
        "K=1": Cell(k=1), "K=1, prompt": Cell(arm="prompt", k=1),
        "K=5": METHOD, "K=5, prompt": Cell(arm="prompt"), "K=5, pooled to 8": Cell(pooled=8),
        "K=10": Cell(k=10), "K=10, prompt": Cell(arm="prompt", k=10),
    }),
    "key": ("What entries are found by", {
        "image": METHOD, "image, plain mean": Cell(key="mean"), "image, centred": Cell(key="centred"),
        "image + text (the paper's)": Cell(key="paper"), "text alone": Cell(key="text"),
    }),
    "value": ("What entries hold", {
        "pixels, untrained (the paper's)": Cell(value="pixels"), "patches, untrained": Cell(value="joint"),
        "balanced, untrained": Cell(value="balanced"), "balanced, trained": METHOD,
    }),
    "exclusion": ("May a training sample retrieve itself", {
        "other pairs in the bank": METHOD, "own pairs too, excluded": Cell(own_pairs=True),
        "own pairs too, not excluded": Cell(arm="self", own_pairs=True), "no bank": BASELINE,
    }),
    "reader": ("The language model, and how many pairs it is aligned with", {
        f"{reader}, {TRAIN if pairs == FULL else pairs} pairs, {arm}": Cell(arm=arm, reader=reader, pairs=pairs)
        for reader in ("plain", "binding") for pairs in (64, 128, FULL) for arm in ("off", "bank", "shuffled")
    }),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=tuple(TABLES), help="some of the tables")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, proves nothing")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started, recipe = time.perf_counter(), DigitRecipe()
    if args.smoke:
        recipe, args.seeds = shrink(), 1
    args.output.mkdir(parents=True, exist_ok=True)
    kept = run(args, recipe)
    for name in args.only:
        title, cells = TABLES[name]
        found = [summarise(label, cell, kept, args.seeds) for label, cell in cells.items()]
        rows = [row for row, _ in found]
        write_csv(args.output / f"{name}.csv", rows)
        alike = len({cell.baseline() for cell in cells.values()}) == 1
        plot_arms(args.output / f"{name}.png", title, [bar for _, bar in found], xlabel=XLABEL, one_baseline=alike)
        said = markdown_table([in_words(row) for row in rows])
        (args.output / f"{name}.md").write_text(said, encoding="utf-8")
        console.print(f"[bold]{title}[/]: held-out nats per token; intervals over scenes, 95 %", Markdown(said))
    console.print(
        f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of processor time; {args.output}"
    )


def run(args: argparse.Namespace, recipe: DigitRecipe) -> KeptRuns:
    """Run the cells that the tables need and that were not run before; return all."""
    parts = {"A": load_digit_parts(recipe)}
    readers = {"plain": parts["A"].language_model}
    setting = fingerprint_of(parts["A"])
    kept = KeptRuns(args.output / "cells.jsonl", setting, by=("cell", "seed"))
    cells = [cell for name in args.only for cell in TABLES[name][1].values()]
    wanted = dict.fromkeys([*(cell.baseline() for cell in cells), *cells])
    name_of = {cell: f"{name}/{label}" for name in reversed(args.only) for label, cell in TABLES[name][1].items()}
    for seed in range(args.seeds):
        missing = [cell for cell in wanted if not kept.get(cell=cell._asdict(), seed=seed)]
        needed = sorted({name for cell in missing for name in (cell.tower, cell.bank_tower)})
        if "B" in needed and "B" not in parts:
            parts["B"] = load_digit_parts(DigitRecipe(**{**vars(recipe), **OTHER_TOWER}))
        if any(cell.reader == "binding" for cell in missing):
            readers["binding"] = load_binding_reader(recipe)
        folder = args.output / f"compressors-{setting}-{seed}"
        worlds = {name: World(parts[name], readers, seed, folder / name) for name in needed}
        for at, cell in enumerate(missing, start=1):
            started = time.perf_counter()
            found = run_cell(cell, worlds, seed)
            seconds = time.perf_counter() - started
            kept.add({"cell": cell._asdict(), "seed": seed, **found, "seconds": seconds})
            said = f"seed {seed}, cell {at} of {len(missing)}: {name_of.get(cell, 'baseline')}"
            console.print(f"{said} {found['heldout_ce']:.3f}, {seconds:.0f} s", style="dim")
    return kept


def fingerprint_of(parts: DigitParts) -> str:
    """Name the constants and the parts that a cell was run with."""
    weights = [*parts.vision_tower.state_dict().values(), *parts.language_model.state_dict().values()]
    said = [BANK, TRAIN, HELDOUT, STEPS, BATCH, RATE, COMPRESSOR_STEPS, SMALL_SIZES, ALPHA, OTHER_TOWER]
    sums = [float(weight.double().abs().sum()) for weight in weights]
    return setting_name([said, sums])


class World:
    """What one tower makes of one seed's scenes; banks are built when a cell first asks for them."""

    def __init__(self, parts: DigitParts, readers: dict[str, nn.Module], seed: int, folder: Path) -> None:
        self.parts, self.readers, self.seed, self.folder = parts, readers, seed, folder
        self.words = readers["plain"].get_input_embeddings().weight
        self.encode = self.encoder_of(self.compressor("balanced"))
        sizes = {"memory": BANK, "train": TRAIN, "heldout": HELDOUT}
        self.split = {
            name: freeze_samples(DigitScenes(name, count, seed=seed), self.encode) for name, count in sizes.items()
        }
        self._values: dict[str, dict[str, Tensor]] = {}

    def compressor(self, fusion: Any) -> PerceiverCompressor:
        width, words = self.parts.vision_tower.config.hidden_size, len(self.parts.tokenizer)
        compressor = PerceiverCompressor(width, vocab_size=words, sizes=SMALL_SIZES, fusion=fusion, seed=self.seed)
        return compressor.requires_grad_(False).eval()

    def encoder_of(self, compressor: nn.Module) -> SampleEncoder:
        pair = PairEncoder(self.parts.vision_tower, compressor, AttentionPooledKey(ALPHA))
        return SampleEncoder(pair, self.parts.image_processor, self.parts.tokenizer)

    def values(self, kind: str) -> dict[str, Tensor]:
        """Latents of the pairs of bank and training split."""
        if kind not in self._values:
            both = {name: self.split[name] for name in ("memory", "train")}
            if kind == "pixels":
                pixels = self.pixel_perceiver()  # the same values as unfolded, faster
                made = {n: pixel_latents(part, pixels, self.parts.image_processor) for n, part in both.items()}
            else:
                encode = self.encoder_of(self.trained_compressor() if kind == "trained" else self.compressor(kind))
                if kind != "trained":
                    encode.encoder.compressor.fit_image_scale(both["memory"].features[:256])
                made = {name: compress_samples(part, encode) for name, part in both.items()}
            self._values[kind] = made
        return self._values[kind]

    def trained_compressor(self) -> PerceiverCompressor:
        """Trained on the bank's pairs once per seed, and kept beside the cells."""
        if not (self.folder / "config.json").exists():
            encode = self.encoder_of(self.compressor("balanced"))
            fit_small_compressor(encode, self.split["memory"], steps=COMPRESSOR_STEPS, seed=self.seed)
            encode.encoder.compressor.save_pretrained(self.folder)
        return PerceiverCompressor.from_pretrained(self.folder).requires_grad_(False).eval()

    def pixel_perceiver(self) -> FoldedPixelPerceiver:
        """The paper's value as its release makes it: an untrained Perceiver over raw pixels and caption bytes."""
        sizes, width = SMALL_SIZES, SMALL_SIZES.latent_dim
        inner = PerceiverEncoder(
            TOKEN_CHANNELS, sizes.num_latents, width, sizes.num_self_attends, 1, sizes.num_heads, width, width
        )
        pixels = PixelPerceiver(inner, image_size=32, vocab_size=262)
        pixels.reset_parameters(self.seed)
        return FoldedPixelPerceiver(pixels)

    def keys(self, kind: str) -> tuple[Keys, Keys]:
        """How a bank's entries are keyed, and how samples ask."""
        if kind == "paper":
            return self.image_and_text("caption"), self.image_and_text("instruction")
        if kind == "text":
            encoder = sentence_encoder(self.parts, self.words)
            return (
                lambda part: encoder.keys([sample.turns[1].text for sample in part.samples]),
                lambda part: encoder.queries([instruction_of(sample) for sample in part.samples]),
            )
        if kind == "mean":
            return (lambda part: part.features.mean(dim=1)[part.image_of],) * 2
        return (lambda part: part.queries[part.image_of],) * 2

    def image_and_text(self, said: str) -> Keys:
        """The paper's key of image and text, from frozen features in the language model's width.

        An entry reads its caption. A query reads the instruction, all that is known before the answer. Image features
        reach the width by a fixed map that keeps angles, where the release has a connector that is still learning.
        """
        width = self.parts.vision_tower.config.hidden_size
        turn = torch.linalg.qr(torch.randn(self.words.shape[1], width, generator=torch.Generator().manual_seed(0)))[0]
        pool = AttentionPooledKey(ALPHA)

        def keys(part: FrozenSamples) -> Tensor:
            texts = [sample.turns[1].text if said == "caption" else instruction_of(sample) for sample in part.samples]
            ids, mask = self.encode.tokens(texts)
            with torch.no_grad():
                return pool(part.features[part.image_of] @ turn.T, F.embedding(ids, self.words), text_mask=mask)

        return keys

    def bank(self, cell: Cell) -> MemoryBank:
        """The bank of a cell, made by this tower."""
        entry_keys, _ = self.keys(cell.key)
        memory, values = self.split["memory"], self.values(cell.value)
        if cell.entries != FULL:
            some = torch.randperm(len(memory), generator=torch.Generator().manual_seed(self.seed))[: cell.entries]
            memory, values = memory.take(some), {**values, "memory": values["memory"][some]}
        keys = entry_keys(memory)
        fit = KeyTransform.fit(keys) if cell.key == "centred" else None
        prints = self.encode.encoder.fingerprint()
        bank = frozen_bank(memory, values["memory"], keys=keys, transform=fit, fingerprint=prints)
        if cell.own_pairs:
            train = self.split["train"]
            notes = [{"text": sample.turns[1].text} for sample in train.samples]
            bank.add(entry_keys(train), values["train"], train.rows["sample_ids"], train.rows["groups"], notes)
        return bank


def instruction_of(sample: Sample) -> str:
    return sample.turns[0].text.replace("<image>", "").strip()


def sentence_encoder(parts: DigitParts, words: Tensor) -> SentenceTransformerKey:
    """A sentence-transformers model built here: the mean of the language model's word vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    module = StaticEmbedding(parts.tokenizer.backend_tokenizer, embedding_weights=words.detach().numpy())
    return SentenceTransformerKey(SentenceTransformer(modules=[module], device="cpu"), batch_size=256)


def run_cell(cell: Cell, worlds: dict[str, World], seed: int) -> dict:
    """Train the connectors once, score the held-out scenes."""
    world, source = worlds[cell.tower], worlds[cell.bank_tower]
    train, heldout = world.split["train"], world.split["heldout"]
    train = train if cell.pairs == FULL else train.take(range(min(cell.pairs, len(train))))
    model = TinyAlignVLM.from_parts(
        world.parts.vision_tower,
        copy.deepcopy(world.readers[cell.reader]),
        tokenizer=world.parts.tokenizer,
        num_latents=SMALL_SIZES.num_latents,
        latent_dim=SMALL_SIZES.latent_dim,
        num_neighbours=cell.k,
        rag_num_tokens=cell.pooled,
        retrieval=cell.arm if cell.arm in ("off", "prompt") else "bank",
        connector_seed=seed,
    ).freeze_for("pretrain")
    found: list[FoundNeighbours | None] = [None, None]
    extra: dict[str, Any] = {}
    if cell.arm not in ("off", "prompt"):
        bank = source.bank(cell)
        if cell.tower != cell.bank_tower:
            extra["refused"] = refusal(model, bank)  # and forced: what is found is handed over below
        _, ask = world.keys(cell.key)
        # A held-out sample is in no bank, so that it asks as usual where training samples found themselves.
        arms = (cell.arm, "bank" if cell.arm == "self" else cell.arm)
        found = [
            find_neighbours(bank, part, arm=arm, k=cell.k, seed=seed, queries=ask(part))
            for part, arm in zip((train, heldout), arms, strict=True)
        ]
        extra["recall"] = caption_recall(heldout, found[1])
    curve = fit_frozen(model, train, found[0], steps=STEPS, rate=RATE, batch_size=BATCH, seed=seed)
    scores = score_frozen(model, heldout, found[1])
    return {
        "train_ce": float(np.mean(curve[-50:])),
        "heldout_ce": scores.per_token,
        "exact_captions": scores.accuracy,
        **extra,
        "nll": [round(nll, 6) for nll in scores.nll.tolist()],
        "tokens": scores.tokens.tolist(),
    }


def refusal(model: TinyAlignVLM, bank: MemoryBank) -> str:
    """What the model says to a bank that another encoder made."""
    try:
        model.memory = bank
    except FingerprintMismatch as error:
        console.print(f"refused, and forced for this cell: {error}", style="yellow")
        return str(error)
    raise RuntimeError("ablations: a bank of another encoder must be refused, and was not. Report this.")


def summarise(label: str, cell: Cell, kept: KeptRuns, seeds: int) -> tuple[dict, ArmRow]:
    """One row and its bar: means over seeds, and the gain on the baseline of each seed, with both kinds of interval.

    `gain_low` to `gain_high` is over seeds: new runs on new data. `records_low` to `records_high` is over the held-out
    scenes of these runs. Gains are in nats per caption: positive means under the baseline.
    """
    runs, base = ([kept.get(cell=one._asdict(), seed=seed) for seed in range(seeds)] for one in (cell, cell.baseline()))
    found = compare_seeds(*([NLLTable(run["nll"], run["tokens"]) for run in part] for part in (runs, base)))
    ce, gain, pooled = found.per_token, found.gain, found.gain_of_samples
    row = {
        "cell": label, "heldout_ce": ce.value, "heldout_ce_low": ce.low, "heldout_ce_high": ce.high,
        "train_ce": float(np.mean([run["train_ce"] for run in runs])), "relative": found.relative,
        "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high,
        "records_low": pooled.low, "records_high": pooled.high,
        "recall": float(np.mean([run.get("recall", np.nan) for run in runs])),
        "exact_captions": float(np.mean([run["exact_captions"] for run in runs])), "seeds": seeds,
    }  # fmt: skip
    values = {f"heldout_ce_seed_{seed}": run["heldout_ce"] for seed, run in enumerate(runs)}
    half_width = (pooled.high - pooled.low) / 2 / TOKENS
    return {**row, **values}, ArmRow(label, tuple(values.values()), half_width, found.relative)


def in_words(row: dict) -> dict[str, str]:
    """A row as it is shown; the gain's interval is over the held-out scenes."""
    return {
        "": row["cell"],
        **{f"seed {seed}": f"{row[f'heldout_ce_seed_{seed}']:.3f}" for seed in range(row["seeds"])},
        "to baseline": f"{row['relative']:+.1%}",
        "gain, nats per caption": f"{row['gain']:+.2f} [{row['records_low']:+.2f}, {row['records_high']:+.2f}]",
        "recall": "" if np.isnan(row["recall"]) else f"{row['recall']:.2f}",
    }


def shrink() -> DigitRecipe:
    """Sizes that show in seconds that every table runs."""
    global BANK, TRAIN, HELDOUT, STEPS, COMPRESSOR_STEPS
    BANK, TRAIN, HELDOUT, STEPS, COMPRESSOR_STEPS = 300, 64, 20, 2, 5
    OTHER_TOWER["tower_steps"] = 5
    return DigitRecipe(tower_steps=5, language_steps=5, batch_size=16, num_scenes=64, hidden_dim=48)


if __name__ == "__main__":
    main()
