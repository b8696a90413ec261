from __future__ import annotations

from typing import Any

import pytest
import torch

PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def prompts(build: Any) -> tuple[list[list[int]], torch.Tensor]:
    rows = [
        build.row(1, "image", 5, 6, 7),
        build.row(1, 9, "image", 6, "image", 7),
        build.row(1, 5, 6),
        build.row(1, 11, 12, 13, 14, 15, 16, "image"),
    ]
    return rows, torch.tensor([1, 2, 0, 1])


@pytest.mark.parametrize("retrieval", ["off", "bank", "prompt"])
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2", "gemma", "gemma2", "stablelm", "lfm2"])
def test_a_left_padded_batch_is_its_rows_one_by_one(build: Any, family: str, retrieval: str) -> None:
    model = build.model(family, retrieval=retrieval)
    rows, counts = prompts(build)
    ids, keep = build.pad(rows, left=True)
    together = model.generate(ids, PIXELS, keep, image_counts=counts, max_new_tokens=6, do_sample=False)
    for at, row in enumerate(rows):
        first = int(counts[:at].sum())
        images = PIXELS[first : first + int(counts[at])]
        alone = model.generate(torch.tensor([row]), images, max_new_tokens=6, do_sample=False)
        written = together[at, : alone.shape[1]].tolist()
        assert written == alone[0].tolist()


def greedy(model: Any, ids: torch.Tensor, steps: int, **given: Any) -> list[int]:
    """Append the best token and read everything again, without any cache."""
    new: list[int] = []
    for _ in range(steps):
        following = int(model(ids, **given).logits[0, -1].argmax())
        new.append(following)
        ids = torch.cat([ids, torch.tensor([[following]])], dim=1)
        if following == 2:
            break
    return new


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_generation_with_a_cache_is_reading_again_from_the_start(build: Any, family: str) -> None:
    model = build.model(family)
    ids = torch.tensor([build.row(1, "image", 5, 6)])
    new = model.generate(ids, PIXELS[:1], max_new_tokens=5, do_sample=False)[0].tolist()
    assert new == greedy(model, ids, 5, pixel_values=PIXELS[:1])
    uncached = model.generate(ids, PIXELS[:1], max_new_tokens=5, do_sample=False, use_cache=False)[0].tolist()
    assert new == uncached


def test_retrieval_changes_what_is_written(build: Any) -> None:
    """Otherwise the tests above could pass with retrieval left out."""
    model = build.model()
    ids = torch.tensor([build.row(1, "image", 5, 6)])
    given = {"max_new_tokens": 6, "do_sample": False}
    written = {
        tuple(model.generate(ids, PIXELS[:1], retrieval=arm, sample_ids=torch.tensor([3]), **given)[0].tolist())
        for arm in ("off", "bank", "prompt")
    }
    assert len(written) == 3


def test_beams_and_returned_sequences(build: Any) -> None:
    """Rows are repeated interleaved: with the batch tiled instead, a row would get its neighbour's image."""
    model = build.model()
    rows, counts = prompts(build)
    ids, keep = build.pad(rows[:2], left=True)
    given = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(ids, PIXELS[:3], keep, image_counts=counts[:2], **given)
    assert together.shape[0] == 4
    alone = model.generate(ids[1:], PIXELS[1:3], keep[1:], **given)
    assert together[2:, : alone.shape[1]].tolist() == alone.tolist()


def test_sampling_is_seeded_by_torch(build: Any) -> None:
    model, ids = build.model(), torch.tensor([build.row(1, "image", 5)])
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(ids, PIXELS[:1], max_new_tokens=8, do_sample=True)[0].tolist())
    assert runs[0] == runs[1] != runs[2]


def test_a_language_model_without_a_pad_token_pads_with_its_end(build: Any, recwarn: pytest.WarningsRecorder) -> None:
    model = build.model()
    model.language_model.generation_config.pad_token_id = None
    ids, keep = build.pad([build.row(1, "image", 5), [1, 7]], left=True)
    new = model.generate(ids, PIXELS[:1], keep, max_new_tokens=3, do_sample=False)
    assert new.shape[0] == 2
