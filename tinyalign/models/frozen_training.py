"""Training and scoring a model on samples whose features are computed already, one small run after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyalign._checks import check_positive
from tinyalign.memory import AttentionPooledKey
from tinyalign.models.descent import Descent, descend
from tinyalign.models.frozen import FoundNeighbours, FrozenSamples
from tinyalign.models.pair_encoder import PairEncoder
from tinyalign.models.sample_encoder import SampleEncoder, caption_of
from tinyalign.models.vlm import TinyAlignVLM
from tinyalign.perceiver import LossWeights, PerceiverCompressor, PerceiverPretrainer, PerceiverSizes

Track = Callable[[Iterable[int]], Iterable[int]]
SMALL_SIZES = PerceiverSizes(token_dim=64, num_latents=8, latent_dim=64, num_self_attends=2, num_heads=4)


class FrozenScores(NamedTuple):
    """What a model makes of each sample.

    Shape:
        nll: (n,), float64, summed over the answer. tokens: (n,), int64. correct: (n,), bool.

    Units:
        nats.
    """

    nll: Tensor
    tokens: Tensor
    correct: Tensor

    @property
    def per_token(self) -> float:
        """Cross-entropy in nats per token over all samples."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """Share of samples whose whole answer is right."""
        return float(self.correct.double().mean())


def fit_frozen(
    model: TinyAlignVLM,
    part: FrozenSamples,
    found: FoundNeighbours | None = None,
    *,
    steps: int,
    rate: float,
    batch_size: int = 16,
    seed: int = 0,
    track: Track | None = None,
) -> list[float]:
    """Train what `freeze_for` left trainable, by AdamW under a one-cycle rate; returns the loss of every step.

    The order of the samples depends on `seed` alone, so that arms see the same batches. For runs of minutes; anything
    larger belongs in Hugging Face's ``Trainer``.

    Args:
        model: trained in place and left in evaluation mode.
        part: what to learn from.
        found: what is retrieved for it; None for the baseline and for learned prompts.
        steps: optimiser steps.
        rate: highest learning rate.
        batch_size: samples per step; never more than there are.
        seed: of the order.
        track: wraps the steps with a progress display.

    Raises:
        ValueError: no steps.
        RuntimeError: the loss is no longer finite.
    """
    check_positive("fit_frozen", "steps", steps)
    device = next(model.parameters()).device
    size = min(batch_size, len(part))
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // len(part))
    order = torch.cat([torch.randperm(len(part), generator=generator) for _ in range(epochs)])

    def loss_of(step: int) -> Tensor:
        rows = order[step * size : (step + 1) * size]
        given = {} if found is None else found.batch(rows, device)
        loss: Tensor = model(**part.batch(rows, device), **given).loss
        return loss

    model.train()
    try:
        return descend(loss_of, model.parameters(), Descent(steps, rate), where="fit_frozen", track=track)
    finally:
        model.eval()


@torch.no_grad()
def score_frozen(
    model: TinyAlignVLM, part: FrozenSamples, found: FoundNeighbours | None = None, *, batch_size: int = 100
) -> FrozenScores:
    """Score every sample: the negative log-likelihood of its answer, and whether greedy decoding would write it.

    An answer is written by greedy decoding exactly when each of its tokens is the most likely one after those before
    it; so one pass over the answers tells what generation would, the end of the answer included.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    parts = []
    try:
        for rows in torch.split(torch.arange(len(part)), batch_size):
            given = {} if found is None else found.batch(rows, device)
            output = model(**part.batch(rows, device), **given, return_logits=True)
            logits, labels = output.logits, output.labels
            wanted = labels[:, 1:]
            right = (logits[:, :-1].argmax(dim=-1) == wanted) | (wanted == -100)
            nll, tokens = output.per_sample_nll, output.per_sample_tokens
            parts.append((nll.double().cpu(), tokens.cpu(), right.all(dim=1).cpu()))
    finally:
        model.train(training)
    return FrozenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def fit_compressor(
    pretrainer: PerceiverPretrainer,
    part: FrozenSamples,
    encode: SampleEncoder,
    *,
    steps: int,
    rate: float = 2e-3,
    batch_size: int = 64,
    seed: int = 0,
    track: Track | None = None,
) -> list[float]:
    """Train a compressor to give images and captions back, then freeze it; returns the loss of every step.

    Args:
        pretrainer: holds the compressor, which `encode` uses too.
        part: image-caption pairs.
        encode: tokenizes the captions.
        steps: optimiser steps.
        rate: highest learning rate.
        batch_size: pairs per step.
        seed: of the draws.
        track: wraps the steps with a progress display.

    Raises:
        ValueError: no steps.
        RuntimeError: the loss is no longer finite.
    """
    ids, mask = encode.tokens([caption_of(sample) for sample in part.samples])
    generator = torch.Generator().manual_seed(seed)

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(part), (batch_size,), generator=generator)
        features = part.features[part.image_of[rows]]
        loss: Tensor = pretrainer(features, ids[rows], text_mask=mask[rows], generator=generator).loss
        return loss

    curve = descend(loss_of, pretrainer.parameters(), Descent(steps, rate), where="fit_compressor", track=track)
    pretrainer.compressor.requires_grad_(False).eval()
    return curve


def small_encoder(tower: Any, image_processor: Any, tokenizer: Any, *, seed: int = 0) -> SampleEncoder:
    """Build the encoder of an experiment's bank: `SMALL_SIZES` of compressor, keys from images.

    Args:
        tower: a frozen vision tower.
        image_processor: of the tower.
        tokenizer: of the captions.
        seed: of the compressor's weights, which `fit_small_compressor` trains.
    """
    width, words = tower.config.hidden_size, len(tokenizer)
    compressor = PerceiverCompressor(width, vocab_size=words, sizes=SMALL_SIZES, seed=seed)
    return SampleEncoder(PairEncoder(tower, compressor, AttentionPooledKey()), image_processor, tokenizer)


def fit_small_compressor(
    encode: SampleEncoder, part: FrozenSamples, *, steps: int, seed: int = 0, track: Track | None = None
) -> list[float]:
    """Train the compressor of `small_encoder` on pairs whose captions say nearly all there is to see.

    The losses are weighted for that: little for image features, and each caption stays with its image.

    Args:
        encode: whose compressor trains; frozen after.
        part: image-caption pairs.
        steps: optimiser steps.
        seed: of the decoder's weights and of the draws.
        track: wraps the steps with a progress display.

    Raises:
        ValueError: no steps.
        RuntimeError: the loss is no longer finite.
    """
    weights = LossWeights(image=0.1, bag=0.3)
    compressor: Any = encode.encoder.compressor
    compressor.requires_grad_(True)
    pretrainer = PerceiverPretrainer(compressor, loss_weights=weights, mixed_captions=0.0, hidden_dim=64, seed=seed)
    return fit_compressor(pretrainer, part, encode, steps=steps, seed=seed, track=track)
