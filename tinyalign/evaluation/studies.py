"""What studies of many runs share: runs that survive a kill, intervals over seeds, and a table as a file."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyalign.theory import Estimate, NLLTable, delta_emi
from tinyalign.theory.intervals import RatioInterval, ratio_interval

Run = dict[str, Any]


def setting_name(facts: Sequence[Any]) -> str:
    """Name the setting of a study: the same facts give the same 12 letters, others give others.

    Args:
        facts: whatever a run's result depends on; what JSON does not know goes in as text.

    Example:
        >>> setting_name([8000, "trained"]) == setting_name([8000, "trained"]) != setting_name([4000, "trained"])
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
                    f"KeptRuns: {self.path} must hold a JSON object on each line, got "
                    f"{line[:40].decode(errors='replace')!r} on line {number}. Delete that line: its run is made again."
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


class SeedComparison(NamedTuple):
    """An arm beside the baseline of the same seeds.

    Args:
        per_token: its cross-entropy over seeds, in nats per token.
        relative: the mean over seeds of its change to the baseline's, 0.1 for 10 % more.
        gain: what it uses more than the baseline over seeds, in nats per sample: its interval speaks of new runs.
        gain_of_samples: likewise over all samples: its interval speaks of new samples for these runs.
    """

    per_token: RatioInterval
    relative: float
    gain: RatioInterval
    gain_of_samples: Estimate


def compare_seeds(arm: Sequence[NLLTable], baseline: Sequence[NLLTable]) -> SeedComparison:
    """Compare an arm with the baseline, seed by seed and sample by sample.

    Args:
        arm: held-out samples under the arm, one table per seed; each seed may have samples of its own.
        baseline: the same samples under the baseline of the same seed.

    Raises:
        ValueError: another number of seeds.
        TableMismatch: the tables of a seed do not speak of the same targets.

    Example:
        >>> worse, better = NLLTable([4.0, 6.0, 5.0], [2, 2, 2]), NLLTable([3.0, 5.5, 4.0], [2, 2, 2])
        >>> found = compare_seeds([better, better], [worse, worse])
        >>> f"{found.relative:+.0%}, {found.gain.value:.2f} nats per sample"
        '-17%, 0.83 nats per sample'
    """
    if len(arm) != len(baseline) or not arm:
        raise ValueError(
            f"compare_seeds: arm must have a table for each seed of the baseline, got {len(arm)} for {len(baseline)}. "
            f"Compare seeds that both were run with."
        )
    pairs = list(zip(baseline, arm, strict=True))
    return SeedComparison(
        per_token=over_seeds([table.per_token for table in arm]),
        relative=float(np.mean([own.per_token / base.per_token - 1 for base, own in pairs])),
        gain=over_seeds([delta_emi(base, own).value for base, own in pairs]),
        gain_of_samples=delta_emi(_together(baseline), _together(arm)),
    )


def _together(tables: Sequence[NLLTable]) -> NLLTable:
    nll, tokens = (np.concatenate([getattr(table, name) for table in tables]) for name in ("nll", "tokens"))
    return NLLTable(nll, tokens)


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


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of the same fields as a Markdown table, as it goes into a page.

    Args:
        rows: at least one; the keys are the first line.

    Example:
        >>> print(markdown_table([{"": "off", "accuracy": "0.5"}, {"": "bank", "accuracy": "0.6"}]), end="")
        |  | accuracy |
        | --- | --- |
        | off | 0.5 |
        | bank | 0.6 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
