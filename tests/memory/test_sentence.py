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


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A tiny untrained BERT with a tokenizer of whole words and mean pooling, saved as a user's would be."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "a", "red", "blue", "circle", "square", "find"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).save_pretrained(path)
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    whole.save_pretrained(path)
    saved = tmp_path_factory.mktemp("bert-st")
    SentenceTransformer(modules=[Transformer(str(path)), Pooling(16)], device="cpu").save(str(saved))
    return saved


def static(words, normaliser=None):
    """Embeddings of whole words, equal for all, and the tokenizer that says whose they are."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normaliser is not None:
        tokenizer.normalizer = normaliser
    weights = torch.arange(12.0).sin().reshape(4, 3)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


@pytest.fixture(scope="module")
def static_folder(tmp_path_factory):
    """Static embeddings with a tokenizer of the tokenizers library, saved as a user's would be."""
    path = tmp_path_factory.mktemp("static")
    static(["[UNK]", "a", "red", "blue"]).save(str(path))
    return path


def test_the_fingerprint_names_a_bare_tokenizer():
    from tokenizers import normalizers

    words, text = ["[UNK]", "a", "red", "blue"], ["a Red red"]
    models = [static(words), static(words[:2] + words[:1:-1]), static(words, normalizers.Lowercase())]
    first, *others = keys = [SentenceTransformerKey(model) for model in models]
    assert len({tuple(key.keys(text)[0].tolist()) for key in keys}) == 3
    before = first.fingerprint()
    assert SentenceTransformerKey(static(words)).fingerprint() == before
    for other in others:
        after = other.fingerprint()
        assert {name for name in after if after[name] != before[name]} == {"key.processor"}
    assert others[0].fingerprint() != others[1].fingerprint()


@pytest.mark.parametrize("model", ["bert_folder", "clip_folder", "folder", "static_folder"])
def test_the_fingerprint_stays_where_nothing_of_the_model_changes(request, model, tmp_path):
    import shutil

    first = SentenceTransformerKey(request.getfixturevalue(model), device="cpu")
    before = first.fingerprint()
    first.keys(["a red circle", "blue"])
    assert first.fingerprint() == before
    shutil.copytree(request.getfixturevalue(model), tmp_path / "elsewhere")
    assert SentenceTransformerKey(tmp_path / "elsewhere", device="cpu").fingerprint() == before
    first.model.save(str(tmp_path / "again"))
    assert SentenceTransformerKey(tmp_path / "again", device="cpu").fingerprint() == before


def pooled(model):
    model[1].pooling_mode = "cls"


def cut(model):
    model.truncate_dim = 8


def replaced(model):
    from tokenizers import normalizers

    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("red", "blue")


def prompted(model):
    model.prompts, model.default_prompt_name = {"query": "find "}, "query"


def bent(model):
    model[0].model.config.hidden_act = "relu"
    model[0].model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (pooled, {"key.config"}),
        (bent, {"key.config"}),
        (cut, {"key.truncate_dim"}),
        (replaced, {"key.processor"}),
        (prompted, {"key.key_prompt", "key.query_prompt"}),
    ],
)
def test_the_fingerprint_names_whatever_changes_the_keys(bert_folder, change, fields):
    key, text = SentenceTransformerKey(bert_folder, device="cpu"), ["a red circle"]
    before, plain = key.fingerprint(), key.keys(text)
    change(key.model)
    after, keys = key.fingerprint(), key.keys(text)
    assert keys.shape != plain.shape or (keys - plain).abs().max() > 1e-3
    assert {name for name in after if after[name] != before[name]} == fields


def test_the_fingerprint_names_image_processing_and_stop_words(clip_folder, folder):
    from PIL import Image

    for model, inputs, change in (
        (
            clip_folder,
            [Image.new("RGB", (20, 16), "red")],
            lambda m: setattr(m[0].processor.image_processor, "image_mean", (0, 0, 0)),
        ),
        (folder, ["red circle"], lambda m: m[0].tokenizer.stop_words.add("red")),
    ):
        key = SentenceTransformerKey(model, device="cpu")
        before, plain = key.fingerprint(), key.keys(inputs)
        change(key.model)
        after = key.fingerprint()
        assert (key.keys(inputs) - plain).abs().max() > 1e-3
        assert {name for name in after if after[name] != before[name]} == {"key.processor"}


def test_the_default_prompt_is_as_good_as_one_given(bert_folder):
    given = SentenceTransformerKey(bert_folder, device="cpu", query_prompt="find ", key_prompt="find ")
    default = SentenceTransformerKey(bert_folder, device="cpu")
    prompted(default.model)
    assert torch.equal(given.keys(["blue"]), default.keys(["blue"]))
    assert given.fingerprint() == default.fingerprint()
    none = SentenceTransformerKey(default.model, query_prompt="", key_prompt="")
    assert (none.fingerprint()["key.key_prompt"], default.fingerprint()["key.key_prompt"]) == ("", "find ")


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
