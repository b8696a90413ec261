r"""What retrieval costs at the paper's sizes: tokens, operations, memory, time, for the baseline and several K.

    python examples/cost.py                     # Phi-2, TinyLlama and Qwen2-0.5B behind SigLIP so400m-384
    python examples/cost.py --models phi-2      # some of them
    python examples/cost.py --measure           # time per step too: real sizes on a GPU, small ones on a CPU

No weights are needed: models are built from their published sizes on the meta device. Operations come twice, from the
library's closed form and from torch's counter over forward and backward pass, which must agree; memory is what autograd
keeps for the backward pass. Expect K = 5 to cost about a fifth more per pre-training step, and pooling to 8 tokens
about one hundredth.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinyalign.models import FlopCount, TinyAlignConfig, TinyAlignVLM, count_flops

# Sizes as published in each model's config.json on the Hugging Face hub.
TOWER = SiglipVisionConfig(  # google/siglip-so400m-patch14-384
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
    patch_size=14,
)  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "phi-2": PhiConfig(  # microsoft/phi-2
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32, vocab_size=51200,
        partial_rotary_factor=0.4, max_position_embeddings=2048,
    ),
    "tinyllama": LlamaConfig(  # TinyLlama/TinyLlama-1.1B-Chat-v1.0
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048,
    ),
    "qwen2-0.5b": Qwen2Config(  # Qwen/Qwen2-0.5B
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
    ),
}  # fmt: skip
LATENTS, LATENT_DIM = 32, 96  # the paper's Table 3
# Text positions per row and how many of them are learned: a caption; a conversation. The paper does not say.
TEXT = {"pretrain": (32, 24), "instruct": (256, 128)}
PER_DEVICE = {"pretrain": 16, "instruct": 12}  # the paper's Table 2
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {"retrieval": "off"},
    "K=1": {"num_neighbours": 1},
    "K=5": {"num_neighbours": 5},
    "K=10": {"num_neighbours": 10},
    "K=5, pooled to 8": {"num_neighbours": 5, "rag_num_tokens": 8},
}
# Table 4, for Phi-2: operations and steps per second of baseline and TinyAlign.
PAPER = {"pretrain": ((2.05e14, 2.45e14), (0.173, 0.112)), "instruct": ((6.12e18, 6.15e18), (0.083, 0.075))}
SAMPLES = 665_000  # of the paper's instruction data
SMALL_TOWER = SiglipVisionConfig(
    hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=112, patch_size=14
)
SMALL_LANGUAGE = LlamaConfig(
    hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, vocab_size=2000
)
SMALL_LATENTS, SMALL_BATCH, SMALL_TEXT = 3, 4, 12  # 64 image tokens: retrieval is in proportion as at the real sizes
ROUNDS = 12
console = Console(width=118)


class Row(NamedTuple):
    """One variant of one model in one stage, per sample unless named otherwise."""

    model: str
    stage: str
    variant: str
    parameters: int
    trained: int
    positions: int
    flops: int
    counted: int
    kept_bytes: int
    weight_bytes: int
    state_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(LANGUAGE), default=tuple(LANGUAGE))
    parser.add_argument("--measure", action="store_true", help="train some steps with random weights and time them")
    parser.add_argument("--output", type=Path, default=Path("runs/cost"))
    parser.add_argument("--smoke", action="store_true", help="one model, two variants, a short measurement")
    args = parser.parse_args()
    variants = VARIANTS
    if args.smoke:
        args.models, args.measure = ("qwen2-0.5b",), True
        variants = {name: VARIANTS[name] for name in ("baseline", "K=5")}
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [cost(name, stage, variant, variants) for name in args.models for stage in TEXT for variant in variants]
    with open(args.output / "cost.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*Row._fields, "flops_ratio"])
        writer.writerows([*row, row.flops / base_of(row, rows).flops] for row in rows)
    console.print(as_table(rows))
    for row in rows:
        if row.flops != row.counted:
            raise RuntimeError(f"cost: count_flops must equal torch's counter, got {row}. Report this.")
    console.print("count_flops equals torch's counter in every row.")
    for sentence in beside_the_paper(rows):
        console.print(f"- {sentence}")
    if args.measure:
        console.print(measure(variants, 2 if args.smoke else ROUNDS))


def config_of(tower: Any, language: Any, latents: int, variant: dict[str, Any]) -> TinyAlignConfig:
    config = TinyAlignConfig(
        text_config=copy.deepcopy(language),
        vision_config=copy.deepcopy(tower),
        num_latents=latents,
        latent_dim=LATENT_DIM,
        bos_token_id=None,
        **{"retrieval": "bank", **variant},
    )
    config._attn_implementation = "eager"  # plain products, which the counter sees whatever the device
    return config


def cost(name: str, stage: str, variant: str, variants: dict[str, dict]) -> Row:
    """Build the model without weights and watch one training step of one row."""
    config = config_of(TOWER, LANGUAGE[name], LATENTS, variants[variant])
    text, learned = TEXT[stage]
    closed = count_flops(config, text_tokens=text, supervised_tokens=learned, stage=stage)
    with FakeTensorMode(), torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = TinyAlignVLM(config)  # its connectors are in float32 all the same
        finally:
            torch.set_default_dtype(torch.float32)
        model.freeze_for(stage).train()
        model.config.use_cache = False
        patches = model.vision.num_tokens
        batch = step_inputs(config, patches, text, 1, torch.device("meta"))
        features = torch.zeros(1, patches, TOWER.hidden_size, dtype=torch.bfloat16)
        weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        seen: dict[int, int] = {}
        keep = Keeper(weights, seen, patches + config.num_retrieval_tokens + text)
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model(**batch, image_features=features, max_supervised_tokens=learned).loss.backward()
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        return Row(
            model=name,
            stage=stage,
            variant=variant,
            parameters=sum(weight.numel() for weight in model.parameters()),
            trained=trained,
            positions=patches + config.num_retrieval_tokens + text,
            flops=closed.total,
            counted=counter.get_total_flops() + tower_flops(config),
            kept_bytes=sum(seen.values()),
            weight_bytes=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
            state_bytes=12 * trained,  # a gradient and AdamW's two moments in float32
        )


class Keeper:
    """Adds up what autograd keeps for the backward pass: each tensor once, weights and attention matrices left out.

    A fused attention kernel keeps no matrix of scores; what is left is what `--checkpointing` would save.
    """

    def __init__(self, weights: set[int], seen: dict[int, int], length: int) -> None:
        self.weights, self.seen, self.length = weights, seen, length
        self.held: list[Tensor] = []  # so that no id is used twice

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        square = tensor.dim() >= 3 and tuple(tensor.shape[-2:]) == (self.length, self.length)
        if storage._cdata not in self.weights and not square and not tensor.is_leaf:
            self.held.append(tensor)
            self.seen[storage._cdata] = storage.nbytes()
        return tensor


def step_inputs(config: TinyAlignConfig, patches: int, text: int, rows: int, device: torch.device) -> dict[str, Any]:
    """A batch in which nothing but the sizes matters."""
    ids = torch.full((rows, patches + text), 5, device=device)
    ids[:, 1 : 1 + patches] = config.image_token_id
    labels = torch.full_like(ids, 6)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    batch["image_counts"] = torch.ones(rows, dtype=torch.long, device=device)
    if config.retrieval != "off":
        K = config.num_neighbours
        values = torch.zeros(rows, K, config.num_latents, config.latent_dim, device=device)
        batch["retrieved"] = (values, torch.ones(rows, K, dtype=torch.bool, device=device), None)
    return batch


def tower_flops(config: TinyAlignConfig) -> int:
    """What torch's counter sees in the tower, up to the layer that features are read from."""
    with FakeTensorMode(), torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False, depth=6) as counter:
        vision = copy.deepcopy(config.vision_config)
        vision._attn_implementation = "eager"
        SiglipVisionModel(vision)(pixel_values=torch.zeros(1, 3, vision.image_size, vision.image_size))
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    run = config.vision_layer % (vision.num_hidden_layers + 1)
    layers = [f".encoder.layers.{at}" for at in range(run)]
    return sum(flops for name, flops in by_module.items() if name.endswith((".embeddings", *layers)))


def base_of(row: Row, rows: list[Row]) -> Row:
    return next(r for r in rows if (r.model, r.stage, r.variant) == (row.model, row.stage, "baseline"))


def as_table(rows: list[Row]) -> Table:
    table = Table(title="Per sample, one training step: SigLIP so400m-384 in front")
    heads = ("model", "stage", "variant", "weights", "trained", "positions", "TFLOP", "ratio", "kept MB", "ratio")
    for head in (*heads, "fixed GB"):
        table.add_column(head, justify="left" if head in ("model", "stage", "variant") else "right", no_wrap=True)
    for row in rows:
        base = base_of(row, rows)
        table.add_row(
            row.model,
            row.stage,
            row.variant,
            f"{row.parameters / 1e9:.3f} B",
            f"{row.trained / 1e6:.1f} M",
            str(row.positions),
            f"{row.flops / 1e12:.2f}",
            f"{row.flops / base.flops:.3f}",
            f"{row.kept_bytes / 1e6:.0f}",
            f"{row.kept_bytes / base.kept_bytes:.3f}",
            f"{(row.weight_bytes + row.state_bytes) / 1e9:.1f}",
            end_section=row.variant == list(VARIANTS)[-1],
        )
    table.caption = (
        f"Text positions per row (learned): {TEXT}. Kept: for the backward pass, bfloat16, without attention matrices "
        f"or checkpointing. Fixed: weights, and 12 bytes per trained one."
    )
    return table


def beside_the_paper(rows: list[Row]) -> list[str]:
    """The paper's Table 4 next to ours, for Phi-2."""
    lines = []
    for stage, ((flops, more), (steps, fewer)) in PAPER.items():
        own = {row.variant: row for row in rows if row.model == "phi-2" and row.stage == stage}
        lines.append(
            f"The paper, {stage}: {flops:.2e} to {more:.2e} operations (x{more / flops:.3f}) while the time per step "
            f"grows x{steps / fewer:.2f}."
        )
        if not own:
            continue
        size, weights = PER_DEVICE[stage], sum(w.numel() for w in language_weights("phi-2"))
        said = ", ".join(
            f"{name} {size * row.flops:.2e} (x{row.flops / own['baseline'].flops:.3f})" for name, row in own.items()
        )
        lines.append(f"Ours, {stage}, one step of {size} rows: {said}.")
        rows_counted, what = (size, f"{size} rows") if stage == "pretrain" else (SAMPLES, f"{SAMPLES} samples")
        tokens = [count / (6 * weights * rows_counted) for count in (flops, more)]
        lines.append(
            f"By the rule of 6 operations per weight and token, the paper's {stage} figures are {what} of "
            f"{tokens[0]:.0f} and {tokens[1]:.0f} tokens."
        )
    return lines


def language_weights(name: str) -> list[Tensor]:
    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(LANGUAGE[name]).parameters())


def measure(variants: dict[str, dict], rounds: int) -> Table:
    """Time stage-1 steps with random weights; all variants take turns, so that they share what the machine does."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    tower, language, latents = (
        (TOWER, LANGUAGE["qwen2-0.5b"], LATENTS) if gpu else (SMALL_TOWER, SMALL_LANGUAGE, SMALL_LATENTS)
    )
    size, text = (PER_DEVICE["pretrain"], TEXT["pretrain"][0]) if gpu else (SMALL_BATCH, SMALL_TEXT)
    steps, flops, memory = {}, {}, {}
    for name, variant in variants.items():
        config = config_of(tower, language, latents, variant)
        config._attn_implementation = "sdpa"
        model = TinyAlignVLM(config).to(device, torch.bfloat16 if gpu else torch.float32)
        model.freeze_for("pretrain").train()
        patches = model.vision.num_tokens
        batch = step_inputs(config, patches, text, size, device)
        pixels = torch.zeros(size, 3, tower.image_size, tower.image_size, device=device, dtype=model.vision.dtype)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-4)

        def step(model: Any = model, batch: dict = batch, pixels: Tensor = pixels, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            model(**batch, pixel_values=pixels).loss.backward()
            optimizer.step()

        steps[name] = step
        flops[name] = stage_1_flops(config, text, size).total
    clock = time.perf_counter if gpu else time.process_time  # a CPU's own time, which other programs do not lengthen
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = clock()
            step()
            if gpu:
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 1e9
            if turn > 1:
                times[name].append(clock() - started)
    table = Table(title=f"Stage-1 steps of {size} rows, {'real' if gpu else 'small'} sizes on {device.type}")
    for head in ("variant", "steps per second", "time to baseline", "quartiles", "FLOPs to baseline", "peak GB"):
        table.add_column(head, justify="left" if head == "variant" else "right")
    for name, spent in times.items():
        ratios = np.divide(spent, times["baseline"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        table.add_row(
            name, f"{1 / np.median(spent):.2f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}",
            f"{flops[name] / flops['baseline']:.3f}", f"{memory[name]:.1f}" if gpu else "",
        )  # fmt: skip
    return table


def stage_1_flops(config: TinyAlignConfig, text: int, size: int) -> FlopCount:
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return count_flops(
        config, text_tokens=text, batch_size=size, stage="pretrain", supervised_tokens=patches + text - 1
    )


if __name__ == "__main__":
    main()
