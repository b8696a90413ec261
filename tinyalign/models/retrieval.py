"""Which bank entries a row gets: the method itself, and the control arms that tell information from extra tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyalign.memory import MemoryBank, Neighbours

ARMS = ("bank", "off", "shuffled", "random", "constant", "self", "prompt")
BANK_ARMS = ("bank", "shuffled", "random", "constant", "self")

Ids = NDArray[np.int64]


def arm_neighbours(
    memory: MemoryBank,
    arm: str,
    queries: Tensor,
    *,
    k: int = 5,
    sample_ids: Tensor | None = None,
    groups: Tensor | None = None,
    seed: int = 0,
) -> Neighbours:
    """Choose K bank entries for every row, by the method or by one of its controls.

    - ``bank``: the nearest entries, without the sample itself and its twins.
    - ``self``: the nearest entries, the sample itself included: the leak, kept to be shown.
    - ``shuffled``: the nearest entries of another entry's key, drawn per sample: real neighbours, of the wrong image.
    - ``random``: K entries drawn per sample.
    - ``constant``: the same K entries for every sample.

    A row depends on itself alone: draws come from (`seed`, sample id), never from the batch. The sample's own entry and
    its twins appear in ``self`` and, by chance, in ``constant`` only. Scores of ``random`` and ``constant`` are zero.

    Args:
        memory: the bank.
        arm: one of those five.
        queries: the rows' keys.
        k: entries per row.
        sample_ids: the rows' own ids; every arm but ``bank`` needs them.
        groups: the rows' groups; looked up in the bank when None.
        seed: of the draws.

    Shape:
        queries: (B, D). sample_ids, groups: (B,), int64. returns: `Neighbours`, all (B, K).

    Raises:
        ValueError: an arm that is not one of them, an empty bank, no sample ids where they are needed, or for ``self``
            a sample that the bank does not hold.

    Example:
        >>> bank = MemoryBank(key_dim=2, value_shape=(1, 1))
        >>> _ = bank.add(torch.eye(2).repeat(3, 1), torch.zeros(6, 1, 1), ids=torch.arange(6))
        >>> found = arm_neighbours(bank, "bank", torch.tensor([[1.0, 0.0]]), k=2, sample_ids=torch.tensor([0]))
        >>> sorted(found.ids[0].tolist())
        [2, 4]
    """
    if arm not in BANK_ARMS:
        raise ValueError(
            f"arm_neighbours: arm must be one of {BANK_ARMS}, got {arm!r}. 'off' and 'prompt' need no bank."
        )
    if len(memory) == 0:
        raise ValueError(
            "arm_neighbours: memory must hold at least one entry, got an empty bank. Fill it with build_memory_bank, "
            "or use retrieval='off'."
        )
    if sample_ids is None:
        if arm == "bank":
            return memory.neighbours(queries, k, exclude_groups=groups)
        raise ValueError(
            f"arm_neighbours: sample_ids must be given for arm {arm!r}, got None. The draw, or the leak, is the "
            f"sample's own; any stable number per sample will do."
        )
    own = _numbers(sample_ids)
    if arm == "self":
        _require_known(memory, own)
        return memory.neighbours(queries, k)
    twins = _groups_of(memory, own) if groups is None else _numbers(groups)
    if arm == "bank":
        return memory.neighbours(queries, k, exclude_ids=own, exclude_groups=twins)
    entries = _Entries(memory)
    if arm == "shuffled":
        others = np.array([_draw(entries, 1, seed, 1, i, g)[0] for i, g in zip(own, twins, strict=True)])
        if (others < 0).any():
            raise ValueError(
                f"arm_neighbours: memory must hold an entry of another group for arm 'shuffled', got {len(memory)} "
                f"entries that all belong to sample {int(own[others < 0][0])}. Use a larger bank."
            )
        barred = np.stack([own, others], axis=1)  # another sample's own entry is no neighbour of it either
        keys = memory.keys(torch.from_numpy(others)).to(queries.device)
        return memory.neighbours(keys, k, exclude_ids=barred, exclude_groups=twins)
    if arm == "constant":
        same = _draw(entries, k, seed, 2, None, None)
        chosen = np.repeat(same[None], len(own), axis=0)
    else:
        chosen = np.stack([_draw(entries, k, seed, 3, i, g) for i, g in zip(own, twins, strict=True)])
    ids = torch.from_numpy(chosen).to(queries.device)
    return Neighbours(scores=torch.zeros(ids.shape, device=queries.device), ids=ids, mask=ids >= 0)


def clear_rows(found: Neighbours, keep_rows: Tensor) -> Neighbours:
    """Take away what rows found that have nothing to ask by (text only): id -1, score 0, mask False.

    Shape:
        keep_rows: (B,), bool.
    """
    keep = found.mask & keep_rows[:, None].to(found.mask.device)
    return Neighbours(scores=found.scores.masked_fill(~keep, 0.0), ids=found.ids.masked_fill(~keep, -1), mask=keep)


class _Entries:
    """The bank's ids in ascending order with their groups, so that a draw does not depend on the order of adding."""

    def __init__(self, memory: MemoryBank) -> None:
        ids = _numbers(memory.ids)
        order = np.argsort(ids, kind="stable")
        self.ids: Ids = ids[order]
        self.groups: Ids = _numbers(memory.groups)[order]


def _draw(entries: _Entries, count: int, seed: int, salt: int, own: Any, twins: Any) -> Ids:
    """Draw distinct entries for one sample, none of them its own; -1 where the bank has too few."""
    rng = np.random.default_rng([seed, salt] if own is None else [seed, salt, int(own)])
    total = len(entries.ids)
    picked: list[int] = []
    # A few draws nearly always do; a full permutation follows for small banks and large groups.
    for candidates in (rng.integers(total, size=4 * count + 8), rng.permutation(total)):
        for at in candidates.tolist():
            barred = own is not None and (entries.ids[at] == own or (twins >= 0 and entries.groups[at] == twins))
            if not barred and at not in picked:
                picked.append(at)
                if len(picked) == count:
                    return entries.ids[picked]
    return np.concatenate([entries.ids[picked], np.full(count - len(picked), -1, dtype=np.int64)])


def _groups_of(memory: MemoryBank, own: Ids) -> Ids:
    """The bank's group of each sample, -1 for samples that it does not hold."""
    ids, groups = _numbers(memory.ids), _numbers(memory.groups)
    order = np.argsort(ids, kind="stable")
    at = np.searchsorted(ids[order], own).clip(max=len(ids) - 1)
    found = ids[order][at] == own
    return np.where(found, groups[order][at], -1)


def _require_known(memory: MemoryBank, own: Ids) -> None:
    unknown = np.setdiff1d(own, _numbers(memory.ids))
    if len(unknown):
        raise ValueError(
            f"arm_neighbours: sample_ids must be in the bank for arm 'self', got {int(unknown[0])} which is not. "
            f"Train this arm on the samples that the bank was built from."
        )


def _numbers(values: Tensor) -> Ids:
    return values.detach().cpu().numpy().astype(np.int64)
