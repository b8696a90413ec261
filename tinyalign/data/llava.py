"""Reading image-text files in LLaVA's JSON format."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from tinyalign.data.records import IMAGE_PLACEHOLDER, Sample, Turn, stable_id

_ROLE_OF = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


class LlavaDataset(Sequence[Sample]):
    """The records of a LLaVA-format file: conversations about images, with ids and groups for a memory bank.

    A record is ``{"id", "image", "conversations": [{"from": "human"|"gpt", "value": text}, ...]}``. ``image`` may be
    absent (text only), a path, or a list of paths; the text holds one ``<image>`` per path, anywhere. Every record is
    checked when the file is opened, so that a fault in the last one does not wait for the end of the first epoch.

    `group` is the id of the first image's path as written in the file, so that all records about one image share it;
    a text-only record is its own group. An id that occurs again (as in LLaVA's own instruction set) gets ``#2``,
    ``#3``, ... appended, because a bank needs ids that name one record.

    Args:
        json_path: a JSON list, or JSON lines when the name ends in ``.jsonl``.
        image_dir: the folder that the paths start from; the file's own folder when None.
        check_images: whether to look for every image file now.

    Raises:
        ValueError: the file is not such a list, or a record lacks something; the message names the record.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> turns = [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "A rose."}]
        >>> _ = (folder / "data.json").write_text(json.dumps([{"id": "q1", "conversations": turns}]))
        >>> LlavaDataset(folder / "data.json")[0].turns[1]
        Turn(role='assistant', text='A rose.')
    """

    def __init__(
        self, json_path: str | Path, image_dir: str | Path | None = None, *, check_images: bool = True
    ) -> None:
        self.json_path = Path(json_path)
        self.image_dir = self.json_path.parent if image_dir is None else Path(image_dir)
        records = _read(self.json_path)
        self._samples: list[Sample] = []
        seen: Counter[str] = Counter()
        for index, record in enumerate(records):
            sample = self._parse(record, index, check_images)
            seen[sample.id] += 1
            if seen[sample.id] > 1:
                unique = f"{sample.id}#{seen[sample.id]}"
                sample = sample._replace(id=unique, sample_id=stable_id(unique))
            self._samples.append(sample)

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        return self._samples[index]

    def _parse(self, record: Any, index: int, check_images: bool) -> Sample:
        if not isinstance(record, dict):
            raise _fault(f"record {index}", "be an object with id and conversations", type(record).__name__)
        name = str(record.get("id", f"record-{index}"))
        where = f"record {name!r} (number {index})"
        turns = tuple(_turn(entry, where) for entry in _listed(record, where))
        paths = _image_paths(record, where)
        placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        if placeholders != len(paths):
            raise _fault(
                where,
                f"hold one {IMAGE_PLACEHOLDER} per image",
                f"{placeholders} placeholders for {len(paths)} images",
            )
        if check_images:
            for path in paths:
                if not os.path.exists(self.image_dir / path):
                    raise _fault(where, "name images that exist", repr(str(self.image_dir / path)))
        group = stable_id(paths[0]) if paths else stable_id(name)
        return Sample(name, stable_id(name), group, tuple(self.image_dir / path for path in paths), turns)


def _read(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except json.JSONDecodeError as error:
        raise _fault(str(path), "hold JSON", f"{error}") from error
    if not isinstance(content, list) or not content:
        raise _fault(
            str(path), "hold a list of at least one record", f"{type(content).__name__} of length {len(content)}"
        )
    return content


def _listed(record: dict[str, Any], where: str) -> list[Any]:
    conversations = record.get("conversations", record.get("messages"))
    if not isinstance(conversations, list) or not conversations:
        raise _fault(where, "have a non-empty list `conversations`", repr(conversations))
    return conversations


def _turn(entry: Any, where: str) -> Turn:
    role = entry.get("from", entry.get("role")) if isinstance(entry, dict) else None
    text = entry.get("value", entry.get("content")) if isinstance(entry, dict) else None
    if role not in _ROLE_OF or not isinstance(text, str):
        raise _fault(where, f"have turns with `from` in {sorted(_ROLE_OF)} and text in `value`", repr(entry))
    return Turn(_ROLE_OF[role], text)


def _image_paths(record: dict[str, Any], where: str) -> list[str]:
    images = record.get("image", record.get("images"))
    if images is None:
        return []
    paths = [images] if isinstance(images, str) else images
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise _fault(where, "give `image` as a path or a list of paths", repr(images))
    return paths


def _fault(where: str, rule: str, got: str) -> ValueError:
    return ValueError(f"LlavaDataset: {where} must {rule}, got {got}. Correct the file or drop the record.")
