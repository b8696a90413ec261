"""A model with retrieval attached: what it takes, what it refuses, and what it leaves behind when detached."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from tinyalign.connectors import RAGConnector
from tinyalign.memory import MemoryBank
from tinyalign.models.beside import Shared
from tinyalign.models.configuration import check_arm
from tinyalign.models.outputs import Retrieved
from tinyalign.models.rag_hook import EmbeddingPlug
from tinyalign.models.rag_inputs import (
    check_companions,
    image_markers,
    instruction_of,
    pad_of,
    placement_of,
    splice_rag,
)
from tinyalign.models.rag_query import Query
from tinyalign.models.retrieval import arm_neighbours, clear_rows

_OWN = ("sample_ids", "groups", "neighbour_ids", "neighbour_scores", "retrieved", "queries", "retrieval")


class AttachedVLM(nn.Module):
    """A vision-language (or language) model with a retrieval branch attached; made by `attach_memory`.

    The model itself is not changed: one hook on its input embeddings writes the connector's tokens over the retrieval
    positions of the prompt. `detach` takes the hook off. Arguments that are not retrieval's are the model's own.

    Args:
        model: the model.
        connector: makes retrieval tokens.
        rag_token_id: marks them in `input_ids`.
        num_neighbours: entries per row, K.
        num_latents: latents per entry, L.
        retrieval: the arm used when a call names none.
        retrieval_seed: what the control arms draw from.

    Shape:
        input_ids, labels: (B, S), as the model takes them, with retrieval positions. neighbour_ids: (B, K), int64.

    Source:
        TinyAlign, section 4.1 and Figure 1, brought to a model that is not ours.
    """

    def __init__(
        self,
        model: nn.Module,
        connector: RAGConnector,
        rag_token_id: int,
        *,
        num_neighbours: int,
        num_latents: int,
        retrieval: str = "bank",
        retrieval_seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.connector = model, connector
        self.rag_token_id, self.num_neighbours, self.num_latents = rag_token_id, num_neighbours, num_latents
        self.retrieval, self.retrieval_seed = retrieval, retrieval_seed
        self.plug = EmbeddingPlug(model, rag_token_id)
        self._memory = Shared()
        self._query: Query | None = None
        self._processor: Any = None
        self.register_state_dict_post_hook(_drop_ties)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_restore_ties)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    @property
    def memory(self) -> MemoryBank | None:
        """The bank that is retrieved from."""
        return self._memory.value  # type: ignore[no-any-return]

    @property
    def num_retrieval_tokens(self) -> int:
        """Retrieval positions in every row."""
        return self.connector.tokens_for(self.num_neighbours, self.num_latents)

    # Inputs

    def processor(self, *args: Any, retrieval: str | None = None, **kwargs: Any) -> Any:
        """Run the model's own processor, then place the retrieval tokens in what it made.

        Raises:
            ValueError: the model was attached without a processor.
        """
        if self._processor is None:
            raise ValueError(
                "AttachedVLM.processor: a processor must be attached, got None. Pass it to attach_memory, or place the "
                "tokens with aligned.splice(batch)."
            )
        kwargs.setdefault("return_tensors", "pt")
        batch = self._processor(*args, **kwargs)
        if (retrieval or self.retrieval) == "off":
            return batch
        spliced = self.splice(batch)
        return type(batch)(spliced) if hasattr(batch, "data") else spliced

    def splice(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Place the retrieval tokens in a batch that a processor or collator made; see `splice_rag`."""
        where = placement_of(self.model, self._processor)
        return splice_rag(batch, self.rag_token_id, self.num_retrieval_tokens, **where)

    # Running

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        """Run the model on a batch with retrieval tokens; `labels` must have their length, and never count them.

        Args:
            labels: as the model takes them; retrieval positions are set to -100.
            inputs: the model's own arguments, and ``sample_ids``, ``groups``, ``neighbour_ids``, ``neighbour_scores``,
                ``retrieved`` (values, mask[, scores]), ``queries`` (B, D) and ``retrieval`` as in `TinyAlignVLM`.
        """
        if labels is not None:
            inputs["labels"] = labels
        inputs, tokens = self._prepare(inputs)
        if tokens is None:
            return self._joined(self.model(**inputs))
        with self.plug.use(tokens):
            return self.model(**inputs)

    def _joined(self, output: Any) -> Any:
        """Let a call without retrieval give the connector a gradient of zeros: other ranks wait for one."""
        loss = getattr(output, "loss", None)
        if self.training and torch.is_grad_enabled() and isinstance(loss, Tensor):
            for parameter in self.connector.parameters():
                loss = loss + parameter.flatten()[:0].sum().to(loss)  # a sum of nothing: not a bit is changed
            output.loss = loss
        return output

    @torch.no_grad()
    def generate(self, **inputs: Any) -> Any:
        """Continue prompts; everything the model's own `generate` takes, and returns what that returns."""
        if inputs.get("inputs_embeds") is not None:
            raise ValueError(
                "AttachedVLM.generate: inputs_embeds must be None, got embeddings. Retrieval tokens are placed by "
                "input_ids; pass those."
            )
        inputs, tokens = self._prepare(inputs)
        if tokens is None:
            return self.model.generate(**inputs)  # type: ignore[operator]
        self._check_vocabulary(inputs)
        if self._writable():
            inputs["suppress_tokens"] = [*(inputs.get("suppress_tokens") or []), self.rag_token_id]
        with self.plug.use(tokens):
            return self.model.generate(**inputs)  # type: ignore[operator]

    def _check_vocabulary(self, inputs: Mapping[str, Any]) -> None:
        """Refuse what looks prompts up by id, where retrieval ids lie outside the vocabulary."""
        penalty, assistant = inputs.get("encoder_repetition_penalty", 1.0), inputs.get("assistant_model")
        if penalty != 1.0 and not self._writable():
            raise ValueError(
                f"AttachedVLM.generate: encoder_repetition_penalty must be 1 where retrieval ids lie outside the "
                f"vocabulary, got {penalty}. Use repetition_penalty."
            )
        rows = None if assistant is None else assistant.get_input_embeddings().weight.shape[0]
        if rows is not None and rows <= self.rag_token_id:
            raise ValueError(
                f"AttachedVLM.generate: assistant_model must have a row for the retrieval id {self.rag_token_id}, got "
                f"{rows} rows. Attach with a tokenizer that leaves a row of the embeddings unused."
            )

    def _unpacked(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "AttachedVLM.generate_batch: prompts must come as rows of one batch, got a call of continuous batching, "
            "which packs them into one row where latents no longer belong to anyone. Use aligned.generate."
        )

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _unpacked

    @contextmanager
    def use(self, values: Tensor, mask: Tensor | None = None, scores: Tensor | None = None) -> Iterator[None]:
        """Within the block every call of the bare model writes the tokens of these latents, (B, K, L, latent_dim)."""
        with self.plug.use(self.connector(values, mask, scores).tokens):
            yield

    def detach(self) -> nn.Module:
        """Take retrieval off and return the model as it was."""
        self.plug.remove()
        return self.model

    # What was trained

    def save_pretrained(self, path: Any) -> None:
        """Write the connector, whatever else was trained, and where the bank is; not the model itself."""
        from tinyalign.models.attach_checkpoint import save_attached

        save_attached(self, path)

    def _prepare(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Take retrieval's own arguments out, and make the tokens to write; None where none are."""
        own = {name: inputs.pop(name, None) for name in _OWN}
        self._check_names(inputs)
        arm = own["retrieval"] or self.retrieval
        check_arm("AttachedVLM.forward", arm)
        ids = inputs.get("input_ids")
        cache = inputs.get("past_key_values")
        if arm == "off":
            return inputs, None
        if ids is None:
            raise ValueError(
                "AttachedVLM.forward: input_ids must be given, got None. Retrieval tokens are placed by ids, not by "
                "inputs_embeds."
            )
        if cache is not None and cache.get_seq_length() > 0:
            return inputs, None
        marked = ids == self.rag_token_id
        if ids.device.type == "cpu" and not bool((marked.sum(dim=1) == self.num_retrieval_tokens).all()):
            raise ValueError(
                f"AttachedVLM.forward: every row must hold {self.num_retrieval_tokens} retrieval tokens, got "
                f"{marked.sum(dim=1).tolist()}. Make inputs with aligned.processor or aligned.splice, or use "
                f"retrieval='off'."
            )
        check_companions(ids, inputs, "AttachedVLM.forward")
        if inputs.get("labels") is not None:
            inputs["labels"] = inputs["labels"].masked_fill(marked, -100)
        tokens, found = self.connector(*self._retrieve(inputs, own, arm, ids)[:3])
        if tokens.shape[:2] != (len(ids), self.num_retrieval_tokens):
            raise ValueError(
                f"AttachedVLM.forward: latents must give {self.num_retrieval_tokens} tokens to each of {len(ids)} "
                f"rows, got {tokens.shape[1]} for {len(tokens)}. Retrieve k={self.num_neighbours} entries per row."
            )
        keep = inputs.get("attention_mask")
        keep = torch.ones_like(ids) if keep is None else keep
        if keep.dim() == 2 and found.shape[1]:  # a position without a neighbour is not attended to
            here = found.gather(1, (marked.cumsum(dim=1) - 1).clamp(min=0, max=found.shape[1] - 1))
            inputs["attention_mask"] = keep.masked_fill(marked & ~here, 0)
        return inputs, tokens

    def _retrieve(self, inputs: dict[str, Any], own: dict[str, Any], arm: str, ids: Tensor) -> Retrieved:
        if own["retrieved"] is not None:
            return Retrieved(*own["retrieved"])
        if arm == "prompt":
            raise ValueError(
                "AttachedVLM.forward: retrieval must be an arm of the bank, got 'prompt'. Pass learned latents as "
                "retrieved=(latents, mask)."
            )
        if self.memory is None:
            raise ValueError(
                "AttachedVLM.forward: memory must be attached to retrieve, got None. Pass memory= to attach_memory, or "
                "retrieved= to this call."
            )
        if own["neighbour_ids"] is not None:
            values, mask = self.memory.gather(own["neighbour_ids"])
            return Retrieved(values, mask, own["neighbour_scores"], own["neighbour_ids"])
        if arm == "bank" and self.training and own["sample_ids"] is None:
            raise ValueError(
                "AttachedVLM.forward: sample_ids must be given in training, got None. Without them a sample could "
                "retrieve itself; pass sample_ids or neighbour_ids, or call eval()."
            )
        with torch.no_grad():
            asked = own["queries"] if own["queries"] is not None else self.queries(inputs)
            queries, has_query = asked if isinstance(asked, tuple) else (asked, None)
            found = arm_neighbours(
                self.memory,
                arm,
                queries.detach(),
                k=self.num_neighbours,
                sample_ids=own["sample_ids"],
                groups=own["groups"],
                seed=self.retrieval_seed,
            )
            if has_query is not None:
                found = clear_rows(found, has_query)
            values, mask = self.memory.gather(found.ids.to(ids.device))
        return Retrieved(values, mask, found.scores.to(ids.device), found.ids)

    def queries(self, inputs: Mapping[str, Any]) -> Any:
        """Keys to search by, (B, D), and which rows have one: `query` reads images and instruction, never answers."""
        if self._query is None:
            raise ValueError(
                "AttachedVLM.queries: query must be attached to search, got None. Pass query= to attach_memory, or "
                "queries= or neighbour_ids= to this call."
            )
        asked = instruction_of(
            inputs, image_ids=image_markers(self.model), rag_token_id=self.rag_token_id, pad_id=pad_of(self.model)
        )
        return self._query(asked)

    def query_fingerprint(self) -> dict[str, Any] | None:
        """What queries are made by, as fields of a bank's fingerprint; None where that is not known."""
        named: Any = getattr(self._query, "fingerprint", None)
        made: Any = named() if callable(named) else None
        return None if made is None else dict(made)

    def _check_names(self, inputs: Mapping[str, Any]) -> None:
        """Models swallow unknown arguments; one that nearly names an argument of retrieval is a slip."""
        taken = inspect.signature(self.model.forward).parameters
        for name in inputs:
            meant = get_close_matches(name, (*_OWN, "rag_latents"), n=1, cutoff=0.8)
            if meant and name not in taken:
                other = "retrieved" if meant[0] == "rag_latents" else meant[0]
                raise TypeError(
                    f"AttachedVLM.forward: arguments must be known, got {name!r}, which the model would ignore. Say "
                    f"{other}=."
                )

    def _writable(self) -> bool:
        """Whether the head could write the retrieval id."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return head is not None and self.rag_token_id < head.weight.shape[0]


def _ties(module: nn.Module) -> dict[str, str]:
    """Further names of a parameter that has several (a head tied to its embeddings), each with the first."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


def _drop_ties(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Name a tied weight once: safetensors, and with it Trainer, refuses to write one tensor under two names."""
    for name in _ties(module):
        state.pop(prefix + name, None)


def _restore_ties(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, source in _ties(module).items():
        if prefix + source in state:
            state.setdefault(prefix + name, state[prefix + source])
