"""Keys from sentence-transformers models that are made, saved and loaded here."""

from __future__ import annotations

import pytest
import torch

from tinyalign.memory import FingerprintMismatch, MemoryBank, SentenceTransformerKey, concatenate_keys, retrieval_report

TEXTS = [
    "a red circle",
    "a blue square",
    "the red ring is round",
    "two green triangles",
    "one triangle in green",
    "blue box, four sides, a square",
]
TOPICS = [0, 1, 0, 2, 2, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bag-of-words model, saved as a user's would be."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    words = ["red", "circle", "blue", "square", "ring", "round", "green", "triangle", "triangles", "box", "sides"]
    path = tmp_path_factory.mktemp("model")
    SentenceTransformer(modules=[BoW(words)], device="cpu").save(str(path))
    return path


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny untrained CLIP with its tokenizer and image processor, saved as a user's would be."""
    import json

    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import CLIPModel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {
        token: i
        for i, token in enumerate([*letters, *[c + "</w>" for c in letters], "<|startoftext|>", "<|endoftext|>"])
    }
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shared, "vocab_size": len(vocab), "max_position_embeddings": 16, "eos_token_id": len(vocab) - 1},
        vision_config={**shared, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(path)
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(path)
    model = SentenceTransformer(modules=[CLIPModel(str(path))], device="cpu")
    saved = tmp_path_factory.mktemp("clip-st")
    model.save(str(saved))
    return saved


def test_text_keys_find_their_topic(folder):
    key = SentenceTransformerKey(folder, batch_size=2, device="cpu")
    keys = key.keys(TEXTS)
    assert keys.shape == (6, key.key_dim) == (6, 11)
    assert keys.dtype == torch.float32
    bank = MemoryBank(key.key_dim, (1,), fingerprint=key.fingerprint())
    bank.add(keys, torch.ones(6, 1), groups=TOPICS)
    report = retrieval_report(bank, key.queries(TEXTS), TOPICS, "group", k=1, exclude_ids=range(6))
    assert report.recall_at_k == 1.0 > report.chance_at_k
    bank.search(key.queries(TEXTS), fingerprint=key.fingerprint())
    by_hand = torch.tensor([[float(word in ("red", "circle")) for word in key.model[0].vocab]])
    assert torch.equal(keys[:1], by_hand)


def test_batches_do_not_show_and_empty_lists_are_fine(folder):
    one, many = (SentenceTransformerKey(folder, batch_size=n, device="cpu") for n in (1, 6))
    assert torch.equal(one.keys(TEXTS), many.keys(TEXTS))
    assert one.keys([]).shape == (0, 11)


def test_prompts_are_used_and_named(folder):
    plain = SentenceTransformerKey(folder, device="cpu")
    asked = SentenceTransformerKey(folder, query_prompt="green ", device="cpu")
    assert torch.equal(asked.keys(TEXTS), plain.keys(TEXTS))
    assert torch.equal(asked.queries(TEXTS[:1]), plain.keys(["green a red circle"]))
    bank = MemoryBank(11, (1,), fingerprint=plain.fingerprint())
    with pytest.raises(FingerprintMismatch, match=r"key\.query_prompt \(bank: None, given: 'green '\)"):
        bank.require_fingerprint(asked.fingerprint())


def test_fingerprint_names_the_weights(clip_folder):
    key = SentenceTransformerKey(clip_folder, device="cpu")
    before = key.fingerprint()
    assert SentenceTransformerKey(clip_folder, device="cpu").fingerprint() == before
    with torch.no_grad():
        next(iter(key.model.parameters())).add_(1e-3)
    assert key.fingerprint()["key.weights"] != before["key.weights"]


def test_images_and_texts_share_a_space(clip_folder):
    from PIL import Image

    key = SentenceTransformerKey(clip_folder, device="cpu", batch_size=2)
    images = [Image.new("RGB", (20, 16), color) for color in ("red", "green", "blue")]
    keys, queries = key.keys(images), key.queries(["red", "blue"])
    assert keys.shape == (3, 12) == (3, key.key_dim)
    assert queries.shape == (2, 12)
    alone = SentenceTransformerKey(clip_folder, device="cpu", batch_size=1).keys(images)
    torch.testing.assert_close(alone, keys, atol=1e-5, rtol=1e-4)
    assert (keys[0] - keys[1]).abs().max() > 1e-4
    bank = MemoryBank(12, (1,))
    bank.add(keys, torch.ones(3, 1))
    assert int(bank.neighbours(alone[1:2], 1).ids) == 1


def test_joined_keys_fuse_scores():
    image, text = torch.randn(6, 5), torch.randn(6, 3).half()
    image_query, text_query = torch.randn(2, 5), torch.randn(2, 3)
    joined = concatenate_keys([image_query, text_query], [2, 1]) @ concatenate_keys([image, text], [2, 1]).T
    unit = torch.nn.functional.normalize
    expected = 2 / 3 * unit(image_query, dim=-1) @ unit(image, dim=-1).T
    expected = expected + 1 / 3 * unit(text_query, dim=-1) @ unit(text.float(), dim=-1).T
    torch.testing.assert_close(joined, expected)


@pytest.mark.parametrize(
    ("keys", "weights", "message"),
    [
        ([], None, "keys must be .* got \\[\\]"),
        ([torch.ones(2, 3), torch.ones(3, 3)], None, r"of the same n, got \[\(2, 3\), \(3, 3\)\]"),
        ([torch.ones(2, 3)], [1, 2], r"weights must be 1 numbers from 0, not all 0, got \[1.0, 2.0\]"),
        ([torch.ones(2, 3)], [0], r"got \[0.0\]"),
        ([torch.ones(2, 3)], [-1], r"got \[-1.0\]"),
    ],
)
def test_bad_fusion(keys, weights, message):
    with pytest.raises(ValueError, match=message):
        concatenate_keys(keys, weights)


def test_a_model_that_does_not_say_its_width_is_asked():
    class Silent:
        def eval(self):
            return self

        def get_sentence_embedding_dimension(self):
            return None

        def encode(self, inputs, **options):
            return torch.ones(len(inputs), 7)

    assert SentenceTransformerKey(Silent()).key_dim == 7


def test_bad_input(folder):
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        SentenceTransformerKey(folder, batch_size=0)
    with pytest.raises(TypeError, match=r"inputs must be a list, got str. Wrap a single one"):
        SentenceTransformerKey(folder, device="cpu").keys("a red circle")
