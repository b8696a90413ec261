"""A language model that reads facts about digits in words: its vocabulary, its texts and its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyalign.data.digits import CAPTION_PROMPT, COLOURS, caption_of, question_of
from tinyalign.models.descent import Descent, descend
from tinyalign.models.word_parts import padded

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_FILLER = "so here we see note it there page line look near some ink on with"
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %} ask {{ message.content }}"
    "{% else %} answer {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} answer{% endif %}"
)
# Texts of every length from here on: a model that only read long prefixes is helped by any filler after a short one.
_SHORTEST_PREFIX = 8
_REHEARSAL = 0.45  # of the steps
_REHEARSED_WORDS = 56


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word that a scene is described, asked about or answered with."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*_SPECIAL, "ask", "answer", "and", "a", "what", "color", "is", "which", "digit", "the", "?", "."]
    words += [*CAPTION_PROMPT.split(), *COLOURS, *map(str, range(10)), *_FILLER.split()]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def tell(
    facts: Sequence[tuple[str, int]], length: int, rng: np.random.Generator, *, contradicted: float = 0.3
) -> list[str]:
    """Write facts among filler: each one to six times, now and then with contradicting ones that are rarer."""
    mentions = [fact for fact in facts for _ in range(int(rng.integers(1, 5)))]
    if rng.random() < contradicted:
        colours = list(COLOURS)
        wrong = [(colours[rng.integers(4)], int(rng.integers(10))) for _ in range(int(rng.integers(1, 4)))]
        mentions += [*wrong, *facts, *facts]
    rng.shuffle(mentions)
    words = [str(word) for word in rng.choice(_FILLER.split(), size=length)]
    places = 2 * rng.choice(length // 2, size=min(len(mentions), length // 2), replace=False)
    for place, (colour, digit) in zip(places.tolist(), mentions, strict=False):
        words[place] = str(colour)
        words[place + 1] = str(digit)
    return words


def train_language_model(
    tokenizer: Any,
    *,
    width: int,
    steps: int,
    rows: int,
    longest_prefix: int,
    seed: int = 0,
    binding: bool = False,
    track: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> LlamaForCausalLM | Lfm2ForCausalLM:
    """Train on text alone: facts among other words come first, a caption or an answer follows.

    A Llama of three layers learns within these steps which colours and digits were named, and not which colour is
    whose: of questions that words answer it answers half. Two things together teach that: short convolutions, by which
    a word knows the one before it, and first some texts in which every word is learned.

    Args:
        tokenizer: of `make_tokenizer`.
        width: of the hidden states.
        steps: optimiser steps.
        rows: texts per step.
        longest_prefix: words before the prompt in the longest texts.
        seed: of the texts; weights are drawn from torch's global state.
        binding: whether to teach which colour is whose, with an LFM2 in place of a Llama.
        track: wraps the steps with a progress display.

    Raises:
        RuntimeError: the training diverged.

    Source:
        Liquid AI 2025, arXiv 2511.23404 (LFM2); Arora et al. 2023, arXiv 2312.04927 (short convolutions and recall).
    """
    model = (_binding_model if binding else _plain_model)(tokenizer, width)
    rng = np.random.default_rng(seed)
    rehearsed = int(_REHEARSAL * steps) if binding else 0

    def loss_of(step: int) -> Tensor:
        if step < rehearsed:
            ids = labels = _rehearsals(tokenizer, rows, rng)
        else:
            # Short texts first: finding facts among filler is learned several times sooner that way.
            reach = 0.2 + 0.8 * min(1.0, 1.5 * (step - rehearsed) / (steps - rehearsed))
            ids, labels = _texts(tokenizer, rows, max(12, int(reach * longest_prefix)), rng)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # padded on the right: no mask is needed
        learned = labels[:, 1:] != -100
        return F.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])

    descend(
        loss_of,
        model.parameters(),
        Descent(steps, 3e-3, warmup=0.12, weight_decay=0.02, to_zero=True),
        where="train_language_model",
        advice="Use another seed in the recipe.",
        track=track,
    )
    return model.eval()


def _plain_model(tokenizer: Any, width: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, tie_word_embeddings=True, **_sizes(tokenizer, width)))


def _binding_model(tokenizer: Any, width: int) -> Lfm2ForCausalLM:
    layers = ["conv", "full_attention", "full_attention"]
    config = Lfm2Config(
        num_hidden_layers=len(layers), layer_types=layers, block_auto_adjust_ff_dim=False,
        initializer_range=width**-0.5, **_sizes(tokenizer, width),
    )  # fmt: skip
    return Lfm2ForCausalLM(config)


def _sizes(tokenizer: Any, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _rehearsals(tokenizer: Any, rows: int, rng: np.random.Generator) -> Tensor:
    """Facts said over and over, and questions about them with their answers, (rows, words): every word is learned."""
    texts = []
    for _ in range(rows):
        facts = _facts(rng, int(rng.integers(2, 5)))
        words = [word for colour, digit in facts for word in (colour, str(digit))]
        while len(words) < _REHEARSED_WORDS:
            which = int(rng.integers(len(facts)))
            if rng.random() < 0.5:
                colour, digit = facts[which]
                words += [colour, str(digit)]
            else:
                asked, answer = question_of(facts, 2 * which + int(rng.integers(2)))
                words += f"{asked} answer {answer}".split()
        texts.append(tokenizer.convert_tokens_to_ids(words[:_REHEARSED_WORDS]))
    return torch.tensor(texts)


def _texts(tokenizer: Any, rows: int, longest: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Facts among filler, then a caption or an answer, which alone is learned: ids and labels, padded on the right."""
    encoded: list[tuple[list[int], list[int]]] = []
    for _ in range(rows):
        facts = _facts(rng, 2)
        asked, answer = (CAPTION_PROMPT, caption_of(facts))
        if rng.random() < 0.4:
            asked, answer = question_of(facts, int(rng.integers(4)))
        told = tell(facts, int(rng.integers(_SHORTEST_PREFIX, longest + 1)), rng)
        prompt = f"<s> ask {' '.join(told)} {asked} answer"
        encoded.append(
            (tokenizer.convert_tokens_to_ids(prompt.split()), tokenizer.convert_tokens_to_ids(f"{answer} </s>".split()))
        )
    return padded(encoded)


def _facts(rng: np.random.Generator, number: int) -> list[tuple[str, int]]:
    """Distinct colours and digits, in pairs."""
    digits = [int(digit) for digit in rng.choice(10, number, replace=False)]
    return list(zip([str(colour) for colour in rng.choice(list(COLOURS), number, replace=False)], digits, strict=True))
