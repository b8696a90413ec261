"""Writing a conversation as one text, and saying which of its characters the model is to learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from tinyalign.data.records import IMAGE_PLACEHOLDER, Turn


class Rendered(NamedTuple):
    """A conversation as text.

    Args:
        text: all of it.
        spans: character ranges (start, end) of what the assistant says.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class Renderer(Protocol):
    """Anything that writes turns as text; the same object serves training and generation, so that they agree."""

    def __call__(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
        """Write the turns; with `add_generation_prompt`, end where the assistant's next answer begins."""
        ...


class ChatRenderer:
    """Write turns with the tokenizer's chat template where it has one, else as ``USER: ... ASSISTANT: ...``.

    Everything an assistant says is to be learned, up to and including the token that ends its turn. The words of
    users and systems never are.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Source:
        The form without a template is LLaVA's v1 prompt, Liu et al. 2023, arXiv 2310.03744, without its system line.

    Example:
        >>> class NoTemplate:
        ...     chat_template, eos_token = None, "</s>"
        >>> turns = [Turn("user", "What is red?"), Turn("assistant", "A rose.")]
        >>> rendered = ChatRenderer(NoTemplate())(turns)
        >>> rendered.text
        'USER: What is red? ASSISTANT: A rose.</s>'
        >>> start, end = rendered.spans[0]
        >>> rendered.text[start:end]
        ' A rose.</s>'
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
        """Write the turns, with the ranges of the assistant's words."""
        if getattr(self.tokenizer, "chat_template", None):
            return self._by_template(list(turns), add_generation_prompt)
        return self._by_words(turns, add_generation_prompt)

    def _by_words(self, turns: Sequence[Turn], add_generation_prompt: bool) -> Rendered:
        end_of_turn = getattr(self.tokenizer, "eos_token", None) or "\n"
        text, spans = "", []
        for turn in turns:
            gap = " " if text and not text.endswith(end_of_turn) else ""
            if turn.role == "assistant":
                text += f"{gap}ASSISTANT:"
                spans.append((len(text), len(text) + len(turn.text) + 1 + len(end_of_turn)))
                text += f" {turn.text}{end_of_turn}"
            else:
                text += gap + (f"USER: {turn.text}" if turn.role == "user" else turn.text)
        if add_generation_prompt:
            text += " ASSISTANT:" if text else "ASSISTANT:"
        return Rendered(text, tuple(spans))

    def _by_template(self, turns: list[Turn], add_generation_prompt: bool) -> Rendered:
        text = self._apply(turns, add_generation_prompt)
        spans, searched = [], 0
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._apply(turns[:index], True) if index else ""
            after = self._apply(turns[: index + 1], False)
            said = turn.text.strip()
            start, end = len(before), len(after.rstrip("\n "))
            if not (before and text.startswith(before) and text.startswith(after) and said in text[start:end]):
                # A template that rewrites earlier turns: find the words themselves.
                start = text.find(said, searched)
                end = start + len(said)
            if start < 0:
                raise ValueError(
                    f"ChatRenderer: the chat template must keep what the assistant says, got {text!r} without "
                    f"{turn.text!r}. Use a template that does, or another renderer."
                )
            spans.append((start, end))
            searched = end
        return Rendered(text, tuple(spans))

    def _apply(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )


class PlainRenderer:
    r"""Write the images and the answers alone, as LLaVA does in its first stage: no question, no roles.

    Args:
        tokenizer: a Hugging Face tokenizer; its end-of-sequence token ends the text.

    Source:
        LLaVA's ``plain`` conversation form, Liu et al. 2023, arXiv 2304.08485; it ends in the tokenizer's own
        end-of-sequence token instead of a newline, so that generation knows where to stop.

    Example:
        >>> class Eos:
        ...     eos_token = "</s>"
        >>> PlainRenderer(Eos())([Turn("user", "<image>\nDescribe it."), Turn("assistant", "A rose.")])
        Rendered(text='<image>A rose.</s>', spans=((7, 18),))
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
        """Write the placeholders, then the assistant's words."""
        head = IMAGE_PLACEHOLDER * sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        answer = " ".join(turn.text.strip() for turn in turns if turn.role == "assistant")
        if add_generation_prompt or not answer:
            text = head + answer
        else:
            text = head + answer + (getattr(self.tokenizer, "eos_token", None) or "\n")
        return Rendered(text, ((len(head), len(text)),) if answer else ())


def prompt_renderer(form: str, tokenizer: Any) -> Renderer:
    """Return the renderer of a prompt form, as a command line names it.

    Args:
        form: ``chat`` (the tokenizer's template, or USER and ASSISTANT) or ``plain`` (images and answers alone).
        tokenizer: of the language model.

    Raises:
        ValueError: another form.

    Example:
        >>> from types import SimpleNamespace
        >>> prompt_renderer("plain", SimpleNamespace(eos_token="</s>")).__class__.__name__
        'PlainRenderer'
    """
    if form not in ("chat", "plain"):
        raise ValueError(f"prompt_renderer: form must be 'chat' or 'plain', got {form!r}. Choose one of them.")
    return ChatRenderer(tokenizer) if form == "chat" else PlainRenderer(tokenizer)
