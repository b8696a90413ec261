r"""The paper's ablations, and those it lacks, on scenes of handwritten digits: every cell with seeds and intervals.

    python examples/ablations.py                        # all tables, 3 seeds; runs/ablations/*.csv and *.png
    python examples/ablations.py --only bank_size top_k --seeds 5

Tower, language model and data are the quickstart's; each cell trains the connectors once per seed, from the same seed
and on the same batches, and is measured on held-out scenes of other handwriting. Tables: `arms` (the controls),
`bank_size` (the paper's Table 5), `encoder` (Table 6: which vision encoder made the bank), `top_k` (Table 7), `key`
(what entries are found by), `value` (what they hold) and `exclusion` (may a sample retrieve itself in training).

A finished cell is kept in OUTPUT/cells.jsonl and not run again: after a kill, give the same command. Another setting of
the constants below, or other parts, are other cells. Expect `bank` about a fifth under the baseline in `arms`, and its
controls near the baseline (seed 0); the other tables have not been run at full size yet.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from tinyalign.data import DigitScenes, Sample
from tinyalign.memory import (
    AttentionPooledKey,
    FingerprintMismatch,
    KeyTransform,
    MemoryBank,
    SentenceTransformerKey,
)
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignVLM
from tinyalign.models.digit_parts import DigitParts, DigitRecipe, load_digit_parts
from tinyalign.models.frozen import (
    FoundNeighbours,
    FrozenSamples,
    compress_samples,
    find_neighbours,
    freeze_samples,
    frozen_bank,
)
from tinyalign.models.frozen_training import fit_compressor, fit_frozen, score_frozen
from tinyalign.perceiver import (
    FoldedPixelPerceiver,
    LossWeights,
    PerceiverCompressor,
    PerceiverPretrainer,
    PerceiverSizes,
    PixelPerceiver,
    caption_bytes,
)
from tinyalign.perceiver.encoder import PerceiverEncoder
from tinyalign.perceiver.pixels import TOKEN_CHANNELS
from tinyalign.theory import NLLTable, delta_emi
from tinyalign.theory.intervals import ratio_interval

BANK, TRAIN, HELDOUT = 8000, 512, 400  # scenes; no handwriting is shared between the three
STEPS, BATCH, RATE = 120, 16, 2e-3
COMPRESSOR_STEPS = 300
SIZES = PerceiverSizes(token_dim=64, num_latents=8, latent_dim=64, num_self_attends=2, num_heads=4)
ALPHA = 0.4
OTHER_TOWER = {"seed": 1, "tower_steps": 800, "language_steps": 1}  # only its tower is used
FULL = -1  # the whole bank
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


METHOD, BASELINE = Cell(), Cell(arm="off")
TABLES: dict[str, tuple[str, dict[str, Cell]]] = {
    "arms": (
        "The method and its controls",
        {
            "off (baseline)": BASELINE,
            "bank": METHOD,
            "shuffled": Cell(arm="shuffled"),
            "random": Cell(arm="random"),
            "constant": Cell(arm="constant"),
            "prompt": Cell(arm="prompt"),
        },
    ),
    "bank_size": (
        "Bank size (the paper's Table 5)",
        {"500": Cell(entries=500), "2000": Cell(entries=2000), "8000": METHOD, "no bank": BASELINE},
    ),
    "encoder": (
        "Which encoder made the bank (the paper's Table 6)",
        {
            "A asks A": METHOD,
            "A, no bank": BASELINE,
            "B, no bank": Cell(arm="off", tower="B", bank_tower="B"),
            "B asks B": Cell(tower="B", bank_tower="B"),
            "B asks A, forced": Cell(tower="B"),
            "B, random of A": Cell(arm="random", tower="B"),
        },
    ),
    "top_k": (
        "Neighbours K (the paper's Table 7)",
        {
            "K=1": Cell(k=1),
            "K=1, prompt": Cell(arm="prompt", k=1),
            "K=5": METHOD,
            "K=5, prompt": Cell(arm="prompt"),
            "K=5, pooled to 8": Cell(pooled=8),
            "K=10": Cell(k=10),
            "K=10, prompt": Cell(arm="prompt", k=10),
        },
    ),
    "key": (
        "What entries are found by",
        {
            "image": METHOD,
            "image, plain mean": Cell(key="mean"),
            "image, centred": Cell(key="centred"),
            "image + text (the paper's)": Cell(key="paper"),
            "text alone": Cell(key="text"),
        },
    ),
    "value": (
        "What entries hold",
        {
            "pixels, untrained (the paper's)": Cell(value="pixels"),
            "patches, untrained": Cell(value="joint"),
            "balanced, untrained": Cell(value="balanced"),
            "balanced, trained": METHOD,
        },
    ),
    "exclusion": (
        "May a training sample retrieve itself",
        {
            "other pairs in the bank": METHOD,
            "own pairs too, excluded": Cell(own_pairs=True),
            "own pairs too, not excluded": Cell(arm="self", own_pairs=True),
            "no bank": BASELINE,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=tuple(TABLES), help="some of the tables")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-most", type=int, help="stop after that many new cells; the next call goes on")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, proves nothing")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    recipe = DigitRecipe()
    if args.smoke:
        recipe = shrink()
        args.seeds = 1
    args.output.mkdir(parents=True, exist_ok=True)
    results, left = run(args, recipe)
    if left:
        console.print(f"{left} cells are left: give the command again ({time.process_time():.0f} s of processor time)")
        return
    for name in args.only:
        title, cells = TABLES[name]
        rows = [summarise(label, cell, results, args.seeds) for label, cell in cells.items()]
        write_csv(args.output / f"{name}.csv", rows)
        draw(args.output / f"{name}.png", title, rows)
        (args.output / f"{name}.md").write_text(as_markdown(rows), encoding="utf-8")
        console.print(as_table(title, rows, args.seeds))
    console.print(
        f"{time.perf_counter() - started:.0f} s, of which {time.process_time():.0f} s of processor time, with "
        f"{torch.get_num_threads()} threads; see {args.output}"
    )


def run(args: argparse.Namespace, recipe: DigitRecipe) -> tuple[dict[tuple[Cell, int], dict], int]:
    """Run the cells that the tables need and that were not run before; return all, and how many are left."""
    names, seeds, path = args.only, args.seeds, args.output / "cells.jsonl"
    parts = {"A": load_digit_parts(recipe)}
    wanted = list(dict.fromkeys([BASELINE, *(cell for name in names for cell in TABLES[name][1].values())]))
    setting = fingerprint_of(parts["A"])
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = {(Cell(**line["cell"]), line["seed"]): line for line in lines if line["setting"] == setting}
    allowed = len(wanted) * seeds if args.at_most is None else args.at_most
    left = 0
    for seed in range(seeds):
        missing = [cell for cell in wanted if (cell, seed) not in kept]
        missing, later = missing[:allowed], missing[allowed:]
        allowed, left = allowed - len(missing), left + len(later)
        if not missing:
            continue
        needed = sorted({name for cell in missing for name in (cell.tower, cell.bank_tower)})
        if "B" in needed and "B" not in parts:
            parts["B"] = load_digit_parts(DigitRecipe(**{**vars(recipe), **OTHER_TOWER}))
        folder = args.output / f"compressors-{setting}-{seed}"
        worlds = {name: World(parts[name], parts["A"].language_model, seed, folder / name) for name in needed}
        for at, cell in enumerate(missing):
            started = time.perf_counter()
            line = {"setting": setting, "cell": cell._asdict(), "seed": seed, **run_cell(cell, worlds, seed)}
            line["seconds"] = time.perf_counter() - started
            kept[cell, seed] = line
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            said = f"seed {seed}, cell {at + 1} of {len(missing)}: {name_of(cell)} {line['heldout_ce']:.3f}"
            console.print(f"{said}, {line['seconds']:.0f} s", style="dim")
    return {key: kept[key] for key in kept if key[1] < seeds}, left


def name_of(cell: Cell) -> str:
    """The table and label under which a cell first appears."""
    return next(f"{name}/{label}" for name, (_, cells) in TABLES.items() for label in cells if cells[label] == cell)


def fingerprint_of(parts: DigitParts) -> str:
    """Name the constants and the parts that a cell was run with."""
    weights = [*parts.vision_tower.state_dict().values(), *parts.language_model.state_dict().values()]
    said = [BANK, TRAIN, HELDOUT, STEPS, BATCH, RATE, COMPRESSOR_STEPS, SIZES, ALPHA, OTHER_TOWER]
    sums = [float(weight.double().abs().sum()) for weight in weights]
    return hashlib.sha256(json.dumps([said, sums]).encode()).hexdigest()[:12]


class World:
    """What one tower makes of one seed's scenes; banks are built when a cell first asks for them."""

    def __init__(self, parts: DigitParts, language_model: nn.Module, seed: int, folder: Path) -> None:
        self.parts, self.language_model, self.seed, self.folder = parts, language_model, seed, folder
        self.encode = self.encoder_of(self.compressor("balanced"))
        sizes = {"memory": BANK, "train": TRAIN, "heldout": HELDOUT}
        self.split = {
            name: freeze_samples(DigitScenes(name, count, seed=seed), self.encode) for name, count in sizes.items()
        }
        self._values: dict[str, dict[str, Tensor]] = {}

    def compressor(self, fusion: Any) -> PerceiverCompressor:
        width, words = self.parts.vision_tower.config.hidden_size, len(self.parts.tokenizer)
        compressor = PerceiverCompressor(width, vocab_size=words, sizes=SIZES, fusion=fusion, seed=self.seed)
        return compressor.requires_grad_(False).eval()

    def encoder_of(self, compressor: nn.Module) -> SampleEncoder:
        pair = PairEncoder(self.parts.vision_tower, compressor, AttentionPooledKey(ALPHA))
        return SampleEncoder(pair, self.parts.image_processor, self.parts.tokenizer)

    def values(self, kind: str) -> dict[str, Tensor]:
        """Latents of the pairs of bank and training split."""
        if kind not in self._values:
            both = {name: self.split[name] for name in ("memory", "train")}
            if kind == "pixels":
                made = {name: self.pixel_values(part) for name, part in both.items()}
            else:
                if kind == "trained":
                    encode = self.encoder_of(self.trained_compressor())
                else:
                    encode = self.encoder_of(self.compressor(kind))
                    encode.encoder.compressor.fit_image_scale(both["memory"].features[:256])
                made = {name: compress_samples(part, encode) for name, part in both.items()}
            self._values[kind] = made
        return self._values[kind]

    def trained_compressor(self) -> PerceiverCompressor:
        """Trained on the bank's pairs once per seed, and kept beside the cells."""
        if not (self.folder / "config.json").exists():
            compressor = self.compressor("balanced").requires_grad_(True)
            pretrainer = PerceiverPretrainer(
                compressor,
                loss_weights=LossWeights(image=0.1, bag=0.3),
                mixed_captions=0.0,
                hidden_dim=64,
                seed=self.seed,
            )
            encode = self.encoder_of(compressor)
            fit_compressor(pretrainer, self.split["memory"], encode, steps=COMPRESSOR_STEPS, seed=self.seed)
            compressor.save_pretrained(self.folder)
        return PerceiverCompressor.from_pretrained(self.folder).requires_grad_(False).eval()

    def pixel_values(self, part: FrozenSamples) -> Tensor:
        """The paper's value as its release makes it: an untrained Perceiver over raw pixels and caption bytes."""
        inner = PerceiverEncoder(
            TOKEN_CHANNELS,
            num_latents=SIZES.num_latents,
            latent_dim=SIZES.latent_dim,
            num_self_attends=SIZES.num_self_attends,
            num_heads=SIZES.num_heads,
            qk_channels=SIZES.latent_dim,
            v_channels=SIZES.latent_dim,
        )
        perceiver = PixelPerceiver(inner, image_size=32, vocab_size=262, seed=self.seed)
        folded = FoldedPixelPerceiver(perceiver)  # the same values, faster
        found = []
        for at in range(0, len(part), 100):
            samples = part.samples[at : at + 100]
            pixels = self.parts.image_processor(images=[s.images[0] for s in samples], return_tensors="pt")
            text, mask = caption_bytes([sample.turns[1].text for sample in samples])
            with torch.no_grad():
                found.append(folded(pixels["pixel_values"], text, mask))
        return torch.cat(found)

    def keys(self, kind: str) -> tuple[Callable[[FrozenSamples], Tensor], Callable[[FrozenSamples], Tensor], bool]:
        """How a bank's entries are keyed, how samples ask, and whether keys are centred."""
        if kind == "mean":
            pooled = lambda part: part.features.mean(dim=1)[part.image_of]  # noqa: E731
            return pooled, pooled, False
        if kind == "paper":
            return self.image_and_text("caption"), self.image_and_text("instruction"), False
        if kind == "text":
            encoder = sentence_encoder(self.parts, self.language_model.get_input_embeddings().weight)
            return (
                lambda part: encoder.keys([sample.turns[1].text for sample in part.samples]),
                lambda part: encoder.queries([instruction_of(sample) for sample in part.samples]),
                False,
            )
        own = lambda part: part.queries[part.image_of]  # noqa: E731
        return own, own, kind == "centred"

    def image_and_text(self, said: str) -> Callable[[FrozenSamples], Tensor]:
        """The paper's key of image and text, from frozen features in the language model's width.

        An entry reads its caption. A query reads the instruction, all that is known before the answer. Image features
        reach the width by a fixed map that keeps angles, where the release has a connector that is still learning.
        """
        words = self.language_model.get_input_embeddings().weight
        width = self.parts.vision_tower.config.hidden_size
        turn = torch.linalg.qr(torch.randn(words.shape[1], width, generator=torch.Generator().manual_seed(0)))[0]
        pool = AttentionPooledKey(ALPHA)

        def keys(part: FrozenSamples) -> Tensor:
            texts = [sample.turns[1].text if said == "caption" else instruction_of(sample) for sample in part.samples]
            ids, mask = self.encode.tokens(texts)
            with torch.no_grad():
                return pool(part.features[part.image_of] @ turn.T, F.embedding(ids, words), text_mask=mask)

        return keys

    def bank(self, cell: Cell) -> MemoryBank:
        """The bank of a cell, made by this tower."""
        entry_keys, _, centred = self.keys(cell.key)
        memory, values = self.split["memory"], self.values(cell.value)
        if cell.entries != FULL:
            some = torch.randperm(len(memory), generator=torch.Generator().manual_seed(self.seed))[: cell.entries]
            memory, values = memory.take(some), {**values, "memory": values["memory"][some]}
        keys = entry_keys(memory)
        fit = KeyTransform.fit(keys) if centred else None
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
    model = TinyAlignVLM.from_parts(
        world.parts.vision_tower,
        copy.deepcopy(world.language_model),
        tokenizer=world.parts.tokenizer,
        num_latents=SIZES.num_latents,
        latent_dim=SIZES.latent_dim,
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
        _, ask, _ = world.keys(cell.key)
        # A held-out sample is in no bank, so that it asks as usual where training samples found themselves.
        arms = (cell.arm, "bank" if cell.arm == "self" else cell.arm)
        found = [
            find_neighbours(bank, part, arm=arm, k=cell.k, seed=seed, queries=ask(part))
            for part, arm in zip((train, heldout), arms, strict=True)
        ]
        extra["recall"] = recall(heldout, found[1])
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


def recall(part: FrozenSamples, found: FoundNeighbours | None) -> float:
    """Share of samples one of whose neighbours has the very same caption."""
    assert found is not None
    texts = [{note["text"] for note in found.memory.metadata(row[row >= 0])} for row in found.neighbours.ids]
    return float(np.mean([sample.turns[1].text in row for sample, row in zip(part.samples, texts, strict=True)]))


def summarise(label: str, cell: Cell, results: dict[tuple[Cell, int], dict], seeds: int) -> dict:
    """One row: means over seeds, and what the cell gains on the baseline of its seed, with both kinds of interval.

    `gain_low` to `gain_high` is Student's t over seeds: new runs on new data. `records_low` to `records_high` is over
    the held-out scenes of these runs. Gains are in nats per caption: positive means under the baseline.
    """
    runs = [results[cell, seed] for seed in range(seeds)]
    base = [results[BASELINE, seed] for seed in range(seeds)]
    ce = over_seeds([run["heldout_ce"] for run in runs])
    gain = over_seeds([delta_emi(table_of([b]), table_of([r])).value for b, r in zip(base, runs, strict=True)])
    pooled = delta_emi(table_of(base), table_of(runs))
    row = {
        "cell": label,
        "heldout_ce": ce[0],
        "heldout_ce_low": ce[1],
        "heldout_ce_high": ce[2],
        "train_ce": float(np.mean([run["train_ce"] for run in runs])),
        "relative": float(np.mean([r["heldout_ce"] / b["heldout_ce"] - 1 for b, r in zip(base, runs, strict=True)])),
        "gain": gain[0],
        "gain_low": gain[1],
        "gain_high": gain[2],
        "records_low": pooled.low,
        "records_high": pooled.high,
        "records_half_width": (pooled.high - pooled.low) / 2 / float(np.mean(runs[0]["tokens"])),
        "recall": float(np.mean([run.get("recall", np.nan) for run in runs])),
        "exact_captions": float(np.mean([run["exact_captions"] for run in runs])),
        "seeds": seeds,
    }
    return {**row, **{f"heldout_ce_seed_{seed}": run["heldout_ce"] for seed, run in enumerate(runs)}}


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    found = ratio_interval(np.array(values), np.ones(len(values)), np.arange(len(values)), method="t")
    return found.value, found.low, found.high


def table_of(runs: Sequence[dict]) -> NLLTable:
    """The held-out scenes of several seeds; each seed draws scenes of its own."""
    nll, tokens = (np.concatenate([run[name] for run in runs]) for name in ("nll", "tokens"))
    return NLLTable(nll, tokens)


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_table(title: str, rows: list[dict], seeds: int) -> Table:
    table = Table(title=f"{title}: seeds 0 to {seeds - 1}, 95 % intervals")
    for column in ("cell", "held-out CE", "over seeds", "to baseline", "gain, nats/caption", "recall", "training CE"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    for row in rows:
        table.add_row(
            row["cell"],
            f"{row['heldout_ce']:.3f}",
            f"[{row['heldout_ce_low']:.3f}, {row['heldout_ce_high']:.3f}]",
            f"{row['relative']:+.1%}",
            f"{row['gain']:+.2f} [{row['gain_low']:+.2f}, {row['gain_high']:+.2f}]",
            "" if np.isnan(row["recall"]) else f"{row['recall']:.2f}",
            f"{row['train_ce']:.3f}",
        )
    return table


def as_markdown(rows: list[dict]) -> str:
    """The table as it goes into the documentation."""
    seeds = range(rows[0]["seeds"])
    lines = [
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | to baseline | gain, nats per caption | recall |"
    ]
    lines.append("| --- |" + " --- |" * (len(seeds) + 3))
    for row in rows:
        runs = " | ".join(f"{row[f'heldout_ce_seed_{seed}']:.3f}" for seed in seeds)
        gain = f"{row['gain']:+.2f} [{row['records_low']:+.2f}, {row['records_high']:+.2f}]"
        found = "" if np.isnan(row["recall"]) else f"{row['recall']:.2f}"
        lines.append(f"| {row['cell']} | {runs} | {row['relative']:+.1%} | {gain} | {found} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, title: str, rows: list[dict]) -> None:
    """Held-out cross-entropy per cell. Readable on light and on dark pages.

    A dot per seed, a bar at the mean, and a line for the paired difference to the baseline: its interval over scenes.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    grey = "#808080"
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(rows) + 1.1), layout="constrained", dpi=130)
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        seeds = [value for name, value in row.items() if name.startswith("heldout_ce_seed_")]
        colour = "#2a9d6f" if row["gain"] > 0 else "#d1495b" if row["gain"] < 0 else grey
        half = row["records_half_width"]
        axes.plot([row["heldout_ce"] - half, row["heldout_ce"] + half], [place, place], color=colour, lw=1)
        axes.plot(seeds, [place] * len(seeds), "o", color=colour, ms=5, alpha=0.6, mew=0)
        axes.plot([row["heldout_ce"]] * 2, [place - 0.28, place + 0.28], color=colour, lw=3)
        axes.annotate(f"{row['relative']:+.1%}", (1.01, place), xycoords=("axes fraction", "data"), va="center",
                      color=grey, fontsize=8)  # fmt: skip
    base = rows[0]["heldout_ce"] / (1 + rows[0]["relative"])
    axes.axvline(base, color=grey, ls=":", lw=1)
    axes.set_yticks(places, [row["cell"] for row in rows])
    said = "held-out nats per token (dots: seeds; line: 95 %, paired with the baseline)"
    axes.set_xlabel(said, color=grey, fontsize=9)
    axes.set_title(title, color=grey, loc="left", fontsize=11)
    axes.tick_params(colors=grey)
    axes.grid(axis="x", color=grey, alpha=0.25, lw=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(grey)
    figure.savefig(path, transparent=True)
    plt.close(figure)


def shrink() -> DigitRecipe:
    """Sizes that show in seconds that every table runs."""
    global BANK, TRAIN, HELDOUT, STEPS, COMPRESSOR_STEPS
    BANK, TRAIN, HELDOUT, STEPS, COMPRESSOR_STEPS = 300, 64, 20, 2, 5
    OTHER_TOWER["tower_steps"] = 5
    return DigitRecipe(tower_steps=5, language_steps=5, batch_size=16, num_scenes=64, hidden_dim=48)


if __name__ == "__main__":
    main()
