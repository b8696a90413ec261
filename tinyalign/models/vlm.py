"""The reference assembly: vision tower, two connectors, memory bank and language model, as in the paper's Figure 1."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from tinyalign.connectors import MLPConnector, RAGConnector
from tinyalign.memory import AttentionPooledKey, MemoryBank
from tinyalign.models import checkpoint
from tinyalign.models.assembly import Batch, Embedded, embed_batch
from tinyalign.models.beside import Beside, seeded
from tinyalign.models.configuration import TinyAlignConfig, check_arm
from tinyalign.models.language import check_keywords, continue_language, read_language, write_language
from tinyalign.models.outputs import TinyAlignOutput
from tinyalign.models.pair_encoder import PairEncoder
from tinyalign.models.parts import check_memory, key_from, latent_sizes, settings_of
from tinyalign.models.vision import VisionFeatures, vision_half

_STAGES = ("pretrain", "instruct")


class TinyAlignVLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A vision-language model that reads ``[H_V, H_R, H_I]``: the image, what was retrieved for it, the instruction.

    Any Hugging Face vision transformer and any causal language model. The whole language model is kept inside, head
    included, and is fed embeddings; neither it nor its tokenizer is changed. With ``retrieval="off"`` the model is the
    plain baseline, bit for bit. The bank is data: it is no part of the weights.

    Args:
        config: sizes and sub-configs; `from_parts` is the usual way to build the model.
        vision_tower, language_model: the parts, when they exist already.

    Shape:
        input_ids: (B, S), with image positions marked by ``config.image_token_id``. pixel_values: (num_images, C, H,
        W), all rows' images in row order. returns: `TinyAlignOutput`.

    Raises:
        ValueError: inputs that do not fit one another, or that would let a training sample retrieve itself.
        TypeError: an argument that neither this model nor its language model knows.

    Source:
        TinyAlign, sections 4.1 and 4.3. Deviations: queries from frozen image features and the instruction only; the
        sample itself and its twins are never retrieved; a missing neighbour is masked.

    Example:
        >>> from transformers import LlamaConfig, SiglipVisionConfig
        >>> vision = SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        ...                             image_size=8, patch_size=4)
        >>> text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...                    vocab_size=9)
        >>> model = TinyAlignVLM(TinyAlignConfig(text_config=text, vision_config=vision, retrieval="off"))
        >>> ids = torch.tensor([[1, -200, -200, -200, -200, 5]])
        >>> model(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8)).logits.shape
        torch.Size([1, 6, 9])
    """

    config_class = TinyAlignConfig
    config: TinyAlignConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)  # pyright: ignore[reportAssignmentType]
    # Connectors are small and train from scratch: they stay in float32 whatever the rest is loaded as.
    _keep_in_fp32_modules_strict = ("connector", "rag_connector", "prompt_latents")  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        config: TinyAlignConfig,
        vision_tower: nn.Module | None = None,
        language_model: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        self.vision = VisionFeatures(tower, layer=config.vision_layer)
        language: Any = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        self.language_model = language
        width = language.get_input_embeddings().weight.shape[1]
        # Each connector is drawn from a seed of its own, so that arms with and without retrieval start alike.
        with seeded(config.connector_seed, 0):
            self.connector = MLPConnector(self.vision.dim, width, depth=config.connector_depth, dtype=torch.float32)
        self.rag_connector: RAGConnector | None = None
        self.prompt_latents: nn.Parameter | None = None
        if config.num_latents is not None:
            with seeded(config.connector_seed, 1):
                self.rag_connector = RAGConnector(
                    config.latent_dim,
                    width,
                    depth=config.rag_depth,
                    num_tokens=config.rag_num_tokens,
                    gate=config.rag_gate,
                    num_ranks=config.rag_num_ranks,
                    dtype=torch.float32,
                )
            with seeded(config.connector_seed, 2):
                shape = (config.num_neighbours, config.num_latents, config.latent_dim)
                self.prompt_latents = nn.Parameter(torch.randn(shape, dtype=torch.float32))
        # Beside the weights, not among them: the bank, and what a query is made with.
        self._beside = Beside()
        self.post_init()
        self.freeze_for("pretrain")

    @classmethod
    def from_parts(
        cls,
        vision_tower: nn.Module,
        language_model: nn.Module,
        *,
        tokenizer: Any = None,
        memory: MemoryBank | None = None,
        compressor: nn.Module | None = None,
        key: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        **options: Any,
    ) -> TinyAlignVLM:
        """Compose a model from parts that exist; new connectors are drawn from ``connector_seed``.

        Args:
            vision_tower: a Hugging Face vision model; it is frozen.
            language_model: a Hugging Face causal language model.
            tokenizer: the language model's; says which id is BOS.
            memory: the bank to retrieve from. Its fingerprint, if it has one, must match the tower and the key.
            compressor: what makes the bank's values; gives their sizes when there is no bank yet.
            key: pools a query from features; the paper's by default.
            text_encoder: lets queries read the instruction; see `PairEncoder`.
            options: any other field of `TinyAlignConfig`.

        Raises:
            ValueError: a bank whose values are no latents, or unlike the compressor's.
            FingerprintMismatch: a bank whose keys or values were made by something else.
        """
        key = AttentionPooledKey() if key is None else key
        tower = vision_half(vision_tower)
        language_config = language_model.config.get_text_config()  # type: ignore[operator, union-attr]
        sizes = latent_sizes(memory, compressor)
        if sizes is None:
            options.setdefault("retrieval", "off")
        else:
            options.setdefault("num_latents", sizes[0])
            options.setdefault("latent_dim", sizes[1])
        options.setdefault(
            "bos_token_id", getattr(tokenizer if tokenizer is not None else language_config, "bos_token_id", None)
        )
        config = TinyAlignConfig(
            text_config=copy.deepcopy(language_config),
            vision_config=copy.deepcopy(tower.config),  # pyright: ignore[reportArgumentType]
            key_settings=settings_of(key),
            **options,
        )
        model = cls(config, vision_tower=tower, language_model=language_model)
        model._beside.key, model._beside.text_encoder = key, text_encoder
        if getattr(language_model, "generation_config", None) is not None:
            model.generation_config = language_model.generation_config  # pyright: ignore[reportAttributeAccessIssue]
        if memory is not None:
            model.memory = memory
            if compressor is not None and memory.fingerprint:
                whole = PairEncoder(model.vision, compressor, key, text_encoder=text_encoder).fingerprint()
                memory.require_fingerprint(whole, "value.compressor")
        return model

    @property
    def vision_tower(self) -> nn.Module:
        """The vision model itself."""
        return self.vision.tower

    @property
    def query_encoder(self) -> PairEncoder:
        """What makes queries: the model's own tower and key."""
        key = key_from(self.config.key_settings, self._beside.key)
        return PairEncoder(self.vision, None, key, text_encoder=self._beside.text_encoder)

    @property
    def memory(self) -> MemoryBank | None:
        """The bank that is retrieved from."""
        return self._beside.memory.value  # type: ignore[no-any-return]

    @memory.setter
    def memory(self, memory: MemoryBank | None) -> None:
        if memory is not None:
            check_memory(memory, self.config, self.query_encoder)
        self._beside.memory.value = memory

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embeddings."""
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(value)

    def _init_weights(self, module: nn.Module) -> None:
        """Every part is drawn where it is made; nothing is drawn again here."""

    def _apply(self, fn: Any, recurse: bool = True) -> TinyAlignVLM:
        super()._apply(fn, recurse)
        for module in (self._beside.key, self._beside.text_encoder):
            if module is not None:
                module._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def freeze_for(self, stage: str) -> TinyAlignVLM:
        """Choose what trains: the connectors alone ("pretrain"), or the language model as well ("instruct").

        The vision tower never trains. Of the retrieval branch only what the config's arm uses trains, so that no
        trained parameter goes without a gradient. A language model under PEFT keeps the choice PEFT made in "instruct".

        Raises:
            ValueError: another stage.
        """
        if stage not in _STAGES:
            raise ValueError(
                f"TinyAlignVLM.freeze_for: stage must be one of {_STAGES}, got {stage!r}. Choose one of them."
            )
        arm = self.config.retrieval
        self.vision.requires_grad_(False)
        self.connector.requires_grad_(True)
        if self.rag_connector is not None and self.prompt_latents is not None:
            self.rag_connector.requires_grad_(arm != "off")
            self.prompt_latents.requires_grad_(arm == "prompt")
        if stage == "pretrain":
            self.language_model.requires_grad_(False)
        elif not hasattr(self.language_model, "peft_config"):
            self.language_model.requires_grad_(True)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_counts: Tensor | None = None,
        image_features: Tensor | None = None,
        sample_ids: Tensor | None = None,
        groups: Tensor | None = None,
        neighbour_ids: Tensor | None = None,
        neighbour_scores: Tensor | None = None,
        retrieved: Any = None,
        query_text_ids: Tensor | None = None,
        query_text_mask: Tensor | None = None,
        retrieval: str | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        max_supervised_tokens: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        causal_only: bool = False,
        **kwargs: Any,
    ) -> TinyAlignOutput | tuple[Any, ...]:
        """Read a batch; with labels, learn from it.

        Args:
            input_ids: token ids with the image placeholders that the processor puts there.
            pixel_values: images of all rows, one after another.
            attention_mask: True (or 1) = keep.
            labels: token ids to learn, -100 elsewhere.
            image_counts: images per row.
            image_features: features of the tower, (num_images, N, D), in place of `pixel_values`.
            sample_ids: the rows' own ids; their bank entries and those of their group are not retrieved.
            groups: the rows' groups, where the bank does not know the samples.
            neighbour_ids: (B, K) bank ids found before, in place of a search.
            neighbour_scores: their scores, for a gated connector.
            retrieved: (values, mask[, scores]) in place of bank and search.
            query_text_ids: instruction tokens for the query's text encoder; never the answer's.
            query_text_mask: their mask.
            retrieval: the arm; the config's when None.
            past_key_values: a cache to continue from; nothing is retrieved again.
            use_cache: whether to return a cache.
            max_supervised_tokens: the most supervised tokens of any row, if known.
            num_items_in_batch: what the loss is divided by instead of this batch's supervised tokens.
            return_logits: whether to compute logits everywhere; by default only outside training or without labels.
            causal_only: no mask is needed: rows are padded on the right alone, and every neighbour was found.
            kwargs: passed on to the language model.
        """
        return_dict = kwargs.pop("return_dict", True)
        check_keywords(self.language_model, kwargs)
        if input_ids is None:
            raise ValueError(
                "TinyAlignVLM.forward: input_ids must be given, got None. Images and retrieval are placed by the "
                "ids; pass image_features= or retrieved= for what is computed already."
            )
        batch = Batch(
            input_ids, attention_mask, labels, pixel_values, image_features, image_counts, sample_ids, groups,
            neighbour_ids, neighbour_scores, retrieved, query_text_ids, query_text_mask, causal_only,
        )  # fmt: skip
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            output = continue_language(self.language_model, batch, past_key_values, use_cache, kwargs)
        else:
            embedded = self._embed(batch, retrieval)
            kwargs.update(past_key_values=past_key_values, use_cache=use_cache)
            output = read_language(
                self.language_model,
                embedded,
                kwargs,
                logits_everywhere=labels is None or not self.training if return_logits is None else return_logits,
                max_supervised_tokens=max_supervised_tokens,
                num_items_in_batch=num_items_in_batch,
            )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_counts: Tensor | None = None,
        image_features: Tensor | None = None,
        sample_ids: Tensor | None = None,
        groups: Tensor | None = None,
        neighbour_ids: Tensor | None = None,
        neighbour_scores: Tensor | None = None,
        retrieved: Any = None,
        query_text_ids: Tensor | None = None,
        query_text_mask: Tensor | None = None,
        retrieval: str | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Continue each prompt and return the new ids; further arguments go to the language model's `generate`.

        Raises:
            ValueError: rows that are padded on the right.
        """
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "TinyAlignVLM.generate: attention_mask must be padded on the left, got rows "
                f"{(attention_mask[:, -1] == 0).nonzero().flatten().tolist()} that end in padding. Let the processor "
                "pad: processor(text=..., images=..., padding=True)."
            )
        generate_kwargs.pop("labels", None)
        if generate_kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError(
                "TinyAlignVLM.generate: inputs_embeds must be None, got embeddings. Images and retrieval are placed by "
                "input_ids; pass those."
            )
        batch = Batch(
            input_ids, attention_mask, None, pixel_values, image_features, image_counts, sample_ids, groups,
            neighbour_ids, neighbour_scores, retrieved, query_text_ids, query_text_mask,
        )  # fmt: skip
        embedded = self._embed(batch, retrieval)
        return write_language(self.language_model, embedded, generate_kwargs)

    def _embed(self, batch: Batch, retrieval: str | None) -> Embedded:
        arm = self.config.retrieval if retrieval is None else retrieval
        check_arm("TinyAlignVLM.forward", arm)
        return embed_batch(self, batch, arm)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write config and weights; the bank's folder is noted relative to the checkpoint, and not copied."""
        checkpoint.note_memory(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> TinyAlignVLM:
        """Load strictly, and attach the bank.

        Args:
            pretrained_model_name_or_path: what `save_pretrained` wrote.
            args: passed on to transformers.
            kwargs: ``memory``, ``key`` and ``text_encoder`` as in `from_parts`; the rest is transformers'. Without
                ``memory`` the bank is looked for where the checkpoint says.

        Raises:
            ValueError: weights that are missing or unexpected, by name.
            FingerprintMismatch: a bank made by another encoder.
        """
        beside = {name: kwargs.pop(name, None) for name in ("memory", "key", "text_encoder")}
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)  # pyright: ignore[reportGeneralTypeIssues]
        checkpoint.check_complete(info, pretrained_model_name_or_path)
        model._beside.key = key_from(model.config.key_settings, beside["key"])
        model._beside.text_encoder = beside["text_encoder"]
        if getattr(model, "generation_config", None) is not None:
            model.language_model.generation_config = model.generation_config
        memory = beside["memory"]
        model.memory = checkpoint.find_memory(model, pretrained_model_name_or_path) if memory is None else memory
        model.freeze_for("pretrain")  # loading sets every parameter to train
        return (model, info) if with_info else model  # type: ignore[return-value]
