"""Networks, files, loaders and metrics of everyday use, which a first user of the API brings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import ClasswiseWrapper, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import taoq
from api.conftest import MODELOPT, ORT, TORCHAO, Data, TwoInputs, accuracy, int8

Refused = Callable[[Callable[[], object]], str]


class Attention(nn.Module):
    """A vector of numbers as a sequence of one token; its attention module has no `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.head = nn.Linear(16, 10)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input=numbers).unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("config", [MODELOPT, TORCHAO], ids=["modelopt.pytorch", "torchao"])
def test_attention_is_quantized_loaded_and_exported(
    config: dict[str, Any], data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = Attention().eval()
    loader = [data.numbers[:32], data.numbers[32:64]]
    folder = tmp_path / "artifact"
    config = {**config, "layers": [int8("Linear", activations=config is MODELOPT)]}
    result = taoq.quantize(network, config, calibration=loader, results_dir=folder)
    loaded = taoq.load(folder, Attention())
    with torch.inference_mode():
        assert torch.equal(loaded(data.numbers[:8]), result.model(data.numbers[:8]))
    exported = taoq.export(
        network, tmp_path / "model.onnx", loader, artifact=folder, dequantize=config["backend"] == "torchao"
    )
    assert exported.onnx_file.is_file()
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


class Corrupt(Dataset[Any]):
    """Its last sample cannot be read."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index == 39:
            raise OSError("cannot identify image file 'last.png'")
        return self._data.images[index], self._data.numbers[index], self._data.labels[index]


def test_an_error_of_a_loader_is_not_an_error_of_the_disk(network: TwoInputs, data: Data, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^cannot identify image file 'last\.png'$"):
        taoq.quantize(
            network,
            MODELOPT,
            calibration=data.calibration,
            evaluation=DataLoader(Corrupt(data), batch_size=8),
            metric=accuracy(),
            results_dir=tmp_path / "results",
        )
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize(
    "metric",
    [
        1 - MulticlassAccuracy(10),
        MetricCollection({"error": 1 - MulticlassAccuracy(10), "accuracy": accuracy()}),
        ClasswiseWrapper(MulticlassAccuracy(10, average=None)),
    ],
    ids=["composition", "collection", "classwise"],
)
def test_a_metric_that_is_computed_from_others_has_no_interval(
    network: TwoInputs, data: Data, metric: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "taoq"):
        result = taoq.quantize(
            network, MODELOPT, calibration=data.calibration, evaluation=data.evaluation, metric=metric
        )
    assert result.evaluation is not None
    assert (result.evaluation.difference.low, result.evaluation.difference.high) == (None, None)
    assert "differences get no interval: a metric is computed from other metrics" in caplog.text


def test_a_metric_that_is_not_a_number_is_refused(network: TwoInputs, data: Data, refused: Refused) -> None:
    def iou(outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.full((len(labels),), float("nan"))

    assert refused(
        lambda: taoq.quantize(network, MODELOPT, calibration=data.calibration, evaluation=data.evaluation, metric=iou)
    ) == (
        "the evaluation data: iou is not a number (NaN) on these 96 image(s)\n"
        "hint: look for samples on which the metric divides by zero"
    )


def test_arrays_in_double_precision_are_data_too(network: TwoInputs, data: Data) -> None:
    batches = [{"image": data.images.double().numpy(), "numbers": data.numbers.numpy(), "label": data.labels.numpy()}]
    result = taoq.evaluate(network, batches, accuracy(), device=torch.device("cpu"))
    assert result.metrics == {"MulticlassAccuracy": 1.0}
    assert isinstance(batches[0]["image"], np.ndarray)


def test_a_network_in_half_precision_is_refused(data: Data, refused: Refused) -> None:
    hint = "; taoq runs and quantizes float32 networks\nhint: give model.float()"
    for dtype in (torch.bfloat16, torch.float16):
        network = Attention().to(dtype)
        for call in (
            lambda network=network: taoq.quantize(network, MODELOPT, calibration=[data.numbers]),
            lambda network=network: taoq.evaluate(network, [(data.numbers, data.labels)], accuracy()),
        ):
            assert refused(call) == f"model: has weights of {dtype}{hint}"


def test_an_exception_of_a_network_is_an_error_of_the_model(data: Data, refused: Refused) -> None:
    class Strict(Attention):
        def forward(self, numbers: Tensor) -> Tensor:
            assert numbers.shape[1] == 5, "it takes 5 numbers"
            return super().forward(numbers)

    assert refused(lambda: taoq.quantize(Strict(), MODELOPT, calibration=[data.numbers])) == (
        "model: does not run on the data: it takes 5 numbers\nhint: let the loader yield what its forward takes"
    )


class AnySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).mean((2, 3))


def test_an_onnx_artifact_that_takes_any_size_is_loaded(data: Data, tmp_path: Path) -> None:
    file = tmp_path / "any.onnx"
    taoq.export(AnySize(), file, [data.images])
    graph = onnx.load(file)
    for axis, name in ((2, "height"), (3, "width")):
        graph.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(graph, file)
    result = taoq.quantize(file, ORT, calibration=[data.images[:32]], results_dir=tmp_path / "int8")
    assert result.directory is not None
    runtime = taoq.load(result.directory, device="cpu")
    assert [len(value) for value in runtime.run({"image": data.images[:5, :, :6]}).values()] == [5]


def test_a_compiled_network_gets_its_inputs_by_name(data: Data) -> None:
    class Optional(Attention):
        def forward(self, numbers: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
            assert shift is None, "the data has no shift"
            assert scale is not None, "the data has a scale"
            return super().forward(numbers * scale)

    compiled = torch.compile(Optional(), backend="eager")
    batches = [{"numbers": data.numbers, "scale": data.numbers[:, :1], "label": data.labels}]
    assert taoq.evaluate(compiled, batches, accuracy(), device="cpu").num_images == len(data.labels)


class Codebook(Attention):
    """Has a buffer in a submodule whose name ends like those of quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Identity()
        self.vector_quantizer = nn.BatchNorm1d(16)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.vector_quantizer(self.embed(numbers)))


def test_a_module_that_is_called_a_quantizer_is_exported(data: Data, tmp_path: Path) -> None:
    network, loader = Codebook(), [data.numbers]
    result = taoq.quantize(network, {**MODELOPT, "layers": [int8("Linear")]}, calibration=loader)
    exported = taoq.export(network, tmp_path / "model.onnx", loader, artifact=result)
    assert exported.quantized_layers == 2
