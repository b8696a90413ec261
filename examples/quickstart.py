r"""The whole method on real handwriting, with its controls, in a few minutes on two CPU cores.

    python examples/quickstart.py                  # one seed; results in runs/quickstart/report.html
    python examples/quickstart.py --seeds 3 --arms all
    python examples/quickstart.py --reader binding # a language model that reads better: expect no gain of retrieval

A small vision tower and a small language model are trained on the spot and frozen, a Perceiver compresses image-caption
pairs into a memory bank, and connectors are trained once per arm from the same seed and the same batches: without
retrieval (`baseline`), with it (`tinyalign`), and with controls that have as many tokens and no information about the
image. Expect the held-out cross-entropy of `tinyalign` 10 to 20 % under the baseline's and every control's, and most
controls within a few per cent of the baseline. `self`, which may retrieve the sample itself in training, looks better
there and is worse than `tinyalign` held out. The last lines say what came out this time.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tinyalign.data import DigitScenes
from tinyalign.evaluation import page_figure, write_report
from tinyalign.evaluation.plots import BETTER, GREY, WORSE
from tinyalign.memory import AttentionPooledKey, MemoryBank, build_memory_bank, leakage_report
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignVLM
from tinyalign.models.digit_parts import (
    DigitParts,
    DigitRecipe,
    load_binding_reader,
    load_digit_parts,
    told_in_words,
)
from tinyalign.models.frozen import (
    FoundNeighbours,
    FrozenSamples,
    caption_recall,
    compress_samples,
    find_neighbours,
    freeze_samples,
    frozen_bank,
)
from tinyalign.models.frozen_training import SMALL_SIZES, fit_frozen, fit_small_compressor, score_frozen
from tinyalign.perceiver import PerceiverCompressor
from tinyalign.theory import NLLTable, delta_emi, effective_mutual_information

BANK, TRAIN, HELDOUT = 10000, 512, 400  # scenes; no handwriting is shared between the three
NEIGHBOURS = 5
COMPRESSOR_STEPS, STAGE_1_STEPS, STAGE_2_STEPS = 600, 400, 200
BATCH = 16
RATE_1, RATE_2 = 2e-3, 5e-4
ARMS = {"baseline": "off", "tinyalign": "bank", "shuffled": "shuffled", "prompt": "prompt", "self": "self"}
MORE_ARMS = {"random": "random", "constant": "constant"}
CONTROLS = ("shuffled", "random", "constant", "prompt")
console = Console()


class Task(NamedTuple):
    """What one stage trains and is measured on, and how it is trained."""

    train: FrozenSamples
    heldout: FrozenSamples
    questions: FrozenSamples
    steps: int
    rate: float


class Outcome(NamedTuple):
    """What training one arm gave."""

    model: TinyAlignVLM
    curve: list[float]
    table: NLLTable
    accuracy: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--arms", choices=("default", "all"), default="default")
    parser.add_argument("--reader", choices=("plain", "binding"), default="plain", help="which language model")
    parser.add_argument("--retrain", action="store_true", help="train tower and language model although cached")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, proves nothing")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    recipe = shrink() if args.smoke else DigitRecipe()
    started = time.perf_counter()
    parts = load_digit_parts(recipe, retrain=args.retrain, track=track)
    if args.reader == "binding":
        parts = parts._replace(language_model=load_binding_reader(recipe, retrain=args.retrain, track=track))
    arms = {**ARMS, **MORE_ARMS} if args.arms == "all" else ARMS
    args.output.mkdir(parents=True, exist_ok=True)
    runs, pictures = [], {}
    for seed in range(args.seed, args.seed + args.seeds):
        summary, drawn = run_seed(parts, arms, seed, args.output / f"bank-{seed}")
        runs.append(summary)
        pictures = pictures or drawn
    report = {**runs[0], "runs": runs, "reader": args.reader, "smoke": args.smoke}
    report |= {"seconds": time.perf_counter() - started, "reading": read_aloud(runs)}
    (args.output / "summary.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_report(
        args.output / "report.html",
        "Does retrieval align a small model better?",
        sentences=report["reading"],
        tables=tables_of(runs),
        pictures=draw(args.output, pictures, runs[0]),
    )
    for summary in runs:
        console.print(as_table(summary))
    for sentence in report["reading"]:
        console.print(f"- {sentence}")
    console.print(f"{report['seconds']:.0f} s. Open {args.output / 'report.html'} in a browser.")


def run_seed(parts: DigitParts, arms: dict[str, str], seed: int, bank_path: Path) -> tuple[dict, dict]:
    """Run every arm once; return the summary, and what the pictures are drawn from."""
    # The compressor, trained without the language model, and the bank it fills.
    scenes = DigitScenes("memory", BANK, seed=seed)
    image_dim, vocab_size = parts.vision_tower.config.hidden_size, len(parts.tokenizer)
    compressor = PerceiverCompressor(image_dim, vocab_size=vocab_size, sizes=SMALL_SIZES, seed=seed)
    encode = SampleEncoder(
        PairEncoder(parts.vision_tower, compressor, AttentionPooledKey()), parts.image_processor, parts.tokenizer
    )
    pairs = freeze_samples(scenes, encode)
    watch = partial(track, description=f"seed {seed}, compressor")
    fit_small_compressor(encode, pairs, steps=COMPRESSOR_STEPS, seed=seed, track=watch)
    build_memory_bank(
        scenes, encode, bank_path, batch_size=128, resume=False, fingerprint=encode.fingerprint(), progress=False
    )
    bank = MemoryBank.load(bank_path, mmap=True)

    # The frozen side of what connectors train and are measured on; questions are about the captions' images.
    train, heldout, ask_train, ask_heldout = (
        freeze_samples(samples, encode)
        for samples in (
            DigitScenes("train", TRAIN, seed=seed),
            DigitScenes("heldout", HELDOUT, seed=seed),
            DigitScenes("train", TRAIN, seed=seed, task="question"),
            DigitScenes("heldout", HELDOUT, seed=seed, task="question").one_each(),
        )
    )
    stage_1 = Task(train, heldout, ask_heldout, STAGE_1_STEPS, RATE_1)
    stage_2 = Task(ask_train, ask_heldout, ask_heldout, STAGE_2_STEPS, RATE_2)
    # What `self` retrieves from in training: a bank that holds the training pairs too.
    leaky_bank = MemoryBank.merge(
        [bank, frozen_bank(train, compress_samples(train, encode), fingerprint=bank.fingerprint)]
    )

    @cache  # one search per arm and part, whatever asks for it
    def found(arm: str, part: FrozenSamples) -> FoundNeighbours | None:
        if arm in ("off", "prompt"):
            return None
        if arm == "self" and part is not train:  # what is held out is in no bank
            return found("bank", part)
        memory = leaky_bank if arm == "self" else bank
        return find_neighbours(memory, part, arm=arm, k=NEIGHBOURS, seed=seed)

    # Stage 1, connectors alone: the same seed and the same batches for every arm.
    outcomes: dict[str, Outcome] = {}
    for name, arm in arms.items():
        model = TinyAlignVLM.from_parts(
            parts.vision_tower,
            copy.deepcopy(parts.language_model),
            tokenizer=parts.tokenizer,
            memory=bank,
            num_neighbours=NEIGHBOURS,
            retrieval=arm,
            connector_seed=seed,
        ).freeze_for("pretrain")
        outcomes[name] = fit(model, stage_1, partial(found, arm), seed, f"seed {seed}, stage 1, {name}")
    # Stage 2, questions, language model unfrozen: the baseline and TinyAlign go on from stage 1.
    instructed: dict[str, Outcome] = {}
    for name in ("baseline", "tinyalign"):
        model = copy.deepcopy(outcomes[name].model).freeze_for("instruct")
        instructed[name] = fit(model, stage_2, partial(found, arms[name]), seed, f"seed {seed}, stage 2, {name}")

    near = found("bank", heldout)
    leakage = leakage_report(leaky_bank, train.queries, train.rows["sample_ids"], train.rows["groups"], k=NEIGHBOURS)
    summary = {
        "seed": seed,
        "seconds": sum(o.seconds for o in [*outcomes.values(), *instructed.values()]),
        "arms": {name: describe(o, outcomes["baseline"], 1, scenes.caption_entropy) for name, o in outcomes.items()},
        "stage2": {name: describe(o, instructed["baseline"], 2, None) for name, o in instructed.items()},
        "retrieval": {
            "recall_at_5": caption_recall(heldout, near),
            "chance_recall": caption_recall(heldout, near.take(torch.arange(len(heldout)).roll(1))),
            "self_hits": leakage.with_exclusion.self_hits,
            "self_hits_without_exclusion": leakage.without_exclusion.self_hits,
        },
        "told_in_words": {
            task: told_in_words(parts, DigitScenes("heldout", HELDOUT, seed=seed, task=task))
            for task in ("caption", "question")
        },
        "caption_entropy": scenes.caption_entropy,
    }
    curves = {name: outcome.curve for name, outcome in outcomes.items()}
    kept = {sample.sample_id: (sample.images[0], sample.turns[1].text) for sample in pairs.samples}
    sheet = [
        [(sample.images[0], sample.turns[1].text), *(kept[entry] for entry in row)]
        for sample, row in zip(heldout.samples[:6], near.neighbours.ids[:6].tolist(), strict=True)
    ]
    return summary, {"curves": curves, "sheet": sheet}


def fit(model: TinyAlignVLM, task: Task, found: Callable, seed: int, label: str) -> Outcome:
    """Train on one part, measure on the others."""
    started = time.perf_counter()
    curve = fit_frozen(
        model,
        task.train,
        found(task.train),
        steps=task.steps,
        rate=task.rate,
        batch_size=BATCH,
        seed=seed,
        track=partial(track, description=label),
    )
    scores = score_frozen(model, task.heldout, found(task.heldout))
    ids, groups = (task.heldout.rows[name].numpy() for name in ("sample_ids", "groups"))
    table = NLLTable(
        scores.nll.numpy(), scores.tokens.numpy(), sample_ids=ids, groups=groups, condition=label.split(", ", 1)[1]
    )
    accuracy = score_frozen(model, task.questions, found(task.questions)).accuracy
    return Outcome(model, curve, table, accuracy, time.perf_counter() - started)


def shrink() -> DigitRecipe:
    """Sizes that show in seconds that every part runs."""
    global BANK, TRAIN, HELDOUT, COMPRESSOR_STEPS, STAGE_1_STEPS, STAGE_2_STEPS
    BANK, TRAIN, HELDOUT, COMPRESSOR_STEPS, STAGE_1_STEPS, STAGE_2_STEPS = 200, 64, 40, 10, 5, 3
    return DigitRecipe(tower_steps=5, language_steps=5, batch_size=16, num_scenes=64, hidden_dim=48)


def describe(outcome: Outcome, baseline: Outcome, stage: int, entropy: float | None) -> dict:
    """Numbers of one arm. EMI and its difference are in nats per target; cross-entropies in nats per token."""
    gain = delta_emi(baseline.table, outcome.table)
    numbers = {
        "stage": stage,
        "train_ce": float(np.mean(outcome.curve[-50:])),
        "heldout_ce": outcome.table.per_token,
        "accuracy": outcome.accuracy,
        "delta_emi": {"value": gain.value, "low": gain.low, "high": gain.high},
        "seconds": outcome.seconds,
    }
    if entropy is not None:
        emi = effective_mutual_information(outcome.table, entropy=entropy)
        numbers["emi"] = {"value": emi.value, "low": emi.low, "high": emi.high}
    return numbers


def as_table(summary: dict) -> Table:
    title = f"seed {summary['seed']}: {HELDOUT} held-out scenes, {TRAIN} to train on, a bank of {BANK}"
    table = Table(title=title, box=SIMPLE, pad_edge=False)  # 80 columns are enough
    for column in ("arm", "train", "held-out", "delta EMI [95 %]", "EMI", "acc.", "s"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for stage in ("arms", "stage2"):
        for name, arm in summary[stage].items():
            gain = arm["delta_emi"]
            table.add_row(
                name if stage == "arms" else f"{name} (2)",
                f"{arm['train_ce']:.3f}",
                f"{arm['heldout_ce']:.3f}",
                "" if name == "baseline" else f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]",
                f"{arm['emi']['value']:.2f}" if "emi" in arm else "",
                f"{arm['accuracy']:.2f}",
                f"{arm['seconds']:.0f}",
            )
        table.add_section()
    retrieval = summary["retrieval"]
    leaks = f"{retrieval['self_hits']} with exclusion, {retrieval['self_hits_without_exclusion']} without"
    table.caption = (
        f"Train and held-out: cross-entropy in nats per token; (2): after stage 2, answers. EMI: nats per caption, of "
        f"H(L) = {summary['caption_entropy']:.2f}. Recall@5 of captions {retrieval['recall_at_5']:.2f} (by chance "
        f"{retrieval['chance_recall']:.2f}). Training samples that retrieve themselves: {leaks}."
    )
    return table


def read_aloud(runs: list[dict]) -> list[str]:
    """Say what the numbers mean, flattering or not."""

    def below(name: str, other: str) -> list[float]:
        return [1 - run["arms"][name]["heldout_ce"] / run["arms"][other]["heldout_ce"] for run in runs]

    controls = [name for name in CONTROLS if name in runs[0]["arms"]]
    gains = below("tinyalign", "baseline")
    seeds = f"in {len(runs)} seed{'s' if len(runs) > 1 else ''}"
    lines = [f"Retrieval changes held-out cross-entropy by {', '.join(f'{-g:+.1%}' for g in gains)} {seeds}."]
    for name in controls:
        margin = below("tinyalign", name)
        own = float(np.mean([-g for g in below(name, "baseline")]))
        verdict = "under" if min(margin) > 0 else "NOT always under"
        lines.append(
            f"TinyAlign is {verdict} '{name}' ({', '.join(f'{-g:+.1%}' for g in margin)}), which has as many tokens "
            f"and no information about the image; '{name}' alone changes the baseline by {own:+.1%}."
        )
    reached = min(gains) >= 0.1 and all(min(below("tinyalign", name)) >= 0.1 for name in controls)
    lines.append(
        "So the gain is information, not extra tokens: at least 10 % under the baseline and every control."
        if reached
        else "This does NOT reach 10 % under the baseline and every control: do not claim it as a gain of that size."
    )
    leak = [run["arms"]["self"] for run in runs]
    honest = [run["arms"]["tinyalign"] for run in runs]
    lines.append(
        f"WARNING, the leak: trained so that a sample may retrieve itself, training loss is "
        f"{np.mean([a['train_ce'] for a in leak]):.3f} instead of {np.mean([a['train_ce'] for a in honest]):.3f}, and "
        f"held-out loss {np.mean([a['heldout_ce'] for a in leak]):.3f} instead of "
        f"{np.mean([a['heldout_ce'] for a in honest]):.3f}."
    )
    before, after = (np.mean([run["stage2"][n]["accuracy"] for run in runs]) for n in ("baseline", "tinyalign"))
    told = np.mean([run["told_in_words"]["question"] for run in runs])
    lines.append(
        f"After stage 2 {after:.2f} of the questions are answered, by the baseline {before:.2f}. Told in words what is "
        f"in the image, the language model before stage 2 answers {told:.2f}: what it cannot read, no connector mends."
    )
    gain = [run["arms"]["tinyalign"]["delta_emi"] for run in runs]
    sure = all(g["low"] > 0 or g["high"] < 0 for g in gain)
    lines.append(
        f"Delta EMI is {np.mean([g['value'] for g in gain]):+.2f} nats per caption; its interval "
        f"{'excludes' if sure else 'includes'} zero. It is conditional on these training runs. The bank knows nothing "
        f"of the held-out images, so what changes is the model's error, not what the input says about the target."
    )
    return lines


def facts_of(caption: str) -> set[str]:
    return set(caption.removesuffix(" .").split(" and "))


def draw(folder: Path, pictures: dict, summary: dict) -> list[Path]:
    """Loss curves, held-out bars, and a sheet of queries with their neighbours."""
    figure, (axes,) = page_figure(7, 4)
    window = max(1, min(25, STAGE_1_STEPS // 4))
    for name, curve in pictures["curves"].items():
        smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, label=name, lw=2.5 if name == "tinyalign" else 1.2)
    axes.set(xlabel="step", ylabel="training cross-entropy (nats per token)", yscale="log", title="Stage 1")
    axes.legend(frameon=False, ncols=2, labelcolor=GREY)
    paths = [folder / "loss-curves.png"]
    figure.savefig(paths[-1])

    figure, (axes,) = page_figure(7, 4)
    names = list(summary["arms"])
    emi = [summary["arms"][name]["emi"] for name in names]
    colours = {"tinyalign": BETTER, "self": WORSE, "baseline": GREY}
    heights = [e["value"] for e in emi]
    bars = [[e["value"] - e["low"] for e in emi], [e["high"] - e["value"] for e in emi]]
    arms = [colours.get(name, "tab:blue") for name in names]
    axes.bar(names, heights, yerr=bars, capsize=4, ecolor="#505050", color=arms)
    axes.axhline(summary["caption_entropy"], color=GREY, ls=":", lw=1)
    axes.set(ylabel="EMI on held-out scenes (nats per caption)")
    axes.set_title("Information used, of H(L) (dotted), 95 % intervals")
    paths.append(folder / "heldout-emi.png")
    figure.savefig(paths[-1])

    sheet = pictures["sheet"]
    figure, grid = page_figure(11, 2.1 * len(sheet), rows=len(sheet), panels=len(sheet[0]), sides=())
    figure.set_facecolor("white")
    for line in sheet:
        for place, (image, caption) in enumerate(line):
            axes = grid.pop(0)
            axes.imshow(image)
            axes.set_axis_off()
            colour = "black" if place == 0 or facts_of(caption) & facts_of(line[0][1]) else "gray"
            axes.set_title(caption.replace(" and ", "\nand "), fontsize=8, color=colour)
    figure.suptitle("Held-out image (left) and its five neighbours in the bank", color="black")
    paths.append(folder / "neighbours.png")
    figure.savefig(paths[-1])
    return paths


def tables_of(runs: list[dict]) -> str:
    """The tables as HTML."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        recorder = Console(record=True, width=118, file=nowhere)
        for summary in runs:
            recorder.print(as_table(summary))
        return recorder.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


if __name__ == "__main__":
    main()
