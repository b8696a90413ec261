"""A real LLaVA with retrieval attached goes through collect_nll: arms, placeholders, images, the plain model's NLL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tinyalign.connectors import RAGConnector
from tinyalign.memory import MemoryBank
from tinyalign.models import AttachedVLM, attach_memory
from tinyalign.theory import collect_nll, conditional_v_information, delta_emi

IMAGE, K, LATENTS, DIM, WIDTH = 100, 2, 3, 8, 32
SIDE = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **SIDE},
        text_config={"model_type": "llama", "vocab_size": 120, "pad_token_id": 0, **SIDE},
        image_token_index=IMAGE,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that logits depend on what is read
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def plain() -> LlavaForConditionalGeneration:
    return build()


@pytest.fixture(scope="module")
def aligned() -> AttachedVLM:
    llava = build()
    torch.manual_seed(1)
    memory = MemoryBank(key_dim=WIDTH, value_shape=(LATENTS, DIM))
    memory.add(torch.randn(12, WIDTH), torch.randn(12, LATENTS, DIM))
    connector = RAGConnector(DIM, WIDTH)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.mul_(3.0)
    return attach_memory(llava, memory=memory, connector=connector, k=K).eval()


def batches(width: int = 4) -> list[dict[str, Tensor]]:
    """Two batches of two left-padded rows: an image, a question, and an answer of two tokens."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(2):
        words = torch.randint(3, 60, (2, width), generator=generator)
        front = torch.tensor([[1] + [IMAGE] * 4, [1] + [IMAGE] * 4])
        ids = torch.cat([front, words], dim=1)
        ids[1] = torch.cat([torch.tensor([0]), ids[1, :-1]])
        shown = (ids != 0).long()
        labels = ids.clone()
        labels[:, :-2] = -100
        found.append(
            {
                "input_ids": ids,
                "attention_mask": shown,
                "labels": labels,
                "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
                "sample_ids": torch.tensor([2 * number, 2 * number + 1]),
                "groups": torch.tensor([number, number]),
            }
        )
    return found


def direct(model: Any, spliced: list[dict[str, Any]], **options: Any) -> np.ndarray:
    """NLL of the labelled tokens row by row, from the logits themselves."""
    sums = []
    for batch in spliced:
        # Retrieval leaves out the row's own entries and does not read its answer: it is told both.
        known = batch if options else {n: v for n, v in batch.items() if n not in ("sample_ids", "groups", "labels")}
        logits = model(**known, **options).logits.double().log_softmax(-1)
        for row, target in enumerate(batch["labels"]):
            places = (target != -100).nonzero()[:, 0]
            sums.append(-sum(logits[row, place - 1, target[place]].item() for place in places.tolist()))
    return np.array(sums)


def test_the_plain_model_is_collected_as_it_is(plain: LlavaForConditionalGeneration) -> None:
    table = collect_nll(plain, batches())
    np.testing.assert_allclose(table.nll, direct(plain, batches()), rtol=1e-5)
    assert table.tokens.tolist() == [2, 2, 2, 2]
    assert table.groups.tolist() == [0, 0, 1, 1]


def test_arms_of_the_attached_model_are_told_apart(aligned: AttachedVLM, plain: LlavaForConditionalGeneration) -> None:
    spliced = [aligned.splice(batch) for batch in batches()]
    tables = {arm: collect_nll(aligned, spliced, condition=arm) for arm in ("retrieval", "shuffled", "random", "off")}
    expected = direct(aligned, spliced, retrieval="bank")
    np.testing.assert_allclose(tables["retrieval"].nll, expected, rtol=1e-5)
    for arm in ("shuffled", "random", "off"):
        assert np.abs(tables[arm].nll - expected).max() > 1e-3, arm
    np.testing.assert_allclose(tables["off"].nll, collect_nll(plain, batches()).nll, rtol=1e-5)
    gain = delta_emi(tables["shuffled"], tables["retrieval"], interval="t")
    assert gain.value == pytest.approx(float((tables["shuffled"].nll - expected).mean()), abs=1e-5)
    assert gain.n_clusters == 2
    assert tables["retrieval"].tokenizer == "vocab:120"


def test_without_its_image_it_reads_the_instruction_alone(
    aligned: AttachedVLM, plain: LlavaForConditionalGeneration
) -> None:
    spliced = [aligned.splice(batch) for batch in batches()]
    without = collect_nll(aligned, spliced, condition="no_image")
    alone = []
    for batch in batches():
        for row in range(2):
            keep = (batch["input_ids"][row] != IMAGE) & (batch["attention_mask"][row] == 1)
            alone.append({name: batch[name][row, keep][None] for name in ("input_ids", "attention_mask", "labels")})
    np.testing.assert_allclose(without.nll, direct(plain, alone), rtol=1e-4)
    seen = conditional_v_information(without, collect_nll(aligned, spliced, condition="off"), interval="t")
    assert np.abs(seen.samples).min() > 1e-4
