"""Image-text samples: reading them, writing them as prompts, and collating them. No network."""

from tinyalign.data.collate import ImageTextProcessor, LengthReport, LlavaCollator
from tinyalign.data.digits import DigitScenes, Scene
from tinyalign.data.export import write_llava
from tinyalign.data.llava import LlavaDataset
from tinyalign.data.prompts import ChatRenderer, PlainRenderer, Rendered, Renderer, prompt_renderer
from tinyalign.data.questions import answers_of, questions_of
from tinyalign.data.records import IMAGE_PLACEHOLDER, Sample, Turn, load_image, stable_id
from tinyalign.data.sampling import Draw, draw_records
from tinyalign.data.streams import Columns, Gathered, gather_rows
from tinyalign.data.tokens import EncodedText, encode_text

__all__ = [
    "IMAGE_PLACEHOLDER",
    "ChatRenderer",
    "Columns",
    "DigitScenes",
    "Draw",
    "EncodedText",
    "Gathered",
    "ImageTextProcessor",
    "LengthReport",
    "LlavaCollator",
    "LlavaDataset",
    "PlainRenderer",
    "Rendered",
    "Renderer",
    "Sample",
    "Scene",
    "Turn",
    "answers_of",
    "draw_records",
    "encode_text",
    "gather_rows",
    "load_image",
    "prompt_renderer",
    "questions_of",
    "stable_id",
    "write_llava",
]
