"""The configuration of the composed model: everything that rebuilds it, apart from the weights and the bank."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from tinyalign.models.retrieval import ARMS

IMAGE_TOKEN_ID = -200
FORMAT_NUMBER = 1


class TinyAlignConfig(PreTrainedConfig):  # type: ignore[misc]
    """What `TinyAlignVLM` is made of.

    Args:
        text_config: config of the causal language model.
        vision_config: config of the vision tower.
        vision_layer: hidden state that image features are read from.
        connector_depth: linear layers of the image connector.
        num_latents: latents per bank entry, L; None for a model without a retrieval branch.
        latent_dim: width of a latent.
        num_neighbours: bank entries per row, K.
        rag_depth: linear layers of the retrieval connector.
        rag_num_tokens: fixed number of retrieval tokens; None keeps all K * L.
        rag_gate: weigh entries by their similarity.
        rag_num_ranks: learned vectors for that many ranks.
        retrieval: the arm that is used when a call names none.
        retrieval_seed: what the control arms draw from.
        connector_seed: what new connectors are drawn from.
        memory_path: the bank's folder, relative to the checkpoint.
        key_settings: what the query's key is made with (`AttentionPooledKey`'s arguments); of a key of another class
            the name, and the key itself is passed to ``from_pretrained`` again.
        bos_token_id: the token that stays in front of images and retrieval, None for a tokenizer without one; that of
            `text_config` when it is not given.
        image_token_id: marks image positions in `input_ids`; negative, so that it is no vocabulary id.
        format_number: version of this layout on disk.

    Raises:
        ValueError: an unknown arm or format, or a number out of range.

    Example:
        >>> TinyAlignConfig(num_neighbours=3).num_neighbours
        3
    """

    model_type = "tinyalign"
    keys_to_ignore_at_inference = ["past_key_values", "labels", "neighbour_ids", "neighbour_scores"]  # noqa: RUF012
    sub_configs_defaults = {  # noqa: RUF012  the base class wants a plain dict
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_layer: int = -2
    connector_depth: int = 2
    num_latents: int | None = None
    latent_dim: int = 96
    num_neighbours: int = 5
    rag_depth: int = 2
    rag_num_tokens: int | None = None
    rag_gate: bool = False
    rag_num_ranks: int | None = None
    retrieval: str = "bank"
    retrieval_seed: int = 0
    connector_seed: int = 0
    memory_path: str | None = None
    key_settings: dict[str, Any] | None = None
    image_token_id: int = IMAGE_TOKEN_ID
    format_number: int = FORMAT_NUMBER
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if "bos_token_id" not in kwargs:
            self.bos_token_id = getattr(self.get_text_config(), "bos_token_id", None)
        check_arm("TinyAlignConfig", self.retrieval)
        if self.format_number != FORMAT_NUMBER:
            raise ValueError(
                f"TinyAlignConfig: format_number must be {FORMAT_NUMBER}, got {self.format_number}. The checkpoint was "
                f"written by another version of tinyalign; load it with that one."
            )
        if self.num_neighbours < 0:
            raise ValueError(
                f"TinyAlignConfig: num_neighbours must be at least 0, got {self.num_neighbours}. 0 retrieves nothing."
            )
        if self.image_token_id >= 0:
            raise ValueError(
                f"TinyAlignConfig: image_token_id must be negative, got {self.image_token_id}. It marks a place and is "
                f"never looked up."
            )

    @property
    def num_retrieval_tokens(self) -> int:
        """Positions that retrieval takes in every row, with the arm of this config."""
        if self.retrieval == "off" or self.num_latents is None:
            return 0
        return self.num_neighbours * self.num_latents if self.rag_num_tokens is None else self.rag_num_tokens


def check_arm(where: str, arm: str) -> None:
    """Raise unless `arm` is one of the known ones."""
    if arm not in ARMS:
        raise ValueError(
            f"{where}: retrieval must be one of {ARMS}, got {arm!r}. 'bank' is the method, 'off' the baseline."
        )
