"""Every link and anchor of a built site, read from its files: which of them lead nowhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit


class _Page(HTMLParser):
    """What a page links to and what can be linked in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.targets |= {given[name] for name in ("id", "name") if name in given}
        wanted = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src"}.get(tag)
        if wanted and given.get(wanted):
            self.links.append(given[wanted])


def broken_links(site: Path) -> list[str]:
    """Return one sentence for each internal link that leads to no file or to no anchor; other sites are not asked.

    Example:
        >>> import tempfile
        >>> site = Path(tempfile.mkdtemp())
        >>> _ = (site / "a.html").write_text('<p id="x"><a href="#x"> <a href="#y"> <a href="b.html">')
        >>> broken_links(site)
        ["a.html: '#y' names no anchor of a.html", "a.html: 'b.html' leads to no file"]
    """
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in sorted(site.glob("**/*.html"))}
    problems = []
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        if here.name == "404.html":  # its links are absolute, for a server at the root
            continue
        for link in dict.fromkeys(page.links):
            address, anchor = urldefrag(link)
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                problems.append(f"{here}: {link!r} leads to no file")
            elif anchor and target in pages and unquote(anchor) not in pages[target].targets:
                problems.append(f"{here}: {link!r} names no anchor of {target.relative_to(site.resolve())}")
    return problems
