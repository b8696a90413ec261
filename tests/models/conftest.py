"""Tiny random models of every family, built from configs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    GemmaConfig,
    Lfm2Config,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
)

from tinyalign.memory import MemoryBank
from tinyalign.models import TinyAlignVLM

sys.path.insert(0, str(Path(__file__).parent))  # attach_families, for tests and for the processes that they start

VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWERS: dict[str, Callable[[], Any]] = {
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(intermediate_size=32, **VISION)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **VISION)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VISION)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VISION)),
}
LANGUAGE: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**TEXT),
    "phi": lambda: PhiConfig(**TEXT),
    "qwen2": lambda: Qwen2Config(tie_word_embeddings=True, **TEXT),
    "gemma": lambda: GemmaConfig(head_dim=16, **TEXT),
    "gemma2": lambda: Gemma2Config(head_dim=16, final_logit_softcapping=0.5, **TEXT),
    "stablelm": lambda: StableLmConfig(**TEXT),
    "lfm2": lambda: Lfm2Config(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, **TEXT),
}
PATCHES, LATENTS, LATENT_DIM = 4, 3, 8


def make_bank(entries: int = 20, *, seed: int = 0, **options: Any) -> MemoryBank:
    """Entries 2n and 2n + 1 show the same image."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(key_dim=16, value_shape=(LATENTS, LATENT_DIM), **options)
    keys = torch.randn(entries, 16, generator=generator)
    values = torch.randn(entries, LATENTS, LATENT_DIM, generator=generator)
    bank.add(keys, values, ids=torch.arange(entries), groups=torch.arange(entries) // 2)
    return bank


def make_lm(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LANGUAGE[family]()).eval()
    with torch.no_grad():  # initial weights are so small that logits hardly depend on the input
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
            elif family == "phi" and parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # Phi's head has a bias that must survive
    return model


def make_tower(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return TOWERS[kind]().eval()


def make_model(family: str = "llama", tower: str = "siglip", *, bank: Any = "default", **options: Any) -> TinyAlignVLM:
    options.setdefault("num_neighbours", 2)
    memory = make_bank() if bank == "default" else bank
    model = TinyAlignVLM.from_parts(make_tower(tower), make_lm(family), memory=memory, **options)
    return model.eval()


def image_row(*parts: Any) -> list[int]:
    """Ids of a row; "image" stands for one image's placeholders."""
    return [token for part in parts for token in ([-200] * PATCHES if part == "image" else [part])]


def pad_rows(rows: list[list[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    gaps = [[0] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    keep = [[False] * len(gap) + [True] * len(row) for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(keep if left else [line[::-1] for line in keep])


@pytest.fixture(scope="session")
def build() -> Any:
    """The builders above, under one name."""
    from types import SimpleNamespace

    return SimpleNamespace(
        bank=make_bank, lm=make_lm, tower=make_tower, model=make_model, row=image_row, pad=pad_rows,
        towers=tuple(TOWERS), families=tuple(LANGUAGE),
    )  # fmt: skip
