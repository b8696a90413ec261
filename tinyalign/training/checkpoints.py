"""Training checkpoints: what was trained and nothing else, and whether one was written to its end."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyalign._files import fsync_directory, fsync_file, write_json

WEIGHTS = "model.safetensors"
SEAL = "whole.json"
WRITE_FAILURES = (OSError, SafetensorError, RuntimeError)
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not belong to the run that asks for it."""


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that train, as an unwrapped model knows them."""
    return sorted(_plain(name) for name, parameter in model.named_parameters() if parameter.requires_grad)


def save_trained(model: nn.Module, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write the parameters that train to ``model.safetensors``.

    Args:
        model: whose parameters; frozen ones are left out.
        folder: where to.
        state: the values, where the model's own are sharded over processes.

    Shape:
        of each value: its parameter's.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
        >>> sorted(load_file(save_trained(model, tempfile.mkdtemp())))
        ['1.bias', '1.weight']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {_plain(name): value for name, value in (state or dict(model.named_parameters())).items()}
    tensors = {name: values[name].detach().cpu().contiguous() for name in trained_names(model)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder / WEIGHTS


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Read into ``model`` what `save_trained` wrote; it must be exactly what the model trains.

    Args:
        model: filled in place.
        folder: what `save_trained` was given.

    Raises:
        CheckpointError: other parameters, or other shapes; the first few are named.

    Example:
        >>> import tempfile
        >>> one, other, folder = nn.Linear(2, 1), nn.Linear(2, 1), tempfile.mkdtemp()
        >>> _ = save_trained(one, folder)
        >>> load_trained(other, folder)
        >>> bool((one.weight == other.weight).all())
        True
    """
    found = load_file(Path(folder) / WEIGHTS)
    own = {_plain(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    problems = [f"misses {name}" for name in sorted(own.keys() - found.keys())]
    problems += [f"also holds {name}" for name in sorted(found.keys() - own.keys())]
    problems += [
        f"holds {name} as {tuple(found[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & found.keys())
        if own[name].shape != found[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"load_trained: {folder} must hold what this run trains, got one that {'; '.join(problems[:3])}"
            f"{' ...' if len(problems) > 3 else ''}. Go on with the stage, arm and LoRA settings it was written with, "
            f"or give another output folder."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def seal(folder: str | Path) -> None:
    """Note the size of every file of a finished checkpoint, after all of them are on the disk."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        fsync_file(path)
    fsync_directory(folder)
    write_json(folder / SEAL, {"files": {str(path.relative_to(folder)): path.stat().st_size for path in files}})


def faults_of(folder: str | Path) -> list[str]:
    """Say what is wrong with a checkpoint; nothing when it was written to its end and is as it was then."""
    folder = Path(folder)
    if not (folder / SEAL).is_file():
        return ["it was not written to its end"]
    files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
    found = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in files}
    return [f"{name} has {found[name]} bytes, not {size}" for name, size in files.items() if found[name] != size]


def is_write_failure(error: BaseException) -> bool:
    """Whether an error is about the disk; torch.save reports a full one as a RuntimeError of its stream writer."""
    if isinstance(error, CheckpointError):
        return False
    return (
        isinstance(error, (OSError, SafetensorError))
        or "PytorchStreamWriter" in str(error)
        or "unexpected pos" in str(error)
    )


def prune(output: str | Path, keep: int | None) -> None:
    """Delete the oldest checkpoints but ``keep``; all stay when None."""
    for path in [] if keep is None else _numbered(output)[max(keep, 1) :]:
        shutil.rmtree(path, ignore_errors=True)


def last_whole_checkpoint(output: str | Path) -> Path | None:
    """Return the newest checkpoint in ``output`` that was written to its end; broken ones are logged and passed over.

    Args:
        output: folder of the run, which holds ``checkpoint-*``.

    Example:
        >>> import tempfile
        >>> output = Path(tempfile.mkdtemp())
        >>> for step in (5, 10):
        ...     (output / f"checkpoint-{step}").mkdir()
        >>> seal(output / "checkpoint-5")
        >>> last_whole_checkpoint(output).name
        'checkpoint-5'
    """
    for path in _numbered(output):
        faults = faults_of(path)
        if not faults:
            return path
        logger.warning("%s is passed over: %s", path, "; ".join(faults[:3]))
    return None


def _numbered(output: str | Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in Path(output).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
