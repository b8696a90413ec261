from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinyalign.memory import AttentionPooledKey
from tinyalign.models import PairEncoder, TinyAlignVLM, VisionFeatures
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes

SIZES = PerceiverSizes(token_dim=8, num_latents=3, latent_dim=8, num_self_attends=1, num_heads=2)


class Words(nn.Module):
    """A frozen text encoder of the tower's width."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(50, 16, generator=torch.Generator().manual_seed(seed)))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.table(ids)  # type: ignore[no-any-return]


def make(build: Any, *, seed: int = 0, text: bool = False) -> PairEncoder:
    compressor = PerceiverCompressor(16, vocab_size=50, sizes=SIZES, seed=seed)
    return PairEncoder(build.tower("siglip"), compressor, AttentionPooledKey(), text_encoder=Words() if text else None)


def test_a_pair_becomes_its_parts_key_and_value(build: Any) -> None:
    encoder, ids = make(build), torch.tensor([[5, 6, 7]])
    pixels = torch.randn(1, 3, 16, 16)
    features = encoder.image_features(pixels)
    key, value = encoder(features, ids)
    assert torch.equal(features, VisionFeatures(build.tower("siglip"))(pixels))
    assert torch.equal(key, AttentionPooledKey()(features))
    assert torch.equal(value, encoder.compressor(features, ids))  # type: ignore[misc]
    assert not value.requires_grad
    assert not key.requires_grad


def test_the_caption_is_in_the_value_and_not_in_the_key(build: Any) -> None:
    """A query has no caption yet; a key that had one could not be found by image."""
    encoder, features = make(build), torch.randn(1, 4, 16)
    one, two = encoder(features, torch.tensor([[5, 6]])), encoder(features, torch.tensor([[9, 8]]))
    assert torch.equal(one.key, two.key)
    assert (one.value - two.value).norm() / one.value.norm() > 1e-3


def test_a_text_encoder_lets_keys_read_text(build: Any) -> None:
    encoder, features = make(build, text=True), torch.randn(1, 4, 16)
    ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[True, True, False]])
    key = encoder.query(features, ids, text_mask=mask)
    assert torch.equal(key, AttentionPooledKey()(features, Words()(ids, None), text_mask=mask))
    assert not torch.equal(key, encoder.query(features))
    assert torch.equal(key, encoder.query(features, torch.tensor([[5, 6, 40]]), text_mask=mask))


def test_a_model_with_a_text_encoder_asks_by_image_and_instruction(build: Any) -> None:
    encoder = make(build, text=True)
    bank = build.bank(fingerprint=encoder.fingerprint())
    model = TinyAlignVLM.from_parts(
        build.tower("siglip"), build.lm("llama"), memory=bank, text_encoder=Words(), num_neighbours=2
    ).eval()
    ids, pixels = torch.tensor([build.row(1, "image", 5)]), torch.randn(1, 3, 16, 16)
    question, mask = torch.tensor([[7, 8]]), torch.ones(1, 2, dtype=torch.bool)
    found = model(ids, pixels, query_text_ids=question, query_text_mask=mask)
    query = encoder.query(model.vision(pixels), question, text_mask=mask)
    assert torch.equal(found.neighbour_ids, bank.neighbours(query, 2).ids)
    text_only = model(torch.tensor([[1, 5]]), query_text_ids=question, query_text_mask=mask)
    assert text_only.neighbour_ids.min() >= 0  # a question alone is enough to ask by
    with pytest.raises(ValueError, match=r"key\.text_encoder"):
        TinyAlignVLM.from_parts(build.tower("siglip"), build.lm("llama"), memory=bank, text_encoder=Words(1))


def test_the_fingerprint_is_flat_and_names_every_part(build: Any) -> None:
    fields = make(build).fingerprint()
    assert {name.split(".")[0] for name in fields} == {"key", "value"}
    assert all(value is None or isinstance(value, (str, int, float, bool)) for value in fields.values())
    assert fields["key.alpha"] == 0.4
    assert fields["value.compressor"] == make(build).compressor.fingerprint()  # type: ignore[operator, union-attr]
    assert fields != make(build, seed=1).fingerprint()
    assert make(build).key_fingerprint() == make(build, seed=1).key_fingerprint()
    assert make(build, text=True).key_fingerprint() != make(build).key_fingerprint()


class Mean(nn.Module):
    """A key that says nothing about itself."""

    def __init__(self, power: float, device: str = "cpu") -> None:
        super().__init__()
        self.power = power
        self.centre = nn.Buffer(torch.full((16,), power))

    def forward(self, features: torch.Tensor, image_mask: torch.Tensor | None = None) -> torch.Tensor:
        return features.mean(dim=1) ** self.power - self.centre


def test_a_key_of_ones_own_is_named_by_class_numbers_and_buffers(build: Any, tmp_path: Path) -> None:
    fields = PairEncoder(build.tower("siglip"), None, Mean(1.0)).fingerprint()
    assert fields["key.pooling"] == "Mean"
    assert fields["key.pooling.power"] == 1.0
    other = PairEncoder(build.tower("siglip"), None, Mean(2.0)).fingerprint()
    assert {name for name in fields if fields[name] != other[name]} == {"key.pooling.power", "key.pooling.weights"}
    model = TinyAlignVLM.from_parts(build.tower("siglip"), build.lm("llama"), memory=build.bank(), key=Mean(1.0))
    assert model.config.key_settings == {"class": "Mean"}
    output = model.eval()(torch.tensor([build.row(1, "image", 5)]), torch.randn(1, 3, 16, 16))
    assert output.neighbour_ids.shape == (1, 5)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="key must be given for a checkpoint with a key of its own, got None where 'Mean'"
    ):
        TinyAlignVLM.from_pretrained(tmp_path, memory=build.bank())
    again = TinyAlignVLM.from_pretrained(tmp_path, memory=build.bank(fingerprint=fields), key=Mean(1.0))
    assert isinstance(again.query_encoder.key, Mean)
    with pytest.raises(ValueError, match=r"key\.pooling\.power"):
        TinyAlignVLM.from_pretrained(tmp_path, memory=build.bank(fingerprint=fields), key=Mean(2.0))


def test_what_an_encoder_cannot_do(build: Any) -> None:
    with pytest.raises(ValueError, match="compressor must be given to make values, got None"):
        PairEncoder(build.tower("siglip"), None, AttentionPooledKey()).value(torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match=r"text_ids must be None without a text_encoder, got shape \(1, 1\)"):
        make(build).query(torch.zeros(1, 4, 16), torch.tensor([[1]]))
