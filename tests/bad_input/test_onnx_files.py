"""A damaged ONNX file, or one without its weights, is refused."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from support.commands import Taoq
from support.damage import GIT_LFS, Damage, cut
from support.onnx_files import EXPORT_AGAIN, change_file, remove_properties
from support.small_spec import CALIBRATION_NOTICES, Quantize, Refused, RefusedByAll, every_onnx_backend
from taoq.errors import TaoqError
from taoq.quantization.formats.onnx.file import read_graph

NO_FILE = "there is no such file\nhint: export one first, or correct the path\n"
NO_ONNX = f"is not an ONNX file, or was cut off\n{EXPORT_AGAIN}"
NO_GRAPH = f"is not an ONNX file: it has no graph\n{EXPORT_AGAIN}"


def keep_part(part: float) -> None:
    """Cut float.onnx off."""
    cut("float.onnx", int(Path("float.onnx").stat().st_size * part))


@every_onnx_backend
def test_the_unchanged_file_quantizes(taoq: Taoq, quantize: Quantize, onnx_file: Path, backend: str) -> None:
    assert quantize(f"quantize.backend={backend}") == (0, CALIBRATION_NOTICES[backend])
    assert not list(Path("temporary").iterdir())
    assert taoq("classification_pyt", "evaluate", "-e", "spec.yaml")[0] == 0


@pytest.mark.parametrize(
    ("damage", "message"),
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
        pytest.param(lambda: keep_part(0.01), NO_ONNX, id="cut off in the nodes"),
        pytest.param(lambda: keep_part(0.5), NO_ONNX, id="cut off in the weights"),
        pytest.param(lambda: keep_part(0.99), NO_ONNX, id="cut off near the end"),
        pytest.param(lambda: cut("float.onnx", -1), NO_ONNX, id="cut off by a byte"),
        pytest.param(
            lambda: change_file(lambda model: model.graph.ClearField("node"), remove_properties),
            NO_GRAPH,
            id="without nodes",
        ),
        pytest.param(
            lambda: change_file(lambda model: model.ClearField("opset_import")),
            f"is not a valid ONNX file: model with IR version >= 3 must specify opset_import for ONNX\n{EXPORT_AGAIN}",
            id="cut off behind the graph",
        ),
        pytest.param(
            lambda: change_file(lambda model: model.ClearField("ir_version")),
            f"is not a valid ONNX file: The model does not have an ir_version set properly.\n{EXPORT_AGAIN}",
            id="without a version",
        ),
    ],
)
def test_a_file_that_is_no_whole_onnx_file_is_refused(
    refused_by_all: RefusedByAll, damage: Damage, message: str
) -> None:
    damage()
    assert refused_by_all() == (1, f"float.onnx: {message}")


def test_every_action_and_backend_refuses_a_damaged_file(refused_by_all: RefusedByAll, refused: Refused) -> None:
    cut("float.onnx", -1)
    message = f"float.onnx: {NO_ONNX}"
    assert refused_by_all(actions=("quantize", "evaluate", "inference")) == (1, message)
    assert refused("quantize", "quantize.backend=modelopt.onnx") == (1, message)
    assert refused("quantize", "quantize.backend=modelopt.onnx", "--dry-run") == (1, message)


def move_weights_beside() -> None:
    """Move the weights into a file beside float.onnx."""
    onnx.save(
        onnx.load("float.onnx"),
        "float.onnx",
        save_as_external_data=True,
        location="float.onnx_data",
        size_threshold=1024,
    )


def set_external_data(key: str, value: str) -> None:
    """Change where the weights beside float.onnx are."""
    model = onnx.load("float.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    Path("float.onnx").write_bytes(model.SerializeToString())


def move_weights_to(location: str) -> None:
    """Name another place for the weights, which are whole in the file `secret`."""
    Path("float.onnx_data").replace("secret")
    set_external_data("location", location)


@pytest.mark.parametrize(
    ("damage", "reason", "file"),
    [
        pytest.param(
            lambda: Path("float.onnx_data").unlink(),
            "Data of TensorProto ( tensor name: /conv1/Conv_input_1) should be stored in ./float.onnx_data",
            "float.onnx_data",
            id="missing",
        ),
        pytest.param(
            lambda: cut("float.onnx_data", -1),
            "External data length (5120) exceeds available data (5119 bytes from",
            "float.onnx_data",
            id="cut off by a byte",
        ),
        pytest.param(
            lambda: cut("float.onnx_data", 0),
            "External data length (37632) exceeds available data (0 bytes from",
            "float.onnx_data",
            id="empty",
        ),
        pytest.param(lambda: set_external_data("offset", "-5"), "", "float.onnx_data", id="at -5"),
        pytest.param(lambda: set_external_data("offset", "abc"), "", "float.onnx_data", id="at abc"),
        pytest.param(lambda: set_external_data("offset", str(10**15)), "", "float.onnx_data", id="far out"),
        # the files of other users must not be read, nor their content shown
        pytest.param(lambda: move_weights_to("secret/../../secret"), "", "secret", id="out of it"),
        pytest.param(lambda: move_weights_to("../secret"), "", "secret", id="in the folder above"),
        pytest.param(lambda: move_weights_to(str(Path("secret").resolve())), "", "secret", id="/"),
        pytest.param(
            lambda: (move_weights_to("float.onnx_data"), Path("float.onnx_data").symlink_to("secret")),
            "",
            "float.onnx_data",
            id="a link",
        ),
    ],
)
def test_damaged_weights_beside_a_file_are_refused(
    refused_by_all: RefusedByAll, damage: Damage, reason: str, file: str
) -> None:
    """The reason goes on in the words of the onnx library."""
    move_weights_beside()
    damage()
    code, err = refused_by_all()
    fault, hint = err.splitlines()
    assert code == 1
    assert fault.startswith(f"float.onnx: its weights beside it cannot be read: {reason}")
    assert hint == f"hint: copy {file} beside it"


def test_any_damage_of_a_file_is_named_as_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    good = small_classifier().SerializeToString()
    random = Random(0)
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(TaoqError) as error:
            read_graph(path)
        assert str(error.value).startswith(f"{path}: is no")
        assert len(str(error.value).splitlines()) == 2
    for _ in range(1500):
        bad = bytearray(good)
        for _ in range(random.choice((1, 1, 2, 4))):
            bad[random.randrange(len(bad))] = random.randrange(256)
        path.write_bytes(bad)
        with suppress(TaoqError):  # a changed number or name is no fault
            read_graph(path)


def small_classifier() -> onnx.ModelProto:
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
