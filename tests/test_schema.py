"""What is made from the dataclasses: schema pages, the commented default spec, and the vocabulary of backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import Taoq
from support.scripts import load_script
from taoq.plugins import BACKENDS, TASKS
from taoq.quantization.backends import load_backend
from taoq.quantization.dtypes import IN_RULES
from taoq.quantization.spec import ALGORITHMS, MODES, QuantizeSpec
from taoq.spec.load import load_spec
from taoq.spec.schema import Row, rows
from taoq.spec.source import read_spec
from taoq.tasks import load_task

DOCS = Path(__file__).parent.parent / "docs"


def test_generated_pages_are_not_stale() -> None:
    pages = list(load_script(DOCS / "generate.py").pages())
    assert len(pages) == 5
    for path, text in pages:
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run make docs"


def test_the_schema_reference_has_tao_s_columns() -> None:
    by_field = {row.field: row for row in rows(QuantizeSpec)}
    assert by_field["mode"] == Row(
        "mode", "categorical", "The quantization mode to use", "weight_only_ptq", "weight_only_ptq,static_ptq"
    )
    assert by_field["layers[].weights.dtype"].valid_options == "int8,fp8_e4m3fn,fp8_e5m2,native"
    assert by_field["layers[].module_name"].default_value == "required"
    assert by_field["skip_names"].value_type == "list"


@pytest.mark.parametrize("name", TASKS.names())
def test_every_field_has_a_description(name: str) -> None:
    assert [row.field for row in rows(load_task(name).spec) if not row.description] == []


def test_the_default_spec_is_valid_and_is_the_defaults(taoq: Taoq, tmp_path: Path) -> None:
    code, out, err = taoq("classification_pyt", "default_specs", f"results_dir={tmp_path}")
    path = tmp_path / "experiment.yaml"
    assert (code, out, err) == (0, f"{path}\n", "")
    task = load_task("classification_pyt")
    spec = load_spec(read_spec(str(path), []), task.spec, unused=task.unused)
    assert spec.dataset == task.spec().dataset
    assert spec.quantize.layers[0].module_name == "Linear"
    assert path.read_text().count("#") > 50


def test_default_specs_prints_without_a_folder(taoq: Taoq) -> None:
    code, out, err = taoq("classification_pyt", "default_specs")
    assert (code, err) == (0, "")
    assert out.startswith("# Folder of all results")


def test_default_specs_replaces_no_file(taoq: Taoq, tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("mine")
    code, out, err = taoq("classification_pyt", "default_specs", f"results_dir={tmp_path}")
    assert (code, out) == (1, "")
    assert (
        err == f"{tmp_path}/experiment.yaml: is there already\nhint: name another results_dir, or move the file away\n"
    )
    assert (tmp_path / "experiment.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", BACKENDS.names())
def test_a_backend_speaks_the_vocabulary_of_the_spec(name: str) -> None:
    capability = load_backend(name).capability
    assert capability.name == name
    assert set(capability.modes) <= set(MODES)
    assert {algorithm.name for algorithm in capability.algorithms} <= set(ALGORITHMS)
    activations = capability.activations.dtypes if capability.activations else ()
    assert {str(dtype) for dtype in (*capability.weights.dtypes, *activations, *capability.realised)} <= set(IN_RULES)
