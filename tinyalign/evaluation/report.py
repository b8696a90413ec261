"""A page that holds its pictures: one file to open, to send and to keep."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%}pre{overflow:auto}"
)


def write_report(
    path: str | Path, title: str, *, sentences: Sequence[str], tables: str = "", pictures: Sequence[str | Path] = ()
) -> Path:
    """Write what was found as one HTML file that needs nothing beside it.

    Args:
        path: of the file.
        title: above the page.
        sentences: what the numbers mean, a line each.
        tables: HTML between the sentences and the pictures, taken as it is (rich's ``export_html`` makes it).
        pictures: PNG files, whose bytes go into the page; their names are what is read in place of them.

    Raises:
        FileNotFoundError: a picture is missing.

    Example:
        >>> import tempfile
        >>> page = write_report(tempfile.mkdtemp() + "/report.html", "Arms", sentences=["a < b"])
        >>> "<li>a &lt; b</li>" in page.read_text()
        True
    """
    images = "".join(
        f'<p><img alt="{html.escape(picture.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"></p>'
        for picture in map(Path, pictures)
    )
    lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    path = Path(path)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<ul>{lines}</ul>{tables}{images}</html>",
        encoding="utf-8",
    )
    return path
