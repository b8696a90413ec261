"""What training scripts share: a trainer whose checkpoints survive, neighbours found once, parts by name."""

from tinyalign.training.batches import collator_for
from tinyalign.training.checkpoints import CheckpointError, last_whole_checkpoint, load_trained, save_trained
from tinyalign.training.launch import accumulation_steps, precision, precision_dtype, shared_folder, stage_arguments
from tinyalign.training.neighbours import NeighbourFeed, find_neighbours
from tinyalign.training.parts import MemoryFolder, compose, note_key, open_memory
from tinyalign.training.records import CheckedSamples, check_samples, read_samples
from tinyalign.training.tiny import TinyExperiment, write_tiny_experiment
from tinyalign.training.trainer import StageTrainer

__all__ = [
    "CheckedSamples",
    "CheckpointError",
    "MemoryFolder",
    "NeighbourFeed",
    "StageTrainer",
    "TinyExperiment",
    "accumulation_steps",
    "check_samples",
    "collator_for",
    "compose",
    "find_neighbours",
    "last_whole_checkpoint",
    "load_trained",
    "note_key",
    "open_memory",
    "precision",
    "precision_dtype",
    "read_samples",
    "save_trained",
    "shared_folder",
    "stage_arguments",
    "write_tiny_experiment",
]
