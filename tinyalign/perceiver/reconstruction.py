"""How much of image and caption can be read back from the latents of pairs that did not train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyalign.perceiver.ids import as_long
from tinyalign.perceiver.pretrainer import PerceiverPretrainer, kept_positions


class ReconstructionReport(NamedTuple):
    """Totals over all kept patches and tokens; None is what was not asked for.

    `image_explained` is the explained variance of normalised patch features (0 = only the mean known, 1 = all),
    `token_nll` the cross-entropy of caption tokens in nats, `token_accuracy` the share whose most likely id is right,
    `text_explained` the explained variance of normalised text embeddings. `num_patches` and `num_tokens` were kept.
    """

    image_explained: float | None
    token_nll: float | None
    token_accuracy: float | None
    text_explained: float | None
    num_patches: int
    num_tokens: int


def evaluate_reconstruction(
    pretrainer: PerceiverPretrainer, batches: Iterable[Mapping[str, Tensor]]
) -> ReconstructionReport:
    """Reconstruct held-out pairs and report how well, without training anything.

    Args:
        pretrainer: the trained compressor with its decoder; its training mode is restored afterwards.
        batches: the arguments of `PerceiverPretrainer.forward` by name, as a `DataLoader` yields them, on any device.

    Shape:
        of a batch: as `PerceiverPretrainer.forward` takes it.

    Raises:
        ValueError: no batches, or one without image features.

    Example:
        >>> import torch
        >>> from tinyalign.perceiver import PerceiverCompressor, PerceiverPretrainer, PerceiverSizes
        >>> sizes = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)
        >>> pretrainer = PerceiverPretrainer(PerceiverCompressor(32, vocab_size=60, sizes=sizes), hidden_dim=16)
        >>> batch = {"image_features": torch.randn(2, 9, 32), "text": torch.randint(0, 60, (2, 5))}
        >>> evaluate_reconstruction(pretrainer, [batch]).num_tokens
        10
    """
    training = pretrainer.training
    pretrainer.eval()
    names = ("error", "energy", "nll", "right", "text_error", "text_energy", "patches", "tokens")
    totals: dict[str, float] = dict.fromkeys(names, 0.0)
    device, count = pretrainer.compressor.image_projection.weight.device, 0
    try:
        with torch.no_grad():
            for batch in batches:
                count += 1
                if batch.get("image_features") is None:
                    raise ValueError(
                        f"evaluate_reconstruction: batches must hold image_features, got {sorted(batch)}. Name their "
                        "parts as PerceiverPretrainer.forward does."
                    )
                given = {name: part.to(device) for name, part in batch.items() if part is not None}
                _add(pretrainer, given, totals)
    finally:
        pretrainer.train(training)
    if not count:
        raise ValueError("evaluate_reconstruction: batches must not be empty, got 0. Pass a fresh iterable.")
    ids, tokens = pretrainer.compressor.text_dim is None, totals["tokens"]
    reads_text = pretrainer.text_reader is not None and tokens > 0
    return ReconstructionReport(
        image_explained=1.0 - totals["error"] / totals["energy"] if totals["energy"] else None,
        token_nll=totals["nll"] / tokens if reads_text and ids else None,
        token_accuracy=totals["right"] / tokens if reads_text and ids else None,
        text_explained=1.0 - totals["text_error"] / totals["text_energy"] if reads_text and not ids else None,
        num_patches=int(totals["patches"]),
        num_tokens=int(tokens),
    )


def _add(pretrainer: PerceiverPretrainer, batch: Mapping[str, Tensor], totals: dict[str, float]) -> None:
    compressor = pretrainer.compressor
    image, text = batch["image_features"], as_long(batch.get("text"))
    image_mask, text_mask = batch.get("image_mask"), batch.get("text_mask")
    if image_mask is None:
        image_mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    if text is not None and text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    latents = compressor(image, text, image_mask, text_mask)
    totals["patches"] += float(image_mask.sum())
    if pretrainer.image_reader is not None:
        places = torch.arange(image.shape[1], device=image.device)[None]
        target = compressor.normalise(image.to(latents.dtype))[image_mask]
        guess = pretrainer.image_reader(latents, places)[image_mask]
        totals["error"] += float((guess - target).double().square().sum())
        totals["energy"] += float(target.double().square().sum())
    if text is None or text_mask is None:
        return
    totals["tokens"] += float(text_mask.sum())
    if pretrainer.text_reader is None or not text_mask.any():
        return
    read = pretrainer.text_reader(latents, kept_positions(text_mask))[text_mask]
    if compressor.text_dim is None:
        logits = pretrainer.token_logits(read).float()
        totals["nll"] += float(F.cross_entropy(logits, text[text_mask], reduction="sum"))
        totals["right"] += float((logits.argmax(dim=-1) == text[text_mask]).sum())
    else:
        wanted = F.layer_norm(text[text_mask].to(read.dtype), text.shape[-1:])
        totals["text_error"] += float((read - wanted).double().square().sum())
        totals["text_energy"] += float(wanted.double().square().sum())
