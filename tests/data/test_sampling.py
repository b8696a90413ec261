"""Drawing records: uniform, nested, and the same from a list and from a stream."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyalign.data import Columns, LlavaDataset, draw_records, gather_rows

IDS = [f"record {n}" for n in range(60)]


@given(st.integers(0, 5), st.integers(1, 70), st.integers(1, 70), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_a_draw_is_nested_and_does_not_depend_on_the_order(seed: int, n: int, m: int, random: Any) -> None:
    small, large = sorted((n, m))
    assert set(draw_records(IDS, small, seed=seed).indices) <= set(draw_records(IDS, large, seed=seed).indices)
    mixed = random.sample(IDS, len(IDS))
    one, other = draw_records(IDS, n, seed=seed), draw_records(mixed, n, seed=seed)
    assert {IDS[at] for at in one.indices} == {mixed[at] for at in other.indices}
    assert one.drawn == min(n, 60) == len(set(one.indices))
    assert list(one.indices) == sorted(one.indices)


def test_every_record_is_drawn_as_often() -> None:
    """10 of 60 by 600 seeds: a count is binomial with mean 100 and standard deviation 9.1; six of them are allowed."""
    counts = dict.fromkeys(range(60), 0)
    for seed in range(600):
        for at in draw_records(IDS, 10, seed=seed).indices:
            counts[at] += 1
    assert sum(counts.values()) == 6000
    assert all(45 < count < 155 for count in counts.values())


def test_a_draw_names_itself() -> None:
    draw = draw_records(IDS, 10, seed=3)
    fields = draw.fingerprint("file.json")
    assert fields["data.source"] == "file.json"
    assert (fields["data.drawn"], fields["data.of"], fields["data.seed"]) == (10, 60, 3)
    assert draw_records(IDS, 10, seed=4).digest != draw.digest == fields["data.ids"]
    assert draw_records(IDS).indices == tuple(range(60))


def test_a_draw_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"draw_records: count must be an integer of at least 1, got 0"):
        draw_records(IDS, 0)
    with pytest.raises(ValueError, match=r"draw_records: ids must be distinct, got 'b' twice"):
        draw_records(["a", "b", "c", "b"], 2)


def rows(total: int = 40, stop: int | None = None) -> Iterator[dict[str, Any]]:
    for n in range(total):
        if n == stop:
            raise KeyboardInterrupt
        yield {"image": Image.new("RGB", (4, 4), (n, 0, 0)), "text": f"shade {n}"}


def content(folder: Path) -> tuple[str, list[str]]:
    return (folder / "data.json").read_text(), sorted(path.name for path in (folder / "images").iterdir())


def test_a_stream_draws_what_a_list_of_its_ids_draws(tmp_path: Path) -> None:
    gathered = gather_rows(rows(), tmp_path, count=7, seed=2)
    assert gathered.draw == draw_records([f"row-{n}" for n in range(40)], 7, seed=2)
    dataset = LlavaDataset(gathered.json_path, gathered.image_dir)
    assert [sample.turns[1].text for sample in dataset] == [f"shade {n}" for n in gathered.draw.indices]
    for sample, n in zip(dataset, gathered.draw.indices, strict=True):
        with Image.open(sample.images[0]) as opened:
            assert opened.convert("RGB").getpixel((0, 0)) == (n, 0, 0)
    assert len(list(gathered.image_dir.iterdir())) == 7
    assert gather_rows(iter(()), tmp_path, count=7, seed=2) == gathered  # done: the stream is not read again


@pytest.mark.parametrize("count", [None, 6])
def test_a_pass_that_is_killed_goes_on(tmp_path: Path, count: int | None) -> None:
    whole = gather_rows(rows(), tmp_path / "whole", count=count, commit_every=4)
    with pytest.raises(KeyboardInterrupt):
        gather_rows(rows(stop=31), tmp_path / "killed", count=count, commit_every=4)
    (tmp_path / "killed" / "images" / ".half.png").touch()
    read = list[int]()

    class Rest:
        def skip(self, n: int) -> Iterator[dict[str, Any]]:
            read.append(n)
            return (row for at, row in enumerate(rows()) if at >= n)

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return rows()

    resumed = gather_rows(Rest(), tmp_path / "killed", count=count, commit_every=4)
    assert read == [28]
    assert resumed.draw == whole.draw
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_equal_pictures_are_one_group_and_bytes_stay_as_they_are(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "JPEG")
    (tmp_path / "on_disk.jpg").write_bytes(stream.getvalue())
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}]
    given = [
        {"picture": {"bytes": stream.getvalue(), "path": None}, "id": "a", "text": ["one", "two"]},
        {"picture": {"bytes": None, "path": str(tmp_path / "on_disk.jpg")}, "id": "b", "conversations": turns},
        {"picture": str(tmp_path / "on_disk.jpg"), "id": "c", "text": "three"},
    ]
    gathered = gather_rows(given, tmp_path / "out", columns=Columns(image="picture"))
    dataset = LlavaDataset(gathered.json_path, gathered.image_dir)
    assert [sample.turns[1].text for sample in dataset] == ["one", "red", "three"]
    assert len({sample.group for sample in dataset}) == 1
    assert len({sample.sample_id for sample in dataset}) == 3
    assert [path.read_bytes() for path in gathered.image_dir.iterdir()] == [stream.getvalue()]


def test_a_picture_stays_as_long_as_a_record_shows_it(tmp_path: Path) -> None:
    """Rows share four pictures; of those that are displaced, some still belong to a record that stays."""
    shared = ({"image": Image.new("RGB", (4, 4), (n % 4, 0, 0)), "text": f"row {n}"} for n in range(40))
    gathered = gather_rows(shared, tmp_path, count=7, seed=2)
    assert len(LlavaDataset(gathered.json_path, gathered.image_dir)) == 7
    assert len(list(gathered.image_dir.iterdir())) == len({n % 4 for n in gathered.draw.indices})


def test_a_second_row_of_an_id_that_is_not_drawn_does_no_harm(tmp_path: Path) -> None:
    whole = gather_rows(rows(), tmp_path / "once", count=3)
    twice = next(row for n, row in enumerate(rows()) if n not in whole.draw.indices and n < 3)
    number = int(twice["text"].split()[1])
    again = gather_rows([*rows(), {**twice, "id": f"row-{number}"}], tmp_path / "twice", count=3)
    assert again.draw.indices == whole.draw.indices


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "words"}, r"row 1 \('row-1'\) must have a picture in column 'image', got NoneType"),
        ({"image": {"bytes": b"no picture"}, "text": "words"}, r"row 1 .* must have a readable picture"),
        ({"image": "nowhere.png", "text": "words"}, r"row 1 .* must have a readable picture .*nowhere.png"),
        ({"image": Image.new("RGB", (4, 4)), "text": " "}, r"row 1 .* must have words in column 'text'"),
        ({"image": Image.new("RGB", (4, 4)), "text": "two", "id": "row-0"}, r"ids must be distinct, got 'row-0' twice"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"image": Image.new("RGB", (4, 4)), "text": "words"}
    with pytest.raises(ValueError, match=message):
        gather_rows([good, row], tmp_path)


def test_a_folder_of_another_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gather_rows: rows must hold at least one row, got none"):
        gather_rows([], tmp_path)
    gather_rows(rows(), tmp_path, count=3)
    with pytest.raises(ValueError, match=r"folder must hold a pass of the same draw, got .*'count': 3.*'count': 4"):
        gather_rows(rows(), tmp_path, count=4)
    with pytest.raises(ValueError, match="commit_every must be an integer of at least 1, got 0"):
        gather_rows(rows(), tmp_path, commit_every=0)
    with pytest.raises(ValueError, match="gather_rows: count must be an integer of at least 1, got 0"):
        gather_rows(rows(), tmp_path, count=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_data_sets(tmp_path: Path, streaming: bool) -> None:
    """A parquet file and a folder of images, streamed or not, offline."""
    datasets = pytest.importorskip("datasets")
    source = datasets.Dataset.from_list(list(rows(12)), features=datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string")}
    ))  # fmt: skip
    source.to_parquet(str(tmp_path / "part.parquet"))
    files = {"data_files": str(tmp_path / "part.parquet"), "cache_dir": str(tmp_path / "cache")}
    loaded = datasets.load_dataset("parquet", split="train", streaming=streaming, **files)
    as_bytes = loaded.cast_column("image", datasets.Image(decode=False))
    gathered = gather_rows(as_bytes, tmp_path / "parquet", count=5, seed=1)
    assert gathered.draw == draw_records([f"row-{n}" for n in range(12)], 5, seed=1)

    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for n, row in enumerate(rows(4)):
        row["image"].save(folder / f"{n}.png")
        lines.append(json.dumps({"file_name": f"{n}.png", "text": row["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", streaming=streaming, cache_dir=cache
    )
    gathered = gather_rows(loaded, tmp_path / "from_folder")
    said = {sample.turns[1].text for sample in LlavaDataset(gathered.json_path, gathered.image_dir)}
    assert said == {f"shade {n}" for n in range(4)}
