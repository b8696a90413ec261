"""Every family of vision-language model and language model, tiny and random, and the batches its processor would make.

Made from configs, two layers of width 32, so that a whole family runs in a fraction of a second.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tinyalign.connectors import RAGConnector
from tinyalign.memory import MemoryBank
from tinyalign.models import attach_memory

IMAGE, SPARE, WIDTH = 100, 60, 32
TEXT = {
    "vocab_size": 120, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
OPT = {
    "model_type": "opt", "vocab_size": 120, "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": WIDTH, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLIP, SIGLIP = {"model_type": "clip_vision_model", **VIT}, {"model_type": "siglip_vision_model", **VIT}
LLAMA, QWEN2, GEMMA = {"model_type": "llama", **TEXT}, {"model_type": "qwen2", **TEXT}, {"head_dim": 8, **TEXT}
PIXTRAL = {"model_type": "pixtral", "head_dim": 8, **VIT}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
MARKERS = {"image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
QWEN_VIT = {
    "depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    "hidden_size": 32,
}  # fmt: skip
QWEN25_VIT = {
    **QWEN_VIT, "intermediate_size": 48, "out_hidden_size": WIDTH, "fullatt_block_indexes": [1], "window_size": 16,
}  # fmt: skip
QWEN3_VIT = {
    **QWEN_VIT, "intermediate_size": 48, "out_hidden_size": WIDTH, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
QFORMER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "encoder_hidden_size": 32, "vocab_size": 60,
}  # fmt: skip
MLLAMA_VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
    "image_size": 16, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 64, "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip

FAMILIES: dict[str, Callable[[], Any]] = {
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE)
    ),
    "pixtral": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=LLAMA,
            vision_config=PIXTRAL,
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    ),
    "llava_next": lambda: hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, image_grid_pinpoints=[[16, 16]]
        )
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            text_config=QWEN2, vision_config=SIGLIP, image_token_index=IMAGE, image_grid_pinpoints=[[16, 16]]
        )
    ),
    "paligemma": lambda: hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            text_config={"model_type": "gemma", **GEMMA},
            vision_config=SIGLIP,
            image_token_index=IMAGE,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
        )
    ),
    "idefics3": lambda: hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(text_config=LLAMA, vision_config=VIT, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    ),
    "smolvlm": lambda: hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(text_config=LLAMA, vision_config=VIT, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    ),
    "qwen2_vl": lambda: hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config={**TEXT, **ROPE}, vision_config={**QWEN_VIT, "embed_dim": 32, "mlp_ratio": 2}, **MARKERS
        )
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config={**TEXT, **ROPE}, vision_config=QWEN25_VIT, **MARKERS)
    ),
    "qwen3_vl": lambda: hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config={**GEMMA, **ROPE}, vision_config=QWEN3_VIT, **MARKERS)
    ),
    "internvl": lambda: hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            text_config=QWEN2,
            vision_config={**VIT, "image_size": [16, 16], "patch_size": [4, 4]},
            image_token_id=IMAGE,
            downsample_ratio=0.5,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config={"sliding_window": 64, **GEMMA},
            vision_config=SIGLIP,
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
            boi_token_index=102,
            eoi_token_index=103,
        )
    ),
    "mllama": lambda: hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(
            text_config={"cross_attention_layers": [1], **TEXT, "num_hidden_layers": 3},
            vision_config=MLLAMA_VIT,
            image_token_index=IMAGE,
        )
    ),
    "blip2": lambda: hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(
            text_config=OPT, vision_config=VIT, qformer_config=QFORMER, num_query_tokens=4, image_token_index=IMAGE
        )
    ),
    "instructblip": lambda: hf.InstructBlipForConditionalGeneration(
        hf.InstructBlipConfig(
            text_config=OPT, vision_config=VIT, qformer_config=QFORMER, num_query_tokens=4, image_token_index=IMAGE
        )
    ),
    "mistral3": lambda: hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            text_config={"model_type": "mistral", **GEMMA},
            vision_config={**PIXTRAL, "patch_size": 4},
            image_token_index=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        )
    ),
    "aya_vision": lambda: hf.AyaVisionForConditionalGeneration(
        hf.AyaVisionConfig(
            text_config={"model_type": "cohere2", "sliding_window": 64, **GEMMA},
            vision_config={**SIGLIP, "patch_size": 4},
            image_token_index=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=32,
        )
    ),
}
LANGUAGE: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**TEXT)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GEMMA)),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**TEXT)),
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, **TEXT)
    ),
}
CLOSED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"}  # families that write a marker behind an image
EVERY = [*FAMILIES, *LANGUAGE]


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = {**FAMILIES, **LANGUAGE}[name]().eval()
    with torch.no_grad():  # so that logits depend on what is read
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
            elif parameter.dim() == 0:  # Mllama's gates start closed
                parameter.fill_(0.5)
    return model.requires_grad_(False)


def image_tokens(name: str) -> int:
    return {"llava_next": 10, "llava_onevision": 10, "idefics3": 1, "smolvlm": 1, "mllama": 1}.get(name, 4)


def picture(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(31 + number))


def pictures(name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    """What the family's processor makes of pictures of 16 x 16, given as their numbers row by row."""
    flat = [number for row in rows for number in row]
    if name in LANGUAGE or not flat:
        return {}
    most, count = max(len(row) for row in rows), len(flat)
    sizes = torch.tensor([[16, 16]] * count)
    if name.endswith("_vl"):
        patches = torch.cat([picture(number, 16, 96) for number in flat])
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}
    if name in ("llava_next", "llava_onevision"):
        return {"pixel_values": torch.stack([picture(number, 2, 3, 16, 16) for number in flat]), "image_sizes": sizes}
    if name in ("idefics3", "smolvlm", "mllama"):  # rows keep their own, padded with empty pictures
        padded = [
            torch.stack([*(picture(n, 3, 16, 16) for n in row), *[torch.zeros(3, 16, 16)] * (most - len(row))])
            for row in rows
        ]
        there = torch.tensor([[at < len(row) for at in range(most)] for row in rows]).long()
        if name == "mllama":
            tiles = torch.stack(padded)[:, :, None]
            return {"pixel_values": tiles, "aspect_ratio_ids": there, "aspect_ratio_mask": there[..., None]}
        return {"pixel_values": torch.stack(padded)}
    stacked = {"pixel_values": torch.stack([picture(number, 3, 16, 16) for number in flat])}
    if name == "instructblip":
        stacked["qformer_input_ids"] = torch.tensor([[7, 8]] * count)
        stacked["qformer_attention_mask"] = torch.ones(count, 2, dtype=torch.long)
    return {**stacked, "image_sizes": sizes} if name in ("pixtral", "mistral3") else stacked


def batch_of(name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    """Left-padded inputs; -1 in a row stands for picture 0 with its placeholders and marker, -2 for picture 1, ..."""
    close = [103] if name in CLOSED else []
    run = [] if name in LANGUAGE else [IMAGE] * image_tokens(name) + close
    written = [[token for part in row for token in (run if part < 0 else [part])] for row in rows]
    width = max(len(row) for row in written)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in written])
    keep = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in written])
    seen = [[-1 - part for part in row if part < 0] for row in rows]
    batch = {"input_ids": ids, "attention_mask": keep, **pictures(name, seen)}
    if name.endswith("_vl"):
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    if name == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma":
        batch["token_type_ids"] = torch.zeros_like(ids)
    if name == "mllama" and "pixel_values" in batch:
        number = torch.arange(1, max(map(len, seen)) + 1)
        batch["cross_attention_mask"] = ((ids == IMAGE).cumsum(1)[..., None] >= number).long()[..., None]
    return batch


ROWS = [[1, -1, 5, 6, 7], [1, 8, 9, 10, -2, 5]]
K, L, LATENT = 2, 3, 8


def latents(rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, K, L, LATENT, generator=generator), torch.ones(rows, K, dtype=torch.bool)


def attach(model: Any, *, processor: Any = None, **options: Any) -> Any:
    torch.manual_seed(9)
    connector = RAGConnector(LATENT, WIDTH)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.mul_(3.0)
    width = 64 if type(model).__name__.startswith("Mllama") else 32
    memory = MemoryBank(key_dim=width, value_shape=(L, LATENT))
    memory.add(torch.randn(12, width), torch.randn(12, L, LATENT))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of language models, which have no tower
        return attach_memory(model, processor, memory=memory, connector=connector, k=K, **options).eval()


def reference(model: Any, batch: dict[str, Any], rag_id: int, tokens: Tensor) -> tuple[Any, dict[str, Any]]:
    """A bare copy that knows each retrieval token as a word, and the batch that says so."""
    bare = copy.deepcopy(model)
    table = bare.get_input_embeddings()
    scale = (table(torch.tensor([[3]]))[0, 0] / table.weight[3]).mean()
    ids = batch["input_ids"].clone()
    with torch.no_grad():
        for row in range(len(ids)):
            names = torch.arange(tokens.shape[1]) + SPARE + row * tokens.shape[1]
            table.weight[names] = tokens[row] / scale
            ids[row, ids[row] == rag_id] = names
    return bare, {**batch, "input_ids": ids}


def supervised(batch: dict[str, Any]) -> dict[str, Any]:
    """With every word as a label, but for the first of each row: BOS is never predicted."""
    ids = batch["input_ids"]
    word = (ids > 1) & (ids < 50)
    return {**batch, "labels": torch.where(word, ids, -100)}


def new_ids(written: Tensor, batch: dict[str, Any]) -> list[list[int]]:
    """What was written behind the prompt, without padding; some families return the prompt with it."""
    width = batch["input_ids"].shape[1]
    behind = written[:, width:] if torch.equal(written[:, :width], batch["input_ids"]) else written
    return [[token for token in row if token != 0] for row in behind.tolist()]


COLUMNS = [column for column in range(120) if not SPARE <= column < SPARE + 2 * K * L]  # a tied head knows new words
