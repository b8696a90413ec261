"""One tiny experiment for all tests of the training package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyalign.data import LlavaDataset
from tinyalign.training import (
    StageTrainer,
    TinyExperiment,
    collator_for,
    compose,
    open_memory,
    stage_arguments,
    write_tiny_experiment,
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyExperiment:
    return write_tiny_experiment(tmp_path_factory.mktemp("tiny"), 24)


@pytest.fixture
def trainer(tiny: TinyExperiment) -> Callable[..., StageTrainer]:
    """Build a trainer that writes to a folder; options go to `TrainingArguments`."""

    def make(folder: Path, *, stage: str = "pretrain", arm: str = "bank", **options: Any) -> StageTrainer:
        memory = open_memory(tiny.memory)
        model, processor = compose(
            str(tiny.vision), str(tiny.llm), memory, retrieval=arm, num_neighbours=2, connector_seed=3
        )
        model.freeze_for(stage)
        train, heldout = LlavaDataset(tiny.train, tiny.images), LlavaDataset(tiny.heldout, tiny.images)
        settings = {
            "max_steps": 6, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "per_device_eval_batch_size": 8,
            "save_total_limit": 2, "use_cpu": True, "disable_tqdm": True, "seed": 0, **options,
        }  # fmt: skip
        arguments = stage_arguments(folder, per_device_batch=4, precision_name="fp32", **settings)
        collator = collator_for(model, processor, [*train, *heldout], folder, max_length=128)
        return StageTrainer(model, args=arguments, train_dataset=train, eval_dataset=heldout, data_collator=collator)

    return make
