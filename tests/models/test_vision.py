from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from tinyalign.models import VisionFeatures

PREFIX = {"siglip": 0, "clip": 1, "dinov2": 1, "registers": 5}


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_features_are_the_towers_patches(build: Any, kind: str, layer: int) -> None:
    """SigLIP has no CLS token: dropping its first token, as earlier code does, loses a patch."""
    tower, pixels = build.tower(kind), torch.randn(3, 3, 16, 16)
    expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[layer][:, PREFIX[kind] :]
    vision = VisionFeatures(tower, layer=layer)
    assert torch.equal(vision(pixels), expected)
    assert expected.shape == (3, vision.num_tokens, vision.dim) == (3, 4, 16)


def test_the_selected_layer_is_llavas(build: Any) -> None:
    """-2 is what enters the last layer: a change of the last layer must not move the features."""
    tower, pixels = build.tower("clip"), torch.randn(1, 3, 16, 16)
    before = VisionFeatures(tower)(pixels)
    with torch.no_grad():
        for parameter in tower.encoder.layers[-1].parameters():
            parameter.zero_()
    assert torch.equal(VisionFeatures(tower)(pixels), before)
    with torch.no_grad():
        for parameter in tower.encoder.layers[0].parameters():
            parameter.zero_()
    assert not torch.equal(VisionFeatures(tower)(pixels), before)


@pytest.mark.parametrize(("config", "model"), [(SiglipConfig, SiglipModel), (CLIPConfig, CLIPModel)])
def test_a_two_tower_model_gives_its_vision_half(config: Any, model: Any) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = model(
        config(text_config={"vocab_size": 50, **size}, vision_config={"image_size": 16, "patch_size": 8, **size})
    )
    assert VisionFeatures(both, layer=-1)(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 16)


def test_a_frozen_tower_keeps_no_graph_and_never_trains(build: Any) -> None:
    vision = VisionFeatures(build.tower("siglip"))
    assert vision(torch.randn(1, 3, 16, 16)).requires_grad  # until it is frozen
    vision.requires_grad_(False).train()
    assert not vision.tower.training
    assert not vision(torch.randn(1, 3, 16, 16)).requires_grad


def test_rows_do_not_depend_on_their_batch(build: Any) -> None:
    vision, pixels = VisionFeatures(build.tower("dinov2")), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(vision(pixels)[2:3], vision(pixels[2:3]), rtol=0, atol=1e-6)


def test_a_tower_in_half_precision_takes_float_pixels(build: Any) -> None:
    vision = VisionFeatures(build.tower("siglip").to(torch.bfloat16))
    assert vision(torch.randn(1, 3, 16, 16)).dtype == torch.bfloat16


def test_the_fingerprint_names_weights_and_layer_but_not_the_dtype(build: Any) -> None:
    first = VisionFeatures(build.tower("siglip")).fingerprint()
    assert VisionFeatures(build.tower("siglip").to(torch.bfloat16)).fingerprint() == first
    assert VisionFeatures(build.tower("siglip"), layer=-1).fingerprint() != first
    assert (
        VisionFeatures(build.tower("siglip"), layer=1).fingerprint() == first
    )  # the same layer, counted from the front
    assert VisionFeatures(build.tower("siglip", 1)).fingerprint()["encoder_weights"] != first["encoder_weights"]
    headless = build.tower("siglip")
    del headless.head
    assert VisionFeatures(headless).fingerprint() == first


def test_a_layer_shared_by_two_models_is_noticed(build: Any) -> None:
    """transformers records hidden states by hooks on the layers; two owners of a layer would record it twice."""
    tower, other = build.tower("siglip"), build.tower("siglip")
    other.encoder = tower.encoder
    pixels = torch.zeros(1, 3, 16, 16)
    other(pixel_values=pixels, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"tower must give 3 hidden states for 2 layers, got 5\. A layer shared"):
        VisionFeatures(tower)(pixels)


class Merging(nn.Module):
    """A tower that gives fewer tokens than patches."""

    config = SimpleNamespace(num_hidden_layers=0, patch_size=8, hidden_size=4, image_size=16, model_type="merging")

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool) -> Any:
        return SimpleNamespace(hidden_states=[self.scale * torch.zeros(len(pixel_values), 3, 4)])


def test_what_cannot_be_read_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"layer must lie in \[-3, 2\] for 2 layers, got -4"):
        VisionFeatures(build.tower("clip"), layer=-4)
    with pytest.raises(TypeError, match="tower must be a Hugging Face vision model with a config, got Linear"):
        VisionFeatures(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"tower must be a vision transformer .* got LlamaForCausalLM with 2 and None"):
        VisionFeatures(build.lm("llama"))
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(n, C, H, W\), got \(3, 16, 16\)"):
        VisionFeatures(build.tower("clip"))(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"one token per patch, 4 of them, got features of shape \(1, 3, 4\)"):
        VisionFeatures(Merging(), layer=0)(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("kind", PREFIX)
def test_nothing_behind_the_selected_layer_runs_twice(build: Any, kind: str) -> None:
    """The first call runs the whole tower and compares; later ones leave it where the features are."""
    tower, pixels = build.tower(kind), torch.randn(3, 3, 16, 16)
    expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, PREFIX[kind] :]
    ran = list[str]()
    for name, part in tower.named_modules():
        if name:
            part.register_forward_hook(lambda _, __, ___, name=name: ran.append(name))
    vision = VisionFeatures(tower)
    layers = next(part for part in tower.modules() if isinstance(part, nn.ModuleList) and len(part) == 2)
    last = next(name for name, part in tower.named_modules() if part is layers[-1])
    assert torch.equal(vision(pixels), expected)
    assert last in ran
    ran.clear()
    hooks = [len(part._forward_hooks) for part in tower.modules()]
    assert torch.equal(vision(pixels), expected)
    assert ran
    assert not [name for name in ran if name.startswith((last, "head", "post_layernorm", "layernorm"))]
    assert [len(part._forward_hooks) for part in tower.modules()] == hooks  # ours are gone


def test_a_tower_that_changes_its_layers_output_runs_in_full(build: Any) -> None:
    """The hidden state is not what the layer gave: leaving early would give something else."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build.tower("siglip")
            self.config = self.inner.config

        def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
            output = self.inner(pixel_values=pixel_values, output_hidden_states=True)
            return SimpleNamespace(hidden_states=tuple(2 * state for state in output.hidden_states))

    tower, pixels = Doubling(), torch.randn(2, 3, 16, 16)
    expected = tower(pixels).hidden_states[-2]
    vision = VisionFeatures(tower)
    assert torch.equal(vision(pixels), expected)
    assert torch.equal(vision(pixels), expected)
