"""The collator of a run: prompts, pictures, length budget, and what every sample retrieves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tinyalign.data import LlavaCollator, Renderer, Sample
from tinyalign.models import TinyAlignProcessor, TinyAlignVLM
from tinyalign.training.neighbours import NeighbourFeed, find_neighbours


def collator_for(
    model: TinyAlignVLM,
    processor: TinyAlignProcessor,
    samples: Sequence[Sample],
    folder: str | Path,
    *,
    renderer: Renderer | None = None,
    max_length: int | None = None,
    device: torch.device | str | None = None,
) -> LlavaCollator:
    """Make the collator that a model's arm needs; for the method's arm all neighbours are found here, once.

    Args:
        model: says which arm, how many neighbours and which seed.
        processor: of the model.
        samples: everything that will be collated: training and evaluation samples.
        folder: gets the table of neighbours.
        renderer: as for `LlavaCollator`.
        max_length: positions per row, retrieval included; never more than the language model has.
        device: where the tower makes the queries.
    """
    config = model.config
    limit = getattr(config.text_config, "max_position_embeddings", None)
    length = min(number for number in (max_length, limit) if number) if max_length or limit else None
    arm, feed = config.retrieval, None
    if arm != "self":  # the leak is searched for in the model
        table = (
            find_neighbours(model, processor.image_processor, samples, folder, device=device) if arm == "bank" else None
        )
        feed = NeighbourFeed(model.memory, arm, k=config.num_neighbours, seed=config.retrieval_seed, table=table)
    return LlavaCollator(processor, renderer=renderer, max_length=length, extra=feed)
