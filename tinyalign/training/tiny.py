"""A whole experiment in a folder, made on the spot: pictures, parts and a bank, to try scripts with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from tinyalign.data import DigitScenes, write_llava
from tinyalign.memory import AttentionPooledKey, build_memory_bank
from tinyalign.models import PairEncoder, SampleEncoder
from tinyalign.models.tiny import write_tiny_parts
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes
from tinyalign.training.parts import note_key


class TinyExperiment(NamedTuple):
    """Where everything is that a training script asks for.

    Args:
        images: folder of the pictures.
        train: LLaVA-format file of the training records.
        heldout: likewise, of other records.
        vision: folder of the tower.
        llm: folder of the language model and its tokenizer.
        memory: folder of the bank.
    """

    images: Path
    train: Path
    heldout: Path
    vision: Path
    llm: Path
    memory: Path


def write_tiny_experiment(folder: str | Path, num_scenes: int = 96, *, task: str = "caption") -> TinyExperiment:
    """Write digit scenes as LLaVA files, an untrained tower and language model, and a bank of other scenes.

    May be called by all processes of a launcher with one folder (`shared_folder`): one writes, all build the bank.

    Args:
        folder: where to.
        num_scenes: scenes per split.
        task: what is asked about them, see `DigitScenes`.

    Example:
        >>> import tempfile
        >>> made = write_tiny_experiment(tempfile.mkdtemp(), 4)
        >>> sorted(path.name for path in made.memory.iterdir())
        ['bank', 'memory.json']
    """
    folder = Path(folder)
    state = PartialState()
    scenes = {split: DigitScenes(split, num_scenes, task=task) for split in ("memory", "train", "heldout")}
    made = TinyExperiment(
        folder / "images", folder / "train.json", folder / "heldout.json", folder / "vision", folder / "llm",
        folder / "memory",
    )  # fmt: skip
    if state.is_main_process:
        write_tiny_parts(folder, [turn.text for sample in scenes["train"] for turn in sample.turns])
        for split, path in (("train", made.train), ("heldout", made.heldout)):
            write_llava(scenes[split], path, made.images)
        note_key(made.memory, vision=str(made.vision), vision_layer=-2, alpha=0.4)
    state.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(made.llm)
    sizes = PerceiverSizes(token_dim=32, num_latents=4, latent_dim=32, num_self_attends=2)
    compressor = PerceiverCompressor(64, vocab_size=len(tokenizer), sizes=sizes)
    encoder = PairEncoder(AutoModel.from_pretrained(made.vision), compressor, AttentionPooledKey())
    encode = SampleEncoder(encoder, AutoImageProcessor.from_pretrained(made.vision), tokenizer)
    build_memory_bank(scenes["memory"], encode, made.memory / "bank", fingerprint=encode.fingerprint(), progress=False)
    return made
