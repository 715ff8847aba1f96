"""The proof of `export`: a file that differs from its torch network is caught, whatever differs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from support.commands import Taoq, Words, read_json, status_lines
from support.examples import CHECKPOINTS, SPECS
from support.exported import exported_network, files_of
from taoq.actions.base import load_experiment
from taoq.errors import TaoqError
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import OpenedModel, start
from taoq.pipeline.proof import Proof, output_differences, prove
from taoq.quantization.formats.onnx.file import read_graph
from taoq.spec.source import read_spec
from taoq.tasks import load_task

NO_IMAGES = [
    f"dataset.{name}.images_dir=nowhere" for name in ("quant_calibration_dataset", "val_dataset", "test_dataset")
]
DIFFERS_TOO_MUCH = re.compile(
    r"override export\.tolerance=1e-9: export\.tolerance: torch and ONNX differ:"
    r" output by [0-9.]+e-0\d, its largest value is [0-9.]+\n"
    r"hint: the file was not written; export\.tolerance is 1e-09 of the largest value\n"
)
Change = Callable[[dict[str, Tensor]], None]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def detector() -> Experiment:
    """The example detector."""
    return load_experiment(load_task("rtdetr"), read_spec(str(SPECS["detector"]), []), "export")


@pytest.fixture(scope="module")
def classifier() -> Experiment:
    """An example classifier."""
    spec = read_spec(str(SPECS["resnet_18"]), [])
    return load_experiment(load_task("classification_pyt"), spec, "export")


def queries() -> dict[str, Tensor]:
    """Outputs of a detector, always the same."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pred_logits": 10 * torch.rand(2, 30, 10, generator=generator) - 7,
        "pred_boxes": torch.rand(2, 30, 4, generator=generator),
    }


@pytest.fixture
def differences_after(detector: Experiment) -> Callable[[Change], dict[str, float]]:
    """Differences of the queries to a changed copy of them."""

    def compare(change: Change) -> dict[str, float]:
        outputs = queries()
        change(outputs)
        compared = output_differences(detector, queries(), outputs, only_significant=False)
        return {name: difference.largest_difference for name, difference in compared.items()}

    return compare


DifferencesAfter = Callable[[Change], dict[str, float]]


def test_queries_in_another_order_are_the_same(differences_after: DifferencesAfter) -> None:
    def permute(outputs: dict[str, Tensor]) -> None:
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        for name in outputs:
            outputs[name] = outputs[name][:, order]

    assert differences_after(permute) == {"pred_logits": 0.0, "pred_boxes": 0.0}


def test_another_order_in_only_one_output_is_a_difference(differences_after: DifferencesAfter) -> None:
    def permute(outputs: dict[str, Tensor]) -> None:
        outputs["pred_boxes"] = outputs["pred_boxes"].flip(1)

    assert max(differences_after(permute).values()) > 0.1


@pytest.mark.parametrize(("name", "step"), [("pred_logits", 0.25), ("pred_boxes", 0.03125)])
def test_a_changed_value_of_a_single_query_is_a_difference(
    differences_after: DifferencesAfter, name: str, step: float
) -> None:
    def change(outputs: dict[str, Tensor]) -> None:
        outputs[name][1, 17, 2] += step

    largest = differences_after(change)
    assert largest.pop(name) == pytest.approx(step, rel=1e-3)
    assert list(largest.values()) == [0.0]


def test_a_missing_query_is_a_difference(differences_after: DifferencesAfter) -> None:
    """Its place has a copy of another: each query of the file has its like in torch's, but not the other way round."""

    def change(outputs: dict[str, Tensor]) -> None:
        for value in outputs.values():
            value[0, 4] = value[0, 5]

    assert min(differences_after(change).values()) > 0.01


def test_images_in_another_order_are_a_difference(differences_after: DifferencesAfter) -> None:
    def change(outputs: dict[str, Tensor]) -> None:
        for name in outputs:
            outputs[name] = outputs[name].flip(0)

    assert min(differences_after(change).values()) > 0.01


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_a_value_that_is_not_a_number_is_a_difference(differences_after: DifferencesAfter, name: str) -> None:
    def change(outputs: dict[str, Tensor]) -> None:
        outputs[name][0, 3, 1] = float("nan")

    assert not all(largest < 1 for largest in differences_after(change).values())


def test_a_score_that_is_not_a_number_is_a_difference(classifier: Experiment) -> None:
    reference, outputs = {"output": torch.ones(2, 10)}, {"output": torch.full((2, 10), float("nan"))}
    (difference,) = output_differences(classifier, reference, outputs, only_significant=False).values()
    assert not difference.largest_difference < 1


def test_a_quantized_detector_is_compared_on_what_it_detects(detector: Experiment) -> None:
    reference = {"pred_logits": torch.full((1, 2, 10), -6.0), "pred_boxes": torch.rand(1, 2, 4)}
    reference["pred_logits"][0, 0, 3] = 3.0
    for query, counts in ((0, True), (1, False)):
        outputs = {name: value.clone() for name, value in reference.items()}
        outputs["pred_boxes"][0, query] += 0.5
        compared = output_differences(detector, reference, outputs, only_significant=True)
        assert (max(difference.largest_difference for difference in compared.values()) > 0.1) is counts


def prove_file(file: Path, checkpoint: Path) -> Proof:
    """The proof of export, on a file as it is now."""
    experiment, network = exported_network(file, checkpoint)
    opened = OpenedModel(read_graph(file), "onnx", file, False)
    return prove(experiment, network, start(experiment, opened, "cpu", "export.on_cpu"), quantized=False)


def shift_a_class(model: onnx.ModelProto) -> None:
    """Add to one bias of the classifier."""
    (name,) = (node.input[2] for node in model.graph.node if node.name == "/fc/Gemm")
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(bias).copy()
    values[7] += 0.5
    bias.CopyFrom(numpy_helper.from_array(values, name))


def enlarge_boxes(model: onnx.ModelProto) -> None:
    """Multiply the sizes of all boxes."""
    (last,) = (node for node in model.graph.node if "pred_boxes" in node.output)
    last.output[0] = "boxes"
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1, 1, 1.02, 1.02]), "factors"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["boxes", "factors"], ["pred_boxes"], "/Mul_of_boxes"))


@pytest.mark.parametrize(
    ("network", "change", "output"),
    [("resnet_18", shift_a_class, "output"), ("detector", enlarge_boxes, "pred_boxes")],
)
def test_a_file_that_was_changed_is_caught(
    float_file: Callable[[str], Path],
    tmp_path: Path,
    network: str,
    change: Callable[[onnx.ModelProto], None],
    output: str,
) -> None:
    model = onnx.load(str(float_file(network)))
    change(model)
    bad = tmp_path / "bad.onnx"
    onnx.save(model, str(bad))
    with pytest.raises(TaoqError) as error:
        prove_file(bad, CHECKPOINTS[network])
    assert re.fullmatch(
        rf"export\.tolerance: torch and ONNX differ: {output} by [0-9.]+, its largest value is [0-9.]+\n"
        r"hint: the file was not written; export\.tolerance is 0\.001 of the largest value",
        str(error.value),
    )


def test_a_file_that_differs_too_much_is_not_written(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    code, out, err = taoq(*export_network("resnet_18", "export.tolerance=1e-9"))
    folder = tmp_path / "results" / "export"
    assert (code, out) == (1, "")
    assert DIFFERS_TOO_MUCH.fullmatch(err)
    assert sorted(path.name for path in folder.iterdir()) == ["log.txt", "status.json"]
    assert status_lines(folder)[-1]["status"] == "FAILURE"


def test_a_failed_export_keeps_the_earlier_file(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    folder, deepstream = tmp_path / "results" / "export", "export.serialize_nvdsinfer=true"
    assert taoq(*export_network("resnet_18", deepstream))[0] == 0
    before = files_of(folder)
    assert sorted(before) == ["labels.txt", "model.onnx", "model_export.json", "nvdsinfer_config.yaml"]
    code, _, err = taoq(*export_network("resnet_18", "export.tolerance=1e-9", deepstream))
    assert code == 1
    assert DIFFERS_TOO_MUCH.search(err)
    assert files_of(folder) == before


def test_the_proof_is_on_as_many_images_as_the_spec_says(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    """More than a batch of the data set, and no multiple of one."""
    code, out, _ = taoq(*export_network("resnet_18", "export.check_images=70"))
    assert code == 0
    assert "outputs of torch and ONNX on 70 images" in out
    assert read_json(tmp_path / "results" / "export" / "model_export.json")["proof"]["images"] == 70


def test_without_images_the_file_is_compared_on_noise_with_a_warning(
    taoq: Taoq, export_network: Words, tmp_path: Path
) -> None:
    code, out, err = taoq(*export_network("resnet_18", *NO_IMAGES, "export.check_images=3"))
    lines = err.splitlines()
    assert (code, len(lines)) == (0, 4)
    assert lines[-1] == (
        "warning: override export.check_images=3: export.check_images: the spec has no images"
        " (dataset.quant_calibration_dataset.images_dir: there is no folder nowhere): compared on noise"
    )
    assert "outputs of torch and ONNX on 3 images" in out
    assert (tmp_path / "results" / "export" / "model.onnx").is_file()


def test_images_that_are_named_and_not_there_get_a_warning(taoq: Taoq, export_network: Words) -> None:
    override = "dataset.quant_calibration_dataset.images_dir=nowhere"
    code, _, err = taoq(*export_network("resnet_18", override))
    where = "dataset.quant_calibration_dataset.images_dir"
    warning = f"warning: override {override}: {where}: there is no folder nowhere; export looks for other images\n"
    assert (code, err) == (0, warning)
