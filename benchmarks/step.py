"""A training step of the baseline and of TinyAlign, as time over the baseline's beside the ratio of FLOPs.

    python benchmarks/step.py                          # small parts, CPU, about two minutes on one core
    python benchmarks/step.py --sizes tinyllama --device cuda --batch-size 16 --dtype bfloat16

Random weights of the named sizes. A step is what stage 1 does: neighbours looked up and their values gathered from the
memory-mapped bank (here by the same process, in training by a loader's worker), vision tower, both connectors, frozen
language model, loss on the answers' rows, backward, AdamW. Models take turns within a round, so that a machine that
slows down slows all of them; printed is the median over rounds of the ratio within a round. FLOPs are counted by
torch.utils.flop_counter over forward and backward.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tinyalign.data import Sample, Turn
from tinyalign.memory import MemoryBank, precompute_neighbours
from tinyalign.models import TinyAlignVLM
from tinyalign.training import NeighbourFeed

ENTRIES = 2000
LATENTS, LATENT_DIM = 32, 96  # Table 3
ARMS = {  # name: neighbours, pooled tokens
    "baseline": None,
    "K = 0": (0, None),
    "K = 5 pooled to 5 x 8": (5, 40),
    "K = 5": (5, None),
    "K = 10": (10, None),
}


class Sizes(NamedTuple):
    vision: dict
    text: dict
    image_size: int
    text_tokens: int
    answer_tokens: int


SIZES = {
    "small": Sizes(
        {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3,
         "patch_size": 16},
        {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
         "vocab_size": 8192},
        384, 64, 24,
    ),
    "tinyllama": Sizes(
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
         "patch_size": 14},
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000},
        384, 64, 24,
    ),
}  # fmt: skip


def make_bank(width: int) -> MemoryBank:
    path = Path(tempfile.mkdtemp()) / "bank"
    bank = MemoryBank(key_dim=width, value_shape=(LATENTS, LATENT_DIM))
    bank.add(torch.randn(ENTRIES, width), torch.randn(ENTRIES, LATENTS, LATENT_DIM), ids=torch.arange(ENTRIES))
    bank.save(path)
    return MemoryBank.load(path, mmap=True)


class Step:
    """One model with its optimizer and its batch."""

    def __init__(self, arm: tuple[int, int | None] | None, sizes: Sizes, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        dtype, device = getattr(torch, args.dtype), args.device
        tower = SiglipVisionModel(SiglipVisionConfig(image_size=sizes.image_size, **sizes.vision)).to(dtype)
        llm = LlamaForCausalLM(LlamaConfig(**sizes.text)).to(dtype)
        width = sizes.vision["hidden_size"]
        bank = None if arm is None else make_bank(width)
        options = {} if arm is None else {"num_neighbours": arm[0], "rag_num_tokens": arm[1]}
        self.model = TinyAlignVLM.from_parts(tower, llm, memory=bank, bos_token_id=1, **options).to(device).train()
        self.model.freeze_for("pretrain")
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)  # as Trainer does
        B, N = args.batch_size, self.model.vision.num_tokens
        ids = torch.cat([torch.full((B, N), -200), torch.randint(3, 1000, (B, sizes.text_tokens))], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -sizes.answer_tokens :] = ids[:, -sizes.answer_tokens :]
        pixels = torch.randn(B, 3, sizes.image_size, sizes.image_size)
        self.batch = {
            "input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": torch.ones_like(ids).bool(),
            "image_counts": torch.ones(B, dtype=torch.long),
        }  # fmt: skip
        self.batch = {name: value.to(device) for name, value in self.batch.items()}
        self.batch["max_supervised_tokens"] = sizes.answer_tokens
        picture, said = (Path("picture"),), (Turn("user", "<image>"), Turn("assistant", "words"))
        self.samples = [Sample(str(at), at, at, picture, said) for at in range(B)]
        if bank is None or arm[0] == 0:
            self.feed = NeighbourFeed(None, "off")
        else:
            own = torch.arange(B)
            table = precompute_neighbours(
                bank, torch.randn(B, width), arm[0], sample_ids=own, exclude_ids=own, path=bank.path.parent / "table"
            )
            self.feed = NeighbourFeed(bank, "bank", k=arm[0], table=table)
        self.retrieval = "off" if self.feed.arm == "off" and bank is None else "bank"
        self.device = device

    def __call__(self) -> float:
        """Seconds of one step, and of the part of it that laid the neighbours ready."""
        self.wait()
        start = self.clock()
        fed = self.feed(self.samples)
        fed = {n: tuple(t.to(self.device) for t in v) if isinstance(v, tuple) else v for n, v in fed.items()}
        if self.retrieval == "bank" and "retrieved" not in fed:  # K = 0: the branch is there and gives no token
            empty = torch.zeros(len(self.samples), 0, LATENTS, LATENT_DIM, device=self.device)
            fed["retrieved"] = (empty, torch.zeros(len(self.samples), 0, dtype=torch.bool, device=self.device))
        loss = self.model(**self.batch, **fed, retrieval=self.retrieval).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        return self.clock() - start

    def clock(self) -> float:
        """On the CPU the process's own time, which other programs do not lengthen; elsewhere the wall's."""
        return time.process_time() if self.device == "cpu" else time.perf_counter()

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()

    def feeding(self, rounds: int) -> float:
        """Seconds that laying the neighbours ready takes."""
        times = []
        for _ in range(rounds):
            start = self.clock()
            self.feed(self.samples)
            times.append(self.clock() - start)
        return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = SIZES[args.sizes]
    steps = {name: Step(arm, sizes, args) for name, arm in ARMS.items()}
    for step in steps.values():
        step()  # the tower's first run, and allocations
    flops = {name: step.flops() for name, step in steps.items()}
    # The order is turned round every time: what a step leaves in the caches goes to another one.
    orders = [list(steps), list(steps)[::-1]]
    rounds = [{name: steps[name]() for name in orders[at % 2]} for at in range(args.rounds)]
    print(f"{args.sizes} parts, {args.device}, {args.dtype}, batch {args.batch_size}, {args.rounds} rounds; ")
    print(f"baseline: {median(r['baseline'] for r in rounds):.3f} s and {flops['baseline'] / 1e9:.1f} GFLOP per step")
    print(f"\n{'':<24}{'tokens':>8}{'FLOPs':>8}{'time':>8}{'time/FLOPs':>12}{'feeding':>9}")
    for name, step in steps.items():
        arm = ARMS[name]
        retrieved = 0 if arm is None else arm[1] or arm[0] * LATENTS
        tokens = step.batch["input_ids"].shape[1] + retrieved
        work = flops[name] / flops["baseline"]
        taken = median(r[name] / r["baseline"] for r in rounds)
        feeding = step.feeding(20) / median(r["baseline"] for r in rounds)
        print(f"{name:<24}{tokens:>8}{work:>8.3f}{taken:>8.3f}{taken / work:>12.3f}{feeding:>9.4f}")


if __name__ == "__main__":
    main()
