"""What a compressor remembers: how far image and caption move its values, and what can be read back from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinyalign._checks import check_positive
from tinyalign.perceiver.probes import RidgeProbe, area_under_roc, effective_rank, explained_variance, spread_over_norm

Compressor = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class CompressorRecord(NamedTuple):
    """One pair to diagnose with.

    `image` (N, image_dim) and `text` (T,) or (T, text_dim) are what the compressor reads. `words` are what the caption
    says, and None takes the ids in `text`. `patches` (P, D) is what to recover of the image, and None takes `image`.
    Records of one `group` (one image with several captions) stay on one side of the split.

    Shape:
        image: (N, image_dim). text: (T,), long, or (T, text_dim). patches: (P, D).
    """

    image: Tensor
    text: Tensor
    words: Sequence[Hashable] | None = None
    patches: Tensor | None = None
    group: Hashable | None = None


class StoredValue(NamedTuple):
    """A way to store a value, and what comes back.

    Args:
        bytes_per_item: what it takes.
        word_recovery: how well caption words are recovered, as in `CompressorDiagnostics`.
    """

    bytes_per_item: int
    word_recovery: float


class CompressorDiagnostics(NamedTuple):
    """Everything `compressor_diagnostics` measures.

    `image_sensitivity` and `caption_sensitivity` are the spread of the value over its norm while only the one changes.
    `shared_energy` is the share of the squared norm that all values have in common. `effective_rank` counts the
    directions in which values differ, 0 when they are all the same. `word_recovery` is the mean area under the ROC
    curve over `num_words` words, each read from held-out values by a linear probe (0.5 = nothing, 1 = always).
    `words_found` is the share of a caption's words among as many highest-scored ones, and `words_found_by_frequency`
    the same for who only knows which words are common. `patch_recovery` is the held-out explained variance of patch
    features (0 = only the mean). `storage` maps "fp32", "fp16", "int8" and "int8 uncentred" to `StoredValue`.
    `num_records` pairs were measured.
    """

    image_sensitivity: float
    caption_sensitivity: float
    shared_energy: float
    effective_rank: float
    word_recovery: float
    words_found: float
    words_found_by_frequency: float
    num_words: int
    patch_recovery: float
    storage: dict[str, StoredValue]
    num_records: int


def compressor_diagnostics(
    compressor: Compressor,
    records: Iterable[CompressorRecord],
    *,
    seed: int = 0,
    batch_size: int = 32,
    num_probes: int = 10,
    min_count: int = 4,
) -> CompressorDiagnostics:
    """Measure what the values of a compressor carry.

    Half of the groups train linear probes, the other half measures them, so nothing counts that was learned by heart.
    Only words that occur, and are missing, at least `min_count` times on each side are asked for.

    Args:
        compressor: called as `PerceiverCompressor` is: (image, text, image_mask, text_mask) -> (B, L, latent_dim).
        records: pairs, a few hundred or more; the compressor should not have been trained on them.
        seed: decides the split and the pairs for the sensitivities.
        batch_size: records encoded at a time.
        num_probes: images and captions crossed for the sensitivities, at least two (its square is encoded).
        min_count: see above.

    Raises:
        ValueError: too few records or words for a measurement; a record without patches; a compressor that returns NaN.
        TypeError: records that are not `CompressorRecord` or hold no tensors; `words` in one text.

    Example:
        >>> import torch
        >>> from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes
        >>> sizes = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)
        >>> compressor = PerceiverCompressor(6, vocab_size=20, sizes=sizes)
        >>> draw = torch.Generator().manual_seed(0)
        >>> records = [
        ...     CompressorRecord(torch.randn(4, 6, generator=draw), torch.randint(20, (5,), generator=draw))
        ...     for _ in range(120)
        ... ]
        >>> measured = compressor_diagnostics(compressor, records)
        >>> measured.storage["fp16"].bytes_per_item
        64
    """
    where = "compressor_diagnostics"
    counts = {"batch_size": (batch_size, 1), "num_probes": (num_probes, 2), "min_count": (min_count, 1)}
    for name, (number, smallest) in counts.items():
        check_positive(where, name, number, least=smallest)
    records = list(records)
    for index, record in enumerate(records):
        _check_record(where, index, record)
    if len(records) < 4 * min_count:
        raise ValueError(
            f"{where}: records must be at least {4 * min_count} for min_count={min_count}, got "
            f"{len(records)}. Pass a few hundred."
        )
    generator = torch.Generator().manual_seed(seed)
    values = _encode(compressor, records, batch_size)
    groups = _groups(records)
    train = _split(groups, generator)
    image_moves, caption_moves = _sensitivities(compressor, records, num_probes, batch_size, generator)
    labels = _choose_words(records, train, min_count)
    probe = RidgeProbe(values[train], labels[train].double(), groups[train])
    held_out = labels[~train]
    patches = _patch_targets(records)
    patch_probe = RidgeProbe(values[train], patches[train], groups[train])
    wide, mean = values.double(), values[train].double().mean(0)
    energy = wide.square().sum(1).mean()
    return CompressorDiagnostics(
        image_sensitivity=image_moves,
        caption_sensitivity=caption_moves,
        shared_energy=float(wide.mean(0).square().sum() / energy) if energy else 1.0,
        effective_rank=effective_rank(values),
        word_recovery=float(area_under_roc(probe(values[~train]), held_out).mean()),
        words_found=_found(probe(values[~train]), held_out),
        words_found_by_frequency=_found(labels[train].double().mean(0).expand(held_out.shape), held_out),
        num_words=labels.shape[1],
        patch_recovery=explained_variance(patch_probe(values[~train]), patches[~train], patches[train].mean(0)),
        storage={
            name: StoredValue(size, float(area_under_roc(probe(stored), held_out).mean()))
            for name, (size, stored) in _stored_forms(values[~train], mean).items()
        },
        num_records=len(records),
    )


def _check_record(where: str, index: int, record: object) -> None:
    if not isinstance(record, CompressorRecord):
        raise TypeError(
            f"{where}: records must be CompressorRecord, got {type(record).__name__} at {index}. Write "
            "CompressorRecord(image, text)."
        )
    patches = record.image if record.patches is None else record.patches
    for name, part in (("image", record.image), ("text", record.text), ("patches", patches)):
        if not isinstance(part, Tensor) or part.dim() == 0:
            raise TypeError(
                f"{where}: {name} must be a tensor with rows, got {type(part).__name__} at record {index}. Use "
                "torch.as_tensor."
            )
    if isinstance(record.words, str):
        raise TypeError(
            f"{where}: words must be a sequence of words, got {record.words!r} at record {index}. Split the caption."
        )
    if not len(patches):
        raise ValueError(
            f"{where}: patches must hold at least one, got shape {tuple(patches.shape)} at record {index}. Leave the "
            "record out, or pass patches= where image is empty."
        )


def _encode(compressor: Compressor, records: Sequence[CompressorRecord], batch_size: int) -> Tensor:
    """Flattened values of all records, (M, L * latent_dim) in float32 on the CPU."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            images, image_mask = _pad([record.image for record in batch])
            texts, text_mask = _pad([record.text for record in batch])
            parts.append(compressor(images, texts, image_mask, text_mask).flatten(1).float().cpu())
    values = torch.cat(parts)
    broken = (~values.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"compressor_diagnostics: values must be finite, got NaN or infinity for {len(broken)} records, first "
            f"{broken[0]}. Check the features of that record."
        )
    return values


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(row.shape[0] for row in rows)
    padded = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])
    mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=padded.device)
    for index, row in enumerate(rows):
        padded[index, : row.shape[0]] = row
        mask[index, : row.shape[0]] = True
    return padded, mask


def _groups(records: Sequence[CompressorRecord]) -> Tensor:
    """(M,) long: one number per group, and one per record that names none."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor(
        [
            numbers.setdefault(("alone", i) if record.group is None else ("group", record.group), len(numbers))
            for i, record in enumerate(records)
        ]
    )


def _split(groups: Tensor, generator: torch.Generator) -> Tensor:
    """(M,) bool: True for the half of the groups that trains the probes."""
    count = int(groups.max()) + 1
    trains = torch.zeros(count, dtype=torch.bool)
    trains[torch.randperm(count, generator=generator)[: (count + 1) // 2]] = True
    return trains[groups]


def _sensitivities(
    compressor: Compressor,
    records: Sequence[CompressorRecord],
    num_probes: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    chosen = torch.randperm(len(records), generator=generator)[:num_probes].tolist()
    crossed = [records[i]._replace(text=records[j].text) for j in chosen for i in chosen]
    grid = _encode(compressor, crossed, batch_size).view(len(chosen), len(chosen), -1)  # (captions, images, ...)
    by_image = torch.tensor([spread_over_norm(row) for row in grid])
    by_caption = torch.tensor([spread_over_norm(row) for row in grid.transpose(0, 1)])
    return float(by_image.mean()), float(by_caption.mean())


def _choose_words(records: Sequence[CompressorRecord], train: Tensor, min_count: int) -> Tensor:
    """(M, W) bool: which of the usable words each caption says."""
    said: list[set[Hashable]] = []
    for record in records:
        if record.words is None and record.text.dim() != 1:
            raise ValueError(
                f"compressor_diagnostics: words must be given when text is embeddings, got text of shape "
                f"{tuple(record.text.shape)} without words. Pass CompressorRecord(words=caption.split())."
            )
        said.append(set(record.text.tolist() if record.words is None else record.words))
    vocabulary = sorted({word for words in said for word in words}, key=repr)
    labels = torch.tensor([[word in words for word in vocabulary] for words in said], dtype=torch.bool)
    usable = torch.ones(len(vocabulary), dtype=torch.bool)
    for side in (train, ~train):
        usable &= (labels[side].sum(0) >= min_count) & ((~labels[side]).sum(0) >= min_count)
    if not usable.any():
        raise ValueError(
            f"compressor_diagnostics: words must occur and be missing at least min_count={min_count} times on each "
            f"side of the split, got none of {len(vocabulary)} that does. Pass more records or a smaller min_count."
        )
    return labels[:, usable]


def _patch_targets(records: Sequence[CompressorRecord], places: int = 9) -> Tensor:
    """(M, places * D): features at evenly spaced patches, so that images of any number of patches compare."""
    rows = []
    for record in records:
        patches = (record.image if record.patches is None else record.patches).float().cpu()
        at = torch.linspace(0, len(patches) - 1, places).round().long()
        rows.append(patches[at].flatten())
    return torch.stack(rows).double()


def _found(scores: Tensor, labels: Tensor) -> float:
    """Share of the words said that are among the highest-scored, as many as were said (records that say any)."""
    shares = []
    for row, wanted in zip(scores, labels, strict=True):
        count = int(wanted.sum())
        if count:
            shares.append(float(wanted[row.topk(count).indices].double().mean()))
    return sum(shares) / len(shares)


def _stored_forms(values: Tensor, mean: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Each way to store: bytes per item, and the values that come back."""
    width = values.shape[1]
    wide = values.double()
    return {
        "fp32": (4 * width, wide),
        "fp16": (2 * width, wide.half().double()),
        "int8": (width + 4, _through_int8(wide - mean) + mean),
        "int8 uncentred": (width + 4, _through_int8(wide)),
    }


def _through_int8(values: Tensor) -> Tensor:
    """Symmetric int8 with one float32 scale per item, there and back."""
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127.0
    return (values / scale).round() * scale
