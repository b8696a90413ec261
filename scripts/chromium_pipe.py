"""Headless Chromium driven over a pair of pipes, with the standard library alone (the Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE = 120.0  # seconds for one answer; a busy machine is slow, a dead browser is noticed at once


def find_chromium() -> str | None:
    """Return the browser's path, or None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Chromium:
    """One browser with one tab.

    Args:
        binary: path of the browser.
        profile: an empty folder for its profile.

    Raises:
        RuntimeError: the browser ended, did not answer, or refused a command; the message holds its words.
    """

    def __init__(self, binary: str, profile: str) -> None:
        their_input, self._to = os.pipe()
        self._from, their_output = os.pipe()

        def connect() -> None:  # DevTools reads from descriptor 3 and writes to 4
            os.dup2(their_input, 13)
            os.dup2(their_output, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        self._process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect,
            start_new_session=True,
            close_fds=False,
            env=os.environ | {"TMPDIR": profile},  # whatever it leaves goes with its profile
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._number, self._buffer, self._session = 0, b"", None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._ask(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        # All of it at once: its network and storage processes outlive the first one and go on writing to the profile.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def resize(self, width: int, height: int, *, mobile: bool) -> None:
        """Set the size of the screen in CSS pixels."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def prefer(self, scheme: str) -> None:
        """Set what pages are told of the reader's colour scheme."""
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        self._ask("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])

    def open(self, address: str) -> list[str]:
        """Open a page, wait until it is drawn, and return what it logged as errors and failed to load."""
        self.problems, self.requests, self._loaded = [], [], False
        self._ask("Page.navigate", url=address)
        end = time.monotonic() + PATIENCE
        while not self._loaded:
            self._take(self._receive(end))
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return list(self.problems)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page; a promise is awaited."""
        answer = self._ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"Chromium.evaluate: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page, up to 6,000 pixels of it, as PNG."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}
        data = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        try:
            os.write(self._to, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise RuntimeError("Chromium ended") from None
        end = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(end)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"Chromium: {method} was refused: {answer['error']}")
                return dict(answer["result"])
            self._take(answer)

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]:
                raise RuntimeError(f"Chromium did not answer within {PATIENCE:.0f} s")
            piece = os.read(self._from, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium ended")
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        """Note what an event tells of the page."""
        name, told = event.get("method"), event.get("params", {})
        if name == "Page.loadEventFired":
            self._loaded = True
        elif name == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.problems.append(f"script error: {details.get('exception', {}).get('description', details['text'])}")
        elif name == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.problems.append(f"console: {[a.get('value', a.get('description')) for a in told['args']]}")
        elif name == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.problems.append(f"log: {told['entry']['text']} {told['entry'].get('url', '')}")
        elif name == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif name == "Network.responseReceived" and told["response"]["status"] >= 400:
            self.problems.append(f"{told['response']['status']} for {told['response']['url']}")
