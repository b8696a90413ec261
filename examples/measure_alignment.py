r"""Compare two trained checkpoints: does b use more information than a, how sure is that, and is it retrieval's doing?

    python examples/measure_alignment.py --a runs/baseline --b runs/tinyalign \
        --data heldout.json --images images/ --bank memory/ --save runs/alignment
    python examples/measure_alignment.py --digits --save runs/digits   # trains the two first, as the quickstart does

Both models read the same held-out records; what is printed is paired by record and clustered by image: cross-entropies,
delta EMI of b over a with its 95 % interval, the same for b's control arms (retrieved from the wrong query, random,
constant), and the information that b takes from the image. `--save` keeps the per-record tables, so that other
comparisons need no second run.

With --digits a baseline and a retrieving model are trained on the quickstart's frozen parts (a tower and a language
model, trained once and cached), saved, reopened and compared on 400 held-out scenes; "baseline -> bank" comes out near
0.3 nats a caption and above zero, and the control arms, which b was not trained with, far below. The entropy of these
captions is known, so that the levels of equation (5) are printed too. With --smoke the parts start random and 60 steps
are too short to learn to read memories: "baseline -> bank" is not told from zero, while "image" comes out near 0.30
nats per token.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign.data import ChatRenderer, DigitScenes, LlavaCollator, LlavaDataset, PlainRenderer, Sample, write_llava
from tinyalign.memory import AttentionPooledKey, MemoryBank, build_memory_bank
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignProcessor, TinyAlignVLM
from tinyalign.models.digit_parts import load_digit_parts
from tinyalign.models.frozen import find_neighbours, freeze_samples
from tinyalign.models.frozen_training import fit_frozen, fit_small_compressor, small_encoder
from tinyalign.models.tiny import write_tiny_parts
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes
from tinyalign.theory import (
    Estimate,
    NLLTable,
    collect_nll,
    conditional_v_information,
    decompose,
    delta_emi,
    effective_mutual_information,
)

CONTROLS = ("shuffled", "random", "constant")
BANK, TRAIN, HELDOUT, NEIGHBOURS = 8000, 512, 400, 5
COMPRESSOR_STEPS, STEPS, RATE = 600, 400, 2e-3
SMOKE_STEPS, SMOKE_SCENES, BATCH = 60, 128, 32


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", type=Path, help="checkpoint to compare with, such as the baseline")
    parser.add_argument("--b", type=Path, help="checkpoint to judge")
    parser.add_argument("--data", type=Path, help="held-out LLaVA-format JSON")
    parser.add_argument("--images", type=Path, help="folder that the image paths start from")
    parser.add_argument("--bank", type=Path, help="the bank's folder, if it is no longer where the models were told")
    parser.add_argument("--per", choices=("sequence", "token", "byte"), default="token")
    parser.add_argument("--prompt-form", choices=("chat", "plain"), default="chat", help="as in training")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--save", type=Path, help="folder for the per-record tables")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--digits", action="store_true", help="train two models as the quickstart does and compare them"
    )
    parser.add_argument("--smoke", action="store_true", help="train two small models on the spot and compare them")
    args = parser.parse_args()
    args.entropy = None
    if args.smoke:
        smoke(args)
    elif args.digits:
        digits(args)
    for name in ("a", "b", "data", "images"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is required (or --digits, --smoke)")
    return args


def smoke(args: argparse.Namespace) -> None:
    """Train a baseline and a retrieving model from the same seed on the same batches."""
    folder = Path(tempfile.mkdtemp(prefix="tinyalign-"))
    splits = {"memory": 2 * SMOKE_SCENES, "train": 2 * SMOKE_SCENES, "heldout": SMOKE_SCENES}
    scenes = {split: DigitScenes(split, size) for split, size in splits.items()}
    args.images, args.bank = folder / "images", folder / "bank"
    args.data = write_llava(scenes["heldout"], folder / "heldout.json", args.images)
    parts = write_tiny_parts(folder, [turn.text for sample in scenes["train"] for turn in sample.turns])
    tower, tokenizer = AutoModel.from_pretrained(parts.vision), AutoTokenizer.from_pretrained(parts.llm)
    pictures = AutoImageProcessor.from_pretrained(parts.vision)
    sizes = PerceiverSizes(token_dim=32, num_latents=4, latent_dim=32, num_self_attends=2)
    encoder = PairEncoder(tower, PerceiverCompressor(64, vocab_size=len(tokenizer), sizes=sizes), AttentionPooledKey())
    encode = SampleEncoder(encoder, pictures, tokenizer)
    bank = build_memory_bank(scenes["memory"], encode, args.bank, fingerprint=encode.fingerprint(), progress=False)
    for name, arm in (("a", "off"), ("b", "bank")):
        llm = AutoModelForCausalLM.from_pretrained(parts.llm)
        model = TinyAlignVLM.from_parts(
            AutoModel.from_pretrained(parts.vision),
            llm,
            tokenizer=tokenizer,
            memory=bank,
            compressor=encoder.compressor,
            retrieval=arm,
        )
        processor = TinyAlignProcessor.for_model(model, pictures, tokenizer)
        collate = LlavaCollator(processor, renderer=ChatRenderer(tokenizer))
        model.freeze_for("instruct")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        order = torch.randperm(len(scenes["train"]), generator=torch.Generator().manual_seed(0)).tolist()
        for step in range(SMOKE_STEPS):
            picked = [scenes["train"][order[(step * 16 + row) % len(order)]] for row in range(16)]
            loss = model(**collate(picked)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        setattr(args, name, folder / name)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def digits(args: argparse.Namespace) -> None:
    """Train connectors of a baseline and of a retrieving model on the quickstart's parts, from the same batches."""
    folder = args.save or Path(tempfile.mkdtemp(prefix="tinyalign-"))
    parts = load_digit_parts()
    memory, heldout = DigitScenes("memory", BANK), DigitScenes("heldout", HELDOUT)
    args.images, args.bank, args.entropy = folder / "images", folder / "bank", heldout.caption_entropy
    args.data = write_llava(heldout, folder / "heldout.json", args.images)
    encode = small_encoder(parts.vision_tower, parts.image_processor, parts.tokenizer)
    fit_small_compressor(encode, freeze_samples(memory, encode), steps=COMPRESSOR_STEPS)
    bank = build_memory_bank(
        memory, encode, args.bank, batch_size=128, resume=False, fingerprint=encode.fingerprint(), progress=False
    )
    renderer = ChatRenderer(parts.tokenizer)
    train = freeze_samples(DigitScenes("train", TRAIN), encode, renderer=renderer)
    for name, arm in (("a", "off"), ("b", "bank")):
        model = TinyAlignVLM.from_parts(
            parts.vision_tower,
            copy.deepcopy(parts.language_model),
            tokenizer=parts.tokenizer,
            memory=bank,
            num_neighbours=NEIGHBOURS,
            retrieval=arm,
            connector_seed=0,
        ).freeze_for("pretrain")
        found = None if arm == "off" else find_neighbours(bank, train, arm=arm, k=NEIGHBOURS)
        fit_frozen(model, train, found, steps=STEPS, rate=RATE)
        setattr(args, name, folder / name)
        model.save_pretrained(folder / name)
        TinyAlignProcessor.for_model(model, parts.image_processor, parts.tokenizer).save_pretrained(folder / name)


def tables(path: Path, conditions: Sequence[str], samples: Sequence[Sample], args: argparse.Namespace) -> dict:
    """One table per condition for one checkpoint."""
    memory = None if args.bank is None else MemoryBank.load(args.bank, mmap=True)
    model = TinyAlignVLM.from_pretrained(path, memory=memory).to(args.device).eval()
    processor = TinyAlignProcessor.from_pretrained(path)
    renderer = (ChatRenderer if args.prompt_form == "chat" else PlainRenderer)(processor.tokenizer)
    collate = LlavaCollator(processor, renderer=renderer)
    loader = torch.utils.data.DataLoader(samples, batch_size=args.batch_size, collate_fn=collate)
    found = {}
    for condition in conditions:
        found[condition] = collect_nll(
            model, loader, condition=condition, tokenizer=processor.tokenizer, progress=not (args.smoke or args.digits)
        )
        if args.save is not None:
            found[condition].save(args.save / f"{path.name}-{condition}.safetensors")
    return found


def cross_entropy(table: NLLTable, per: str) -> float:
    return float(table.nll.sum() / table.weights(per).sum())


def line(name: str, result: Estimate) -> str:
    verdict = "above zero" if result.low > 0 else "below zero" if result.high < 0 else "not told from zero"
    return f"{name:30s} {result.value:+.4f} [{result.low:+.4f}, {result.high:+.4f}] {result.unit}, {verdict}"


def main() -> None:
    args = parse()
    samples = LlavaDataset(args.data, args.images)
    base = tables(args.a, ["full"], samples, args)["full"]
    judged = tables(args.b, ["full", "off", "no_image", *CONTROLS], samples, args)
    print(f"{len(base)} records of {len(set(base.groups.tolist()))} images; cross-entropy per {args.per}, in nats")
    print(f"  a {cross_entropy(base, args.per):.4f}")
    for condition, table in judged.items():
        print(f"  b, {condition:10s} {cross_entropy(table, args.per):.4f}")
    gain = delta_emi(base, judged["full"], per=args.per)
    print("delta EMI, paired by record and clustered by image (positive: the second uses more information)")
    print(line("baseline -> bank", gain))
    for control in CONTROLS:
        print(line(f"{control} -> bank", delta_emi(judged[control], judged["full"], per=args.per)))
    print(line("off -> bank", delta_emi(judged["off"], judged["full"], per=args.per)))
    print("conditional V-information of the image, given the instruction (b without its image is not retrained)")
    print(line("image", conditional_v_information(judged["no_image"], judged["off"], per=args.per)))
    if args.entropy is not None and args.per == "sequence":
        print(f"EMI = H(L) - CE, with the captions' own entropy of {args.entropy:.4f} nats")
        for name, table in (("a", base), ("b", judged["full"])):
            print(line(name, effective_mutual_information(table, entropy=args.entropy)))
    split = decompose(base, judged["full"], retrieval="deterministic", per=args.per)
    print(f"if no test record is in the memory, {split.delta_true.value:.4f} of the gain is new information:")
    print(f"  {split.reason}.")
    for warning in gain.warnings:
        print(f"warning: {warning}")
    print("Both models are one training run each: the interval speaks of new records, not of new runs.")


if __name__ == "__main__":
    main()
