"""Which records can be trained on, said before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyalign.data import LlavaDataset, Sample


class CheckedSamples(NamedTuple):
    """Samples that can be trained on, and the others.

    Args:
        samples: those that can.
        left_out: what is wrong with each other one, by id.
    """

    samples: list[Sample]
    left_out: dict[str, str]


def check_samples(samples: Sequence[Sample], *, on_error: str = "raise") -> CheckedSamples:
    """Look for samples that would stop a run, or teach it to say nothing: missing images, empty answers.

    Args:
        samples: what is to be trained on. Open a `LlavaDataset` with ``check_images=False`` to let missing images be
            left out here.
        on_error: ``raise``, or ``skip`` to leave such samples out and say which.

    Raises:
        ValueError: ``raise`` and such a sample, by name; or no sample is left.

    Example:
        >>> from tinyalign.data import Turn
        >>> good = Sample("a", 1, 1, (), (Turn("user", "Red?"), Turn("assistant", "no")))
        >>> checked = check_samples([good, good._replace(id="b", turns=good.turns[:1])], on_error="skip")
        >>> [sample.id for sample in checked.samples], checked.left_out
        (['a'], {'b': 'it has no answer'})
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"check_samples: on_error must be 'raise' or 'skip', got {on_error!r}. Choose one of them.")
    good, left_out = list[Sample](), dict[str, str]()
    for number, sample in enumerate(samples):
        fault = _fault_of(sample)
        if fault is None:
            good.append(sample)
        elif on_error == "skip":
            left_out[sample.id] = fault
        else:
            raise ValueError(
                f"check_samples: record {sample.id!r} (number {number}) must be one to learn from, got one where "
                f"{fault}. Correct it, or leave such records out with on_error='skip'."
            )
    if not good:
        raise ValueError(
            f"check_samples: samples must hold one to learn from, got {len(left_out)} that were left out, the first "
            f"because {next(iter(left_out.values()), 'there are none')}. Check the data file and the image folder."
        )
    return CheckedSamples(good, left_out)


def read_samples(
    path: str | Path,
    image_root: str | Path,
    *,
    skip_bad: bool = False,
    note: Callable[[str], object] | None = None,
) -> list[Sample]:
    """Read a LLaVA-format file and keep what can be learned from.

    Args:
        path: of the file.
        image_root: folder that its image paths start from.
        skip_bad: leave out records without image file or answer, in place of stopping at the first.
        note: gets a line for each record that is left out, such as ``print``.

    Raises:
        ValueError: a record that cannot be read or learned from, by name; or none is left.

    Example:
        >>> import tempfile
        >>> from tinyalign.data import DigitScenes, write_llava
        >>> folder = Path(tempfile.mkdtemp())
        >>> file = write_llava(DigitScenes("train", 2), folder / "train.json", folder / "images")
        >>> len(read_samples(file, folder / "images"))
        2
    """
    dataset = LlavaDataset(path, image_root, check_images=not skip_bad)
    checked = check_samples(dataset, on_error="skip" if skip_bad else "raise")
    for name, fault in checked.left_out.items():
        if note is not None:
            note(f"left out {name}: {fault}")
    return checked.samples


def _fault_of(sample: Sample) -> str | None:
    answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
    if not answers:
        return "it has no answer"
    if not all(answer.strip() for answer in answers):
        return "an answer is empty"
    for image in sample.images:
        if isinstance(image, Path) and not image.is_file():
            return f"the image {str(image)!r} does not exist"
    return None
