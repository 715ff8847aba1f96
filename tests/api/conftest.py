"""A network with two inputs, its data, and what the public API makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import taoq


class TwoInputs(nn.Module):
    """Reads an image and four numbers; it is the same network wherever it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.image_head = nn.Linear(16 * 64, 10)
        self.number_head = nn.Linear(4, 10)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.image_head(torch.relu(self.stem(image)).flatten(1)) + self.number_head(numbers)


@dataclass(frozen=True)
class Data:
    """Random samples, labelled by the float network: calibration (64) and evaluation (96)."""

    images: Tensor
    numbers: Tensor
    labels: Tensor

    @property
    def calibration(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images[:64], self.numbers[:64]), batch_size=24)

    @property
    def evaluation(self) -> DataLoader[Any]:
        dataset = TensorDataset(self.images[64:], self.numbers[64:], self.labels[64:])
        return DataLoader(dataset, batch_size=40)

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        return self.images[:5], self.numbers[:5]


def int8(pattern: str = "*", *, activations: bool = True) -> dict[str, Any]:
    return {"module_name": pattern, "weights": {"dtype": "int8"}} | (
        {"activations": {"dtype": "int8"}} if activations else {}
    )


MODELOPT = {"backend": "modelopt.pytorch", "layers": [int8()], "device": "cpu"}
TORCHAO = {"backend": "torchao", "layers": [int8("Linear", activations=False)], "device": "cpu"}
ORT = {"backend": "onnxruntime", "layers": [int8()], "device": "cpu"}


def accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(10, average="micro")


@pytest.fixture(scope="session")
def network() -> TwoInputs:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TwoInputs().train()


@pytest.fixture(scope="session")
def data(network: TwoInputs) -> Data:
    generator = torch.Generator().manual_seed(1)
    images, numbers = (torch.randn(160, *shape, generator=generator) for shape in ((3, 8, 8), (4,)))
    with torch.inference_mode():
        labels = network(images, numbers).argmax(1)
    return Data(images, numbers, labels.clone())


@pytest.fixture(scope="session")
def quantized(network: TwoInputs, data: Data, tmp_path_factory: pytest.TempPathFactory) -> taoq.QuantizeResult:
    """The network by modelopt.pytorch, evaluated, with its artifact."""
    return taoq.quantize(
        network,
        MODELOPT,
        calibration=data.calibration,
        evaluation=data.evaluation,
        metric=accuracy(),
        results_dir=tmp_path_factory.mktemp("api") / "modelopt",
    )


@pytest.fixture(scope="session")
def onnx_file(network: TwoInputs, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float network as an ONNX file."""
    file = tmp_path_factory.mktemp("api") / "float.onnx"
    taoq.export(network, file, data.calibration)
    return file


@pytest.fixture
def refused() -> Callable[[Callable[[], object]], str]:
    """The text of the error that a call must raise."""

    def text(call: Callable[[], object]) -> str:
        with pytest.raises(taoq.TaoqError) as error:
            call()
        return str(error.value)

    return text
