"""What a checkpoint says beyond the weights: where the bank is, and that nothing is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyalign.memory import MemoryBank

if TYPE_CHECKING:
    from tinyalign.models.vlm import TinyAlignVLM


def note_memory(model: TinyAlignVLM, folder: Any) -> None:
    """Write the bank's place, relative to the checkpoint, into the config; both may then move together."""
    memory = model.memory
    if memory is not None:
        path = memory.path
        model.config.memory_path = (
            None if path is None else os.path.relpath(Path(path).resolve(), Path(folder).resolve())
        )


def find_memory(model: TinyAlignVLM, folder: Any) -> MemoryBank | None:
    """Load the bank that the checkpoint points to, memory-mapped; None where there is none."""
    noted = model.config.memory_path
    if noted is None or not os.path.isdir(folder):
        return None
    path = Path(folder) / noted
    return MemoryBank.load(path, mmap=True) if path.is_dir() else None


def check_complete(info: Any, folder: Any) -> None:
    """Raise unless every weight was found and every one found was used."""
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind, ()))
        if names:
            problems.append(f"{kind.replace('_', ' ')} {names[:5]}{' ...' if len(names) > 5 else ''}")
    if problems:
        raise ValueError(
            f"TinyAlignVLM.from_pretrained: {str(folder)!r} must hold exactly this model's weights, got "
            f"{'; '.join(problems)}. Save the model again with save_pretrained."
        )
