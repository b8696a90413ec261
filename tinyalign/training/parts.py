"""From the names of parts, as a command line gives them, to a model with its processor and its bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign._files import write_json
from tinyalign.memory import AttentionPooledKey, MemoryBank
from tinyalign.models import TinyAlignProcessor, TinyAlignVLM

SETTINGS = "memory.json"
PAPER_LATENTS = (32, 96)


class MemoryFolder(NamedTuple):
    """A bank and how its keys are made, so that a model built for it asks in the same way.

    Args:
        bank: the bank, memory-mapped.
        vision: the tower that its keys come from, as it was named then; None where that was not noted.
        vision_layer: the tower's layer.
        alpha: the image's weight in a key.
    """

    bank: MemoryBank
    vision: str | None = None
    vision_layer: int = -2
    alpha: float = 0.4


def note_key(folder: str | Path, *, vision: str, vision_layer: int, alpha: float) -> None:
    """Write beside a bank how its keys are made; `open_memory` reads it.

    Args:
        folder: which holds the bank.
        vision: the tower, a folder or a hub id.
        vision_layer: hidden state that keys are read from.
        alpha: of `AttentionPooledKey`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> note_key(folder, vision="siglip", vision_layer=-2, alpha=0.4)
        >>> [path.name for path in folder.iterdir()]
        ['memory.json']
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / SETTINGS, {"vision": vision, "vision_layer": vision_layer, "alpha": alpha})


def open_memory(folder: str | Path) -> MemoryFolder:
    """Open what ``examples/build_memory.py`` wrote: a folder with ``bank`` and ``memory.json``, or a bank itself.

    Args:
        folder: of that kind.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> bank = MemoryBank(key_dim=2, value_shape=(1, 1))
        >>> _ = bank.add(torch.eye(2), torch.zeros(2, 1, 1))
        >>> _ = bank.save(folder / "bank")
        >>> note_key(folder, vision="siglip", vision_layer=-2, alpha=0.4)
        >>> len(open_memory(folder).bank), open_memory(folder).vision
        (2, 'siglip')
    """
    folder = Path(folder)
    inner = folder / "bank" if (folder / "bank").is_dir() else folder
    noted = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if (folder / SETTINGS).is_file() else {}
    return MemoryFolder(MemoryBank.load(inner, mmap=True), **noted)


def compose(
    vision: str,
    llm: str,
    memory: MemoryFolder | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    retrieval: str = "bank",
    **options: Any,
) -> tuple[TinyAlignVLM, TinyAlignProcessor]:
    """Build a new model and its processor from saved or hub parts.

    Args:
        vision: the tower, a folder or a hub id.
        llm: the causal language model, a folder or a hub id.
        memory: the bank with its settings; not needed for the arms ``off`` and ``prompt``.
        dtype: of tower and language model; connectors are float32 in any case.
        retrieval: the arm.
        options: further fields of `TinyAlignConfig`, such as ``num_neighbours`` or ``rag_num_tokens``.

    Raises:
        FingerprintMismatch: the bank's keys were made by another tower, layer or pooling.
        ValueError: a retrieval arm that needs a bank, without one.
    """
    if memory is None and retrieval not in ("off", "prompt"):
        raise ValueError(
            f"compose: memory must be given for the arm {retrieval!r}, got None. Build one with "
            f"examples/build_memory.py, or take the arm 'off' or 'prompt'."
        )
    settings = MemoryFolder(None) if memory is None else memory  # type: ignore[arg-type]
    if memory is None and retrieval == "prompt":
        options = {"num_latents": PAPER_LATENTS[0], "latent_dim": PAPER_LATENTS[1], **options}
    tokenizer = AutoTokenizer.from_pretrained(llm)
    model = TinyAlignVLM.from_parts(
        AutoModel.from_pretrained(vision, dtype=dtype),
        AutoModelForCausalLM.from_pretrained(llm, dtype=dtype),
        tokenizer=tokenizer,
        memory=settings.bank,
        key=AttentionPooledKey(settings.alpha),
        vision_layer=settings.vision_layer,
        retrieval=retrieval,
        **options,
    )
    return model, TinyAlignProcessor.for_model(model, AutoImageProcessor.from_pretrained(vision), tokenizer)
