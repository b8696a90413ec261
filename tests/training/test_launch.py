"""Batch sizes, precision, parts by name, and records that cannot be learned from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.data import Sample, Turn, prompt_renderer
from tinyalign.memory import FingerprintMismatch
from tinyalign.training import (
    TinyExperiment,
    accumulation_steps,
    check_samples,
    compose,
    note_key,
    open_memory,
    precision,
    precision_dtype,
    read_samples,
    shared_folder,
    stage_arguments,
)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8))
def test_the_global_batch_is_kept(steps: int, per_device: int, processes: int) -> None:
    assert accumulation_steps(steps * per_device * processes, per_device, processes) == steps


@pytest.mark.parametrize("sizes", [(128, 12, 8), (8, 16, 1)])
def test_table_2_does_not_multiply_out(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"global_batch must be a multiple of per_device x processes, got \d+ for"):
        accumulation_steps(*sizes)
    with pytest.raises(ValueError, match="accumulation_steps: processes must be an integer of at least 1, got 0"):
        accumulation_steps(8, 8, 0)


def test_precision() -> None:
    assert precision("bf16") == {"bf16": True, "fp16": False}
    if not torch.cuda.is_available():
        assert precision() == precision("fp32") == {"bf16": False, "fp16": False}
    with pytest.raises(ValueError, match="precision: name must be 'bf16', 'fp16' or 'fp32', got 'int8'"):
        precision("int8")


def test_weights_are_held_in_what_the_precision_computes_in() -> None:
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert {name: precision_dtype(name) for name in wanted} == wanted
    with pytest.raises(ValueError, match="got 'int8'"):
        precision_dtype("int8")


def test_a_stage_has_what_its_trainer_needs_and_what_the_recipe_says(tmp_path: Path) -> None:
    arguments = stage_arguments(
        tmp_path,
        per_device_batch=4,
        global_batch=16,
        precision_name="bf16",
        learning_rate=2e-3,
        report_to="tensorboard",
    )
    assert arguments.output_dir == str(tmp_path)
    assert (arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size) == (4, 4)
    assert (arguments.gradient_accumulation_steps, arguments.learning_rate) == (4, 2e-3)
    assert (arguments.bf16, arguments.fp16, arguments.report_to) == (True, False, ["tensorboard"])
    assert (arguments.remove_unused_columns, arguments.prediction_loss_only) == (False, True)
    assert arguments.ddp_find_unused_parameters is False
    assert stage_arguments(tmp_path, per_device_batch=4, gradient_accumulation_steps=3).gradient_accumulation_steps == 3
    assert stage_arguments(tmp_path, per_device_batch=4).report_to == []
    with pytest.raises(ValueError, match="global_batch must be a multiple of per_device x processes, got 10 for 4 x 1"):
        stage_arguments(tmp_path, per_device_batch=4, global_batch=10)


def test_a_prompt_form_by_name() -> None:
    tokenizer = SimpleNamespace(eos_token="</s>", chat_template=None)
    turns = (Turn("user", "<image>Red?"), Turn("assistant", "no"))
    assert prompt_renderer("plain", tokenizer)(turns).text == "<image>no</s>"
    assert prompt_renderer("chat", tokenizer)(turns).text == "USER: <image>Red? ASSISTANT: no</s>"
    with pytest.raises(ValueError, match="prompt_renderer: form must be 'chat' or 'plain', got 'Chat'"):
        prompt_renderer("Chat", tokenizer)


def test_one_process_has_a_folder_of_its_own() -> None:
    one, two = shared_folder(), shared_folder()
    assert one != two
    assert not list(one.iterdir())
    one.rmdir()
    two.rmdir()


def test_parts_by_name(tiny: TinyExperiment) -> None:
    memory = open_memory(tiny.memory)
    assert (memory.vision, memory.vision_layer, memory.alpha) == (str(tiny.vision), -2, 0.4)
    assert open_memory(tiny.memory / "bank").vision is None  # a bank without its folder
    model, processor = compose(str(tiny.vision), str(tiny.llm), memory, dtype=torch.bfloat16, rag_num_tokens=3)
    assert model.language_model.dtype == model.vision.dtype == torch.bfloat16
    assert next(model.connector.parameters()).dtype == torch.float32
    assert (processor.num_image_tokens, processor.num_retrieval_tokens) == (16, 3)
    assert compose(str(tiny.vision), str(tiny.llm), retrieval="off")[0].rag_connector is None
    prompt, _ = compose(str(tiny.vision), str(tiny.llm), retrieval="prompt", num_neighbours=2)
    assert tuple(prompt.prompt_latents.shape) == (2, 32, 96)
    with pytest.raises(ValueError, match="compose: memory must be given for the arm 'bank', got None"):
        compose(str(tiny.vision), str(tiny.llm))


def test_a_bank_with_another_key_is_refused(tiny: TinyExperiment, tmp_path: Path) -> None:
    (tmp_path / "bank").symlink_to(tiny.memory / "bank")
    note_key(tmp_path, vision="x", vision_layer=-1, alpha=0.4)
    with pytest.raises(FingerprintMismatch, match=r"key\.layer"):
        compose(str(tiny.vision), str(tiny.llm), open_memory(tmp_path))


def test_nothing_below_imports_this_package() -> None:
    """Training and evaluation stand on everything else; nothing of the library stands on them."""
    import ast

    import tinyalign

    package = Path(tinyalign.__file__).parent
    for path in package.glob("**/*.py"):
        inside = path.relative_to(package).parts[0]
        named = {
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        }
        for upper in {"training", "evaluation"} - {inside}:
            if (inside, upper) != ("evaluation", "training"):
                assert not [name for name in named if name.startswith(f"tinyalign.{upper}")], path


GOOD = Sample("good", 1, 1, (), (Turn("user", "Red?"), Turn("assistant", "no")))
BAD = {
    "silent": (GOOD._replace(id="silent", turns=GOOD.turns[:1]), "it has no answer"),
    "empty": (GOOD._replace(id="empty", turns=(GOOD.turns[0], Turn("assistant", " \n"))), "an answer is empty"),
    "gone": (GOOD._replace(id="gone", images=(Path("nowhere.png"),)), "the image 'nowhere.png' does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_cannot_be_learned_from_is_named(name: str) -> None:
    sample, fault = BAD[name]
    with pytest.raises(
        ValueError, match=f"record '{name}' \\(number 1\\) must be one to learn from, got one where {fault}"
    ):
        check_samples([GOOD, sample])
    checked = check_samples([GOOD, sample, GOOD], on_error="skip")
    assert checked.samples == [GOOD, GOOD]
    assert checked.left_out == {name: fault}
    with pytest.raises(ValueError, match=f"got 1 that were left out, the first because {fault}"):
        check_samples([sample], on_error="skip")


def test_a_file_is_read_and_what_was_left_out_is_said(tiny: TinyExperiment, tmp_path: Path) -> None:
    records = json.loads(tiny.train.read_text())[:5]
    records[1]["conversations"][1]["value"] = " "
    records[3]["image"] = "nowhere.png"
    (tmp_path / "train.json").write_text(json.dumps(records))
    said: list[str] = []
    found = read_samples(tmp_path / "train.json", tiny.images, skip_bad=True, note=said.append)
    assert [sample.id for sample in found] == [records[at]["id"] for at in (0, 2, 4)]
    assert said[0] == f"left out {records[1]['id']}: an answer is empty"
    assert said[1].startswith(f"left out {records[3]['id']}: the image ")
    assert len(said) == 2
    assert read_samples(tmp_path / "train.json", tiny.images, skip_bad=True) == found  # nobody has to listen
    with pytest.raises(ValueError, match="must name images that exist"):
        read_samples(tmp_path / "train.json", tiny.images, note=said.append)


def test_what_to_do_with_them_must_be_said() -> None:
    with pytest.raises(ValueError, match="check_samples: on_error must be 'raise' or 'skip', got 'ignore'"):
        check_samples([GOOD], on_error="ignore")
