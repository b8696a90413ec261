"""The adapter folder: what was trained around a model that is stored elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from tinyalign._files import replace_directory
from tinyalign.connectors import RAGConnector
from tinyalign.memory import FingerprintMismatch, MemoryBank
from tinyalign.models.attach import attach_memory, check_query
from tinyalign.models.attached import AttachedVLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
FORMAT_NUMBER = 1


def save_attached(aligned: AttachedVLM, path: Any) -> None:
    """Write ``adapter_config.json`` and ``adapter.safetensors``: the connector, and all else that trains."""
    path, connector = Path(path), aligned.connector
    memory = aligned.memory
    bank = (
        None if memory is None or memory.path is None else os.path.relpath(Path(memory.path).resolve(), path.resolve())
    )
    config = {
        "format_number": FORMAT_NUMBER,
        "model_class": type(aligned.model).__name__,
        "rag_token_id": aligned.rag_token_id,
        "num_neighbours": aligned.num_neighbours,
        "num_latents": aligned.num_latents,
        "retrieval": aligned.retrieval,
        "retrieval_seed": aligned.retrieval_seed,
        "memory_path": bank,
        "query": aligned.query_fingerprint(),
        "connector": {
            "latent_dim": connector.latent_dim,
            "output_dim": connector.output_dim,
            "depth": connector.mlp.depth,
            "num_tokens": connector.num_tokens,
            "gate": connector.gate is not None,
            "num_ranks": connector.num_ranks,
        },
    }
    trained = {name for name, parameter in aligned.named_parameters() if parameter.requires_grad}
    weights = {
        name: value.detach().contiguous().cpu()
        for name, value in aligned.state_dict().items()
        if name in trained or name.startswith("connector.")
    }
    with replace_directory(path) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        save_file(weights, folder / WEIGHTS)


def load_attached(
    vlm: nn.Module, path: Any, processor: Any = None, *, memory: MemoryBank | None = None, query: Any = None
) -> AttachedVLM:
    """Attach what `AttachedVLM.save_pretrained` wrote to the model that it was trained on.

    Args:
        vlm: the model, as it was when the branch was attached (under PEFT, if it was).
        path: the adapter's folder.
        processor: as for `attach_memory`.
        memory: the bank; looked for where the adapter says when None.
        query: as for `attach_memory`.

    Raises:
        ValueError: another format, another class of model, or weights that are missing or unexpected, by name.
        FingerprintMismatch: queries that are not made as the bank's keys were, or not as when the adapter was saved.
    """
    path = Path(path)
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    where = "load_attached"
    for name, expected in (("format_number", FORMAT_NUMBER), ("model_class", type(vlm).__name__)):
        if config[name] != expected:
            raise ValueError(
                f"{where}: {name} must be {expected!r}, got {config[name]!r} in {str(path)!r}. Attach it to the model "
                f"it was trained on, with the version that wrote it."
            )
    if memory is None and config["memory_path"] is not None and (path / config["memory_path"]).is_dir():
        memory = MemoryBank.load(path / config["memory_path"], mmap=True)
    connector = RAGConnector(**config["connector"])
    aligned = attach_memory(
        vlm, processor, memory=memory, connector=connector, k=config["num_neighbours"], query=query,
        retrieval=config["retrieval"],
    )  # fmt: skip
    aligned.rag_token_id = aligned.plug.rag_token_id = config["rag_token_id"]
    aligned.num_latents, aligned.retrieval_seed = config["num_latents"], config["retrieval_seed"]
    weights = load_file(path / WEIGHTS)
    known = aligned.state_dict()
    strange = sorted(name for name in weights if name not in known)
    missing = sorted(name for name in known if name.startswith("connector.") and name not in weights)
    if strange or missing:
        aligned.detach()
        raise ValueError(
            f"{where}: {str(path)!r} must hold weights of this model, got missing {missing[:5]} and unexpected "
            f"{strange[:5]}. Wrap the model (PEFT) as it was when the adapter was saved."
        )
    aligned.load_state_dict(weights, strict=False)
    try:  # now that the tower is what it was when the adapter was saved
        check_query(aligned)
        made_by, saved = aligned.query_fingerprint() or {}, config.get("query") or {}
        other = sorted(name for name in {*made_by, *saved} if made_by.get(name) != saved.get(name))
        if made_by and saved and other:
            raise FingerprintMismatch(
                f"{where}: query must be made as it was when {str(path)!r} was saved, got a difference in {other}. "
                f"Load onto the model that was attached, with the same query=."
            )
    except FingerprintMismatch:
        aligned.detach()
        raise
    return aligned
