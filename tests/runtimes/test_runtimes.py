"""Runtimes by name: which one runs a format, and what is said of a wrong name, a wrong format, a wrong option."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.commands import Taoq, Words
from taoq.errors import SpecError, TaoqError
from taoq.network import OutputSpec
from taoq.plugins import RUNTIMES
from taoq.quantization.formats import FORMATS
from taoq.runtimes import check_options, load_runtime
from taoq.runtimes.onnxruntime import OnnxRuntimeKind
from taoq.runtimes.torch import RUNTIME as TORCH

CHECKPOINT = Path(__file__).parents[2] / "examples" / "digits" / "checkpoints" / "resnet_18.safetensors"


@pytest.mark.parametrize("name", RUNTIMES.names())
def test_every_runtime_of_the_table_loads_under_its_name_and_runs_formats_that_there_are(name: str) -> None:
    runtime = RUNTIMES.load(name, "runtime")
    assert runtime.name == name
    assert set(runtime.formats) <= set(FORMATS)


@pytest.mark.parametrize(("format_name", "runtime"), [("torch", "torch"), ("onnx", "onnxruntime")])
def test_auto_is_the_runtime_of_the_format(format_name: str, runtime: str) -> None:
    assert load_runtime(format_name) is load_runtime(format_name, runtime)
    assert load_runtime(format_name).name == runtime


@pytest.mark.parametrize(
    ("format_name", "runtime", "message"),
    [
        (
            "torch",
            "onnxruntime",
            "runtime onnxruntime runs onnx models, this one is torch\nhint: write auto, or leave it out",
        ),
        ("onnx", "torch", "runtime torch runs torch models, this one is onnx\nhint: write auto, or leave it out"),
        ("onnx", "onnxrt", "there is no runtime onnxrt\nhint: did you mean 'onnxruntime'?"),
        ("onnx", "tensorflow", "there is no runtime tensorflow\nhint: choose one of torch, onnxruntime"),
    ],
)
def test_a_runtime_that_does_not_run_the_model_is_refused(format_name: str, runtime: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_runtime(format_name, runtime, "evaluate.runtime")
    assert str(error.value) == f"evaluate.runtime: {message}"


class RuntimeWithOptions(OnnxRuntimeKind):
    """A runtime that takes options."""

    name = "other"
    options = MappingProxyType({"threads": "Number of threads", "precision": "Of its arithmetic"})


def test_options_that_a_runtime_does_not_have_are_refused_all_at_once() -> None:
    with pytest.raises(SpecError) as error:
        check_options(RuntimeWithOptions(), {"thread": 2, "threads": 2, "x": 1}, "evaluate.runtime_kwargs")
    assert str(error.value) == (
        "evaluate.runtime_kwargs.thread: runtime other has no option 'thread'\nhint: did you mean 'threads'?\n"
        "evaluate.runtime_kwargs.x: runtime other has no option 'x'\nhint: its options are threads, precision"
    )
    check_options(RuntimeWithOptions(), {"threads": 2, "precision": "fp16"}, "evaluate.runtime_kwargs")


@pytest.mark.parametrize(
    ("override", "field", "message"),
    [
        (
            "evaluate.runtime=onnxruntime",
            "evaluate.runtime",
            "runtime onnxruntime runs onnx models, this one is torch\nhint: write auto, or leave it out\n",
        ),
        ("evaluate.runtime=onnx", "evaluate.runtime", "unknown value 'onnx'\nhint: did you mean 'onnxruntime'?\n"),
        (
            "evaluate.runtime_kwargs.threads=2",
            "evaluate.runtime_kwargs.threads",
            "runtime torch has no option 'threads'\nhint: runtime torch has no options\n",
        ),
        (
            "evaluate.device=trt",
            "evaluate.device",
            "trt does not run torch models\nhint: write cuda, cuda:N or cpu\n",
        ),
    ],
    ids=["format", "name", "option", "device"],
)
def test_the_command_line_says_which_field_is_wrong(
    taoq: Taoq, digits_words: Words, override: str, field: str, message: str
) -> None:
    code, out, err = taoq(*digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={CHECKPOINT}", override))
    assert (code, out, err) == (2, "", f"override {override}: {field}: {message}")


# --- torch --------------------------------------------------------------------------------------------------------


class Returning(nn.Module):
    """A network whose forward returns what a function makes of its input."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, image: Tensor) -> Any:
        return self.result(image)


def outputs_of(result: Any) -> dict[str, Any]:
    expected = {"first": OutputSpec(("N", 2)), "second": OutputSpec(("N", 2))}
    inputs = {"image": torch.tensor([[1.0, 2.0]])}
    runtime = TORCH.open(Returning(result), None, inputs, expected, "cpu", "device", {})
    return {name: value.tolist() for name, value in runtime.run(inputs).items()}


@pytest.mark.parametrize(
    "result",
    [
        lambda image: (image, -image),
        lambda image: [image.double(), -image.half()],
        lambda image: {"second": -image, "loss": None, "first": image},
    ],
    ids=["tuple", "list", "mapping"],
)
def test_a_network_returns_its_outputs_in_order_or_by_name(result: Any) -> None:
    assert outputs_of(result) == {"first": [[1.0, 2.0]], "second": [[-1.0, -2.0]]}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            lambda image: image,
            "its forward returns Tensor, not 2 tensor(s)\n"
            "hint: let its forward return a tensor, a tuple of them, or a mapping",
        ),
        (
            lambda image: (image, 1.5),
            "its forward returns Tensor, float, not 2 tensor(s)\n"
            "hint: let its forward return a tensor, a tuple of them, or a mapping",
        ),
        (
            lambda image: {"first": image, "loss": image},
            "its outputs are first, loss: there is no tensor 'second'\nhint: name the outputs as the network does",
        ),
    ],
    ids=["too few", "a number", "another name"],
)
def test_a_network_that_returns_something_else_is_refused(result: Any, message: str) -> None:
    with pytest.raises(TaoqError) as error:
        outputs_of(result)
    assert str(error.value) == f"the network: {message}"
