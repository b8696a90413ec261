"""Train the compressor that fills a memory bank, from a LLaVA-format file and without any language model.

    python examples/pretrain_perceiver.py --data pretrain.json --images images/ --output runs/compressor
        --vision google/siglip-so400m-patch14-384 --tokenizer google-bert/bert-base-uncased

Every caption (what the assistant says) and its image are compressed to a few latents, from which a light decoder must
give both back. Killed? Run the same command again: it goes on from the last checkpoint. At the end it prints how much
of *held-out* pairs can be read back, and saves the compressor to OUTPUT/compressor.

    --features FILE     compute the image features once into this file (half precision) and read them from there;
                        without it the vision tower runs in every step
    --text-encoder ID   sentence-transformers token embeddings in place of token ids
    --smoke             scenes of handwritten digits, a vision tower of random weights: under 30 seconds on one core.
                        Expect a held-out token_accuracy above 0.9.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tinyalign.data import DigitScenes, LlavaDataset, Sample, load_image
from tinyalign.models import VisionFeatures
from tinyalign.perceiver import (
    LossWeights,
    PerceiverCompressor,
    PerceiverPretrainer,
    PerceiverSizes,
    evaluate_reconstruction,
)

SIZES = PerceiverSizes()  # the paper's Table 3: 32 latents of width 96
EPOCHS = 3.0  # for hundreds of thousands of pairs; some hundreds of captions want hundreds of epochs
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
NUM_PATCHES = 128  # patches reconstructed per image and step
LOSS_WEIGHTS = LossWeights()  # patches and words in order once, the words out of order three times
CAPTION_DROPOUT = 0.0  # share of captions to guess from the image alone
MIXED_CAPTIONS = 0.5  # share of captions made of words of the whole batch, so that none is learned by heart
HELD_OUT = 0.05
MAX_CAPTION_TOKENS = 128
SAVE_STEPS = 500
SEED = 0

SMOKE_SIZES = PerceiverSizes(token_dim=64, num_latents=8, latent_dim=64, num_self_attends=2, num_heads=4)
SMOKE_STEPS = 150
SMOKE_SCENES = 800


class Pairs(torch.utils.data.Dataset):
    """Indices only: images and captions are read by the collator, a whole batch at a time."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> int:
        return self.rows[index]


class LiveFeatures:
    """The vision tower, run on whatever images are asked for."""

    def __init__(self, samples: list[Sample], vision: str) -> None:
        self.samples = samples
        self.processor = AutoImageProcessor.from_pretrained(vision)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tower = VisionFeatures(AutoModel.from_pretrained(vision)).to(self.device).requires_grad_(False)
        self.dim = self.tower.dim

    def __call__(self, rows: list[int]) -> Tensor:
        images = [load_image(self.samples[row].images[0]) for row in rows]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self.tower(pixels.to(self.device)).float().cpu()


def made_from(live: LiveFeatures) -> dict[str, str | int]:
    """Everything that decides the features: samples, image files by path and size, image processor, vision tower."""
    files = [(sample.id, str(sample.images[0]), Path(sample.images[0]).stat().st_size) for sample in live.samples]
    inputs = json.dumps([files, live.processor.to_dict()], sort_keys=True, default=str)
    return {"inputs": hashlib.sha256(inputs.encode()).hexdigest(), **live.tower.fingerprint()}


class StoredFeatures:
    """Features of every sample in one memory-mapped file in half precision, computed on the first run."""

    def __init__(self, live: LiveFeatures, path: Path) -> None:
        made_by = made_from(live)
        description = path.with_suffix(".json")
        if not (path.exists() and description.exists()):
            description.unlink(missing_ok=True)
            shape = (len(live.samples), *live(list(range(1))).shape[1:])
            table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            for start in range(0, len(table), BATCH_SIZE):
                rows = list(range(start, min(start + BATCH_SIZE, len(table))))
                table[rows] = live(rows).numpy()
            table.flush()
            description.write_text(json.dumps(made_by))  # last: its presence says that the table is whole
        if json.loads(description.read_text()) != made_by:
            raise SystemExit(
                f"{path} was made from other samples or images, or by another image processor or vision tower. Delete "
                f"it and {description}, or name another file."
            )
        self.table, self.dim = np.load(path, mmap_mode="r"), live.dim

    def __call__(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(self.table[rows].astype(np.float32))


class TokenIds:
    """Captions as the ids of any tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(
            captions, padding=True, truncation=True, max_length=MAX_CAPTION_TOKENS, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"].bool()

    def compressor_arguments(self) -> dict[str, int]:
        return {"vocab_size": len(self.tokenizer)}


class TokenEmbeddings:
    """Captions as the token embeddings of a frozen sentence-transformers model."""

    def __init__(self, encoder: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(encoder)
        self.model.max_seq_length = min(self.model.max_seq_length or MAX_CAPTION_TOKENS, MAX_CAPTION_TOKENS)

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        rows = self.model.encode(
            captions, output_value="token_embeddings", convert_to_tensor=True, show_progress_bar=False
        )
        padded = torch.nn.utils.rnn.pad_sequence([row.float().cpu() for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return padded, torch.arange(padded.shape[1])[None] < lengths[:, None]

    def compressor_arguments(self) -> dict[str, int]:
        return {"text_dim": self(["a"])[0].shape[2]}


def caption_of(sample: Sample) -> str:
    return " ".join(turn.text for turn in sample.turns if turn.role == "assistant")


def run(arguments: argparse.Namespace, sizes: PerceiverSizes, **overrides: object) -> None:
    samples = [sample for sample in LlavaDataset(arguments.data, arguments.images) if len(sample.images) == 1]
    features = LiveFeatures(samples, arguments.vision)
    if arguments.features:
        features = StoredFeatures(features, arguments.features)
    words = TokenEmbeddings(arguments.text_encoder) if arguments.text_encoder else TokenIds(arguments.tokenizer)

    def collate(rows: list[int]) -> dict[str, Tensor]:
        text, text_mask = words([caption_of(samples[row]) for row in rows])
        return {"image_features": features(rows), "text": text, "text_mask": text_mask}

    # Whole groups are held out: another caption of a training image would not be new.
    groups = sorted({sample.group for sample in samples})
    shuffled = np.random.default_rng(SEED).permutation(groups)
    held_out_groups = set(shuffled[: max(1, round(HELD_OUT * len(groups)))].tolist())
    train_rows = [row for row, sample in enumerate(samples) if sample.group not in held_out_groups]
    held_out_rows = [row for row, sample in enumerate(samples) if sample.group in held_out_groups]
    print(
        f"{len(train_rows)} pairs train, {len(held_out_rows)} pairs of {len(held_out_groups)} other images are held out"
    )

    compressor = PerceiverCompressor(features.dim, sizes=sizes, seed=SEED, **words.compressor_arguments())
    model = PerceiverPretrainer(
        compressor,
        loss_weights=LOSS_WEIGHTS,
        caption_dropout=CAPTION_DROPOUT,
        mixed_captions=MIXED_CAPTIONS,
        num_patches=NUM_PATCHES,
        seed=SEED,
    )
    settings = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # below one: a share of all steps
        "weight_decay": 0.01,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "logging_steps": 50,
        "eval_strategy": "steps",
        "eval_steps": SAVE_STEPS,
        **overrides,
    }
    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.output),
            seed=SEED,
            prediction_loss_only=True,
            remove_unused_columns=False,
            report_to=[],
            **settings,
        ),
        train_dataset=Pairs(train_rows),
        eval_dataset=Pairs(held_out_rows),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output) if arguments.output.is_dir() else None)
    if not trainer.is_world_process_zero():
        return
    report = evaluate_reconstruction(model.cpu(), trainer.get_eval_dataloader())
    print("held-out reconstruction:")
    for name, value in report._asdict().items():
        if value is not None:
            print(f"  {name:16s} {value:.3f}" if isinstance(value, float) else f"  {name:16s} {value}")
    compressor.save_pretrained(arguments.output / "compressor")
    print(f"saved to {arguments.output / 'compressor'}, fingerprint {compressor.fingerprint()}")


def make_inputs(folder: Path, count: int = SMOKE_SCENES) -> argparse.Namespace:
    """Everything that a real run reads, made on the spot: a LLaVA file, images, a vision tower, a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    scenes = DigitScenes("memory", count, seed=SEED)
    records, vocabulary = [], {"<pad>": 0, "<unk>": 1}
    for sample in scenes:
        sample.images[0].save(folder / f"{sample.sample_id}.png")
        roles = {"user": "human", "assistant": "gpt"}
        turns = [{"from": roles[turn.role], "value": turn.text} for turn in sample.turns]
        records.append({"id": sample.id, "image": f"{sample.sample_id}.png", "conversations": turns})
        for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(caption_of(sample)):
            vocabulary.setdefault(word, len(vocabulary))
    (folder / "data.json").write_text(json.dumps(records))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder / "tokenizer"
    )
    torch.manual_seed(SEED)
    config = SiglipVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder / "vision")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vision")
    return argparse.Namespace(
        data=folder / "data.json",
        images=folder,
        vision=str(folder / "vision"),
        tokenizer=str(folder / "tokenizer"),
        text_encoder=None,
        features=folder / "features.npy",
        output=folder / "run",
    )


def smoke(folder: Path) -> None:
    run(
        make_inputs(folder),
        SMOKE_SIZES,
        max_steps=SMOKE_STEPS,
        learning_rate=3e-3,
        save_steps=SMOKE_STEPS // 2,
        eval_steps=SMOKE_STEPS // 2,
        use_cpu=True,
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="LLaVA-format JSON")
    parser.add_argument("--images", type=Path, help="folder that the image paths start from")
    parser.add_argument("--vision", help="vision tower: folder or hub id")
    parser.add_argument("--tokenizer", default="google-bert/bert-base-uncased", help="any tokenizer: folder or hub id")
    parser.add_argument("--text-encoder", help="sentence-transformers model: folder or hub id")
    parser.add_argument("--features", type=Path, help="file for precomputed features, .npy")
    parser.add_argument("--output", type=Path, default=Path("runs/compressor"))
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            smoke(Path(folder))
        return
    if not (arguments.data and arguments.vision):
        parser.error("--data and --vision are needed, or --smoke")
    run(arguments, SIZES)


if __name__ == "__main__":
    main()
