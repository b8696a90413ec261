"""Look at the built documentation in headless Chromium: every page, at desktop and phone width.

    make docs && python scripts/check_site.py
    python scripts/check_site.py --only index.html how-to/ --screenshots shots/ --scheme dark

A page fails if it logs an error, asks for anything outside the site, has a link or an anchor that leads nowhere, an
image that does not load, a formula that was not rendered, or is wider than the screen. The search must find
`MemoryBank`.

Exits with 1 if anything failed, with 2 where there is no Chromium. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from chromium_pipe import Chromium, find_chromium
from site_links import broken_links

SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
LOOK = """(() => {
  const images = [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src);
  const formulas = [...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().height < 4).length;
  const raw = document.querySelectorAll('.arithmatex').length;
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const inside = e => { for (; e; e = e.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const past = e => e.getBoundingClientRect().right > innerWidth + 1 && !inside(e);
  const out = wide <= 0 ? [] : [...document.querySelectorAll('.md-content *')].filter(past).slice(0, 3).map(
      e => e.outerHTML.slice(0, 80));
  return {images, formulas, raw, wide, out, title: document.title, headings: document.querySelectorAll('h1').length};
})()"""
SEARCH = """(async word => {
  const input = document.querySelector('[data-md-component=search-query]');
  input.focus(); input.value = word; input.dispatchEvent(new Event('keyup', {bubbles: true}));
  for (let wait = 0; wait < 300; wait++) {
    const links = [...document.querySelectorAll('.md-search-result__item a')].map(a => a.getAttribute('href'));
    if (links.length) return links;
    await new Promise(done => setTimeout(done, 100));
  }
  return [];
})"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer with a file; a browser that looks for an icon by itself is told that there is none."""
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path("site"))
    parser.add_argument("--only", nargs="*", default=[], help="pages whose path begins so")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--screenshots", type=Path, help="write a picture of each page into this folder")
    args = parser.parse_args()
    binary = find_chromium()
    if binary is None:
        print("check_site: no Chromium on the path; nothing was looked at")
        return 2
    pages = [
        str(path.relative_to(args.site)) for path in sorted(args.site.glob("**/*.html")) if path.name != "404.html"
    ]
    if not pages:
        print(f"check_site: {args.site} holds no page; build it with `make docs`")
        return 1
    problems = broken_links(args.site)
    pages = [page for page in pages if not args.only or page.startswith(tuple(args.only))]
    handler = functools.partial(_Quiet, directory=str(args.site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        try:
            problems += look_through(binary, address, pages, args.scheme, args.screenshots)
        except RuntimeError as error:  # the browser's own end says nothing of the pages; a second one is the site's
            print(f"check_site: once more with a new browser, since: {error}")
            problems += look_through(binary, address, pages, args.scheme, args.screenshots)
        server.shutdown()
    for problem in problems:
        print(problem)
    print(f"{len(pages)} pages at {len(SCREENS)} widths: {len(problems)} problems")
    return 1 if problems else 0


def look_through(binary: str, address: str, pages: list[str], scheme: str, screenshots: Path | None) -> list[str]:
    """Open every page at every width in a browser of its own, then search, and return what is wrong."""
    problems = []
    # What a dying browser leaves in its profile is no problem of the site.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Chromium(binary, profile) as browser:
        browser.prefer(scheme)
        for screen, (width, height) in SCREENS.items():
            browser.resize(width, height, mobile=screen == "phone")
            for page in pages:
                problems += [f"{page} ({screen}): {what}" for what in look(browser, address, page)]
                if screenshots:
                    name = page.removesuffix("index.html").strip("/").replace("/", "-") or "index"
                    browser.screenshot(screenshots / f"{name}-{screen}-{scheme}.png")
        browser.open(address)
        links = browser.evaluate(f"{SEARCH}('MemoryBank')")
        if not any("reference/memory" in link for link in links):
            problems.append(f"search: MemoryBank must lead to its reference, got {links[:5]}")
    return problems


def look(browser: Chromium, address: str, page: str) -> list[str]:
    """Open one page and return what is wrong with it."""
    problems = browser.open(address + page.removesuffix("index.html"))
    seen = browser.evaluate(LOOK)
    problems += [
        f"asks for {url}, which is not of this site"
        for url in browser.requests
        if not url.startswith((address, "data:", "blob:"))
    ]
    problems += [f"image does not load: {source}" for source in seen["images"]]
    if seen["raw"] or seen["formulas"]:
        problems.append(f"{seen['raw']} formulas are not rendered and {seen['formulas']} have no height")
    if seen["wide"] > 0:
        problems.append(f"is {seen['wide']} pixels wider than the screen: {seen['out']}")
    if seen["headings"] != 1 or not seen["title"]:
        problems.append(f"must have one title, got {seen['headings']} first-level headings")
    return problems


if __name__ == "__main__":
    sys.exit(main())
