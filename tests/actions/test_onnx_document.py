"""The examples of TAO's user document for ONNX files: they run, or what they lack is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml

from support.commands import Taoq
from support.examples import SPECS
from support.onnx_artifacts import FILES_OF_ARTIFACT, Metrics, file_names, quantized_layers
from support.small_spec import PURPOSE
from taoq.pipeline.artifacts import read_artifact

pytestmark = pytest.mark.usefixtures("one_thread")


SpecOf = Callable[..., Path]
"""Writes the spec of an example of the document: (example, **fields of the section quantize)."""

DOCUMENT = {
    "5.3": """
        quantize:
          model_path: "/path/to/model.onnx"
          results_dir: "/path/to/output"
          backend: "modelopt.onnx"
          mode: "static_ptq"
          algorithm: "minmax"
          layers:
            - module_name: "Conv"
              weights: { dtype: "int8" }
              activations: { dtype: "int8" }
            - module_name: "Gemm"
              weights: { dtype: "int8" }
              activations: { dtype: "int8" }
        """,
    "5.4 useful examples": """
        quantize:
          backend: "modelopt.onnx"
          backend_kwargs:
            use_external_data_format: true # For large models >2GB
            op_types_to_quantize: ["Conv", "Gemm"] # Limit quantized op types
            calibrate_per_node: true # Per-node calibration
            high_precision_dtype: "fp16" # Keep some ops in FP16
        """,
    "5.4 large model": """
        quantize:
          model_path: "/path/to/model.onnx"
          results_dir: "/path/to/output"
          backend: "modelopt.onnx"
          mode: "static_ptq"
          algorithm: "max"
          layers:
            - module_name: "*"
              weights: { dtype: "fp8_e5m2" }
              activations: { dtype: "fp8_e5m2" }
          skip_names: ["/head/*"]
          backend_kwargs:
            use_external_data_format: true # For models >2GB
            op_types_to_quantize: ["Conv", "Gemm"] # Only these ops
        """,
}


@pytest.fixture
def document_spec(digits: Path, resnet: Path, tmp_path: Path) -> SpecOf:
    """A spec: the network and the data of the example, and the quantize section of the document with our paths."""

    def write(example: str, **more: Any) -> Path:
        section = yaml.safe_load(DOCUMENT[example])["quantize"]
        spec = yaml.safe_load(SPECS["resnet_18"].read_text())
        paths = {"model_path": str(resnet), "results_dir": str(tmp_path / "results" / "quantize")}
        spec["quantize"] = {**section, **paths, **more}
        spec["dataset"].update(
            root_dir=str(digits),
            val_dataset={"images_dir": str(digits / "val")},
            test_dataset={"images_dir": str(digits / "val")},
            quant_calibration_dataset={"images_dir": str(digits / "calibration")},
        )
        spec["results_dir"] = str(tmp_path / "results")
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        return path

    return write


def messages_of(err: str) -> list[str]:
    """The lines of stderr without places in the spec, and without those of the device, which differs by machine."""
    lines = [re.sub(r"^(warning: )?(?:\S+:\d+: )?", r"\1", line) for line in err.splitlines()]
    return [line for line in lines if "running on the CPU" not in line]


def test_the_first_example_of_the_document_spec(
    taoq: Taoq, document_spec: SpecOf, metrics: Metrics, tmp_path: Path
) -> None:
    code, out, err = taoq("classification_pyt", "quantize", "-e", str(document_spec("5.3")))
    few_images = "quantize.calibration.num_samples: is 512, there are 200 images: all are used"
    assert (code, messages_of(err)) == (0, [PURPOSE["modelopt.onnx"].strip(), few_images])
    assert "quantized 22 of 22 layers with 200 calibration images" in out
    assert metrics("resnet_18", tmp_path / "results" / "quantize")["val_acc_1"] > 0.99


def test_the_second_example_of_the_document_lacks_rules_and_a_mode(
    taoq: Taoq, document_spec: SpecOf, metrics: Metrics, tmp_path: Path
) -> None:
    spec = document_spec("5.4 useful examples")
    code, _, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert (code, messages_of(err)) == (
        2,
        [
            "quantize.mode: backend modelopt.onnx has no mode weight_only_ptq",
            "hint: write mode: static_ptq, or choose a backend that has weight_only_ptq",
            "quantize.layers: empty: nothing would be quantized",
            "hint: write at least one rule: {module_name: Linear, weights: {dtype: int8}}",
        ],
    )
    rules = yaml.safe_load(DOCUMENT["5.3"])["quantize"]
    fields = {"mode": "static_ptq", "layers": rules["layers"], "calibration": {"num_samples": 16}}
    spec = document_spec("5.4 useful examples", **fields)
    code, _, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert (code, messages_of(err)) == (0, [PURPOSE["modelopt.onnx"].strip()])
    folder = tmp_path / "results" / "quantize"
    assert file_names(folder) == sorted([*FILES_OF_ARTIFACT, "quantized_model.onnx_data"])
    assert len(read_artifact(folder).manifest.plan) == 22
    kinds = {tensor.data_type for tensor in onnx.load(str(folder / "quantized_model.onnx")).graph.initializer}
    assert {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8} <= kinds
    assert metrics("resnet_18", folder)["val_acc_1"] > 0.99


def test_the_third_example_of_the_document_spec(
    taoq: Taoq, document_spec: SpecOf, metrics: Metrics, tmp_path: Path
) -> None:
    """Its E5M2 is E4M3, its `/head/*` is not in this network, TensorRT has no FP8 for narrow layers: all said."""
    spec = document_spec("5.4 large model", calibration={"num_samples": 16})
    code, _, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert (code, messages_of(err)) == (
        0,
        [
            "warning: quantize.layers[0].weights.dtype: modelopt.onnx has no static fp8_e5m2 and realises it as"
            " fp8_e4m3fn",
            "warning: quantize.layers[0].activations.dtype: modelopt.onnx has no static fp8_e5m2 and realises it as"
            " fp8_e4m3fn",
            "warning: quantize.skip_names[0]: '/head/*' matches no layer",
            PURPOSE["modelopt.onnx"].strip(),
            "warning: quantize.layers[0]: 8 layer(s) stay float (/conv1/Conv, /layer1/0/conv1/Conv,"
            " /layer1/0/downsample/0/Conv, ...): ModelOpt leaves it out: TensorRT has no fast fp8 kernel for its shape",
        ],
    )
    folder = tmp_path / "results" / "quantize"
    assert file_names(folder) == sorted([*FILES_OF_ARTIFACT, "quantized_model.onnx_data"])
    assert len(quantized_layers(folder)) == 14
    assert metrics("resnet_18", folder)["val_acc_1"] > 0.98

    spec = document_spec("5.4 large model", strict=True, results_dir=str(tmp_path / "strict"))
    code, _, err = taoq("classification_pyt", "quantize", "-e", str(spec))
    assert (code, messages_of(err)[-2:]) == (
        1,
        [
            "quantize.layers[0]: /conv1/Conv, /layer1/0/conv1/Conv, /layer1/0/downsample/0/Conv, ... cannot be"
            " quantized: ModelOpt leaves it out: TensorRT has no fast fp8 kernel for its shape",
            "hint: put them into quantize.skip_names, or set quantize.strict: false to leave them float",
        ],
    )
    assert file_names(tmp_path / "strict") == ["log.txt", "status.json"]
