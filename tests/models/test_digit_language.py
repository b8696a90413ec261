"""What the small language models of the digit scenes read, and what the one learns that the other does not."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import Lfm2ForCausalLM, LlamaForCausalLM

from tinyalign.data import DigitScenes
from tinyalign.data.digits import COLOURS
from tinyalign.models import digit_language
from tinyalign.models.digit_language import _rehearsals, _texts, make_tokenizer, train_language_model
from tinyalign.models.digit_parts import DigitParts, DigitRecipe, load_binding_reader, load_digit_parts, told_in_words

TOKENIZER = make_tokenizer()
TINY = DigitRecipe(tower_steps=2, language_steps=10, batch_size=8, num_scenes=16, hidden_dim=24)


def test_a_rehearsal_never_contradicts_itself_and_answers_its_own_questions():
    ids = _rehearsals(TOKENIZER, 200, np.random.default_rng(0))
    assert ids.shape == (200, 56)
    asked = {"what": 0, "which": 0}
    for row in ids.tolist():
        words = TOKENIZER.convert_ids_to_tokens(row)
        facts = {(a, b) for a, b in pairwise(words) if a in COLOURS and b.isdigit()}
        assert 2 <= len(facts) <= 4
        assert len({a for a, _ in facts}) == len({b for _, b in facts}) == len(facts)
        for place, word in enumerate(words[:-8]):  # questions that were cut off have no answer
            if word == "what":
                assert (words[place + 7], words[place + 4]) in facts
            elif word == "which":
                assert (words[place + 3], words[place + 6]) in facts
            asked[word] = asked.get(word, 0) + 1
    assert min(asked["what"], asked["which"]) > 300


def test_of_a_text_only_the_answer_is_learned():
    ids, labels = _texts(TOKENIZER, 64, 40, np.random.default_rng(0))
    kinds = set()
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        words = [word for word in TOKENIZER.convert_ids_to_tokens(row) if word != "<pad>"]
        start = words.index("answer") + 1
        learned = [at for at, each in enumerate(label) if each != -100]
        assert learned == list(range(start, len(words)))
        assert [label[at] for at in learned] == row[start : len(words)]
        assert words[-1] == "</s>"
        kinds.add(len(words) - start)
    assert kinds == {3, 9}  # answers and captions


@pytest.mark.parametrize(("binding", "kind"), [(False, LlamaForCausalLM), (True, Lfm2ForCausalLM)])
def test_both_readers_train_and_the_seed_decides(binding, kind):
    def run(seed):
        torch.manual_seed(0)
        told = {"width": 32, "steps": 12, "rows": 8, "longest_prefix": 24, "binding": binding}
        return train_language_model(TOKENIZER, seed=seed, **told)

    first, again, other = run(0), run(0), run(1)
    assert type(first) is kind
    assert not first.training
    same, differ = (
        [torch.equal(a, b) for a, b in zip(first.parameters(), them.parameters(), strict=True)]
        for them in (again, other)
    )
    assert all(same)
    assert not any(differ)


@pytest.mark.parametrize(("binding", "rehearsals"), [(False, 0), (True, 9)])
def test_only_the_binding_reader_rehearses_and_only_at_first(binding, rehearsals, monkeypatch):
    drawn = []

    def watch(name):
        real = getattr(digit_language, name)
        monkeypatch.setattr(digit_language, name, lambda *given: drawn.append(name) or real(*given))

    watch("_rehearsals")
    watch("_texts")
    train_language_model(TOKENIZER, width=16, steps=20, rows=2, longest_prefix=16, binding=binding)
    assert drawn == ["_rehearsals"] * rehearsals + ["_texts"] * (20 - rehearsals)


def test_the_binding_reader_is_trained_once_and_takes_the_place_of_the_other(tmp_path):
    labels = []

    def track(steps, label):
        labels.append(label)
        return steps

    reader = load_binding_reader(TINY, cache_dir=tmp_path, track=track)
    assert labels == ["language model, on text only"]
    assert isinstance(reader, Lfm2ForCausalLM)
    assert not reader.training
    assert not any(weight.requires_grad for weight in reader.parameters())
    again = load_binding_reader(TINY, cache_dir=tmp_path, track=track)
    assert len(labels) == 1
    assert all(torch.equal(a, b) for a, b in zip(reader.parameters(), again.parameters(), strict=True))
    parts = load_digit_parts(TINY, cache_dir=tmp_path)
    assert isinstance(parts.language_model, LlamaForCausalLM)  # the two caches are kept apart
    assert reader.config.hidden_size == parts.language_model.config.hidden_size
    told = told_in_words(parts._replace(language_model=reader), DigitScenes("heldout", 4))
    assert 0.0 <= told <= 1.0
    load_binding_reader(TINY, cache_dir=tmp_path, retrain=True, track=track)
    assert len(labels) == 2


def test_loading_the_binding_reader_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(3)
    load_binding_reader(TINY, cache_dir=tmp_path)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.slow
def test_told_in_words_one_reader_answers_and_the_other_tosses_a_coin():
    scenes = DigitScenes("heldout", 100, task="question")
    shares = {}
    for binding in (False, True):
        torch.manual_seed(0)
        model = train_language_model(TOKENIZER, width=128, steps=500, rows=64, longest_prefix=64, binding=binding)
        shares[binding] = told_in_words(DigitParts(None, None, model, TOKENIZER), scenes)
    assert 0.4 < shares[False] < 0.6
    assert shares[True] > 0.8
