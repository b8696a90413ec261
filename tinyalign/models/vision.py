"""The frozen vision tower: which layer, and which tokens of it, become image features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyalign._files import hash_tensors
from tinyalign.models.early_exit import early_exit, output_of, run_until


class VisionFeatures(nn.Module):
    """Read patch features from one layer of any Hugging Face vision tower.

    Towers differ in what stands before the patches: SigLIP has nothing there, CLIP and DINOv2 a CLS token, others
    registers as well. The number of patches follows from the picture's size and the patch size; whatever precedes them
    is dropped, so that no rule has to be stated per tower and no patch is lost. While nothing in the tower trains it
    runs without gradients, and it is always in evaluation mode: features that keys are made of must not vary. The
    first call runs the whole tower and sees which of its layers gives the features; later calls end there.

    Args:
        tower: a vision model whose output has `hidden_states` and whose config has `patch_size`; a CLIP or SigLIP
            model with both halves is accepted for its vision half.
        layer: index into `hidden_states`; -2 is the output of the last layer but one, as in LLaVA.

    Shape:
        pixel_values: (n, C, H, W). returns: (n, N, D), dtype of the tower.

    Raises:
        ValueError: the tower has no such layer or no patch size, or gives fewer tokens than there are patches.

    Source:
        Liu et al. 2023, arXiv 2304.08485, section 4.1 (features before the last layer).

    Example:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> config = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        ...                           image_size=8, patch_size=4)
        >>> VisionFeatures(CLIPVisionModel(config))(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, tower: nn.Module, *, layer: int = -2) -> None:
        super().__init__()
        tower = vision_half(tower)
        config: Any = tower.config
        layers, patch = getattr(config, "num_hidden_layers", None), getattr(config, "patch_size", None)
        if not isinstance(layers, int) or not isinstance(patch, int):
            raise ValueError(
                f"VisionFeatures: tower must be a vision transformer whose config has num_hidden_layers and an integer "
                f"patch_size, got {type(tower).__name__} with {layers!r} and {patch!r}. Use SigLIP, CLIP, DINOv2 or "
                f"ViT."
            )
        if not -(layers + 1) <= layer <= layers:
            raise ValueError(
                f"VisionFeatures: layer must lie in [-{layers + 1}, {layers}] for {layers} layers, got {layer}. "
                f"-2 is the last layer but one, as in LLaVA."
            )
        self.tower = tower
        self.layer, self.patch_size = layer, patch
        self._exit = early_exit(tower, layer % (layers + 1))
        self._exit_is_known = False
        self.tower.eval()

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(self.tower.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def num_tokens(self) -> int:
        """How many features one picture of the tower's own size gives."""
        size: Any = self.tower.config.image_size  # type: ignore[union-attr]
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return int(height // self.patch_size) * int(width // self.patch_size)

    @property
    def dtype(self) -> torch.dtype:
        """What pixels are cast to."""
        return next(self.tower.parameters()).dtype

    def train(self, mode: bool = True) -> VisionFeatures:
        """Leave the tower in evaluation mode whatever the rest of the model does."""
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map (n, C, H, W) to (n, N, D)."""
        if pixel_values.dim() != 4:
            raise ValueError(
                f"VisionFeatures.forward: pixel_values must have shape (n, C, H, W), got {tuple(pixel_values.shape)}. "
                f"Give the images of all rows one after another, as the processor does."
            )
        trains = any(parameter.requires_grad for parameter in self.tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            features = self._run(pixel_values.to(self.dtype))
        patches = (pixel_values.shape[2] // self.patch_size) * (pixel_values.shape[3] // self.patch_size)
        if features.dim() != 3 or features.shape[1] < patches:
            raise ValueError(
                f"VisionFeatures.forward: tower must give one token per patch, {patches} of them, got features of "
                f"shape {tuple(features.shape)}. Towers that merge patches are not supported."
            )
        return features[:, features.shape[1] - patches :]

    def _run(self, pixel_values: Tensor) -> Tensor:
        """Hidden state of the selected layer, from no more of the tower than that takes."""
        compiling = torch.compiler.is_compiling()
        module = None if self._exit is None or compiling else self.tower.get_submodule(self._exit)
        if module is not None and self._exit_is_known:
            return run_until(self.tower, module, pixel_values)
        with output_of(module) as seen:
            output = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        layers: Any = self.tower.config.num_hidden_layers  # type: ignore[union-attr]
        if len(output.hidden_states) != layers + 1:
            raise ValueError(
                f"VisionFeatures.forward: tower must give {layers + 1} hidden states for {layers} layers, got "
                f"{len(output.hidden_states)}. A layer shared between two model objects is recorded twice; load the "
                "tower on its own."
            )
        features: Tensor = output.hidden_states[self.layer]
        if module is not None:
            self._exit_is_known = len(seen) == 1 and torch.equal(seen[0], features)
            self._exit = self._exit if self._exit_is_known else None
        return features

    def fingerprint(self) -> dict[str, str | int]:
        """Name what makes the features: architecture, weights and layer.

        Weights are named after rounding to bfloat16, so that a tower loaded in bfloat16 agrees with the same tower in
        float32. A pooling head does not count: no feature passes through it.
        """
        state: Mapping[str, Tensor] = self.tower.state_dict()
        rounded = {
            name: value.to(torch.bfloat16)
            for name, value in state.items()
            if value.is_floating_point() and not name.startswith(("head.", "pooler."))
        }
        config: Any = self.tower.config
        return {
            "encoder": str(config.model_type),
            "encoder_weights": hash_tensors(rounded),
            "layer": self.layer % (config.num_hidden_layers + 1),
        }


def vision_half(model: nn.Module) -> nn.Module:
    """Return the vision tower of a two-tower model, or the model itself.

    Raises:
        TypeError: the model has no Hugging Face config.
    """
    half = getattr(model, "vision_model", None)
    found = half if isinstance(half, nn.Module) and hasattr(model, "text_model") else model
    if not hasattr(found, "config"):
        raise TypeError(
            f"VisionFeatures: tower must be a Hugging Face vision model with a config, got {type(model).__name__}. "
            f"For any other encoder compute the features yourself and pass image_features=."
        )
    return found


def pack_images(features: Tensor, counts: Tensor, *, max_images: int | None = None) -> tuple[Tensor, Tensor]:
    """Lay the images of each row side by side: one row of features per sample, with the mask of what is there.

    Args:
        features: image features of all rows, one image after another.
        counts: images of each row.
        max_images: the largest count; asked of the device when None.

    Shape:
        features: (num_images, N, D). counts: (B,), int. returns: (B, max_images * N, D), and (B, max_images * N) bool.

    Example:
        >>> rows, mask = pack_images(torch.arange(3.0).view(3, 1, 1), torch.tensor([2, 0, 1]))
        >>> rows[..., 0].tolist(), mask.tolist()
        ([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]], [[True, True], [False, False], [True, False]])
    """
    most = int(counts.max()) if max_images is None else max_images
    B, N = counts.shape[0], features.shape[1]
    slot = torch.arange(most, device=counts.device)
    present = slot < counts[:, None]  # (B, most)
    if features.shape[0] == 0 or most == 0:
        return features.new_zeros(B, most * N, features.shape[2]), present.repeat_interleave(N, dim=1)
    first = counts.cumsum(0) - counts
    index = (first[:, None] + slot).clamp(max=features.shape[0] - 1)
    rows = features[index].masked_fill(~present[:, :, None, None], 0.0)  # (B, most, N, D)
    return rows.flatten(1, 2), present.repeat_interleave(N, dim=1)
