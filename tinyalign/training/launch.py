"""What a script needs so that the same command runs in one process or in many, on a CPU or on GPUs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tinyalign._checks import check_positive


def accumulation_steps(global_batch: int, per_device: int, processes: int = 1) -> int:
    """Return the accumulation that keeps the global batch whatever the number of processes.

    The loss curve then does not depend on the machine, and a table's batch size means what it says.

    Args:
        global_batch: samples per optimizer step, over all processes.
        per_device: samples per process and forward pass.
        processes: how many processes train.

    Raises:
        ValueError: the numbers do not divide.

    Example:
        >>> accumulation_steps(256, 16, 8), accumulation_steps(256, 16, 1)
        (2, 16)
    """
    for name, value in (("global_batch", global_batch), ("per_device", per_device), ("processes", processes)):
        check_positive("accumulation_steps", name, value)
    steps, left = divmod(global_batch, per_device * processes)
    if left or not steps:
        raise ValueError(
            f"accumulation_steps: global_batch must be a multiple of per_device x processes, got {global_batch} for "
            f"{per_device} x {processes}. Choose a per-device batch that divides {global_batch} / {processes}."
        )
    return steps


def shared_folder(prefix: str = "tinyalign-") -> Path:
    """Make a temporary folder, the same one in all processes of a launcher.

    A folder that each process made for itself is where they would wait for one another's files for ever.

    Args:
        prefix: how its name begins.

    Example:
        >>> shared_folder().is_dir()
        True
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=not torch.accelerator.is_available())
    made = [tempfile.mkdtemp(prefix=prefix) if state.is_main_process else ""]
    if state.num_processes > 1:
        broadcast_object_list(made)
    return Path(made[0])


def precision(name: str | None = None) -> dict[str, bool]:
    """Return the `TrainingArguments` of a precision: ``bf16``, ``fp16`` or ``fp32``.

    None takes bfloat16 on a device that computes in it and float32 elsewhere. The paper's float16 is offered; it needs
    loss scaling, and in a language model of bfloat16 training it overflows where bfloat16 does not.

    Args:
        name: of the precision, or None.

    Raises:
        ValueError: another name.

    Example:
        >>> precision("fp16")
        {'bf16': False, 'fp16': True}
    """
    if name is None:
        name = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    if name not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"precision: name must be 'bf16', 'fp16' or 'fp32', got {name!r}. Choose one of them.")
    return {"bf16": name == "bf16", "fp16": name == "fp16"}


def precision_dtype(name: str | None = None) -> torch.dtype:
    """Return the dtype that frozen weights are held in under a `precision`.

    What trains is kept in float32 all the same, and computes in this dtype under autocast.

    Args:
        name: as for `precision`.

    Raises:
        ValueError: another name.

    Example:
        >>> precision_dtype("bf16")
        torch.bfloat16
    """
    chosen = precision(name)
    return torch.bfloat16 if chosen["bf16"] else torch.float16 if chosen["fp16"] else torch.float32


def stage_arguments(
    output: str | Path,
    *,
    per_device_batch: int,
    global_batch: int | None = None,
    precision_name: str | None = None,
    **options: Any,
) -> TrainingArguments:
    """Make the `TrainingArguments` of a stage, with what a `StageTrainer` needs whatever the recipe.

    No column is dropped (neighbours and ids are columns), evaluation keeps losses alone, every parameter that trains
    takes part in each step, and nothing is reported anywhere unless `report_to` says so.

    Args:
        output: folder of the run.
        per_device_batch: samples per process and forward pass, in evaluation too.
        global_batch: samples per optimizer step over all processes, see `accumulation_steps`; None leaves the
            accumulation to the options.
        precision_name: see `precision`.
        **options: of `TrainingArguments`, before all of these.

    Raises:
        ValueError: batches that do not divide, or another precision.

    Example:
        >>> arguments = stage_arguments("run", per_device_batch=4, global_batch=16, learning_rate=1e-3, use_cpu=True)
        >>> arguments.gradient_accumulation_steps, arguments.remove_unused_columns
        (4, False)
    """
    needed: dict[str, Any] = {
        "per_device_train_batch_size": per_device_batch,
        "per_device_eval_batch_size": per_device_batch,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        **precision(precision_name),
    }
    arguments = TrainingArguments(output_dir=str(output), **{**needed, **options})
    if global_batch is not None:
        processes = arguments.world_size
        arguments.gradient_accumulation_steps = accumulation_steps(global_batch, per_device_batch, processes)
    return arguments
