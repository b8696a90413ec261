from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.data import ChatRenderer, PlainRenderer, Rendered, Turn, encode_text
from tinyalign.data.tokens import prefix_ids

TURNS = [Turn("user", "<image>\nWhat?"), Turn("assistant", "This."), Turn("user", "Sure?"), Turn("assistant", "Yes.")]

WORDS = st.text(alphabet=st.characters(exclude_characters="<", exclude_categories=("Cs",)), max_size=9)


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_without_a_template_the_prompt_is_llavas(build_tokenizer: Any) -> None:
    rendered = ChatRenderer(build_tokenizer(bos=False))(TURNS)
    assert rendered.text == "USER: <image>\nWhat? ASSISTANT: This.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert learned(rendered) == [" This.</s>", " Yes.</s>"]


def test_with_a_template_the_answers_and_their_end_are_learned(build_tokenizer: Any) -> None:
    rendered = ChatRenderer(build_tokenizer(bos=False, chat=True))([Turn("system", "Be brief."), *TURNS])
    assert learned(rendered) == ["This.<|im_end|>", "Yes.<|im_end|>"]
    assert rendered.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?")


@pytest.mark.parametrize("chat", [False, True])
def test_a_generation_prompt_is_what_training_showed_before_the_answer(build_tokenizer: Any, chat: bool) -> None:
    """The tokens before an answer must be the same in training and in generation."""
    tokenizer = build_tokenizer(bos=True, chat=chat)
    render = ChatRenderer(tokenizer)
    train = encode_text(tokenizer, render(TURNS[:2]), num_image_tokens=2, image_token_id=-200)
    ask = encode_text(tokenizer, render(TURNS[:1], add_generation_prompt=True), num_image_tokens=2, image_token_id=-200)
    assert train.input_ids[: train.supervised.index(True)] == ask.input_ids
    assert not any(ask.supervised)


def test_a_template_that_rewrites_earlier_turns_still_marks_the_answers(build_tokenizer: Any) -> None:
    """Reasoning models drop what earlier turns thought, so a prefix of the dialogue is no prefix of its text."""
    tokenizer = build_tokenizer(bos=False)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ loop.revindex }}]{{ m['role'] }}: {{ m['content'] | trim }};{% endfor %}"
    )
    assert learned(ChatRenderer(tokenizer)(TURNS)) == ["This.", "Yes."]


def test_a_template_that_drops_an_answer_is_refused(build_tokenizer: Any) -> None:
    tokenizer = build_tokenizer(bos=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }};{% endfor %}"
    with pytest.raises(ValueError, match=r"chat template must keep what the assistant says, got .*without 'This\.'"):
        ChatRenderer(tokenizer)(TURNS)


def test_plain_keeps_images_and_answers_only(build_tokenizer: Any) -> None:
    rendered = PlainRenderer(build_tokenizer(bos=True))([Turn("user", "Say.\n<image>"), Turn("assistant", " A rose. ")])
    assert rendered.text == "<image>A rose.</s>"
    assert learned(rendered) == ["A rose.</s>"]
    assert PlainRenderer(build_tokenizer(bos=True))(TURNS[:1], add_generation_prompt=True) == Rendered("<image>", ())


@pytest.mark.parametrize("bos", [False, True])
def test_what_the_tokenizer_puts_first_is_put_once(build_tokenizer: Any, bos: bool) -> None:
    tokenizer = build_tokenizer(bos=bos)
    assert prefix_ids(tokenizer) == ([1] if bos else [])
    row = encode_text(tokenizer, Rendered("<image>a<image>b", ()), num_image_tokens=1, image_token_id=-200)
    assert row.input_ids.count(1) == int(bos)
    again = encode_text(tokenizer, Rendered("<s><image>a", ()), num_image_tokens=1, image_token_id=-200)
    assert again.input_ids.count(1) == 1


@given(pieces=st.lists(WORDS, min_size=1, max_size=4), width=st.integers(1, 3))
def test_the_text_between_images_survives_and_every_image_gets_its_places(
    build_tokenizer: Any, pieces: list[str], width: int
) -> None:
    tokenizer = build_tokenizer(bos=False)
    text = "<image>".join(pieces)
    row = encode_text(tokenizer, Rendered(text, ()), num_image_tokens=width, image_token_id=-200)
    assert row.num_images == len(pieces) - 1
    assert row.input_ids.count(-200) == width * row.num_images
    assert tokenizer.decode([i for i in row.input_ids if i != -200]) == "".join(pieces)


@given(answer=WORDS.filter(bool), question=WORDS)
def test_supervised_tokens_decode_to_the_answer(build_tokenizer: Any, answer: str, question: str) -> None:
    tokenizer = build_tokenizer(bos=False)
    rendered = ChatRenderer(tokenizer)([Turn("user", "<image>" + question), Turn("assistant", answer)])
    row = encode_text(tokenizer, rendered, num_image_tokens=2, image_token_id=-200)
    kept = [token for token, learn in zip(row.input_ids, row.supervised, strict=True) if learn]
    assert tokenizer.decode(kept) == f" {answer}</s>"


def test_a_tokenizer_without_offsets_gives_the_same_marks(slow_tokenizer: Any) -> None:
    rendered = ChatRenderer(slow_tokenizer)(TURNS)
    row = encode_text(slow_tokenizer, rendered, num_image_tokens=2, image_token_id=-200)
    kept = "".join(chr(t) for t, learn in zip(row.input_ids, row.supervised, strict=True) if learn)
    assert kept == " This.\n Yes.\n"
    assert "".join(chr(t) for t in row.input_ids if t > 0) == rendered.text.replace("<image>", "")
