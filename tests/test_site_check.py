"""The driver of the browser that looks at the documentation ends all of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
# Answers every command with an empty target, while a child of its own writes to the profile, as Chromium's network and
# storage processes do.
BROWSER = """#!{python}
import json, os, subprocess, sys
profile = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--user-data-dir="))
subprocess.Popen(["/bin/sh", "-c", 'while :; do echo >> "$0"; done', os.path.join(profile, "journal")])
buffer = b""
while True:
    buffer += os.read(3, 65536)
    while b"\\0" in buffer:
        line, buffer = buffer.split(b"\\0", 1)
        answer = dict(id=json.loads(line)["id"], result=dict(targetId="1", sessionId="1"))
        os.write(4, json.dumps(answer).encode() + b"\\0")
"""


def test_the_browsers_helpers_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from chromium_pipe import Chromium

    binary, profile = tmp_path / "browser", tmp_path / "profile"
    binary.write_text(BROWSER.format(python=sys.executable))
    binary.chmod(0o755)
    profile.mkdir()
    journal = profile / "journal"
    with Chromium(str(binary), str(profile)):
        end = time.monotonic() + 60
        while not journal.exists() and time.monotonic() < end:
            time.sleep(0.01)
        assert journal.exists()
    time.sleep(0.1)
    size = journal.stat().st_size
    time.sleep(0.3)
    assert journal.stat().st_size == size
