"""A vision tower and a language model trained on the spot on a few thousand pictures with short answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign._files import replace_directory
from tinyalign.data import IMAGE_PLACEHOLDER, Sample, answers_of, load_image, questions_of
from tinyalign.models.descent import Descent, descend
from tinyalign.models.tiny import TinyParts, write_tiny_parts

Track = Callable[[Iterable[int], str], Iterable[int]]
BATCH = 32
_FIRST_WORD = 4  # ids below are the tokenizer's special ones


def train_word_parts(
    samples: Sequence[Sample],
    folder: str | Path,
    *,
    image_size: int = 32,
    tower_steps: int = 600,
    language_steps: int = 1200,
    track: Track | None = None,
) -> TinyParts:
    """Train parts for a question-answering set of simple pictures, where no pretrained ones are at hand.

    The tower learns which words are said about an image. The language model never sees one: it learns to answer from
    words, true ones among others, so that a connector has something to speak to. Both are kept in `folder`, and
    returned from there when it exists.

    Args:
        samples: one image each; questions and answers of a word or a few.
        folder: gets the folders ``vision`` and ``llm``, both at once when both are done.
        image_size: side of the tower's pictures.
        tower_steps: steps of the tower, 32 images each.
        language_steps: steps of the language model, 32 questions each.
        track: wraps the steps of each training with a progress display: ``track(steps, label)``.

    Raises:
        RuntimeError: a training diverged.
    """
    folder = Path(folder)
    if folder.is_dir():
        return TinyParts(folder / "vision", folder / "llm")
    words = [turn.text.replace(IMAGE_PLACEHOLDER, "") for sample in samples for turn in sample.turns]
    track = track if track is not None else (lambda steps, label: steps)  # noqa: ARG005
    with torch.random.fork_rng(devices=[]), replace_directory(folder) as fresh:
        torch.manual_seed(0)
        made = write_tiny_parts(fresh, words, image_size=image_size)
        tokenizer, pictures = AutoTokenizer.from_pretrained(made.llm), AutoImageProcessor.from_pretrained(made.vision)
        tower, language_model = AutoModel.from_pretrained(made.vision), AutoModelForCausalLM.from_pretrained(made.llm)
        images = [load_image(sample.images[0]) for sample in samples]
        parts = [images[at : at + 200] for at in range(0, len(images), 200)]
        pixels = torch.cat([pictures(images=part, return_tensors="pt")["pixel_values"] for part in parts])
        said = [_ids(tokenizer, answers_of(sample).turns[1].text) for sample in samples]
        _train_tower(tower, pixels, said, len(tokenizer), tower_steps, track)
        _train_language_model(language_model, tokenizer, samples, said, language_steps, track)
        tower.save_pretrained(made.vision)
        language_model.save_pretrained(made.llm)
    return TinyParts(folder / "vision", folder / "llm")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _train_tower(tower: Any, pixels: Tensor, said: list[list[int]], vocab_size: int, steps: int, track: Track) -> None:
    target = torch.zeros(len(said), vocab_size)
    for row, ids in enumerate(said):
        target[row, ids] = 1.0
    head = nn.Linear(tower.config.hidden_size, vocab_size)
    layer = tower.config.num_hidden_layers - 1  # the layer that features are read from, so that it must know
    generator = torch.Generator().manual_seed(0)

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(pixels), (BATCH,), generator=generator)
        seen = tower(pixel_values=pixels[rows], output_hidden_states=True).hidden_states[layer]
        return F.binary_cross_entropy_with_logits(head(seen.mean(dim=1)), target[rows], reduction="sum") / BATCH

    _train(loss_of, [*tower.parameters(), *head.parameters()], steps, 1e-3, "vision tower, on words of images", track)


def _train_language_model(
    model: Any, tokenizer: Any, samples: Sequence[Sample], said: list[list[int]], steps: int, track: Track
) -> None:
    """Text alone: words that were said about an image, among others that were not, then a question and its answer."""
    rng = np.random.default_rng(0)
    encoded = []
    for row, sample in enumerate(samples):
        for question, answer in (one.turns for one in questions_of(sample)):
            asked = question.text.replace(IMAGE_PLACEHOLDER, "").strip()
            told = [*_ids(tokenizer, answer.text), tokenizer.eos_token_id]
            encoded.append((row, _ids(tokenizer, f"{asked} ASSISTANT:"), told))
    opening = [tokenizer.bos_token_id, *_ids(tokenizer, "USER:")]

    def loss_of(_step: int) -> Tensor:
        batch = []
        for at in rng.integers(len(encoded), size=BATCH):
            row, asked, answer = encoded[at]
            length = int(rng.integers(4, 40))
            prefix = rng.integers(_FIRST_WORD, len(tokenizer), size=length)
            true = rng.random(length) < 0.5
            prefix[true] = rng.choice(said[row], size=int(true.sum()))
            batch.append(([*opening, *prefix.tolist(), *asked], answer))
        ids, labels = padded(batch)
        logits = model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    _train(loss_of, model.parameters(), steps, 2e-3, "language model, on text only", track)


def padded(texts: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids and labels of (prompt, answer) pairs, padded on the right with 0; only answers have labels.

    Shape:
        returns: (n, longest), int64, twice.

    Example:
        >>> padded([([5, 6], [7]), ([5], [8])])
        (tensor([[5, 6, 7],
                [5, 8, 0]]), tensor([[-100, -100,    7],
                [-100,    8, -100]]))
    """
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids, labels = torch.zeros(len(texts), width, dtype=torch.long), torch.full((len(texts), width), -100)
    for row, (prompt, answer) in enumerate(texts):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : stop] = torch.tensor(answer)
    return ids, labels


def _train(
    loss_of: Callable[[int], Tensor], weights: Iterable[Tensor], steps: int, rate: float, label: str, track: Track
) -> None:
    descend(
        loss_of,
        weights,
        Descent(steps, rate, warmup=0.1, weight_decay=0.01),
        where=f"train_word_parts ({label})",
        advice="Give fewer steps or other pictures.",
        track=lambda numbers: track(numbers, label),
    )
