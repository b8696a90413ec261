"""Tokenizers and processors built on the spot; nothing is read from outside the repository."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, bos: bool, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, so that every expectation can be spelled out by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
    vocab |= {symbol: len(vocab) + at for at, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        fast.chat_template = CHATML
    return fast


class SlowTokenizer:
    """A tokenizer without offsets: the code must cut the text at the answers' borders itself."""

    is_fast, chat_template, bos_token, eos_token, pad_token_id = False, None, None, "\n", 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(symbol) for symbol in text]}


def image_processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
    assert return_tensors == "pt"
    return {"pixel_values": torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() for i in images])}


def make_processor(tokenizer: Any, *, num_image_tokens: int = 3, num_retrieval_tokens: int = 0) -> Any:
    return SimpleNamespace(
        tokenizer=tokenizer,
        image_processor=image_processor,
        num_image_tokens=num_image_tokens,
        num_retrieval_tokens=num_retrieval_tokens,
        image_token_id=-200,
    )


@pytest.fixture(scope="session")
def build_tokenizer() -> Any:
    return byte_tokenizer


@pytest.fixture(scope="session")
def slow_tokenizer() -> Any:
    return SlowTokenizer()


@pytest.fixture(scope="session")
def build_processor() -> Any:
    return make_processor
