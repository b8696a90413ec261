"""Text and pictures in, model inputs out: the placeholders are expanded here, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from tinyalign._checks import check_positive
from tinyalign.data import IMAGE_PLACEHOLDER, ChatRenderer, Rendered, Renderer, Turn, encode_text, load_image
from tinyalign.data.collate import pad_token_id
from tinyalign.models.configuration import IMAGE_TOKEN_ID


class TinyAlignProcessor(ProcessorMixin):  # type: ignore[misc]
    """Tokenize prompts that hold ``<image>``, and prepare the pictures they speak of.

    Each ``<image>`` becomes `num_image_tokens` copies of an id that no vocabulary has, so the tokenizer stays as it is.
    Retrieval tokens are not placed here: the model inserts them behind the last image.

    Args:
        image_processor: a Hugging Face image processor.
        tokenizer: the language model's tokenizer.
        num_image_tokens: positions that one image takes; `for_model` reads it off the tower.
        num_retrieval_tokens: positions that retrieval will take, for length budgets.
        image_token_id: what marks an image position.
        chat_template: kept with the processor when it is saved; the tokenizer's own when None.

    Raises:
        ValueError: placeholders and images that differ in number, an unreadable picture, or no text.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from transformers import AutoImageProcessor, AutoTokenizer
        >>> from tinyalign.models.tiny import write_tiny_parts
        >>> parts = write_tiny_parts(tempfile.mkdtemp(), ["what is it"])
        >>> pictures = AutoImageProcessor.from_pretrained(parts.vision)
        >>> processor = TinyAlignProcessor(pictures, AutoTokenizer.from_pretrained(parts.llm), num_image_tokens=16)
        >>> inputs = processor(images=Image.new("RGB", (40, 30)), text=processor.prompt("what is it"))
        >>> int((inputs["input_ids"] == -200).sum()), tuple(inputs["pixel_values"].shape)
        (16, (1, 3, 32, 32))
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        num_retrieval_tokens: int = 0,
        image_token_id: int = IMAGE_TOKEN_ID,
        chat_template: Any = None,
    ) -> None:
        check_positive("TinyAlignProcessor", "num_image_tokens", num_image_tokens)
        check_positive("TinyAlignProcessor", "num_retrieval_tokens", num_retrieval_tokens, least=0)
        self.num_image_tokens, self.num_retrieval_tokens = num_image_tokens, num_retrieval_tokens
        self.image_token_id = image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def for_model(cls, model: Any, image_processor: Any, tokenizer: Any) -> TinyAlignProcessor:
        """Build the processor of a model: it says how many positions images and retrieval take."""
        return cls(
            image_processor,
            tokenizer,
            num_image_tokens=model.vision.num_tokens,
            num_retrieval_tokens=model.config.num_retrieval_tokens,
            image_token_id=model.config.image_token_id,
        )

    def prompt(self, question: str, *, num_images: int = 1, renderer: Renderer | None = None) -> str:
        """Write a question as the prompt that training showed the model, up to where its answer begins."""
        head = f"{IMAGE_PLACEHOLDER}\n" * (num_images - question.count(IMAGE_PLACEHOLDER))
        render = ChatRenderer(self.tokenizer) if renderer is None else renderer
        return render([Turn("user", head + question)], add_generation_prompt=True).text

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding_side: str = "left",
        return_tensors: str = "pt",
        padding: bool = True,
    ) -> BatchFeature:
        """Make the inputs of `TinyAlignVLM.generate`: rows padded on the left, images in row order.

        Args:
            images: pictures (or paths) in the order of the placeholders, in one list or one list per text.
            text: one prompt or several, with ``<image>`` where a picture goes.
            padding_side: "left" to generate, "right" to train.
            return_tensors: only "pt".
            padding: rows are always padded to the longest.

        Shape:
            input_ids, attention_mask: (B, S). image_counts: (B,). pixel_values: (num_images, C, H, W), if any.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise ValueError(
                "TinyAlignProcessor: text must hold at least one prompt, got none. Pass text=processor.prompt(...)."
            )
        if return_tensors != "pt" or padding_side not in ("left", "right") or not padding:
            raise ValueError(
                f"TinyAlignProcessor: rows must become padded torch tensors, got return_tensors={return_tensors!r}, "
                f"padding={padding!r}, padding_side={padding_side!r}. Use 'pt', True and 'left' or 'right'."
            )
        pictures = _flatten(images)
        rows = [
            encode_text(
                self.tokenizer,
                Rendered(one, ()),
                num_image_tokens=self.num_image_tokens,
                image_token_id=self.image_token_id,
            )
            for one in texts
        ]
        counts = [row.num_images for row in rows]
        given = [len(_flatten(entry)) for entry in images] if _per_text(images, len(texts)) else None
        if sum(counts) != len(pictures) or (given is not None and given != counts):
            raise ValueError(
                f"TinyAlignProcessor: images must match the {IMAGE_PLACEHOLDER} placeholders of each text, got "
                f"{counts} placeholders and {len(pictures) if given is None else given} images. Write one "
                f"{IMAGE_PLACEHOLDER} per picture."
            )
        pad, width = pad_token_id(self.tokenizer), max(len(row.input_ids) for row in rows)

        def padded(values: list[int], fill: int) -> list[int]:
            gap = [fill] * (width - len(values))
            return gap + values if padding_side == "left" else values + gap

        batch: dict[str, Any] = {
            "input_ids": torch.tensor([padded(row.input_ids, pad) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]).bool(),
            "image_counts": torch.tensor(counts),
        }
        if pictures:
            loaded = [load_image(picture) for picture in pictures]
            batch["pixel_values"] = self.image_processor(images=loaded, return_tensors="pt")["pixel_values"]
        return BatchFeature(batch)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return ["input_ids", "attention_mask", "image_counts", "pixel_values"]


def _per_text(images: Any, num_texts: int) -> bool:
    """Whether images come as one list per text."""
    return (
        isinstance(images, (list, tuple))
        and len(images) == num_texts
        and all(isinstance(i, (list, tuple)) for i in images)
    )


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for entry in images for picture in _flatten(entry)]
    return [images]
