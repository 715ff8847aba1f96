"""Ranges and weights of modelopt.onnx, against ModelOpt called without taoq. Real libraries, small graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from support.graphs import (
    MODELOPT,
    ORT,
    branches,
    bytes_of,
    feed,
    input_scales,
    pictures,
    quantize,
    rule,
    weight_parts,
)
from support.networks import TESTS
from taoq.quantization.formats.onnx.graph import Graph

FP8 = "fp8_e4m3fn"


QUANTIZE_WITHOUT_TAOQ = """
import sys
from pathlib import Path
from support.graphs import ORT, branches, bytes_of, feed, pictures, quantize, rule
folder = Path(sys.argv[1])
assert not any(name.startswith("modelopt") for name in sys.modules)
(folder / "ort.onnx").write_bytes(bytes_of(quantize(ORT, branches(), [rule("*")], feed(pictures()))))

import modelopt.onnx.quantization as moq
from onnxruntime.quantization.calibrate import CalibrationDataReader

class Reader(CalibrationDataReader):
    def __init__(self):
        self.rewind()
    def rewind(self):
        self.batches = iter([{"image": images.numpy()} for images in pictures(24).split(8)])
    def get_next(self):
        return next(self.batches, None)
    def get_first(self):
        return {"image": pictures(24)[:8].numpy()}

(folder / "model.onnx").write_bytes(bytes_of(branches()))
for name, options in {
    "max": {"quantize_mode": "int8", "calibration_method": "max"},
    "entropy": {"quantize_mode": "int8", "calibration_method": "entropy"},
    "dq_only": {"quantize_mode": "int8", "calibration_method": "max", "dq_only": True},
    "fp8": {"quantize_mode": "fp8", "calibration_method": "max"},
}.items():
    moq.quantize(str(folder / "model.onnx"), calibration_data_reader=Reader(), calibration_eps=["cpu"],
                 high_precision_dtype="fp32", output_path=str(folder / f"{name}.onnx"), **options)
"""


@pytest.fixture(scope="module")
def bare_modelopt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Branches quantized by ModelOpt without taoq, and by the backend onnxruntime before ModelOpt was imported."""
    folder = tmp_path_factory.mktemp("bare_modelopt")
    words = [sys.executable, "-c", QUANTIZE_WITHOUT_TAOQ, str(folder)]
    process = subprocess.run(words, cwd=TESTS, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return folder


def load_graph(path: Path) -> Graph:
    return Graph(onnx.load(path))


def test_the_ranges_are_those_of_bare_modelopt(bare_modelopt: Path) -> None:
    theirs = input_scales(load_graph(bare_modelopt / "max.onnx"))
    assert {"/stem/Conv", "/left/Conv", "/right/Conv"} <= set(theirs)
    ours = input_scales(quantize(MODELOPT, branches(), [rule("*")], feed(*pictures(24).split(8))))
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)


def test_entropy_clips_where_bare_modelopt_tries_only_one_range(bare_modelopt: Path) -> None:
    theirs, maxima = (input_scales(load_graph(bare_modelopt / f"{name}.onnx")) for name in ("entropy", "max"))
    assert theirs == pytest.approx(maxima, rel=0.05)
    ours = input_scales(quantize(MODELOPT, branches(), [rule("*")], feed(*pictures(24).split(8)), algorithm="entropy"))
    assert all(ours[name] <= theirs[name] * (1 + 1e-6) for name in theirs)
    assert any(ours[name] < theirs[name] * 0.95 for name in theirs)


def test_fp8_uses_the_whole_range_where_bare_modelopt_uses_36_of_448(bare_modelopt: Path) -> None:
    theirs = input_scales(load_graph(bare_modelopt / "fp8.onnx"))
    assert "/left/Conv" in theirs
    rules = [rule("*", FP8, FP8), rule("stem")]
    ours = input_scales(quantize(MODELOPT, branches(), rules, feed(*pictures(24).split(8))))
    # ModelOpt multiplies the INT8 scale with 448 / 127 (quantization/fp8.py); the same range needs 127 / 448
    assert {name: ours[name] * (448 / 127) ** 2 for name in theirs} == pytest.approx(theirs, rel=1e-5)


def test_the_stored_weights_are_those_of_bare_modelopt(bare_modelopt: Path) -> None:
    theirs = load_graph(bare_modelopt / "dq_only.onnx")
    ours = quantize(MODELOPT, branches(), [rule("*")], feed(*pictures(24).split(8)))
    for layer in ("/stem/Conv", "/left/Conv", "/right/Conv"):
        (stored, scale), (their_stored, their_scale) = weight_parts(ours, layer), weight_parts(theirs, layer)
        assert np.array_equal(stored, their_stored)
        np.testing.assert_allclose(scale, their_scale, rtol=1e-6)


def test_modelopt_leaves_onnxruntime_as_it_was(bare_modelopt: Path) -> None:
    quantize(MODELOPT, branches(), [rule("left")], feed(pictures()), algorithm="entropy")
    quantize(MODELOPT, branches(), [rule("left")], feed(pictures()), {"calibrate_per_node": True})
    graph = quantize(ORT, branches(), [rule("*")], feed(pictures()))
    assert bytes_of(graph) == (bare_modelopt / "ort.onnx").read_bytes()
