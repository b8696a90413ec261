"""What each training sample retrieves: found once, and laid ready by the data loader's workers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tinyalign.data import Sample
from tinyalign.memory import MemoryBank, Neighbours, NeighbourTable, precompute_neighbours
from tinyalign.memory.shards import share_of, wait_until
from tinyalign.models import SampleEncoder, TinyAlignVLM, arm_neighbours
from tinyalign.models.retrieval import clear_rows

DRAWN_ARMS = ("shuffled", "random", "constant")
CHUNK = 1024  # samples whose queries are one file of the pass


class NeighbourFeed:
    """Add to a batch what its samples retrieve; the ``extra`` of a `LlavaCollator`.

    Keys and queries come from frozen features, so neighbours never change: the method's are searched once, by all
    ranks together, and kept as a table; a control's are drawn from (seed, sample id). Values are gathered by the
    loader's workers from the memory-mapped bank, so that no step waits for a search or for a copy from the device.
    Where every neighbour was found the batch also says that causality alone hides its padding (``causal_only``).

    Args:
        memory: the bank; None for the arms that ask for none.
        arm: the retrieval arm of the run.
        k: entries per sample.
        seed: of a control's draws.
        table: neighbours of every sample, for the arm ``bank``; `find_neighbours` makes it.

    Raises:
        ValueError: the arm ``bank`` without a table, or the arm ``self``, which searches in the model.

    Example:
        >>> from tinyalign.data import DigitScenes
        >>> bank = MemoryBank(key_dim=2, value_shape=(1, 1))
        >>> _ = bank.add(torch.eye(2).repeat(3, 1), torch.zeros(6, 1, 1))
        >>> batch = NeighbourFeed(bank, "random", k=2)(DigitScenes("train", 3)[:3])
        >>> batch["retrieved"][0].shape, batch["causal_only"]
        (torch.Size([3, 2, 1, 1]), True)
    """

    def __init__(
        self, memory: MemoryBank | None, arm: str, *, k: int = 5, seed: int = 0, table: NeighbourTable | None = None
    ) -> None:
        if arm == "self" or (arm == "bank" and table is None):
            raise ValueError(
                f"NeighbourFeed: table must be given for the arm 'bank', and the arm must not be 'self', got {arm!r} "
                f"and {table!r}. Make it with find_neighbours; the model itself searches for 'self'."
            )
        self.memory, self.arm, self.k, self.seed, self.table = memory, arm, k, seed, table

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return ``retrieved`` (values, mask, scores, ids) and ``causal_only``."""
        if self.arm in ("off", "prompt"):
            return {"causal_only": True}
        assert self.memory is not None
        found = self._lookup(samples) if self.arm == "bank" else self._draw(samples)
        values, mask = self.memory.gather(found.ids)
        return {"retrieved": (values, mask, found.scores, found.ids), "causal_only": bool(mask.all())}

    def _lookup(self, samples: Sequence[Sample]) -> Neighbours:
        assert self.table is not None
        ids, scores = torch.full((len(samples), self.k), -1), torch.zeros(len(samples), self.k)
        rows = [at for at, sample in enumerate(samples) if sample.images]
        if rows:
            found = self.table.lookup(torch.tensor([samples[at].sample_id for at in rows]))
            ids[rows], scores[rows] = found.ids[:, : self.k], found.scores[:, : self.k]
        return Neighbours(scores, ids, ids >= 0)

    def _draw(self, samples: Sequence[Sample]) -> Neighbours:
        assert self.memory is not None
        own = torch.tensor([sample.sample_id for sample in samples])
        groups = torch.tensor([sample.group for sample in samples])
        nothing = torch.zeros(len(samples), self.memory.key_dim)  # these arms do not ask by the image
        found = arm_neighbours(self.memory, self.arm, nothing, k=self.k, sample_ids=own, groups=groups, seed=self.seed)
        return clear_rows(found, torch.tensor([bool(sample.images) for sample in samples]))


def find_neighbours(
    model: TinyAlignVLM,
    image_processor: Any,
    samples: Sequence[Sample],
    folder: str | Path,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    timeout: float = 24 * 3600.0,
) -> NeighbourTable:
    """Search the model's bank for every sample with an image, without the sample itself and its twins.

    Ranks of a launcher share the queries; rank 0 searches. Both go on where a kill left them, and a table that exists
    already for these samples and this bank is opened. Ranks wait for one another through files in ``folder``.

    Args:
        model: its tower and key make the queries, its bank answers.
        image_processor: of the tower.
        samples: training samples, and evaluation samples in the same go.
        folder: gets the table, under a name of its own per bank, samples and K.
        batch_size: images encoded at once.
        device: where the tower runs; where it is when None.
        timeout: seconds to wait for other ranks.

    Raises:
        ValueError: a model without a bank, no sample with an image, or one whose image cannot be read.
    """
    memory = model.memory
    seen = [sample for sample in samples if sample.images]
    if memory is None or not seen:
        raise ValueError(
            f"find_neighbours: model must have a bank and samples must have images, got {memory} and {len(seen)} "
            f"samples with images. Attach a bank, or train with retrieval='off'."
        )
    k = model.config.num_neighbours
    own = torch.tensor([sample.sample_id for sample in seen])
    groups = torch.tensor([sample.group for sample in seen])
    name = _name(memory, model, own, groups, k)
    path, parts = Path(folder) / f"neighbours-{name}", Path(folder) / f".queries-{name}"
    if path.is_dir():
        return NeighbourTable.load(path, memory)
    share = share_of(len(seen), 1)
    parts.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(seen), CHUNK)
    files = [parts / f"{at:09d}.safetensors" for at in starts]
    encode = SampleEncoder(model.query_encoder, image_processor, None)
    if device is not None:
        model.vision.to(device)
    todo = [at for number, at in enumerate(starts) if number % share.ranks == share.rank]
    for at in tqdm(todo, desc="queries", unit_scale=CHUNK, unit="sample", disable=share.rank != 0 or len(starts) == 1):
        file = parts / f"{at:09d}.safetensors"
        if not file.exists():
            chunk = seen[at : at + CHUNK]
            rows = [encode.queries(chunk[low : low + batch_size]) for low in range(0, len(chunk), batch_size)]
            aside = file.with_suffix(".part")
            save_file({"queries": torch.cat(rows).float().cpu().contiguous()}, aside)
            aside.replace(file)
    if share.rank == 0:
        wait_until(lambda: all(file.exists() for file in files), timeout, "the other ranks to make their queries")
        batches = (load_file(file)["queries"] for file in files)
        precompute_neighbours(memory, batches, k, sample_ids=own, exclude_ids=own, exclude_groups=groups, path=path)
    else:
        wait_until(path.is_dir, timeout, "rank 0 to search")
    for at in todo:  # each rank its own: none makes again what another has just deleted
        (parts / f"{at:09d}.safetensors").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        parts.rmdir()  # by whoever comes last
    return NeighbourTable.load(path, memory)


def _name(memory: MemoryBank, model: TinyAlignVLM, own: Tensor, groups: Tensor, k: int) -> str:
    """Name a search by everything that its result depends on."""
    digest = xxhash.xxh3_64()
    for part in (memory.content_hash(), str(sorted(model.query_encoder.key_fingerprint().items())), str(k)):
        digest.update(part.encode())
    for numbers in (own, groups, memory.groups):
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()
