"""What studies of many runs share: runs that survive a kill, intervals over seeds, and a table as a file."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign.theory.intervals import RatioInterval, ratio_interval

Run = dict[str, Any]


def setting_name(*facts: Any) -> str:
    """Name the setting of a study: the same facts give the same 12 letters, others give others.

    Args:
        facts: whatever a run's result depends on; what JSON does not know goes in as text.

    Example:
        >>> setting_name(8000, "trained") == setting_name(8000, "trained") != setting_name(4000, "trained")
        True
    """
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]


class KeptRuns:
    """The finished runs of a study in one file, so that a kill costs the run it interrupts and no other.

    Each line is a run with its setting; those of other settings stay in the file and are not looked at. A last line
    that a kill cut off is dropped.

    Args:
        path: of the file, one JSON object a line; made with the first run.
        setting: what the runs' constants and parts are called, see `setting_name`.
        by: names of the fields that tell one run from another.

    Raises:
        ValueError: a line in the middle of the file is not JSON.

    Example:
        >>> import tempfile
        >>> runs = KeptRuns(Path(tempfile.mkdtemp()) / "runs.jsonl", "a", by=("arm", "seed"))
        >>> runs.add({"arm": "off", "seed": 0, "accuracy": 0.5})
        >>> again = KeptRuns(runs.path, "a", by=("arm", "seed"))
        >>> again.get(arm="off", seed=0)["accuracy"], again.get(arm="off", seed=1)
        (0.5, None)
    """

    def __init__(self, path: str | Path, setting: str, *, by: Sequence[str]) -> None:
        self.path, self.setting, self.by = Path(path), setting, tuple(by)
        self._runs: dict[str, Run] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        self._whole = sum(len(line) + 1 for line in lines[:-1])  # bytes up to the last line's end
        for number, line in enumerate(lines[:-1], start=1):
            try:
                run = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"KeptRuns: {self.path} must hold a JSON object on each line, got {line[:40].decode(errors='replace')!r} on line {number}. "
                    f"Delete that line: its run is made again."
                ) from error
            if run["setting"] == setting:
                self._runs[self._key(run)] = run

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def get(self, **fields: Any) -> Run | None:
        """Return the run with these fields, or None where it is still to be made."""
        return self._runs.get(self._key(fields))

    def add(self, run: Mapping[str, Any]) -> None:
        """Append a run, on the disk as well."""
        kept = json.loads(json.dumps({"setting": self.setting, **run}))
        line = (json.dumps(kept) + "\n").encode()
        with open(self.path, "ab") as stream:
            stream.truncate(self._whole)
            stream.write(line)
        self._whole += len(line)
        self._runs[self._key(kept)] = kept

    def _key(self, run: Mapping[str, Any]) -> str:
        return json.dumps([run[name] for name in self.by], sort_keys=True)


def over_seeds(values: Sequence[float]) -> RatioInterval:
    """Mean over seeds with Student's t interval: what another seed would give, not what other samples would.

    Args:
        values: one number per seed.

    Example:
        >>> found = over_seeds([0.2, 0.3, 0.4])
        >>> f"{found.value:.1f} [{found.low:.2f}, {found.high:.2f}]"
        '0.3 [0.05, 0.55]'
    """
    numbers = np.asarray(values, dtype=np.float64)
    return ratio_interval(numbers, np.ones(len(numbers)), np.arange(len(numbers)), method="t")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows of the same fields, with those as the first line.

    Args:
        path: of the file.
        rows: at least one.

    Example:
        >>> import tempfile
        >>> write_csv(Path(tempfile.mkdtemp()) / "table.csv", [{"arm": "off", "ce": 0.5}]).read_text().split()
        ['arm,ce', 'off,0.5']
    """
    path = Path(path)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
