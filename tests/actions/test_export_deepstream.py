"""`export` with the configuration that DeepStream reads."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import yaml

from support.commands import Taoq, Words, read_json
from support.exported import files_of, properties_of, shape_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_classifier_for_deepstream(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    file = tmp_path / "models" / "digits.onnx"
    code, _, err = taoq(*export_network("resnet_18", f"export.onnx_file={file}", "export.serialize_nvdsinfer=true"))
    assert (code, err) == (
        0,
        "warning: override export.serialize_nvdsinfer=true: export.serialize_nvdsinfer: DeepStream has one scale for"
        " all channels, dataset.augmentation.std has three: their mean is written\n",
    )
    assert sorted(files_of(file.parent)) == [
        "digits.onnx", "digits_export.json", "labels.txt", "nvdsinfer_config.yaml",
    ]  # fmt: skip
    assert yaml.safe_load((file.parent / "nvdsinfer_config.yaml").read_text()) == {
        "property": {
            "gpu-id": 0,
            "model-color-format": 0,
            "onnx-file": "digits.onnx",
            "labelfile-path": "labels.txt",
            "infer-dims": "3;32;32",
            "batch-size": 1,
            "network-mode": 2,
            "network-type": 1,
            "net-scale-factor": pytest.approx(1 / (255 * (0.229 + 0.224 + 0.225) / 3)),
            "offsets": "123.6750;116.2800;103.5300",
            "output-blob-names": "output",
        }
    }
    assert (file.parent / "labels.txt").read_text() == "0;1;2;3;4;5;6;7;8;9\n"


def test_a_detector_for_deepstream_with_a_size_and_a_batch(taoq: Taoq, export_network: Words, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    options = ("export.serialize_nvdsinfer=true", "export.batch_size=4", "export.check_images=1")
    size = ("export.input_height=128", "export.input_width=192")
    assert taoq(*export_network("detector", f"export.onnx_file={file}", *options, *size))[0] == 0
    graph = onnx.load(str(file)).graph
    assert shape_of(graph.input[0]) == [4, 3, 128, 192]
    assert [shape_of(value) for value in graph.output] == [[4, 30, 10], [4, 30, 4]]
    assert properties_of(file)["spec"]["dataset"]["augmentation"]["eval_spatial_size"] == [128, 192]
    preprocessing = properties_of(file)["preprocessing"]
    assert (preprocessing["resize"], preprocessing["height"], preprocessing["width"]) == ("squash", 128, 192)
    assert read_json(tmp_path / "model_export.json")["preprocessing"] == preprocessing
    assert yaml.safe_load((tmp_path / "nvdsinfer_config.yaml").read_text()) == {
        "property": {
            "gpu-id": 0,
            "model-color-format": 0,
            "onnx-file": "model.onnx",
            "labelfile-path": "labels.txt",
            "infer-dims": "3;128;192",
            "batch-size": 4,
            "network-mode": 2,
            "network-type": 0,
            "net-scale-factor": pytest.approx(1 / 255),
            "offsets": "0;0;0",
            "maintain-aspect-ratio": 0,
            "num-detected-classes": 10,
            "cluster-mode": 4,
            "output-blob-names": "pred_boxes;pred_logits",
            "parse-bbox-func-name": "NvDsInferParseCustomDDETRTAO",
            "custom-lib-path": "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser_tao.so",
        }
    }
    assert (tmp_path / "labels.txt").read_text() == "".join(f"{digit}\n" for digit in range(10))
