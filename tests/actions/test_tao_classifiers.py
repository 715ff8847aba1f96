"""Checkpoints of TAO's classifiers through quantize, evaluate and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from support.commands import Taoq, read_json
from support.tao import lightning, shuffled
from support.tao.attentional import Fan
from support.tao.convolutional import ConvNeXt
from support.tao.windowed import Swin

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES: dict[str, dict[str, Any]] = {
    "fan_small_12_p4_hybrid": {"widths": [16, 16], "heads": [2, 2], "stem": [1, 1], "stem_widths": [8, 16]},
    "convnext_tiny": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": [2, 1, 1, 2], "num_heads": [1, 2, 2, 4]},
}


def network(name: str) -> nn.Module:
    shape = SHAPES[name]
    if name.startswith("fan"):
        return Fan(**shape, classes=10)
    if name.startswith("swin"):
        return Swin(8, shape["depths"], shape["num_heads"], 7, 10)
    return ConvNeXt(shape["depths"], shape["dims"], 10)


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_of_tao_is_quantized_evaluated_and_exported(
    name: str, taoq: Taoq, digits: Path, tmp_path: Path
) -> None:
    checkpoint, artifact, file = (tmp_path / part for part in ("tao.pth", "results/quantize", "model.onnx"))
    torch.save(lightning(shuffled(network(name))), checkpoint)
    images = {"images_dir": str(digits / "val")}
    layers = [{"module_name": "*", "weights": {"dtype": "int8"}, "activations": {"dtype": "int8"}}]
    spec: dict[str, Any] = {
        "results_dir": str(tmp_path / "results"),
        "model": {"backbone": {"type": name, "args": SHAPES[name]}},
        "dataset": {
            "root_dir": str(digits), "num_classes": 10, "img_size": 32, "batch_size": 64, "workers": 0,
            "val_dataset": images, "quant_calibration_dataset": images,
        },
        "quantize": {
            "model_path": str(checkpoint), "backend": "modelopt.pytorch", "mode": "static_ptq", "device": "cpu",
            "calibration": {"num_samples": 16}, "layers": layers,
        },
        "evaluate": {"checkpoint": str(artifact), "device": "cpu"},
        "export": {"checkpoint": str(artifact), "onnx_file": str(file), "on_cpu": True},
    }  # fmt: skip
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")

    def succeeds(action: str, *overrides: str) -> None:
        code, _, err = taoq("classification_pyt", action, "-e", str(tmp_path / "spec.yaml"), *overrides)
        assert code == 0, err

    succeeds("quantize")
    manifest = read_json(artifact / "manifest.json")
    assert manifest["spec"]["model"]["backbone"].get("variant") == ("tao" if name.startswith("swin") else None)
    float_layers = [row["layer"] for row in manifest["plan"] if not row["weights"]]
    constant = ["pos_embed.token_projection", "cls_attn_blocks.0.attn.q"]  # of positions, and of the class token
    assert float_layers == (constant if name.startswith("fan") else [])
    succeeds("evaluate")
    succeeds("export")  # which proves that the file computes what the artifact does
    succeeds("evaluate", f"evaluate.checkpoint={file}")
