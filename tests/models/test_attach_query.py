"""What a model of one's own asks the bank with: its frozen tower and the instruction, and never an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attach_families as F
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyalign.connectors import RAGConnector
from tinyalign.memory import AttentionPooledKey, FingerprintMismatch, MemoryBank, SentenceTransformerKey
from tinyalign.models import PairEncoder, TowerQuery, attach_memory, instruction_of, splice_rag, token_codes
from tinyalign.models.rag_towers import _owners, _per_image, read_tower, tower_of

SEEING = [name for name in F.EVERY if name not in F.LANGUAGE]
BALANCED = AttentionPooledKey(balance=True)


def queries(name: str, rows: list[list[int]], **options: Any) -> torch.Tensor:
    return TowerQuery(F.build(name), **options)(F.batch_of(name, rows))[0]


@pytest.mark.parametrize("name", SEEING)
def test_a_query_is_pooled_from_the_rows_own_pictures_and_words(name: str) -> None:
    aligned = F.attach(F.build(name))
    batch = aligned.splice(F.batch_of(name, F.ROWS))
    asked, has_query = aligned.queries(batch)
    assert has_query.tolist() == [True, True]
    images, owners = read_tower(aligned.model, batch)
    assert owners == [0, 1]
    words = [[1, 5, 6, 7], [1, 8, 9, 10, 5]]  # neither padding nor placeholders nor retrieval tokens
    for row in range(2):
        codes = token_codes(torch.tensor(words[row]), images[row].shape[1])
        expected = AttentionPooledKey()(images[row][None].float(), codes[None])[0]
        torch.testing.assert_close(asked[row], expected)
        alone, _ = aligned.queries(aligned.splice(F.batch_of(name, F.ROWS[row : row + 1])))
        torch.testing.assert_close(alone[0], asked[row], rtol=1e-4, atol=1e-5)
    assert (asked[0] - asked[1]).abs().max() > 1e-4
    # what is retrieved is what the bank finds for it
    bank = MemoryBank(key_dim=asked.shape[1], value_shape=(F.L, F.LATENT))
    bank.add(torch.randn(9, asked.shape[1]), torch.randn(9, F.L, F.LATENT))
    aligned._memory.value = bank
    values, mask = bank.gather(bank.neighbours(asked, F.K).ids)
    with torch.no_grad():
        torch.testing.assert_close(aligned(**batch).logits, aligned(**batch, retrieved=(values, mask)).logits)
        named = aligned.query_fingerprint()
        for part, parameter in aligned.model.named_parameters():  # a projector that learns must not move the queries
            if any(name in part for name in ("projector", "connector", "merger", "language_model", "qformer")):
                parameter.add_(torch.randn_like(parameter))
        torch.testing.assert_close(aligned.queries(batch)[0], asked)
        assert aligned.query_fingerprint() == named
        for parameter in tower_of(aligned.model).parameters():
            parameter.add_(torch.randn_like(parameter))
        assert (aligned.queries(batch)[0] - asked).abs().max() > 1e-4
        assert aligned.query_fingerprint() != named


@pytest.mark.parametrize("name", SEEING)
def test_pictures_are_counted_row_by_row(name: str) -> None:
    """Two in one row, none in the next, one in the last: each tower token goes to the row that shows it."""
    rows = [[1, -1, 5, -2, 6], [1, 8, 9], [1, -3, 5]]
    model = F.build(name)
    images, owners = read_tower(model, F.batch_of(name, rows))
    joined = {row: torch.cat([i for i, o in zip(images, owners, strict=True) if o == row]) for row in set(owners)}
    assert sorted(joined) == [0, 2]
    for row, share in ((0, [[1, -1], [1, -2]]), (2, [[1, -3]])):
        one_by_one = torch.cat([torch.cat(read_tower(model, F.batch_of(name, [part])).images) for part in share])
        torch.testing.assert_close(joined[row], one_by_one, rtol=1e-4, atol=1e-5)
    asked, has_query = TowerQuery(model)(F.batch_of(name, rows))
    assert has_query.tolist() == [True, False, True]
    assert (asked[1] == 1).all()


def test_images_of_different_numbers_of_tiles_keep_their_own() -> None:
    """Padded tiles are cut away before the tower; 3 + 1 tiles must not be read as 2 + 2."""
    import transformers as hf

    torch.manual_seed(0)
    grid = [[16, 16], [16, 32]]
    config = hf.LlavaNextConfig(
        text_config=F.LLAMA, vision_config=F.CLIP, image_token_index=F.IMAGE, image_grid_pinpoints=grid
    )
    model = hf.LlavaNextForConditionalGeneration(config).eval()
    wide, square = F.picture(0, 3, 3, 16, 16), F.picture(1, 2, 3, 16, 16)
    pixels = torch.stack([wide, torch.cat([square, torch.zeros(1, 3, 16, 16)])])
    sizes = torch.tensor([[16, 32], [16, 16]])
    lengths = [len(part) for part in model.model.get_image_features(pixels, sizes, return_dict=True).pooler_output]
    ids = torch.full((1, sum(lengths)), F.IMAGE)
    images, owners = read_tower(model, {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes})
    tower = tower_of(model)
    assert owners == [0, 0]
    for found, tiles in zip(images, (wide, square), strict=True):
        with torch.no_grad():
            expected = tower(tiles).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mllamas_empty_tiles_and_pictures_are_left_out() -> None:
    import transformers as hf

    torch.manual_seed(0)
    vision = {**F.MLLAMA_VIT, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]]}
    config = hf.MllamaConfig(
        text_config={"cross_attention_layers": [1], **F.TEXT}, vision_config=vision, image_token_index=F.IMAGE
    )
    model = hf.MllamaForConditionalGeneration(config).eval()
    tiles = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [0, 0]]])  # (rows, images, tiles)
    pixels = torch.stack([F.picture(number, 2, 2, 3, 16, 16) for number in range(2)]) * tiles[..., None, None, None]
    batch = {
        "input_ids": torch.tensor([[1, F.IMAGE, F.IMAGE, 5], [1, F.IMAGE, 6, 5]]),
        "pixel_values": pixels, "aspect_ratio_ids": torch.tensor([[1, 2], [2, 0]]), "aspect_ratio_mask": tiles,
    }  # fmt: skip
    images, owners = read_tower(model, batch)
    assert owners == [0, 0, 1]
    with torch.no_grad():
        features = tower_of(model)(**{n: v for n, v in batch.items() if n != "input_ids"}).last_hidden_state
    for found, expected in zip(images, (features[0, 0, :1], features[0, 1], features[1, 0]), strict=True):
        assert torch.equal(found, expected.flatten(0, 1))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mllama"])
def test_the_instruction_is_asked_with_and_the_answer_is_not(name: str) -> None:
    asked = queries(name, [[1, -1, 5, 6, 7]], key=BALANCED)
    assert (queries(name, [[1, -1, 5, 6, 8]], key=BALANCED) - asked).abs().max() > 1e-3
    torch.testing.assert_close(queries(name, [[1, -1, 5, 6, 8]], words=None), queries(name, [[1, -1, 7]], words=None))
    aligned = F.attach(F.build(name), query=TowerQuery(F.build(name), BALANCED)).train()

    def trained_with(answer: list[int]) -> torch.Tensor:
        batch = aligned.splice(F.batch_of(name, [[1, -1, 5, 6, 7, *answer]]))
        width = len(answer)
        labels = torch.cat([torch.full_like(batch["input_ids"][:, width:], -100), torch.tensor([answer])], dim=1)
        return aligned.queries({**batch, "labels": labels})[0]

    torch.testing.assert_close(trained_with([20, 21, 2]), asked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained_with([33, 2]), asked, rtol=1e-4, atol=1e-5)
    padded = queries(name, [[1, -1, 5, 6, 7], [1, 9, 9, 9, 9, 9, 9, 9, -2, 5, 9, 9]], key=BALANCED)
    torch.testing.assert_close(padded[:1], asked, rtol=1e-4, atol=1e-5)


def test_training_moves_nothing_that_is_asked_with() -> None:
    """Dropout of a tower in training mode, and words whose embeddings learn."""
    aligned = F.attach(F.build("llava"))
    batch = aligned.splice(F.batch_of("llava", F.ROWS))
    before = aligned.queries(batch)[0]
    aligned.model.config.vision_config.attention_dropout = 0.9
    for module in aligned.model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.9
    with torch.no_grad():
        aligned.model.get_input_embeddings().weight.add_(1.0)
    assert torch.equal(aligned.train().queries(batch)[0], before)
    assert all(module.training for module in aligned.model.modules())  # and the mode is what it was


def test_a_query_of_ones_own_sees_no_answer() -> None:
    seen: list[Any] = []

    def query(batch: Any) -> torch.Tensor:
        seen.append(batch)
        return torch.ones(1, 32)

    aligned = F.attach(F.build("llava"), query=query).train()
    batch = aligned.splice(F.batch_of("llava", [[1, -1, 5, 20, 21, 6, 22]]))
    labels = torch.where((batch["input_ids"] >= 20) & (batch["input_ids"] < 30), batch["input_ids"], -100)
    aligned(**batch, labels=labels, sample_ids=torch.tensor([3]))
    (asked,) = seen
    assert "labels" not in asked
    assert asked["input_ids"].tolist() == [[1, *[100] * 4, *[0] * 6, 5, 0, 0, 6, 0]]
    assert asked["attention_mask"].tolist() == [[1, *[0] * 10, 1, *[0] * 4]]  # nothing behind the first answer's start
    assert asked["pixel_values"] is batch["pixel_values"]


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 6), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(0, 6))
def test_the_instruction_is_what_stands_before_the_answer(rows: list[list[int]], start: int) -> None:
    """0 padding, 3 an image, 4 retrieval; a walk over each row is the reference."""
    ids = torch.tensor(rows)
    labels = torch.cat([torch.full_like(ids[:, :start], -100), ids[:, start:]], dim=1)
    asked = instruction_of({"input_ids": ids, "labels": labels}, image_ids=[3], rag_token_id=4)
    for row, line in enumerate(rows):
        expected = [int(token not in (0, 3, 4) and at < start) for at, token in enumerate(line)]
        assert asked["attention_mask"][row].tolist() == expected
        blanked = [3 if token == 3 else 0 if token == 4 or at >= start else token for at, token in enumerate(line)]
        assert asked["input_ids"][row].tolist() == blanked


def test_codes_tell_tokens_apart_and_texts_by_what_they_share() -> None:
    codes = token_codes(torch.arange(512), 256)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    alike = (codes @ codes.T / 256).fill_diagonal_(0)
    # cosines of independent signs: mean 0, deviation 1 / 16; the largest of 130,000 is below 6 deviations
    assert alike.abs().max() < 6 / 16
    assert abs(float(alike.std()) - 1 / 16) < 0.002
    assert codes.mean(dim=0).abs().max() < 6 / 512**0.5
    assert torch.equal(token_codes(torch.tensor([9]), 256), codes[9:10])


def test_words_of_ones_own() -> None:
    table = torch.randn(120, 32)
    query = TowerQuery(F.build("llava"), BALANCED, words=lambda ids, width: table[ids, :width])
    batch = F.batch_of("llava", [[1, -1, 5, 6]])
    images = read_tower(query.model, batch).images
    torch.testing.assert_close(query(batch)[0], BALANCED(images[0][None], table[[1, 5, 6]][None]))
    assert query.fingerprint()["key.words"] != TowerQuery(query.model).fingerprint()["key.words"]


def test_a_separate_siglip_asks_instead() -> None:
    import transformers as hf

    torch.manual_seed(1)
    tower = hf.SiglipVisionModel(hf.SiglipVisionConfig(**{**F.VIT, "hidden_size": 48}))
    encoder = PairEncoder(tower, None, AttentionPooledKey())

    class Siglip:
        def __call__(self, batch: Any) -> torch.Tensor:
            return encoder.query(encoder.image_features(batch["pixel_values"]))

        def fingerprint(self) -> dict[str, Any]:
            return encoder.key_fingerprint()

    bank = MemoryBank(key_dim=48, value_shape=(F.L, F.LATENT), fingerprint=encoder.key_fingerprint())
    plain = F.batch_of("llava", F.ROWS)
    bank.add(Siglip()(plain), torch.randn(2, F.L, F.LATENT), ids=torch.tensor([7, 8]))
    model = F.build("llava")
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder "):
        attach_memory(model, memory=bank, connector=RAGConnector(F.LATENT, F.WIDTH))
    aligned = attach_memory(model, memory=bank, connector=RAGConnector(F.LATENT, F.WIDTH), k=1, query=Siglip())
    batch = aligned.splice(plain)
    assert bank.neighbours(aligned.queries(batch), 1).ids.flatten().tolist() == [7, 8]
    expected = aligned(**batch, neighbour_ids=torch.tensor([[7], [8]])).logits
    torch.testing.assert_close(aligned(**batch).logits, expected)


def test_a_sentence_transformers_model_asks_instead() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    words = {5: "red", 6: "circle", 7: "blue", 8: "square"}
    key = SentenceTransformerKey(SentenceTransformer(modules=[BoW(list(words.values()))], device="cpu"))

    class Sentences:
        def __call__(self, batch: Any) -> torch.Tensor:
            pairs = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
            return key.queries([" ".join(words.get(i, "") for i, m in zip(*p, strict=True) if m) for p in pairs])

        def fingerprint(self) -> dict[str, Any]:
            return dict(key.fingerprint())

    bank = MemoryBank(key_dim=key.key_dim, value_shape=(F.L, F.LATENT), fingerprint=key.fingerprint())
    bank.add(key.keys(["a red circle", "a blue square"]), torch.randn(2, F.L, F.LATENT), ids=torch.tensor([7, 8]))
    connector = RAGConnector(F.LATENT, F.WIDTH)
    aligned = attach_memory(F.build("llama"), memory=bank, connector=connector, k=1, query=Sentences()).train()
    batch = aligned.splice(F.batch_of("llama", [[1, 7, 8, 5, 6], [1, 6, 5]]))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -2:] = batch["input_ids"][0, -2:]
    asked = aligned.queries({**batch, "labels": labels})
    assert bank.neighbours(asked, 1).ids.flatten().tolist() == [8, 7]  # by the question; the answer says red circle


def test_a_bank_made_otherwise_is_refused() -> None:
    model = F.build("llava")
    connector = RAGConnector(F.LATENT, F.WIDTH)

    def bank(**fingerprint: Any) -> MemoryBank:
        return MemoryBank(key_dim=32, value_shape=(F.L, F.LATENT), fingerprint=fingerprint)

    other = bank(**{"key.encoder": "a", **AttentionPooledKey().fingerprint()})
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder "):
        attach_memory(model, memory=other, connector=connector)
    attach_memory(model, memory=other, connector=connector, query=lambda batch: torch.ones(2, 32)).detach()
    own = TowerQuery(model).fingerprint()
    attach_memory(model, memory=bank(**own), connector=connector).detach()
    by_image = bank(**TowerQuery(model, words=None).fingerprint())
    with pytest.raises(FingerprintMismatch, match=r"key\.vocabulary \(bank: None, given: 'llama:120'\); key\.words"):
        attach_memory(model, memory=by_image, connector=connector)
    attach_memory(model, memory=by_image, connector=connector, query=TowerQuery(model, words=None)).detach()
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.add_(1.0)
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder_weights"):
        attach_memory(model, memory=bank(**own), connector=connector)


def test_a_model_without_a_tower_asks_for_queries_when_it_is_called() -> None:
    bank = MemoryBank(key_dim=32, value_shape=(F.L, F.LATENT))
    bank.add(torch.randn(3, 32), torch.randn(3, F.L, F.LATENT))
    aligned = attach_memory(F.build("llama"), memory=bank, connector=RAGConnector(F.LATENT, F.WIDTH), k=2)
    batch = aligned.splice({"input_ids": torch.tensor([[3, 4, 5]])})
    with pytest.raises(ValueError, match=r"query must be attached to search, got None. Pass query= to attach_memory"):
        aligned(**batch)
    assert aligned(**batch, queries=torch.randn(1, 32)).logits.shape[1] == 3 + 2 * F.L


def test_towers_of_another_layout_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tower must give tokens that can be told apart by image, got \(2, 3, 4, 4\) for 2"
    ):
        _per_image(torch.zeros(2, 3, 4, 4), [4, 4], {})
    with pytest.raises(
        ValueError, match=r"placeholders must match the image tokens, got \[3\] placeholders for images of"
    ):
        _owners([3], [4])
    with pytest.raises(ValueError, match="model must have a vision tower, got Linear without"):
        tower_of(torch.nn.Linear(1, 1))
    nameless = SimpleNamespace(config=SimpleNamespace())
    with pytest.raises(ValueError, match="model must say which id is an image, got SimpleNamespace without"):
        read_tower(nameless, {"input_ids": torch.ones(1, 1)})  # type: ignore[arg-type]
    batch = F.batch_of("mllama", [[1, -1, -2, 5]])
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        batch[name] = batch[name][:, :1]
    with pytest.raises(
        ValueError, match=r"placeholders must match the images of each row, got \[2\] placeholders for 1"
    ):
        read_tower(F.build("mllama"), batch)


def test_splicing_leaves_what_is_asked_as_it_was() -> None:
    plain = F.batch_of("llava", F.ROWS)
    query = TowerQuery(F.build("llava"))
    spliced = splice_rag(plain, 120, 4, image_ids=[F.IMAGE])
    aligned = F.attach(query.model)
    torch.testing.assert_close(aligned.queries(spliced)[0], query(plain)[0], rtol=0, atol=0)
