"""A trainable null input: the constant soft prompt whose cross-entropy stands for H(L) in V-information."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyalign.theory.likelihood import IGNORED, SequenceNLL, sequence_nll

__all__ = ["NullInput", "train_null_input"]


class NullInput(nn.Module):
    """The same learned prompt for every sample; image and instruction are dropped, only the target remains.

    V-information needs the best prediction *without* input that the model family allows. An untrained blank image adds
    its own error to the difference, so this prompt is trained with the model held fixed.

    Args:
        embed_dim: width of the language model's embeddings.
        num_tokens: length of the prompt.
        std: standard deviation of its initial values.
        generator: source of the initial values.
        device: where the prompt lives.
        dtype: of the prompt.

    Shape:
        labels: (B, T), -100 where nothing is supervised. returns: (B,) nats and (B,) counts.

    Raises:
        ValueError: ``num_tokens`` below 1, or a row of labels without a target.

    Source:
        Xu et al. 2020, arXiv 2002.10689, definition 1 (the null input); Lester et al. 2021, arXiv 2104.08691.

    Example:
        >>> NullInput(8, num_tokens=2).prompt.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_tokens: int = 4,
        std: float = 0.02,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(
                f"NullInput: num_tokens must be at least 1, got {num_tokens}. One token already holds a constant."
            )
        values = torch.randn(num_tokens, embed_dim, generator=generator) * std
        self.prompt = nn.Parameter(values.to(device=device, dtype=dtype))

    def forward(self, language_model: Any, labels: Tensor) -> SequenceNLL:
        """Return the NLL of each row's supervised tokens after the prompt alone.

        Shape:
            labels: (B, T), -100 where nothing is supervised. returns: (B,) nats and (B,) counts.
        """
        counts = (labels != IGNORED).sum(dim=1)
        if int(counts.min()) == 0:
            row = int(counts.argmin())
            raise ValueError(
                f"NullInput.forward: labels must supervise a token in every row, got none in row {row}. "
                "Drop that sample."
            )
        targets = _pack(labels, counts)
        embed = language_model.get_input_embeddings()
        words = embed(targets.clamp(min=0))
        prompt = self.prompt.to(words.dtype).expand(len(labels), -1, -1)
        embeds = torch.cat([prompt, words], dim=1)  # (B, P + U, D)
        blank = targets.new_full((len(labels), prompt.shape[1]), IGNORED)
        shown = torch.cat([torch.ones_like(blank), (targets != IGNORED).long()], dim=1)
        output = language_model(inputs_embeds=embeds, attention_mask=shown)
        return sequence_nll(output.logits, torch.cat([blank, targets], dim=1))


def train_null_input(
    language_model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_tokens: int = 4,
    steps: int = 200,
    learning_rate: float = 5e-2,
    seed: int = 0,
) -> NullInput:
    """Fit a ``NullInput`` to the targets of ``batches`` with the language model fixed.

    Args:
        language_model: a causal LM that takes ``inputs_embeds``; a ``TinyAlignVLM`` gives its own ``language_model``.
        batches: batches with ``"labels"``, repeated until ``steps`` are done.
        num_tokens: length of the prompt.
        steps: optimiser steps.
        learning_rate: of Adam, decayed to zero.
        seed: of the initial prompt.

    Raises:
        ValueError: ``batches`` is empty.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
        >>> train_null_input(model, [{"labels": torch.randint(3, 20, (4, 6))}], num_tokens=2, steps=2).prompt.shape
        torch.Size([2, 16])
    """
    language_model = getattr(language_model, "language_model", language_model)
    table = language_model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    scale = float(table.detach().float().std())
    null = NullInput(
        table.shape[1], num_tokens=num_tokens, std=scale, generator=generator, device=table.device, dtype=torch.float32
    )
    optimizer = torch.optim.Adam([null.prompt], lr=learning_rate * max(scale, 1e-3))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    trainable = [(parameter, parameter.requires_grad) for parameter in language_model.parameters()]
    was_training = language_model.training
    language_model.eval()
    for parameter, _ in trainable:
        parameter.requires_grad_(False)
    try:
        done = 0
        while done < steps:
            before = done
            for batch in batches:
                result = null(language_model, batch["labels"].to(table.device))
                optimizer.zero_grad()
                (result.nll.sum() / result.tokens.sum()).backward()
                optimizer.step()
                schedule.step()
                done += 1
                if done == steps:
                    break
            if done == before:
                raise ValueError(
                    "train_null_input: batches must hold at least one batch, got none. Pass a re-iterable loader."
                )
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        language_model.train(was_training)
    return null


def _pack(labels: Tensor, counts: Tensor) -> Tensor:
    """Move each row's supervised tokens to the front, in order; -100 behind them."""
    width = int(counts.max())
    order = (labels == IGNORED).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    return labels.gather(1, order)
