"""What the language model of the digit scenes is told in words."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tinyalign.data import DigitScenes
from tinyalign.data.digits import COLOURS
from tinyalign.models.digit_language import make_tokenizer
from tinyalign.models.digit_parts import DigitParts, told_in_words

TOKENIZER = make_tokenizer()


class Reader:
    """Reads the facts by rule and writes the answer behind the prompt; `mistake` changes the answer's words."""

    def __init__(self, mistake=lambda words: words):
        self.mistake = mistake
        self.facts = []

    def __call__(self, input_ids):
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
        for row, ids in enumerate(input_ids.tolist()):
            words = [w for w in TOKENIZER.convert_ids_to_tokens(ids) if w != "<pad>"]
            start = words.index("answer")
            asked = words[:start]
            told = {(a, b) for a, b in pairwise(asked) if a in COLOURS and b.isdigit()}
            self.facts.append(told)
            if "which" in asked:
                colour = asked[-2]
                answer = [digit for c, digit in told if c == colour] + ["."]
            elif "what" in asked:
                digit = asked[-2]
                answer = [c for c, d in told if d == digit] + ["."]
            else:
                (c1, d1), (c2, d2) = sorted(told, key=lambda fact: int(fact[1]))
                answer = ["a", c1, d1, "and", "a", c2, d2, "."]
            for place, word in enumerate(self.mistake([*answer, "</s>"])):
                logits[row, start + place, TOKENIZER.convert_tokens_to_ids(word)] = 1.0
        return SimpleNamespace(logits=logits)


def told(reader, scenes, **options):
    return told_in_words(DigitParts(None, None, reader, TOKENIZER), scenes, **options)


@pytest.mark.parametrize("task", ["caption", "question"])
def test_whoever_reads_what_is_told_answers_all_and_a_wrong_last_word_counts_as_wrong(task):
    scenes = DigitScenes("heldout", 6, task=task)
    reader = Reader()
    assert told(reader, scenes, batch_size=4) == 1.0
    images = [scenes.scene(number) for number in range(6) for _ in range(scenes.samples_per_scene)]
    assert reader.facts == [set(zip(s.colours, map(str, s.digits), strict=True)) for s in images]
    assert told(Reader(lambda words: [*words[:-1], "."]), scenes) == 0.0


def test_the_share_is_of_answers():
    scenes = DigitScenes("heldout", 8, task="question")
    only_colours = Reader(lambda words: words if words[0] in COLOURS else ["red", *words[1:]])
    assert told(only_colours, scenes, batch_size=5) == 0.5
