from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tinyalign.memory import AttentionPooledKey, FingerprintMismatch, MemoryBank
from tinyalign.models import PairEncoder, TinyAlignConfig, TinyAlignVLM

PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def logits(build: Any, model: TinyAlignVLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([build.row(1, "image", 5, 6)]), PIXELS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2", "gemma", "gemma2", "stablelm", "lfm2"])
def test_a_saved_model_is_the_same_to_the_bit(build: Any, tmp_path: Path, family: str, tower: str) -> None:
    """Phi's head has a bias, Qwen2's is tied to its embeddings: both must survive."""
    bank = build.bank()
    model = build.model(family, tower, bank=bank, rag_gate=True, rag_num_ranks=2, retrieval_seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", memory=bank).eval()
    assert type(again) is TinyAlignVLM
    assert torch.equal(logits(build, again), logits(build, model))
    ids = torch.tensor([build.row(1, "image", 5, 6)])
    given = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(ids, PIXELS, **given), model.generate(ids, PIXELS, **given))
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_parts_saved_apart_are_read_back(build: Any, tmp_path: Path) -> None:
    """The tower and the language model come from folders of their own, as a user has them."""
    from transformers import AutoModel, AutoModelForCausalLM

    build.tower("siglip").save_pretrained(tmp_path / "vision")
    build.lm("phi").save_pretrained(tmp_path / "llm")
    parts = (AutoModel.from_pretrained(tmp_path / "vision"), AutoModelForCausalLM.from_pretrained(tmp_path / "llm"))
    model = TinyAlignVLM.from_parts(*parts, memory=build.bank(), num_neighbours=2).eval()
    assert torch.equal(logits(build, model), logits(build, build.model("phi")))


def test_the_bank_is_data_and_is_found_again(build: Any, tmp_path: Path) -> None:
    build.bank().save(tmp_path / "run" / "bank")
    model = build.model(bank=MemoryBank.load(tmp_path / "run" / "bank"))
    model.save_pretrained(tmp_path / "run" / "checkpoint-7")
    assert json.loads((tmp_path / "run/checkpoint-7/config.json").read_text())["memory_path"] == "../bank"
    assert not any("memory" in name or "bank" in name for name in model.state_dict())
    expected = logits(build, model)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")  # checkpoint and bank move together
    again = TinyAlignVLM.from_pretrained(tmp_path / "elsewhere" / "checkpoint-7").eval()
    assert torch.equal(logits(build, again), expected)
    shutil.rmtree(tmp_path / "elsewhere" / "bank")
    lost = TinyAlignVLM.from_pretrained(tmp_path / "elsewhere" / "checkpoint-7").eval()
    with pytest.raises(ValueError, match=r"nothing was found at '\.\./bank' beside the checkpoint"):
        logits(build, lost)
    lost.memory = build.bank()
    assert torch.equal(logits(build, lost), expected)


def test_a_checkpoint_may_be_called_anything(build: Any, tmp_path: Path) -> None:
    """Earlier code recognises checkpoints by a substring of their path, and stores an absolute bank path."""
    build.bank().save(tmp_path / "x")
    model = build.model(bank=MemoryBank.load(tmp_path / "x"))
    for name in ("lora", "a b", "ünï", "pretrain"):
        model.save_pretrained(tmp_path / name)
        assert str(tmp_path) not in (tmp_path / name / "config.json").read_text()
        assert torch.equal(logits(build, TinyAlignVLM.from_pretrained(tmp_path / name).eval()), logits(build, model))


def test_a_bank_made_by_another_encoder_is_refused_on_loading(build: Any, tmp_path: Path) -> None:
    model = build.model()
    model.save_pretrained(tmp_path / "model")
    other = PairEncoder(build.tower("siglip", 1), None, AttentionPooledKey()).fingerprint()
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder_weights"):
        TinyAlignVLM.from_pretrained(tmp_path / "model", memory=build.bank(fingerprint=other))
    same = PairEncoder(build.tower("siglip"), None, AttentionPooledKey()).fingerprint()
    TinyAlignVLM.from_pretrained(tmp_path / "model", memory=build.bank(fingerprint=same))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_are_loaded_strictly(build: Any, tmp_path: Path, change: str) -> None:
    build.model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del weights["rag_connector.mlp.layers.0.weight"]
    else:
        weights["rag_connector.extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"must hold exactly this model's weights, got {change} keys \['rag_connector"
    ):
        TinyAlignVLM.from_pretrained(tmp_path)


def test_the_format_is_numbered(build: Any, tmp_path: Path) -> None:
    build.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_number"] == 1
    assert config["model_type"] == "tinyalign"
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_number": 9}))
    with pytest.raises(ValueError, match="format_number must be 1, got 9"):
        TinyAlignVLM.from_pretrained(tmp_path)


def test_the_config_alone_says_what_the_model_is(build: Any, tmp_path: Path) -> None:
    model = build.model(
        "gemma", "clip", rag_num_tokens=3, vision_layer=-1, key=AttentionPooledKey(alpha=0.7, scale=3.0)
    )
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, TinyAlignConfig)
    assert (config.text_config.model_type, config.vision_config.model_type) == ("gemma", "clip_vision_model")
    assert (config.rag_num_tokens, config.vision_layer, config.num_latents, config.latent_dim) == (3, -1, 3, 8)
    key = TinyAlignVLM.from_pretrained(tmp_path).query_encoder.key
    assert (key.alpha, key.scale) == (0.7, 3.0)
    fresh = TinyAlignVLM(config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_half_precision_keeps_small_connectors_in_full(build: Any, tmp_path: Path) -> None:
    build.model().save_pretrained(tmp_path)
    model = TinyAlignVLM.from_pretrained(tmp_path, dtype=torch.bfloat16, memory=build.bank()).eval()
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if "connector" in name or "prompt" in name} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if name.startswith(("vision", "language"))} == {torch.bfloat16}
    exact = logits(build, build.model())
    torch.testing.assert_close(logits(build, model).float(), exact, rtol=0.1, atol=0.15)


def test_copies_share_the_bank_and_nothing_else(build: Any) -> None:
    model = build.model()
    packed = pickle.dumps(model)  # before its first call: the hooks of transformers' towers cannot be pickled
    twin = copy.deepcopy(model)
    assert twin.memory is model.memory
    assert torch.equal(logits(build, twin), logits(build, model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert logits(build, model).abs().sum() > 0
    assert torch.equal(logits(build, pickle.loads(packed)), logits(build, model))


@pytest.mark.parametrize("arm", ["off", "bank"])
def test_a_config_made_by_hand_knows_the_languages_bos(build: Any, tmp_path: Path, arm: str) -> None:
    """Without a `bos_token_id` of its own it takes the language model's; None says that rows have none."""
    parts = {"text_config": build.lm("llama").config, "vision_config": build.tower("siglip").config}
    given = {**parts, "retrieval": arm, "num_latents": 3, "latent_dim": 8, "num_neighbours": 2}
    bank, rows = build.bank(), torch.tensor([[1, 5, 6, 7]])  # no image: retrieval stands behind BOS

    def loss(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = TinyAlignVLM(TinyAlignConfig(**given, **options)).eval()
        values, mask = bank.gather(torch.tensor([[0, 2]]))
        found = {} if arm == "off" else {"retrieved": (values.float(), mask)}
        with torch.no_grad():
            return model(rows, labels=rows, **found).loss  # type: ignore[no-any-return]

    assert torch.equal(loss(), loss(bos_token_id=1))
    assert torch.equal(loss(), loss(bos_token_id=None)) == (arm == "off")
    for bos in (None, 7):
        TinyAlignConfig(**given, bos_token_id=bos).save_pretrained(tmp_path)
        assert TinyAlignConfig.from_pretrained(tmp_path).bos_token_id == bos
    assert TinyAlignConfig(**given).bos_token_id == 1
