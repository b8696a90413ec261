"""Naming what made a bank's keys and values, and refusing a query made by something else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinyalign.memory.errors import FingerprintMismatch

Fingerprint = dict[str, "str | int | float | bool | None"]


def checked_fingerprint(fingerprint: Mapping[str, Any] | None, caller: str) -> Fingerprint:
    """Return a plain copy of a flat fingerprint, or say which field is not a plain value."""
    if fingerprint is None:
        return {}
    if not isinstance(fingerprint, Mapping):
        raise TypeError(
            f"{caller}: fingerprint must be a dict of plain values, got {type(fingerprint).__name__}. "
            "Use fields such as {'key.encoder': 'siglip-so400m'}."
        )
    for name, value in fingerprint.items():
        plain = value is None or isinstance(value, (str, int, float, bool))
        if not isinstance(name, str) or not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise TypeError(
                f"{caller}: fingerprint must map names to str, int, finite float, bool or None, "
                f"got {name!r}: {value!r}. Turn it into text or a number."
            )
    return dict(fingerprint)


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Describe each field under ``prefix`` whose value differs; a field that one side lacks counts as different."""
    names = sorted(name for name in {*ours, *theirs} if name.startswith(prefix))
    missing = "nothing"
    return [
        f"{name} (bank: {ours.get(name, missing)!r}, given: {theirs.get(name, missing)!r})"
        for name in names
        if (name in ours) != (name in theirs) or ours.get(name) != theirs.get(name)
    ]


def require_match(ours: Mapping[str, Any], theirs: Mapping[str, Any], caller: str, prefix: str = "") -> None:
    """Raise ``FingerprintMismatch`` naming every differing field under ``prefix``."""
    differences = differing_fields(ours, checked_fingerprint(theirs, caller), prefix)
    if differences:
        raise FingerprintMismatch(
            f"{caller}: fingerprint must match the bank's, got a difference in {'; '.join(differences)}. "
            "Make queries with what made the keys, or rebuild the bank."
        )
