"""Batch sizes, precision, parts by name, and records that cannot be learned from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.data import Sample, Turn
from tinyalign.memory import FingerprintMismatch
from tinyalign.training import (
    TinyExperiment,
    accumulation_steps,
    check_samples,
    compose,
    note_key,
    open_memory,
    precision,
    shared_folder,
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


def test_what_to_do_with_them_must_be_said() -> None:
    with pytest.raises(ValueError, match="check_samples: on_error must be 'raise' or 'skip', got 'ignore'"):
        check_samples([GOOD], on_error="ignore")
