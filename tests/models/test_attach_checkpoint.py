"""The adapter folder: all that was trained and where the bank is, and refusal of what does not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attach_families as F
import pytest
import torch

from tinyalign.connectors import RAGConnector
from tinyalign.memory import AttentionPooledKey, FingerprintMismatch, MemoryBank
from tinyalign.models import TowerQuery, attach_memory, load_attached


def prepared() -> tuple[Any, dict[str, Any]]:
    aligned = F.attach(F.build("llava"))
    return aligned, aligned.splice(F.batch_of("llava", F.ROWS))


def test_the_bank_is_found_beside_the_adapter_wherever_both_move(tmp_path: Path) -> None:
    aligned, batch = prepared()
    aligned.memory.save(tmp_path / "run" / "bank")
    aligned.save_pretrained(tmp_path / "run" / "adapter")
    written = {path.name for path in (tmp_path / "run/adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter.safetensors"}
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["memory_path"] == "../bank"
    assert config["query"] == TowerQuery(aligned.model).fingerprint()
    expected = aligned(**batch, sample_ids=torch.tensor([0, 5])).logits
    shutil.move(tmp_path / "run", tmp_path / "moved")
    again = load_attached(F.build("llava"), tmp_path / "moved" / "adapter").eval()
    assert len(again.memory) == 12  # type: ignore[arg-type]
    torch.testing.assert_close(again(**batch, sample_ids=torch.tensor([0, 5])).logits, expected)


def test_a_connector_that_no_longer_trains_is_saved_all_the_same(tmp_path: Path) -> None:
    aligned, batch = prepared()
    aligned.connector.requires_grad_(False).mlp.layers[0].weight.add_(0.1)
    aligned.save_pretrained(tmp_path)
    given = {**batch, "retrieved": F.latents()}
    assert torch.equal(load_attached(F.build("llava"), tmp_path).eval()(**given).logits, aligned(**given).logits)


def test_lora_is_saved_with_the_connector(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)")
    aligned = F.attach(get_peft_model(F.build("llava"), lora))
    batch = aligned.splice(F.batch_of("llava", F.ROWS))
    with torch.no_grad():
        for part, parameter in aligned.named_parameters():
            if "lora_B" in part:
                parameter.normal_()
    given = {**batch, "retrieved": F.latents()}
    expected = aligned(**given).logits
    aligned.save_pretrained(tmp_path)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 20_000  # a few matrices, and no model
    again = load_attached(get_peft_model(F.build("llava"), lora), tmp_path).eval()
    assert torch.equal(again(**given).logits, expected)
    with pytest.raises(ValueError, match="model_class must be 'LlavaForConditionalGeneration', got 'PeftModel'"):
        load_attached(F.build("llava"), tmp_path)


def test_queries_made_otherwise_than_when_it_was_saved_are_refused(tmp_path: Path) -> None:
    aligned, _ = prepared()
    aligned.save_pretrained(tmp_path)
    model = F.build("llava")
    balanced = TowerQuery(model, AttentionPooledKey(balance=True))
    with pytest.raises(FingerprintMismatch, match=r"load_attached: query must be made as it was .* \['key\.balance'\]"):
        load_attached(model, tmp_path, query=balanced)
    F.attach(model).detach()  # and the model is free again
    load_attached(model, tmp_path, query=lambda batch: torch.ones(2, 32))  # nothing is known of it


def test_a_tower_that_trained_no_longer_fits_its_bank(tmp_path: Path) -> None:
    model = F.build("llava")
    bank = MemoryBank(key_dim=32, value_shape=(F.L, F.LATENT), fingerprint=TowerQuery(model).fingerprint())
    aligned = attach_memory(model, memory=bank, connector=RAGConnector(F.LATENT, F.WIDTH))
    tower = aligned.model.model.vision_tower.requires_grad_(True)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.add_(1.0)
    aligned.save_pretrained(tmp_path)
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder_weights"):
        load_attached(F.build("llava"), tmp_path, memory=bank)


def test_what_else_was_trained_is_saved_too(tmp_path: Path) -> None:
    aligned, batch = prepared()
    projector = aligned.model.model.multi_modal_projector
    projector.requires_grad_(True)
    with torch.no_grad():
        for parameter in [*projector.parameters(), *aligned.connector.parameters()]:
            parameter.add_(0.1)
    aligned.save_pretrained(tmp_path)
    again = load_attached(F.build("llava"), tmp_path).eval()
    values, mask = F.latents()
    given = {**batch, "retrieved": (values, mask)}
    torch.testing.assert_close(again(**given).logits, aligned(**given).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_number": 7}, "format_number must be 1, got 7"),
        ({"model_class": "Other"}, "model_class must be 'LlavaForConditionalGeneration', got 'Other'"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    aligned, _ = prepared()
    aligned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_attached(F.build("llava"), tmp_path)


def test_an_adapter_with_other_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    aligned, _ = prepared()
    aligned.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter.safetensors")
    weights["connector.extra"] = weights.pop("connector.mlp.layers.0.bias")
    save_file(weights, tmp_path / "adapter.safetensors")
    model = F.build("llava")
    with pytest.raises(
        ValueError, match=r"missing \['connector\.mlp\.layers\.0\.bias'\] and unexpected \['connector\.extra'\]"
    ):
        load_attached(model, tmp_path)
    F.attach(model)  # and the model is free again
