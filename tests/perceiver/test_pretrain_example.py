"""The parts of `examples/pretrain_perceiver.py`: any tokenizer or text encoder, features live or stored, resumed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyalign.data import LlavaDataset
from tinyalign.perceiver import PerceiverCompressor, PerceiverPretrainer, PerceiverSizes

SIZES = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=16, num_self_attends=1, num_heads=2)


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).resolve().parents[2] / "examples" / "pretrain_perceiver.py"
    spec = importlib.util.spec_from_file_location("pretrain_perceiver_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(example, tmp_path_factory):
    return example.make_inputs(tmp_path_factory.mktemp("inputs"), count=24)


@pytest.fixture(scope="module")
def samples(inputs):
    return list(LlavaDataset(inputs.data, inputs.images))


def sentence_model(folder: Path, words: list[str]) -> str:
    """A sentence-transformers model of random weights, saved as users have them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert = folder / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    config = BertConfig(
        vocab_size=5 + len(words), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(bert)
    transformer = Transformer(str(bert))
    SentenceTransformer(modules=[transformer, Pooling(12)], device="cpu").save(str(folder / "sentence"))
    return str(folder / "sentence")


def test_captions_become_the_ids_of_whatever_tokenizer(example, inputs):
    words = example.TokenIds(inputs.tokenizer)
    ids, mask = words(["a red 7", "two"])
    assert ids.shape == mask.shape == (2, 3)
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert words.tokenizer.decode(ids[0]).split() == [
        w if w in words.tokenizer.get_vocab() else "<unk>" for w in ("a", "red", "7")
    ]
    assert words.compressor_arguments() == {"vocab_size": len(words.tokenizer)}


@pytest.mark.parametrize(("name", "size"), [("bert-base-uncased", 30522), ("phi-2", 50295)])
def test_tokenizers_of_the_field_fit_their_compressor(example, shared, name, size):
    words = example.TokenIds(str(shared / "tokenizers" / name))
    assert words.compressor_arguments() == {"vocab_size": size}
    ids, mask = words(["a family is sitting down at a table to have cake", "two dogs"])
    compressor = PerceiverCompressor(6, sizes=SIZES, **words.compressor_arguments())
    pretrainer = PerceiverPretrainer(compressor, hidden_dim=16)
    assert pretrainer(torch.randn(2, 4, 6), ids, None, mask).loss.isfinite()
    assert mask.sum(1)[0] > mask.sum(1)[1] > 1


def test_captions_become_the_token_embeddings_of_a_sentence_model(example, tmp_path):
    from sentence_transformers import SentenceTransformer

    path = sentence_model(tmp_path, ["a", "red", "seven", "two"])
    words = example.TokenEmbeddings(path)
    embeddings, mask = words(["a red seven", "two"])
    assert words.compressor_arguments() == {"text_dim": 12}
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]  # [CLS] and [SEP] included
    theirs = SentenceTransformer(path, device="cpu").encode(["two"], output_value="token_embeddings")[0]
    torch.testing.assert_close(embeddings[1, :3], torch.as_tensor(theirs).cpu(), atol=1e-5, rtol=1e-4)
    assert not embeddings[1, 3:].any()
    compressor = PerceiverCompressor(6, sizes=SIZES, text_dim=12)
    out = PerceiverPretrainer(compressor, hidden_dim=16)(torch.randn(2, 4, 6), embeddings, None, mask)
    out.loss.backward()
    assert out.text_loss > 0


def test_stored_features_are_the_live_ones_in_half_precision(example, inputs, samples, tmp_path):
    live = example.LiveFeatures(samples, inputs.vision)
    path = tmp_path / "features.npy"
    stored = example.StoredFeatures(live, path)
    expected = live([3, 0, 5])
    assert stored.dim == live.dim == expected.shape[2]
    torch.testing.assert_close(stored([3, 0, 5]), expected, rtol=2e-3, atol=1e-4)
    assert np.load(path, mmap_mode="r").dtype == np.float16
    # The second time nothing is computed.
    calls = []
    live.tower.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(example.StoredFeatures(live, path)([1]), stored([1]))
    assert calls == []
    # Without its table the description counts for nothing, and neither does the table without its description.
    whole = stored([1])
    for lost in (path, path.with_suffix(".json")):
        lost.unlink()
        assert torch.equal(example.StoredFeatures(live, path)([1]), whole)


def other_samples(live):
    live.samples = live.samples[1:]


def another_image(live):
    first = live.samples[0]
    live.samples = [first._replace(images=(shutil.copy(first.images[0], f"{first.images[0]}.png"),)), *live.samples[1:]]


def a_rewritten_image(live):
    with open(live.samples[0].images[0], "ab") as image:
        image.write(b"0")


def another_scale_of_pixels(live):
    live.processor.rescale_factor /= 2


def another_tower(live):
    next(live.tower.parameters()).data.add_(1.0)


@pytest.mark.parametrize(
    "change", [other_samples, another_image, a_rewritten_image, another_scale_of_pixels, another_tower]
)
def test_stored_features_of_something_else_are_refused(example, inputs, samples, tmp_path, change):
    copied = [sample._replace(images=(shutil.copy(sample.images[0], tmp_path),)) for sample in samples]
    live, path = example.LiveFeatures(copied, inputs.vision), tmp_path / "features.npy"
    example.StoredFeatures(live, path)
    change(live)
    with pytest.raises(SystemExit, match=r"features.npy was made from other .* Delete it and .*features.json, or name"):
        example.StoredFeatures(live, path)


def test_a_run_stopped_half_way_ends_where_a_whole_one_does(example, inputs, tmp_path, capsys):
    """Live features, then stored ones: the same training, but for their half precision."""
    settings = {
        "learning_rate": 1e-3, "per_device_train_batch_size": 8, "save_steps": 2, "eval_steps": 2,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip

    def run(name, steps, **changes):
        arguments = type(inputs)(**{**vars(inputs), "output": tmp_path / name, **changes})
        example.run(arguments, SIZES, max_steps=steps, **settings)
        return PerceiverCompressor.from_pretrained(tmp_path / name / "compressor")

    whole = run("whole", 4)
    said = capsys.readouterr().out
    assert "held-out reconstruction:" in said
    assert f"fingerprint {whole.fingerprint()}" in said
    run("parts", 2)
    shutil.rmtree(tmp_path / "parts" / "compressor")
    resumed = run("parts", 4)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=1e-6, rtol=0, msg=name)
    live = run("live", 4, features=None)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(live.state_dict()[name], weight, atol=2e-2, rtol=1e-2, msg=name)
    assert json.loads((tmp_path / "live" / "compressor" / "config.json").read_text())["image_dim"] == 96
