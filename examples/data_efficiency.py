r"""Accuracy against the share of instruction data, for the baseline, TinyAlign and controls (the paper's Figures 3, 4).

    python examples/data_efficiency.py                  # scenes of digits, 3 seeds; runs/data-efficiency/
    python examples/data_efficiency.py --data train.json --images images/ --eval eval.json [--vision V --llm L]

As in the paper, stage 1 (connectors) and the bank come from pre-training data, and stage 2 (language model as well)
goes over a growing share of other instruction data once per epoch, from the same seed and in the same order for every
arm. With a LLaVA-format file, half of its images are the pre-training data, each question is a sample of its own, and
the accuracy is exact match on the questions of `--eval`; without `--vision` and `--llm` a small tower and a small
language model are trained on the spot, on the pre-training half.

A finished run is kept in OUTPUT/runs.jsonl and not run again: after a kill, give the same command. The paper says that
40 % of the data are enough to reach the baseline's 100 %. Expect that on easy-VQA but for 0.2 points, with TinyAlign
0.9 to 2.3 points over the baseline at every share, and no difference that three seeds could tell on the digits.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign.data import DigitScenes, LlavaDataset, answers_of, questions_of, write_llava
from tinyalign.evaluation import KeptRuns, over_seeds, page_figure, setting_name, write_csv
from tinyalign.memory import MemoryBank
from tinyalign.models import SampleEncoder, TinyAlignVLM
from tinyalign.models.digit_parts import DigitRecipe, load_binding_reader, load_digit_parts
from tinyalign.models.frozen import FrozenSamples, compress_samples, find_neighbours, freeze_samples, frozen_bank
from tinyalign.models.frozen_training import (
    SMALL_SIZES,
    fit_frozen,
    fit_small_compressor,
    score_frozen,
    small_encoder,
)
from tinyalign.models.word_parts import train_word_parts

ARMS = ("off", "bank", "shuffled")
NAMES = {"off": "baseline", "bank": "TinyAlign"}
SHARES = (0.2, 0.4, 0.6, 1.0)
NEIGHBOURS = 5
COMPRESSOR_STEPS = 600
DIGITS = {"stage_1_steps": 120, "epochs": 1, "batch": 16, "rate_1": 2e-3, "rate_2": 5e-4, "compressor_steps": 300}
DIGIT_SCENES = {"memory": 4000, "train": 2000, "heldout": 800}
LLAVA = {"stage_1_steps": 300, "epochs": 1, "batch": 32, "rate_1": 2e-3, "rate_2": 1e-3}
LLAVA_EVAL = 2000  # questions of the evaluation file, drawn once
PICTURE, TOWER_STEPS, LANGUAGE_STEPS = 32, 600, 1200  # the parts that are trained on the spot
console = Console(width=112)


class Study(NamedTuple):
    """Everything that the runs of one seed share."""

    pretrain: FrozenSamples
    instruct: FrozenSamples
    heldout: FrozenSamples
    bank: MemoryBank
    tower: nn.Module
    language_model: nn.Module
    tokenizer: Any
    settings: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="LLaVA-format JSON with what to train on; digit scenes without")
    parser.add_argument("--images", type=Path, help="folder that the image paths of both files start from")
    parser.add_argument("--eval", type=Path, help="LLaVA-format JSON with the questions to be measured on")
    parser.add_argument("--vision", help="vision tower: a folder or a hub id; trained on the spot without")
    parser.add_argument("--llm", help="causal language model: a folder or a hub id; trained on the spot without")
    parser.add_argument(
        "--binding", action="store_true", help="digits: a language model that also reads which colour is whose"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=("off", "bank", "shuffled", "random", "constant"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/data-efficiency"))
    parser.add_argument("--smoke", action="store_true", help="both kinds of data at tiny sizes: shows that it runs")
    args = parser.parse_args()
    if args.data is not None and (args.images is None or args.eval is None):
        parser.error("--data needs --images and --eval")
    if args.data is not None and args.binding:
        parser.error("--binding is of the digits: it goes without --data")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.smoke:
        args.seeds, args.shares = 1, (0.5, 1.0)
        study(args, shrink())
        folder = Path(tempfile.mkdtemp(prefix="tinyalign-"))
        args.images, args.output = folder / "images", args.output / "llava"
        args.data, args.eval = (
            write_llava(DigitScenes(split, 24, task="question"), folder / f"{split}.json", args.images)
            for split in ("train", "heldout")
        )
    study(args, DigitRecipe())


def study(args: argparse.Namespace, recipe: DigitRecipe) -> None:
    """Run what is missing, then write table and picture."""
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    setting = name_of(args, recipe)
    kept = KeptRuns(args.output / "runs.jsonl", setting, by=("arm", "share", "seed"))
    for seed in range(args.seeds):
        missing = {arm: [s for s in args.shares if not kept.get(arm=arm, share=s, seed=seed)] for arm in args.arms}
        if any(missing.values()):
            shared = digit_study(args, recipe, seed) if args.data is None else llava_study(args, seed, setting)
            for arm, shares in missing.items():
                for run in run_arm(shared, arm, shares, seed) if shares else ():
                    kept.add(run)
    runs = [run for run in kept if run["arm"] in args.arms and run["share"] in args.shares and run["seed"] < args.seeds]
    rows = summarise(runs, args.arms, args.shares, args.seeds)
    write_csv(args.output / "accuracy.csv", rows)
    draw(args.output / "accuracy.png", rows, runs)
    (args.output / "accuracy.md").write_text(as_markdown(rows, args.seeds), encoding="utf-8")
    console.print(as_table(rows, args.seeds))
    for sentence in read_aloud(rows):
        console.print(f"- {sentence}")
    console.print(
        f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of processor time; {args.output}"
    )


def name_of(args: argparse.Namespace, recipe: DigitRecipe) -> str:
    said = [NEIGHBOURS, SMALL_SIZES, COMPRESSOR_STEPS]
    if args.data is None:
        said += [DIGITS, DIGIT_SCENES, vars(recipe), *(["binding"] if args.binding else [])]
    else:
        said += [LLAVA, LLAVA_EVAL, PICTURE, TOWER_STEPS, LANGUAGE_STEPS, args.vision, args.llm]
        said += [args.data.read_text(), args.eval.read_text()]
    return setting_name(said)


# What is studied


def digit_study(args: argparse.Namespace, recipe: DigitRecipe, seed: int) -> Study:
    """Captions of bank scenes for stage 1; one question about each of other scenes for stage 2."""
    parts = load_digit_parts(recipe)
    reader = load_binding_reader(recipe) if args.binding else parts.language_model
    encode = small_encoder(parts.vision_tower, parts.image_processor, parts.tokenizer, seed=seed)
    pretrain = freeze_samples(DigitScenes("memory", DIGIT_SCENES["memory"], seed=seed), encode)
    asked = [
        freeze_samples(DigitScenes(split, DIGIT_SCENES[split], seed=seed, task="question").one_each(), encode)
        for split in ("train", "heldout")
    ]
    bank = fill_bank(pretrain, encode, seed, min(COMPRESSOR_STEPS, DIGITS["compressor_steps"]))
    return Study(pretrain, asked[0], asked[1], bank, parts.vision_tower, reader, parts.tokenizer, DIGITS)


def llava_study(args: argparse.Namespace, seed: int, setting: str) -> Study:
    """Half of the images for parts, stage 1 and bank; questions about the other half for stage 2."""
    records = LlavaDataset(args.data, args.images)
    groups = sorted({sample.group for sample in records})
    order = np.random.default_rng(0).permutation(len(groups)).tolist()
    pretraining = {groups[i] for i in order[: len(groups) // 2]}
    known = [sample for sample in records if sample.group in pretraining]
    other = [turn for sample in records if sample.group not in pretraining for turn in questions_of(sample)]
    heldout = [turn for sample in LlavaDataset(args.eval, args.images) for turn in questions_of(sample)]
    picked = np.random.default_rng(0).permutation(len(heldout))[:LLAVA_EVAL].tolist()
    vision, llm = args.vision, args.llm
    if vision is None or llm is None:
        folder, steps = args.output / f"parts-{setting}", {"tower_steps": TOWER_STEPS, "language_steps": LANGUAGE_STEPS}
        made = train_word_parts(known, folder, image_size=PICTURE, **steps)
        vision, llm = vision or made.vision, llm or made.llm
    tower, tokenizer = AutoModel.from_pretrained(vision), AutoTokenizer.from_pretrained(llm)
    tower.requires_grad_(False).eval()
    encode = small_encoder(tower, AutoImageProcessor.from_pretrained(vision), tokenizer, seed=seed)
    pretrain = freeze_samples([turn for sample in known for turn in questions_of(sample)], encode)
    entries = freeze_samples([answers_of(sample) for sample in known], encode)
    bank = fill_bank(entries, encode, seed, COMPRESSOR_STEPS)
    language_model = AutoModelForCausalLM.from_pretrained(llm)
    asked = [freeze_samples(samples, encode) for samples in (other, [heldout[i] for i in picked])]
    return Study(pretrain, asked[0], asked[1], bank, tower, language_model, tokenizer, LLAVA)


def fill_bank(part: FrozenSamples, encode: SampleEncoder, seed: int, steps: int) -> MemoryBank:
    fit_small_compressor(encode, part, steps=steps, seed=seed)
    return frozen_bank(part, compress_samples(part, encode))


# The runs


def run_arm(shared: Study, arm: str, shares: Sequence[float], seed: int) -> list[dict]:
    """Stage 1 once, then stage 2 from there for every share."""
    settings, started = shared.settings, time.perf_counter()
    model = TinyAlignVLM.from_parts(
        shared.tower,
        copy.deepcopy(shared.language_model),
        tokenizer=shared.tokenizer,
        num_latents=SMALL_SIZES.num_latents,
        latent_dim=SMALL_SIZES.latent_dim,
        num_neighbours=NEIGHBOURS,
        retrieval="off" if arm == "off" else "bank",
        connector_seed=seed,
    ).freeze_for("pretrain")
    parts = (shared.pretrain, shared.instruct, shared.heldout)
    found = [
        None if arm == "off" else find_neighbours(shared.bank, part, arm=arm, k=NEIGHBOURS, seed=seed) for part in parts
    ]
    size = settings["batch"]
    fit_frozen(
        model, parts[0], found[0], steps=settings["stage_1_steps"], rate=settings["rate_1"], batch_size=size, seed=seed
    )
    order = torch.randperm(len(shared.instruct), generator=torch.Generator().manual_seed(seed))
    runs = []
    for share in shares:
        tuned = copy.deepcopy(model).freeze_for("instruct")
        some = order[: max(1, round(share * len(order)))]
        steps = max(1, settings["epochs"] * len(some) // size)
        given = None if found[1] is None else found[1].take(some)
        part = shared.instruct.take(some)
        fit_frozen(tuned, part, given, steps=steps, rate=settings["rate_2"], batch_size=size, seed=seed)
        scores = score_frozen(tuned, parts[2], found[2])
        seconds, started = time.perf_counter() - started, time.perf_counter()
        runs.append({
            "arm": arm, "share": share, "seed": seed, "samples": len(some), "steps": steps,
            "accuracy": scores.accuracy, "heldout_ce": scores.per_token, "seconds": seconds,
        })  # fmt: skip
        console.print(f"seed {seed}, {arm}, {share:.0%}: accuracy {scores.accuracy:.3f}, {seconds:.0f} s", style="dim")
    return runs


# What came of it


def summarise(runs: list[dict], arms: Sequence[str], shares: Sequence[float], seeds: int) -> list[dict]:
    """Means over seeds with Student's t intervals, of the accuracy and of its difference to the baseline's."""
    at = {(run["arm"], run["share"], run["seed"]): run for run in runs}
    rows = []
    for arm in arms:
        for share in shares:
            own = [at[arm, share, seed]["accuracy"] for seed in range(seeds)]
            base = [at[arms[0], share, seed]["accuracy"] for seed in range(seeds)]
            full = [at[arms[0], shares[-1], seed]["accuracy"] for seed in range(seeds)]
            row: dict[str, Any] = {"arm": arm, "share": share, "samples": at[arm, share, 0]["samples"]}
            for name, values in (
                ("accuracy", own),
                ("over_baseline", np.subtract(own, base)),
                ("over_baseline_at_100", np.subtract(own, full)),
            ):
                found = over_seeds(values)
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append(row | {f"accuracy_seed_{seed}": value for seed, value in enumerate(own)})
    return rows


def read_aloud(rows: list[dict]) -> list[str]:
    sentences = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        reached = [row["share"] for row in rows if row["arm"] == arm and row["over_baseline_at_100"] >= 0]
        found = f"at {reached[0]:.0%} of the data" if reached else "at no share"
        sentences.append(f"'{arm}' reaches the mean accuracy of the baseline with all data {found}.")
    told = [row for row in rows if row["over_baseline_low"] > 0 or row["over_baseline_high"] < 0]
    said = ", ".join(f"{row['arm']} at {row['share']:.0%}" for row in told) or "none"
    return [*sentences, f"Told from the baseline at the same share, over seeds: {said}."]


def as_table(rows: list[dict], seeds: int) -> Table:
    table = Table(title=f"Accuracy after stage 2, seeds 0 to {seeds - 1}, 95 % intervals over seeds")
    for column in ("arm", "share", "samples", "accuracy", "over the baseline at the same share"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        table.add_row(
            row["arm"],
            f"{row['share']:.0%}",
            str(row["samples"]),
            f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]",
            f"{row['over_baseline']:+.3f} [{row['over_baseline_low']:+.3f}, {row['over_baseline_high']:+.3f}]",
        )
    return table


def as_markdown(rows: list[dict], seeds: int) -> str:
    """The table as it goes into the documentation: accuracy at each share, seed by seed."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = ["| data | samples | " + " | ".join(NAMES.get(arm, arm) for arm in arms) + " |"]
    lines.append("| --- |" + " --- |" * (len(arms) + 1))
    for share in dict.fromkeys(row["share"] for row in rows):
        own = [next(row for row in rows if row["arm"] == arm and row["share"] == share) for arm in arms]
        said = [", ".join(f"{row[f'accuracy_seed_{seed}']:.3f}" for seed in range(seeds)) for row in own]
        lines.append(f"| {share:.0%} | {own[0]['samples']} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: list[dict], runs: list[dict]) -> None:
    """Lines through the means, a dot per run."""
    grey = "#808080"
    colours = {"off": grey, "bank": "#2a9d6f", "shuffled": "#e09f3e", "random": "#d1495b", "constant": "#5b8bd0"}
    figure, (axes,) = page_figure(6.4, 4)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for place, arm in enumerate(arms):
        own, shift = [row for row in rows if row["arm"] == arm], 0.6 * (place - (len(arms) - 1) / 2)
        shares, means = [100 * row["share"] + shift for row in own], [row["accuracy"] for row in own]
        axes.plot(shares, means, color=colours[arm], label=NAMES.get(arm, arm), lw=2, marker="o")
        dots = [(100 * run["share"] + shift, run["accuracy"]) for run in runs if run["arm"] == arm]
        axes.plot(*zip(*dots, strict=True), "o", color=colours[arm], ms=4, alpha=0.45, mew=0)
    axes.axhline(next(r["accuracy"] for r in reversed(rows) if r["arm"] == arms[0]), color=grey, ls=":", lw=1)
    axes.set_xlabel("instruction data, %")
    axes.set_ylabel("held-out accuracy (dots: seeds)")
    axes.grid(color=grey, alpha=0.25, lw=0.6)
    axes.legend(frameon=False, labelcolor=grey)
    figure.savefig(path)


def shrink() -> DigitRecipe:
    """Sizes that show in seconds that both kinds of data run."""
    global DIGIT_SCENES, COMPRESSOR_STEPS, TOWER_STEPS, LANGUAGE_STEPS
    DIGIT_SCENES, COMPRESSOR_STEPS = {"memory": 100, "train": 64, "heldout": 20}, 5
    TOWER_STEPS, LANGUAGE_STEPS = 5, 5
    for settings in (DIGITS, LLAVA):
        settings["stage_1_steps"] = 2
    return DigitRecipe(tower_steps=5, language_steps=5, batch_size=16, num_scenes=64, hidden_dim=48)


if __name__ == "__main__":
    main()
