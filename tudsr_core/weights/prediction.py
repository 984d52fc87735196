"""What the UNet of a single checkpoint file predicts: such files do not say, their weights give it away."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from .tensor_files import stream

Prediction = Literal["epsilon", "v_prediction"]

# SD2.1 (768) predicts v and has the same keys as SD2.1-base; its last attention block tells them
# apart: the spread of this bias is 0.1 there and 0.04 here (the test ComfyUI and others use).
TELLTALE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_SPREAD = 0.09


def prediction_of(bias: Tensor) -> Prediction:
    """Return what a UNet predicts that has this tensor at TELLTALE."""
    return "v_prediction" if bias.float().std() > V_SPREAD else "epsilon"


def file_prediction(path: Path) -> Prediction | None:
    """Return what the UNet in a checkpoint file predicts, None if it holds none; raises CheckpointError."""
    return next((prediction_of(bias) for _, bias in stream(path, (TELLTALE,))), None)
