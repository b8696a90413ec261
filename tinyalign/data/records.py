"""The record that every dataset here yields: an id, the images, and who said what."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import xxhash
from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """One thing said.

    Args:
        role: `system`, `user` or `assistant`.
        text: with its ``<image>`` placeholders.
    """

    role: str
    text: str


class Sample(NamedTuple):
    """One conversation about any number of images.

    `sample_id` and `group` are what a memory bank knows a sample by: entries of one group show the same image, so a
    query may leave out its own sample and all of its twins.

    Args:
        id: the id as text, unique within its dataset.
        sample_id: the id as a number, ``stable_id(id)``.
        group: a number shared by every sample that shows the same image.
        images: paths, or images in memory, in the order of the placeholders.
        turns: what was said, in order.
    """

    id: str
    sample_id: int
    group: int
    images: tuple[Path | Image.Image, ...]
    turns: tuple[Turn, ...]


def stable_id(text: str) -> int:
    """Turn an id in text form into the integer that a bank stores: the same on every machine and in every run.

    63 bits, so a collision within a million ids has a probability of about 5e-8.

    Args:
        text: the id.

    Example:
        >>> stable_id("000000000139.jpg") == stable_id("000000000139.jpg") >= 0
        True
    """
    return xxhash.xxh3_64_intdigest(text.encode("utf-8")) >> 1


def load_image(image: Path | Image.Image) -> Image.Image:
    """Read an image as RGB.

    Args:
        image: a file, or an image that is converted.

    Raises:
        ValueError: the file is missing, is not an image, or is cut short; the message names it.

    Example:
        >>> load_image(Image.new("L", (3, 2))).mode
        'RGB'
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(
            f"load_image: image must exist, got {str(image)!r}. Check the image folder and the record's path."
        ) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"load_image: image must be a readable picture, got {str(image)!r} ({error}). "
            f"Fetch the file again or drop its record."
        ) from error
