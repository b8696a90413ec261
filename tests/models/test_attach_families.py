"""Every family of vision-language model, tiny and random, with retrieval attached.

The reference needs no hook: the same bare model, in which every retrieval token of every row is stored as the embedding
of a spare vocabulary id of its own, and is fed by that id.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
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


def pictures(name: str, count: int, seed: int = 3) -> dict[str, Tensor]:
    """What the family's processor makes of `count` pictures of 16 x 16."""
    if name in LANGUAGE:
        return {}
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = torch.tensor([[16, 16]] * count)
    if name.endswith("_vl"):
        return {"pixel_values": draw(count * 16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}
    if name in ("llava_next", "llava_onevision"):
        return {"pixel_values": draw(count, 2, 3, 16, 16), "image_sizes": sizes}
    if name in ("idefics3", "smolvlm"):
        return {"pixel_values": draw(count, 1, 3, 16, 16)}
    if name in ("pixtral", "mistral3"):
        return {"pixel_values": draw(count, 3, 16, 16), "image_sizes": sizes}
    if name == "mllama":
        ones = torch.ones(count, 1, dtype=torch.long)
        return {
            "pixel_values": draw(count, 1, 1, 3, 16, 16), "aspect_ratio_ids": ones,
            "aspect_ratio_mask": ones[..., None],
        }  # fmt: skip
    return {"pixel_values": draw(count, 3, 16, 16)}


def image_tokens(name: str) -> int:
    return {"llava_next": 10, "llava_onevision": 10, "idefics3": 1, "smolvlm": 1, "mllama": 1}.get(name, 4)


def batch_of(name: str, rows: list[list[int]], images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Left-padded inputs; -1 in a row stands for one image with its marker."""
    close = [103] if name in CLOSED else []
    run = [] if name in LANGUAGE else [IMAGE] * image_tokens(name) + close
    written = [[token for part in row for token in (run if part == -1 else [part])] for row in rows]
    width = max(len(row) for row in written)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in written])
    keep = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in written])
    batch = {"input_ids": ids, "attention_mask": keep, **images}
    if name.endswith("_vl"):
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    if name == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma":
        batch["token_type_ids"] = torch.zeros_like(ids)
    if name == "mllama":
        batch["cross_attention_mask"] = ((ids == IMAGE).cumsum(1) > 0).long()[..., None, None]
    if name == "instructblip":
        batch["qformer_input_ids"] = torch.tensor([[7, 8]] * len(rows))
        batch["qformer_attention_mask"] = torch.ones(len(rows), 2, dtype=torch.long)
    return batch


ROWS = [[1, -1, 5, 6, 7], [1, 8, 9, 10, -1, 5]]
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
    memory = MemoryBank(key_dim=32, value_shape=(L, LATENT))
    memory.add(torch.randn(12, 32), torch.randn(12, L, LATENT))
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


@pytest.mark.parametrize("name", EVERY)
def test_attached_retrieval_is_as_if_it_were_words(name: str) -> None:
    model = build(name)
    plain = batch_of(name, ROWS, pictures(name, 2))
    with torch.no_grad():
        untouched = model(**plain).logits
    aligned = attach(model)
    spliced = aligned.splice(plain)
    values, mask = latents()
    tokens = aligned.connector(values, mask).tokens.detach()
    bare, words = reference(model, spliced, aligned.rag_token_id, tokens)
    columns = [c for c in range(120) if not SPARE <= c < SPARE + 2 * K * L]  # a tied head knows the new words too
    with torch.no_grad():
        found = aligned(**spliced, retrieved=(values, mask)).logits
        expected = bare(**words).logits
    keep = spliced["attention_mask"].bool()
    torch.testing.assert_close(found[keep][:, columns], expected[keep][:, columns], rtol=2e-4, atol=2e-4)
    other = values.flip(0)  # the other row's
    with torch.no_grad():
        moved = aligned(**spliced, retrieved=(other, mask)).logits
    assert (moved[keep] - found[keep]).abs().max() > 1e-2  # the latents matter
    # off, and detached: the untouched model to the bit
    with torch.no_grad():
        assert torch.equal(aligned(**plain, retrieval="off").logits, untouched)
        assert aligned.detach() is model
        assert torch.equal(model(**plain).logits, untouched)
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.get_input_embeddings()._forward_pre_hooks
    assert "_tinyalign_attached" not in vars(model)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_the_connector_and_nothing_frozen(name: str) -> None:
    model = build(name)
    aligned = attach(model).train()
    batch = aligned.splice(batch_of(name, ROWS, pictures(name, 2)))
    labels = torch.where(batch["input_ids"] < 50, batch["input_ids"], -100)
    values, mask = latents()
    values.requires_grad_()
    output = aligned(**batch, labels=labels, retrieved=(values, mask))
    output.loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in aligned.connector.parameters()
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    aligned.zero_grad()
    values.grad = None
    logits = aligned(**batch, retrieved=(values, mask)).logits
    logits[0].sum().backward()
    assert values.grad is not None
    assert values.grad[0].abs().sum() > 0
    assert (values.grad[1] == 0).all()  # a row depends on its own latents only


def new_ids(written: Tensor, batch: dict[str, Any]) -> list[list[int]]:
    """What was written behind the prompt, without padding; some families return the prompt with it."""
    width = batch["input_ids"].shape[1]
    behind = written[:, width:] if torch.equal(written[:, :width], batch["input_ids"]) else written
    return [[token for token in row if token != 0] for row in behind.tolist()]


@pytest.mark.parametrize("name", EVERY)
def test_a_left_padded_batch_is_generated_as_its_rows_are(name: str) -> None:
    aligned = attach(build(name))
    given = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]}  # a random model might write one
    values, mask = latents()
    batch = aligned.splice(batch_of(name, ROWS, pictures(name, 2)))
    together = new_ids(aligned.generate(**batch, retrieved=(values, mask), **given), batch)
    again = aligned.generate(**batch, retrieved=(values, mask), use_cache=False, **given)
    assert together == new_ids(again, batch)
    both = pictures(name, 2)
    for at, row in enumerate(ROWS):
        share = {n: v[at * (len(v) // 2) : (at + 1) * (len(v) // 2)] for n, v in both.items()}
        one = aligned.splice(batch_of(name, [row], share))
        alone = aligned.generate(**one, retrieved=(values[at : at + 1], mask[at : at + 1]), **given)
        assert new_ids(alone, one) == together[at : at + 1]
    assert not any(aligned.rag_token_id in row for row in together)
