"""Training the compressor without a language model: what went in must be readable from the latents."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyalign._checks import check_mask
from tinyalign.perceiver.compressor import PerceiverCompressor
from tinyalign.perceiver.ids import are_ids, as_long, check_ids, may_look
from tinyalign.perceiver.reader import LatentReader
from tinyalign.perceiver.weights import draw_linears


class PretrainOutput(NamedTuple):
    """Losses of a batch, means over its kept patches and tokens.

    `loss` is the weighted sum. `image_loss` is the squared error per normalised channel (1 = only the mean is known).
    `text_loss` is the cross-entropy per caption token in nats for token ids, and as `image_loss` for text embeddings.
    `bag_loss` is the cross-entropy in nats of the caption's tokens regardless of their order, from a linear reading of
    the latents (token ids only). `contrastive_loss` is in nats. What was not computed is zero.

    Shape:
        every field: (), float32.
    """

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    bag_loss: Tensor
    contrastive_loss: Tensor


class LossWeights(NamedTuple):
    """What each part of a `PerceiverPretrainer`'s loss counts; 0 leaves a part out.

    Args:
        image: the patches.
        text: the caption in order.
        bag: the caption's words out of order, from a linear reading (token ids only). More lets a linear map find what
            the caption said from fewer examples, and the order is learned more slowly.
        contrastive: telling, from its image alone, which caption of the batch belongs to a row (symmetric InfoNCE
            between the mean latents of the two views). Costs two more encodings.
    """

    image: float = 1.0
    text: float = 1.0
    bag: float = 3.0
    contrastive: float = 0.0


class PerceiverPretrainer(nn.Module):
    """Train a compressor to keep what the image and the caption say, by reconstructing both from the latents alone.

    A light decoder reads the latents with one query per position and predicts the normalised patch features and the
    caption tokens. Besides, a linear map of the latents predicts which tokens the caption holds in whatever order:
    what only an attentive decoder can read is of little use to a connector. Works in a plain loop and as the model of
    Hugging Face's ``Trainer``. Only the compressor is kept afterwards.

    With few captions the compressor learns them by heart, and new ones are then written into its values no better than
    by random weights. `mixed_captions` is against that: some rows get a caption whose words are drawn from all captions
    of the batch, which no memory of captions helps to give back.

    Args:
        compressor: the compressor to train; shared, not copied.
        loss_weights: what patches, caption, its words out of order and the contrast of the two views count.
        caption_dropout: share of rows whose caption is hidden from the compressor while training, but still asked for.
        mixed_captions: share of the other rows whose caption is mixed from the batch's while training.
        num_patches: patches reconstructed per row and step, drawn anew while training; None takes all.
        hidden_dim: width of the decoder.
        seed: what the decoder's weights are drawn from.

    Shape:
        image_features: (B, N, image_dim), float. text: (B, T), long, or (B, T, text_dim), float, or None.
        image_mask: (B, N), bool. text_mask: (B, T), bool.

    Raises:
        ValueError: negative weights, a dropout outside [0, 1), a share outside [0, 1], fewer than one patch, a token id
            outside the compressor's table (as there).
        TypeError: weights that are not `LossWeights`.

    Source:
        Reconstruction through a Perceiver IO decoder (Jaegle et al., 2022, arXiv 2107.14795, section 3.2);
        InfoNCE as in van den Oord et al., 2018, arXiv 1807.03748, equation 4.

    Example:
        >>> import torch
        >>> from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes
        >>> sizes = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)
        >>> pretrainer = PerceiverPretrainer(PerceiverCompressor(32, vocab_size=60, sizes=sizes), hidden_dim=16)
        >>> output = pretrainer(torch.randn(2, 9, 32), torch.randint(0, 60, (2, 5)))
        >>> output.loss.backward()
        >>> 3.0 < output.text_loss.item() < 5.5  # ln 60 = 4.09 before any training
        True
    """

    def __init__(
        self,
        compressor: PerceiverCompressor,
        *,
        loss_weights: LossWeights = LossWeights(),  # noqa: B008  a tuple of numbers cannot change
        caption_dropout: float = 0.0,
        mixed_captions: float = 0.5,
        num_patches: int | None = None,
        hidden_dim: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(loss_weights, LossWeights):
            raise TypeError(
                f"PerceiverPretrainer: loss_weights must be LossWeights, got {loss_weights!r}. Write "
                "LossWeights(image=0.1): what is not named keeps its default."
            )
        for name, factor in loss_weights._asdict().items():
            if not 0.0 <= factor < float("inf"):
                raise ValueError(
                    f"PerceiverPretrainer: loss_weights.{name} must be finite and not negative, got {factor}. Use 0 to "
                    "leave it out."
                )
        if not 0.0 <= caption_dropout < 1.0:
            raise ValueError(
                f"PerceiverPretrainer: caption_dropout must lie in [0, 1), got {caption_dropout}. Give the share of "
                "rows whose caption is hidden."
            )
        if not 0.0 <= mixed_captions <= 1.0:
            raise ValueError(
                f"PerceiverPretrainer: mixed_captions must lie in [0, 1], got {mixed_captions}. Give the share of rows "
                "whose words are drawn from the whole batch."
            )
        whole = isinstance(num_patches, (int, np.integer)) and not isinstance(num_patches, bool)
        if num_patches is not None and (not whole or num_patches < 1):
            raise ValueError(
                f"PerceiverPretrainer: num_patches must be an integer of at least 1, got {num_patches!r}. Use "
                "LossWeights(image=0) to leave the image out."
            )
        self.compressor = compressor
        self.loss_weights = loss_weights
        self.caption_dropout = caption_dropout
        self.mixed_captions = mixed_captions
        self._scale_is_known = False
        self.num_patches = num_patches
        weight = compressor.image_projection.weight
        text_out = compressor.sizes.token_dim if compressor.text_dim is None else compressor.text_dim

        def reader(output_dim: int) -> LatentReader:
            return LatentReader(
                compressor.latent_dim,
                output_dim,
                hidden_dim=hidden_dim,
                num_heads=compressor.sizes.num_heads,
                device=weight.device,
                dtype=weight.dtype,
            )

        # What carries no weight is not built, so that every weight here gets a gradient (DDP insists on it).
        self.image_reader = reader(compressor.image_dim) if loss_weights.image else None
        self.text_reader = reader(text_out) if loss_weights.text else None
        self.bag_reader = None
        if loss_weights.bag and compressor.text_dim is None:
            flat = compressor.num_latents * compressor.latent_dim
            self.bag_reader = nn.Linear(flat, text_out, device=weight.device, dtype=weight.dtype)
        self.log_temperature = (
            nn.Parameter(torch.tensor(-2.0, device=weight.device, dtype=weight.dtype))
            if loss_weights.contrastive
            else None
        )
        generator = torch.Generator().manual_seed(seed)
        for part in (self.image_reader, self.text_reader):
            if part is not None:
                part.reset_parameters(generator)
        if self.image_reader is not None:
            with torch.no_grad():  # start near the best constant guess, not with noise of the targets' size
                self.image_reader.output.weight.mul_(0.1)
        if self.bag_reader is not None:
            draw_linears(self.bag_reader, self.bag_reader.in_features**-0.5, generator)

    def forward(
        self,
        image_features: Tensor,
        text: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        return_loss: bool = True,
        generator: torch.Generator | None = None,
    ) -> PretrainOutput:
        """Encode, decode, compare.

        Args:
            image_features: what the compressor reads.
            text: what the compressor reads.
            image_mask: patches that count.
            text_mask: tokens that count.
            return_loss: only tells ``Trainer`` that this model computes its own loss; always true.
            generator: randomness of caption dropout, of mixing and of the choice of patches; None uses torch's own.
        """
        del return_loss
        if self.training and not self._scale_is_known:  # asking the buffer in every step would wait for the device
            if not bool(self.compressor.image_scale_is_fitted):
                self._fit_image_scale(image_features, image_mask)
            self._scale_is_known = bool(self.compressor.image_scale_is_fitted)
        text = as_long(text)
        if text is not None and text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        asked, shown = text, text_mask
        if text is not None and text_mask is not None:
            self._check_text(text, text_mask)
            shown = self._hide_captions(text_mask, generator)
            asked = self._mix_captions(text, shown, generator)
        latents = self.compressor(image_features, asked, image_mask, shown)
        zero = latents.new_zeros(())
        image_loss = text_loss = bag_loss = contrastive_loss = zero
        if self.image_reader is not None and image_features.shape[1]:
            image_loss = self._image_loss(self.image_reader, latents, image_features, image_mask, generator)
        if text is not None and asked is not None and text_mask is not None and text.shape[1]:
            if self.text_reader is not None:
                errors = self._text_errors(self.text_reader, latents, asked, text_mask)
                text_loss = _masked_mean(errors, text_mask)
            if self.bag_reader is not None:
                bag_loss = self._bag_loss(self.bag_reader, latents, asked, text_mask)
            if self.log_temperature is not None:
                contrastive_loss = self._contrastive_loss(
                    self.log_temperature, image_features, text, image_mask, text_mask
                )
        weights = self.loss_weights
        told = weights.text * text_loss + weights.bag * bag_loss
        loss = weights.image * image_loss + told + weights.contrastive * contrastive_loss
        return PretrainOutput(loss, image_loss, text_loss, bag_loss, contrastive_loss)

    def _fit_image_scale(self, image_features: Tensor, image_mask: Tensor | None) -> None:
        """Fit on the first batch that can be fitted on: one that holds at least two patches."""
        places = image_features.shape[:-1].numel() if image_mask is None else int(image_mask.sum())
        if places >= 2:
            self.compressor.fit_image_scale(image_features, image_mask)

    def _check_text(self, text: Tensor, text_mask: Tensor) -> None:
        """What the compressor would not see of a hidden caption, which is a target all the same."""
        where, vocab_size = "PerceiverPretrainer.forward", self.compressor.vocab_size
        check_mask(where, "text_mask", text_mask, tuple(text.shape[:2]))
        if vocab_size is not None and are_ids(text) and may_look(text, training=self.training):
            check_ids(where, text, vocab_size, text_mask)

    def _hide_captions(self, text_mask: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.caption_dropout == 0.0:
            return text_mask
        draw = torch.rand(text_mask.shape[0], 1, generator=generator, device=text_mask.device)
        return text_mask & (draw >= self.caption_dropout)

    def _mix_captions(self, text: Tensor, shown: Tensor, generator: torch.Generator | None) -> Tensor:
        """Captions as they are, but in some rows every token is another of the batch's; hidden rows are left alone."""
        if not self.training or self.mixed_captions == 0.0:
            return text
        draw = torch.rand(text.shape[0], 1, generator=generator, device=text.device)
        mixed = shown & (draw < self.mixed_captions)
        drawn = text.flatten(0, 1)[shuffled_places(shown, generator)]
        return torch.where(mixed if text.dim() == 2 else mixed.unsqueeze(2), drawn, text)

    def _image_loss(
        self,
        reader: LatentReader,
        latents: Tensor,
        features: Tensor,
        mask: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        positions = torch.arange(features.shape[1], device=features.device)[None]
        if self.training and self.num_patches is not None and self.num_patches < features.shape[1]:
            draw = torch.rand(features.shape[:2], generator=generator, device=features.device)
            positions = draw.topk(self.num_patches, dim=1).indices
            features = features.gather(1, positions[..., None].expand(-1, -1, features.shape[2]))
            mask = None if mask is None else mask.gather(1, positions)
        error = _mean_square(reader(latents, positions) - self.compressor.normalise(features.to(latents.dtype)), mask)
        return _masked_mean(error, torch.ones_like(error, dtype=torch.bool) if mask is None else mask)

    def _text_errors(self, reader: LatentReader, latents: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """(B, T): nats per token id, or the squared error of a normalised embedding."""
        read: Tensor = reader(latents, kept_positions(mask))
        if self.compressor.text_dim is not None:
            return _mean_square(read - F.layer_norm(text.to(read.dtype), text.shape[-1:]), mask)
        tokens = text.masked_fill(~mask, 0)  # padding may be any number, also outside the vocabulary
        nll: Tensor = F.cross_entropy(self.token_logits(read).flatten(0, 1).float(), tokens.flatten(), reduction="none")
        return nll.view_as(tokens)

    def _bag_loss(self, reader: nn.Linear, latents: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Nats per token under one distribution over the vocabulary per row."""
        log_share = self.token_logits(reader(latents.flatten(1))).float().log_softmax(dim=-1)  # (B, vocabulary)
        return _masked_mean(-log_share.gather(1, text.masked_fill(~mask, 0)), mask)

    def token_logits(self, read: Tensor) -> Tensor:
        """Scores of every token id from what the reader returned; the table is the compressor's own embedding."""
        embedding = self.compressor.text_embedding
        assert isinstance(embedding, nn.Embedding)  # the compressor reads ids
        logits: Tensor = F.linear(read, embedding.weight) * embedding.embedding_dim**-0.5
        return logits

    def _contrastive_loss(
        self, log_temperature: Tensor, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor
    ) -> Tensor:
        nothing = torch.zeros(image.shape[:2], dtype=torch.bool, device=image.device)
        seen = self.compressor(image, None, image_mask).mean(dim=1)
        heard = self.compressor(image, text, nothing, text_mask).mean(dim=1)
        both = text_mask.any(1) if image_mask is None else text_mask.any(1) & image_mask.any(1)
        scores = F.normalize(seen, dim=1) @ F.normalize(heard, dim=1).T * torch.exp(-log_temperature)
        scores = scores.float().masked_fill(~both[None, :] | ~both[:, None], -1e4)
        labels = torch.arange(scores.shape[0], device=scores.device)
        to_text = F.cross_entropy(scores, labels, reduction="none")
        to_image = F.cross_entropy(scores.T, labels, reduction="none")
        return _masked_mean((to_text + to_image) / 2, both)


def kept_positions(mask: Tensor) -> Tensor:
    """(B, T) mask to (B, T) positions that count kept tokens only."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def shuffled_places(mask: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, T) mask to (B, T) indices into B * T places: at the kept places a random order of the kept places.

    Sorted and not selected, so that the host need not wait to learn how many there are.
    """
    flat = mask.flatten()
    draw = torch.rand(flat.shape, generator=generator, device=mask.device)
    order = (draw + 2.0 * ~flat).argsort()  # kept places first
    return order[(flat.long().cumsum(0) - 1).clamp(min=0)].view_as(mask)


def _mean_square(errors: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, width) to (B, T). Masked errors are blanked first: on the way back a NaN passes every later mask."""
    errors = errors if mask is None else errors.masked_fill(~mask.unsqueeze(2), 0.0)
    return errors.square().mean(dim=-1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
