"""Each raise of the composed model, by its message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinyalign.memory import AttentionPooledKey, FingerprintMismatch, MemoryBank
from tinyalign.models import PairEncoder, TinyAlignConfig, TinyAlignVLM

PIXELS = torch.zeros(1, 3, 16, 16)


def call(build: Any, model: TinyAlignVLM | None = None, **changes: Any) -> Any:
    given: dict[str, Any] = {"input_ids": torch.tensor([build.row(1, "image", 5)]), "pixel_values": PIXELS, **changes}
    return (model or build.model())(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids must have shape \(B, S\), got \(2,\)"),
        ({"input_ids": None}, "input_ids must be given, got None"),
        (
            {"attention_mask": torch.ones(1, 3)},
            r"attention_mask must have the shape of input_ids \(1, 6\), got \(1, 3\)",
        ),
        ({"labels": torch.ones(1, 3)}, r"labels must have the shape of input_ids \(1, 6\), got \(1, 3\)"),
        (
            {"image_features": torch.zeros(1, 4, 16)},
            "pixel_values must be None when image_features are given, got both",
        ),
        (
            {"pixel_values": None, "image_features": torch.zeros(1, 4, 15)},
            r"image_features must have shape \(num_images, N, 16\), got \(1, 4, 15\)",
        ),
        ({"image_counts": torch.tensor([1, 1])}, r"image_counts must have shape \(1,\), got \(2,\)"),
        (
            {"image_counts": torch.tensor([2])},
            "placeholders must match the image tokens row by row, got 4 placeholders for 8",
        ),
        ({"pixel_values": None}, "got 4 placeholders for 0 image tokens in row 0"),
        ({"pixel_values": PIXELS.repeat(2, 1, 1, 1)}, "got 8 image tokens where the rows count 4"),
        ({"retrieval": "magic"}, r"retrieval must be one of \('bank', .*got 'magic'"),
        (
            {"retrieved": (torch.zeros(1, 2, 3, 9), torch.ones(1, 2, dtype=torch.bool))},
            r"retrieved must begin with values of shape \(1, K, 3, 8\), got \(1, 2, 3, 9\)",
        ),
        ({"query_text_ids": torch.ones(1, 2, dtype=torch.long)}, "text_ids must be None without a text_encoder"),
    ],
)
def test_a_call_that_does_not_fit(build: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(build, **changes)


def test_a_placeholder_cut_in_one_row_is_not_made_up_by_another(build: Any) -> None:
    """Two rows whose counts are wrong in opposite ways: their sum is right, the features would shift."""
    ids = torch.tensor([[-200] * 3 + [5] * 3, [-200] * 5 + [5]])
    with pytest.raises(ValueError, match="got 3 placeholders for 4 image tokens in row 0"):
        build.model()(ids, torch.zeros(2, 3, 16, 16), image_counts=torch.tensor([1, 1]))


def test_an_unknown_argument_is_refused(build: Any) -> None:
    """Hugging Face models swallow unknown keywords; a misspelt neighbour_ids would train on something else."""
    with pytest.raises(TypeError, match="arguments must be known to the model, got 'neighbor_ids'"):
        call(build, neighbor_ids=torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"got 'inputs_embeds'.*not inputs_embeds"):
        call(build, inputs_embeds=torch.zeros(1, 2, 32))


def test_training_without_ids_could_leak(build: Any) -> None:
    model = build.model().train()
    with pytest.raises(
        ValueError, match=r"sample_ids must be given in training, got None. Without them a sample could"
    ):
        call(build, model)
    call(build, model, sample_ids=torch.tensor([3]))
    call(build, model, neighbour_ids=torch.tensor([[0, 1]]))
    call(build, model, retrieval="off")
    call(build, model.eval())


def test_no_bank_no_branch_empty_bank(build: Any) -> None:
    model = build.model()
    model.memory = None
    with pytest.raises(ValueError, match=r"memory must be attached to retrieve, got None\. Set model\.memory"):
        call(build, model)
    model.config.memory_path = "../bank"
    with pytest.raises(ValueError, match=r"nothing was found at '\.\./bank' beside the checkpoint"):
        call(build, model)
    with pytest.raises(ValueError, match="retrieval must be 'off' for a model without a retrieval branch, got 'bank'"):
        call(build, build.model(bank=None), retrieval="bank")
    with pytest.raises(ValueError, match="memory must hold at least one entry, got an empty bank"):
        call(build, build.model(bank=MemoryBank(key_dim=16, value_shape=(3, 8))))


def test_features_that_are_no_numbers_are_not_searched_with(build: Any) -> None:
    with pytest.raises(ValueError, match="queries must be finite"):
        call(build, pixel_values=None, image_features=torch.full((1, 4, 16), torch.nan))


def test_a_bank_of_another_shape(build: Any) -> None:
    model = build.model()
    with pytest.raises(ValueError, match=r"memory must hold values of shape \(3, 8\), got \(2, 8\)"):
        model.memory = MemoryBank(key_dim=16, value_shape=(2, 8))
    with pytest.raises(ValueError, match=r"memory must hold values of shape \(L, latent_dim\), got \(24,\)"):
        build.model(bank=MemoryBank(key_dim=16, value_shape=(24,)))
    with pytest.raises(ValueError, match=r"memory must be as wide as its queries, 16, got keys of width 17"):
        model.memory = MemoryBank(key_dim=17, value_shape=(3, 8))


class Compressor(torch.nn.Module):
    """Stands in for a trained compressor: mean of the features, shifted by a weight."""

    num_latents, latent_dim = 3, 8

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.full((3, 8), shift))

    def forward(self, features: Any, text: Any = None, image_mask: Any = None, text_mask: Any = None) -> Any:
        return features.mean(dim=(1, 2))[:, None, None] + self.shift


def test_a_bank_made_by_another_encoder_is_refused(build: Any) -> None:
    """The paper's Table 6: a mismatched encoder collapses the scores; here it cannot be attached."""
    named = PairEncoder(build.tower("siglip"), Compressor(), AttentionPooledKey()).fingerprint()
    parts = (build.tower("siglip"), build.lm("llama"))
    bank = build.bank(fingerprint=named)
    model = TinyAlignVLM.from_parts(*parts, memory=bank, compressor=Compressor())
    assert model.memory is bank
    with pytest.raises(
        FingerprintMismatch, match=r"key\.encoder \(bank: 'siglip_vision_model', given: 'clip_vision_model'\)"
    ):
        TinyAlignVLM.from_parts(build.tower("clip"), build.lm("llama"), memory=bank)
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder_weights"):
        TinyAlignVLM.from_parts(build.tower("siglip", 1), build.lm("llama"), memory=bank)
    with pytest.raises(FingerprintMismatch, match=r"key\.layer \(bank: 1, given: 2\)"):
        TinyAlignVLM.from_parts(*parts, memory=bank, vision_layer=-1)
    with pytest.raises(FingerprintMismatch, match=r"key\.alpha \(bank: 0\.4, given: 0\.5\)"):
        TinyAlignVLM.from_parts(*parts, memory=bank, key=AttentionPooledKey(alpha=0.5))
    with pytest.raises(FingerprintMismatch, match=r"value\.compressor"):
        TinyAlignVLM.from_parts(*parts, memory=bank, compressor=Compressor(1.0))


def test_a_compressor_of_another_size(build: Any) -> None:
    other = Compressor()
    other.latent_dim = 9
    with pytest.raises(ValueError, match=r"compressor must make the bank's values of shape \(3, 8\), got \(3, 9\)"):
        TinyAlignVLM.from_parts(build.tower("siglip"), build.lm("llama"), memory=build.bank(), compressor=other)


def test_right_padding_is_no_prompt(build: Any) -> None:
    ids, keep = build.pad([build.row(1, "image", 5), [1, 5]])
    with pytest.raises(
        ValueError, match=r"attention_mask must be padded on the left, got rows \[1\] that end in padding"
    ):
        build.model().generate(ids, PIXELS, keep)
    with pytest.raises(ValueError, match="inputs_embeds must be None, got embeddings"):
        build.model().generate(ids[:1], PIXELS, inputs_embeds=torch.zeros(1, 2, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval": "magic"}, "TinyAlignConfig: retrieval must be one of .* got 'magic'"),
        ({"format_number": 2}, "format_number must be 1, got 2. The checkpoint was written by another version"),
        ({"num_neighbours": -1}, "num_neighbours must be at least 0, got -1"),
        ({"image_token_id": 5}, "image_token_id must be negative, got 5"),
    ],
)
def test_a_config_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyAlignConfig(**options)


def test_an_unknown_stage(build: Any) -> None:
    with pytest.raises(ValueError, match=r"stage must be one of \('pretrain', 'instruct'\), got 'both'"):
        build.model().freeze_for("both")
