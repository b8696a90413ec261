"""The closed form against torch's own counter, which watches the model run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    StableLmConfig,
    ViTConfig,
)

from tinyalign.models import TinyAlignConfig, TinyAlignVLM, count_flops
from tinyalign.perceiver import use_attention_backend

LANGUAGE = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma": GemmaConfig,
    "gemma2": Gemma2Config, "stablelm": StableLmConfig, "phi": PhiConfig,
}  # fmt: skip
TOWERS = {
    "siglip": SiglipVisionConfig, "clip": CLIPVisionConfig, "dinov2": Dinov2Config,
    "registers": Dinov2WithRegistersConfig,
}  # fmt: skip
PATCHES = 4


def build(family: str = "llama", tower: str = "siglip", **options: Any) -> TinyAlignConfig:
    """A config of small unequal numbers, so that no two of them can be mistaken for one another."""
    layers, heads, groups = options.pop("layers", 2), options.pop("heads", 4), options.pop("groups", 2)
    text = LANGUAGE[family](
        hidden_size=8 * heads,
        intermediate_size=options.pop("inner", 20),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=37,
        pad_token_id=0,
        **({"head_dim": 12} if family in ("gemma", "gemma2", "qwen3") else {}),
    )
    sizes = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    inner = {} if tower in ("dinov2", "registers") else {"intermediate_size": 20}
    vision = TOWERS[tower](**sizes, **inner, **({"use_swiglu_ffn": True} if options.pop("swiglu", False) else {}))
    options.setdefault("num_latents", 3)
    config = TinyAlignConfig(text_config=text, vision_config=vision, latent_dim=10, bos_token_id=1, **options)
    config._attn_implementation = "eager"  # the CPU's fused kernel is not among those that the counter knows
    return config


def counted(config: TinyAlignConfig, stage: str | None, *, batch: int, images: int, text: int, learned: int) -> Any:
    """What torch's counter sees, in all and under the modules' names."""
    torch.manual_seed(0)
    model = TinyAlignVLM(config)
    model.vision(torch.zeros(1, 3, 8, 8))  # the first pass finds out where the tower may stop
    model.freeze_for(stage or "pretrain").train(stage is not None)
    ids = torch.full((batch, images * PATCHES + text), 5)
    ids[:, 1 : 1 + images * PATCHES] = -200
    labels = torch.full_like(ids, -100)
    labels[:, ids.shape[1] - learned :] = 6
    found = (
        torch.zeros(batch, config.num_neighbours, config.num_latents, 10),
        torch.ones(batch, config.num_neighbours, dtype=torch.bool),
        torch.ones(batch, config.num_neighbours),
    )
    retrieved = {} if config.retrieval in ("off", "prompt") else {"retrieved": found, "retrieval": "bank"}
    learning = {} if stage is None else {"labels": labels}
    with FlopCounterMode(display=False, depth=9) as counter, use_attention_backend("reference"):
        output = model(input_ids=ids, pixel_values=torch.zeros(batch * images, 3, 8, 8), **learning, **retrieved)
        if stage is not None:
            output.loss.backward()
    return counter.get_total_flops(), {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize("stage", [None, "pretrain", "instruct"])
def test_every_language_model_costs_what_is_counted(family: str, stage: str | None) -> None:
    config = build(family, num_neighbours=2)
    total, parts = counted(config, stage, batch=2, images=1, text=7, learned=3)
    closed = count_flops(config, text_tokens=7, batch_size=2, stage=stage, supervised_tokens=3 if stage else None)
    assert closed.total == total
    assert closed.vision == parts["TinyAlignVLM.vision"]
    if stage is None:  # the counter books the backward pass under modules other than those it belongs to
        assert closed.language + closed.head == parts["TinyAlignVLM.language_model"]
        assert closed.connector == parts["TinyAlignVLM.connector"]
        assert closed.rag_connector == parts["TinyAlignVLM.rag_connector"]


@pytest.mark.parametrize(
    ("tower", "swiglu"), [("clip", False), ("dinov2", False), ("dinov2", True), ("registers", False)]
)
@pytest.mark.parametrize("layer", [-1, -3, 1])
def test_every_tower_costs_what_is_counted_up_to_its_layer(tower: str, swiglu: bool, layer: int) -> None:
    config = build(tower=tower, swiglu=swiglu, vision_layer=layer, retrieval="off")
    _, parts = counted(config, None, batch=2, images=1, text=3, learned=1)
    assert count_flops(config, text_tokens=3, batch_size=2).vision == parts["TinyAlignVLM.vision"]


@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_any_shape_costs_what_is_counted(data: st.DataObject) -> None:
    draw = data.draw
    config = build(
        draw(st.sampled_from(["llama", "phi"])),
        layers=draw(st.integers(1, 3)),
        heads=draw(st.sampled_from([2, 4])),
        groups=draw(st.sampled_from([1, 2])),
        inner=draw(st.integers(1, 30)),
        num_neighbours=draw(st.integers(1, 4)),
        num_latents=draw(st.integers(1, 4)),
        connector_depth=draw(st.integers(1, 3)),
        rag_depth=draw(st.integers(1, 3)),
        rag_num_tokens=draw(st.sampled_from([None, 2, 5])),
        rag_gate=draw(st.booleans()),
        rag_num_ranks=draw(st.sampled_from([None, 4])),
        retrieval=draw(st.sampled_from(["off", "bank", "shuffled", "prompt"])),
        vision_layer=draw(st.integers(1, 2)),
    )
    shape = {"batch": draw(st.integers(1, 3)), "images": draw(st.integers(1, 2)), "text": draw(st.integers(2, 9))}
    learned = draw(st.integers(1, shape["text"] - 1))
    stage = draw(st.sampled_from([None, "pretrain", "instruct"]))
    total, _ = counted(config, stage, **shape, learned=learned)
    closed = count_flops(
        config,
        text_tokens=shape["text"],
        batch_size=shape["batch"],
        num_images=shape["images"],
        supervised_tokens=learned if stage else None,
        stage=stage,
    )
    assert closed.total == total


def test_bad_input_is_named() -> None:
    config = build()
    for name in ("text_tokens", "batch_size", "num_images"):
        with pytest.raises(ValueError, match=rf"count_flops: {name} must be .* got 0"):
            count_flops(config, **{"text_tokens": 4, name: 0})
    with pytest.raises(ValueError, match=r"count_flops: stage must be one of .*, got 'both'\."):
        count_flops(config, text_tokens=4, stage="both")
    with pytest.raises(ValueError, match=r"supervised_tokens must lie in \[0, 23\], got 24\."):
        count_flops(config, text_tokens=4, supervised_tokens=24)
    config.text_config = GPT2Config()
    with pytest.raises(ValueError, match=r"count_flops: text_config must be one of .*, got 'gpt2'\."):
        count_flops(config, text_tokens=4)
    config.vision_config = ViTConfig()
    with pytest.raises(ValueError, match=r"count_flops: vision_config must be one of .*, got 'vit'\."):
        count_flops(config, text_tokens=4)
