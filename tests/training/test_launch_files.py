"""The configuration files of examples/accelerate, as accelerate itself reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from tinyalign.training import compose, open_memory

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED}


def launched(name: str) -> Any:
    """What ``accelerate launch`` makes of the file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "train.py"])
    return _validate_launch_command(arguments)[0]


def test_every_file_is_looked_at() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file_and_launches_its_kind(name: str) -> None:
    """An unknown key is an error in accelerate's own loader."""
    assert load_config_from_file(str(FOLDER / f"{name}.yaml")).distributed_type == KINDS[name]
    arguments = launched(name)
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == (
        name == "ddp", name == "fsdp", name == "deepspeed",
    )  # fmt: skip
    assert arguments.num_processes == 8


def test_fsdp_wraps_the_language_models_layers_alone(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """FSDP2 refuses a list of layers, which has no forward and which wrapping by size would choose.

    The tower's layers are no units: a rank whose batch has no picture does not run them, and the others would wait.
    """
    for name, value in prepare_multi_gpu_env(launched("fsdp")).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    model, _ = compose(str(tiny.vision), str(tiny.llm), open_memory(tiny.memory))
    plugin.set_auto_wrap_policy(model)
    policy = plugin.auto_wrap_policy
    chosen = {type(part).__name__ for part in model.modules() if policy(part, recurse=False, nonwrapped_numel=10**9)}
    assert chosen == {"LlamaDecoderLayer"}


def test_deepspeed_takes_accumulation_and_clipping_from_the_script() -> None:
    config = load_config_from_file(str(FOLDER / "deepspeed.yaml")).deepspeed_config
    found = DeepSpeedPlugin(**config).deepspeed_config
    assert found["zero_optimization"]["stage"] == 2
    assert found["gradient_accumulation_steps"] == found["gradient_clipping"] == "auto"
