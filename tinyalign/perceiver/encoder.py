"""The Perceiver encoder: a few learned latents read a long input once, then talk among themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinyalign._checks import check_last_dim, check_mask, check_positive
from tinyalign.perceiver import hf_weights
from tinyalign.perceiver.layers import PerceiverLayer
from tinyalign.perceiver.weights import draw_linears, draw_normal

INITIALIZER_RANGE = 0.02


class PerceiverEncoder(nn.Module):
    """Compress a sequence of any length into `num_latents` vectors; the defaults are the paper's Table 3.

    The maths equals transformers' ``PerceiverEncoder``, whose weights load into it and out of it. Weights are drawn
    as there: normal with standard deviation 0.02, biases zero.

    Args:
        input_dim: width of the input tokens.
        num_latents: number of learned queries L.
        latent_dim: width of a latent.
        num_self_attends: self-attention layers in a block.
        num_blocks: how often the same block is applied.
        num_heads: heads of both kinds of attention.
        qk_channels: width of queries and keys over all heads.
        v_channels: width of values over all heads.
        device: where the weights live.
        dtype: dtype of the weights.

    Shape:
        inputs: (B, S, input_dim), float of any precision; S may be 0. mask: (B, S), bool, True = keep.
        returns: (B, L, latent_dim), dtype of the weights. A row without any kept token reads nothing and is finite.

    Raises:
        ValueError: `inputs` has other than three axes or another last size; `mask` has another shape.
        TypeError: `mask` is not boolean, `inputs` are integers.

    Source:
        Tran et al., "TinyAlign", Table 3; Jaegle et al., 2022, arXiv 2107.14795; transformers' Perceiver.

    Example:
        >>> import torch
        >>> encoder = PerceiverEncoder(16, num_latents=4, latent_dim=8, qk_channels=8, v_channels=8, num_heads=2)
        >>> encoder(torch.randn(3, 50, 16)).shape
        torch.Size([3, 4, 8])
    """

    def __init__(
        self,
        input_dim: int,
        num_latents: int = 32,
        latent_dim: int = 96,
        num_self_attends: int = 8,
        num_blocks: int = 1,
        num_heads: int = 8,
        qk_channels: int = 96,
        v_channels: int = 96,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"input_dim": input_dim, "num_latents": num_latents, "latent_dim": latent_dim, "num_heads": num_heads}
        for name, size in sizes.items():
            check_positive("PerceiverEncoder", name, size)
        check_positive("PerceiverEncoder", "num_self_attends", num_self_attends, least=0)
        check_positive("PerceiverEncoder", "num_blocks", num_blocks, least=0)
        self.input_dim = input_dim
        self.latent_dim = latent_dim
        self.num_blocks = num_blocks
        self.latents = nn.Parameter(torch.empty(num_latents, latent_dim, device=device, dtype=dtype))

        def layer(source_dim: int | None) -> PerceiverLayer:
            return PerceiverLayer(
                latent_dim,
                qk_channels=qk_channels,
                v_channels=v_channels,
                num_heads=num_heads,
                input_dim=source_dim,
                device=device,
                dtype=dtype,
            )

        self.cross_attention = layer(input_dim)
        self.self_attends = nn.ModuleList(layer(None) for _ in range(num_self_attends))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, reproducibly when given a generator."""
        draw_normal(self.latents, INITIALIZER_RANGE, generator)
        draw_linears(self, INITIALIZER_RANGE, generator)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read the kept tokens into the latents and refine these."""
        return self.refine(self.read(inputs, mask))

    def read(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Only the cross-attention: what each latent takes from the input. The content of masked tokens is ignored."""
        check_last_dim("PerceiverEncoder.forward", "inputs", inputs, self.input_dim, "(B, S, input_dim)")
        if not inputs.is_floating_point():
            raise TypeError(
                f"PerceiverEncoder.forward: inputs must be floating point, got {inputs.dtype}. Embed ids first."
            )
        inputs = inputs.to(self.latents.dtype)
        if mask is not None:
            check_mask("PerceiverEncoder.forward", "mask", mask, (inputs.shape[0], inputs.shape[1]))
        read: Tensor = self.cross_attention(self.latents.unsqueeze(0), inputs, mask)
        return read

    def refine(self, latents: Tensor) -> Tensor:
        """Only the self-attention blocks, (B, L, latent_dim) to the same shape."""
        for _ in range(self.num_blocks):
            for layer in self.self_attends:
                latents = layer(latents)
        return latents

    def config(self) -> dict[str, int]:
        """The sizes that it was built with, as plain values."""
        layer = self.cross_attention
        return {
            "input_dim": self.input_dim,
            "num_latents": self.latents.shape[0],
            "latent_dim": self.latent_dim,
            "num_self_attends": len(self.self_attends),
            "num_blocks": self.num_blocks,
            "num_heads": layer.num_heads,
            "qk_channels": layer.query.out_features,
            "v_channels": layer.value.out_features,
        }

    @classmethod
    def from_hf_state_dict(
        cls,
        state: Mapping[str, Tensor],
        *,
        latents: Tensor | None = None,
        num_heads: int = 8,
        num_blocks: int = 1,
    ) -> PerceiverEncoder:
        """Build an encoder from the weights of transformers' ``PerceiverEncoder``, ``PerceiverModel`` or more.

        All sizes are read off the tensors, except the two that leave no trace in them.

        Args:
            state: state dict. That of a whole model carries the latents; that of a bare encoder does not.
            latents: (L, latent_dim), needed with the state dict of a bare encoder.
            num_heads: heads of both kinds of attention.
            num_blocks: how often the block is applied.

        Raises:
            ValueError: names missing, unexpected or of another shape; no latents.
        """
        sizes, own = hf_weights.import_encoder(state, latents)
        first = next(iter(own.values()))
        encoder = cls(**sizes, num_heads=num_heads, num_blocks=num_blocks, device="meta", dtype=first.dtype)
        where = "PerceiverEncoder.from_hf_state_dict"
        hf_weights.check_shapes(where, hf_weights.export_encoder(own), encoder.to_hf_state_dict())
        encoder.load_state_dict({name: tensor.detach().clone() for name, tensor in own.items()}, assign=True)
        return encoder.requires_grad_(True)

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Weights under the names of transformers' ``PerceiverEncoder``, which loads them strictly.

        The latents belong to another class there: assign `latents` to ``PerceiverModel.embeddings.latents``.
        """
        return hf_weights.export_encoder(self.state_dict())
