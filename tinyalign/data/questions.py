"""A conversation as separate questions, or as what was answered."""

from __future__ import annotations

from tinyalign.data.records import IMAGE_PLACEHOLDER, Sample, Turn, stable_id


def questions_of(sample: Sample) -> list[Sample]:
    r"""Split a conversation into one sample per question, so that no earlier answer helps with a later one.

    Each keeps the images, their placeholders in front of its question, and the group.

    Args:
        sample: users and assistant take turns.

    Raises:
        ValueError: a question without an answer, or the reverse.

    Example:
        >>> said = [("user", "<image> Red?"), ("assistant", "no"), ("user", "Blue?"), ("assistant", "yes")]
        >>> for one in questions_of(Sample("a", 1, 1, (), tuple(Turn(*turn) for turn in said))):
        ...     print(one.id, [turn.text for turn in one.turns])
        a/0 ['<image>\nRed?', 'no']
        a/1 ['<image>\nBlue?', 'yes']
    """
    asked = [turn.text for turn in sample.turns if turn.role == "user"]
    answers = [turn for turn in sample.turns if turn.role == "assistant"]
    if len(asked) != len(answers):
        raise ValueError(
            f"questions_of: sample must have an answer for each question, got {len(answers)} for {len(asked)} in "
            f"{sample.id!r}. Correct the record or leave it out."
        )
    head = IMAGE_PLACEHOLDER * sum(text.count(IMAGE_PLACEHOLDER) for text in asked)
    found = []
    for number, (text, answer) in enumerate(zip(asked, answers, strict=True)):
        name = f"{sample.id}/{number}"
        question = text.replace(IMAGE_PLACEHOLDER, "").strip()
        turns = (Turn("user", f"{head}\n{question}" if head else question), answer)
        found.append(sample._replace(id=name, sample_id=stable_id(name), turns=turns))
    return found


def answers_of(sample: Sample) -> Sample:
    """Turn a conversation into a caption: its images with all that was answered, each wording once.

    What a memory bank's entry says about an image that was asked about.

    Args:
        sample: a conversation.

    Example:
        >>> said = [("user", "<image> Red?"), ("assistant", "no"), ("user", "Blue?"), ("assistant", "no")]
        >>> answers_of(Sample("a", 1, 1, (), tuple(Turn(*turn) for turn in said))).turns
        (Turn(role='user', text='<image>'), Turn(role='assistant', text='no'))
    """
    said = dict.fromkeys(turn.text.strip() for turn in sample.turns if turn.role == "assistant")
    head = IMAGE_PLACEHOLDER * sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns)
    return sample._replace(turns=(Turn("user", head), Turn("assistant", " ".join(said))))
