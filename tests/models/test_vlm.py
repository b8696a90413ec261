"""What the composed model computes, against compositions written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tinyalign.models import TinyAlignVLM

PIXELS = (3, 16, 16)


def by_hand(model: TinyAlignVLM, ids: list[int], pixels: Tensor, values: Tensor | None, place: int) -> Tensor:
    """[H_V, H_R, H_I] of one row, put together from the parts with torch.cat, then read by the language model."""
    table = model.language_model.get_input_embeddings()
    visual = iter(model.connector(model.vision(pixels))) if len(pixels) else iter(())
    pieces, at = [], 0
    while at < len(ids):
        if ids[at] == -200:
            image = next(visual)
            pieces.append(image)
            at += len(image)
        else:
            pieces.append(table(torch.tensor([ids[at]])))
            at += 1
    row = torch.cat(pieces)
    if values is not None:
        assert model.rag_connector is not None
        row = torch.cat([row[:place], model.rag_connector(values[None]).tokens[0], row[place:]])
    return model.language_model(inputs_embeds=row[None]).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2", "gemma", "gemma2", "stablelm", "lfm2"])
def test_off_is_the_plain_composition_bit_for_bit(build: Any, family: str, tower: str) -> None:
    model = build.model(family, tower)
    ids, pixels = build.row(1, 5, "image", 7, 8), torch.randn(1, *PIXELS)
    with torch.no_grad():
        plain = by_hand(model, ids, pixels, None, 0)
        assert torch.equal(model(torch.tensor([ids]), pixels, retrieval="off").logits[0], plain)
        without = TinyAlignVLM.from_parts(build.tower(tower), build.lm(family))
        assert without.config.retrieval == "off"
        assert torch.equal(without.eval()(torch.tensor([ids]), pixels).logits[0], plain)
    assert plain.std() > 0.01


@pytest.mark.parametrize("family", ["llama", "phi", "qwen2", "gemma", "gemma2", "stablelm", "lfm2"])
def test_retrieval_stands_between_image_and_instruction(build: Any, family: str) -> None:
    """Rows of different lengths, image counts and positions, padded: each equals its own unpadded composition."""
    model = build.model(family)
    rows = [
        build.row(1, "image", 5, 6, 7),
        build.row(1, 5, "image", 6, "image", 7, 8, 9),
        build.row(1, 5, 6),
        build.row(5, 6, "image"),
    ]
    places = [5, 11, 1, 6]
    counts = torch.tensor([1, 2, 0, 1])
    pixels, values = torch.randn(4, *PIXELS), torch.randn(4, 2, 3, 8)
    mask = torch.ones(4, 2, dtype=torch.bool)
    with torch.no_grad():
        for left in (False, True):
            ids, keep = build.pad(rows, left=left)
            output = model(ids, pixels, keep, image_counts=counts, retrieved=(values, mask))
            whole = torch.ones(len(rows), 6, dtype=torch.bool)
            for at, row in enumerate(rows):
                first = int(counts[:at].sum())
                expected = by_hand(model, row, pixels[first : first + int(counts[at])], values[at], places[at])
                pad = ids.shape[1] - len(row)
                logits = output.logits[at, pad:] if left else output.logits[at, : len(row) + 6]
                torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-5)
            assert whole.shape[1] + ids.shape[1] == output.logits.shape[1]


def test_loss_is_cross_entropy_over_the_answers(build: Any) -> None:
    """The head on label rows alone, the head everywhere, and F.cross_entropy of the parts agree."""
    model = build.model()
    rows = [build.row(1, "image", 5, 6, 7, 2), build.row(1, 5, "image", 8, 9, 2)]
    ids, keep = build.pad(rows)
    labels = torch.full_like(ids, -100)
    labels[0, 6:9], labels[1, 7:9] = ids[0, 6:9], ids[1, 7:9]
    given = {"labels": labels, "retrieved": (torch.randn(2, 2, 3, 8), torch.ones(2, 2, dtype=torch.bool))}
    pixels = torch.randn(2, *PIXELS)
    everywhere = model(ids, pixels, keep, **given)
    few = model(ids, pixels, keep, return_logits=False, **given)
    nll = []
    for at, row in enumerate(rows):
        logits = by_hand(model, row, pixels[at : at + 1], given["retrieved"][0][at], 5 + at)
        target = torch.tensor(row)
        learn = [index for index in range(len(row)) if labels[at, index] != -100]
        scores = logits.log_softmax(dim=-1)[[index + 6 - 1 for index in learn], target[learn]]
        nll.append(-scores.sum())
    expected = torch.stack(nll)
    for output in (everywhere, few):
        torch.testing.assert_close(output.per_sample_nll, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.sum() / 5, rtol=1e-4, atol=1e-5)
        assert output.per_sample_tokens.tolist() == [3, 2]
    assert few.logits is None
    assert everywhere.logits.shape == (2, ids.shape[1] + 6, 100)
    assert (everywhere.labels == -100).sum() == ids.numel() + 12 - 5
    halved = model(ids, pixels, keep, num_items_in_batch=torch.tensor(10), return_logits=False, **given)
    torch.testing.assert_close(halved.loss, expected.sum() / 10, rtol=1e-4, atol=1e-5)


def test_softcapped_logits_keep_their_cap_on_label_rows(build: Any) -> None:
    """Gemma 2 caps its logits after the head; a head of our own would lose that."""
    model = build.model("gemma2")
    ids, labels = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[-100, -100, 6, 7]])
    few = model(ids, labels=labels, return_logits=False, retrieval="off")
    logits = model.language_model(input_ids=ids).logits
    assert logits.abs().max() < 0.5
    expected = -logits[0, [1, 2]].log_softmax(-1)[[0, 1], [6, 7]].sum()
    torch.testing.assert_close(few.per_sample_nll[0], expected, rtol=1e-5, atol=1e-5)


def test_a_missing_neighbour_is_as_if_it_were_not_there(build: Any) -> None:
    model = build.model()
    ids, pixels = torch.tensor([build.row(1, "image", 5, 6)]), torch.randn(1, *PIXELS)
    values = torch.randn(1, 2, 3, 8)
    masked = model(ids, pixels, retrieved=(values, torch.tensor([[True, False]]))).logits[0]
    one = by_hand(model, ids[0].tolist(), pixels, values[0, :1], 5)
    torch.testing.assert_close(masked[-2:], one[-2:], rtol=1e-4, atol=1e-5)
    values[0, 1] = torch.nan  # what stands behind a mask must not matter
    again = model(ids, pixels, retrieved=(values, torch.tensor([[True, False]]))).logits[0]
    assert torch.equal(again[-2:], masked[-2:])


def test_features_computed_before_are_as_good_as_pixels(build: Any) -> None:
    model, pixels = build.model(), torch.randn(1, *PIXELS)
    ids = torch.tensor([build.row(1, "image", 5)])
    features = model.vision(pixels)
    assert torch.equal(model(ids, pixels).logits, model(ids, image_features=features).logits)


def test_a_search_done_before_is_as_good_as_a_search(build: Any) -> None:
    model, pixels = build.model(rag_gate=True), torch.randn(2, *PIXELS)
    with torch.no_grad():
        model.rag_connector.gate.copy_(torch.tensor([3.0, -1.0]))
    ids = torch.tensor([build.row(1, "image", 5)] * 2)
    searched = model(ids, pixels, sample_ids=torch.tensor([3, 50]))
    given = model(ids, pixels, neighbour_ids=searched.neighbour_ids, neighbour_scores=searched.neighbour_scores)
    assert torch.equal(searched.logits, given.logits)
    assert searched.neighbour_ids.shape == searched.neighbour_scores.shape == (2, 2)
    values, mask = model.memory.gather(searched.neighbour_ids)
    hits = model(ids, pixels, retrieved=(values, mask, searched.neighbour_scores))
    assert torch.equal(searched.logits, hits.logits)


def test_the_query_is_the_frozen_image_alone(build: Any) -> None:
    """Earlier code embeds the whole input for its query, answer included; then training retrieves by the answer."""
    model, pixels = build.model().train(), torch.randn(1, *PIXELS)
    ids = torch.tensor([build.row(1, "image", 5, 6, 7)])
    labels = torch.where(ids > 5, ids, -100)
    before = model(ids, pixels, labels=labels, sample_ids=torch.tensor([3]))
    other = ids.clone()
    other[0, -3:] = torch.tensor([40, 41, 42])
    after = model(other, pixels, labels=torch.where(other > 5, other, -100), sample_ids=torch.tensor([3]))
    assert torch.equal(before.neighbour_ids, after.neighbour_ids)
    assert torch.equal(before.neighbour_scores, after.neighbour_scores)
    with torch.no_grad():  # nor does it follow a connector that is still learning
        for parameter in model.connector.parameters():
            parameter.add_(torch.randn_like(parameter))
    trained = model(ids, pixels, labels=labels, sample_ids=torch.tensor([3]))
    assert torch.equal(before.neighbour_scores, trained.neighbour_scores)


def test_a_query_does_not_depend_on_its_batch(build: Any) -> None:
    """Earlier code embeds padding into the query: the same sample with other batch mates got another one."""
    model, pixels = build.model(), torch.randn(3, *PIXELS)
    rows = [build.row(1, "image", 5), build.row(1, "image", "image", 5, *range(6, 30))]
    ids, keep = build.pad(rows)
    features = model.vision(pixels)
    alone = model(torch.tensor([rows[0]]), image_features=features[:1])
    together = model(ids, image_features=features, attention_mask=keep, image_counts=torch.tensor([1, 2]))
    assert torch.equal(alone.neighbour_scores[0], together.neighbour_scores[0])
    assert torch.equal(alone.neighbour_ids[0], together.neighbour_ids[0])


def test_rows_without_an_image_find_nothing(build: Any) -> None:
    model = build.model()
    ids, keep = build.pad([build.row(1, "image", 5), build.row(1, 5, 6)])
    output = model(ids, torch.randn(1, *PIXELS), keep)
    assert output.neighbour_ids[1].tolist() == [-1, -1]
    with torch.no_grad():
        plain = by_hand(model, [1, 5, 6], torch.zeros(0, *PIXELS), None, 0)
    # BOS, six masked retrieval tokens, then the rest: numbered and read as if nothing stood between
    torch.testing.assert_close(output.logits[1, [0, 7, 8]], plain, rtol=1e-4, atol=1e-5)
    only_text = model(torch.tensor([[1, 5, 6]]))
    torch.testing.assert_close(only_text.logits[0, [0, 7, 8]], plain, rtol=1e-4, atol=1e-5)


def test_two_images_followed_by_equal_text_keep_both(build: Any) -> None:
    model, pixels = build.model(), torch.randn(2, *PIXELS)
    ids = torch.tensor([build.row(1, "image", 5, "image", 5)])
    both = model(ids, pixels, retrieval="off").logits
    changed = model(ids, torch.cat([pixels[:1], pixels[1:] + 1]), retrieval="off").logits
    assert not torch.equal(both[0, -1], changed[0, -1])
    assert torch.equal(both[0, :6], changed[0, :6])


def test_no_neighbours_is_the_baseline(build: Any) -> None:
    model, pixels = build.model(num_neighbours=0), torch.randn(1, *PIXELS)
    ids = torch.tensor([build.row(1, "image", 5)])
    assert torch.equal(model(ids, pixels).logits, model(ids, pixels, retrieval="off").logits)
    assert model.config.num_retrieval_tokens == 0


@pytest.mark.parametrize(
    "options", [{"rag_num_tokens": 4}, {"rag_gate": True}, {"rag_num_ranks": 2}, {"connector_depth": 1, "rag_depth": 3}]
)
def test_options_of_the_retrieval_connector(build: Any, options: dict[str, Any]) -> None:
    model, ids = build.model(**options), torch.tensor([build.row(1, "image", 5)])
    logits = model(ids, torch.randn(1, *PIXELS)).logits
    assert logits.shape[1] == ids.shape[1] + model.config.num_retrieval_tokens
    assert model.config.num_retrieval_tokens == options.get("rag_num_tokens", 6)


def test_arms_start_from_the_same_connectors(build: Any) -> None:
    """Whatever the global generator was and whether there is a bank, the same seed draws the same connector."""
    torch.manual_seed(11)
    one = build.model(bank=None)
    torch.manual_seed(12)
    state = torch.get_rng_state()
    two = TinyAlignVLM.from_parts(build.tower("siglip"), build.lm("llama"), memory=build.bank())
    three = build.model(retrieval="prompt", rag_num_tokens=2)
    assert all(torch.equal(a, b) for a, b in zip(one.connector.parameters(), two.connector.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(two.connector.parameters(), three.connector.parameters(), strict=True))
    other = build.model(connector_seed=1)
    assert not torch.equal(other.connector.layers[0].weight, two.connector.layers[0].weight)
    assert other.rag_connector is not None
    assert state.shape == torch.get_rng_state().shape


def test_building_leaves_the_global_generator_alone(build: Any) -> None:
    tower, language = build.tower("siglip"), build.lm("llama")
    state = torch.get_rng_state()
    TinyAlignVLM.from_parts(tower, language, memory=build.bank())
    assert torch.equal(state, torch.get_rng_state())


def test_a_cache_continues_without_retrieving_again(build: Any) -> None:
    model, pixels = build.model(), torch.randn(1, *PIXELS)
    ids = torch.tensor([build.row(1, "image", 5, 6)])
    with torch.no_grad():
        whole = model(torch.cat([ids, torch.tensor([[7]])], dim=1), pixels).logits[:, -1]
        prompt = model(ids, pixels, use_cache=True)
        step = model(torch.tensor([[7]]), past_key_values=prompt.past_key_values)
    torch.testing.assert_close(step.logits[:, -1], whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be None when past_key_values hold a prompt"):
        model(torch.tensor([[7]]), pixels, past_key_values=prompt.past_key_values)


def test_the_language_model_may_be_asked_for_more(build: Any) -> None:
    model, ids = build.model(), torch.tensor([build.row(1, "image", 5)])
    pixels = torch.randn(1, *PIXELS)
    assert len(model(ids, pixels, output_hidden_states=True).hidden_states) == 3
    assert isinstance(model(ids, pixels, return_dict=False), tuple)


def test_bank_values_of_half_precision_and_integer_masks_are_fine(build: Any) -> None:
    model = build.model(bank=build.bank(value_dtype=torch.int8))
    ids = torch.tensor([build.row(1, "image", 5)])
    assert torch.isfinite(model(ids, torch.randn(1, *PIXELS), torch.ones_like(ids)).logits).all()
