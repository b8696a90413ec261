"""Saving a part of this package to its own folder: ``config.json`` with a format number, and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from tinyalign._files import hash_tensors, replace_directory, write_json

FORMAT = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """32 hex digits over the configuration and every weight."""
    described = json.dumps(config, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(f"{described}|{hash_tensors(module.state_dict())}".encode())


def save(module: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    """Write both files in one step; other files of the directory stay."""
    from safetensors.torch import save_file

    with replace_directory(path) as fresh:
        write_json(fresh / CONFIG_NAME, {"format": FORMAT, "class": type(module).__name__, **config})
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, fresh / WEIGHTS_NAME)


def load_config(class_name: str, path: Path, names: Set[str]) -> dict[str, Any]:
    """The constructor's arguments, once class, format and names are as expected; the dtype is turned into torch's."""
    where = f"{class_name}.from_pretrained"
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{where}: path must hold {CONFIG_NAME} and {WEIGHTS_NAME}, got no {name} in {path}. Pass the folder "
                "that save_pretrained wrote."
            )
    try:
        config: dict[str, Any] = dict(json.loads((path / CONFIG_NAME).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: {path / CONFIG_NAME} must be a JSON object, got {error}. The file is damaged: copy it again."
        ) from error
    found = (config.pop("class", None), config.pop("format", None))
    if found != (class_name, FORMAT):
        raise ValueError(
            f"{where}: {path / CONFIG_NAME} must describe class {class_name} in format {FORMAT}, got class "
            f"{found[0]!r} in format {found[1]!r}. Load it with the class and version that wrote it."
        )
    if config.keys() != names:
        raise ValueError(
            f"{where}: {path / CONFIG_NAME} must hold {sorted(names)}, got missing {sorted(names - config.keys())} and "
            f"unexpected {sorted(config.keys() - names)}. Load it with the version that wrote it."
        )
    if config["dtype"] not in DTYPES:
        raise ValueError(
            f"{where}: dtype must be one of {sorted(DTYPES)}, got {config['dtype']!r}. Correct {path / CONFIG_NAME}."
        )
    config["dtype"] = DTYPES[config["dtype"]]
    return config


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill the module strictly: every name, and every shape and dtype."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"{type(module).__name__}.from_pretrained"
    try:
        stored, own = load_file(path / WEIGHTS_NAME), module.state_dict()
    except SafetensorError as error:
        raise ValueError(
            f"{where}: {path / WEIGHTS_NAME} must be a whole safetensors file, got {error}. The file is damaged: copy "
            "it again."
        ) from error
    missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{where}: {path / WEIGHTS_NAME} must hold the weights that {CONFIG_NAME} describes, got missing {missing} "
            f"and unexpected {unexpected}. The two files do not belong together; save again."
        )
    wrong = [name for name in own if stored[name].shape != own[name].shape or stored[name].dtype != own[name].dtype]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{where}: weight {name} must be {own[name].dtype} of shape {tuple(own[name].shape)}, got "
            f"{stored[name].dtype} of shape {tuple(stored[name].shape)} in {path / WEIGHTS_NAME}. The two files do not "
            "belong together; save again."
        )
    module.load_state_dict(stored, strict=True)
