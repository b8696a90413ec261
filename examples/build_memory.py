r"""Build a memory bank from image-text pairs: every image with what is said about it, ready to be retrieved.

    python examples/build_memory.py --data pretrain.json --images images/ --vision google/siglip-base-patch16-224 \
        --text-tokenizer bert-base-uncased --max-samples 100000 --output memory/

    python examples/build_memory.py --dataset lmms-lab/some-captions --text-column caption ...   # streamed from the hub
    torchrun --nproc-per-node 8 examples/build_memory.py ...                                     # shared by 8 ranks

OUTPUT gets `bank/` (the `MemoryBank`), `compressor/` (what made its values), `memory.json` (how to make its keys) and,
from a Hugging Face data set, `records/` (what was drawn of it, as a LLaVA-format file). `--dataset` also takes a folder
of parquet or arrow files or of images. N of M records are drawn by `--seed`; N, M, the seed and a digest of the ids
stand in the bank's manifest. A build that is killed goes on where it was, whether it was drawing or encoding. Copy this
file and change it: what a key or a value is made of is yours.

With --smoke the script makes its own pictures, tower and tokenizer; the compressor's loss per image channel then falls
below 1.1 within 60 steps (1 is reached by knowing only the mean).
"""

from __future__ import annotations

import argparse
import random
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from tinyalign.data import Columns, DigitScenes, LlavaDataset, draw_records, gather_rows, write_llava
from tinyalign.memory import AttentionPooledKey, build_memory_bank, leakage_report
from tinyalign.models import PairEncoder, SampleEncoder
from tinyalign.models.sample_encoder import caption_of
from tinyalign.models.tiny import write_tiny_parts
from tinyalign.models.vision import pack_images, vision_half
from tinyalign.perceiver import PerceiverCompressor, PerceiverPretrainer, PerceiverSizes
from tinyalign.training import check_samples, note_key, shared_folder

LEARNING_RATE = 1e-3
REPORT_ON = 2000  # samples whose neighbours the leakage report looks at


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="LLaVA-format JSON")
    parser.add_argument("--images", type=Path, help="folder that the image paths start from")
    parser.add_argument("--dataset", help="a Hugging Face data set instead: a hub id, or a folder of its files")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--text-column", default="text", help="captions; a column `conversations` goes before it")
    parser.add_argument("--id-column", default="id", help="names of the rows; their numbers where it is absent")
    parser.add_argument("--skip-bad", action="store_true", help="leave out records without image file or answer")
    parser.add_argument("--vision", help="vision tower: a folder or a hub id")
    parser.add_argument("--text-tokenizer", help="tokenizer of the captions: a folder or a hub id")
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument("--compressor", type=Path, help="a trained compressor; without it one is trained here")
    parser.add_argument("--compressor-steps", type=int, default=1000, help="0 leaves the compressor untrained")
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--latent-dim", type=int, default=96)
    parser.add_argument("--vision-layer", type=int, default=-2)
    parser.add_argument("--alpha", type=float, default=0.4, help="the image's weight in a key")
    parser.add_argument("--max-samples", type=int, help="use that many records, drawn by the seed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="run on little data made on the spot")
    args = parser.parse_args()
    if args.smoke:
        smoke(args)
    source = [] if args.dataset else ["data", "images"]
    for name in (*source, "vision", "text_tokenizer", "output"):
        if getattr(args, name) is None:
            parser.error(f"--{name.replace('_', '-')} is required (or --smoke)")
    return args


def smoke(args: argparse.Namespace) -> None:
    folder = shared_folder()  # one for all ranks
    if PartialState().is_main_process:
        scenes = DigitScenes("memory", 128, task="caption")
        write_llava(scenes, folder / "data.json", folder / "images")
        write_tiny_parts(folder, [turn.text for scene in scenes for turn in scene.turns])
    PartialState().wait_for_everyone()
    if args.dataset is None:
        args.data, args.images = folder / "data.json", folder / "images"
    args.vision, args.text_tokenizer = str(folder / "vision"), str(folder / "llm")
    args.output = args.output or folder / "memory"
    args.compressor_steps, args.latents, args.latent_dim = 60, 8, 32


def train_compressor(encode: SampleEncoder, samples: list, args: argparse.Namespace) -> None:
    """Reconstruct image features and caption from the latents; no language model takes part."""
    torch.manual_seed(args.seed)
    compressor = encode.encoder.compressor
    pretrainer = PerceiverPretrainer(compressor, caption_dropout=0.1, seed=args.seed).to(args.device)
    optimizer = torch.optim.AdamW(pretrainer.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(args.compressor_steps, 2))
    draw = random.Random(args.seed)
    for step in range(args.compressor_steps):
        batch = draw.sample(samples, min(args.batch_size, len(samples)))
        rows, image_mask = pack_images(*encode.features(batch))
        ids, text_mask = (tensor.to(args.device) for tensor in encode.tokens([caption_of(sample) for sample in batch]))
        output = pretrainer(rows.float(), ids, image_mask, text_mask)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(pretrainer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == args.compressor_steps - 1:
            print(
                f"compressor step {step}: image {output.image_loss:.3f}, caption {output.text_loss:.3f} nats per token"
            )
    compressor.eval()


def read(args: argparse.Namespace) -> tuple[list, dict[str, str | int]]:
    """The samples of the bank, and what its manifest says about them."""
    if args.dataset:
        import datasets

        rows = datasets.load_dataset(args.dataset, split=args.split, streaming=True)
        if isinstance(rows.features[args.image_column] if rows.features else None, datasets.Image):
            rows = rows.cast_column(args.image_column, datasets.Image(decode=False))  # bytes stay as they are
        columns = Columns(args.image_column, args.text_column, id=args.id_column)
        drawn = gather_rows(rows, args.output / "records", count=args.max_samples, seed=args.seed, columns=columns)
        dataset = LlavaDataset(drawn.json_path, drawn.image_dir)
        return list(dataset), drawn.draw.fingerprint(f"{args.dataset}:{args.split}")
    dataset = LlavaDataset(args.data, args.images, check_images=not args.skip_bad)
    checked = check_samples(dataset, on_error="skip" if args.skip_bad else "raise")
    samples = [sample for sample in checked.samples if sample.images]
    if PartialState().is_main_process:
        print(f"{len(samples)} records with an image, {len(dataset) - len(samples)} without are left out")
        for name, fault in checked.left_out.items():
            print(f"left out {name}: {fault}")
    draw = draw_records([sample.id for sample in samples], args.max_samples, seed=args.seed)
    return [samples[at] for at in draw.indices], draw.fingerprint(args.data.name)


def main() -> None:
    args = parse()
    processes = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=1))
    if args.device == "cuda":
        args.device = str(processes.device)
    with processes.main_process_first():  # one draws, the others read what it drew
        samples, drawn = read(args)

    tower = vision_half(AutoModel.from_pretrained(args.vision)).to(args.device).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.text_tokenizer)
    if args.compressor is not None:
        compressor = PerceiverCompressor.from_pretrained(args.compressor)
    else:
        sizes = PerceiverSizes(num_latents=args.latents, latent_dim=args.latent_dim)
        width = tower.config.hidden_size
        compressor = PerceiverCompressor(width, vocab_size=len(tokenizer), sizes=sizes, seed=args.seed)
    encoder = PairEncoder(
        tower, compressor.to(args.device), AttentionPooledKey(args.alpha), vision_layer=args.vision_layer
    )
    encode = SampleEncoder(encoder, AutoImageProcessor.from_pretrained(args.vision), tokenizer)

    saved = args.output / "compressor"
    with processes.main_process_first():  # under torchrun one process trains it, and the others read it
        if args.compressor is None and saved.exists():
            print(f"going on with the compressor in {saved}")
            encoder.compressor = PerceiverCompressor.from_pretrained(saved).to(args.device)
        else:
            if args.compressor is None:
                train_compressor(encode, samples, args)
            if processes.is_main_process:
                encoder.compressor.save_pretrained(saved)

    made_by = {**encode.fingerprint(), **drawn}
    bank = build_memory_bank(samples, encode, args.output / "bank", batch_size=args.batch_size, fingerprint=made_by)
    if not processes.is_main_process:
        return
    note_key(args.output, vision=str(args.vision), vision_layer=args.vision_layer, alpha=args.alpha)

    samples = samples[:REPORT_ON]
    own = torch.tensor([sample.sample_id for sample in samples])
    groups = torch.tensor([sample.group for sample in samples])
    queries = torch.cat([encode.queries(samples[at : at + 64]) for at in range(0, len(samples), 64)])
    print(bank)
    print(f"drawn: {drawn}")
    print(leakage_report(bank, queries.cpu().float(), own, groups))
    print(f"the memory is in {args.output}")


if __name__ == "__main__":
    main()
