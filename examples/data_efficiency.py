r"""Accuracy against the share of instruction data, for the baseline, TinyAlign and controls (the paper's Figures 3, 4).

    python examples/data_efficiency.py                  # scenes of digits, 3 seeds; runs/data-efficiency/
    python examples/data_efficiency.py --data train.json --images images/ --eval eval.json [--vision V --llm L]

As in the paper, stage 1 (connectors) and the bank come from pre-training data, and stage 2 (language model as well)
goes over a growing share of other instruction data once per epoch, from the same seed and in the same order for every
arm. With a LLaVA-format file, half of its images are the pre-training data, each question is a sample of its own, and
the accuracy is exact match on the questions of `--eval`; without `--vision` and `--llm` a small tower and a small
language model are trained on the spot, on the pre-training half.

A finished run is kept in OUTPUT/runs.jsonl and not run again: after a kill, give the same command. The paper says that
40 % of the data are enough to reach the baseline's 100 %. Expect less here: after stage 2 the arms differ by little.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
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
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign.data import DigitScenes, LlavaDataset, Sample, Turn, load_image, stable_id, write_llava
from tinyalign.memory import AttentionPooledKey, MemoryBank
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignVLM
from tinyalign.models.digit_parts import DigitRecipe, load_digit_parts
from tinyalign.models.frozen import FrozenSamples, compress_samples, find_neighbours, freeze_samples, frozen_bank
from tinyalign.models.frozen_training import fit_compressor, fit_frozen, score_frozen
from tinyalign.models.tiny import write_tiny_parts
from tinyalign.perceiver import LossWeights, PerceiverCompressor, PerceiverPretrainer, PerceiverSizes
from tinyalign.theory.intervals import ratio_interval

ARMS = ("off", "bank", "shuffled")
SHARES = (0.2, 0.4, 0.6, 1.0)
NEIGHBOURS = 5
SIZES = PerceiverSizes(token_dim=64, num_latents=8, latent_dim=64, num_self_attends=2, num_heads=4)
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
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=("off", "bank", "shuffled", "random", "constant"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/data-efficiency"))
    parser.add_argument("--smoke", action="store_true", help="both kinds of data at tiny sizes: shows that it runs")
    args = parser.parse_args()
    if args.data is not None and (args.images is None or args.eval is None):
        parser.error("--data needs --images and --eval")
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
    path = args.output / "runs.jsonl"
    setting = name_of_setting(args, recipe)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(run["arm"], run["share"], run["seed"]): run for run in lines if run["setting"] == setting}
    for seed in range(args.seeds):
        wanted = [(arm, share) for arm in args.arms for share in args.shares]
        missing = [pair for pair in wanted if (*pair, seed) not in done]
        if not missing:
            continue
        shared = digit_study(recipe, seed) if args.data is None else llava_study(args, seed)
        for arm in dict.fromkeys(arm for arm, _ in missing):
            for run in run_arm(shared, arm, [share for a, share in missing if a == arm], seed):
                done[arm, run["share"], seed] = run
                with open(path, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"setting": setting, **run}) + "\n")
    runs = [done[arm, share, seed] for arm in args.arms for share in args.shares for seed in range(args.seeds)]
    rows = summarise(runs, args.arms, args.shares, args.seeds)
    with open(args.output / "accuracy.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(args.output / "accuracy.png", rows, runs)
    (args.output / "accuracy.md").write_text(as_markdown(rows, args.seeds), encoding="utf-8")
    console.print(as_table(rows, args.seeds))
    for sentence in read_aloud(rows):
        console.print(f"- {sentence}")
    console.print(
        f"{time.perf_counter() - started:.0f} s, of which {time.process_time():.0f} s of processor time, with "
        f"{torch.get_num_threads()} threads; see {args.output}"
    )


def name_of_setting(args: argparse.Namespace, recipe: DigitRecipe) -> str:
    said = [NEIGHBOURS, SIZES, COMPRESSOR_STEPS]
    if args.data is None:
        said += [DIGITS, DIGIT_SCENES, vars(recipe)]
    else:
        said += [LLAVA, LLAVA_EVAL, PICTURE, TOWER_STEPS, LANGUAGE_STEPS, args.vision, args.llm]
        said += [args.data.read_text(), args.eval.read_text()]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]


# What is studied


def digit_study(recipe: DigitRecipe, seed: int) -> Study:
    """Captions of bank scenes for stage 1; one question about each of other scenes for stage 2."""
    parts = load_digit_parts(recipe)
    encode = encoder_of(parts.vision_tower, parts.image_processor, parts.tokenizer, seed)
    pretrain = freeze_samples(DigitScenes("memory", DIGIT_SCENES["memory"], seed=seed), encode)
    asked = []
    for split in ("train", "heldout"):
        scenes = DigitScenes(split, DIGIT_SCENES[split], seed=seed, task="question")
        per_scene = scenes.samples_per_scene
        asked.append(freeze_samples([scenes[n * per_scene + n % per_scene] for n in range(scenes.num_scenes)], encode))
    bank = fill_bank(pretrain, encode, seed, min(COMPRESSOR_STEPS, DIGITS["compressor_steps"]))
    return Study(pretrain, asked[0], asked[1], bank, parts.vision_tower, parts.language_model, parts.tokenizer, DIGITS)


def llava_study(args: argparse.Namespace, seed: int) -> Study:
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
        made = parts_on_the_spot(known, args.output / "parts")
        vision, llm = vision or made / "vision", llm or made / "llm"
    tower, tokenizer = (
        AutoModel.from_pretrained(vision).requires_grad_(False).eval(),
        AutoTokenizer.from_pretrained(llm),
    )
    encode = encoder_of(tower, AutoImageProcessor.from_pretrained(vision), tokenizer, seed)
    pretrain = freeze_samples([turn for sample in known for turn in questions_of(sample)], encode)
    entries = freeze_samples([answers_of(sample) for sample in known], encode)
    bank = fill_bank(entries, encode, seed, COMPRESSOR_STEPS)
    language_model = AutoModelForCausalLM.from_pretrained(llm)
    asked = [freeze_samples(samples, encode) for samples in (other, [heldout[i] for i in picked])]
    return Study(pretrain, asked[0], asked[1], bank, tower, language_model, tokenizer, LLAVA)


def questions_of(sample: Sample) -> list[Sample]:
    """Each question of a conversation as a sample of its own, so that no earlier answer helps."""
    users = [turn for turn in sample.turns if turn.role == "user"]
    answers = [turn for turn in sample.turns if turn.role == "assistant"]
    found = []
    for number, (asked, said) in enumerate(zip(users, answers, strict=True)):
        name = f"{sample.id}/{number}"
        turns = (Turn("user", f"<image>\n{asked.text.replace('<image>', '').strip()}"), said)
        found.append(Sample(name, stable_id(name), sample.group, sample.images, turns))
    return found


def answers_of(sample: Sample) -> Sample:
    """A record whose text is what was answered, each answer once: what a bank entry says about its image."""
    said = dict.fromkeys(turn.text.strip() for turn in sample.turns if turn.role == "assistant")
    return sample._replace(turns=(Turn("user", "<image>"), Turn("assistant", " ".join(said))))


def encoder_of(tower: nn.Module, pictures: Any, tokenizer: Any, seed: int) -> SampleEncoder:
    compressor = PerceiverCompressor(tower.config.hidden_size, vocab_size=len(tokenizer), sizes=SIZES, seed=seed)
    return SampleEncoder(PairEncoder(tower, compressor, AttentionPooledKey()), pictures, tokenizer)


def fill_bank(part: FrozenSamples, encode: SampleEncoder, seed: int, steps: int) -> MemoryBank:
    pretrainer = PerceiverPretrainer(
        encode.encoder.compressor,
        loss_weights=LossWeights(image=0.1, bag=0.3),
        mixed_captions=0.0,
        hidden_dim=64,
        seed=seed,
    )
    fit_compressor(pretrainer, part, encode, steps=steps, seed=seed)
    return frozen_bank(part, compress_samples(part, encode))


# The runs


def run_arm(shared: Study, arm: str, shares: Sequence[float], seed: int) -> list[dict]:
    """Stage 1 once, then stage 2 from there for every share."""
    settings, started = shared.settings, time.perf_counter()
    model = TinyAlignVLM.from_parts(
        shared.tower,
        copy.deepcopy(shared.language_model),
        tokenizer=shared.tokenizer,
        num_latents=SIZES.num_latents,
        latent_dim=SIZES.latent_dim,
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


# Parts trained on the spot


def parts_on_the_spot(samples: Sequence[Sample], folder: Path) -> Path:
    """A tower that knows which words are said about an image, and a language model that answers from words."""
    if (folder / "done").exists():
        return folder
    words = [turn.text.replace("<image>", "") for sample in samples for turn in sample.turns]
    torch.manual_seed(0)
    made = write_tiny_parts(folder, words, image_size=PICTURE)
    tokenizer, pictures = AutoTokenizer.from_pretrained(made.llm), AutoImageProcessor.from_pretrained(made.vision)
    tower, language_model = AutoModel.from_pretrained(made.vision), AutoModelForCausalLM.from_pretrained(made.llm)
    images = [load_image(sample.images[0]) for sample in samples]
    pixels = torch.cat([
        pictures(images=images[at : at + 200], return_tensors="pt")["pixel_values"] for at in range(0, len(images), 200)
    ])  # fmt: skip
    said = [tokenizer(answers_of(sample).turns[1].text, add_special_tokens=False)["input_ids"] for sample in samples]
    train_tower(tower, pixels, said, len(tokenizer))
    train_language_model(language_model, tokenizer, samples, said)
    tower.save_pretrained(made.vision)
    language_model.save_pretrained(made.llm)
    (folder / "done").touch()
    return folder


def train_tower(tower: nn.Module, pixels: Tensor, said: list[list[int]], vocab_size: int) -> None:
    target = torch.zeros(len(said), vocab_size)
    for row, ids in enumerate(said):
        target[row, ids] = 1.0
    head = nn.Linear(tower.config.hidden_size, vocab_size)
    layer = tower.config.num_hidden_layers - 1  # the layer that features are read from, so that it must know

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (32,), generator=generator)
        seen = tower(pixel_values=pixels[rows], output_hidden_states=True).hidden_states[layer]
        return F.binary_cross_entropy_with_logits(head(seen.mean(dim=1)), target[rows], reduction="sum") / len(rows)

    descend(loss_of, [*tower.parameters(), *head.parameters()], TOWER_STEPS, 1e-3, "tower: words of an image, nats")


def train_language_model(model: nn.Module, tokenizer: Any, samples: Sequence[Sample], said: list[list[int]]) -> None:
    """Text alone: words that were said about an image, among others that were not, then a question and its answer."""
    rng = np.random.default_rng(0)
    turns = [(row, turn) for row, sample in enumerate(samples) for turn in questions_of(sample)]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    encoded = []
    for row, turn in turns:
        asked, answer = turn.turns[0].text.replace("<image>", "").strip(), turn.turns[1].text
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{asked} ASSISTANT:", answer)]
        encoded.append((row, ids[0], ids[1] + eos))
    user = tokenizer("USER:", add_special_tokens=False)["input_ids"]

    def loss_of(_: torch.Generator) -> Tensor:
        batch = []
        for at in rng.integers(len(encoded), size=32):
            row, asked, answer = encoded[at]
            length = int(rng.integers(4, 40))
            prefix = rng.integers(4, len(tokenizer), size=length)
            true = rng.random(length) < 0.5
            prefix[true] = rng.choice(said[row], size=int(true.sum()))
            batch.append(([*bos, *user, *prefix.tolist(), *asked], answer))
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        for line, (prompt, answer) in enumerate(batch):
            stop = len(prompt) + len(answer)
            ids[line, :stop] = torch.tensor(prompt + answer)
            labels[line, len(prompt) : stop] = torch.tensor(answer)
        logits = model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    descend(loss_of, model.parameters(), LANGUAGE_STEPS, 2e-3, "language model: answers from words, nats per token")


def descend(loss_of: Any, weights: Any, steps: int, rate: float, label: str) -> None:
    weights = list(weights)
    optimizer = torch.optim.AdamW(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    generator, curve = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    console.print(f"{label}: {np.mean(curve[:20]):.3f}, in the end {np.mean(curve[-20:]):.3f}", style="dim")


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
                found = ratio_interval(np.array(values), np.ones(seeds), np.arange(seeds), method="t")
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
    lines = [
        "| data | samples | " + " | ".join({"off": "baseline", "bank": "TinyAlign"}.get(a, a) for a in arms) + " |"
    ]
    lines.append("| --- |" + " --- |" * (len(arms) + 1))
    for share in dict.fromkeys(row["share"] for row in rows):
        own = [next(row for row in rows if row["arm"] == arm and row["share"] == share) for arm in arms]
        said = [", ".join(f"{row[f'accuracy_seed_{seed}']:.3f}" for seed in range(seeds)) for row in own]
        lines.append(f"| {share:.0%} | {own[0]['samples']} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: list[dict], runs: list[dict]) -> None:
    """Lines through the means, a dot per run. Readable on light and on dark pages."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    grey = "#808080"
    colours = {"off": grey, "bank": "#2a9d6f", "shuffled": "#e09f3e", "random": "#d1495b", "constant": "#5b8bd0"}
    names = {"off": "baseline", "bank": "TinyAlign"}
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained", dpi=130)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for place, arm in enumerate(arms):
        own, shift = [row for row in rows if row["arm"] == arm], 0.6 * (place - (len(arms) - 1) / 2)
        shares = [100 * row["share"] + shift for row in own]
        axes.plot(
            shares, [row["accuracy"] for row in own], color=colours[arm], label=names.get(arm, arm), lw=2, marker="o"
        )
        dots = [(100 * run["share"] + shift, run["accuracy"]) for run in runs if run["arm"] == arm]
        axes.plot(*zip(*dots, strict=True), "o", color=colours[arm], ms=4, alpha=0.45, mew=0)
    axes.axhline(next(r["accuracy"] for r in reversed(rows) if r["arm"] == arms[0]), color=grey, ls=":", lw=1)
    axes.set_xlabel("instruction data, %", color=grey)
    axes.set_ylabel("held-out accuracy (dots: seeds)", color=grey)
    axes.tick_params(colors=grey)
    axes.grid(color=grey, alpha=0.25, lw=0.6)
    axes.legend(frameon=False, labelcolor=grey)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(grey)
    figure.savefig(path, transparent=True)
    plt.close(figure)


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
