"""Directories that are replaced as a whole, and what else stands in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyalign._files import replace_directory


def test_what_else_stands_in_a_directory_stays(tmp_path: Path) -> None:
    path = tmp_path / "run"
    (path / "bank").mkdir(parents=True)
    (path / "bank" / "keys.bin").write_text("keys")
    (path / "weights").write_text("old")
    (path / "gone").symlink_to("nowhere")
    with replace_directory(path) as fresh:
        (fresh / "weights").write_text("new")
    assert (path / "weights").read_text() == "new"
    assert (path / "bank" / "keys.bin").read_text() == "keys"
    assert (path / "gone").is_symlink()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_error_leaves_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "weights").write_text("old")

    def write() -> None:
        with replace_directory(path) as fresh:
            (fresh / "weights").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert (path / "weights").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_a_link_is_followed_and_a_file_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    with replace_directory(tmp_path / "latest") as fresh:
        (fresh / "weights").write_text("new")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "run" / "weights").read_text() == "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="path must be a directory, got the file"):
        replace_directory(tmp_path / "file").__enter__()
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "latest", "run"]
