"""What lmms-eval reads through the entry point ``lmms_eval.models``; imports nothing heavy."""

from __future__ import annotations

from typing import Any

MODEL_ID = "tinyalign"
CLASS_PATH = "tinyalign.evaluation.lmms_model.TinyAlignLmms"


def manifest() -> Any:
    """Return the manifest under which ``--model tinyalign`` is found.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ImportError(
            "manifest: lmms-eval must be installed, got an import error. Install the extra: pip install "
            "'tinyalign-vlm[eval]'."
        ) from error
    return ModelManifest(model_id=MODEL_ID, simple_class_path=CLASS_PATH)
