"""The composed model, and what plugs retrieval into anyone else's."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from tinyalign.models.attach import attach_memory
from tinyalign.models.attach_checkpoint import load_attached
from tinyalign.models.attached import AttachedVLM
from tinyalign.models.configuration import IMAGE_TOKEN_ID, TinyAlignConfig
from tinyalign.models.flops import FlopCount, count_flops
from tinyalign.models.outputs import Retrieved, TinyAlignOutput
from tinyalign.models.pair_encoder import EncodedPair, PairEncoder
from tinyalign.models.processor import TinyAlignProcessor
from tinyalign.models.rag_inputs import instruction_of, splice_rag
from tinyalign.models.rag_query import TowerQuery, token_codes
from tinyalign.models.retrieval import ARMS, arm_neighbours
from tinyalign.models.sample_encoder import SampleEncoder
from tinyalign.models.splice import SplicedBatch, splice_tokens
from tinyalign.models.vision import VisionFeatures, pack_images
from tinyalign.models.vlm import TinyAlignVLM

# So that AutoConfig, AutoModelForImageTextToText and AutoProcessor open what these classes saved.
AutoConfig.register(TinyAlignConfig.model_type, TinyAlignConfig, exist_ok=True)
AutoModel.register(TinyAlignConfig, TinyAlignVLM, exist_ok=True)
AutoModelForImageTextToText.register(TinyAlignConfig, TinyAlignVLM, exist_ok=True)
AutoProcessor.register(TinyAlignConfig, TinyAlignProcessor, exist_ok=True)

__all__ = [
    "ARMS",
    "IMAGE_TOKEN_ID",
    "AttachedVLM",
    "EncodedPair",
    "FlopCount",
    "PairEncoder",
    "Retrieved",
    "SampleEncoder",
    "SplicedBatch",
    "TinyAlignConfig",
    "TinyAlignOutput",
    "TinyAlignProcessor",
    "TinyAlignVLM",
    "TowerQuery",
    "VisionFeatures",
    "arm_neighbours",
    "attach_memory",
    "count_flops",
    "instruction_of",
    "load_attached",
    "pack_images",
    "splice_rag",
    "splice_tokens",
    "token_codes",
]
