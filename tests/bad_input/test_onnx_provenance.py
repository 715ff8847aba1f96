"""An ONNX file that was exported for another task or spec, or quantized already, is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from support.commands import Taoq
from support.onnx_files import Change, change_file
from support.small_spec import ONNX_BACKENDS, Refused, RefusedByAll, every_onnx_backend
from taoq.quantization.formats.onnx.file import read_properties, write_properties
from taoq.quantization.formats.onnx.graph import Graph

DETECTOR_SPEC = Path(__file__).parents[2] / "examples" / "digit_scenes" / "rtdetr.yaml"


def stored(model: onnx.ModelProto) -> dict[str, Any]:
    """What taoq's export wrote into a file."""
    properties = read_properties(Graph(model), Path("float.onnx"))
    assert properties is not None
    return dict(properties)


def set_properties(**fields: Any) -> Change:
    """Change fields that taoq's export wrote."""
    return lambda model: write_properties(Graph(model), stored(model) | fields)


def set_stored_dataset(**fields: Any) -> Change:
    """Change fields of the dataset section that taoq's export wrote."""

    def change(model: onnx.ModelProto) -> None:
        properties = stored(model)
        properties["spec"]["dataset"].update(fields)
        write_properties(Graph(model), properties)

    return change


def test_the_file_of_another_task_is_refused(refused_by_all: RefusedByAll, taoq: Taoq) -> None:
    for backend in ONNX_BACKENDS:
        words = [f"quantize.backend={backend}", "quantize.model_path=float.onnx", "results_dir=other"]
        rule = "quantize.layers=[{module_name: Conv, weights: {dtype: int8}}]"
        assert taoq("rtdetr", "quantize", "-e", str(DETECTOR_SPEC), *words, rule) == (
            1,
            "",
            "float.onnx: was exported by classification_pyt\nhint: run it with: taoq classification_pyt ...\n",
        )
    change_file(set_properties(task="rtdetr"))
    assert refused_by_all() == (1, "float.onnx: was exported by rtdetr\nhint: run it with: taoq rtdetr ...\n")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        pytest.param(
            set_stored_dataset(augmentation={"mean": [0, 0, 0]}),
            "spec.yaml:9: dataset.augmentation.mean: is [0.485, 0.456, 0.406], the artifact was made with [0.0, 0.0, 0.0]",
            id="mean",
        ),
        pytest.param(
            set_stored_dataset(augmentation={"std": [1, 1, 1]}),
            "spec.yaml:9: dataset.augmentation.std: is [0.229, 0.224, 0.225], the artifact was made with [1.0, 1.0, 1.0]",
            id="std",
        ),
        pytest.param(
            set_stored_dataset(num_classes=12),
            "spec.yaml:11: dataset.num_classes: is 10, the artifact was made with 12",
            id="classes",
        ),
        pytest.param(
            set_stored_dataset(img_size=64),
            "spec.yaml:12: dataset.img_size: is 32, the artifact was made with 64",
            id="size",
        ),
    ],
)
def test_a_file_exported_with_another_spec_is_refused(refused_by_all: RefusedByAll, change: Change, fault: str) -> None:
    change_file(change)
    assert refused_by_all() == (2, f"{fault}\nhint: use the spec that it was quantized with\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            set_properties(spec={"dataset": {"classes": 10}}),
            "Key 'classes' not in 'DatasetSpec'. Did you mean one of: 'num_classes', 'classes_file'?",
            id="unknown field",
        ),
        pytest.param(
            set_stored_dataset(num_classes="ten"),
            "Value 'ten' of type 'str' could not be converted to Integer",
            id="a text",
        ),
        pytest.param(
            set_stored_dataset(num_classes="${no.field}"), "Interpolation key 'no.field' not found", id="a reference"
        ),
    ],
)
def test_a_file_whose_stored_spec_is_damaged_is_refused(
    refused_by_all: RefusedByAll, change: Change, reason: str
) -> None:
    change_file(set_properties(taoq="9.9"), change)
    assert refused_by_all() == (
        1,
        f"float.onnx: its spec does not fit this taoq: {reason}\nhint: read it with taoq 9.9\n",
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '"a"'])
def test_damaged_properties_of_a_file_are_refused(refused_by_all: RefusedByAll, text: str) -> None:
    change_file(lambda model: setattr(model.metadata_props[0], "value", text))
    assert refused_by_all() == (
        1,
        "float.onnx: the metadata that taoq wrote into it is damaged\nhint: export it again\n",
    )


@every_onnx_backend
def test_a_quantized_file_is_not_quantized_again(onnx_artifact: Path, refused: Refused, backend: str) -> None:
    words = (f"quantize.backend={backend}", "quantize.results_dir=again")
    payload = f"{onnx_artifact}/quantized_model.onnx"
    for path in (payload, onnx_artifact):
        assert refused("quantize", *words, f"quantize.model_path={path}") == (
            2,
            f"override quantize.model_path={path}: quantize.model_path: {path} is quantized already\n"
            "hint: give the float checkpoint it was made from\n",
        )
    shutil.copy(payload, "alone.onnx")
    assert refused("quantize", *words, "quantize.model_path=alone.onnx") == (
        2,
        "override quantize.model_path=alone.onnx: quantize.model_path: alone.onnx is quantized already: it has"
        " QuantizeLinear or DequantizeLinear nodes\n"
        "hint: give the float file it was made from\n",
    )
