"""The MLP that carries features of one space into the language model's embedding space."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinyalign._checks import check_positive

_LINEAR = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)")


class MLPConnector(nn.Module):
    """Map every token to the language model's width by a small MLP with GELU between its layers.

    The connector of LLaVA and of the paper (two layers): token by token, so padding and batch mates change nothing.

    Args:
        input_dim: width of the incoming features.
        output_dim: width of the language model's embeddings.
        depth: number of linear layers; 1 is a plain projection.
        device: where the weights live.
        dtype: of the weights.

    Shape:
        features: (..., input_dim), float of any precision. returns: (..., output_dim), same leading sizes and dtype of
        the weights.

    Raises:
        ValueError: `features` ends in another width, or a size is not a positive integer.
        TypeError: `features` are integers.

    Source:
        Liu et al. 2023, arXiv 2310.03744, section 3.3 (``mlp2x_gelu``); TinyAlign, section 5.1.

    Example:
        >>> connector = MLPConnector(1152, 64)
        >>> connector(torch.zeros(2, 729, 1152)).shape
        torch.Size([2, 729, 64])
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        depth: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("input_dim", input_dim), ("output_dim", output_dim), ("depth", depth)):
            check_positive("MLPConnector", name, value)
        self.input_dim, self.output_dim, self.depth = input_dim, output_dim, depth
        layers: list[nn.Module] = [nn.Linear(input_dim, output_dim, device=device, dtype=dtype)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(output_dim, output_dim, device=device, dtype=dtype)]
        self.layers = nn.Sequential(*layers)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that inputs are expected in."""
        return next(self.parameters()).dtype

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., input_dim) to (..., output_dim)."""
        if features.dim() < 1 or features.shape[-1] != self.input_dim:
            raise ValueError(
                f"MLPConnector.forward: features must have last size {self.input_dim}, got {tuple(features.shape)}. "
                f"Build the connector with the width of the tower (or of the latents) that feeds it."
            )
        if not features.is_floating_point():
            raise TypeError(
                f"MLPConnector.forward: features must be floating point, got {features.dtype}. Pass what the tower "
                "returns, not pixels or ids."
            )
        return self.layers(features.to(self.weight_dtype))  # type: ignore[no-any-return]

    @classmethod
    def from_llava_state_dict(cls, state_dict: Mapping[str, Tensor]) -> MLPConnector:
        """Build the connector from a LLaVA or TinyLLaVA projector (``mlp2x_gelu``, ``linear``) that is already trained.

        Args:
            state_dict: entries ending in ``<index>.weight`` and ``<index>.bias``, under any prefix
                (``model.mm_projector.0.weight``, ``_connector.0.weight``), or a single ``weight`` and ``bias``.

        Raises:
            ValueError: the entries are not one chain of linear layers whose later widths are equal.

        Example:
            >>> old = {"mm_projector.0.weight": torch.ones(8, 4), "mm_projector.0.bias": torch.zeros(8),
            ...        "mm_projector.2.weight": torch.ones(8, 8), "mm_projector.2.bias": torch.zeros(8)}
            >>> MLPConnector.from_llava_state_dict(old).depth
            2
        """
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state_dict.items():
            match = _LINEAR.fullmatch(name)
            kind = name.rpartition(".")[2]
            if match is None and kind not in ("weight", "bias"):
                raise ValueError(_not_a_projector(f"an entry {name!r}"))
            found.setdefault(int(match.group(1)) if match else 0, {})[kind] = tensor
        order = sorted(found)
        if (
            not order
            or order != list(range(0, 2 * len(order), 2))
            or any(set(found[i]) != {"weight", "bias"} for i in order)
        ):
            raise ValueError(_not_a_projector(f"entries {sorted(state_dict)}"))
        weights = [found[i]["weight"] for i in order]
        output_dim, input_dim = weights[0].shape
        if any(tuple(weight.shape) != (output_dim, output_dim) for weight in weights[1:]):
            raise ValueError(_not_a_projector(f"weights of shapes {[tuple(weight.shape) for weight in weights]}"))
        connector = cls(input_dim, output_dim, depth=len(order), dtype=weights[0].dtype)
        connector.layers.load_state_dict({f"{i}.{kind}": found[i][kind] for i in order for kind in ("weight", "bias")})
        return connector


def _not_a_projector(got: str) -> str:
    return (
        f"MLPConnector.from_llava_state_dict: state_dict must hold one chain of linear layers with GELU between them, "
        f"got {got}. Pass the projector's entries alone."
    )
