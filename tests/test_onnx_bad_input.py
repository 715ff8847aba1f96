"""ONNX: bad files, graphs, specs and data: two lines, an exit code, nothing left behind but the log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from taoq.onnx_file import read_onnx, read_properties, write_properties

from taoq.cli import main
from taoq.errors import TaoqError
from taoq.pipeline.artifacts import MANIFEST, read_artifact
from test_bad_files import GIT_LFS, wait_for_reader

Taoq = Callable[..., tuple[int, str, str]]
Edit = Callable[[Mapping[str, str]], None]
Refused = Callable[..., tuple[int, str]]
Everywhere = Callable[..., tuple[int, str]]
Change = Callable[[onnx.ModelProto], Any]

EXAMPLES = Path(__file__).parent.parent / "examples"
BACKENDS = ("modelopt.onnx", "onnxruntime")
TORCH = ("quantize.model_path=weights.safetensors", "quantize.layers=[{module_name: Linear, weights: {dtype: int8}}]")
ALL_ARE_USED = "quantize.calibration.num_samples is 512, there are 20 images: all are used\n"
IS_FOR = {
    "modelopt.onnx": "modelopt.onnx is for NVIDIA GPUs through TensorRT; on a CPU its graph is slower than float,"
    " backend onnxruntime is for CPUs\n",
    "onnxruntime": "onnxruntime is for CPUs, through onnxruntime; for NVIDIA GPUs take backend modelopt.onnx\n",
}
CONV = "Conv\n      weights: {dtype: int8}\n      activations: {dtype: int8}"
FC = "fc\n      weights: {dtype: int8}\n      activations: {dtype: int8}"
NO_FILE = "there is no such file\nhint: export one first, or correct the path\n"
AGAIN = "hint: export it again, or copy it again: a part may be missing\n"
NO_ONNX = f"is not an ONNX file, or was cut off\n{AGAIN}"
NO_GRAPH = f"is not an ONNX file: it has no graph\n{AGAIN}"
ONE_INPUT = "hint: export the network without its pre- and post-processing\n"
RGB = "hint: export the network for batches of RGB images\n"
SIZE = "hint: set the input size in the dataset section to that of the file\n"
OTHER = "hint: the file is of another task, or of another number of classes\n"

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="session")
def exported(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ResNet of the digits as an ONNX file."""
    folder = tmp_path_factory.mktemp("exported")
    words = [f"results_dir={folder}", f"export.onnx_file={folder / 'float.onnx'}", "export.on_cpu=true"]
    words += [f"export.checkpoint={EXAMPLES / 'digits' / 'checkpoints' / 'resnet_18.safetensors'}"]
    words += [f"dataset.quant_calibration_dataset.images_dir={digits / 'calibration'}"]
    assert main(["classification_pyt", "export", "-e", str(Path(__file__).parent / "good.yaml"), *words]) == 0
    return folder / "float.onnx"


@pytest.fixture
def file(exported: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> Path:
    """float.onnx, a spec that quantizes it statically, and a folder for temporary files that `refused` looks into."""
    edit(
        {
            "model_path: weights.safetensors": "model_path: float.onnx",
            "backend: torchao": "backend: onnxruntime",
            "mode: weight_only_ptq": "mode: static_ptq",
            "Linear\n      weights: {dtype: int8}\n      activations: {dtype: native}": CONV,
            "fc\n      weights: {dtype: int8}\n      activations: {dtype: native}": FC,
            "evaluate:\n  checkpoint: weights.safetensors": "evaluate:\n  checkpoint: float.onnx",
            "inference:\n  checkpoint: weights.safetensors": "inference:\n  checkpoint: float.onnx",
        }
    )
    Path("temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", "temporary")
    shutil.copy(exported, "float.onnx")
    return Path("float.onnx")


@pytest.fixture
def artifact(taoq: Taoq, file: Path) -> Path:
    """Quantized by onnxruntime."""
    assert quantize(taoq) == (0, IS_FOR["onnxruntime"] + ALL_ARE_USED)
    return Path("results/quantize")


@pytest.fixture
def everywhere(refused: Refused, file: Path) -> Everywhere:
    """Run actions that read float.onnx; all must say the same."""

    def run(*, actions: tuple[str, ...] = ("quantize", "inference")) -> tuple[int, str]:
        said = {action: refused(action) for action in actions}
        assert len(set(said.values())) == 1, said
        return said[actions[0]]

    return run


def quantize(taoq: Taoq, *words: str) -> tuple[int, str]:
    code, _, err = taoq("classification_pyt", "quantize", "-e", "spec.yaml", *words)
    return code, err


def change(*changes: Change) -> None:
    """Change float.onnx. What taoq wrote into it about itself stays: see `foreign`."""
    model = onnx.load("float.onnx")
    for each in changes:
        each(model)
    Path("float.onnx").write_bytes(model.SerializeToString())


def foreign(model: onnx.ModelProto) -> None:
    """As another exporter writes it."""
    del model.metadata_props[:]


def cut(size: float) -> None:
    data = Path("float.onnx").read_bytes()
    Path("float.onnx").write_bytes(data[: int(len(data) * size) if isinstance(size, float) else size])


def weight(model: onnx.ModelProto, name: str, edit: Callable[[Any], Any]) -> None:
    """Change a weight, a layer's second input."""
    (name,) = (node.input[1] for node in model.graph.node if node.name == name)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), name))


def shape(value: onnx.ValueInfoProto, *sizes: int | str, dtype: int = TensorProto.FLOAT) -> None:
    value.CopyFrom(helper.make_tensor_value_info(value.name, dtype, sizes))


@every_backend
def test_the_good_file_and_the_good_spec_are_good(taoq: Taoq, file: Path, backend: str) -> None:
    assert quantize(taoq, f"quantize.backend={backend}") == (0, IS_FOR[backend] + ALL_ARE_USED)
    assert not list(Path("temporary").iterdir())
    assert taoq("classification_pyt", "evaluate", "-e", "spec.yaml")[0] == 0


# Files


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Path("float.onnx").unlink(), NO_FILE, id="missing"),
        pytest.param(lambda: Path("float.onnx").write_bytes(b""), NO_GRAPH, id="empty"),
        pytest.param(lambda: Path("float.onnx").write_bytes(b"a text\n"), NO_ONNX, id="a text"),
        pytest.param(lambda: Path("float.onnx").write_bytes(b"<html></html>\n"), NO_ONNX, id="a web page"),
        pytest.param(lambda: Path("float.onnx").write_bytes(GIT_LFS), NO_ONNX, id="a pointer of git-lfs"),
        pytest.param(lambda: torch.save(load_file("weights.safetensors"), "float.onnx"), NO_ONNX, id="of torch"),
        pytest.param(lambda: shutil.copy("weights.safetensors", "float.onnx"), NO_ONNX, id="a safetensors file"),
        pytest.param(
            lambda: Path(shutil.make_archive("images", "zip", "data/val/0")).replace("float.onnx"), NO_ONNX, id="a zip"
        ),
        pytest.param(lambda: cut(0.01), NO_ONNX, id="cut off in the nodes"),
        pytest.param(lambda: cut(0.5), NO_ONNX, id="cut off in the weights"),
        pytest.param(lambda: cut(0.99), NO_ONNX, id="cut off near the end"),
        pytest.param(lambda: cut(-1), NO_ONNX, id="cut off by a byte"),
        pytest.param(
            lambda: change(lambda model: model.graph.ClearField("node"), foreign), NO_GRAPH, id="without nodes"
        ),
        pytest.param(
            lambda: change(lambda model: model.ClearField("opset_import")),
            f"is no valid ONNX file: model with IR version >= 3 must specify opset_import for ONNX\n{AGAIN}",
            id="cut off behind the graph",
        ),
        pytest.param(
            lambda: change(lambda model: model.ClearField("ir_version")),
            f"is no valid ONNX file: The model does not have an ir_version set properly.\n{AGAIN}",
            id="without a version",
        ),
    ],
)
def test_a_file_is_refused(everywhere: Everywhere, make: Callable[[], None], message: str) -> None:
    make()
    assert everywhere() == (1, f"float.onnx: {message}")


def test_every_action_and_backend_refuses_a_file(everywhere: Everywhere, refused: Refused) -> None:
    cut(-1)
    message = f"float.onnx: {NO_ONNX}"
    assert everywhere(actions=("quantize", "evaluate", "inference")) == (1, message)
    assert refused("quantize", "quantize.backend=modelopt.onnx") == (1, message)
    assert refused("quantize", "quantize.backend=modelopt.onnx", "--dry-run") == (1, message)


def beside() -> None:
    """Move the weights into a file beside float.onnx."""
    onnx.save(
        onnx.load("float.onnx"),
        "float.onnx",
        save_as_external_data=True,
        location="float.onnx_data",
        size_threshold=1024,
    )


def external(key: str, value: str) -> None:
    """Change where the weights beside float.onnx are."""
    model = onnx.load("float.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    Path("float.onnx").write_bytes(model.SerializeToString())


def secret(location: str) -> None:
    """The weights are whole, but at another place than beside the file."""
    Path("float.onnx_data").replace("secret")
    external("location", location)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(
            lambda: Path("float.onnx_data").unlink(),
            "its weights beside it cannot be read: Data of TensorProto ( tensor name: /conv1/Conv_input_1) should be",
            id="missing",
        ),
        pytest.param(
            lambda: Path("float.onnx_data").write_bytes(Path("float.onnx_data").read_bytes()[:-1]),
            "its weights beside it cannot be read: External data length (5120) exceeds available data (5119 bytes from",
            id="cut off by a byte",
        ),
        pytest.param(
            lambda: Path("float.onnx_data").write_bytes(b""),
            "its weights beside it cannot be read: External data length (37632) exceeds available data (0 bytes from",
            id="empty",
        ),
        pytest.param(lambda: external("offset", "-5"), "its weights beside it cannot be read: ", id="at -5"),
        pytest.param(lambda: external("offset", "abc"), "its weights beside it cannot be read: ", id="at abc"),
        pytest.param(lambda: external("offset", str(10**15)), "its weights beside it cannot be read: ", id="far out"),
        # files of other users must not be read, nor their content told
        pytest.param(lambda: secret("secret/../../secret"), "its weights beside it cannot be read: ", id="out of it"),
        pytest.param(lambda: secret("../secret"), "its weights beside it cannot be read: ", id="in the folder above"),
        pytest.param(lambda: secret(str(Path("secret").resolve())), "its weights beside it cannot be read: ", id="/"),
        pytest.param(
            lambda: (secret("float.onnx_data"), Path("float.onnx_data").symlink_to("secret")),
            "its weights beside it cannot be read: ",
            id="a link",
        ),
    ],
)
def test_weights_beside_a_file_are_refused(everywhere: Everywhere, make: Callable[[], None], what: str) -> None:
    beside()
    make()
    code, err = everywhere()
    assert code == 1
    assert err.startswith(f"float.onnx: {what}")
    assert len(err.splitlines()) == 2
    assert err.splitlines()[1].startswith("hint: ")


def test_whatever_is_damaged_in_a_file_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    good = small().SerializeToString()
    random = Random(0)
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(TaoqError) as error:
            read_onnx(path)
        assert str(error.value).startswith(f"{path}: is no")
        assert len(str(error.value).splitlines()) == 2
    for _ in range(1500):
        bad = bytearray(good)
        for _ in range(random.choice((1, 1, 2, 4))):
            bad[random.randrange(len(bad))] = random.randrange(256)
        path.write_bytes(bad)
        with suppress(TaoqError):  # another number, or another name, is none
            read_onnx(path)


def small() -> onnx.ModelProto:
    """A classifier of a kilobyte: most of it is structure."""
    random = np.random.default_rng(0)
    arrays = {"kernel": (4, 3, 3, 3), "weight": (10, 4), "bias": (10,)}
    nodes = [
        helper.make_node("Conv", ["input", "kernel"], ["conv"], "/conv/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["relu"], "/relu/Relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], "/pool/GlobalAveragePool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "/flat/Flatten"),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["output"], "/fc/Gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(random.normal(size=size).astype(np.float32), n) for n, size in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# Graphs


def without_inputs(model: onnx.ModelProto) -> None:
    image = numpy_helper.from_array(np.zeros((1, 3, 32, 32), np.float32), model.graph.input[0].name)
    model.graph.ClearField("input")
    model.graph.initializer.append(image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            without_inputs, f"has 0 inputs (none): taoq runs graphs with one image input\n{ONE_INPUT}", id="none"
        ),
        pytest.param(
            lambda model: model.graph.input.append(helper.make_tensor_value_info("mask", 1, [1, 3])),
            f"has 2 inputs (input, mask): taoq runs graphs with one image input\n{ONE_INPUT}",
            id="two",
        ),
        pytest.param(
            lambda model: shape(model.graph.input[0], "batch", 3072),
            f"its input 'input' is float32 ['?', 3072], not float [batch, 3, height, width]\n{RGB}",
            id="a matrix",
        ),
        pytest.param(
            lambda model: shape(model.graph.input[0]),
            f"its input 'input' is float32 [], not float [batch, 3, height, width]\n{RGB}",
            id="a number",
        ),
        pytest.param(
            lambda model: shape(model.graph.input[0], "batch", 1, 32, 32),
            f"its input 'input' is float32 ['?', 1, 32, 32], not float [batch, 3, height, width]\n{RGB}",
            id="one channel",
        ),
        pytest.param(
            lambda model: shape(model.graph.input[0], "batch", 32, 32, 3),
            f"its input 'input' is float32 ['?', 32, 32, 3], not float [batch, 3, height, width]\n{RGB}",
            id="channels last",
        ),
        pytest.param(
            lambda model: shape(model.graph.input[0], "batch", 3, 32, 32, dtype=TensorProto.INT64),
            f"its input 'input' is int64 ['?', 3, 32, 32], not float [batch, 3, height, width]\n{RGB}",
            id="whole numbers",
        ),
        pytest.param(
            lambda model: shape(model.graph.input[0], "batch", 3, 32, 32, dtype=TensorProto.UINT8),
            f"its input 'input' is uint8 ['?', 3, 32, 32], not float [batch, 3, height, width]\n{RGB}",
            id="bytes",
        ),
        pytest.param(
            lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
            f"is no valid ONNX file: Field 'shape' of 'type' is required but missing.\n{AGAIN}",
            id="without a shape",
        ),
        pytest.param(
            lambda model: shape(model.graph.input[0], "batch", 3, 48, 64),
            f"takes images of 48 x 64 (height x width), those of the spec are 32 x 32\n{SIZE}",
            id="another size",
        ),
        pytest.param(
            lambda model: shape(model.graph.input[0], "batch", 3, "height", 64),
            f"takes images of any x 64 (height x width), those of the spec are 32 x 32\n{SIZE}",
            id="another width",
        ),
    ],
)
def test_the_inputs_of_a_graph_are_refused(everywhere: Everywhere, make: Change, message: str) -> None:
    change(make)
    assert everywhere() == (1, f"float.onnx: {message}")


def with_classes(number: int) -> Change:
    def make(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name.startswith("fc."):
                data = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.concatenate([data, data])[:number], tensor.name))
        shape(model.graph.output[0], "batch", number)

    return make


def other_output(name: str, *sizes: int | str) -> Change:
    """The graph ends in another tensor; `classes` is the best class."""

    def make(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("ArgMax", ["output"], ["classes"], axis=1, keepdims=0))
        (made_by,) = (node for node in model.graph.node if node.name.endswith(name) or name in node.output)
        dtype = TensorProto.INT64 if name == "classes" else TensorProto.FLOAT
        model.graph.ClearField("output")
        model.graph.output.append(helper.make_tensor_value_info(made_by.output[0], dtype, sizes))

    return make


@pytest.mark.parametrize(
    ("make", "has"),
    [
        pytest.param(with_classes(12), "'output' [..., 12]", id="classes"),
        pytest.param(
            other_output("/Flatten", "batch", 128), "'/global_pool/flatten/Flatten_output_0' [..., 128]", id="features"
        ),
        pytest.param(other_output("classes", "batch"), "'classes' [..., ?]", id="the class alone"),
    ],
)
def test_the_outputs_of_a_graph_are_refused(file: Path, refused: Refused, make: Change, has: str) -> None:
    change(foreign, make)
    message = f"has no output 'output' with 10 values each: its outputs are {has}\n{OTHER}"
    assert refused("evaluate") == (1, f"float.onnx: {message}")
    assert refused("inference") == (1, f"float.onnx: {message}")


def test_two_outputs_that_may_be_meant_are_refused(file: Path, refused: Refused) -> None:
    def twice(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "logits"
        model.graph.node.append(helper.make_node("Softmax", ["logits"], ["scores"]))
        model.graph.ClearField("output")
        for name in ("logits", "scores"):
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 10]))

    change(foreign, twice)
    has = "'logits' [..., 10], 'scores' [..., 10]"
    message = f"has no output 'output' with 10 values each: its outputs are {has}\n{OTHER}"
    assert refused("evaluate") == (1, f"float.onnx: {message}")


def properties(**fields: Any) -> Change:
    def make(model: onnx.ModelProto) -> None:
        write_properties(model, {**read_properties(model, Path("it")), **fields})

    return make


def dataset(**fields: Any) -> Change:
    def make(model: onnx.ModelProto) -> None:
        found = read_properties(model, Path("it"))
        found["spec"]["dataset"].update(fields)
        write_properties(model, found)

    return make


def test_the_file_of_another_task_is_refused(everywhere: Everywhere, taoq: Taoq) -> None:
    for backend in BACKENDS:
        words = [f"quantize.backend={backend}", "quantize.model_path=float.onnx", "results_dir=other"]
        spec = EXAMPLES / "digit_scenes" / "rtdetr.yaml"
        rule = "quantize.layers=[{module_name: Conv, weights: {dtype: int8}}]"
        assert taoq("rtdetr", "quantize", "-e", str(spec), *words, rule) == (
            1,
            "",
            "float.onnx: was exported by classification_pyt\nhint: run it with: taoq classification_pyt ...\n",
        )
    change(properties(task="rtdetr"))
    assert everywhere() == (1, "float.onnx: was exported by rtdetr\nhint: run it with: taoq rtdetr ...\n")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(
            dataset(augmentation={"mean": [0, 0, 0]}),
            "spec.yaml:9: dataset.augmentation.mean: is [0.485, 0.456, 0.406], the ",
            id="mean",
        ),
        pytest.param(
            dataset(augmentation={"std": [1, 1, 1]}),
            "spec.yaml:9: dataset.augmentation.std: is [0.229, 0.224, 0.225], the ",
            id="std",
        ),
        pytest.param(dataset(num_classes=12), "spec.yaml:11: dataset.num_classes: is 10, the ", id="classes"),
        pytest.param(dataset(img_size=64), "spec.yaml:12: dataset.img_size: is 32, the ", id="size"),
    ],
)
def test_a_file_exported_with_another_spec_is_refused(everywhere: Everywhere, make: Change, what: str) -> None:
    change(make)
    code, err = everywhere()
    assert (code, len(err.splitlines())) == (2, 2)
    assert err.startswith(what)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(
            properties(spec={"dataset": {"classes": 10}}),
            "Key 'classes' not in 'DatasetSpec'. Did you mean one of: 'num_classes', 'classes_file'?",
            id="unknown field",
        ),
        pytest.param(
            dataset(num_classes="ten"), "Value 'ten' of type 'str' could not be converted to Integer", id="a text"
        ),
        pytest.param(dataset(num_classes="${no.field}"), "Interpolation key 'no.field' not found", id="a reference"),
    ],
)
def test_a_file_whose_own_spec_does_not_fit_is_refused(everywhere: Everywhere, make: Change, what: str) -> None:
    change(properties(taoq="9.9"), make)
    assert everywhere() == (
        1,
        f"float.onnx: its spec does not fit this taoq: {what}\nhint: read it with taoq 9.9\n",
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '"a"'])
def test_what_taoq_did_not_write_under_its_key_is_refused(everywhere: Everywhere, text: str) -> None:
    change(lambda model: setattr(model.metadata_props[0], "value", text))
    what = "what taoq wrote into it about itself is damaged"
    assert everywhere() == (1, f"float.onnx: {what}\nhint: export it again\n")


def rename(name: str) -> Change:
    def make(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.name = name

    return make


@every_backend
def test_nodes_need_no_names(taoq: Taoq, file: Path, backend: str) -> None:
    change(rename(""))
    rule = "quantize.layers=[{module_name: Conv, weights: {dtype: int8}, activations: {dtype: int8}}]"
    assert quantize(taoq, f"quantize.backend={backend}", rule) == (0, IS_FOR[backend] + ALL_ARE_USED)
    rows = read_artifact(Path("results/quantize")).manifest.plan
    assert sum(row["weights"] is not None for row in rows) == 21
    assert len({row["layer"] for row in rows}) == len(rows)


def older(version: int) -> Change:
    """As an exporter of that time writes it."""

    def make(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version
        for node in model.graph.node:
            if node.op_type == "MaxPool":
                kept = [attribute for attribute in node.attribute if attribute.name not in ("ceil_mode", "dilations")]
                node.ClearField("attribute")
                node.attribute.extend(kept)

    return make


@pytest.mark.parametrize(("version", "backend"), [(9, "onnxruntime"), (10, "modelopt.onnx")])
def test_an_old_opset_is_taken(taoq: Taoq, file: Path, version: int, backend: str) -> None:
    change(older(version))
    assert quantize(taoq, f"quantize.backend={backend}") == (0, IS_FOR[backend] + ALL_ARE_USED)
    assert taoq("classification_pyt", "evaluate", "-e", "spec.yaml")[0] == 0


@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(
            lambda model: setattr(model.opset_import[0], "version", 9),
            "Unrecognized attribute: ceil_mode for operator MaxPool",
            id="an older opset than its nodes",
        ),
        pytest.param(
            lambda model: setattr(model.opset_import[0], "version", 0),
            "No Op registered for Conv with domain_version of 0",
            id="opset 0",
        ),
        pytest.param(
            lambda model: setattr(model.opset_import[0], "domain", "my.ops"),
            "No opset import for domain ''",
            id="no standard operators",
        ),
        pytest.param(
            lambda model: setattr(model.graph.node[-1], "op_type", "Fancy"),
            "No Op registered for Fancy with domain_version of 17",
            id="an unknown operator",
        ),
        pytest.param(
            lambda model: setattr(model.graph.node[-1], "domain", "my.ops"),
            "No opset import for domain 'my.ops'",
            id="an operator of an unknown set",
        ),
        pytest.param(
            lambda model: model.graph.node[5].input.__setitem__(0, "nowhere"),
            "Nodes in a graph must be topologically sorted, however input 'nowhere' of node: ",
            id="a loose end",
        ),
        pytest.param(
            lambda model: model.graph.node[3].output.__setitem__(0, model.graph.node[2].output[0]),
            "Graph must be in single static assignment (SSA) form, however '/maxpool/MaxPool_output_0' has been used"
            " as output names multiple times.",
            id="a tensor made twice",
        ),
    ],
)
def test_a_graph_that_breaks_the_rules_of_onnx_is_refused(everywhere: Everywhere, make: Change, what: str) -> None:
    change(make)
    assert everywhere() == (1, f"float.onnx: is no valid ONNX file: {what}\n{AGAIN}")


def test_an_operator_that_onnxruntime_does_not_have_is_refused(file: Path, refused: Refused) -> None:
    def custom(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("my.ops", 1))
        model.graph.node[-1].domain = "my.ops"

    change(foreign, custom)
    code, err = refused("evaluate")
    assert (code, len(err.splitlines())) == (1, 2)
    assert err.startswith("float.onnx: onnxruntime cannot run it: ")
    assert "my.ops:Gemm(-1) is not a registered function/op" in err


@every_backend
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(file: Path, refused: Refused, backend: str, value: float) -> None:
    def spoil(weights: Any) -> Any:
        weights.flat[3] = value
        return weights

    change(lambda model: [weight(model, name, spoil) for name in ("/layer1/0/conv1/Conv", "/fc/Gemm")])
    hint = "hint: look for NaN or infinite values in the checkpoint\n"
    code, err = refused("quantize", f"quantize.backend={backend}")
    assert code == 1
    assert err.endswith(
        f"/layer1/0/conv1/Conv: its weight is not finite\n{hint}/fc/Gemm: its weight is not finite\n{hint}"
    )


@every_backend
def test_a_quantized_file_is_not_quantized_again(artifact: Path, refused: Refused, backend: str) -> None:
    words = (f"quantize.backend={backend}", "quantize.results_dir=again")
    payload = f"{artifact}/quantized_model.onnx"
    assert refused("quantize", *words, f"quantize.model_path={payload}") == (
        2,
        f"override quantize.model_path={payload}: quantize.model_path: {payload} is quantized already\n"
        "hint: give the float checkpoint it was made from\n",
    )
    shutil.copy(payload, "alone.onnx")
    assert refused("quantize", *words, "quantize.model_path=alone.onnx") == (
        2,
        "override quantize.model_path=alone.onnx: quantize.model_path: alone.onnx is quantized already: it has"
        " QuantizeLinear or DequantizeLinear nodes\n"
        "hint: give the float file it was made from\n",
    )
    code, err = refused("quantize", *words, f"quantize.model_path={artifact}")
    assert (code, len(err.splitlines())) == (2, 2)
    assert err.startswith(f"override quantize.model_path={artifact}: quantize.model_path: {artifact} is ")


# Specs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["quantize.model_path=weights.safetensors"],
            "override quantize.model_path=weights.safetensors: quantize.model_path: weights.safetensors is not an ONNX"
            " file\n"
            "hint: backend {} quantizes ONNX files: taoq classification_pyt export makes one of a checkpoint\n",
            id="a checkpoint",
        ),
        pytest.param(
            ["quantize.model_path=''"],
            "override quantize.model_path='': quantize.model_path: missing: the .onnx file\n"
            "hint: backend {} quantizes ONNX files: taoq classification_pyt export makes one of a checkpoint\n",
            id="no file",
        ),
        pytest.param(
            ["quantize.mode=weight_only_ptq"],
            "override quantize.mode=weight_only_ptq: quantize.mode: backend {} has no mode weight_only_ptq\n"
            "hint: write mode: static_ptq, or choose a backend that has weight_only_ptq\n",
            id="weights only",
        ),
        pytest.param(
            ["quantize.layers.0.activations.quant_axis=1"],
            "override quantize.layers.0.activations.quant_axis=1: quantize.layers[0].activations.quant_axis: {} has one"
            " scale for all of a layer's input\n"
            "hint: leave it out\n",
            id="a scale per channel of the input",
        ),
        pytest.param(
            ["quantize.device=gpu"],
            "override quantize.device=gpu: quantize.device: unknown value 'gpu'\n"
            "hint: the field is: Where to quantize: cuda, cuda:N or cpu; trt (TensorRT) is for modelopt.onnx\n",
            id="unknown device",
        ),
        pytest.param(
            ["quantize.device=cuda:x"],
            "override quantize.device=cuda:x: quantize.device: unknown value 'cuda:x'\n"
            "hint: the field is: Where to quantize: cuda, cuda:N or cpu; trt (TensorRT) is for modelopt.onnx\n",
            id="unknown GPU",
        ),
        pytest.param(
            ["quantize.backend_kwargs={1: true}"],
            "override quantize.backend_kwargs={{1: true}}: quantize.backend_kwargs: key 1 (int) is incompatible with"
            " (str)\n"
            "hint: the field is: Arguments of the library behind the backend, checked against it\n",
            id="a number for an argument",
        ),
        pytest.param(
            ["quantize.backend_kwargs.use_external_data_format=3"],
            "override quantize.backend_kwargs.use_external_data_format=3:"
            " quantize.backend_kwargs.use_external_data_format: '3' is not true or false\n"
            "hint: write true or false\n",
            id="a number for true or false",
        ),
        pytest.param(
            ["quantize.calibration.num_samples=0"],
            "override quantize.calibration.num_samples=0: quantize.calibration.num_samples: 0 is less than 1\n"
            "hint: the field is: Number of images, drawn at random; all of them if there are fewer\n",
            id="no images",
        ),
    ],
)
@every_backend
def test_a_spec_is_refused(file: Path, refused: Refused, backend: str, words: list[str], message: str) -> None:
    assert refused("quantize", f"quantize.backend={backend}", *words) == (2, message.format(backend))
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["quantize.layers.1.weights.dtype=fp8_e4m3fn"],
            "override quantize.layers.1.weights.dtype=fp8_e4m3fn: quantize.layers[1].weights.dtype: backend onnxruntime"
            " has no fp8_e4m3fn weights\n"
            "hint: choose one of int8, native\n",
            id="fp8 weights",
        ),
        pytest.param(
            ["quantize.layers.1.activations.dtype=fp8_e5m2"],
            "override quantize.layers.1.activations.dtype=fp8_e5m2: quantize.layers[1].activations.dtype: backend"
            " onnxruntime has no fp8_e5m2 activations\n"
            "hint: choose one of int8, native\n",
            id="fp8 activations",
        ),
        pytest.param(
            ["quantize.layers=[{module_name: fc, activations: {dtype: int8}}]"],
            "override quantize.layers=[{module_name: fc, activations: {dtype: int8}}]: quantize.layers[0]: rule 'fc' has"
            " activations only, onnxruntime quantizes them with the weights\n"
            "hint: write weights: {dtype: int8} as well\n",
            id="activations only",
        ),
        pytest.param(
            ["quantize.layers.1.weights.dtype=native"],
            "override quantize.layers.1.weights.dtype=native: quantize.layers[1]: rule 'fc' has activations only,"
            " onnxruntime quantizes them with the weights\n"
            "hint: write weights: {dtype: int8} as well\n",
            id="native weights",
        ),
        pytest.param(
            ["quantize.backend_kwargs={reduce_rang: true}"],
            "override quantize.backend_kwargs={reduce_rang: true}: quantize.backend_kwargs.reduce_rang: onnxruntime's"
            " quantize_static has no argument 'reduce_rang'\n"
            "hint: did you mean 'reduce_range'?\n",
            id="a misspelt argument",
        ),
        pytest.param(
            ["quantize.backend_kwargs={nonsense: 1}"],
            "override quantize.backend_kwargs={nonsense: 1}: quantize.backend_kwargs.nonsense: onnxruntime's"
            " quantize_static has no argument 'nonsense'\n"
            "hint: taoq takes reduce_range, use_external_data_format\n",
            id="an unknown argument",
        ),
        pytest.param(
            ["quantize.backend_kwargs={per_channel: true}"],
            "override quantize.backend_kwargs={per_channel: true}: quantize.backend_kwargs.per_channel: 'per_channel' of"
            " onnxruntime's quantize_static is decided by taoq\n"
            "hint: taoq takes reduce_range, use_external_data_format\n",
            id="an argument that is the plan's",
        ),
        pytest.param(
            ["quantize.backend_kwargs={reduce_range: 1}"],
            "override quantize.backend_kwargs={reduce_range: 1}: quantize.backend_kwargs.reduce_range: '1' is not true or"
            " false\n"
            "hint: write true or false\n",
            id="a wrong value",
        ),
    ],
)
def test_a_spec_is_refused_by_onnxruntime(file: Path, refused: Refused, words: list[str], message: str) -> None:
    assert refused("quantize", *words) == (2, message)
    assert not Path("results").exists()


ARGUMENTS = (
    "use_external_data_format, calibrate_per_node, op_types_to_quantize, op_types_to_exclude, high_precision_dtype"
)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("use_external_data: true", "ModelOpt's quantize has no argument 'use_external_data'\nhint: did you mean 'use_external_data_format'?\n"),
        ("nonsense: 1", f"ModelOpt's quantize has no argument 'nonsense'\nhint: taoq takes {ARGUMENTS}\n"),
        ("kwargs: 1", f"ModelOpt's quantize has no argument 'kwargs'\nhint: taoq takes {ARGUMENTS}\n"),
        ("calibrate_per_node: maybe", "'maybe' is not true or false\nhint: write true or false\n"),
        ("op_types_to_quantize: Conv", "'Conv' is not a list of op types\nhint: write a list of op types\n"),
        ("op_types_to_quantize: [Conf]", "taoq quantizes no op type 'Conf'\nhint: did you mean 'Conv'?\n"),
        ("op_types_to_exclude: [3]", "taoq quantizes no op type '3'\nhint: Conv, ConvTranspose, Gemm, MatMul\n"),
        ("high_precision_dtype: bf16", "'bf16' is not fp32 or fp16\nhint: write fp32 or fp16\n"),
        ("high_precision_dtype: [fp16]", "'['fp16']' is not fp32 or fp16\nhint: write fp32 or fp16\n"),
        ("nodes_to_quantize: [a]", "'nodes_to_quantize' of ModelOpt's quantize is decided by taoq\nhint: write rules in quantize.layers\n"),
        ("nodes_to_exclude: [a]", "'nodes_to_exclude' of ModelOpt's quantize is decided by taoq\nhint: write patterns in quantize.skip_names\n"),
        ("quantize_mode: fp8", "'quantize_mode' of ModelOpt's quantize is decided by taoq\nhint: give dtypes in quantize.layers\n"),
        ("calibration_method: max", "'calibration_method' of ModelOpt's quantize is decided by taoq\nhint: set quantize.algorithm\n"),
        ("output_path: x", "'output_path' of ModelOpt's quantize is decided by taoq\nhint: set quantize.results_dir\n"),
        ("onnx_path: x", "'onnx_path' of ModelOpt's quantize is decided by taoq\nhint: set quantize.model_path\n"),
        ("dq_only: true", "'dq_only' of ModelOpt's quantize is decided by taoq\nhint: leave it out: weights are stored quantized, always\n"),
        ("simplify: true", f"'simplify' of ModelOpt's quantize is decided by taoq\nhint: leave it out: taoq takes only {ARGUMENTS}\n"),
    ],
    ids=lambda value: value.partition(":")[0] if ": " in value and "\n" not in value else "",
)  # fmt: skip
def test_an_argument_is_refused_by_modelopt(file: Path, refused: Refused, argument: str, message: str) -> None:
    override = f"quantize.backend_kwargs={{{argument}}}"
    assert refused("quantize", "quantize.backend=modelopt.onnx", override) == (
        2,
        f"override {override}: quantize.backend_kwargs.{argument.partition(':')[0]}: {message}",
    )
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"module_name: Conv": "module_name: Conf"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Conf' matches no layer\nhint: did you mean 'Conv'?\n",
            id="misspelt",
        ),
        pytest.param(
            {"module_name: Conv": "module_name: Conv2d"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Conv2d' matches no layer\n"
            "hint: did you mean 'Conv'?\n",
            id="a type of torch",
        ),
        pytest.param(
            {"module_name: Conv": "module_name: Linear"},
            "spec.yaml:28: quantize.layers[0].module_name: pattern 'Linear' matches no layer\n"
            "hint: the quantizable types of this model are Conv, Gemm\n",
            id="a type of torch with another name",
        ),
        pytest.param(
            {"module_name: fc": "module_name: layer4"},
            "spec.yaml:31: quantize.layers[1].module_name: pattern 'layer4' matches no layer\n"
            "hint: did you mean 'layer4.*'?\n",
            id="a container",
        ),
        pytest.param(
            {"module_name: fc": "module_name: /layer1/0/conv1"},
            "spec.yaml:31: quantize.layers[1].module_name: pattern '/layer1/0/conv1' matches no layer\n"
            "hint: did you mean '/layer1/0/conv1/Conv' or 'layer1.0.conv1' or '/layer4/0/conv1/Conv'?\n",
            id="half of a name",
        ),
        pytest.param(
            {"skip_names: []": "skip_names: [Conv, Gemm]"},
            "spec.yaml:27: quantize.layers: no layer is left to quantize\n"
            "hint: take a pattern out of quantize.skip_names, or give a rule another dtype than native\n",
            id="all skipped",
        ),
        pytest.param(
            {FC: FC.replace("{dtype: int8}\n", "{dtype: int8, quant_axis: 7}\n")},
            "spec.yaml:32: quantize.layers[1].weights.quant_axis: axis 7 is outside of the weight of '/fc/Gemm', shape"
            " [10, 128]\n"
            "hint: the output channels are axis 0\n",
            id="an axis that the weight has not",
        ),
    ],
)
def test_rules_are_refused(file: Path, edit: Edit, refused: Refused, changes: Mapping[str, str], message: str) -> None:
    edit(changes)
    assert refused("quantize", "quantize.backend=modelopt.onnx") == (2, message)
    assert refused("quantize", "quantize.backend=modelopt.onnx", "--dry-run") == (2, message)
    if "axis" not in message:
        assert refused("quantize") == (2, message)


def test_rules_for_nodes_without_weights_are_refused(file: Path, edit: Edit, refused: Refused) -> None:
    edit({"module_name: fc": "module_name: Relu"})
    for backend, types in (
        ("modelopt.onnx", "Conv, ConvTranspose, Gemm, MatMul"),
        ("onnxruntime", "Conv, Gemm, MatMul"),
    ):
        assert refused("quantize", f"quantize.backend={backend}") == (
            2,
            "spec.yaml:31: quantize.layers[1].module_name: pattern 'Relu' matches 17 layer(s), none of which"
            f" {backend} can quantize: it has no weight matrix or kernel\n"
            f"hint: {backend} quantizes {types}\n",
        )


def test_other_scales_of_a_weight_are_refused_by_onnxruntime(file: Path, edit: Edit, refused: Refused) -> None:
    edit({FC: FC.replace("{dtype: int8}\n", "{dtype: int8, quant_axis: 1}\n")})
    assert refused("quantize") == (
        2,
        "spec.yaml:32: quantize.layers[1].weights.quant_axis: axis 1 is not that of the output channels of '/fc/Gemm'"
        " (Gemm)\n"
        "hint: leave it out: this backend has one scale a channel\n",
    )


@pytest.mark.parametrize(
    "types", ["op_types_to_quantize=[Gemm]", "op_types_to_exclude=[Conv]", "op_types_to_quantize=[]"]
)
def test_a_rule_and_an_argument_that_contradict_each_other_are_refused(
    file: Path, refused: Refused, types: str
) -> None:
    code, err = refused("quantize", "quantize.backend=modelopt.onnx", f"quantize.backend_kwargs.{types}")
    assert code == 2
    assert err.startswith(
        "spec.yaml:28: quantize.layers[0].module_name: pattern 'Conv' matches 21 layer(s), none of which modelopt.onnx"
        " can quantize: quantize.backend_kwargs leaves its type out\n"
    )


def test_a_backend_of_torch_takes_no_onnx_file_and_keeps_no_ranges(file: Path, refused: Refused) -> None:
    words = ["quantize.backend=torchao", "quantize.mode=weight_only_ptq"]
    assert refused("quantize", *words) == (
        2,
        "spec.yaml:22: quantize.model_path: float.onnx is an ONNX file, backend torchao quantizes torch checkpoints\n"
        "hint: set quantize.backend to modelopt.onnx (GPUs) or onnxruntime (CPUs)\n",
    )
    assert refused("quantize", *words, *TORCH, "quantize.calibration.cache=ranges.json") == (
        2,
        "override quantize.calibration.cache=ranges.json: quantize.calibration.cache: backend torchao keeps no ranges\n"
        "hint: leave it out: this backend calibrates in every run\n",
    )


def test_a_run_is_refused(artifact: Path, refused: Refused) -> None:
    def override(field: str, message: str) -> tuple[int, str]:
        return 2, f"override {field}: {field.partition('=')[0]}: {message}"

    knows = "\nhint: leave the field out: the file knows\n"
    assert refused("evaluate", "evaluate.device=gpu") == override(
        "evaluate.device=gpu",
        "unknown value 'gpu'\nhint: the field is: Where to run: cuda, cuda:N or cpu; trt (TensorRT) for ONNX files\n",
    )
    field = "evaluate.is_quantized=true"
    assert refused("evaluate", field) == override(field, f"is true, but float.onnx is not quantized{knows}")
    field = "inference.is_quantized=false"
    code, err = refused("inference", field, f"inference.checkpoint={artifact}")
    assert code == 2
    assert err.splitlines()[-2].startswith(f"override {field}: inference.is_quantized: is false, but {artifact}")
    assert err.splitlines()[-1].startswith("hint: leave the field out: ")
    code, message = override("evaluate.num_gpus=2", "num_gpus is 2, gpu_ids is [0]: taoq runs on one device\n")
    assert refused("evaluate", "evaluate.num_gpus=2") == (
        code,
        f"{message}hint: write num_gpus: 1 and one entry in gpu_ids\n",
    )


# Data, and what is written


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        pytest.param(
            lambda: shutil.rmtree("data/calibration"),
            1,
            "spec.yaml:20: dataset.quant_calibration_dataset.images_dir: there is no folder data/calibration\n"
            "hint: name a folder of images\n",
            id="missing",
        ),
        pytest.param(
            lambda: [path.unlink() for path in Path("data/calibration").rglob("*.png")],
            1,
            "spec.yaml:20: dataset.quant_calibration_dataset.images_dir: data/calibration has no images\n"
            "hint: image files end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp\n",
            id="empty",
        ),
        pytest.param(
            lambda: min(Path("data/calibration/6").iterdir()).write_bytes(b"\x89PNG\r\n"),
            1,
            "data/calibration/6/{}: cannot be read as an image: its content is of no image format\n"
            "hint: replace the file, or take it out of the folder\n",
            id="a damaged image",
        ),
    ],
)
@every_backend
def test_calibration_images_are_refused(
    file: Path, refused: Refused, backend: str, make: Callable[[], Any], code: int, message: str
) -> None:
    name = min(Path("data/calibration/6").iterdir()).name
    make()
    found, err = refused("quantize", f"quantize.backend={backend}")
    assert (found, "".join(err.splitlines(keepends=True)[-2:])) == (code, message.format(name))


@every_backend
def test_a_normalisation_that_makes_infinite_images_is_refused(file: Path, refused: Refused, backend: str) -> None:
    change(foreign)
    assert refused("quantize", f"quantize.backend={backend}", "dataset.augmentation.std=[1e-45, 1, 1]") == (
        1,
        f"{IS_FOR[backend]}{ALL_ARE_USED}"
        "spec.yaml:21: quantize.calibration: the calibration images have values that are not finite\n"
        "hint: look at the normalisation of the dataset section\n",
    )


@pytest.mark.parametrize(
    ("make", "path"),
    [
        pytest.param(lambda: Path("ranges.json").write_text("a text"), "ranges.json", id="a text"),
        pytest.param(lambda: Path("ranges.json").write_text(""), "ranges.json", id="empty"),
        pytest.param(lambda: Path("ranges.json").write_bytes(b"\xff\x00"), "ranges.json", id="binary"),
        pytest.param(lambda: Path("ranges.json").write_text("[]"), "ranges.json", id="a list"),
        pytest.param(
            lambda: Path("ranges.json").write_text('{"key": {}, "ranges": {"a": 3}}'), "ranges.json", id="other data"
        ),
        pytest.param(lambda: None, "float.onnx", id="the model"),
    ],
)
@every_backend
def test_a_file_that_is_no_cache_is_refused(
    file: Path, refused: Refused, backend: str, make: Callable[[], None], path: str
) -> None:
    make()
    override = f"quantize.calibration.cache={path}"
    assert refused("quantize", f"quantize.backend={backend}", override) == (
        1,
        f"{IS_FOR[backend]}{ALL_ARE_USED}"
        f"override {override}: quantize.calibration.cache: {path} is not a file of calibration ranges\n"
        "hint: delete it, or name another file\n",
    )


@pytest.mark.parametrize("path", ["data", "/proc/ranges.json"], ids=["a folder", "where nothing can be written"])
def test_a_cache_that_cannot_be_written_is_refused(file: Path, refused: Refused, path: str) -> None:
    code, err = refused("quantize", f"quantize.calibration.cache={path}")
    assert code == (2 if path == "data" else 1)
    where, hint = err.removeprefix(IS_FOR["onnxruntime"] + ALL_ARE_USED).splitlines()
    assert where.startswith(f"override quantize.calibration.cache={path}: quantize.calibration.cache: {path} ")
    assert hint.startswith("hint: ")


@every_backend
def test_an_artifact_does_not_replace_its_source(file: Path, refused: Refused, backend: str) -> None:
    Path("models").mkdir()
    file.replace("models/quantized_model.onnx")
    words = ["quantize.model_path=models/quantized_model.onnx", "quantize.results_dir=data/../models"]
    assert refused("quantize", f"quantize.backend={backend}", *words) == (
        2,
        "override quantize.results_dir=data/../models: quantize.results_dir: the artifact would replace"
        " models/quantized_model.onnx\n"
        "hint: name another folder\n",
    )


def test_a_folder_that_cannot_be_written_is_refused(file: Path, refused: Refused) -> None:
    for place, why in (("weights.safetensors", "Not a directory"), ("/proc", "No such file or directory")):
        assert refused("quantize", f"results_dir={place}/new") == (
            1,
            f"{place}/new/quantize: cannot be a results folder: {why}\n"
            "hint: choose another folder with results_dir=...\n",
        )
    Path("results/quantize/quantized_model.onnx").mkdir(parents=True)
    assert refused("quantize") == (
        1,
        f"{IS_FOR['onnxruntime']}{ALL_ARE_USED}"
        "results/quantize/quantized_model.onnx: a folder is in the place of this file\n"
        "hint: move it away, or name another folder\n",
    )


def test_an_earlier_artifact_stays_when_a_later_run_is_refused(artifact: Path, taoq: Taoq, refused: Refused) -> None:
    manifest = read_artifact(artifact).manifest
    good = Path("float.onnx").read_bytes()
    for backend in BACKENDS:
        words = [f"quantize.backend={backend}"]
        assert refused("quantize", *words, "quantize.layers.0.module_name=Conf")[0] == 2
        assert refused("quantize", *words, "dataset.num_classes=12")[0] == 2
        cut(-1)
        assert refused("quantize", *words)[0] == 1
        Path("float.onnx").write_bytes(good)
        change(foreign, with_classes(12))
        assert refused("quantize", *words)[0] == 1  # seen when the new artifact is run, at the latest
        Path("float.onnx").write_bytes(good)
    assert read_artifact(artifact).manifest == manifest
    assert taoq("classification_pyt", "evaluate", "-e", "spec.yaml", f"evaluate.checkpoint={artifact}")[0] == 0


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:1000]),
            1,
            "results/quantize/quantized_model.onnx: is not the file that its manifest names (sha256 differs)\n"
            "hint: the file was changed or cut off after it was written: quantize again\n",
            id="cut off",
        ),
        pytest.param(
            lambda path: path.unlink(),
            1,
            "results/quantize/quantized_model.onnx: the payload of this artifact is missing\nhint: quantize again\n",
            id="missing",
        ),
        pytest.param(
            lambda path: path.with_name(MANIFEST).unlink(),
            1,
            "results/quantize: is a folder without a manifest.json: no artifact, or not all of it\n"
            "hint: quantize again, or give a checkpoint file\n",
            id="without a manifest",
        ),
    ],
)
def test_a_damaged_artifact_is_refused(
    artifact: Path, refused: Refused, make: Callable[[Path], Any], code: int, message: str
) -> None:
    make(artifact / "quantized_model.onnx")
    assert refused("evaluate", f"evaluate.checkpoint={artifact}") == (code, message)
    assert refused("inference", f"inference.checkpoint={artifact}") == (code, message)


# Export


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param(
            ["export.checkpoint=no.pth"],
            1,
            "override export.checkpoint=no.pth: export.checkpoint: there is no no.pth\n"
            "hint: name a checkpoint or an artifact\n",
            id="no such checkpoint",
        ),
        pytest.param(
            ["export.checkpoint=''"],
            2,
            "override export.checkpoint='': export.checkpoint: missing\nhint: name a checkpoint or an artifact\n",
            id="no checkpoint",
        ),
        pytest.param(
            ["export.checkpoint=float.onnx"],
            2,
            "override export.checkpoint=float.onnx: export.checkpoint: float.onnx is an ONNX file already\n"
            "hint: name the checkpoint it was made from\n",
            id="an ONNX file",
        ),
        pytest.param(
            ["export.checkpoint=data"],
            1,
            "data: is a folder, not a checkpoint\nhint: give a .pth, .ckpt or .safetensors file\n",
            id="a folder",
        ),
        pytest.param(
            ["export.checkpoint=spec.yaml"],
            1,
            "spec.yaml: is cut off, or is not a checkpoint of torch\nhint: copy the file again, or give another one\n",
            id="a text",
        ),
        pytest.param(
            ["export.onnx_file=out"],
            2,
            "override export.onnx_file=out: export.onnx_file: out does not end in .onnx\nhint: write out.onnx\n",
            id="no .onnx",
        ),
        pytest.param(
            ["export.onnx_file=weights.safetensors/out.onnx"],
            1,
            "weights.safetensors: cannot be written: Not a directory\nhint: free some space, or name another folder\n",
            id="below a file",
        ),
        pytest.param(
            ["export.onnx_file=foreign.onnx"],
            1,
            "override export.onnx_file=foreign.onnx: export.onnx_file: foreign.onnx is there already, made from"
            " something else\n"
            "hint: name another file, or set export.overwrite: true\n",
            id="over the file of someone else",
        ),
        pytest.param(
            ["export.checkpoint=other.safetensors", "export.onnx_file=float.onnx"],
            1,
            "override export.onnx_file=float.onnx: export.onnx_file: float.onnx is there already, made from {checkpoint}\n"
            "hint: name another file, or set export.overwrite: true\n",
            id="over the file of another checkpoint",
        ),
        pytest.param(
            ["export.opset_version=0"],
            2,
            "override export.opset_version=0: export.opset_version: 0 is less than 1\n"
            "hint: the field is: Version of the ONNX operator set\n",
            id="opset 0",
        ),
        pytest.param(
            ["export.batch_size=0"],
            2,
            "override export.batch_size=0: export.batch_size: 0 images are no batch\n"
            "hint: write -1 for any number of images\n",
            id="an empty batch",
        ),
        pytest.param(
            ["export.batch_size=-2"],
            2,
            "override export.batch_size=-2: export.batch_size: -2 is less than -1\n"
            "hint: the field is: Images per batch; -1 is a dynamic batch\n",
            id="a negative batch",
        ),
        pytest.param(
            ["export.input_channel=1"],
            2,
            "override export.input_channel=1: export.input_channel: the input has 1 channels, every network here has 3\n"
            "hint: leave it out\n",
            id="one channel",
        ),
        pytest.param(
            ["export.input_height=33"],
            2,
            "override export.input_height=33: export.input_height: the input is 33 x 32 (height x width),"
            " classification_pyt has square inputs\n"
            "hint: write the same input_height and input_width\n",
            id="not square",
        ),
        pytest.param(
            ["export.tolerance=small"],
            2,
            "override export.tolerance=small: export.tolerance: value 'small' of type 'str' could not be converted to"
            " Float\n"
            "hint: the field is: Largest difference between both that is accepted, as a part of the largest output\n",
            id="a text for a number",
        ),
        pytest.param(
            ["export.check_images=0"],
            2,
            "override export.check_images=0: export.check_images: 0 is less than 1\n"
            "hint: the field is: Images on which the file must agree with the torch model\n",
            id="no images",
        ),
        pytest.param(
            ["export.format=xdl"],
            2,
            "override export.format=xdl: export.format: unknown value 'xdl'\nhint: one of onnx\n",
            id="another format",
        ),
        pytest.param(
            ["export.is_quantized=true"],
            2,
            "override export.is_quantized=true: export.is_quantized: is true, but weights.safetensors is no artifact\n"
            "hint: leave the field out: the artifact knows\n",
            id="not quantized",
        ),
        pytest.param(
            ["dataset.num_classes=12"],
            1,
            "weights.safetensors: does not fit the network: tensors 2 of another shape (fc.weight [10, 128] for"
            " [12, 128], fc.bias [10] for [12])\n"
            "hint: check model.backbone.type, model.backbone.args and dataset.num_classes\n",
            id="other classes",
        ),
    ],
)
def test_an_export_is_refused(file: Path, refused: Refused, words: list[str], code: int, message: str) -> None:
    shutil.copy("float.onnx", "foreign.onnx")
    model = onnx.load("foreign.onnx")
    foreign(model)
    Path("foreign.onnx").write_bytes(model.SerializeToString())
    save_file({name: tensor + 1 for name, tensor in load_file("weights.safetensors").items()}, "other.safetensors")
    checkpoint = read_properties(onnx.load("float.onnx"), Path("it"))["source"]["path"]
    assert refused("export", "export.on_cpu=true", "export.checkpoint=weights.safetensors", *words) == (
        code,
        message.format(checkpoint=checkpoint),
    )


def test_an_artifact_of_a_graph_is_not_exported(artifact: Path, refused: Refused) -> None:
    assert refused("export", "export.on_cpu=true", f"export.checkpoint={artifact}") == (
        2,
        f"{artifact}: quantized by onnxruntime, 22 layers\n"
        f"override export.checkpoint={artifact}: export.checkpoint: {artifact} is an artifact of onnxruntime: its payload"
        " is an ONNX file\n"
        f"hint: take {artifact}/quantized_model.onnx as it is\n",
    )
    words = ["export.checkpoint=weights.safetensors", f"export.onnx_file={artifact}/quantized_model.onnx"]
    assert refused("export", *words, "export.overwrite=true") == (
        2,
        f"override {words[1]}: export.onnx_file: {artifact}/quantized_model.onnx is the payload of an artifact\n"
        "hint: name another file\n",
    )


@pytest.mark.parametrize(
    ("version", "operator"), [(11, "scaled_dot_product_attention"), (15, "grid_sampler")], ids=["11", "15"]
)
def test_an_opset_without_the_operators_of_a_detector_is_refused(
    work: Path, taoq: Taoq, version: int, operator: str
) -> None:
    scenes = EXAMPLES / "digit_scenes"
    words = [f"export.checkpoint={scenes / 'checkpoints' / 'rtdetr_small'}", f"export.opset_version={version}"]
    words += ["export.on_cpu=true", "results_dir=results"]
    code, _, err = taoq("rtdetr", "export", "-e", str(scenes / "rtdetr.yaml"), *words)
    what, hint = err.splitlines()[-2:]
    assert code == 2
    assert what.startswith(
        f"override export.opset_version={version}: export.opset_version: the network cannot be written with opset"
        f" {version}: Exporting the operator 'aten::{operator}' to ONNX opset version {version} is not supported."
    )
    assert hint == "hint: write 17, which every network here takes"
    assert {path.name for path in Path("results").rglob("*") if path.is_file()} == {"log.txt", "status.json"}


# Interruption


def test_an_interrupted_run_leaves_the_earlier_artifact_whole(artifact: Path) -> None:
    manifest = read_artifact(artifact).manifest
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    pipe = min(Path("data/calibration/6").iterdir())
    pipe.unlink()
    os.mkfifo(pipe)  # an image that whoever reads it waits for
    words = ["-e", "spec.yaml", "quantize.backend=modelopt.onnx", "quantize.calibration.cache=ranges.json"]
    with subprocess.Popen(
        [sys.executable, "-m", "taoq", "classification_pyt", "quantize", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(Path("temporary").resolve())},
    ) as run:
        try:
            writer = wait_for_reader(pipe, run)
            run.send_signal(signal.SIGTERM)
            _, err = run.communicate(timeout=60)
            os.close(writer)
        finally:
            run.kill()  # a run that does not end would keep a failed test waiting
    assert (run.returncode, err) == (143, IS_FOR["modelopt.onnx"] + ALL_ARE_USED)
    pipe.unlink()
    status = artifact / "status.json"
    last = json.loads(status.read_text().splitlines()[-1])
    assert (last["status"], last["message"]) == ("FAILURE", "Quantize failed: interrupted")
    for path in (pipe, status, artifact / "log.txt"):
        before.pop(path)
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for path in (status, artifact / "log.txt"):
        after.pop(path)
    assert after == before
    assert not list(Path("temporary").iterdir())
    assert read_artifact(artifact).manifest == manifest
