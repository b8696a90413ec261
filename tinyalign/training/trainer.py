"""Hugging Face's `Trainer` with checkpoints that hold what was trained, and that a kill or a full disk cannot spoil."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tinyalign._files import write_json
from tinyalign.models import TinyAlignVLM
from tinyalign.models.checkpoint import note_memory
from tinyalign.training.checkpoints import (
    WRITE_FAILURES,
    CheckpointError,
    is_write_failure,
    last_whole_checkpoint,
    load_trained,
    prune,
    save_trained,
    seal,
)

MEASURED = 256


class StageTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Train a `TinyAlignVLM` for one stage.

    Everything is `Trainer`'s (devices, DDP, FSDP, DeepSpeed, precision, schedules, tracking) but for its checkpoints.
    They hold the parameters that train, not the frozen tower and language model, with the config and the bank's place
    relative to the checkpoint; a seal is written when all files are on the disk, and `resume` goes by it. Under FSDP
    and DeepSpeed the weights are written by those, sharded, and only the seal is added.

    Args:
        model: the model, already frozen for its stage.
        options: as for `Trainer`.

    Raises:
        TypeError: another model.
        CheckpointError: a checkpoint that could not be written, or that belongs to another run.
    """

    def __init__(self, model: TinyAlignVLM, **options: Any) -> None:
        if not isinstance(model, TinyAlignVLM):
            raise TypeError(
                f"StageTrainer: model must be a TinyAlignVLM, got {type(model).__name__}. Use transformers' Trainer "
                f"for a model with attach_memory."
            )
        super().__init__(model=model, **options)

    def opening(self) -> str:
        """Say where the run starts, how much trains, and how long the first samples are; to be read before the wait."""
        first = last_whole_checkpoint(self.args.output_dir)  # pyright: ignore[reportArgumentType]
        model: Any = self.model
        data: Any = self.train_dataset
        collator: Any = self.data_collator
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        said = f"{len(data)} samples, {trained:,} parameters train"
        if hasattr(collator, "measure"):
            some = [data[at] for at in range(min(MEASURED, len(data)))]
            said += f"; of the first, {collator.measure(some)}"
        return f"{'from the start' if first is None else f'going on from {first}'}\n{said}"

    def resume(self) -> Any:
        """Train from the newest whole checkpoint of the output folder, or from the start where there is none."""
        checkpoint = last_whole_checkpoint(self.args.output_dir)  # pyright: ignore[reportArgumentType]
        return self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def run(self) -> dict[str, float | None]:
        """Evaluate, train or go on training, evaluate, and write the model, its processor and ``summary.json``.

        The processor is the collator's. What was measured before the first step is kept for a run that goes on.

        Returns:
            ``train_loss`` (mean over the steps of this call), ``eval_loss_before`` and ``eval_loss``, in nats per
            token; None without an evaluation set.

        Raises:
            ValueError: LoRA under FSDP.
        """
        if self.is_fsdp_enabled and hasattr(self._unwrapped().language_model, "merge_and_unload"):
            raise ValueError(
                "StageTrainer.run: LoRA must not be sharded by FSDP, got both: it could not be merged at the end. Use "
                "DDP or ZeRO-2."
            )
        output, measured = Path(self.args.output_dir), self.eval_dataset is not None  # pyright: ignore[reportArgumentType]
        # Within train(), where the model is wrapped already: see train().
        self.args.eval_on_start = measured and last_whole_checkpoint(output) is None
        result = self.resume()
        known = [
            entry["eval_loss"] for entry in self.state.log_history if entry.get("step") == 0 and "eval_loss" in entry
        ]
        summary: dict[str, float | None] = {
            "train_loss": result.training_loss,
            "eval_loss_before": known[0] if known else None,
            "eval_loss": float(self.evaluate()["eval_loss"]) if measured else None,
        }
        self.save_whole(output)
        if self.is_world_process_zero():
            processor = getattr(self.data_collator, "processor", None)
            if processor is not None:
                processor.save_pretrained(output)
            write_json(output / "summary.json", {**summary, "retrieval": self._unwrapped().config.retrieval})
        self.save_state()
        return summary

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does.

        Raises:
            RuntimeError: in several processes, after `evaluate`: accelerate then takes the model for prepared and never
                wraps it, and every process would train a model of its own without a word.
        """
        bare = self.model_wrapped is self.model
        if self.args.world_size > 1 and bare and getattr(self.model, "_is_accelerate_prepared", False):
            raise RuntimeError(
                f"StageTrainer.train: the model must not have been evaluated before in {self.args.world_size} "
                f"processes, got one that was: gradients would not be exchanged. Use eval_on_start=True, or run()."
            )
        return super().train(*args, **kwargs)

    def save_whole(self, folder: str | Path) -> None:
        """Write the complete model, as `TinyAlignVLM.from_pretrained` reads it; LoRA is merged first.

        Files are written aside and renamed, the config last: a kill leaves an earlier model whole.

        Raises:
            CheckpointError: there is no room.
        """
        model = self._unwrapped()
        state = None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            state = self.accelerator.get_state_dict(self.model_wrapped)
        if hasattr(model.language_model, "merge_and_unload"):
            model.language_model = model.language_model.merge_and_unload()
        if not self.is_world_process_zero():
            return
        folder = Path(folder)
        aside = folder.with_name(f".{folder.name}.saving")  # a sibling, so that the bank's relative place holds
        try:
            model.save_pretrained(aside, state_dict=state)
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, folder / path.name)
        except WRITE_FAILURES as error:
            if not is_write_failure(error):
                raise
            raise CheckpointError(
                f"StageTrainer.save_whole: {folder} must have room for the model, got {error}. Free some and run the "
                f"same command again: training goes on from its last checkpoint."
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        model, folder = self._unwrapped(), Path(self.args.output_dir if output_dir is None else output_dir)  # pyright: ignore[reportArgumentType]
        save_trained(model, folder, state_dict)
        note_memory(model, folder)
        model.config.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self._unwrapped() if model is None else model, resume_from_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # old ones go when the new one is sealed
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every rank writes its own state
            if self.args.should_save:
                seal(folder)
                prune(folder.parent, keep)
        except WRITE_FAILURES as error:
            if not is_write_failure(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            before = last_whole_checkpoint(folder.parent)
            raise CheckpointError(
                f"StageTrainer: {folder} must be writable to its end, got {type(error).__name__}: {error}. Free some "
                f"room and run the same command again: it goes on from {'the start' if before is None else before}."
            ) from error
        finally:
            self.args.save_total_limit = keep
