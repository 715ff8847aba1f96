"""What the public API refuses, in two lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import taoq
from api.conftest import MODELOPT, ORT, TORCHAO, Data, TwoInputs, accuracy

Refused = Callable[[Callable[[], object]], str]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"backend": "modelopt.pytorh", "layerz": []},
            "quantize.backend: unknown value 'modelopt.pytorh'\n"
            "hint: did you mean 'modelopt.pytorch' or 'modelopt.onnx'?\n"
            "quantize.layerz: unknown field in section 'quantize'\n"
            "hint: did you mean 'layers'?",
        ),
        (
            {**MODELOPT, "model_path": "a.pth", "results_dir": "b", "calibration": {"seed": 1, "batch_size": 2}},
            "quantize.model_path: is an argument of the function, not of the config\n"
            "hint: give it as the first argument\n"
            "quantize.results_dir: is an argument of the function, not of the config\n"
            "hint: give it as results_dir=...\n"
            "quantize.calibration.batch_size: has no effect: the loader decides\n"
            "hint: leave it out\n"
            "quantize.calibration.seed: has no effect: the loader decides\n"
            "hint: leave it out",
        ),
        (
            ORT,
            "quantize.backend: the model is a torch network, which onnxruntime does not quantize\n"
            "hint: choose modelopt.pytorch or torchao, or make an ONNX file with taoq.export",
        ),
    ],
    ids=["names", "arguments", "format"],
)
def test_a_config(network: TwoInputs, data: Data, refused: Refused, config: dict[str, object], text: str) -> None:
    assert refused(lambda: taoq.quantize(network, config, calibration=data.calibration)) == text


def test_a_model(data: Data, refused: Refused, onnx_file: Path, tmp_path: Path) -> None:
    hint = "\nhint: give an nn.Module, or the path of a .onnx file"
    for model, name in ((3, "int"), ("weights.pth", "weights.pth")):
        text = refused(lambda model=model: taoq.quantize(model, MODELOPT, calibration=data.calibration))
        assert text == f"model: {name} is neither a torch network nor an ONNX file{hint}"
    assert refused(lambda: taoq.quantize(onnx_file, ORT, calibration=data.calibration)) == (
        "results_dir: missing: an ONNX file is quantized into a file\nhint: name a folder for the artifact"
    )
    assert refused(lambda: taoq.quantize(onnx_file, MODELOPT, results_dir=tmp_path)) == (
        "quantize.backend: the model is an ONNX file, which modelopt.pytorch does not quantize\n"
        "hint: choose modelopt.onnx (GPUs) or onnxruntime (CPUs)"
    )
    assert refused(lambda: taoq.benchmark(onnx_file, torch.nn.ReLU(), data.calibration)) == (
        "baseline: one is a torch model and the other an ONNX file: their speeds say nothing about quantization\n"
        "hint: give a float model of the same kind"
    )


def test_data(network: TwoInputs, data: Data, refused: Refused) -> None:
    def quantize(calibration: object, **more: object) -> str:
        return refused(lambda: taoq.quantize(network, MODELOPT, calibration=calibration, **more))

    shuffled = DataLoader(TensorDataset(data.images, data.numbers), batch_size=8, shuffle=True)
    images, numbers = data.example
    a_list = "hint: let the loader yield a tensor, a tuple (inputs, targets), or a dictionary"
    assert quantize(None) == (
        "calibration: missing: this needs calibration data\nhint: give a loader as calibration=..."
    )
    assert quantize(iter(data.calibration)) == (
        "calibration: a _SingleProcessDataLoaderIter can be iterated over only once, and it is needed more often\n"
        "hint: give a DataLoader or a list of batches"
    )
    assert quantize([]) == "calibration: the loader has no batches\nhint: give at least one batch"
    assert quantize(shuffled) == (
        "calibration: the loader gives other batches each time: what is measured on them cannot be compared or"
        " repeated\nhint: give a loader with shuffle=False and without random augmentation"
    )
    assert quantize([images]) == f"calibration: a batch has no 'numbers', which the network takes\n{a_list}"
    assert quantize([{"image": images, "label": numbers}]) == (
        "calibration: a batch has no 'numbers', which the network takes: its keys are image, label\n"
        "hint: name the inputs of the network as it does: image, numbers"
    )
    assert quantize([("a cat", numbers)]) == (
        f"calibration: 'image' of a batch is str, not a tensor of samples\n{a_list}"
    )
    assert quantize([((images, numbers, numbers), data.labels[:5])]) == (
        f"calibration: the first entry of a batch has 3 tensors, the network takes 2\n{a_list}"
    )
    assert quantize([(images, numbers[:3])]) == (
        f"calibration: the inputs of a batch have different numbers of samples: image 5, numbers 3\n{a_list}"
    )
    assert quantize([(images[:, :, :4], numbers)]) == (
        "model: does not run on the data: mat1 and mat2 shapes cannot be multiplied (1x512 and 1024x10)\n"
        "hint: let the loader yield what its forward takes"
    )
    assert quantize([data.example], metric=accuracy()) == (
        "evaluation: missing: metric is given\nhint: give both, or none of them"
    )
    assert quantize([data.example], evaluation=[data.example], metric=accuracy()) == (
        "evaluation: its batches have no targets: all that they have are inputs (image, numbers)\n"
        "hint: let the loader yield (inputs, targets), or a dictionary with both"
    )


def test_an_artifact(network: TwoInputs, data: Data, quantized: taoq.QuantizeResult, refused: Refused) -> None:
    folder = str(quantized.directory)
    no_network = f"{folder}: was made from a network of your own, which it does not contain\n"
    assert refused(lambda: taoq.load(folder)) == f"{no_network}hint: give that network: taoq.load(folder, model)"
    assert refused(lambda: taoq.compare([folder], data.evaluation, accuracy())) == (
        f"{no_network}hint: give that network as model=..."
    )
    assert refused(lambda: taoq.evaluate(folder, data.evaluation, accuracy())) == (
        f"{folder}: is the artifact of a torch backend, which does not contain its network\n"
        "hint: give what taoq.load(folder, model) returns"
    )
    assert refused(lambda: taoq.load("nowhere")) == "nowhere: is not an artifact\nhint: name a folder that taoq wrote"
    assert refused(lambda: taoq.load(folder, torch.nn.Linear(2, 2))) == (
        f"{quantized.payload}: does not fit this Linear, which has no layer stem, image_head, number_head\n"
        "hint: give the network that was quantized"
    )
    wider = TwoInputs()
    wider.number_head = torch.nn.Linear(6, 10)
    assert refused(lambda: taoq.load(folder, wider)) == (
        f"{quantized.payload}: does not fit this TwoInputs: its layer number_head has the shape [10, 6], not [10, 4]\n"
        "hint: give the network that was quantized"
    )
    assert refused(lambda: taoq.compare([folder], data.evaluation, accuracy(), model=TwoInputs())) == (
        f"{folder}: was made from another network\nhint: give the network, with its weights, that was quantized"
    )


def test_an_artifact_of_a_task_is_not_evaluated_on_other_data(data: Data, refused: Refused) -> None:
    kept = Path(__file__).parent.parent / "schema_1" / "onnxruntime"
    batch = (torch.zeros(4, 3, 32, 32), data.labels[:4])
    assert refused(lambda: taoq.evaluate(kept, [batch], accuracy())) == (
        f"{kept}: is an artifact of classification_pyt\nhint: run it with: taoq classification_pyt ..."
    )


def test_the_command_line_does_not_open_what_the_api_made(
    quantized: taoq.QuantizeResult, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "images" / "0").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "0" / "image.png")
    spec = {"dataset": {"num_classes": 1}, "evaluate": {"checkpoint": str(quantized.directory), "device": "cpu"}}
    overrides = [f"dataset.val_dataset.images_dir={tmp_path / 'images'}", f"results_dir={tmp_path / 'results'}"]
    assert refused(lambda: taoq.run("classification_pyt", "evaluate", spec, overrides)) == (
        f"{quantized.directory}: was made through the Python API\nhint: open it with taoq.load(folder, model)"
    )


def test_options(network: TwoInputs, data: Data, refused: Refused, tmp_path: Path) -> None:
    def benchmark(**options: object) -> str:
        return refused(lambda: taoq.benchmark(network, network, data.calibration, **options))

    assert benchmark(runs=0) == "benchmark.runs: 0 is less than 1\nhint: the field is: Measured runs of each model"
    assert benchmark(batchsizes=[1], checkpoint="a.pth") == (
        "batchsizes: taoq.benchmark has no such option\nhint: did you mean 'batch_sizes'?\n"
        "checkpoint: taoq.benchmark has no such option\n"
        "hint: its options are batch_sizes, warmup, runs, compile, min_speedup"
    )
    assert benchmark(batch_sizes=[]) == (
        "benchmark.batch_sizes: empty, not above 0, or has a size twice\nhint: write for example [1, 8]"
    )
    for device in ("gpu", "cuda:x", torch.device("meta")):
        assert benchmark(device=device) == (
            f"device: '{device}' is not a device\nhint: write cuda, cuda:N or cpu; trt for ONNX files"
        )
    with pytest.raises(taoq.RequirementNotMet, match=r"^min_speedup: quantized is .* times as fast as float32, 99 is"):
        taoq.benchmark(network, network, data.calibration, device="cpu", runs=1, min_speedup=99.0)
    assert refused(lambda: taoq.export(network, tmp_path / "a.onnx", data.calibration, input_height=640)) == (
        "input_height: taoq.export has no such option\n"
        "hint: its options are opset_version, batch_size, check_images, tolerance, dequantize, overwrite, verbose"
    )
    assert refused(lambda: taoq.compare("results/a", data.evaluation, accuracy())) == (
        "artifacts: is one path, results/a\nhint: give a list of folders"
    )
    file = tmp_path / "network.pt"
    assert refused(lambda: taoq.export(network, file, data.calibration)) == (
        f"export.onnx_file: {file} does not end in .onnx\nhint: write {file.with_suffix('.onnx')}"
    )


def test_weights_only_quantization_has_no_operators(
    network: TwoInputs, data: Data, refused: Refused, tmp_path: Path
) -> None:
    result = taoq.quantize(network, TORCHAO, calibration=[data.example])
    file = tmp_path / "a.onnx"
    assert refused(lambda: taoq.export(network, file, [data.example], artifact=result)) == (
        "export.checkpoint: torchao quantizes weights in a way that ONNX has no operator for\n"
        "hint: set export.dequantize: true for a float file with these weights, or quantize the float ONNX file"
    )
    exported = taoq.export(network, file, [data.example], artifact=result, dequantize=True)
    assert exported.proof.images == 5


def test_a_metric(network: TwoInputs, data: Data, refused: Refused) -> None:
    def one_number(scores: torch.Tensor, labels: torch.Tensor) -> float:
        return float((scores.argmax(1) == labels).float().mean())

    assert refused(lambda: taoq.evaluate(network, data.evaluation, one_number, device="cpu")) == (
        "metric one_number: gives an array of shape [] for 40 samples\nhint: let it give one score per sample: [40]"
    )


def test_a_metric_that_is_better_the_lower_it_is(network: TwoInputs, data: Data, refused: Refused) -> None:
    def quantize() -> object:
        return taoq.quantize(
            network, MODELOPT, calibration=data.calibration, evaluation=data.evaluation, metric=MeanSquaredError()
        )

    assert refused(quantize) == (
        "metric: has no figure that is better the higher it is, to compare models by\n"
        "hint: give a metric that is better the higher it is, or a function that scores samples"
    )


def test_a_result_cannot_be_changed(quantized: taoq.QuantizeResult) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized.seconds = 0.0
