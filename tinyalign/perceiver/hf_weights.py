"""Names of transformers' Perceiver weights and ours: a one-to-one table, checked both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Ours to theirs, inside one layer.
_LAYER = {
    "latent_norm": "attention.self.layernorm1",
    "input_norm": "attention.self.layernorm2",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "mlp_norm": "layernorm",
    "mlp_in": "mlp.dense1",
    "mlp_out": "mlp.dense2",
}
_BACK = {theirs: ours for ours, theirs in _LAYER.items()}
_MODEL_LATENTS = "embeddings.latents"


def export_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder's state dict under transformers' names; the latents stay out, as they do there."""
    return {
        f"{prefix}.{_LAYER[part]}.{leaf}": tensor
        for name, tensor in state.items()
        if name != "latents"
        for prefix, part, leaf in [name.rsplit(".", 2)]
    }


def check_shapes(where: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise, under transformers' name, for the first weight that does not fit the sizes read off the others."""
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name} must have shape {tuple(tensor.shape)} beside the other weights, got "
                f"{tuple(given[name].shape)}. Pass the state dict of one model, unchanged."
            )


def import_encoder(state: Mapping[str, Tensor], latents: Tensor | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Transformers' state dict to (sizes of our encoder, our state dict), every name accounted for."""
    where = "PerceiverEncoder.from_hf_state_dict"
    if any(name.startswith("perceiver.encoder.") for name in state):  # of a model with a head
        state = {name.removeprefix("perceiver."): t for name, t in state.items() if name.startswith("perceiver.")}
    if any(name.startswith("encoder.") for name in state):
        latents = state[_MODEL_LATENTS] if latents is None and _MODEL_LATENTS in state else latents
        state = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    if latents is None:
        raise ValueError(
            f"{where}: latents must be given when the state dict holds none, got None. Pass "
            "`latents=model.embeddings.latents` or the state dict of the whole PerceiverModel."
        )
    depth = len({name.split(".")[1] for name in state if name.startswith("self_attends.")})
    layers = ["cross_attention", *(f"self_attends.{index}" for index in range(depth))]
    expected = {
        f"{layer}.{theirs}.{leaf}": f"{layer}.{ours}.{leaf}"
        for layer in layers
        for ours, theirs in _LAYER.items()
        for leaf in ("weight", "bias")
        if ours != "input_norm" or layer == "cross_attention"
    }
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{where}: state must hold a Perceiver encoder's names, got missing {missing[:4]} and unexpected "
            f"{unexpected[:4]} ({len(missing)} and {len(unexpected)} in all). Pass the state dict of transformers' "
            "PerceiverEncoder or PerceiverModel with widening factors 1."
        )
    own = {ours: state[theirs] for theirs, ours in expected.items()}
    latent_dim = int(own["cross_attention.query.weight"].shape[1])
    if latents.dim() != 2 or latents.shape[1] != latent_dim:
        raise ValueError(
            f"{where}: latents must have shape (L, {latent_dim}), got {tuple(latents.shape)}. Take the latents that "
            "belong to this encoder."
        )
    shapes = [tuple(own[f"{layer}.mlp_in.weight"].shape) for layer in layers]
    wide = [shape for shape in shapes if shape != (latent_dim, latent_dim)]
    if wide:
        raise ValueError(
            f"{where}: state must have widening factors 1, got an MLP of shape {wide[0]} at width {latent_dim}. Only "
            "that form is built here."
        )
    sizes = {
        "input_dim": int(own["cross_attention.key.weight"].shape[1]),
        "num_latents": int(latents.shape[0]),
        "latent_dim": latent_dim,
        "num_self_attends": depth,
        "qk_channels": int(own["cross_attention.query.weight"].shape[0]),
        "v_channels": int(own["cross_attention.value.weight"].shape[0]),
    }
    return sizes, {"latents": latents, **own}


# Ours to theirs, for the pixel encoder's input; the rest is an encoder.
_INPUT = "input_preprocessor."
_PIXELS = {
    "pixel_projection.weight": "modalities.image.convnet_1x1.weight",
    "pixel_projection.bias": "modalities.image.convnet_1x1.bias",
    "pixel_positions": "modalities.image.position_embeddings.position_embeddings",
    "position_projection.weight": "modalities.image.positions_projection.weight",
    "position_projection.bias": "modalities.image.positions_projection.bias",
    "pixel_padding": "padding.image",
    "caption.embedding.weight": "modalities.text.embeddings.weight",
    "caption.positions": "modalities.text.position_embeddings.weight",
    "caption.padding": "padding.text",
}


def import_pixels(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Transformers' state dict to (our input weights, what is left for the encoder)."""
    expected = {_INPUT + theirs for theirs in _PIXELS.values()}
    present = {name for name in state if name.startswith(_INPUT)}
    if present != expected:
        raise ValueError(
            "PixelPerceiver.from_hf_state_dict: state must hold the input weights of the pixel encoder, got missing "
            f"{sorted(expected - present)} and unexpected {sorted(present - expected)}. Pass the state dict of a "
            "PerceiverModel with image (conv1x1) and text preprocessors."
        )
    own = {ours: state[_INPUT + theirs] for ours, theirs in _PIXELS.items()}
    own["pixel_projection.weight"] = own["pixel_projection.weight"].flatten(1)  # a 1x1 convolution is a linear map
    own["pixel_padding"] = own["pixel_padding"].flatten()
    own["caption.padding"] = own["caption.padding"].flatten()
    return own, {name: weight for name, weight in state.items() if name not in present}


def export_pixels(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our pixel encoder's state dict under transformers' names, in its shapes."""
    own = {_INPUT + theirs: state[ours] for ours, theirs in _PIXELS.items()}
    convolution = _INPUT + _PIXELS["pixel_projection.weight"]
    own[convolution] = own[convolution][:, :, None, None]
    for ours in ("pixel_padding", "caption.padding"):
        own[_INPUT + _PIXELS[ours]] = own[_INPUT + _PIXELS[ours]][None]
    inner = {name.removeprefix("encoder."): weight for name, weight in state.items() if name.startswith("encoder.")}
    encoder = {f"encoder.{name}": weight for name, weight in export_encoder(inner).items()}
    return {**own, _MODEL_LATENTS: inner["latents"], **encoder}
