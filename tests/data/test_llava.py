from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyalign.data import LlavaDataset, Turn, stable_id


def write(folder: Path, records: Any, name: str = "data.json") -> Path:
    for image in ("a.png", "sub/b.png"):
        (folder / image).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / image)
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def record(
    name: Any = "r1", image: Any = "a.png", ask: str = "<image>\nWhat?", answer: str = "This."
) -> dict[str, Any]:
    turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns} if image else {"id": name, "conversations": turns}


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, [record(), record(7, "sub/b.png", "What?\n<image>")])
    first, second = LlavaDataset(path)
    assert (first.id, first.sample_id, first.group) == ("r1", stable_id("r1"), stable_id("a.png"))
    assert first.images == (tmp_path / "a.png",)
    assert first.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "This."))
    assert second.id == "7"
    assert second.turns[0].text.endswith("<image>")


def test_records_of_one_image_share_a_group_and_nothing_else_does(tmp_path: Path) -> None:
    records = [
        record("x"),
        record("y"),
        record("z", "sub/b.png"),
        record("t", None, "What?"),
        record("u", None, "Why?"),
    ]
    groups = [sample.group for sample in LlavaDataset(write(tmp_path, records))]
    assert groups[0] == groups[1]
    assert len(set(groups[1:])) == 4


def test_repeated_ids_are_told_apart_in_file_order(tmp_path: Path) -> None:
    """LLaVA's own instruction set names several records of one photo alike; a bank needs one id per record."""
    samples = LlavaDataset(write(tmp_path, [record("x"), record("x"), record("x")]))
    assert [sample.id for sample in samples] == ["x", "x#2", "x#3"]
    assert len({sample.sample_id for sample in samples}) == 3
    assert len({sample.group for sample in samples}) == 1


def test_several_images_and_many_turns(tmp_path: Path) -> None:
    turns = [("human", "<image> and <image>?"), ("gpt", "One."), ("human", "Sure?"), ("gpt", "Yes.")]
    many = {"id": "m", "image": ["a.png", "sub/b.png"], "conversations": [{"from": f, "value": v} for f, v in turns]}
    (sample,) = LlavaDataset(write(tmp_path, [many]))
    assert sample.images == (tmp_path / "a.png", tmp_path / "sub/b.png")
    assert [turn.role for turn in sample.turns] == ["user", "assistant"] * 2


def test_json_lines_role_names_and_an_image_folder(tmp_path: Path) -> None:
    write(tmp_path, [])
    line = {
        "image": "b.png",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>"}],
    }
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(line) + "\n\n" + json.dumps(line) + "\n")
    samples = LlavaDataset(path, tmp_path / "sub")
    assert [sample.id for sample in samples] == ["record-0", "record-1"]
    assert samples[0].turns[0] == Turn("system", "Be brief.")
    assert len(samples[0:2]) == 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            [record(), record("r9", "gone.png")],
            r"record 'r9' \(number 1\) must name images that exist, got '.*gone\.png'",
        ),
        ([record("r9", "a.png", "What?")], r"'r9'.*hold one <image> per image, got 0 placeholders for 1 images"),
        ([record("r9", None)], r"'r9'.*hold one <image> per image, got 1 placeholders for 0 images"),
        ([record("r9", ["a.png"], "<image><image>")], r"got 2 placeholders for 1 images"),
        ([record("r9", 3)], r"'r9'.*give `image` as a path or a list of paths, got 3"),
        ([{"id": "r9"}], r"'r9'.*have a non-empty list `conversations`, got None"),
        ([{"id": "r9", "conversations": [{"from": "dog", "value": "x"}]}], r"'r9'.*have turns with `from` in .*'dog'"),
        ([{"id": "r9", "conversations": [{"from": "gpt", "value": None}]}], r"'r9'.*text in `value`"),
        (["text"], r"record 0 must be an object with id and conversations, got str"),
        ([], r"must hold a list of at least one record, got list of length 0"),
        ({"a": 1}, r"must hold a list of at least one record, got dict of length 1"),
    ],
)
def test_a_fault_names_its_record(tmp_path: Path, broken: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaDataset(write(tmp_path, broken))


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"id": ')
    with pytest.raises(ValueError, match=r"data\.json must hold JSON, got Expecting value"):
        LlavaDataset(tmp_path / "data.json")


def test_images_need_not_be_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path, [record("r9", "gone.png")])
    assert LlavaDataset(path, check_images=False)[0].images[0].name == "gone.png"  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=5)), min_size=1, max_size=6))
def test_placeholders_are_counted_wherever_they_stand(
    tmp_path_factory: pytest.TempPathFactory, turns: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("d")
    texts = [text.replace("<image>", "") + "<image>" * count for count, text in turns]
    images = ["a.png"] * sum(count for count, _ in turns)
    conversation = [{"from": "human", "value": text} for text in texts]
    path = write(folder, [{"id": "r", "image": images, "conversations": conversation}])
    assert len(LlavaDataset(path)[0].images) == len(images)


@pytest.mark.parametrize(
    ("name", "size"),
    [("easy_vqa/train.json", 1500), ("coco_mini/pretrain.json", 101), ("nlvr/train_captions.json", 547)],
)
def test_real_files_are_read_whole(shared: Path, name: str, size: int) -> None:
    data = shared / "data"
    samples = LlavaDataset(data / name, data / name.split("/")[0] / "images")
    assert len(samples) == size == len({sample.sample_id for sample in samples})
