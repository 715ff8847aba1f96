# SPDX-License-Identifier: Apache-2.0
"""Quantize a network from Python, without a task or a spec: with a DataLoader and a metric of torchmetrics.

The network is the ResNet-18 of examples/digits, built with timm. Any other torch network works as well.
"""

from __future__ import annotations

from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import ImageFolder

import taoq

HERE = Path(__file__).parent
RESULTS = Path("results/api")
INT8 = {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8"}}


def build_network() -> nn.Module:
    """Build the network and load its checkpoint."""
    network = timm.create_model("resnet18", num_classes=10, channels=(16, 32, 64, 128))
    network.load_state_dict(load_file(HERE / "digits" / "checkpoints" / "resnet_18.safetensors"))
    return network.float()


def load_images(split: str) -> DataLoader[object]:
    """Return a loader of images and class indices."""
    transform = transforms.Compose(
        [
            transforms.Resize((32, 32)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    images = ImageFolder(HERE / "digits" / "data" / split, transform)
    return DataLoader(images, batch_size=64)


def main() -> None:
    """Quantize, load and export the network, and quantize the exported file for CPUs."""
    network, calibration, evaluation = build_network(), load_images("calibration"), load_images("val")
    accuracy = MulticlassAccuracy(10, average="micro")

    result = taoq.quantize(
        network,
        {"backend": "modelopt.pytorch", "layers": [{"module_name": "*", **INT8}], "skip_names": ["fc"]},
        calibration=calibration,
        evaluation=evaluation,
        metric=accuracy,
        results_dir=RESULTS / "modelopt",
    )
    difference = result.evaluation.difference
    size = result.manifest.size / result.manifest.float_size
    print(f"{len(result.plan.quantized)} layers quantized, {size:.0%} of the size")
    print(f"accuracy {difference.value:+.4f}, 95 % interval {difference.interval}: {difference.verdict}")
    worst = sorted((layer for layer in result.layers if layer.output_sqnr), key=lambda layer: layer.output_sqnr)
    print("worst layers:", ", ".join(f"{layer.name} {layer.output_sqnr:.1f} dB" for layer in worst[:3]))

    loaded = taoq.load(RESULTS / "modelopt", network)  # Works in any process that builds the same network.
    print("loaded again:", taoq.evaluate(loaded, evaluation, accuracy).metrics)

    exported = taoq.export(network, RESULTS / "float.onnx", calibration, overwrite=True)
    print(f"exported: differs from torch by {exported.proof.outputs['output'].largest_difference:.1e} at most")
    for_cpus = taoq.quantize(
        exported.onnx_file,
        {"backend": "onnxruntime", "layers": [{"module_name": "*", **INT8}]},
        calibration=calibration,
        evaluation=evaluation,
        metric=accuracy,
        results_dir=RESULTS / "onnxruntime",
    )
    print(f"for CPUs: accuracy {for_cpus.evaluation.difference.value:+.4f}; {for_cpus.payload}")


if __name__ == "__main__":
    main()
