"""A page that shows queries beside what they retrieved, to be looked at before any number is believed."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyalign.memory.retrieval import Neighbours

if TYPE_CHECKING:
    from PIL.Image import Image

Card = tuple["Image | Path | str | None", str]

STYLE = """body{font:14px system-ui;margin:24px;color:#222}table{border-collapse:collapse}
td{padding:6px 10px;vertical-align:top;border-bottom:1px solid #ddd;max-width:180px}
img{width:120px;image-rendering:auto;display:block}small{color:#666}.q{background:#f4f6fa}"""


def neighbour_sheet(
    neighbours: Neighbours,
    queries: Sequence[Card],
    show: Callable[[int], Card],
    path: str | Path,
    *,
    title: str = "Neighbours",
    image_size: int = 160,
) -> Path:
    """Write one self-contained HTML page: a row per query, its neighbours with image, text and score.

    Args:
        neighbours: of the queries, as ``MemoryBank.neighbours`` or a table gives them.
        queries: image (a PIL image, a path, or None) and text of each query.
        show: image and text of the entry of an id.
        path: the file to write.
        title: heading of the page.
        image_size: longest side of an image on the page, in pixels.

    Raises:
        ValueError: there are not as many queries as rows of neighbours.

    Example:
        >>> import tempfile
        >>> import torch
        >>> found = Neighbours(torch.ones(1, 1), torch.tensor([[7]]), torch.ones(1, 1, dtype=torch.bool))
        >>> page = neighbour_sheet(found, [(None, "a rose")], lambda entry: (None, f"entry {entry}"),
        ...                        tempfile.mkdtemp() + "/page.html")
        >>> "entry 7" in page.read_text()
        True
    """
    if len(queries) != neighbours.ids.shape[0]:
        raise ValueError(
            f"neighbour_sheet: queries must be one per row of neighbours, got {len(queries)} for "
            f"{neighbours.ids.shape[0]}. Pass the same queries that were searched."
        )
    rows = []
    found = zip(neighbours.ids.tolist(), neighbours.scores.tolist(), neighbours.mask.tolist(), strict=True)
    for query, (ids, scores, mask) in zip(queries, found, strict=True):
        cells = [f'<td class="q">{_card(query, "query", image_size)}</td>']
        for entry, score, kept in zip(ids, scores, mask, strict=True):
            shown = _card(show(entry), f"{entry}: {score:.3f}", image_size) if kept else "<small>none left</small>"
            cells.append(f"<td>{shown}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><table>{''.join(rows)}</table></html>\n"
    )
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target


def _card(card: Card, label: str, size: int) -> str:
    image, text = card
    picture = "" if image is None else f'<img alt="" src="{_embedded(image, size)}">'
    return f"{picture}{html.escape(text)}<br><small>{html.escape(label)}</small>"


def _embedded(image: Any, size: int) -> str:
    from PIL import Image

    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    else:
        picture = image.convert("RGB")
    picture.thumbnail((size, size))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
