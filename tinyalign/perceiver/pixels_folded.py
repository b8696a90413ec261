"""The pixel encoder without its tokens: everything that does not depend on the image is computed once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F

from tinyalign._attention import without_autocast
from tinyalign._files import hash_tensors
from tinyalign.perceiver.layers import PerceiverLayer, split_heads
from tinyalign.perceiver.pixels import PIXEL_CHANNELS, TOKEN_CHANNELS, PixelPerceiver, check_inputs


class FoldedPixelPerceiver(nn.Module):
    """The values of a `PixelPerceiver` with frozen weights, exactly, in a fraction of its time and memory.

    A pixel token is ``[A p + b ; P_n ; c]`` for the colours p at place n. Layer norm subtracts a mean linear in p and
    divides by the root of a variance quadratic in p, so keys and values are ``(constant_n + M p) / sigma + bias`` with
    M of three columns; the queries come from constant latents. What remains per image are three numbers per pixel,
    streamed in chunks with an online softmax. The constants replace the table of positions and take less room (192
    numbers a place instead of 256). For inference only. Everything up to the latents is computed in float32 at least:
    the sums over 147,456 places overflow float16.

    Args:
        pixels: the encoder to fold. Its later layers and its caption side are shared; later changes of the other
            weights are not seen.
        chunk: places handled at a time; bounds the memory.

    Shape:
        pixel_values: (B, 3, image_size, image_size). text: (B, T), long, or None. image_mask: (B, n), bool, or None.
        text_mask: (B, T), bool. returns: (B, L, latent_dim).

    Raises:
        ValueError: another image size, a caption longer than the table, captions for another number of images, an
            `image_mask` that hides anything.
        TypeError: pixels that are integers.

    Source:
        Derived here from the maths of Jaegle et al. 2021, arXiv 2103.03206; equal to it, see the tests.

    Example:
        >>> import torch
        >>> from tinyalign.perceiver.encoder import PerceiverEncoder
        >>> pixels = PixelPerceiver(PerceiverEncoder(TOKEN_CHANNELS, num_latents=4, num_self_attends=1), image_size=8)
        >>> image = torch.rand(2, 3, 8, 8)
        >>> bool((FoldedPixelPerceiver(pixels)(image) - pixels(image)).abs().max() < 1e-5)
        True
    """

    keys: Tensor
    values: Tensor
    variance: Tensor
    covariance: Tensor
    colour_keys: Tensor
    colour_values: Tensor
    colour_covariance: Tensor
    queries: Tensor
    value_bias: Tensor

    def __init__(self, pixels: PixelPerceiver, *, chunk: int = 2048) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"FoldedPixelPerceiver: chunk must be at least 1, got {chunk}. 2048 suits most caches.")
        self.chunk = chunk
        self.image_size = pixels.image_size
        self.caption = pixels.caption
        self.encoder = pixels.encoder
        self._source = pixels.fingerprint()
        with torch.no_grad():
            for name, constant in _fold(pixels, chunk).items():
                self.register_buffer(name, constant)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor,
        text: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Stream the pixels, add the caption's tokens, then go on as the encoder does."""
        check_inputs("FoldedPixelPerceiver.forward", pixel_values, text, image_mask, self.image_size)
        layer, batch = self.encoder.cross_attention, pixel_values.shape[0]
        wide = _wide(self.queries)
        queries, pixels = self.queries.to(wide), pixel_values.to(wide).flatten(2)  # pixels: (B, 3, places)
        with without_autocast(pixels):
            running = _Running.start(queries, layer.v_dim, batch)
            for start in range(0, pixels.shape[2], self.chunk):
                stop = min(start + self.chunk, pixels.shape[2])
                running = running.add(queries, *self._keys_and_values(pixels[:, :, start:stop], start, stop), None)
            if text is not None and text.shape[1]:
                words = self.caption(text, text_mask).to(wide)
                running = running.add(queries, *self._text_keys_and_values(words), text_mask)
            mixed = (running.total / running.weight + self.value_bias).to(self.encoder.latents.dtype)
        return self.encoder.refine(layer.absorb(self.encoder.latents.unsqueeze(0), mixed))

    def fingerprint(self) -> str:
        """32 hex digits over what was folded and the weights shared with it; each machine rounds the constants."""
        shared = hash_tensors(dict(self.named_parameters()))
        return xxhash.xxh3_128_hexdigest(f"folded|{self._source}|{shared}".encode())

    def _keys_and_values(self, colours: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, n, channels) of the places from `start` to `stop`, without their biases."""
        wide = colours.dtype
        quadratic = (torch.matmul(self.colour_covariance.to(wide), colours) * colours).sum(dim=1)
        linear = (self.covariance[:, start:stop] * colours).sum(dim=1)
        variance = self.variance[start:stop] + linear + quadratic
        scale = torch.rsqrt(variance.clamp(min=0.0) + _epsilon(self.encoder.cross_attention)).unsqueeze(2)
        colours = colours.transpose(1, 2)
        keys = torch.matmul(colours, self.colour_keys.to(wide)).add_(self.keys[start:stop]).mul_(scale)
        values = torch.matmul(colours, self.colour_values.to(wide)).add_(self.values[start:stop]).mul_(scale)
        return keys, values

    def _text_keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        key, value, _ = _folded_projections(self.encoder.cross_attention)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=_epsilon(self.encoder.cross_attention))
        return tokens @ key.T, tokens @ value.T


class _Running(NamedTuple):
    """Softmax-weighted sums over the tokens so far, relative to the highest score so far."""

    highest: Tensor  # (B, H, L, 1)
    weight: Tensor  # (B, H, L, 1)
    total: Tensor  # (B, H, L, width of a head)

    @classmethod
    def start(cls, queries: Tensor, width: int, batch: int) -> _Running:
        shape = (batch, queries.shape[0], queries.shape[1])
        zero = queries.new_zeros(*shape, 1)
        return cls(zero - float("inf"), zero, queries.new_zeros(*shape, width))

    def add(self, queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None) -> _Running:
        scores = torch.matmul(queries, split_heads(keys, queries.shape[0]).transpose(2, 3))
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
        highest = torch.maximum(self.highest, scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(highest).exp_()
        shrink = torch.exp(self.highest - highest)
        weight = self.weight * shrink + weights.sum(dim=-1, keepdim=True)
        return _Running(
            highest, weight, self.total * shrink + torch.matmul(weights, split_heads(values, queries.shape[0]))
        )


def _wide(tensor: Tensor) -> torch.dtype:
    """Float32, or float64 when the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _epsilon(layer: PerceiverLayer) -> float:
    return layer.input_norm.eps if layer.input_norm is not None else 0.0


def _folded_projections(layer: PerceiverLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value weights with the norm's gain inside, and the value's bias with its offset.

    The key's bias adds the same number to all scores of a query, which the softmax does not see.
    """
    norm = layer.input_norm
    assert norm is not None  # cross-attention has one
    wide = _wide(norm.weight)
    gain, key, value = (weight.to(wide) for weight in (norm.weight, layer.key.weight, layer.value.weight))
    return key * gain, value * gain, value @ norm.bias.to(wide) + layer.value.bias.to(wide)


def _fold(pixels: PixelPerceiver, chunk: int) -> dict[str, Tensor]:
    """Everything about the pixel tokens that no image changes."""
    layer = pixels.encoder.cross_attention
    key, value, value_bias = _folded_projections(layer)
    wide = key.dtype
    colours = torch.zeros(TOKEN_CHANNELS, 3, device=key.device, dtype=wide)
    colours[:PIXEL_CHANNELS] = pixels.pixel_projection.weight
    colours -= colours.mean(dim=0)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, pixels.pixel_positions.shape[0], chunk):
        places = pixels.position_projection(pixels.pixel_positions[start : start + chunk])
        bias = pixels.pixel_projection.bias.expand(places.shape[0], -1)
        constant = torch.cat((bias, places, pixels.pixel_padding.expand(places.shape[0], -1)), dim=1).to(wide)
        constant = constant - constant.mean(dim=1, keepdim=True)
        parts.append((constant @ key.T, constant @ value.T, constant.square().mean(dim=1), constant @ colours))
    keys, values, variance, covariance = (torch.cat(part) for part in zip(*parts, strict=True))
    latents = layer.query(layer.latent_norm(pixels.encoder.latents)).to(wide) * layer.qk_dim**-0.5
    queries = latents.unflatten(1, (layer.num_heads, -1)).transpose(0, 1)
    heads = (layer.num_heads, 1, layer.v_dim)
    return {
        "keys": keys,
        "values": values,
        "variance": variance,
        "covariance": (covariance * (2.0 / TOKEN_CHANNELS)).T.contiguous(),
        "colour_keys": (key @ colours).T.contiguous(),
        "colour_values": (value @ colours).T.contiguous(),
        "colour_covariance": colours.T @ colours / TOKEN_CHANNELS,
        "queries": queries.contiguous(),
        "value_bias": value_bias.view(heads),
    }
