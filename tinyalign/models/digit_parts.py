"""A vision tower and a language model small enough to train on the spot, for the digit scenes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinyalign._files import replace_directory
from tinyalign.data.digits import IMAGE_SIZE, DigitScenes
from tinyalign.models.descent import Descent, descend
from tinyalign.models.digit_language import make_tokenizer, tell, train_language_model
from tinyalign.models.word_parts import padded

Track = Callable[[Iterable[int], str], Iterable[int]]
# Raise this with any change of what is trained here or of how a scene is drawn: older caches are then left aside.
_VERSION = 3
_BINDING_VERSION = 1


@dataclass(frozen=True)
class DigitRecipe:
    """How the two small models are trained; its values name the cache entry.

    Args:
        tower_steps: contrastive steps of the vision tower.
        language_steps: steps of the language model.
        batch_size: rows per contrastive step; the language model takes half.
        num_scenes: images the tower is trained on, all of the memory split's handwriting.
        hidden_dim: width of the tower; the language model is a third wider.
        longest_prefix: words before the prompt in the longest texts that the language model reads.
        seed: of weights, texts and order.
    """

    tower_steps: int = 2000
    language_steps: int = 500
    batch_size: int = 128
    num_scenes: int = 16000
    hidden_dim: int = 96
    longest_prefix: int = 64
    seed: int = 0


class DigitParts(NamedTuple):
    """Frozen parts for the digit scenes, each as ``from_pretrained`` gave it back."""

    vision_tower: nn.Module
    image_processor: Any
    language_model: nn.Module
    tokenizer: Any


def load_digit_parts(
    recipe: DigitRecipe | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    retrain: bool = False,
    track: Track | None = None,
) -> DigitParts:
    """Train, or fetch from the cache, a SigLIP-architecture tower and a Llama-architecture language model.

    The tower is trained contrastively on scenes and captions. The language model never sees an image: it is trained on
    text in which facts come first, in changing order, repeated and among filler, and a caption or an answer follows. A
    model trained on captions alone would ignore whatever stands before them, and no connector could make it read.

    Args:
        recipe: sizes and steps; the defaults are the quickstart's.
        cache_dir: where trained parts are kept; ``$TINYALIGN_CACHE``, or ``tinyalign`` in the user's cache folder.
        retrain: train anew although the cache has them.
        track: wraps the steps of each training with a progress display: ``track(steps, label)``.

    Raises:
        RuntimeError: a training diverged.

    Source:
        Zhai et al. 2023, arXiv 2303.15343 (the tower's architecture); Radford et al. 2021, arXiv 2103.00020 (its loss).
    """
    recipe = DigitRecipe() if recipe is None else recipe
    track = track if track is not None else _silent
    folder = _cache_folder(cache_dir) / f"digit-parts-{_name_of(recipe, _VERSION)}"
    if retrain or not (folder / "recipe.json").is_file():
        with torch.random.fork_rng(devices=[]), replace_directory(folder) as fresh:
            torch.manual_seed(recipe.seed)
            tokenizer = make_tokenizer()
            tokenizer.save_pretrained(fresh / "language_model")
            _train_language(recipe, tokenizer, track, binding=False).save_pretrained(fresh / "language_model")
            _train_tower(recipe, tokenizer, track).save_pretrained(fresh / "vision_tower")
            size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
            SiglipImageProcessorPil(size=size).save_pretrained(fresh / "vision_tower")
            (fresh / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    tower = SiglipVisionModel.from_pretrained(folder / "vision_tower")
    language_model = AutoModelForCausalLM.from_pretrained(folder / "language_model")
    return DigitParts(
        tower.requires_grad_(False).eval(),
        AutoImageProcessor.from_pretrained(folder / "vision_tower", backend="pil"),
        language_model.requires_grad_(False).eval(),
        AutoTokenizer.from_pretrained(folder / "language_model"),
    )


def load_binding_reader(
    recipe: DigitRecipe | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    retrain: bool = False,
    track: Track | None = None,
) -> nn.Module:
    """Train, or fetch from the cache, a language model that also reads which colour is whose.

    It has the width, the depth and the vocabulary of the one that `load_digit_parts` gives, and can take its place:
    ``parts._replace(language_model=load_binding_reader())``. What a better reader leaves for retrieval to do is
    a question of its own.

    Args:
        recipe: as for `load_digit_parts`; what concerns the tower changes nothing.
        cache_dir: as there.
        retrain: train anew although the cache has it.
        track: wraps the steps of the training with a progress display: ``track(steps, label)``.

    Raises:
        RuntimeError: the training diverged.
    """
    recipe = DigitRecipe() if recipe is None else recipe
    folder = _cache_folder(cache_dir) / f"digit-reader-{_name_of(recipe, _BINDING_VERSION)}"
    if retrain or not folder.is_dir():
        with torch.random.fork_rng(devices=[]), replace_directory(folder) as fresh:
            torch.manual_seed(recipe.seed)
            model = _train_language(recipe, make_tokenizer(), _silent if track is None else track, binding=True)
            model.save_pretrained(fresh)
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()  # type: ignore[no-any-return]


def told_in_words(parts: DigitParts, scenes: DigitScenes, *, seed: int = 0, batch_size: int = 64) -> float:
    """Share of answers that the language model writes when words say what is in the image, and no image is shown.

    What it cannot read from words it will hardly read from what a connector makes of an image: set beside an arm's
    accuracy, this tells whether the connectors fall short or the language model.

    Args:
        parts: whose language model reads.
        scenes: what is told, and what is asked.
        seed: of the filler words, and where among them the facts stand.
        batch_size: texts read at once.

    Shape:
        returns: a number in [0, 1]; an answer counts if greedy decoding would write all of it.

    Example:
        >>> told_in_words(load_digit_parts(), DigitScenes("heldout", 400))  # doctest: +SKIP
        0.505
    """
    rng, known = np.random.default_rng(seed), parts.tokenizer.convert_tokens_to_ids
    texts = []
    for index, sample in enumerate(scenes):
        scene = scenes.scene(index // scenes.samples_per_scene)
        facts = list(zip(scene.colours, scene.digits, strict=True))
        words = " ".join(tell(facts, 32, rng, contradicted=0.0))
        asked, answer = (turn.text.removeprefix("<image>\n") for turn in sample.turns)
        texts.append((known(f"<s> ask {words} {asked} answer".split()), known(f"{answer} </s>".split())))
    right = 0
    for at in range(0, len(texts), batch_size):
        ids, labels = padded(texts[at : at + batch_size])
        with torch.no_grad():
            written = parts.language_model(input_ids=ids).logits[:, :-1].argmax(dim=-1)
        right += int(((written == labels[:, 1:]) | (labels[:, 1:] == -100)).all(dim=1).sum())
    return right / len(texts)


def _silent(steps: Iterable[int], label: str) -> Iterable[int]:  # noqa: ARG001
    return steps


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    if "TINYALIGN_CACHE" in os.environ:
        return Path(os.environ["TINYALIGN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tinyalign"


def _name_of(recipe: DigitRecipe, version: int) -> str:
    """Name a recipe together with the version of the code that carries it out."""
    return hashlib.sha256(json.dumps([version, asdict(recipe)], sort_keys=True).encode()).hexdigest()[:16]


def _train_language(recipe: DigitRecipe, tokenizer: Any, track: Track, *, binding: bool) -> Any:
    label = "language model, on text only"
    return train_language_model(
        tokenizer,
        width=recipe.hidden_dim * 4 // 3,
        steps=recipe.language_steps,
        rows=recipe.batch_size // 2,
        longest_prefix=recipe.longest_prefix,
        seed=recipe.seed,
        binding=binding,
        track=lambda steps: track(steps, label),
    )


# The vision tower


class _CaptionEncoder(nn.Module):
    """A caption as the sum of a vector per pair of neighbouring words: enough to bind a colour to its digit."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.pairs = nn.EmbeddingBag(vocab_size * vocab_size, dim, mode="sum")
        nn.init.normal_(self.pairs.weight, std=dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.pairs(ids[:, :-1] * self.vocab_size + ids[:, 1:])  # type: ignore[no-any-return]


def _train_tower(recipe: DigitRecipe, tokenizer: Any, track: Track) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=recipe.hidden_dim,
        intermediate_size=2 * recipe.hidden_dim,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    tower = SiglipVisionModel(config)
    captions = _CaptionEncoder(len(tokenizer), recipe.hidden_dim)
    log_scale = nn.Parameter(torch.tensor(2.3))
    # Images of a seed that no bank uses, so that the tower has seen the handwriting of the bank but not its scenes.
    scenes = DigitScenes("memory", recipe.num_scenes, seed=recipe.seed + 10_000)
    drawn = [scenes.scene(number) for number in range(recipe.num_scenes)]
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(scene.caption.split()) for scene in drawn])
    generator = torch.Generator().manual_seed(recipe.seed)

    def loss_of(step: int) -> Tensor:  # noqa: ARG001
        rows = torch.randint(recipe.num_scenes, (recipe.batch_size,), generator=generator)
        seen = _distort(pixels[rows], generator)
        seen = seen + 0.1 * torch.randn(seen.shape, generator=generator)
        image = F.normalize(tower(pixel_values=seen).pooler_output, dim=-1)
        text = F.normalize(captions(ids[rows]), dim=-1)
        logits = log_scale.exp() * text @ image.T
        same = (ids[rows][:, None] == ids[rows][None]).all(dim=-1).float()
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    weights = [*tower.parameters(), *captions.parameters(), log_scale]
    label = "vision tower, on images and captions"
    _train(loss_of, weights, recipe.tower_steps, 2e-3, label, track)
    return tower.eval()


def _distort(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, stretch, shear and shift each image (B, 3, H, W) a little: no two writers slant alike."""
    draw = torch.rand(6, len(pixels), generator=generator) * 2 - 1
    reach = torch.tensor([0.05, 0.03, 0.03, 0.04, 0.024, 0.024])  # radians, log scales, shear, shares of half the image
    turn, wide, high, shear, across, down = draw * reach[:, None]
    wide, high = wide.exp(), high.exp()
    rows = (
        torch.stack([turn.cos() * wide, shear - turn.sin() * high, across], dim=1),
        torch.stack([turn.sin() * wide, turn.cos() * high, down], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels + 1.0, grid, align_corners=False) - 1.0  # what comes in from outside is black


def _train(
    loss_of: Callable[[int], Tensor], weights: Iterable[Tensor], steps: int, rate: float, label: str, track: Track
) -> None:
    descend(
        loss_of,
        weights,
        Descent(steps, rate, warmup=0.12, weight_decay=0.02, to_zero=True),
        where=f"load_digit_parts ({label})",
        advice="Use another seed in the recipe.",
        track=lambda numbers: track(numbers, label),
    )
