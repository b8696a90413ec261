"""The compressor: image features and a caption become the few latents that a memory bank stores as a value."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyalign._attention import pack
from tinyalign._checks import check_last_dim, check_mask, check_positive
from tinyalign.perceiver import checkpoint
from tinyalign.perceiver.encoder import INITIALIZER_RANGE, PerceiverEncoder
from tinyalign.perceiver.ids import are_ids, check_ids, may_look
from tinyalign.perceiver.layers import PerceiverLayer
from tinyalign.perceiver.positions import sinusoids
from tinyalign.perceiver.weights import draw_linears, draw_normal


class PerceiverSizes(NamedTuple):
    """Sizes of the encoder inside a compressor; the defaults are the paper's Table 3.

    Args:
        token_dim: width that patches and caption tokens are projected to.
        num_latents: learned queries, L.
        latent_dim: width of a latent.
        num_self_attends: self-attention layers in a block.
        num_blocks: times that the block runs, with the same weights.
        num_heads: of cross-attention and self-attention.
        qk_channels: width of queries and keys; `latent_dim` when None.
        v_channels: width of values; `latent_dim` when None.
    """

    token_dim: int = 128
    num_latents: int = 32
    latent_dim: int = 96
    num_self_attends: int = 8
    num_blocks: int = 1
    num_heads: int = 8
    qk_channels: int | None = None
    v_channels: int | None = None


class PerceiverCompressor(nn.Module):
    """Compress the features of an image and its caption into `num_latents` vectors, without any language model.

    In the paper's release one cross-attention reads 147,456 pixel tokens and at most 512 text bytes, so a value hardly
    depends on the caption. Here the image comes as features of a frozen vision tower, and with ``fusion="balanced"``
    the text has a cross-attention of its own: the two readings are averaged before the self-attention layers. A row
    without image or without text uses the other alone. ``fusion="joint"`` is one cross-attention over both.

    The weights are drawn from `seed`: the same seed gives the same values on every machine.

    Args:
        image_dim: width of the image features.
        vocab_size: number of token ids; Table 3's is BERT's. Unused when `text_dim` is given.
        text_dim: width of precomputed text embeddings, when the text comes as these and not as token ids.
        sizes: sizes of the encoder.
        fusion: "balanced" or "joint".
        seed: what the weights are drawn from.
        device: where the weights live.
        dtype: dtype of the weights.

    Shape:
        image_features: (B, N, image_dim), float. text: (B, T), long, or (B, T, text_dim), float, or None.
        image_mask: (B, N), bool. text_mask: (B, T), bool. returns: (B, L, latent_dim), dtype of the weights.

    Raises:
        ValueError: a wrong width or mask shape; text of the other kind than the compressor was built for, or ids that
            are not integers; a token id outside the table (not looked for in a training step on a GPU, which would have
            to wait for it).
        TypeError: a mask that is not boolean, image features that are integers, sizes that are not `PerceiverSizes`.

    Source:
        Tran et al., "TinyAlign", section 4.2 and Table 3. Deviations: patch features in place of pixels, a
        cross-attention for the text, fixed sinusoidal text positions (so no caption is too long).

    Example:
        >>> import torch
        >>> sizes = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)
        >>> compressor = PerceiverCompressor(32, vocab_size=100, sizes=sizes, seed=7)
        >>> compressor(torch.randn(2, 49, 32), torch.tensor([[5, 6, 7], [8, 0, 0]])).shape
        torch.Size([2, 4, 8])
    """

    image_mean: Tensor
    image_scale: Tensor
    image_scale_is_fitted: Tensor

    def __init__(
        self,
        image_dim: int,
        vocab_size: int = 30522,
        *,
        text_dim: int | None = None,
        sizes: PerceiverSizes = PerceiverSizes(),  # noqa: B008  a tuple of numbers cannot change
        fusion: Literal["balanced", "joint"] = "balanced",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("PerceiverCompressor", "image_dim", image_dim)
        if not isinstance(sizes, PerceiverSizes):
            raise TypeError(
                f"PerceiverCompressor: sizes must be PerceiverSizes, got {sizes!r}. Write "
                "PerceiverSizes(num_latents=16): what is not named keeps its default."
            )
        if fusion not in ("balanced", "joint"):
            raise ValueError(
                f"PerceiverCompressor: fusion must be 'balanced' or 'joint', got {fusion!r}. 'balanced' gives the "
                "caption a cross-attention of its own."
            )
        token_dim, latent_dim = sizes.token_dim, sizes.latent_dim
        qk_channels = latent_dim if sizes.qk_channels is None else sizes.qk_channels
        v_channels = latent_dim if sizes.v_channels is None else sizes.v_channels
        self.image_dim, self.text_dim, self.fusion, self.seed = image_dim, text_dim, fusion, seed
        self.sizes = sizes._replace(qk_channels=qk_channels, v_channels=v_channels)
        self.image_projection = nn.Linear(image_dim, token_dim, device=device, dtype=dtype)
        self.register_buffer("image_mean", torch.zeros(image_dim, device=device, dtype=dtype))
        self.register_buffer("image_scale", torch.ones(image_dim, device=device, dtype=dtype))
        self.register_buffer("image_scale_is_fitted", torch.zeros((), device=device, dtype=torch.bool))
        self.text_embedding: nn.Module
        if text_dim is None:
            check_positive("PerceiverCompressor", "vocab_size", vocab_size)
            self.text_embedding = nn.Embedding(vocab_size, token_dim, device=device, dtype=dtype)
        else:
            check_positive("PerceiverCompressor", "text_dim", text_dim)
            self.text_embedding = nn.Sequential(
                nn.LayerNorm(text_dim, device=device, dtype=dtype),
                nn.Linear(text_dim, token_dim, device=device, dtype=dtype),
            )
        self.vocab_size = vocab_size if text_dim is None else None
        self.encoder = PerceiverEncoder(
            token_dim,
            num_latents=sizes.num_latents,
            latent_dim=latent_dim,
            num_self_attends=sizes.num_self_attends,
            num_blocks=sizes.num_blocks,
            num_heads=sizes.num_heads,
            qk_channels=qk_channels,
            v_channels=v_channels,
            device=device,
            dtype=dtype,
        )
        self.text_attention = (
            PerceiverLayer(
                latent_dim,
                qk_channels=qk_channels,
                v_channels=v_channels,
                num_heads=sizes.num_heads,
                input_dim=token_dim,
                device=device,
                dtype=dtype,
            )
            if fusion == "balanced"
            else None
        )
        self.reset_parameters(seed)

    @property
    def num_latents(self) -> int:
        """Number of latents L."""
        return self.sizes.num_latents

    @property
    def latent_dim(self) -> int:
        """Width of a latent."""
        return self.sizes.latent_dim

    def reset_parameters(self, seed: int) -> None:
        """Draw all weights from this seed; the draw is made on the CPU, so that every device gets the same."""
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        draw_linears(self.image_projection, self.image_dim**-0.5, generator)
        if isinstance(self.text_embedding, nn.Embedding):
            draw_normal(self.text_embedding.weight, 1.0, generator)
        else:
            draw_linears(self.text_embedding, self.text_dim**-0.5 if self.text_dim else 1.0, generator)
        self.encoder.reset_parameters(generator)
        if self.text_attention is not None:
            draw_linears(self.text_attention, INITIALIZER_RANGE, generator)

    def forward(
        self,
        image_features: Tensor,
        text: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Latents of each row; a row depends on its own kept patches and tokens only."""
        where = "PerceiverCompressor.forward"
        check_last_dim(where, "image_features", image_features, self.image_dim, "(B, N, image_dim)")
        if not image_features.is_floating_point():
            raise TypeError(
                f"{where}: image_features must be floating point, got {image_features.dtype}. Pass the output of the "
                "vision tower, not pixels or ids."
            )
        if image_mask is not None:
            check_mask(where, "image_mask", image_mask, (image_features.shape[0], image_features.shape[1]))
            if torch.is_grad_enabled():  # the gradient of the projection multiplies by masked patches, NaN or not
                image_features = image_features.masked_fill(~image_mask.unsqueeze(2), 0.0)
        image = self._project(image_features)
        if text is None:
            return self.encoder(image, image_mask)  # type: ignore[no-any-return]
        words = self._embed(text, text_mask, image.shape[0])
        if words.shape[1] == 0:
            return self.encoder(image, image_mask)  # type: ignore[no-any-return]
        if self.text_attention is None:
            tokens = torch.cat((image, words), dim=1)
            return self.encoder(tokens, _concatenate(image, image_mask, words, text_mask))  # type: ignore[no-any-return]
        seen = self.encoder.read(image, image_mask)
        # Packing waits for the device to learn the lengths, which a graph being traced or captured cannot.
        looks = text_mask is not None and may_look(words, training=False)
        heard = self.hear(words, text_mask, packed=looks and self.text_attention.packs(words))
        share = _share_of_text(image, image_mask, words, text_mask).to(seen.dtype)
        return self.encoder.refine(torch.lerp(seen, heard, share))

    def hear(self, words: Tensor, text_mask: Tensor | None, *, packed: bool) -> Tensor:
        """The caption's own cross-attention, with the mask or, equally, over the kept tokens end to end."""
        assert self.text_attention is not None  # there is none when fusion is "joint"
        latents = self.encoder.latents.unsqueeze(0)
        if packed and text_mask is not None:
            heard: Tensor = self.text_attention(latents, pack(words, text_mask))
        else:
            heard = self.text_attention(latents, words, text_mask)
        return heard

    def normalise(self, image_features: Tensor) -> Tensor:
        """Image features on the scale that `fit_image_scale` found: zero mean and unit variance per channel."""
        return (image_features - self.image_mean) * self.image_scale

    @torch.no_grad()
    def fit_image_scale(self, image_features: Tensor, image_mask: Tensor | None = None) -> None:
        """Take mean and variance of every feature channel from a sample, so that no channel drowns the others.

        Vision towers have channels hundreds of times larger than the rest. A few hundred patches are enough; the
        statistics are part of the weights. `PerceiverPretrainer` calls this on its first batch of two or more patches
        if nobody did before.
        """
        where = "PerceiverCompressor.fit_image_scale"
        check_last_dim(where, "image_features", image_features, self.image_dim, "(B, N, image_dim)")
        if image_mask is not None:
            check_mask(where, "image_mask", image_mask, (image_features.shape[0], image_features.shape[1]))
        patches = image_features.flatten(0, 1) if image_mask is None else image_features[image_mask]
        if patches.shape[0] < 2 or not bool(patches.isfinite().all()):
            raise ValueError(
                f"{where}: image_features must hold at least two kept patches, all finite, "
                f"got {patches.shape[0]} of which {int(patches.isfinite().all(1).sum())} are finite. Pass features."
            )
        std, mean = torch.std_mean(patches.double(), dim=0)
        # A channel that hardly varies carries nothing: do not blow its noise up.
        self.image_mean.copy_(mean)
        self.image_scale.copy_(1.0 / std.clamp(min=max(0.01 * float(std.mean()), 1e-6)))
        self.image_scale_is_fitted.fill_(True)

    def _project(self, image_features: Tensor) -> Tensor:
        """Patches at `token_dim`, the normalisation folded into the weights, positions in raster order added."""
        weight = self.image_projection.weight * self.image_scale
        bias = self.image_projection.bias - weight @ self.image_mean
        patches = F.linear(image_features.to(weight.dtype), weight, bias)
        places = torch.arange(patches.shape[1], device=patches.device)
        return patches + sinusoids(places, self.sizes.token_dim).to(patches.dtype)

    def _embed(self, text: Tensor, text_mask: Tensor | None, batch: int) -> Tensor:
        """Caption tokens at `token_dim`; positions count kept tokens only, so that padding may be on either side."""
        where = "PerceiverCompressor.forward"
        if self.text_dim is not None:
            check_last_dim(where, "text", text, self.text_dim, "(B, T, text_dim)")
        elif not are_ids(text):
            raise ValueError(
                f"{where}: text must be token ids of shape (B, T), got {text.dtype} of shape {tuple(text.shape)}. "
                "Build the compressor with `text_dim=` to pass embeddings."
            )
        if text.shape[0] != batch:
            raise ValueError(
                f"{where}: text must have the batch of image_features, got {text.shape[0]} and {batch}. Pass one "
                "caption per image, masked where there is none."
            )
        weight = self.image_projection.weight
        positions = torch.arange(text.shape[1], device=text.device)
        if text_mask is not None:
            check_mask(where, "text_mask", text_mask, (batch, text.shape[1]))
            positions = (text_mask.long().cumsum(dim=1) - 1).clamp(min=0)
            text = text.masked_fill(~(text_mask if self.text_dim is None else text_mask.unsqueeze(2)), 0)
        if self.vocab_size is not None and may_look(text, training=self.training):
            check_ids(where, text, self.vocab_size)
        words: Tensor = self.text_embedding(text.long() if self.text_dim is None else text.to(weight.dtype))
        return words + sinusoids(positions, self.sizes.token_dim).to(words.dtype)

    def fingerprint(self) -> str:
        """32 hex digits over the configuration and every weight; two compressors that agree make the same values."""
        return checkpoint.fingerprint(self, self.config())

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, both in one step; other files in the directory stay."""
        checkpoint.save(self, self.config(), Path(path))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: torch.device | str | None = None) -> PerceiverCompressor:
        """Load what `save_pretrained` wrote, strictly.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: another class or format, a damaged file, or weights whose names or shapes do not fit.
        """
        names = {"image_dim", "vocab_size", "text_dim", "sizes", "fusion", "seed", "dtype"}
        config = checkpoint.load_config(cls.__name__, Path(path), names)
        config["sizes"] = PerceiverSizes(**config["sizes"])
        compressor = cls(**config, device=device)
        checkpoint.load_weights(compressor, Path(path))
        return compressor

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "image_dim": self.image_dim,
            "vocab_size": self.vocab_size or 0,
            "text_dim": self.text_dim,
            "sizes": self.sizes._asdict(),
            "fusion": self.fusion,
            "seed": self.seed,
            "dtype": str(self.image_projection.weight.dtype).removeprefix("torch."),
        }


def _concatenate(image: Tensor, image_mask: Tensor | None, words: Tensor, text_mask: Tensor | None) -> Tensor | None:
    """The mask over image and text tokens side by side."""
    if image_mask is None and text_mask is None:
        return None
    whole = [
        torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
        for tokens, mask in ((image, image_mask), (words, text_mask))
    ]
    return torch.cat(whole, dim=1)


def _share_of_text(image: Tensor, image_mask: Tensor | None, words: Tensor, text_mask: Tensor | None) -> Tensor:
    """(B, 1, 1): one half where a row has both, one where it has only text, zero where it has no text."""
    has_text = (
        torch.ones(words.shape[0], dtype=torch.bool, device=words.device) if text_mask is None else text_mask.any(1)
    )
    if image.shape[1] == 0:
        has_image = torch.zeros_like(has_text)
    else:
        has_image = torch.ones_like(has_text) if image_mask is None else image_mask.any(1)
    share = has_text.to(words.dtype) / (1.0 + has_image.to(words.dtype))
    return share[:, None, None]
