"""What both ONNX backends promise, and what their libraries do without saying so. Real libraries, small graphs."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from torch import Tensor

from support.graphs import (
    LAYERS,
    MODELOPT,
    ORT,
    branches,
    bytes_of,
    dequantized_inputs,
    error,
    feed,
    heavy,
    input_scale,
    made_by,
    node,
    pictures,
    plan_of,
    quantize,
    rule,
    run,
    run_file,
    saved,
    tensors,
    weight_parts,
)
from support.networks import Untouched, backend_of, calibrate, faults_of, float_size, notices, scheme, schemes
from taoq.errors import SpecError, TaoqError
from taoq.network import Inputs
from taoq.quantization.formats.onnx import qdq
from taoq.quantization.formats.onnx.graph import Graph
from taoq.quantization.plan import leave_out, verify
from taoq.quantization.ranges import RangeCache

every_backend = pytest.mark.parametrize("backend", [MODELOPT, ORT])
every_algorithm = pytest.mark.parametrize("algorithm", ["max", "entropy"])

TESTS = Path(__file__).parents[1]
FP8 = "fp8_e4m3fn"
NOT_FINITE = (
    "quantize.calibration: the calibration images have values that are not finite\n"
    "hint: look at the normalisation of the dataset section"
)


def weight_of(model: Graph, layer: str) -> Any:
    """The float weight of a layer that is not quantized."""
    return tensors(model)[node(model, layer).input[1]]


def with_weight(layer: str, value: float) -> Graph:
    """Branches with one value of a layer's weight replaced."""
    model = branches()
    (tensor,) = (tensor for tensor in model.proto.initializer if tensor.name == node(model, layer).input[1])
    weight = numpy_helper.to_array(tensor).copy()
    weight.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return Graph(model.model)


def renamed(**names: str) -> Graph:
    """Branches with other names of layers."""
    model = branches()
    for layer, name in names.items():
        node(model, LAYERS[layer]).name = name
    return Graph(model.model)


def names(folder: Path) -> list[str]:
    """Files of a folder."""
    return sorted(path.name for path in folder.iterdir())


# --- which layers -------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("planned", [["left"], ["stem", "head"], ["right", "tokens"], list(LAYERS)], ids="-".join)
def test_exactly_the_planned_layers_are_quantized(backend: str, planned: list[str]) -> None:
    model = quantize(backend, branches(), [rule(layer) for layer in planned], feed(pictures()))
    assert sorted(backend_of(backend).applied(model)) == sorted(LAYERS[layer] for layer in planned)
    assert dequantized_inputs(model) == {LAYERS[layer]: [0, 1] for layer in LAYERS if layer in planned}
    assert 0 < error(run(model, pictures(seed=1)), run(branches(), pictures(seed=1))) < 0.03


@every_backend
@pytest.mark.parametrize("activations", ["int8", None])
def test_a_float_layer_keeps_its_weight_and_its_input_beside_a_planned_one(
    backend: str, activations: str | None
) -> None:
    batches = feed(pictures()) if activations else Untouched()
    model = quantize(backend, branches(), [rule("left", "int8", activations)], batches)
    assert node(model, "/left/Conv").input[0] == ("/Relu_output_0" if activations is None else mine(model))
    for layer in ("/stem/Conv", "/right/Conv", "/tokens/MatMul", "/head/Gemm"):
        assert weight_of(model, layer).tobytes() == weight_of(branches(), layer).tobytes()
    assert node(model, "/right/Conv").input[0] == node(branches(), "/right/Conv").input[0]
    assert tensors(model)["right.bias"].tobytes() == tensors(branches())["right.bias"].tobytes()


def mine(model: Graph) -> str:
    """The dequantized tensor that the left convolution reads, and nothing else does."""
    (name,) = {name for item in model.proto.node if item.name == "/left/Conv" for name in item.input[:1]}
    assert [item.name for item in model.proto.node if name in item.input] == ["/left/Conv"]
    return name


def tied(index: int) -> Graph:
    """Branches whose two branches share their weight (1) or their bias (2), as exporters store equal ones once."""
    model = branches()
    node(model, "/right/Conv").input[index] = node(model, "/left/Conv").input[index]
    return Graph(model.model)


@pytest.mark.parametrize(
    "backend",
    [MODELOPT, ORT],
)
def test_a_float_layer_keeps_a_weight_that_it_shares_with_a_planned_one(backend: str) -> None:
    model = quantize(backend, tied(1), [rule("left")], feed(pictures()))
    assert weight_of(model, "/right/Conv").tobytes() == weight_of(branches(), "/left/Conv").tobytes()


@pytest.mark.parametrize(
    "backend",
    [
        MODELOPT,
        ORT,
    ],
)
def test_a_float_layer_keeps_a_bias_that_it_shares_with_a_planned_one(backend: str) -> None:
    model = quantize(backend, tied(2), [rule("left")], feed(pictures()))
    bias = tensors(model)[node(model, "/right/Conv").input[2]]
    assert bias.tobytes() == tensors(branches())["left.bias"].tobytes()


@pytest.mark.parametrize(
    "backend",
    [MODELOPT, ORT],
)
def test_layers_that_share_a_weight_may_differ_in_their_activations(backend: str) -> None:
    model = quantize(backend, tied(1), [rule("left"), rule("right", "int8", None)], feed(pictures()))
    assert dequantized_inputs(model) == {"/left/Conv": [0, 1], "/right/Conv": [1]}


@every_backend
def test_a_rule_that_matches_nothing_is_an_error(backend: str) -> None:
    with pytest.raises(SpecError) as refused:
        plan_of(backend, branches(), [rule("/stem/conv"), rule("Relu")])
    assert str(refused.value) == (
        "quantize.layers[0].module_name: pattern '/stem/conv' matches no layer\n"
        "hint: did you mean '/stem/Conv' or '/left/Conv'?\n"
        f"quantize.layers[1].module_name: pattern 'Relu' matches 3 layer(s), none of which {backend} can quantize:"
        " it has no weight matrix or kernel\n"
        f"hint: {backend} quantizes {', '.join(backend_of(backend).capability.layer_types)}"
    )


@every_backend
@pytest.mark.parametrize("planned", ["left", "right", "stem"])
@pytest.mark.parametrize(
    "layers",
    [("/a/Conv", "/a/Conv_1", "/a/Conv_10"), ("/a.b/Conv", "/axb/Conv", "/a.b/Conv.1"), ("x+y|z", "xxy", "z")],
    ids=["prefix", "dot", "operators"],
)
def test_only_the_layer_of_exactly_that_name_is_quantized(
    backend: str, planned: str, layers: tuple[str, str, str]
) -> None:
    name = dict(zip(("left", "right", "stem"), layers, strict=True))
    model = quantize(backend, renamed(**name), [rule(name[planned])], feed(pictures()))
    assert dequantized_inputs(model) == {name[planned]: [0, 1]}
    plain = quantize(backend, branches(), [rule(planned)], feed(pictures()))
    assert input_scale(model, name[planned]) == input_scale(plain, LAYERS[planned])


@every_backend
@pytest.mark.parametrize("batch", [None, 1])
def test_gemm_and_matmul_are_quantized_one_image_at_a_time(backend: str, batch: int | None) -> None:
    model = quantize(backend, branches(batch), [rule("Gemm"), rule("MatMul")], feed(*pictures(3).split(1)))
    assert dequantized_inputs(model) == {"/tokens/MatMul": [0, 1], "/head/Gemm": [0, 1]}
    whole = quantize(backend, branches(), [rule("Gemm"), rule("MatMul")], feed(pictures(3)))
    assert input_scale(model, "/head/Gemm") == pytest.approx(input_scale(whole, "/head/Gemm"), rel=1e-5)


@every_backend
def test_the_rest_of_the_graph_stays_float32(backend: str) -> None:
    model = quantize(backend, branches(), [rule("left")], feed(pictures()))
    assert {str(values.dtype) for values in tensors(model).values()} <= {"float32", "int8", "uint8", "int32", "int64"}
    assert "Cast" not in [item.op_type for item in model.proto.node]
    assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in model.proto.output)


def test_modelopt_leaves_a_three_channel_stem_out_in_fp8_and_says_why() -> None:
    plan = plan_of(MODELOPT, branches(), [rule("*", FP8, FP8)])
    ready = calibrate(MODELOPT, branches(), plan, feed(pictures()))
    why = "ModelOpt leaves it out: TensorRT has no fast fp8 kernel for its shape"
    reasons = ready.left_out(plan)
    assert reasons == {"/stem/Conv": why}
    left = leave_out(plan, reasons, strict=False)
    model = ready.quantize(left)
    verify(left, backend_of(MODELOPT).applied(model))
    assert notices(left) == [f"quantize.layers[0]: 1 layer(s) stay float (/stem/Conv): {why}"]
    assert weight_of(model, "/stem/Conv").tobytes() == weight_of(branches(), "/stem/Conv").tobytes()
    with pytest.raises(TaoqError) as refused:
        leave_out(plan, reasons, strict=True)
    assert str(refused.value) == (
        f"quantize.layers[0]: /stem/Conv cannot be quantized: {why}\n"
        "hint: put them into quantize.skip_names, or set quantize.strict: false to leave them float"
    )


# --- what is not finite or not there ------------------------------------------------------------------------------


@every_backend
@every_algorithm
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_images_that_are_not_finite_are_refused(backend: str, algorithm: str, value: float) -> None:
    bad = pictures()
    bad[3, 1, 2, 2] = value
    with pytest.raises(TaoqError) as refused:
        quantize(backend, branches(), [rule("left")], feed(pictures(), bad), algorithm=algorithm)
    assert str(refused.value) == NOT_FINITE


@every_backend
@pytest.mark.parametrize("activations", ["int8", None])
def test_a_weight_that_is_not_finite_is_refused_before_calibration(backend: str, activations: str | None) -> None:
    with pytest.raises(TaoqError) as refused:
        quantize(backend, with_weight("/left/Conv", float("nan")), [rule("left", "int8", activations)])
    assert str(refused.value) == (
        "/left/Conv: its weight is not finite\nhint: look for NaN or infinite values in the checkpoint"
    )


@every_backend
@every_algorithm
def test_no_calibration_data_is_an_error_and_never_random_data(backend: str, algorithm: str) -> None:
    with pytest.raises((TaoqError, ValueError, AttributeError)):
        quantize(backend, branches(), [rule("left")], [], algorithm=algorithm)


@every_backend
def test_weights_alone_need_no_calibration_data(backend: str) -> None:
    model = quantize(backend, branches(), [rule("*", "int8", None)], Untouched())
    assert dequantized_inputs(model) == {name: [1] for name in LAYERS.values()}


# --- the same as the library alone --------------------------------------------------------------------------------

BARE = """
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
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What bare ModelOpt makes of Branches, and onnxruntime's backend where ModelOpt was never imported."""
    folder = tmp_path_factory.mktemp("bare")
    process = subprocess.run(
        [sys.executable, "-c", BARE, str(folder)], cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return folder


def load(path: Path) -> Graph:
    return Graph(onnx.load(path))


def scales_of(model: Graph) -> dict[str, float]:
    """Scale of the quantized input of each layer that has one."""
    return {name: input_scale(model, name) for name, indices in dequantized_inputs(model).items() if 0 in indices}


def test_the_ranges_are_those_of_bare_modelopt(bare: Path) -> None:
    theirs = scales_of(load(bare / "max.onnx"))
    assert {"/stem/Conv", "/left/Conv", "/right/Conv"} <= set(theirs)
    ours = scales_of(quantize(MODELOPT, branches(), [rule("*")], feed(*pictures(24).split(8))))
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)


def test_entropy_cuts_where_bare_modelopt_has_one_range_to_choose_from(bare: Path) -> None:
    theirs, largest = (scales_of(load(bare / f"{name}.onnx")) for name in ("entropy", "max"))
    assert theirs == pytest.approx(largest, rel=0.05)
    ours = scales_of(quantize(MODELOPT, branches(), [rule("*")], feed(*pictures(24).split(8)), algorithm="entropy"))
    assert all(ours[name] <= theirs[name] * (1 + 1e-6) for name in theirs)
    assert any(ours[name] < theirs[name] * 0.95 for name in theirs)


def test_fp8_uses_the_whole_format_where_bare_modelopt_uses_36_of_448(bare: Path) -> None:
    theirs = scales_of(load(bare / "fp8.onnx"))
    assert "/left/Conv" in theirs
    rules = [rule("*", FP8, FP8), rule("stem")]
    ours = scales_of(quantize(MODELOPT, branches(), rules, feed(*pictures(24).split(8))))
    # ModelOpt multiplies the INT8 scale with 448 / 127 (quantization/fp8.py); the same range needs 127 / 448
    assert {name: ours[name] * (448 / 127) ** 2 for name in theirs} == pytest.approx(theirs, rel=1e-5)


def test_the_stored_weights_are_those_of_bare_modelopt(bare: Path) -> None:
    theirs = load(bare / "dq_only.onnx")
    ours = quantize(MODELOPT, branches(), [rule("*")], feed(*pictures(24).split(8)))
    for layer in ("/stem/Conv", "/left/Conv", "/right/Conv"):
        (stored, scale), (their_stored, their_scale) = weight_parts(ours, layer), weight_parts(theirs, layer)
        assert np.array_equal(stored, their_stored)
        np.testing.assert_allclose(scale, their_scale, rtol=1e-6)


def test_modelopt_leaves_onnxruntime_as_it_was(bare: Path) -> None:
    quantize(MODELOPT, branches(), [rule("left")], feed(pictures()), algorithm="entropy")
    quantize(MODELOPT, branches(), [rule("left")], feed(pictures()), {"calibrate_per_node": True})
    after = quantize(ORT, branches(), [rule("*")], feed(pictures()))
    assert bytes_of(after) == (bare / "ort.onnx").read_bytes()


# --- formats ------------------------------------------------------------------------------------------------------


def test_modelopt_has_int8_fp8_native_and_weights_alone_in_one_model(tmp_path: Path) -> None:
    rules = [
        rule("stem"),
        rule("left", FP8, FP8),
        rule("right", "native", "int8"),
        rule("tokens", FP8, None),
        rule("head", "int8", "native"),
    ]
    model = quantize(MODELOPT, branches(), rules, feed(pictures()))
    int8, fp8 = scheme("int8"), scheme(FP8)
    expected = {
        "/stem/Conv": (scheme("int8", 0), int8),
        "/left/Conv": (scheme(FP8, 0), fp8),
        "/right/Conv": (None, int8),
        "/tokens/MatMul": (scheme(FP8, 1), None),
        "/head/Gemm": (scheme("int8", 0), None),
    }
    assert schemes(MODELOPT, model) == expected
    path = saved(MODELOPT, model, tmp_path / "model.onnx")
    assert schemes(MODELOPT, backend_of(MODELOPT).load(path, branches)) == expected
    images = pictures(seed=1)
    assert 0 < error(run_file(path, images), run(branches(), images)) < 0.05


@pytest.mark.parametrize("dtype", ["int8", FP8])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_the_scales_of_modelopts_weights_go_along_any_axis(dtype: str, axis: int | None) -> None:
    plan = plan_of(MODELOPT, branches(), [rule("Conv", dtype, None), rule("MatMul", dtype, None)])
    if axis != 0:  # a rule cannot ask for one scale, but `insert` can store it
        layers = [
            dataclasses.replace(item, weights=scheme(dtype, axis)) if item.weights else item for item in plan.layers
        ]
        plan = dataclasses.replace(plan, layers=tuple(layers))
    model = calibrate(MODELOPT, branches(), plan, Untouched()).quantize(plan)
    verify(plan, backend_of(MODELOPT).applied(model))
    stored, scale = weight_parts(model, "/left/Conv")
    assert (str(stored.dtype), scale.shape) == (
        "int8" if dtype == "int8" else "float8_e4m3fn",
        () if axis is None else (32,),
    )
    assert 0 < error(run(model, pictures()), run(branches(), pictures())) < 0.05


@pytest.mark.parametrize("axis", [0, 1])
def test_a_rule_sets_the_axis_of_modelopts_weights(axis: int) -> None:
    model = quantize(MODELOPT, branches(), [rule("tokens", "int8", None, axis)])
    assert schemes(MODELOPT, model) == {"/tokens/MatMul": (scheme("int8", axis), None)}
    assert weight_parts(model, "/tokens/MatMul")[1].shape == ((32,) if axis == 0 else (64,))


@pytest.mark.parametrize(("backend", "dtype"), [(MODELOPT, "int8"), (MODELOPT, FP8), (ORT, "int8")])
@pytest.mark.parametrize("external", [False, True])
def test_weights_are_stored_quantized(backend: str, dtype: str, external: bool, tmp_path: Path) -> None:
    model = quantize(backend, heavy(), [rule("*", dtype, dtype)], feed(pictures()))
    saved(backend, model, tmp_path / "model.onnx", {"use_external_data_format": external})
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 0.30 * float_size(backend, heavy())
    assert len(list(tmp_path.iterdir())) == 1 + external


def test_an_e5m2_rule_is_realised_as_e4m3() -> None:
    e5m2 = quantize(MODELOPT, branches(), [rule("left", "fp8_e5m2", "fp8_e5m2")], feed(pictures()))
    e4m3 = quantize(MODELOPT, branches(), [rule("left", FP8, FP8)], feed(pictures()))
    assert bytes_of(e5m2) == bytes_of(e4m3)


def test_layers_that_ask_for_e4m3_and_e5m2_may_share_their_input() -> None:
    rules = [rule("left", FP8, FP8), rule("right", "fp8_e5m2", "fp8_e5m2")]
    onnx.checker.check_model(quantize(MODELOPT, branches(), rules, feed(pictures())).model)


# --- nothing is left behind ---------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("options", [{}, {"use_external_data_format": True}], ids=["whole", "external"])
def test_nothing_is_printed_and_no_file_is_left(
    backend: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("temporary", "current"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "current")
    for algorithm in ("max", "entropy"):
        quantize(backend, branches(), [rule("*")], feed(pictures()), options, algorithm=algorithm)
    assert capfd.readouterr() == ("", "")
    assert [path for folder in ("temporary", "current") for path in (tmp_path / folder).rglob("*")] == []
    assert tempfile.gettempdir() == str(tmp_path / "temporary")


@every_backend
def test_a_failure_leaves_no_file_either(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(TaoqError, match="not finite"):
        quantize(backend, branches(), [rule("*")], feed(pictures() * float("nan")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "backend",
    [
        MODELOPT,
        ORT,
    ],
)
def test_the_root_logger_gets_no_handler_that_prints(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    quantize(backend, tied(2), [rule("*")], feed(pictures()))
    assert logging.getLogger().handlers == []


# --- calibration --------------------------------------------------------------------------------------------------


class Counted:
    """Batches that are made when they are asked for; remembers how many were alive at once."""

    def __init__(self, number: int) -> None:
        self.most = 0
        self._number = number
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Inputs]:
        for seed in range(self._number):
            images = pictures(seed=seed)
            self._alive.add(images)
            self.most = max(self.most, len(self._alive))
            yield {"image": images}
            del images


@every_backend
@every_algorithm
def test_calibration_keeps_no_batch_behind_the_next(backend: str, algorithm: str) -> None:
    batches = Counted(12)
    quantize(backend, branches(), [rule("left")], batches, algorithm=algorithm)
    assert 1 <= batches.most <= 3  # the last, the one that is made, and ModelOpt's first


@every_backend
def test_every_batch_counts(backend: str) -> None:
    loud = pictures()
    loud[-1] *= 50
    model = quantize(backend, branches(), [rule("stem")], feed(pictures(), loud, pictures()))
    largest = float(loud.abs().max())
    span = largest / 127 if backend == MODELOPT else float(loud.max() - loud.min()) / 255
    assert input_scale(model, "/stem/Conv") == pytest.approx(span, rel=1e-5)


@every_backend
def test_a_partial_last_batch_fills_up_the_batch_of_the_graph(backend: str) -> None:
    fixed = quantize(backend, branches(4), [rule("*")], feed(pictures(6)))
    whole = quantize(backend, branches(), [rule("*")], feed(pictures(6)))
    assert scales_of(fixed) == pytest.approx(scales_of(whole), rel=1e-5)
    single = quantize(backend, branches(4), [rule("*")], feed(pictures(4), pictures(6)[4:5], pictures(6)[5:]))
    assert scales_of(single) == pytest.approx(scales_of(whole), rel=1e-5)


@every_backend
@every_algorithm
def test_the_same_twice_is_the_same_bytes(backend: str, algorithm: str) -> None:
    first, second = (
        quantize(backend, branches(), [rule("*")], feed(*pictures(24).split(8)), algorithm=algorithm) for _ in range(2)
    )
    assert bytes_of(first) == bytes_of(second)


@every_backend
def test_entropy_cuts_off_an_outlier(backend: str) -> None:
    images = pictures(64)
    images[0, 0, 0, 0] = 1000
    entropy, maximum = (
        input_scale(
            quantize(backend, branches(), [rule("stem")], feed(*images.split(16)), algorithm=algorithm), "/stem/Conv"
        )
        for algorithm in ("entropy", "max")
    )
    assert entropy < 0.5 * maximum


# --- the cache of ranges ------------------------------------------------------------------------------------------


@every_backend
def test_a_cache_serves_the_same_layers_and_fewer_without_data(backend: str, tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "ranges.json", {"model": "a"})
    for planned in ([rule("*")], [rule("left"), rule("head")]):
        plain = quantize(backend, branches(), planned, feed(pictures()))
        quantize(backend, branches(), planned, feed(pictures()) if planned == [rule("*")] else Untouched(), cache=cache)
        cached = quantize(backend, branches(), planned, Untouched(), cache=cache)
        assert bytes_of(cached) == bytes_of(plain)
    assert names(tmp_path) == ["ranges.json"]


@every_backend
def test_ranges_of_one_layer_serve_all_of_them(backend: str, tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "ranges.json", {"model": "a"})
    quantize(backend, branches(), [rule("left")], feed(pictures()), cache=cache)
    cached = quantize(backend, branches(), [rule("*")], Untouched(), cache=cache)
    assert bytes_of(cached) == bytes_of(quantize(backend, branches(), [rule("*")], feed(pictures())))


@every_backend
def test_a_cache_of_another_key_is_calibrated_again(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    quantize(backend, branches(), [rule("*")], feed(pictures() * 5), cache=RangeCache(path, {"images": "a"}))
    again = quantize(backend, branches(), [rule("*")], feed(pictures()), cache=RangeCache(path, {"images": "b"}))
    assert bytes_of(again) == bytes_of(quantize(backend, branches(), [rule("*")], feed(pictures())))


@every_backend
def test_a_damaged_cache_is_an_error_before_calibration(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text("{")
    with pytest.raises(TaoqError) as refused:
        quantize(backend, branches(), [rule("*")], Untouched(), cache=RangeCache(path, {}))
    assert str(refused.value) == (
        f"quantize.calibration.cache: {path} is not a file of calibration ranges\nhint: delete it, or name another file"
    )
    assert path.read_text() == "{"


@pytest.mark.parametrize(
    "backend",
    [
        MODELOPT,
        ORT,
    ],
)
def test_ranges_that_are_not_finite_are_not_kept(backend: str, tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "ranges.json", {})
    with pytest.raises(TaoqError):
        quantize(backend, with_weight("/left/Conv", float("nan")), [rule("head")], feed(pictures()), cache=cache)
    assert names(tmp_path) == []


@every_backend
def test_weights_alone_make_no_cache(backend: str, tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "ranges.json", {})
    quantize(backend, branches(), [rule("*", "int8", None)], Untouched(), cache=cache)
    assert names(tmp_path) == []


# --- backend_kwargs -----------------------------------------------------------------------------------------------


def faults(backend: str, **options: Any) -> list[str]:
    found = faults_of(backend, options, "max")
    return [f"{fault.where}: {fault.what} | {fault.hint}" for fault in found]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "calibrate_per_nodes",
            True,
            "ModelOpt's quantize has no argument 'calibrate_per_nodes' | did you mean 'calibrate_per_node'?",
        ),
        (
            "speed",
            1,
            "ModelOpt's quantize has no argument 'speed' | taoq takes use_external_data_format, calibrate_per_node,"
            " op_types_to_quantize, op_types_to_exclude, high_precision_dtype",
        ),
        (
            "quantize_mode",
            "fp8",
            "'quantize_mode' of ModelOpt's quantize is decided by taoq | give dtypes in quantize.layers",
        ),
        (
            "autotune",
            True,
            "'autotune' of ModelOpt's quantize is decided by taoq | leave it out: taoq takes only"
            " use_external_data_format, calibrate_per_node, op_types_to_quantize, op_types_to_exclude,"
            " high_precision_dtype",
        ),
        ("calibrate_per_node", "yes", "'yes' is not true or false | write true or false"),
        ("op_types_to_quantize", "Conv", "'Conv' is not a list of op types | write a list of op types"),
        ("op_types_to_quantize", ["conv"], "taoq quantizes no op type 'conv' | did you mean 'Conv'?"),
        ("op_types_to_exclude", ["Add"], "taoq quantizes no op type 'Add' | Conv, ConvTranspose, Gemm, MatMul"),
        ("high_precision_dtype", "bf16", "'bf16' is not fp32 or fp16 | write fp32 or fp16"),
    ],
)
def test_options_that_modelopt_does_not_take_are_refused(option: str, value: Any, message: str) -> None:
    assert faults(MODELOPT, **{option: value}) == [f"quantize.backend_kwargs.{option}: {message}"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "reduce_ranges",
            True,
            "onnxruntime's quantize_static has no argument 'reduce_ranges' | did you mean 'reduce_range'?",
        ),
        (
            "per_channel",
            False,
            "'per_channel' of onnxruntime's quantize_static is decided by taoq"
            " | taoq takes reduce_range, use_external_data_format",
        ),
        ("reduce_range", 1, "'1' is not true or false | write true or false"),
    ],
)
def test_options_that_onnxruntime_does_not_take_are_refused(option: str, value: Any, message: str) -> None:
    assert faults(ORT, **{option: value}) == [f"quantize.backend_kwargs.{option}: {message}"]


def test_options_that_fit_have_no_faults() -> None:
    assert faults(ORT, reduce_range=True, use_external_data_format=False) == []
    types = {"op_types_to_quantize": ["Conv"], "op_types_to_exclude": []}
    assert faults(MODELOPT, calibrate_per_node=True, high_precision_dtype="fp16", **types) == []


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        ({"op_types_to_quantize": ["Conv"]}, ["stem", "left", "right"]),
        ({"op_types_to_exclude": ["Conv", "Gemm"]}, ["tokens"]),
        ({"op_types_to_quantize": ["Conv", "Gemm"], "op_types_to_exclude": ["Conv"]}, ["head"]),
    ],
)
def test_op_types_bound_what_modelopt_quantizes(options: dict[str, Any], planned: list[str]) -> None:
    model = quantize(MODELOPT, branches(), [rule("*")], feed(pictures()), options)
    assert list(dequantized_inputs(model)) == [LAYERS[layer] for layer in planned]


def test_a_rule_for_a_type_that_options_leave_out_is_an_error() -> None:
    with pytest.raises(SpecError) as refused:
        plan_of(MODELOPT, branches(), [rule("Conv")], {"op_types_to_exclude": ["Conv"]})
    assert str(refused.value) == (
        "quantize.layers[0].module_name: pattern 'Conv' matches 3 layer(s), none of which modelopt.onnx can quantize:"
        " quantize.backend_kwargs leaves its type out\nhint: modelopt.onnx quantizes Conv, ConvTranspose, Gemm, MatMul"
    )


@pytest.mark.parametrize("batch", [None, 4])
def test_calibration_by_node_finds_the_same_ranges(batch: int | None) -> None:
    plain, by_node = (
        quantize(MODELOPT, branches(batch), [rule("*")], feed(*pictures(10).split(4)), {"calibrate_per_node": value})
        for value in (False, True)
    )
    assert scales_of(by_node) == pytest.approx(scales_of(plain), rel=1e-6)


def test_the_rest_of_the_graph_can_be_float16(tmp_path: Path) -> None:
    model = quantize(
        MODELOPT, branches(), [rule("left"), rule("head")], feed(pictures()), {"high_precision_dtype": "fp16"}
    )
    assert dequantized_inputs(model) == {"/left/Conv": [0, 1], "/head/Gemm": [0, 1]}
    assert weight_of(model, "/right/Conv").dtype == np.float16
    assert {value.type.tensor_type.elem_type for value in [*model.proto.input, *model.proto.output]} == {
        TensorProto.FLOAT
    }
    path, images = saved(MODELOPT, model, tmp_path / "model.onnx"), pictures(seed=1)
    assert 0 < error(run_file(path, images), run(branches(), images)) < 0.03


@every_backend
def test_weights_go_into_a_file_beside_the_graph_where_asked(backend: str, tmp_path: Path) -> None:
    options = {"use_external_data_format": True}
    model = quantize(backend, heavy(), [rule("*")], feed(pictures()), options)
    path = saved(backend, model, tmp_path / "model.onnx", options)
    assert names(tmp_path) == ["model.onnx", "model.onnx_data"]
    assert path.stat().st_size < 10_000
    loaded = backend_of(backend).load(path, heavy)
    assert np.array_equal(run(loaded, pictures()), run(model, pictures()))


# --- onnxruntime's backend ----------------------------------------------------------------------------------------


def test_onnxruntimes_activations_are_unsigned_and_its_weights_signed_per_channel() -> None:
    model = quantize(ORT, branches(), [rule("*")], feed(pictures()))
    values, makers = tensors(model), made_by(model)
    for layer, channels in (("stem", 32), ("left", 32), ("tokens", 64), ("head", 10)):
        inputs = makers[node(model, LAYERS[layer]).input[0]]
        assert values[inputs.input[2]].dtype == np.uint8
        stored, scale = weight_parts(model, LAYERS[layer])
        assert (stored.dtype, scale.shape) == (np.int8, (channels,))


def test_reduced_range_weights_have_seven_bits() -> None:
    model = quantize(ORT, branches(), [rule("left")], feed(pictures()), {"reduce_range": True})
    assert np.abs(weight_parts(model, "/left/Conv")[0].astype(int)).max() <= 64


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [rule("left", "native", "int8")],
            "quantize.layers[0]: rule 'left' has activations only, onnxruntime quantizes them with the weights\n"
            "hint: write weights: {dtype: int8} as well",
        ),
        (
            [rule("left", FP8, None)],
            "quantize.layers[0].weights.dtype: backend onnxruntime has no fp8_e4m3fn weights\n"
            "hint: choose one of int8, native",
        ),
        (
            [rule("left", "int8", FP8)],
            "quantize.layers[0].activations.dtype: backend onnxruntime has no fp8_e4m3fn activations\n"
            "hint: choose one of int8, native",
        ),
        (
            [rule("left", axis=1)],
            "quantize.layers[0].weights.quant_axis: axis 1 is not that of the output channels of '/left/Conv' (Conv)\n"
            "hint: leave it out: this backend has one scale a channel",
        ),
    ],
    ids=["activations alone", "fp8 weights", "fp8 activations", "axis"],
)
def test_what_onnxruntime_cannot_do_is_refused(layers: list[Any], message: str) -> None:
    with pytest.raises(SpecError) as refused:
        plan_of(ORT, branches(), layers)
    assert str(refused.value) == message


def relus(model: Graph) -> list[str]:
    return [item.name for item in model.proto.node if item.op_type == "Relu"]


def test_a_relu_behind_a_planned_layer_is_taken_into_it() -> None:
    model = quantize(ORT, branches(), [rule("Conv")], feed(pictures()))
    assert relus(model) == ["/Relu_2"]
    assert 0 < error(run(model, pictures(seed=1)), run(branches(), pictures(seed=1))) < 0.03


@pytest.mark.parametrize(
    "layers", [[rule("stem")], [rule("stem"), rule("left")], [rule("stem"), rule("right", "int8", None)]]
)
def test_a_relu_that_a_float_layer_reads_stays(layers: list[Any]) -> None:
    model = quantize(ORT, branches(), layers, feed(pictures()))
    assert "/Relu" in relus(model)
    assert node(model, "/right/Conv").input[0] == "/Relu_output_0"
    assert 0 < error(run(model, pictures(seed=1)), run(branches(), pictures(seed=1))) < 0.03


def test_a_relu_whose_output_is_that_of_the_graph_can_be_taken_in() -> None:
    model = branches()
    del model.proto.node[2:]
    model.proto.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info("/Relu_output_0", TensorProto.FLOAT, ["batch", 32, 8, 8])
    )
    found = quantize(ORT, model, [rule("stem")], feed(pictures()))
    assert [value.name for value in found.proto.output] == ["/Relu_output_0"]
    assert run(found, pictures(seed=1)).min() == 0
    assert 0 < error(run(found, pictures(seed=1)), run(model, pictures(seed=1))) < 0.03


def test_layers_with_float_activations_get_their_weights_from_taoq() -> None:
    model = quantize(ORT, branches(), [rule("left"), rule("right", "int8", None)], feed(pictures()))
    stored, scale = qdq.quantize_weight(weight_of(branches(), "/right/Conv"), scheme("int8", 0))
    found, its_scale = weight_parts(model, "/right/Conv")
    assert np.array_equal(found, stored)
    assert np.array_equal(its_scale, scale)
