"""Random parts in a folder: a vision tower and a language model that ``from_pretrained`` opens, in a second."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class TinyParts(NamedTuple):
    """Where the parts are: each folder opens with ``from_pretrained``."""

    vision: Path
    llm: Path


def write_tiny_parts(folder: str | Path, texts: Iterable[str], *, image_size: int = 32, seed: int = 0) -> TinyParts:
    """Save an untrained SigLIP-architecture tower and an untrained Llama-architecture model with a word tokenizer.

    For trying scripts and tests where nothing can be downloaded: every step runs as it would with real parts, and
    nothing that is measured with them means anything.

    Args:
        folder: gets the folders ``vision`` and ``llm``.
        texts: what the tokenizer's words are taken from.
        image_size: side of the tower's pictures.
        seed: of the weights.

    Example:
        >>> import tempfile
        >>> from transformers import AutoTokenizer
        >>> parts = write_tiny_parts(tempfile.mkdtemp(), ["a red shape"])
        >>> AutoTokenizer.from_pretrained(parts.llm).tokenize("a red shape")
        ['a', 'red', 'shape']
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=image_size,
                patch_size=8,
            )
        )
        tokenizer = _word_tokenizer(texts)
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=512,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    vision.save_pretrained(folder / "vision")
    SiglipImageProcessorPil(size={"height": image_size, "width": image_size}).save_pretrained(folder / "vision")
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return TinyParts(folder / "vision", folder / "llm")


def _word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    words = [word for word in (*words, "USER", "ASSISTANT", ":", "?", ".") if word not in _SPECIAL]
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys([*_SPECIAL, *words]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = splitter
    inner.add_special_tokens(list(_SPECIAL))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
