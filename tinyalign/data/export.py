"""Writing samples as a LLaVA-format file, so that any script which reads such files can read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tinyalign.data.records import Sample, load_image, stable_id

_NAME_OF = {"user": "human", "assistant": "gpt", "system": "system"}


def write_llava(samples: Sequence[Sample], json_path: str | Path, image_dir: str | Path) -> Path:
    """Write samples to a LLaVA JSON list and their images to PNG files; `LlavaDataset` reads them back.

    Images that samples of one group share are written once.

    Args:
        samples: what to write.
        json_path: the file; its folder is made.
        image_dir: where the images go.

    Returns:
        the path of the file.

    Example:
        >>> import tempfile
        >>> from tinyalign.data import DigitScenes, LlavaDataset
        >>> folder = Path(tempfile.mkdtemp())
        >>> path = write_llava(DigitScenes("train", 2), folder / "data.json", folder / "images")
        >>> LlavaDataset(path, folder / "images")[1].turns == DigitScenes("train", 2)[1].turns
        True
    """
    json_path, image_dir = Path(json_path), Path(image_dir)
    json_path.parent.mkdir(parents=True, exist_ok=True)
    image_dir.mkdir(parents=True, exist_ok=True)
    records = []
    for sample in samples:
        names = [_image_name(sample, at, image) for at, image in enumerate(sample.images)]
        for name, image in zip(names, sample.images, strict=True):
            if not (image_dir / name).exists():
                load_image(image).save(image_dir / name)
        said = [{"from": _NAME_OF[turn.role], "value": turn.text} for turn in sample.turns]
        record = {"id": sample.id, "conversations": said}
        records.append({**record, "image": names[0] if len(names) == 1 else names} if names else record)
    json_path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return json_path


def _image_name(sample: Sample, at: int, image: Path | Image.Image) -> str:
    """One name per picture: by its path, or by group and place for a picture in memory."""
    number = sample.group if isinstance(image, Image.Image) else stable_id(str(image))
    return f"{number:016x}-{at}.png" if isinstance(image, Image.Image) else f"{number:016x}.png"
