"""Ask a saved model about an image, and see which memories it was given.

    python examples/generate.py --model runs/stage2 --image photo.jpg --question "What is in the picture?"

Several images: repeat --image and write <image> in the question where each belongs. `--retrieval off` asks the same
model without its memory.

With --smoke the script makes its own model, bank and picture, asks twice, and prints that both answers agree.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign.data import ChatRenderer, DigitScenes, PlainRenderer
from tinyalign.memory import AttentionPooledKey, MemoryBank, build_memory_bank
from tinyalign.models import ARMS, PairEncoder, SampleEncoder, TinyAlignProcessor, TinyAlignVLM
from tinyalign.models.tiny import write_tiny_parts
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="what examples/train_llava_format.py wrote")
    parser.add_argument("--bank", type=Path, help="the bank's folder, if it is no longer where the model was told")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--retrieval", choices=[arm for arm in ARMS if arm in ("bank", "off", "prompt")])
    parser.add_argument("--prompt-form", choices=("chat", "plain"), default="chat", help="as in training")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="run on a model made on the spot")
    args = parser.parse_args()
    if args.smoke:
        smoke(args)
    if args.model is None:
        parser.error("--model is required (or --smoke)")
    return args


def smoke(args: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tinyalign-"))
    scenes = DigitScenes("memory", 32)
    parts = write_tiny_parts(folder, [turn.text for sample in scenes for turn in sample.turns])
    tower, tokenizer = AutoModel.from_pretrained(parts.vision), AutoTokenizer.from_pretrained(parts.llm)
    pictures = AutoImageProcessor.from_pretrained(parts.vision)
    sizes = PerceiverSizes(token_dim=32, num_latents=4, latent_dim=32, num_self_attends=2)
    encoder = PairEncoder(tower, PerceiverCompressor(64, vocab_size=len(tokenizer), sizes=sizes), AttentionPooledKey())
    encode = SampleEncoder(encoder, pictures, tokenizer)
    bank = build_memory_bank(scenes, encode, folder / "bank", fingerprint=encode.fingerprint(), progress=False)
    llm = AutoModelForCausalLM.from_pretrained(parts.llm)
    model = TinyAlignVLM.from_parts(tower, llm, tokenizer=tokenizer, memory=bank, compressor=encoder.compressor)
    args.model, args.max_new_tokens = folder / "model", 8
    model.save_pretrained(args.model)
    TinyAlignProcessor.for_model(model, pictures, tokenizer).save_pretrained(args.model)
    DigitScenes("heldout", 1)[0].images[0].save(folder / "picture.png")
    args.image, args.question = [folder / "picture.png"], "describe the image ."


def answer(model: TinyAlignVLM, processor: TinyAlignProcessor, args: argparse.Namespace) -> tuple[str, list[str]]:
    renderer = (ChatRenderer if args.prompt_form == "chat" else PlainRenderer)(processor.tokenizer)
    prompt = processor.prompt(args.question, num_images=len(args.image), renderer=renderer)
    inputs = processor(images=args.image, text=prompt).to(args.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    torch.manual_seed(args.seed)
    new = model.generate(**inputs, retrieval=args.retrieval, max_new_tokens=args.max_new_tokens, **sampling)
    remembered: list[str] = []
    if (args.retrieval or model.config.retrieval) == "bank":
        with torch.no_grad():
            found = model(**inputs, retrieval="bank").neighbour_ids[0]
        notes = model.memory.metadata(found[found >= 0].cpu())
        remembered = [str(note.get("text", note)) for note in notes]
    return processor.tokenizer.decode(new[0], skip_special_tokens=True).strip(), remembered


def main() -> None:
    args = parse()
    memory = None if args.bank is None else MemoryBank.load(args.bank, mmap=True)
    model = TinyAlignVLM.from_pretrained(args.model, memory=memory).to(args.device).eval()
    processor = TinyAlignProcessor.from_pretrained(args.model)
    said, remembered = answer(model, processor, args)
    for rank, text in enumerate(remembered, start=1):
        print(f"memory {rank}: {text}")
    print(f"answer: {said}")
    if args.smoke:
        print(f"the second answer agrees: {answer(model, processor, args)[0] == said}")


if __name__ == "__main__":
    main()
