"""What a step costs in floating-point operations, in closed form from a config: no weights, no run."""

from __future__ import annotations

from typing import Any, NamedTuple

from tinyalign._checks import check_positive
from tinyalign.models.configuration import TinyAlignConfig

STAGES = (None, "pretrain", "instruct")
# Matrices of a language model's MLP: three where it is gated.
_MLP_MATRICES = {
    "llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "gemma": 3, "gemma2": 3, "stablelm": 3, "phi": 2,
}  # fmt: skip
_TOWERS = ("siglip_vision_model", "clip_vision_model", "dinov2", "dinov2_with_registers")


class FlopCount(NamedTuple):
    """Operations of a whole batch by part; a multiplication with its addition counts as two.

    Args:
        vision: the tower, as far as it is read.
        connector: of the image.
        rag_connector: of what is retrieved.
        language: the language model without its head.
        head: the projection to the vocabulary.
    """

    vision: int
    connector: int
    rag_connector: int
    language: int
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self)


def count_flops(
    config: TinyAlignConfig,
    *,
    text_tokens: int,
    batch_size: int = 1,
    num_images: int = 1,
    supervised_tokens: int | None = None,
    stage: str | None = None,
) -> FlopCount:
    """Count the operations of matrix products and convolutions in one pass over a batch, or one training step.

    The same convention as `torch.utils.flop_counter.FlopCounterMode`, with attention computed in full (a kernel that
    leaves out the masked half, or computes scores again in the backward pass, does fewer or more). The tower counts up
    to the selected layer; where that is the last one it runs whole, and a pooling head is not counted. Arm, K, pooling
    and depth are the config's. Neighbours are taken as found before, as in training; their search costs 2 * M * D a
    query with M entries of width D.

    Args:
        config: of the model.
        text_tokens: positions per row besides images and retrieval.
        batch_size: rows.
        num_images: images per row.
        supervised_tokens: positions per row that pass through the head; all of them when None.
        stage: None for a forward pass, "pretrain" for a step that trains the connectors, "instruct" for one that
            trains the language model as well. The tower never trains.

    Raises:
        ValueError: a tower or language model of another family, a number out of range, or an unknown stage.

    Example:
        >>> from transformers import LlamaConfig, SiglipVisionConfig
        >>> vision = SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        ...                             image_size=8, patch_size=4)
        >>> text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                    vocab_size=9)
        >>> config = TinyAlignConfig(text_config=text, vision_config=vision, retrieval="off")
        >>> count_flops(config, text_tokens=4)
        FlopCount(vision=6656, connector=1024, rag_connector=0, language=9216, head=1152)
    """
    where = "count_flops"
    for name, value in (("text_tokens", text_tokens), ("batch_size", batch_size), ("num_images", num_images)):
        check_positive(where, name, value)
    if stage not in STAGES:
        raise ValueError(f"{where}: stage must be one of {STAGES}, got {stage!r}. None counts a forward pass.")
    text: Any = config.text_config
    patches, vision = _tower(config)
    retrieval = config.num_retrieval_tokens
    length = num_images * patches + retrieval + text_tokens
    if supervised_tokens is None:
        supervised_tokens = length if stage is None else length - 1
    if not 0 <= supervised_tokens <= length:
        raise ValueError(
            f"{where}: supervised_tokens must lie in [0, {length}], got {supervised_tokens}. That is the "
            f"length of a row."
        )
    linear, attention = _language(text, length)
    head = 2 * supervised_tokens * text.hidden_size * text.vocab_size
    # A frozen product costs as much again in the backward pass (for its input), a trained one twice that.
    again = {None: 0, "pretrain": 1, "instruct": 2}[stage]
    per_row = (
        num_images * vision,
        num_images * _mlp(patches, config.connector_depth, _width_of(config), text.hidden_size, stage, False),
        _retrieval(config, stage) if retrieval else 0,
        linear * (1 + again) + attention * (1 if stage is None else 3),
        head * (1 + again),
    )
    return FlopCount(*(batch_size * part for part in per_row))


def _width_of(config: TinyAlignConfig) -> int:
    return int(config.vision_config.hidden_size)  # type: ignore[union-attr]


def _tower(config: TinyAlignConfig) -> tuple[int, int]:
    """Patches of an image, and the operations that read them off the selected layer."""
    vision: Any = config.vision_config
    if vision.model_type not in _TOWERS:
        raise ValueError(
            f"count_flops: vision_config must be one of {_TOWERS}, got {vision.model_type!r}. Count another tower with "
            f"torch.utils.flop_counter.FlopCounterMode."
        )
    width, patch, layers = vision.hidden_size, vision.patch_size, vision.num_hidden_layers
    patches = (vision.image_size // patch) ** 2
    before = {"siglip_vision_model": 0, "dinov2_with_registers": 1 + getattr(vision, "num_register_tokens", 0)}
    tokens = patches + before.get(vision.model_type, 1)
    if not vision.model_type.startswith("dinov2"):
        mlp = 2 * width * vision.intermediate_size
    else:
        inner = int(width * vision.mlp_ratio)
        mlp = 3 * width * ((int(inner * 2 / 3) + 7) // 8 * 8) if vision.use_swiglu_ffn else 2 * width * inner
    layer = 2 * tokens * (4 * width**2 + mlp) + 4 * tokens**2 * width
    embedding = 2 * patches * width * vision.num_channels * patch**2
    return patches, embedding + (config.vision_layer % (layers + 1)) * layer


def _language(text: Any, length: int) -> tuple[int, int]:
    """Operations of a row of that length in linear layers and in attention, without the head."""
    if text.model_type not in _MLP_MATRICES:
        raise ValueError(
            f"count_flops: text_config must be one of {tuple(_MLP_MATRICES)}, got {text.model_type!r}. Count another "
            f"language model with torch.utils.flop_counter.FlopCounterMode."
        )
    width, heads = text.hidden_size, text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    weights = 2 * width * head_dim * (heads + groups) + _MLP_MATRICES[text.model_type] * width * text.intermediate_size
    return 2 * length * weights * text.num_hidden_layers, 4 * length**2 * heads * head_dim * text.num_hidden_layers


def _mlp(tokens: int, depth: int, inputs: int, width: int, stage: str | None, inputs_train: bool) -> int:
    """A trained MLP over tokens; what stands before it gets a gradient only if it trains."""
    first, later = 2 * tokens * inputs * width, 2 * tokens * (depth - 1) * width**2
    if stage is None:
        return first + later
    return first * (3 if inputs_train else 2) + later * 3


def _retrieval(config: TinyAlignConfig, stage: str | None) -> int:
    """The retrieval connector, with its pooling."""
    text: Any = config.text_config
    assert config.num_latents is not None  # there are no retrieval tokens otherwise
    latents, width = config.num_neighbours * config.num_latents, config.latent_dim
    inputs_train = config.retrieval == "prompt" or config.rag_num_ranks is not None or config.rag_num_tokens is not None
    mlp = _mlp(config.num_retrieval_tokens, config.rag_depth, width, text.hidden_size, stage, inputs_train)
    if config.rag_num_tokens is None:
        return mlp
    pool = 4 * latents * width**2 + 4 * config.rag_num_tokens * latents * width
    return mlp + pool * (1 if stage is None else 3)
