"""What a trained TinyAlign arm loses when its values are kept in fewer bits: held-out cross-entropy per value dtype.

On the quickstart's digit scenes: the compressor is trained by reconstruction, the connectors once on float32 values and
once on int8 ones, and each of the two is then measured held out on the values of one bank stored as float32, float16,
bfloat16 and int8 (centred; a scale per entry, and for comparison one per channel). The neighbours are the same
throughout: only what is read from the bank differs. Tower and language model come from the quickstart's cache, or are
trained first (a few minutes).
"""

from __future__ import annotations

import argparse
import copy
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyalign.data import DigitScenes, LlavaCollator
from tinyalign.memory import MemoryBank
from tinyalign.models import SampleEncoder, TinyAlignProcessor, TinyAlignVLM
from tinyalign.models.descent import Descent, descend
from tinyalign.models.digit_parts import load_digit_parts
from tinyalign.models.frozen_training import small_encoder
from tinyalign.perceiver import LossWeights, PerceiverPretrainer
from tinyalign.theory import NLLTable, delta_emi

NEIGHBOURS, BATCH = 5, 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class Split(NamedTuple):
    """Samples with everything that no training changes."""

    rows: dict[str, Tensor]
    features: Tensor
    ids: Tensor  # (N, K) of their neighbours
    scores: Tensor


def encoded(parts: Any, entries: int, steps: int, seed: int) -> tuple[SampleEncoder, dict[str, MemoryBank]]:
    """Train the compressor, encode the bank's scenes, and keep their values in every dtype."""
    scenes = DigitScenes("memory", entries, seed=seed)
    encode = small_encoder(parts.vision_tower, parts.image_processor, parts.tokenizer, seed=seed)
    compressor = encode.encoder.compressor
    features = torch.cat([encode.features(scenes[i : i + 256])[0] for i in range(0, entries, 256)])
    captions, _ = encode.tokens([sample.turns[1].text for sample in scenes])
    pretrainer = PerceiverPretrainer(
        compressor, loss_weights=LossWeights(image=0.1, bag=0.3), mixed_captions=0.0, hidden_dim=64, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)

    def loss_of(_: int) -> Tensor:
        rows = torch.randint(entries, (64,), generator=generator)
        return pretrainer(features[rows], captions[rows]).loss

    descend(loss_of, pretrainer.parameters(), Descent(steps, 2e-3, to_zero=True))
    compressor.requires_grad_(False).eval()
    made = [encode(scenes[i : i + 128]) for i in range(0, entries, 128)]
    keys, values = torch.cat([each.keys for each in made]), torch.cat([each.values for each in made]).float()
    ids, groups = ([int(i) for each in made for i in getattr(each, name)] for name in ("ids", "groups"))
    banks = {}
    for dtype in DTYPES:
        bank = MemoryBank(keys.shape[1], tuple(values.shape[1:]), value_dtype=dtype)
        bank.add(keys, values, ids, groups)
        banks[str(dtype).removeprefix("torch.")] = bank
    bank = MemoryBank(keys.shape[1], tuple(values.shape[1:]), value_dtype=torch.float32)
    bank.add(keys, per_channel(values), ids, groups)
    banks["int8, scale per channel"] = bank
    return encode, banks


def per_channel(values: Tensor) -> Tensor:
    """Round to int8 around the mean over entries with one scale per position, shared by all entries."""
    center = values.mean(0)
    scales = (values - center).abs().amax(0) / 127
    return center + ((values - center) / scales).round() * scales


def split_of(name: str, count: int, parts: Any, encode: SampleEncoder, bank: MemoryBank, seed: int) -> Split:
    processor = TinyAlignProcessor(
        parts.image_processor, parts.tokenizer, num_image_tokens=encode.encoder.vision.num_tokens
    )
    scenes = DigitScenes(name, count, seed=seed)
    rows = LlavaCollator(processor)([scenes[i] for i in range(count)])
    features = torch.cat([encode.encoder.image_features(part) for part in rows.pop("pixel_values").split(256)])
    rows = {key: value for key, value in rows.items() if isinstance(value, Tensor)}
    exclude = {"exclude_ids": rows["sample_ids"], "exclude_groups": rows["groups"]}
    found = bank.neighbours(encode.encoder.query(features), NEIGHBOURS, **exclude)
    return Split(rows, features, found.ids, found.scores)


def called(model: TinyAlignVLM, split: Split, values: Tensor, rows: Tensor) -> Any:
    batch = {name: value[rows] for name, value in split.rows.items()}
    mask = split.ids[rows] >= 0
    return model(
        **batch,
        image_features=split.features[rows],
        retrieved=(values[rows], mask, split.scores[rows]),
        retrieval="bank",
    )


def held_out(model: TinyAlignVLM, split: Split, bank: MemoryBank) -> NLLTable:
    values = bank.gather(split.ids)[0].float()
    with torch.no_grad():
        outputs = [called(model, split, values, rows) for rows in torch.arange(len(split.ids)).split(100)]
    return NLLTable(
        torch.cat([output.per_sample_nll for output in outputs]).double().numpy(),
        torch.cat([output.per_sample_tokens for output in outputs]).numpy(),
        sample_ids=split.rows["sample_ids"].numpy(),
        groups=split.rows["groups"].numpy(),
        condition="held out",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=3000)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--heldout", type=int, default=400)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    parts = load_digit_parts()
    encode, banks = encoded(parts, options.entries, options.steps, options.seed)
    full = banks["float32"]
    train, heldout = (
        split_of(name, count, parts, encode, full, options.seed)
        for name, count in (("train", options.train), ("heldout", options.heldout))
    )
    values = {name: bank.gather(bank.ids)[0].float() for name, bank in banks.items()}
    spread = (values["float32"] - values["float32"].mean(0)).square().mean().sqrt()
    print(
        f"{options.entries} entries, {options.train} scenes to train on for {options.steps} steps, seed {options.seed};"
    )
    print(f"held-out cross-entropy of {options.heldout} scenes in nats per token, and what a caption's information")
    print("(delta EMI against float32, nats per caption) changes by, 95 % interval\n")
    print("| connectors trained on | values read from | error / spread | held-out CE | delta EMI |")
    print("| --- | --- | --- | --- | --- |")
    for trained_on in ("float32", "int8"):
        model = TinyAlignVLM.from_parts(
            parts.vision_tower,
            copy.deepcopy(parts.language_model),
            tokenizer=parts.tokenizer,
            memory=full,
            num_neighbours=NEIGHBOURS,
            retrieval="bank",
            connector_seed=options.seed,
        ).freeze_for("pretrain")
        read = banks[trained_on].gather(train.ids)[0].float()
        generator = torch.Generator().manual_seed(options.seed)
        epochs = options.steps * BATCH // options.train + 1
        order = torch.cat([torch.randperm(options.train, generator=generator) for _ in range(epochs)]).split(BATCH)
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        how = Descent(options.steps, 2e-3, to_zero=True)
        descend(lambda step: called(model, train, read, order[step]).loss, weights, how)  # noqa: B023
        model.eval()
        reference = held_out(model, heldout, full)
        for name, bank in banks.items():
            table = held_out(model, heldout, bank)
            gain = delta_emi(reference, table)
            error = float((values[name] - values["float32"]).square().mean().sqrt() / spread)
            change = "" if name == "float32" else f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
            print(f"| {trained_on} | {name} | {error:.5f} | {table.per_token:.4f} | {change} |", flush=True)


if __name__ == "__main__":
    main()
