"""The hook that writes retrieval tokens into the embeddings of any language model, and leaves no trace when removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingPlug:
    """Write H_R over the embeddings wherever the input id is the retrieval id.

    The one place that every Hugging Face model passes on its way from ids to embeddings is the module that
    ``get_input_embeddings()`` returns. A hook before it keeps ids within the table, one after it writes the tokens out
    of place. The module is looked up again at every use, because PEFT and others replace it.

    Args:
        model: anything with ``get_input_embeddings()``.
        rag_token_id: marks a retrieval position in `input_ids`; it may lie outside the vocabulary.
    """

    def __init__(self, model: nn.Module, rag_token_id: int) -> None:
        self.model, self.rag_token_id = model, rag_token_id
        self.tokens: Tensor | None = None
        self.offset: Tensor | None = None
        self.calls = 0
        self._marked: Tensor | None = None
        self._module: nn.Module | None = None
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingPlug:
        twin = EmbeddingPlug(copy.deepcopy(self.model, memo), self.rag_token_id)
        memo[id(self)] = twin
        return twin

    @contextmanager
    def use(self, tokens: Tensor, *, continues: bool = False) -> Iterator[None]:
        """Write these tokens, (B, T, D), in every call within the block.

        Ids may come as B rows or as B * n rows (beams, several sequences each), where row i belongs to sample i // n.
        A prompt may be read at once, again and again, or in pieces.

        Args:
            tokens: what to write.
            continues: the model may go on from a cache that holds the tokens already, and then nothing is written.

        Raises:
            RuntimeError: nothing was written although tokens were given.
        """
        if self.tokens is not None:
            raise RuntimeError(
                "EmbeddingPlug.use: only one set of tokens may be in use, got a second. Leave the first."
            )
        self.install()
        self.tokens, self.offset, self.calls = tokens, None, 0
        try:
            yield
            if self.calls == 0 and not continues and tokens.shape[1]:
                raise RuntimeError(
                    "EmbeddingPlug.use: the model must look its input_ids up, got retrieved latents and no look-up. "
                    "Pass input_ids with retrieval tokens (aligned.processor places them), not inputs_embeds."
                )
        finally:
            self.tokens, self.offset, self._marked = None, None, None

    def remove(self) -> None:
        """Take both hooks off, and what copies of them were left in modules that copy others."""
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            _sweep(module)
        self._handles, self._module = [], None

    def install(self) -> None:
        """Put both hooks on the module that embeds now; called again at every use."""
        module = self.model.get_input_embeddings()  # type: ignore[operator]
        if module is not self._module:
            self.remove()
            before = module.register_forward_pre_hook(_Before(self), prepend=True)
            after = module.register_forward_hook(_After(self))
            self._handles, self._module = [before, after], module

    def before(self, ids: Tensor) -> Tensor:
        """Remember where to write, and hand on ids that the table holds."""
        if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.is_floating_point():
            self._marked = None  # transformers looks single ids up to find placeholders
            return ids
        self._marked = ids == self.rag_token_id
        if self.tokens is None and ids.device.type == "cpu" and bool(self._marked.any()):
            raise ValueError(
                f"EmbeddingPlug: input_ids must hold no retrieval token {self.rag_token_id} without latents, got some. "
                f"Call the attached model, or leave the tokens out."
            )
        return ids.masked_fill(self._marked, 0)

    def after(self, embeds: Tensor) -> Tensor:
        """Write the tokens over the marked places."""
        marked, tokens = self._marked, self.tokens
        self._marked = None
        if marked is None or tokens is None or marked.shape != embeds.shape[:2]:
            return embeds
        R, S = marked.shape
        if R % tokens.shape[0]:
            raise ValueError(
                f"EmbeddingPlug: input_ids must have {tokens.shape[0]} rows or a multiple, got {R}. Give latents for "
                f"every row."
            )
        tokens = tokens.repeat_interleave(R // tokens.shape[0], dim=0)
        T, count = tokens.shape[1], marked.sum(dim=1)
        start = self.offset if self.offset is not None and len(self.offset) == R else torch.zeros_like(count)
        if S > 1:  # a prompt that is read again starts anew; a token that the model wrote itself does not
            start = torch.where(start >= T, torch.zeros_like(start), start)
        place = start[:, None] + marked.cumsum(dim=1) - 1
        if S > 1:
            self._check(start + count, T)
        self.offset = (start + count).clamp(max=T)
        self.calls += 1
        written = (
            tokens.gather(1, place.clamp(0, max(T - 1, 0))[..., None].expand(-1, -1, tokens.shape[2])) if T else embeds
        )
        keep = (marked & (place < T))[..., None]
        return torch.where(keep, written.to(device=embeds.device, dtype=embeds.dtype), embeds)

    def _check(self, total: Tensor, T: int) -> None:
        if total.device.type != "cpu":
            torch._assert_async((total <= T).all(), "EmbeddingPlug: a row holds more retrieval tokens than retrieved")
        elif bool((total > T).any()):
            raise ValueError(
                f"EmbeddingPlug: rows must hold at most the {T} retrieval tokens that were retrieved, got "
                f"{int(total.max())}. Let aligned.processor place them, with the k of this call."
            )


def is_plugged(model: nn.Module) -> bool:
    """Whether a plug writes into any embedding of this model, be it wrapped or not."""
    hooks: list[Any] = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return any(isinstance(hook, _Hook) and hook.plug is not None for hook in hooks)


def _sweep(module: nn.Module) -> None:
    """Take off what a copy of another module brought along."""
    kinds: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    for hooks in kinds:
        for number in [n for n, hook in hooks.items() if isinstance(hook, _Hook) and hook.plug is None]:
            del hooks[number]


class _Hook:
    """A hook whose copy is silent, unless the model it belongs to is copied with it."""

    def __init__(self, plug: EmbeddingPlug | None) -> None:
        self.plug = plug

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)(None)


class _Before(_Hook):
    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.plug is None or not args:
            return None
        return (self.plug.before(args[0]), *args[1:])


class _After(_Hook):
    def __call__(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self.plug is None else self.plug.after(output)
