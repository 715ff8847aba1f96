from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from taoq.quantization.backends import BACKENDS, load_backend
from taoq.quantization.spec import ALGORITHMS, DTYPES, MODES, NATIVE, QuantizeSpec
from taoq.spec.load import load_spec
from taoq.spec.schema import Row, rows
from taoq.spec.source import read_spec
from taoq.tasks import load_task

DOCS = Path(__file__).parent.parent / "docs"


def generated() -> list[tuple[Path, str]]:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.pages())


def test_generated_pages_are_not_stale() -> None:
    pages = generated()
    assert len(pages) == 4
    for path, text in pages:
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run make docs"


def test_the_schema_reference_has_tao_s_columns() -> None:
    found = {row.field: row for row in rows(QuantizeSpec)}
    assert found["mode"] == Row(
        "mode", "categorical", "The quantization mode to use", "weight_only_ptq", "weight_only_ptq,static_ptq"
    )
    assert found["layers[].weights.dtype"].valid_options == "int8,fp8_e4m3fn,fp8_e5m2,native"
    assert found["layers[].module_name"].default_value == "required"
    assert found["skip_names"].value_type == "list"


def test_every_field_has_a_description() -> None:
    for row in rows(load_task("classification_pyt").spec):
        assert row.description, row.field


def test_the_default_spec_is_valid_and_is_the_defaults(
    taoq: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = taoq("classification_pyt", "default_specs", f"results_dir={tmp_path}")
    path = tmp_path / "experiment.yaml"
    assert (code, out, err) == (0, f"{path}\n", "")
    task = load_task("classification_pyt")
    spec = load_spec(read_spec(str(path), []), task.spec, unused=task.unused)
    assert spec.dataset == task.spec().dataset
    assert spec.quantize.layers[0].module_name == "Linear"
    assert path.read_text().count("#") > 50


def test_default_specs_prints_without_a_folder(taoq: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = taoq("classification_pyt", "default_specs")
    assert (code, err) == (0, "")
    assert out.startswith("# Folder of all results")


def test_default_specs_replaces_no_file(taoq: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("mine")
    code, out, err = taoq("classification_pyt", "default_specs", f"results_dir={tmp_path}")
    assert (code, out) == (1, "")
    assert (
        err == f"{tmp_path}/experiment.yaml: is there already\nhint: name another results_dir, or move the file away\n"
    )
    assert (tmp_path / "experiment.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_speaks_the_vocabulary_of_the_spec(name: str) -> None:
    backend = load_backend(name)
    support = backend.support
    assert backend.name == name
    assert set(support.modes) <= set(MODES)
    assert set(support.algorithms) <= set(ALGORITHMS)
    assert {*support.weights, *support.activations, *support.realised} <= set(DTYPES) - {NATIVE}
