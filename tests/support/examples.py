"""The example networks: where their specs and trained checkpoints are, and what goes into them and comes out."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
SPECS = {
    "resnet_18": EXAMPLES / "digits" / "resnet_18.yaml",
    "vit_tiny": EXAMPLES / "digits" / "vit_tiny.yaml",
    "detector": EXAMPLES / "digit_scenes" / "rtdetr.yaml",
}
CHECKPOINTS = {
    "resnet_18": EXAMPLES / "digits" / "checkpoints" / "resnet_18.safetensors",
    "vit_tiny": EXAMPLES / "digits" / "checkpoints" / "vit_tiny.safetensors",
    "detector": EXAMPLES / "digit_scenes" / "checkpoints" / "rtdetr_small",
}
SIZES = {"resnet_18": 32, "vit_tiny": 32, "detector": 160}
"""Height and width of the input, pixels."""
OUTPUTS = {
    "resnet_18": {"output": ["batch", 10]},
    "vit_tiny": {"output": ["batch", 10]},
    "detector": {"pred_logits": ["batch", 30, 10], "pred_boxes": ["batch", 30, 4]},
}
"""Names and shapes of the outputs in an ONNX file of any batch."""
