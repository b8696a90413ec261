"""Scores of short answers: exact match, and POPE's five numbers for yes and no."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import NamedTuple


class YesNoScores(NamedTuple):
    """POPE's numbers, with "yes" as the positive answer.

    Args:
        accuracy: right answers.
        precision: of the answers "yes", how many were right.
        recall: of the questions whose answer is yes, how many were answered so.
        f1: harmonic mean of both.
        yes_ratio: answers "yes".
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def normalised(text: str) -> str:
    """Bring an answer to the form it is compared in: lower case, no punctuation or articles, single spaces.

    Example:
        >>> normalised("The Red circle.")
        'red circle'
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


def exact_match(answer: str, expected: str | Sequence[str]) -> bool:
    """Whether an answer equals what was expected, or one of it, after `normalised`.

    Args:
        answer: of the model.
        expected: one wording, or several that all count.

    Example:
        >>> exact_match("Yes.", "yes"), exact_match("yes it is", ["yes", "no"])
        (True, False)
    """
    wanted = [expected] if isinstance(expected, str) else expected
    return normalised(answer) in {normalised(one) for one in wanted}


def says_yes(answer: str) -> bool:
    """Read an answer as POPE does: "no" when its first sentence says no or not, else "yes".

    Source:
        Li et al. 2023, arXiv 2305.10355, whose evaluation takes everything but a no for a yes.

    Example:
        >>> says_yes("Yes, there is."), says_yes("There is not."), says_yes("No")
        (True, False, False)
    """
    words = re.findall(r"[a-z]+", answer.lower().split(".")[0])
    return not {"no", "not"} & set(words)


def yes_no_scores(answers: Sequence[str], expected: Sequence[str]) -> YesNoScores:
    """POPE's five numbers.

    Args:
        answers: of the model; what begins with yes says yes.
        expected: yes or no, one for each.

    Raises:
        ValueError: no answers, another number of them, or an expectation that is neither yes nor no.

    Example:
        >>> yes_no_scores(["yes", "yes", "no", "no"], ["yes", "no", "no", "yes"])
        YesNoScores(accuracy=0.5, precision=0.5, recall=0.5, f1=0.5, yes_ratio=0.5)
    """
    wanted = [word.strip().lower() for word in expected]
    if not answers or len(answers) != len(wanted) or set(wanted) - {"yes", "no"}:
        raise ValueError(
            f"yes_no_scores: expected must hold yes or no for each of the answers, got {len(answers)} answers and "
            f"{sorted(set(wanted))[:4]} in {len(wanted)}. Check the question file."
        )
    said, true = [says_yes(answer) for answer in answers], [word == "yes" for word in wanted]
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    right = sum(a == b for a, b in zip(said, true, strict=True))
    return YesNoScores(right / len(said), precision, recall, f1, sum(said) / len(said))
