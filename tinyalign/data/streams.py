"""From any stream of rows (a Hugging Face dataset, say) to a LLaVA-format file with its pictures beside it."""

from __future__ import annotations

import heapq
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from PIL import Image

from tinyalign._checks import check_positive
from tinyalign._files import write_json
from tinyalign.data.records import IMAGE_PLACEHOLDER
from tinyalign.data.sampling import Draw, digest_of, priority

CAPTION_REQUEST = "Describe the image."
WHERE = "gather_rows"


class Columns(NamedTuple):
    """Which columns of a row hold what; a row has ``conversations`` (LLaVA's turns) or ``text`` (a caption).

    Args:
        image: column of the picture.
        text: column of the caption.
        conversations: column of the turns.
        id: column of the record's name.
    """

    image: str = "image"
    text: str = "text"
    conversations: str = "conversations"
    id: str = "id"


class Gathered(NamedTuple):
    """What was written.

    Args:
        json_path: the LLaVA-format file.
        image_dir: the folder of its pictures.
        draw: which rows were chosen, and how.
    """

    json_path: Path
    image_dir: Path
    draw: Draw


def gather_rows(
    rows: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    count: int | None = None,
    seed: int = 0,
    columns: Columns | None = None,
    commit_every: int = 10_000,
) -> Gathered:
    """Draw ``count`` rows of a stream in one pass and write them as a LLaVA-format file.

    The stream may be longer than any disk: a row's picture is written when the row is among the lowest priorities so
    far and deleted when a later row displaces it, about ``count * (1 + ln(M / count))`` pictures in all. Bytes of a
    picture are kept as they are and named by their content, so that equal pictures become one file and one group. A
    pass that is killed goes on where it was last committed.

    Args:
        rows: mappings; ``datasets.load_dataset(..., streaming=True)`` is one. A picture is a PIL image, a path, or a
            mapping with ``bytes`` or ``path`` (what ``datasets.Image(decode=False)`` gives).
        folder: gets ``data.json`` and ``images``.
        count: rows to keep; all when None.
        seed: of the draw; the same as that of `draw_records` over the same ids.
        columns: where to find what.
        commit_every: rows between two notes of how far the pass got.

    Raises:
        ValueError: no rows, a row without picture or words, an id that occurs twice, or a folder that holds a pass of
            another draw; the message names the row.

    Example:
        >>> import tempfile
        >>> rows = ({"image": Image.new("RGB", (4, 4), (n, 0, 0)), "text": f"shade {n}"} for n in range(50))
        >>> gathered = gather_rows(rows, tempfile.mkdtemp(), count=5, seed=1)
        >>> gathered.draw.drawn, gathered.draw.of, len(list(gathered.image_dir.iterdir()))
        (5, 50, 5)
    """
    check_positive(WHERE, "commit_every", commit_every)
    if count is not None:
        check_positive(WHERE, "count", count)
    columns, folder = columns or Columns(), Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    plan = {"count": count, "seed": seed, "columns": list(columns)}
    done = folder / "draw.json"
    if done.exists():
        said = _read_plan(done, plan)
        draw = Draw(tuple(said["indices"]), said["drawn"], said["of"], seed, said["digest"])
        return Gathered(folder / "data.json", folder / "images", draw)
    state = _State(folder, plan, count)
    for index, row in _rest(rows, state.position):
        state.take(index, _name(row, index, columns), row, columns)
        if state.position % commit_every == 0:
            state.commit()
    if not state.kept:
        raise ValueError(f"{WHERE}: rows must hold at least one row, got none. Check the data set and its split.")
    records = [entry.record for entry in sorted(state.kept, key=lambda entry: entry.row)]
    (folder / "data.json").write_text(json.dumps(records, indent=1, sort_keys=True), encoding="utf-8")
    indices = sorted(entry.row for entry in state.kept)
    digest = digest_of([record["id"] for record in records])
    draw = Draw(tuple(indices), len(indices), state.position, seed, digest)
    facts = {"indices": indices, "drawn": draw.drawn, "of": draw.of, "digest": digest}
    state.clear()
    write_json(done, {"plan": plan, **facts})
    return Gathered(folder / "data.json", folder / "images", draw)


class _Entry(NamedTuple):
    """A row kept so far; ordered so that the heap's first is the next to go."""

    rank: int
    row: int
    record: dict[str, Any]

    def __lt__(self, other: Any) -> bool:
        return (-self.rank, -self.row) < (-other.rank, -other.row)


class _State:
    """The rows kept so far and how far the pass got, on disk after every commit."""

    def __init__(self, folder: Path, plan: dict[str, Any], count: int | None) -> None:
        self.folder, self.plan, self.count = folder, plan, count
        self.note = folder / "passing.json"
        self.position, self.kept = 0, list[_Entry]()
        if self.note.exists():
            said = _read_plan(self.note, plan)
            self.position = said["position"]
            self.kept = [_Entry(*entry) for entry in said["kept"]]  # written in a heap's order
        # Equal ids have equal ranks and are kept or dropped together, so that looking among the kept finds them.
        self.ranks = {entry.rank for entry in self.kept}
        self.uses = Counter(entry.record["image"] for entry in self.kept)

    def take(self, index: int, name: str, row: Mapping[str, Any], columns: Columns) -> None:
        rank = priority(name, self.plan["seed"])
        if rank in self.ranks:
            raise ValueError(
                f"{WHERE}: ids must be distinct, got {name!r} twice (row {index}). Name another id column."
            )
        self.position = index + 1
        full = self.count is not None and len(self.kept) >= self.count
        if full and rank > self.kept[0].rank:
            return
        record = _record(row, name, index, columns, self.folder / "images")
        entry = _Entry(rank, index, record)
        self.ranks.add(rank)
        self.uses[record["image"]] += 1
        if not full:
            heapq.heappush(self.kept, entry)
            return
        out = heapq.heapreplace(self.kept, entry)
        self.ranks.remove(out.rank)
        self.uses[out.record["image"]] -= 1
        if not self.uses[out.record["image"]]:
            (self.folder / "images" / out.record["image"]).unlink(missing_ok=True)

    def commit(self) -> None:
        kept = [list(entry) for entry in self.kept]
        write_json(self.note, {"plan": self.plan, "position": self.position, "kept": kept})

    def clear(self) -> None:
        """Remove the note, and pictures that a killed pass left and the draw does not hold."""
        named = {entry.record["image"] for entry in self.kept}
        for picture in (self.folder / "images").iterdir():
            if picture.name not in named:
                picture.unlink()
        self.note.unlink(missing_ok=True)


def _read_plan(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if said["plan"] != plan:
        raise ValueError(
            f"{WHERE}: folder must hold a pass of the same draw, got {said['plan']} where {plan} is asked for. Give "
            f"another folder, or delete {path.parent}."
        )
    return said


def _rest(rows: Iterable[Mapping[str, Any]], position: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows from ``position`` on, skipped by the data set itself where it can."""
    skip: Any = getattr(rows, "skip", None)
    left = skip(position) if position and callable(skip) else islice(iter(rows), position, None)
    return ((position + offset, row) for offset, row in enumerate(left))  # pyright: ignore[reportArgumentType]


def _name(row: Mapping[str, Any], index: int, columns: Columns) -> str:
    value = row.get(columns.id)
    return f"row-{index}" if value is None else str(value)


def _record(row: Mapping[str, Any], name: str, index: int, columns: Columns, images: Path) -> dict[str, Any]:
    where = f"row {index} ({name!r})"
    said = row.get(columns.conversations)
    if said is None:
        text = row.get(columns.text)
        text = text[0] if isinstance(text, (list, tuple)) and text else text
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{WHERE}: {where} must have words in column {columns.text!r} (or turns in {columns.conversations!r}), "
                f"got {text!r} among the columns {sorted(row)}. Name the columns, or filter such rows out."
            )
        question = f"{IMAGE_PLACEHOLDER}\n{CAPTION_REQUEST}"
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": text.strip()}]
    return {"id": name, "image": _picture(row.get(columns.image), where, columns, images), "conversations": said}


def _picture(image: Any, where: str, columns: Columns, folder: Path) -> str:
    """Write a picture's bytes under the name of its content."""
    content: bytes | None = None
    try:
        if isinstance(image, Image.Image):
            stream = io.BytesIO()
            image.convert("RGB").save(stream, "PNG")
            content = stream.getvalue()
        elif isinstance(image, Mapping) and image.get("bytes"):
            content = bytes(image["bytes"])
        elif isinstance(image, (str, Path)) or (isinstance(image, Mapping) and image.get("path")):
            content = Path(image["path"] if isinstance(image, Mapping) else image).read_bytes()
        if content is not None:
            with Image.open(io.BytesIO(content)) as opened:
                suffix = "jpg" if opened.format == "JPEG" else str(opened.format).lower()
    except OSError as error:
        raise ValueError(
            f"{WHERE}: {where} must have a readable picture in column {columns.image!r}, got {error}. Fetch the data "
            f"again, or filter such rows out."
        ) from error
    if content is None:
        raise ValueError(
            f"{WHERE}: {where} must have a picture in column {columns.image!r}, got {type(image).__name__}. Name the "
            f"column, or filter such rows out."
        )
    name = f"{xxhash.xxh3_64_hexdigest(content)}.{suffix}"
    if not (folder / name).exists():
        aside = folder / f".{name}"
        aside.write_bytes(content)
        aside.replace(folder / name)
    return name
