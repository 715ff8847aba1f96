"""Patterns of rules on the nodes of ONNX files, and the plan that a dry run prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import Taoq, Words
from support.onnx_artifacts import CONV_AND_GEMM, FEW_IMAGES, INT8, ONNXRUNTIME, quantized_layers
from support.small_spec import PURPOSE, every_onnx_backend

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_network_s_own_names_are_patterns_of_nodes(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path
) -> None:
    layers = f"quantize.layers=[{{module_name: 'layer1.*', {INT8}}}, {{module_name: fc, {INT8}}}]"
    options = (ONNXRUNTIME, f"quantize.model_path={resnet}", layers, "quantize.skip_names=[fc]", FEW_IMAGES)
    code, _, err = taoq(*digits_words("quantize", "resnet_18", *options))
    assert (code, err) == (0, PURPOSE["onnxruntime"])
    assert sorted(quantized_layers(tmp_path / "results" / "quantize")) == [
        f"/layer1/{block}/conv{number}/Conv" for block in (0, 1) for number in (1, 2)
    ][:2] + ["/layer1/0/downsample/0/Conv"] + [f"/layer1/1/conv{number}/Conv" for number in (1, 2)]  # fmt: skip


@every_onnx_backend
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_node_is_named_with_or_without_the_first_slash(
    taoq: Taoq, digits_words: Words, resnet: Path, backend: str, slash: str
) -> None:
    layers = f"quantize.layers=[{{module_name: '{slash}layer[12]/*', {INT8}}}, {{module_name: Gemm, {INT8}}}]"
    options = (f"quantize.backend={backend}", f"quantize.model_path={resnet}", layers)
    skip = f"quantize.skip_names=['{slash}layer2/*/Conv', '{slash}fc/Gemm']"
    code, out, err = taoq(*digits_words("quantize", "resnet_18", *options, skip), "--dry-run")
    assert (code, err) == (0, PURPOSE[backend] + "dry run: nothing was calibrated, nothing was written\n")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 22
    assert [row[0].split("/")[1] for row in rows if row[3] != "float"] == ["layer1"] * 5
    assert "5 of 22 quantizable layers are quantized" in out


@every_onnx_backend
def test_a_dry_run_opens_no_data_and_writes_nothing(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path, backend: str
) -> None:
    before = sorted(path.name for path in resnet.parent.iterdir())
    options = (f"quantize.backend={backend}", f"quantize.model_path={resnet}", CONV_AND_GEMM)
    more = ("dataset.quant_calibration_dataset.images_dir=nowhere", f"quantize.calibration.cache={tmp_path}/ranges")
    code, out, err = taoq(*digits_words("quantize", "resnet_18", *options, *more), "--dry-run")
    assert (code, err) == (0, PURPOSE[backend] + "dry run: nothing was calibrated, nothing was written\n")
    assert "22 of 22 quantizable layers are quantized" in out
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in resnet.parent.iterdir()) == before
