"""What is refused of ONNX files: files for another backend, task or network, quantized ones, damaged weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from support.commands import Taoq, Words
from support.examples import CHECKPOINTS, SPECS
from support.onnx_artifacts import CONV_AND_GEMM, FEW_IMAGES, MODELOPT, ONNXRUNTIME, Metrics
from support.small_spec import PURPOSE

pytestmark = pytest.mark.usefixtures("one_thread")


REFUSALS = {
    "a torch checkpoint": (
        f"quantize.model_path={CHECKPOINTS['resnet_18']}",
        f"{CHECKPOINTS['resnet_18']} is a torch checkpoint, backend onnxruntime quantizes an ONNX file\n"
        "hint: set quantize.backend to modelopt.pytorch or torchao; taoq <task> export makes an ONNX file of a"
        " checkpoint\n",
    ),
    "nothing": (
        "quantize.model_path=''",
        "missing: backend onnxruntime quantizes an ONNX file\n"
        "hint: taoq <task> export makes an ONNX file of a checkpoint\n",
    ),
}
"""An override of the file to quantize, and what is said about the field."""


@pytest.mark.parametrize("case", REFUSALS)
def test_an_onnx_backend_refuses_what_is_not_an_onnx_file(
    taoq: Taoq, digits_words: Words, tmp_path: Path, case: str
) -> None:
    override, message = REFUSALS[case]
    code, _, err = taoq(*digits_words("quantize", "resnet_18", ONNXRUNTIME, CONV_AND_GEMM, override))
    assert (code, err) == (2, f"override {override}: quantize.model_path: {message}")
    assert not (tmp_path / "results").exists()


def test_a_torch_backend_refuses_an_onnx_file(taoq: Taoq, digits_words: Words, resnet: Path) -> None:
    override = f"quantize.model_path={resnet}"
    code, _, err = taoq(*digits_words("quantize", "resnet_18", override))
    assert (code, err) == (
        2,
        f"override {override}: quantize.model_path: {resnet} is an ONNX file, backend modelopt.pytorch quantizes a"
        " torch checkpoint\n"
        "hint: set quantize.backend to modelopt.onnx (GPUs) or onnxruntime (CPUs)\n",
    )


def test_a_quantized_graph_is_not_quantized_again(
    taoq: Taoq, digits_words: Words, resnet: Path, metrics: Metrics, tmp_path: Path
) -> None:
    """Neither the payload of an artifact, nor a copy of it; a copy runs as any file."""
    words = (MODELOPT, CONV_AND_GEMM, FEW_IMAGES)
    assert taoq(*digits_words("quantize", "resnet_18", *words, f"quantize.model_path={resnet}"))[0] == 0
    payload, copy = tmp_path / "results" / "quantize" / "quantized_model.onnx", tmp_path / "copy.onnx"
    copy.write_bytes(payload.read_bytes())
    hint = "hint: give the float checkpoint it was made from\n"
    for file, text in (
        (payload, f"{payload} is quantized already\n{hint}"),
        (
            copy,
            f"{copy} is quantized already: it has QuantizeLinear or DequantizeLinear nodes\n"
            "hint: give the float file it was made from\n",
        ),
    ):
        override = f"quantize.model_path={file}"
        again = f"quantize.results_dir={tmp_path / 'again'}"
        code, _, err = taoq(*digits_words("quantize", "resnet_18", *words, override, again))
        assert (code, err) == (2, f"override {override}: quantize.model_path: {text}")
    assert metrics("resnet_18", copy) == metrics("resnet_18", payload)
    override = "evaluate.is_quantized=false"
    code, _, err = taoq(*digits_words("evaluate", "resnet_18", f"evaluate.checkpoint={copy}", override))
    assert (code, err) == (
        2,
        f"override {override}: evaluate.is_quantized: is false, but {copy} is quantized\n"
        "hint: leave the field out: the file knows\n",
    )


def test_a_file_is_for_the_task_and_the_network_it_was_exported_from(
    taoq: Taoq, digits_words: Words, scenes_words: Words, resnet: Path
) -> None:
    code, _, err = taoq(*scenes_words("evaluate", f"evaluate.checkpoint={resnet}"))
    assert code == 1
    assert err.splitlines()[-2:] == [
        f"{resnet}: was exported by classification_pyt",
        "hint: run it with: taoq classification_pyt ...",
    ]
    code, _, err = taoq(*digits_words("evaluate", "vit_tiny", f"evaluate.checkpoint={resnet}"))
    assert code == 2
    assert err.startswith(f"{SPECS['vit_tiny']}:")
    assert "model.backbone.type: is vit_tiny_patch16, " in err
    assert err.count("\n") == 2


def test_weights_that_are_not_numbers_are_refused(
    taoq: Taoq, digits_words: Words, resnet: Path, tmp_path: Path
) -> None:
    model = onnx.load(str(resnet))
    (name,) = (node.input[1] for node in model.graph.node if node.name == "/fc/Gemm")
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = float("nan")
    weight.CopyFrom(numpy_helper.from_array(values, name))
    file = tmp_path / "bad.onnx"
    onnx.save(model, str(file))
    words = (ONNXRUNTIME, CONV_AND_GEMM, FEW_IMAGES, f"quantize.model_path={file}")
    code, _, err = taoq(*digits_words("quantize", "resnet_18", *words))
    assert (code, err) == (
        1,
        PURPOSE["onnxruntime"] + "/fc/Gemm: its weight is not finite\n"
        "hint: look for NaN or infinite values in the checkpoint\n",
    )
