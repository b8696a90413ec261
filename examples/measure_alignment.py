r"""Compare two trained checkpoints: does b use more information than a, how sure is that, and is it retrieval's doing?

    python examples/measure_alignment.py --a runs/baseline --b runs/tinyalign \
        --data heldout.json --images images/ --bank memory/ --save runs/alignment

Both models read the same held-out records; what is printed is paired by record and clustered by image: cross-entropies,
delta EMI of b over a with its 95 % interval, the same for b's control arms (retrieved from the wrong query, random,
constant), and the information that b takes from the image. `--save` keeps the per-record tables, so that other
comparisons need no second run.

With --smoke the script trains two small models for 60 steps each on parts that start random. That is too short to learn
to read memories, so "baseline -> bank" is not told from zero, while "image" comes out near 0.30 nats per token.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign.data import ChatRenderer, DigitScenes, LlavaCollator, LlavaDataset, PlainRenderer, Sample, write_llava
from tinyalign.memory import AttentionPooledKey, MemoryBank, build_memory_bank
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignProcessor, TinyAlignVLM
from tinyalign.models.tiny import write_tiny_parts
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes
from tinyalign.theory import Estimate, NLLTable, collect_nll, conditional_v_information, decompose, delta_emi

CONTROLS = ("shuffled", "random", "constant")
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
    parser.add_argument("--smoke", action="store_true", help="train two small models on the spot and compare them")
    args = parser.parse_args()
    if args.smoke:
        smoke(args)
    for name in ("a", "b", "data", "images"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is required (or --smoke)")
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
            model, loader, condition=condition, tokenizer=processor.tokenizer, progress=not args.smoke
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
    split = decompose(base, judged["full"], retrieval="deterministic", per=args.per)
    print(f"if no test record is in the memory, {split.delta_true.value:.4f} of the gain is new information:")
    print(f"  {split.reason}.")
    for warning in gain.warnings:
        print(f"warning: {warning}")
    print("Both models are one training run each: the interval speaks of new records, not of new runs.")


if __name__ == "__main__":
    main()
