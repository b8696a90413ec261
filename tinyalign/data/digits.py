"""Scenes of real handwritten digits, with captions and questions whose answers are known by construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinyalign._checks import check_positive
from tinyalign.data.records import Sample, Turn, stable_id

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 60, 60),
    "green": (60, 220, 60),
    "blue": (80, 120, 255),
    "yellow": (240, 220, 50),
}
IMAGE_SIZE = 32
_CELL = 16
# Consecutive rows of the file come from the same writer, so contiguous parts keep writers (all but those at the two
# borders) apart.
_HANDWRITING = {"memory": (0.0, 0.5), "train": (0.5, 0.75), "heldout": (0.75, 1.0)}
_TASKS = ("caption", "question", "both")
CAPTION_PROMPT = "describe the image ."


class Scene(NamedTuple):
    """What is in one image.

    Args:
        digits: in increasing order.
        colours: of each digit.
        pixels: the image.

    Shape:
        pixels: (32, 32, 3), uint8, RGB.
    """

    digits: tuple[int, ...]
    colours: tuple[str, ...]
    pixels: NDArray[np.uint8]

    @property
    def facts(self) -> frozenset[tuple[str, int]]:
        """The (colour, digit) pairs that the caption names."""
        return frozenset(zip(self.colours, self.digits, strict=True))

    @property
    def caption(self) -> str:
        """One sentence that names every digit with its colour, in increasing order of the digits."""
        return caption_of(list(zip(self.colours, self.digits, strict=True)))


def caption_of(facts: Sequence[tuple[str, int]]) -> str:
    """Write the caption for (colour, digit) pairs; the order of the pairs does not matter.

    Example:
        >>> caption_of([("blue", 7), ("red", 3)])
        'a red 3 and a blue 7 .'
    """
    return " and ".join(f"a {colour} {digit}" for colour, digit in sorted(facts, key=lambda f: f[1])) + " ."


def question_of(facts: Sequence[tuple[str, int]], which: int) -> tuple[str, str]:
    """Ask question number ``which`` about (colour, digit) pairs; even numbers ask for a colour, odd ones for a digit.

    Returns:
        the question and its answer.

    Example:
        >>> question_of([("red", 3), ("blue", 7)], 2)
        ('what color is the 7 ?', 'blue .')
        >>> question_of([("red", 3), ("blue", 7)], 1)
        ('which digit is red ?', '3 .')
    """
    colour, digit = sorted(facts, key=lambda f: f[1])[(which // 2) % len(facts)]
    if which % 2 == 0:
        return f"what color is the {digit} ?", f"{colour} ."
    return f"which digit is {colour} ?", f"{digit} ."


class DigitScenes(Sequence[Sample]):
    """Images with two to four handwritten digits in different colours, as an ordinary image-text dataset.

    The digits are the UCI handwritten digits that scikit-learn ships (1,797 images of 8 x 8), enlarged to 16 x 16,
    jittered, coloured and laid on noise. No digit image of one split occurs in another, so held-out scenes show
    handwriting that nothing was trained on. The law of the captions is known: distinct digits, distinct colours,
    uniform, so that entropies can be computed instead of estimated.

    Args:
        split: "memory", "train" or "heldout"; each has handwriting of its own.
        num_scenes: how many different images.
        seed: of the scenes; one (split, seed, index) is one image for ever.
        num_digits: digits per image, 2 to 4.
        task: "caption" (one sample per image), "question" (one sample per image and question), or "both".
        noise: standard deviation of the pixel noise, in units of full brightness.

    Raises:
        ValueError: an unknown split or task, or a size out of range.

    Source:
        Alpaydin and Kaynak 1998, UCI Optical Recognition of Handwritten Digits.

    Example:
        >>> scenes = DigitScenes("train", 10, seed=0)
        >>> len(scenes), scenes[0].images[0].size
        (10, (32, 32))
        >>> scenes[0].turns[1].text == scenes.scene(0).caption
        True
    """

    def __init__(
        self,
        split: str,
        num_scenes: int,
        *,
        seed: int = 0,
        num_digits: int = 2,
        task: str = "caption",
        noise: float = 0.06,
    ) -> None:
        for name, value, known in (("split", split, tuple(_HANDWRITING)), ("task", task, _TASKS)):
            if value not in known:
                raise ValueError(f"DigitScenes: {name} must be one of {known}, got {value!r}. Choose one of them.")
        check_positive("DigitScenes", "num_scenes", num_scenes)
        if not 2 <= num_digits <= 4:
            raise ValueError(f"DigitScenes: num_digits must be 2, 3 or 4, got {num_digits!r}. There are four cells.")
        if not 0.0 <= noise <= 1.0:
            raise ValueError(f"DigitScenes: noise must lie in [0, 1], got {noise!r}. Full brightness is 1.")
        self.split, self.num_scenes, self.seed = split, num_scenes, seed
        self.num_digits, self.task, self.noise = num_digits, task, noise

    @property
    def samples_per_scene(self) -> int:
        """How many samples share one image (and so one group)."""
        questions = 2 * self.num_digits
        return {"caption": 1, "question": questions, "both": 1 + questions}[self.task]

    @property
    def caption_entropy(self) -> float:
        """H(L) of a caption in nats, exactly: which digits, and which colour each has.

        Example:
            >>> round(DigitScenes("train", 1).caption_entropy, 4)  # ln(45) + ln(4 * 3)
            6.2916
        """
        return math.log(math.comb(10, self.num_digits)) + math.log(math.perm(len(COLOURS), self.num_digits))

    def __len__(self) -> int:
        return self.num_scenes * self.samples_per_scene

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"DigitScenes: index must lie in [0, {len(self)}), got {index}. Use len() as the bound.")
        number, which = divmod(index % len(self), self.samples_per_scene)
        scene = self.scene(number)
        facts = list(zip(scene.colours, scene.digits, strict=True))
        if self.task == "both":
            which -= 1
        asked, answer = (
            (CAPTION_PROMPT, scene.caption) if self.task == "caption" or which < 0 else question_of(facts, which)
        )
        image_name = f"{self.split}/{self.seed}/{self.num_digits}/{number}"
        name = f"{image_name}/{'caption' if self.task == 'caption' or which < 0 else which}"
        turns = (Turn("user", f"<image>\n{asked}"), Turn("assistant", answer))
        return Sample(name, stable_id(name), stable_id(image_name), (Image.fromarray(scene.pixels),), turns)

    def one_each(self) -> list[Sample]:
        """One sample for each image, every kind of question equally often.

        Example:
            >>> [sample.turns[0].text.split()[1] for sample in DigitScenes("train", 4, task="question").one_each()]
            ['what', 'which', 'what', 'which']
        """
        kinds = self.samples_per_scene
        return [self[number * kinds + number % kinds] for number in range(self.num_scenes)]

    def scene(self, number: int) -> Scene:
        """Draw image ``number``: what is in it, and its pixels."""
        if not 0 <= number < self.num_scenes:
            raise IndexError(
                f"DigitScenes.scene: number must lie in [0, {self.num_scenes}), got {number}. "
                f"Use num_scenes as the bound."
            )
        rng = np.random.default_rng([list(_HANDWRITING).index(self.split), self.seed, self.num_digits, number])
        digits = sorted(int(digit) for digit in rng.choice(10, self.num_digits, replace=False))
        colours = [str(colour) for colour in rng.choice(list(COLOURS), self.num_digits, replace=False)]
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
        cells = rng.choice(4, self.num_digits, replace=False)
        written = _handwriting(self.split)
        for digit, colour, cell in zip(digits, colours, cells, strict=True):
            shapes = written[digit]
            ink = shapes[rng.integers(len(shapes))]
            down, right = (int(shift) for shift in rng.integers(-2, 3, size=2))
            top, left = (int(cell) // 2 * _CELL + down, int(cell) % 2 * _CELL + right)
            rows, columns = slice(max(top, 0), top + _CELL), slice(max(left, 0), left + _CELL)
            patch = canvas[rows, columns]
            part = ink[max(-top, 0) :, max(-left, 0) :][: patch.shape[0], : patch.shape[1], None]
            canvas[rows, columns] = np.maximum(patch, part * np.array(COLOURS[colour], dtype=np.float32))
        canvas *= rng.uniform(0.7, 1.0)
        canvas += rng.normal(0.0, 255.0 * self.noise, canvas.shape)
        return Scene(tuple(digits), tuple(colours), np.clip(canvas, 0, 255).astype(np.uint8))


@lru_cache(maxsize=len(_HANDWRITING))
def _handwriting(split: str) -> dict[int, NDArray[np.float32]]:
    """The split's digit images by digit: (n, 16, 16), ink in [0, 1]."""
    from sklearn.datasets import load_digits

    source: Any = load_digits()
    first, last = (int(share * len(source.target)) for share in _HANDWRITING[split])
    small = source.images[first:last].astype(np.float32) / 16.0
    large = np.stack(
        [np.asarray(Image.fromarray(ink).resize((_CELL, _CELL), Image.Resampling.BILINEAR)) for ink in small]
    )
    return {digit: large[source.target[first:last] == digit] for digit in range(10)}
