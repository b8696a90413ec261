"""Digit scenes: what is drawn is what is said, and no handwriting crosses from one split to another."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from tinyalign.data import DigitScenes
from tinyalign.data.digits import _handwriting, question_of


def test_no_digit_image_is_in_two_splits():
    seen = {
        split: {ink.tobytes() for d in range(10) for ink in _handwriting(split)[d]}
        for split in ("memory", "train", "heldout")
    }
    for one, other in itertools.combinations(seen, 2):
        assert not seen[one] & seen[other]
    assert all(len(_handwriting(split)[digit]) >= 30 for split in seen for digit in range(10))


@pytest.mark.parametrize("num_digits", [2, 3, 4])
def test_a_caption_names_every_digit_of_its_scene(num_digits):
    scenes = DigitScenes("train", 30, num_digits=num_digits, seed=3)
    for number, sample in enumerate(scenes):
        scene = scenes.scene(number)
        words = sample.turns[1].text.replace(".", "").replace("and", "").replace("a ", "").split()
        assert list(zip(words[::2], map(int, words[1::2]), strict=True)) == list(
            zip(scene.colours, scene.digits, strict=True)
        )
        assert list(scene.digits) == sorted(set(scene.digits))
        assert len(set(scene.colours)) == num_digits
        assert np.array_equal(np.asarray(sample.images[0]), scene.pixels)


def test_the_colours_are_in_the_pixels():
    # Without noise nearly all bright pixels have the hues that the caption names; a few mix where two digits touch.
    hue_of = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 0): "yellow"}
    for scene in (DigitScenes("heldout", 40, noise=0.0, seed=1).scene(i) for i in range(40)):
        bright = scene.pixels[scene.pixels.max(axis=-1) > 120].astype(float)
        hues = Counter(hue_of.get(tuple((pixel > 0.7 * pixel.max()).astype(int).tolist())) for pixel in bright)
        named = sum(hues[colour] for colour in scene.colours)
        assert named > 0.95 * sum(hues.values())
        assert all(hues[colour] > 0.1 * named for colour in scene.colours)


def test_the_law_of_captions_is_uniform():
    scenes = DigitScenes("memory", 3000, seed=5)
    drawn = [scenes.scene(i).facts for i in range(3000)]
    single = Counter(fact for facts in drawn for fact in facts)
    assert len(single) == 40
    expected = 6000 / 40
    statistic = sum((count - expected) ** 2 / expected for count in single.values())
    assert statistic < 73  # chi-square with 39 degrees of freedom: above this in 1 of 1,000 laws
    assert scenes.caption_entropy == pytest.approx(math.log(45 * 12))


def test_the_same_index_is_the_same_sample_in_every_dataset():
    few, many = DigitScenes("train", 5, seed=2), DigitScenes("train", 500, seed=2)
    assert few[4].id == many[4].id
    assert few[4].turns == many[4].turns
    assert np.array_equal(few.scene(4).pixels, many.scene(4).pixels)
    assert not np.array_equal(few.scene(4).pixels, DigitScenes("train", 5, seed=3).scene(4).pixels)


def test_samples_of_one_image_share_its_group_and_nothing_else_does():
    scenes = DigitScenes("heldout", 20, task="both")
    assert len(scenes) == 20 * 5
    ids = {sample.sample_id for sample in scenes}
    assert len(ids) == len(scenes)
    groups = [sample.group for sample in scenes]
    assert all(len(set(groups[i : i + 5])) == 1 for i in range(0, 100, 5))
    assert len(set(groups)) == 20
    captions = DigitScenes("heldout", 20, task="caption")
    assert captions[7].sample_id == scenes[35].sample_id


def test_questions_have_the_answers_of_the_scene():
    scenes = DigitScenes("train", 10, task="question", seed=4)
    for index, sample in enumerate(scenes):
        facts = scenes.scene(index // 4).facts
        asked, answer = sample.turns[0].text.split(), sample.turns[1].text.split()[0]
        if "color" in asked:
            assert (answer, int(asked[-2])) in facts
        else:
            assert (asked[-2], int(answer)) in facts
    assert question_of([("red", 3), ("blue", 7)], 3) == ("which digit is blue ?", "7 .")


def test_slices_and_negative_indices():
    scenes = DigitScenes("train", 4)
    assert [sample.id for sample in scenes[1:3]] == [scenes[1].id, scenes[2].id]
    assert scenes[-1].id == scenes[3].id


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "test"}, "split must be one of .* got 'test'"),
        ({"task": "vqa"}, "task must be one of .* got 'vqa'"),
        ({"num_scenes": 0}, "num_scenes must be an integer of at least 1, got 0"),
        ({"num_digits": 5}, "num_digits must be 2, 3 or 4, got 5"),
        ({"noise": 2.0}, r"noise must lie in \[0, 1\], got 2.0"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        DigitScenes(**{"split": "train", "num_scenes": 3, **arguments})


def test_indices_beyond_the_end_are_refused():
    scenes = DigitScenes("train", 3)
    with pytest.raises(IndexError, match=r"\[0, 3\), got 3"):
        scenes[3]
    with pytest.raises(IndexError, match=r"\[0, 3\), got -1"):
        scenes.scene(-1)
