"""Running a tower up to the layer whose output is wanted, whatever its class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _ReachedError(Exception):
    """Leaves a forward from inside, with what was wanted of it."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def early_exit(tower: nn.Module, hidden_state: int) -> str | None:
    """Return the name of the layer whose output should be hidden state number ``hidden_state``.

    None where nothing can be saved or found: the embeddings, the last layer (whose output some towers normalise), or a
    tower without exactly one list of ``num_hidden_layers`` layers.

    Example:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> config = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1,
        ...                           image_size=8, patch_size=4)
        >>> early_exit(CLIPVisionModel(config), 2)
        'encoder.layers.1'
    """
    config: Any = tower.config
    layers = config.num_hidden_layers
    lists = [name for name, part in tower.named_modules() if isinstance(part, nn.ModuleList) and len(part) == layers]
    if not 0 < hidden_state < layers or len(lists) != 1:
        return None
    return f"{lists[0]}.{hidden_state - 1}"


@contextmanager
def output_of(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect what a layer gives while the block runs."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_hook(lambda _, __, output: seen.append(_tensor(output)))
    try:
        yield seen
    finally:
        handle.remove()


def run_until(tower: nn.Module, layer: nn.Module, pixel_values: Tensor) -> Tensor:
    """Run the tower and leave it behind ``layer``, with that layer's output.

    The hook stands behind all others of the layer, those of a sharding wrapper among them, so that the layer has done
    everything that belongs to its forward.
    """

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        raise _ReachedError(_tensor(output))

    handle = layer.register_forward_hook(leave)
    try:
        tower(pixel_values=pixel_values)
    except _ReachedError as reached:
        return reached.output
    finally:
        handle.remove()
    raise AssertionError("the layer is part of the tower's forward: the first run saw it")


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
