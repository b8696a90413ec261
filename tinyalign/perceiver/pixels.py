"""The paper's own value encoder: a Perceiver over raw pixels and caption bytes, kept for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyalign._checks import check_mask, check_positive
from tinyalign.perceiver import checkpoint, hf_weights
from tinyalign.perceiver.encoder import INITIALIZER_RANGE, PerceiverEncoder
from tinyalign.perceiver.ids import are_ids, check_ids, may_look
from tinyalign.perceiver.weights import draw_linears, draw_normal

PIXEL_CHANNELS = 256
POSITION_CHANNELS = 256
PADDING_CHANNELS = 4
TEXT_CHANNELS = 128
TOKEN_CHANNELS = PIXEL_CHANNELS + POSITION_CHANNELS + PADDING_CHANNELS


class PixelPerceiver(nn.Module):
    """Compatibility mode: one cross-attention over every pixel and every caption byte.

    A pixel token is a 1x1 convolution of its three colours, a projected learned position, and learned padding; a byte
    token is an embedding with a learned position, and learned padding. At the default size an image has 147,456 tokens
    and a caption at most 512, which is why such a value says next to nothing about the caption. `forward` is the
    straightforward computation; `FoldedPixelPerceiver` gives the same values in a fraction of the time and memory.

    Args:
        encoder: the encoder, reading tokens of width 516; None builds Table 3's.
        image_size: side of the square images, in pixels.
        vocab_size: number of token ids.
        max_text_tokens: longest caption.
        seed: what the weights are drawn from, all but those of an encoder that was given; None uses torch's generator.
        device: where the weights live.
        dtype: dtype of the weights.

    Shape:
        pixel_values: (B, 3, image_size, image_size), float. text: (B, T), long, or None. image_mask: (B, n), bool, or
        None. text_mask: (B, T), bool. returns: (B, L, latent_dim).

    Raises:
        ValueError: another image size, a caption longer than the table, captions for another number of images, an
            `image_mask` that hides anything: pixels are read as a whole.
        TypeError: pixels that are integers.

    Source:
        Tran et al., "TinyAlign", Table 3; transformers' ``PerceiverModel`` with a ``PerceiverMultimodalPreprocessor``
        of ``PerceiverImagePreprocessor`` ("conv1x1", trainable positions) and ``PerceiverTextPreprocessor``.

    Example:
        >>> import torch
        >>> encoder = PerceiverEncoder(TOKEN_CHANNELS, num_latents=4, num_self_attends=1)
        >>> pixels = PixelPerceiver(encoder, image_size=8)
        >>> ids, mask = caption_bytes(["a red 7", "two"])
        >>> pixels(torch.rand(2, 3, 8, 8), ids, text_mask=mask).shape
        torch.Size([2, 4, 96])
    """

    def __init__(
        self,
        encoder: PerceiverEncoder | None = None,
        *,
        image_size: int = 384,
        vocab_size: int = 30522,
        max_text_tokens: int = 512,
        seed: int | None = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("PixelPerceiver", "image_size", image_size)
        given = encoder is not None
        encoder = PerceiverEncoder(TOKEN_CHANNELS, device=device, dtype=dtype) if encoder is None else encoder
        if encoder.input_dim != TOKEN_CHANNELS:
            raise ValueError(
                f"PixelPerceiver: encoder must read tokens of width {TOKEN_CHANNELS}, got {encoder.input_dim}. Build "
                f"it as PerceiverEncoder({TOKEN_CHANNELS}, ...)."
            )
        self.image_size = image_size
        self.pixel_projection = nn.Linear(3, PIXEL_CHANNELS, device=device, dtype=dtype)
        self.pixel_positions = nn.Parameter(torch.empty(image_size**2, POSITION_CHANNELS, device=device, dtype=dtype))
        self.position_projection = nn.Linear(POSITION_CHANNELS, POSITION_CHANNELS, device=device, dtype=dtype)
        self.pixel_padding = nn.Parameter(torch.empty(PADDING_CHANNELS, device=device, dtype=dtype))
        self.caption = CaptionTokens(vocab_size, max_text_tokens, device=device, dtype=dtype)
        self.encoder = encoder
        self.reset_parameters(seed, keep_encoder=given)

    def reset_parameters(self, seed: int | None, *, keep_encoder: bool = False) -> None:
        """Draw all weights from the seed, or all but the encoder's, as transformers does: normal with 0.02."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        if not keep_encoder:
            self.encoder.reset_parameters(generator)
        for projection in (self.pixel_projection, self.position_projection):
            draw_linears(projection, INITIALIZER_RANGE, generator)
        for table in (self.pixel_positions, self.pixel_padding, *self.caption.parameters()):
            draw_normal(table, INITIALIZER_RANGE, generator)

    def forward(
        self,
        pixel_values: Tensor,
        text: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Build all tokens and encode them; called as `PerceiverCompressor` is."""
        check_inputs("PixelPerceiver.forward", pixel_values, text, image_mask, self.image_size)
        tokens = self.pixel_tokens(pixel_values)
        mask = None
        if text is not None:
            words = self.caption(text, text_mask)
            if text_mask is not None:
                kept = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
                mask = torch.cat((kept, text_mask), dim=1)
            tokens = torch.cat((tokens, words), dim=1)
        latents: Tensor = self.encoder(tokens, mask)
        return latents

    def pixel_tokens(self, pixel_values: Tensor) -> Tensor:
        """(B, image_size ** 2, 516), in raster order."""
        colours = self.pixel_projection(pixel_values.to(self.pixel_padding.dtype).flatten(2).transpose(1, 2))
        places = self.position_projection(self.pixel_positions)
        padding = self.pixel_padding.expand(places.shape[0], -1)
        constant = torch.cat((places, padding), dim=1)
        return torch.cat((colours, constant.expand(colours.shape[0], -1, -1)), dim=2)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values; `encoder` as its sizes."""
        return {
            "encoder": self.encoder.config(),
            "image_size": self.image_size,
            "vocab_size": self.caption.embedding.num_embeddings,
            "max_text_tokens": self.caption.positions.shape[0],
            "dtype": str(self.pixel_padding.dtype).removeprefix("torch."),
        }

    def fingerprint(self) -> str:
        """32 hex digits over the configuration and every weight, as `PerceiverCompressor.fingerprint`."""
        return checkpoint.fingerprint(self, self.config())

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, both in one step; other files in the directory stay."""
        checkpoint.save(self, self.config(), Path(path))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: torch.device | str | None = None) -> PixelPerceiver:
        """Load what `save_pretrained` wrote, strictly.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: another class or format, a damaged file, or weights whose names or shapes do not fit.
        """
        names = {"encoder", "image_size", "vocab_size", "max_text_tokens", "dtype"}
        config = checkpoint.load_config(cls.__name__, Path(path), names)
        encoder = PerceiverEncoder(**config.pop("encoder"), device=device, dtype=config["dtype"])
        pixels = cls(encoder, **config, device=device)
        checkpoint.load_weights(pixels, Path(path))
        return pixels

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Weights under the names of the transformers model named under Source, which loads them strictly."""
        return hf_weights.export_pixels(self.state_dict())

    @classmethod
    def from_hf_state_dict(
        cls, state: Mapping[str, Tensor], *, num_heads: int = 8, num_blocks: int = 1
    ) -> PixelPerceiver:
        """Build from the weights of the transformers model named under Source.

        Raises:
            ValueError: names missing, unexpected or of another shape.
        """
        state, rest = hf_weights.import_pixels(state)
        encoder = PerceiverEncoder.from_hf_state_dict(rest, num_heads=num_heads, num_blocks=num_blocks)
        size = round(state["pixel_positions"].shape[0] ** 0.5)
        pixels = cls(
            encoder,
            image_size=size,
            vocab_size=state["caption.embedding.weight"].shape[0],
            max_text_tokens=state["caption.positions"].shape[0],
            seed=None,
            device="meta",
        )
        own = {**{f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}, **state}
        where = "PixelPerceiver.from_hf_state_dict"
        hf_weights.check_shapes(where, hf_weights.export_pixels(own), pixels.to_hf_state_dict())
        pixels.load_state_dict({name: weight.detach().clone() for name, weight in own.items()}, assign=True)
        return pixels.requires_grad_(True)


class CaptionTokens(nn.Module):
    """Caption ids as tokens of the pixel encoder's width: embedding plus learned position, and learned padding.

    Args:
        vocab_size: number of token ids.
        max_tokens: longest caption.
        device: where the weights live.
        dtype: dtype of the weights.

    Shape:
        text: (B, T), long. mask: (B, T), bool; masked ids may be any number. returns: (B, T, 516).

    Raises:
        ValueError: a caption longer than the table, an id outside the vocabulary (as in `PerceiverCompressor`).

    Example:
        >>> import torch
        >>> CaptionTokens(300, 8)(torch.tensor([[4, 103, 5]])).shape
        torch.Size([1, 3, 516])
    """

    def __init__(
        self,
        vocab_size: int,
        max_tokens: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, TEXT_CHANNELS, device=device, dtype=dtype)
        self.positions = nn.Parameter(torch.zeros(max_tokens, TEXT_CHANNELS, device=device, dtype=dtype))
        self.padding = nn.Parameter(torch.zeros(TOKEN_CHANNELS - TEXT_CHANNELS, device=device, dtype=dtype))

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens of every id."""
        longest = self.positions.shape[0]
        if not are_ids(text) or text.shape[1] > longest:
            raise ValueError(
                f"CaptionTokens.forward: text must be token ids of shape (B, T) with T at most {longest}, got "
                f"{text.dtype} of shape {tuple(text.shape)}. Truncate the captions."
            )
        if mask is not None:
            check_mask("CaptionTokens.forward", "mask", mask, (text.shape[0], text.shape[1]))
            text = text.masked_fill(~mask, 0)
        if may_look(text, training=self.training):
            check_ids("CaptionTokens.forward", text, self.embedding.num_embeddings)
        words = self.embedding(text.long()) + self.positions[: text.shape[1]]
        return torch.cat((words, self.padding.expand(*text.shape, -1)), dim=2)


def caption_bytes(captions: Sequence[str], max_tokens: int = 512) -> tuple[Tensor, Tensor]:
    """Captions as UTF-8 bytes the way Perceiver's tokenizer numbers them, right-padded, with their mask.

    Args:
        captions: texts; longer ones are cut so that both markers still fit.
        max_tokens: longest sequence, the two markers included.

    Shape:
        returns: ids (B, T), long, and mask (B, T), bool.

    Raises:
        ValueError: `max_tokens` leaves no room for the two markers.
        TypeError: one text in place of several.

    Source:
        transformers' ``PerceiverTokenizer``: six special ids, then the byte; [CLS] = 4 before, [SEP] = 5 after.

    Example:
        >>> caption_bytes(["a", ""])[0].tolist()
        [[4, 103, 5], [4, 5, 0]]
    """
    if isinstance(captions, str):
        raise TypeError(f"caption_bytes: captions must be a sequence of texts, got {captions!r}. Put it in a list.")
    if max_tokens < 2:
        raise ValueError(f"caption_bytes: max_tokens must be at least 2, got {max_tokens}. The markers take two.")
    rows = [[4, *(byte + 6 for byte in text.encode()[: max_tokens - 2]), 5] for text in captions]
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return ids, mask


def check_inputs(
    where: str, pixel_values: Tensor, text: Tensor | None, image_mask: Tensor | None, image_size: int
) -> None:
    """Raise unless the images have three channels and the size of the positions, and a caption belongs to each."""
    if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, image_size, image_size):
        raise ValueError(
            f"{where}: pixel_values must have shape (B, 3, {image_size}, {image_size}), got "
            f"{tuple(pixel_values.shape)}. Resize the images: the positions were made for this size."
        )
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"{where}: pixel_values must be floating point, got {pixel_values.dtype}. Normalise the images first."
        )
    if text is not None and text.shape[:1] != pixel_values.shape[:1]:
        raise ValueError(
            f"{where}: text must have the batch of pixel_values, got {tuple(text.shape)} and {pixel_values.shape[0]} "
            "images. Pass one caption per image, masked where there is none."
        )
    if image_mask is not None:
        check_mask(where, "image_mask", image_mask, (pixel_values.shape[0], image_mask.shape[-1]))
        if may_look(image_mask, training=False) and not bool(image_mask.all()):
            raise ValueError(
                f"{where}: image_mask must keep everything, got {int((~image_mask).sum())} places hidden. Pixels are "
                "read as a whole; the caption's mask is text_mask."
            )
