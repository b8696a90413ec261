"""Compare keys by what they retrieve, how crowded they are, and how many entries are everybody's neighbour.

Recall@5 is the share of held-out questions with at least one neighbour of the same answer, precision the share of such
neighbours; "chance" is the recall of five entries drawn at random, "share" their precision. A sample of several
questions counts as several entries, all of them held out or none. Images are seen through frozen random features of
their patches, so that no weights are needed: the numbers rank keys against one another, not against a trained tower.
``--data FILE.json`` (LLaVA format, images in a folder ``images`` beside it or under ``--images``) adds a file of yours
to the digit scenes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyalign.data import DigitScenes, LlavaDataset, Sample, load_image
from tinyalign.memory import (
    AttentionPooledKey,
    KeyTransform,
    MemoryBank,
    SentenceTransformerKey,
    anisotropy_report,
    concatenate_keys,
    hub_report,
    retrieval_report,
)

K, SIDE, PATCH, FEATURES = 5, 32, 8, 192


def features(samples: Sequence[Sample]) -> Tensor:
    """Frozen random ReLU features of overlapping patches: (n, tokens, FEATURES)."""
    import numpy as np

    pixels = [np.asarray(load_image(s.images[0]).convert("RGB").resize((SIDE, SIDE))) for s in samples]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    patches = F.unfold(images, PATCH, stride=PATCH // 2).transpose(1, 2)  # (n, tokens, 3 * PATCH * PATCH)
    generator = torch.Generator().manual_seed(0)
    project = torch.randn(patches.shape[-1], FEATURES, generator=generator) / math.sqrt(patches.shape[-1])
    return F.relu((patches - patches.mean(-1, keepdim=True)) @ project)


class Asked(NamedTuple):
    """A question about an image, and its answer."""

    sample: int
    question: str
    answer: str


def questions(samples: Sequence[Sample]) -> list[Asked]:
    """The first line of every question of every sample."""
    return [
        Asked(number, ask.text.replace("<image>", "").strip().splitlines()[0], answer.text)
        for number, sample in enumerate(samples)
        for ask, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True)
    ]


def bag_of_words(texts: Sequence[str], folder: Path) -> Path:
    """A sentence-transformers model of inverse document frequencies, made from the bank's own questions and saved."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    tokens = [set(text.lower().replace("?", " ").split()) for text in texts]
    words = sorted(set().union(*tokens))
    weights = {word: math.log((1 + len(texts)) / (1 + sum(word in t for t in tokens))) + 1e-3 for word in words}
    SentenceTransformer(modules=[BoW(words, weights)], device="cpu").save(str(folder))
    return folder


def compare_keys(name: str, memory: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    known, asked = questions(memory), questions(held_out)
    print(f"\n{name}: {len(known)} entries, {len(asked)} held-out questions, k = {K}")
    print(f"  {'key':<46}{'recall':>8}{'chance':>8}{'precision':>11}{'share':>8}{'hub skew':>10}{'mean cos':>10}")
    pool = AttentionPooledKey()
    image, image_query = (
        torch.cat([pool(features(part[i : i + 64])) for i in range(0, len(part), 64)])[
            [each.sample for each in entries]
        ]
        for part, entries in ((memory, known), (held_out, asked))
    )
    with tempfile.TemporaryDirectory() as folder:
        words = SentenceTransformerKey(bag_of_words([each.question for each in known], Path(folder)), device="cpu")
        text, text_query = (words.keys([each.question for each in part]) for part in (known, asked))
    white, centre = KeyTransform.fit(image, whiten=True, dim=48), KeyTransform.fit(image)
    near, near_query = (F.normalize(white(F.normalize(part, dim=-1)), dim=-1) for part in (image, image_query))
    both, both_query = concatenate_keys([near, text]), concatenate_keys([near_query, text_query])
    rows: list[tuple[str, Tensor, Tensor, KeyTransform | None]] = [
        ("image, the paper's key", image, image_query, None),
        ("image, centred", image, image_query, centre),
        ("image, whitened to 48 dimensions", image, image_query, white),
        ("question, SentenceTransformerKey (bag of words)", text, text_query, None),
        ("whitened image and question, concatenated", both, both_query, None),
    ]
    answers = [each.answer for each in asked]
    notes = [{"answer": each.answer} for each in known]
    share = sum(answers.count(each.answer) for each in known) / (len(known) * len(asked))
    for label, keys, queries, transform in rows:
        bank = MemoryBank(keys.shape[1], (1,), transform=transform)
        bank.add(keys, torch.zeros(len(keys), 1), metadata=notes)
        found, hubs = retrieval_report(bank, queries, answers, "answer", k=K), hub_report(bank, queries, k=K)
        crowd = anisotropy_report(keys, transform).mean_cosine
        print(
            f"  {label:<46}{found.recall_at_k:>8.3f}{found.chance_at_k:>8.3f}{found.precision_at_k:>11.3f}{share:>8.3f}"
            f"{hubs.skewness:>10.2f}{crowd:>10.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--entries", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = DigitScenes("memory", options.entries // 4, task="question")
    compare_keys("Digit scenes", list(memory), list(DigitScenes("heldout", 100, task="question")))
    for path in options.data:
        samples = list(LlavaDataset(path, options.images or path.parent / "images"))
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        held = max(1, min(400, len(samples) // 5))
        chosen = [samples[i] for i in order[: options.entries + held] if len(samples[i].images) == 1]
        compare_keys(f"{path.parent.name}/{path.name}", chosen[held:], chosen[:held])


if __name__ == "__main__":
    main()
