from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyalign.data import Sample, Turn, answers_of, load_image, questions_of, stable_id


@given(st.text())
def test_ids_are_the_upper_63_bits_of_xxh3(text: str) -> None:
    number = stable_id(text)
    assert 0 <= number < 2**63
    assert number == int(xxhash.xxh3_64_hexdigest(text.encode()), 16) // 2


def test_ids_are_the_same_in_another_process() -> None:
    """Python's own hash is salted per process; a bank's ids must not be."""
    code = "from tinyalign.data import stable_id; print(stable_id('000000000139.jpg'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == stable_id("000000000139.jpg")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 3)).save(path)
    assert load_image(path).mode == "RGB"
    assert load_image(Image.new(mode, (4, 3))).size == (4, 3)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_image: image must exist, got '.*gone\.png'"):
        load_image(tmp_path / "gone.png")


@pytest.mark.parametrize("content", [b"", b"not a picture", "cut"])
def test_a_corrupt_image_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "broken.png"
    if content == "cut":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:900])
    else:
        path.write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"image must be a readable picture, got '.*broken\.png'"):
        load_image(path)


TURNS = (
    Turn("user", "<image>\nWhat shape?"), Turn("assistant", "circle"), Turn("user", "Is it red?"),
    Turn("assistant", "no"), Turn("user", "Is it blue?"), Turn("assistant", " no"),
)  # fmt: skip
RECORD = Sample("a", 1, 7, (Path("a.png"),), TURNS)


def test_questions_become_samples_with_ids_of_their_own() -> None:
    asked = questions_of(RECORD)
    questions = ["What shape?", "Is it red?", "Is it blue?"]
    assert [[turn.text for turn in sample.turns] for sample in asked] == [
        [f"<image>\n{question}", answer] for question, answer in zip(questions, ("circle", "no", " no"), strict=True)
    ]
    assert [sample.sample_id for sample in asked] == [stable_id(f"a/{number}") for number in range(3)]
    assert {(sample.group, sample.images) for sample in asked} == {(7, RECORD.images)}
    blind = questions_of(RECORD._replace(images=(), turns=(Turn("user", "Who?"), Turn("assistant", "I."))))
    assert blind[0].turns[0].text == "Who?"
    with pytest.raises(ValueError, match=r"an answer for each question, got 2 for 3 in 'a'\. Correct the record"):
        questions_of(RECORD._replace(turns=TURNS[:5]))


def test_answers_become_a_caption_each_once() -> None:
    assert answers_of(RECORD) == RECORD._replace(turns=(Turn("user", "<image>"), Turn("assistant", "circle no")))
