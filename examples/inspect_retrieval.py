r"""A page that shows what is retrieved: queries, their neighbours with captions and scores, and what exclusion did.

    python examples/inspect_retrieval.py --model runs/stage1 --data train.json --images images/ \
        --bank-data pretrain.json --bank-images images/ --output runs/retrieval.html
    python examples/inspect_retrieval.py            # scenes of handwritten digits; runs/retrieval.html

Look at it before believing a number: neighbours that have nothing to do with the query, one entry that everybody finds,
or a sample that finds itself are seen at a glance. For every query there are two rows: what training retrieves (never
the sample itself, never another record of its image), and what it would retrieve without that, with the leaks marked.
`--ids` chooses records by id; otherwise `--num` are drawn. The page needs nothing beside it and has a dark form. On the
digits each query then finds itself first in the second row, and in the first row scenes that share its digits or
colours.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyalign.data import DigitScenes, LlavaDataset, Sample, load_image
from tinyalign.memory import AttentionPooledKey, LeakageReport, MemoryBank, Neighbours, hub_report, leakage_report
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignProcessor, TinyAlignVLM
from tinyalign.models.digit_parts import DigitRecipe, load_digit_parts
from tinyalign.models.frozen import compress_samples, freeze_samples, frozen_bank
from tinyalign.models.sample_encoder import caption_of
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes

SCENES = 1500  # of digits, with a caption and a question each, so that there are twins to be excluded
PICTURE = 128  # longest side on the page, in pixels
STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--soft:#777;--line:#ddd;--query:#eef3fb;--leak:#d1495b}
@media(prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#16181c;--soft:#999;--line:#33363c;--query:#20262f}}
body{font:15px/1.45 system-ui;margin:2rem auto;max-width:78rem;padding:0 1rem;color:var(--ink);background:var(--paper)}
section{border-top:1px solid var(--line);padding:1rem 0;overflow-x:auto}
.row{display:flex;gap:.7rem;align-items:flex-start;margin:.4rem 0}
.row>p{flex:0 0 7rem;margin:0;color:var(--soft)}
figure{flex:0 0 9rem;margin:0;padding:.4rem;border:2px solid transparent;border-radius:.4rem}
figure.query{background:var(--query)}figure.leak{border-color:var(--leak)}
img{width:100%;image-rendering:auto;border-radius:.2rem;display:block}
figcaption{font-size:13px;overflow-wrap:anywhere}small{color:var(--soft)}.leak small{color:var(--leak)}
pre{overflow-x:auto;color:var(--soft)}
"""


class Case(NamedTuple):
    """What is inspected: a bank, who asks it, and how an entry's image is found."""

    memory: MemoryBank
    samples: Sequence[Sample]
    queries: Tensor
    image_of: Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a saved TinyAlignVLM; its bank is found, and its tower asks")
    parser.add_argument("--bank", type=Path, help="the bank's folder, if it is no longer where the model was told")
    parser.add_argument("--data", type=Path, help="LLaVA-format JSON with the records that ask")
    parser.add_argument("--images", type=Path, help="folder that their image paths start from")
    parser.add_argument("--bank-data", type=Path, help="LLaVA-format JSON that the bank was built from, for images")
    parser.add_argument("--bank-images", type=Path, help="folder that its image paths start from")
    parser.add_argument("--ids", nargs="+", help="records to show")
    parser.add_argument("--num", type=int, default=12, help="records to draw when --ids is absent")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/retrieval.html"))
    parser.add_argument("--smoke", action="store_true", help="few digit scenes and parts that learned nothing")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.model is not None and (args.data is None or args.images is None):
        parser.error("--model needs --data and --images")
    case = digits(args.smoke) if args.model is None else saved(args)
    chosen = choose(case.samples, args)
    own, groups = (torch.tensor([getattr(s, name) for s in case.samples]) for name in ("sample_id", "group"))
    asked = case.queries[chosen]
    kept = case.memory.neighbours(asked, args.k, exclude_ids=own[chosen], exclude_groups=groups[chosen])
    leaky = case.memory.neighbours(asked, args.k)
    report = leakage_report(case.memory, case.queries, own, groups, k=args.k)
    hubs = hub_report(case.memory, case.queries, args.k, exclude_ids=own, exclude_groups=groups)
    said = (
        f"{report}\nbusiest entry: {hubs.busiest_id}, found by {hubs.busiest_count} of {len(case.samples)}; "
        f"never found: {hubs.never_retrieved:.0%} of {len(case.memory)} entries"
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page(case, chosen, kept, leaky, said), encoding="utf-8")
    print(said)
    print(reading(report))
    print(f"open {args.output} in a browser")


def saved(args: argparse.Namespace) -> Case:
    """A trained model, its bank, and the records of a file."""
    memory = None if args.bank is None else MemoryBank.load(args.bank, mmap=True)
    model = TinyAlignVLM.from_pretrained(args.model, memory=memory)
    if model.memory is None:
        raise SystemExit(f"{args.model} names no bank that exists: give --bank")
    processor = TinyAlignProcessor.from_pretrained(args.model)
    samples = [sample for sample in LlavaDataset(args.data, args.images) if sample.images]
    encode = SampleEncoder(model.query_encoder, processor.image_processor, processor.tokenizer)
    queries = torch.cat([encode.queries(samples[at : at + 64]) for at in range(0, len(samples), 64)])
    pictures: dict[int, Any] = {}
    if args.bank_data is not None:
        pictures = {
            sample.sample_id: sample.images[0]
            for sample in LlavaDataset(args.bank_data, args.bank_images)
            if sample.images
        }
    return Case(model.memory, samples, queries.float(), pictures.get)


def digits(smoke: bool) -> Case:
    """Scenes that are in the bank themselves: each as a caption and as a question, which are twins."""
    sizes = {"tower_steps": 5, "language_steps": 5, "batch_size": 16, "num_scenes": 64, "hidden_dim": 48}
    parts = load_digit_parts(DigitRecipe(**sizes) if smoke else DigitRecipe())
    compressor = PerceiverCompressor(
        parts.vision_tower.config.hidden_size,
        vocab_size=len(parts.tokenizer),
        sizes=PerceiverSizes(token_dim=32, num_latents=2, latent_dim=16, num_self_attends=1, num_heads=2),
    )
    pair = PairEncoder(parts.vision_tower, compressor, AttentionPooledKey())
    encode = SampleEncoder(pair, parts.image_processor, parts.tokenizer)
    scenes = DigitScenes("train", 40 if smoke else SCENES, task="both")
    per_scene = scenes.samples_per_scene
    samples = [scenes[n * per_scene + which] for n in range(scenes.num_scenes) for which in (0, 1)]
    frozen = freeze_samples(samples, encode)
    pictures = {sample.sample_id: sample.images[0] for sample in samples}
    bank = frozen_bank(frozen, compress_samples(frozen, encode))
    captions = frozen.take(range(0, len(samples), 2))
    return Case(bank, captions.samples, captions.queries[captions.image_of], pictures.get)


def choose(samples: Sequence[Sample], args: argparse.Namespace) -> list[int]:
    """Places of the records to show."""
    if args.ids is None:
        return np.random.default_rng(args.seed).permutation(len(samples))[: args.num].tolist()
    place = {sample.id: at for at, sample in enumerate(samples)}
    unknown = [name for name in args.ids if name not in place]
    if unknown:
        raise SystemExit(f"--ids must name records of {args.data or 'the digit scenes'}, got {unknown[0]!r}")
    return [place[name] for name in args.ids]


def reading(report: LeakageReport) -> str:
    """What the counts mean, in a sentence."""
    plain, kept = report.without_exclusion, report.with_exclusion
    if kept.self_hits or kept.group_hits:
        return "LEAK: excluded entries were retrieved all the same. Report this."
    close = f"; {kept.near_duplicate_rate:.1%} still find a near-duplicate" if kept.near_duplicates else ""
    if not plain.self_hits and not plain.group_hits:
        return f"None of these records is in the bank, so exclusion changes nothing{close}."
    return (
        f"Without exclusion {plain.self_rate:.1%} of the queries would retrieve themselves and {plain.group_rate:.1%} "
        f"another record of their image; with it none does{close}."
    )


def page(case: Case, chosen: list[int], kept: Neighbours, leaky: Neighbours, said: str) -> str:
    """The whole page as text."""
    group_of = dict(zip(case.memory.ids.tolist(), case.memory.groups.tolist(), strict=True))
    sections = []
    for row, at in enumerate(chosen):
        sample = case.samples[at]
        query = figure(sample.images[0], caption_of(sample), f"query {sample.id}", "query")
        rows = []
        for name, found in (("retrieved", kept), ("without exclusion", leaky)):
            cells = []
            for entry, score, there in zip(
                found.ids[row].tolist(), found.scores[row].tolist(), found.mask[row].tolist(), strict=True
            ):
                if not there:
                    cells.append("<figure><small>none left</small></figure>")
                    continue
                itself = entry == sample.sample_id
                twin = not itself and group_of[entry] == sample.group and sample.group >= 0
                note = f"{score:.3f}{', itself' if itself else ', same image' if twin else ''}"
                text = case.memory.metadata([entry])[0].get("text", "")
                cells.append(figure(case.image_of(entry), text, note, "leak" if itself or twin else ""))
            rows.append(f'<div class="row"><p>{name}</p>{"".join(cells)}</div>')
        new = len(set(kept.ids[row].tolist()) - set(leaky.ids[row].tolist()) - {-1})
        sections.append(
            f'<section><div class="row"><p>query</p>{query}<p>excluding replaced {new} of {kept.ids.shape[1]}</p></div>'
            f"{''.join(rows)}</section>"
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>What is retrieved</title><style>{STYLE}</style><h1>What is retrieved</h1>"
        f"<pre>{html.escape(said)}</pre>{''.join(sections)}</html>\n"
    )


def figure(image: Any, text: str, note: str, kind: str) -> str:
    picture = "" if image is None else f'<img alt="" src="{embedded(image)}">'
    return f'<figure class="{kind}">{picture}<figcaption>{html.escape(text)}<br><small>{html.escape(note)}</small></figcaption></figure>'  # noqa: E501


def embedded(image: Any) -> str:
    """The picture as text inside the page; small ones are enlarged without blur."""
    picture = load_image(image)
    if max(picture.size) < PICTURE:
        factor = PICTURE // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((PICTURE, PICTURE))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


if __name__ == "__main__":
    main()
