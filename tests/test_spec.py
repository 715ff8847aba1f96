"""Loading a spec: defaults, interpolation, overrides, and every fault at once with its line."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from taoq.errors import SpecError
from taoq.quantization.spec import LayerSpec, QuantizeSpec, TensorSpec
from taoq.spec.fields import REQUIRED, option
from taoq.spec.load import load_spec, spec_from_dict, spec_to_dict
from taoq.spec.source import read_spec


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    source: str = option(REQUIRED, "Where from")


@dataclass(frozen=True, kw_only=True)
class RootSpec:
    results_dir: str = option("out", "Results")
    size: int = option(3, "A size", minimum=1)
    rate: float = option(0.5, "A rate")
    flag: bool | None = option(None, "A flag")
    job: JobSpec | None = option(None, "The job")
    quantize: QuantizeSpec = option(QuantizeSpec, "Quantization")
    added: str = option("", "A field that older versions do not have", omit_default=True)


UNUSED = {"train": "another job", "quantize.layers[[]*].*.observer*": "not read"}


def load(tmp_path: Path, text: str, *overrides: str, not_needed: tuple[str, ...] = ()) -> RootSpec:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return load_spec(read_spec(str(path), overrides), RootSpec, unused=UNUSED, not_needed=not_needed)


def faults(tmp_path: Path, text: str, *overrides: str, not_needed: tuple[str, ...] = ()) -> list[str]:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    source = read_spec(str(path), overrides)
    with pytest.raises(SpecError) as error:
        load_spec(source, RootSpec, unused=UNUSED, not_needed=not_needed)
    return [
        f"{source.locate(fault.where, RootSpec).replace(str(tmp_path), '.')}: {fault.what} | {fault.hint}"
        for fault in error.value.faults
    ]


def test_an_empty_spec_is_the_defaults(tmp_path: Path) -> None:
    spec = load(tmp_path, "")
    assert (spec.results_dir, spec.size, spec.quantize.backend) == ("out", 3, "torchao")


def test_values_are_converted_to_the_type_of_their_field(tmp_path: Path) -> None:
    spec = load(tmp_path, "size: '12'\nrate: 2\nflag: true\nresults_dir: 7\n")
    assert (spec.size, spec.rate, spec.flag, spec.results_dir) == (12, 2.0, True, "7")


def test_interpolation_reaches_defaults_and_other_sections(tmp_path: Path) -> None:
    spec = load(tmp_path, "quantize: {results_dir: '${results_dir}/q', model_path: '${quantize.backend}.pth'}\n")
    assert spec.quantize.results_dir == "out/q"
    assert spec.quantize.model_path == "torchao.pth"


def test_interpolation_reaches_sections_that_are_not_used(tmp_path: Path) -> None:
    spec = load(tmp_path, "train: {dir: runs/1}\nresults_dir: '${train.dir}'\n")
    assert spec.results_dir == "runs/1"


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    text = "quantize:\n  layers:\n    - {module_name: Linear, weights: {dtype: int8}}\n"
    spec = load(tmp_path, text, "quantize.layers.0.weights.dtype=float8_e5m2", "quantize.skip_names=[fc, 'a.*']")
    assert spec.quantize.layers[0].weights is not None
    assert spec.quantize.layers[0].weights.dtype == "fp8_e5m2"
    assert spec.quantize.skip_names == ["fc", "a.*"]


def test_a_later_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "size: 1\n", "size=2", "size=4").size == 4


def test_float8_is_an_alias_of_fp8(tmp_path: Path) -> None:
    spec = load(tmp_path, "quantize: {layers: [{module_name: A, weights: {dtype: float8_e4m3fn}}]}\n")
    assert spec.quantize.layers[0].weights is not None
    assert spec.quantize.layers[0].weights.dtype == "fp8_e4m3fn"


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("backend: modelopt", "backend", "modelopt.pytorch"),
        ("mode: STATIC_PTQ", "mode", "static_ptq"),
        ("algorithm: MAX", "algorithm", "max"),
        ("default_layer_dtype: NATIVE", "default_layer_dtype", "native"),
    ],
)
def test_a_spelling_of_tao_is_an_alias(tmp_path: Path, text: str, field: str, value: str) -> None:
    assert getattr(load(tmp_path, f"quantize: {{{text}}}\n").quantize, field) == value


def test_a_tensor_of_a_rule_may_be_a_list_of_one(tmp_path: Path) -> None:
    rule = "{module_name: A, weights: [{dtype: INT8, quant_axis: 0, observer_x: ''}], activations: []}"
    spec = load(tmp_path, f"quantize: {{layers: [{rule}]}}\n")
    assert spec.quantize.layers == [LayerSpec(module_name="A", weights=TensorSpec(dtype="int8", quant_axis=0))]


def test_a_list_of_two_is_no_section(tmp_path: Path) -> None:
    text = "quantize:\n  layers:\n    - module_name: A\n      weights: [{dtype: int8}, {dtype: int8}]\n"
    assert faults(tmp_path, text) == [
        "./spec.yaml:4: quantize.layers[0].weights: lists 2 sections, only one is read"
        " | the field is: How to quantize the weights; without it they stay float"
    ]


def test_one_log_line_names_what_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "train: {epochs: '???'}\nquantize: {layers: [{module_name: A, weights: {dtype: int8, observer_x: ''}}]}\n"
    with caplog.at_level(logging.INFO, "taoq"):
        load(tmp_path, text)
    assert caplog.messages == [
        "not used by taoq: quantize.layers[0].weights.observer_x (not read), train (another job)"
    ]


def test_a_missing_value_is_named_where_it_is_needed(tmp_path: Path) -> None:
    text = "job:\n  source: ???\nquantize:\n  layers:\n    - weights: {dtype: int8}\n    - {module_name: A}\n"
    assert faults(tmp_path, text) == [
        "./spec.yaml:2: job.source: missing: this field needs a value | write it in the spec, or give job.source=...",
        "./spec.yaml:5: quantize.layers[0].module_name: missing: this field needs a value"
        " | write it in the spec, or give quantize.layers[0].module_name=...",
    ]


def test_a_missing_value_is_not_filled_by_a_default(tmp_path: Path) -> None:
    assert faults(tmp_path, "quantize:\n  model_path: ???\n") == [
        "./spec.yaml:2: quantize.model_path: missing: this field needs a value"
        " | write it in the spec, or give quantize.model_path=..."
    ]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("size:\nquantize:\njob: null\n", id="a field, a section, an optional section"),
        pytest.param("quantize: {layers: null, skip_names: ~, backend_kwargs: null}\n", id="lists and arguments"),
        pytest.param("quantize: {calibration: {num_samples: null}, device: null}\n", id="in a section of a section"),
        pytest.param("size: ${flag}\nquantize: ${job}\n", id="an interpolation of null"),
    ],
)
def test_null_is_the_default(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == RootSpec()


def test_null_in_a_rule_is_the_default(tmp_path: Path) -> None:
    rule = "{module_name: A, weights: {dtype: int8, quant_axis: null}, activations: null}"
    spec = load(tmp_path, f"quantize: {{layers: [{rule}]}}\n")
    assert spec.quantize.layers == [LayerSpec(module_name="A", weights=TensorSpec(dtype="int8"))]


def test_null_is_kept_where_any_value_may_be(tmp_path: Path) -> None:
    assert load(tmp_path, "quantize: {backend_kwargs: {a: null}}\n").quantize.backend_kwargs == {"a": None}


def test_an_interpolation_of_null_is_that_of_the_default(tmp_path: Path) -> None:
    spec = load(tmp_path, "results_dir: null\nquantize: {model_path: '${results_dir}/a.pth'}\n")
    assert spec.quantize.model_path == "out/a.pth"


def test_null_for_a_required_field_is_missing(tmp_path: Path) -> None:
    text = "job: {source: null}\nquantize:\n  layers:\n    - {module_name: null, weights: {dtype: null}}\n"
    assert faults(tmp_path, text) == [
        "./spec.yaml:1: job.source: missing: this field needs a value | write it in the spec, or give job.source=...",
        "./spec.yaml:4: quantize.layers[0].weights.dtype: missing: this field needs a value"
        " | write it in the spec, or give quantize.layers[0].weights.dtype=...",
        "./spec.yaml:4: quantize.layers[0].module_name: missing: this field needs a value"
        " | write it in the spec, or give quantize.layers[0].module_name=...",
    ]


def test_null_hides_no_misspelt_field(tmp_path: Path) -> None:
    assert faults(tmp_path, "sise: null\n") == ["./spec.yaml:1: sise: unknown field in the spec | did you mean 'size'?"]


def test_a_missing_value_in_the_section_of_another_action_is_no_fault(tmp_path: Path) -> None:
    text = "quantize: {model_path: '???', backend: modelopt.pytorch}\njob: {source: a}\n"
    spec = load(tmp_path, text, not_needed=("quantize",))
    assert spec.quantize == QuantizeSpec(backend="modelopt.pytorch")


@pytest.mark.parametrize("value", ["layers: [{module_name: '???'}]", "accuracy: {max_drop: '???'}"])
def test_a_section_of_another_action_that_lacks_a_required_value_is_the_default(tmp_path: Path, value: str) -> None:
    spec = load(tmp_path, f"quantize: {{backend: modelopt.pytorch, {value}}}\n", not_needed=("quantize",))
    assert spec.quantize == QuantizeSpec()


def test_a_results_dir_that_is_not_given_is_where_its_action_writes(tmp_path: Path) -> None:
    spec = load(tmp_path, "quantize: {model_path: '${quantize.results_dir}/a.pth', results_dir: null}\n")
    assert spec.quantize.model_path == "out/quantize/a.pth"
    assert spec.quantize.results_dir == ""


def test_all_faults_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
sise: 3
size: many
quantize:
  bakend: torchao
  mode: weight_only
  device: gpu
  calibration:
    num_samples: 0
  layers:
    - module_name: Linear
      weights:
        dtype: int7
        axis: 0
    - Linear
flag: maybe
job: {source: '${nothing.here}'}
"""
    assert faults(tmp_path, text, "rate=fast") == [
        "./spec.yaml:16: job.source: interpolation key 'nothing.here' not found"
        " | give it a value, or write the path of an existing field as ${section.field}",
        "./spec.yaml:2: size: value 'many' of type 'str' could not be converted to Integer | the field is: A size",
        "override rate=fast: rate: value 'fast' of type 'str' could not be converted to Float | the field is: A rate",
        "./spec.yaml:15: flag: value 'maybe' is not a valid bool (type str) | the field is: A flag",
        "./spec.yaml:5: quantize.mode: unknown value 'weight_only' | did you mean 'weight_only_ptq'?",
        "./spec.yaml:12: quantize.layers[0].weights.dtype: unknown value 'int7' | did you mean 'int8'?",
        "./spec.yaml:13: quantize.layers[0].weights.axis: unknown field in section 'quantize.layers[0].weights'"
        " | did you mean 'quant_axis'?",
        "./spec.yaml:14: quantize.layers[1]: is the value 'Linear', not a section"
        " | write `field: value` lines below it",
        "./spec.yaml:6: quantize.device: unknown value 'gpu'"
        " | the field is: Device to quantize on: cuda, cuda:N or cpu; trt (TensorRT) with modelopt.onnx only",
        "./spec.yaml:8: quantize.calibration.num_samples: 0 is less than 1"
        " | the field is: Number of images, sampled at random; all images if there are fewer",
        "./spec.yaml:4: quantize.bakend: unknown field in section 'quantize'"
        " | did you mean 'backend' or 'backend_kwargs'?",
        "./spec.yaml:1: sise: unknown field in the spec | did you mean 'size'?",
    ]


def test_no_code_runs_from_a_spec(tmp_path: Path) -> None:
    assert faults(tmp_path, "size: '${eval:1+1}'\n") == [
        "./spec.yaml:1: size: unsupported interpolation type eval"
        " | a spec is data: taoq runs no code from it; write the value itself"
    ]


def test_a_file_named_like_a_section_is_not_taken_for_a_field(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("quantize: {}\n")
    source = read_spec(str(path), [])
    assert source.locate("quantize.pth", RootSpec) == "quantize.pth"
    assert source.locate("quantize.model_path", RootSpec) == f"{path}:1: quantize.model_path"


def test_a_spec_survives_a_manifest(tmp_path: Path) -> None:
    text = "quantize: {layers: [{module_name: A, weights: {dtype: int8}}], backend_kwargs: {a: [1, {b: null}]}}\n"
    spec = load(tmp_path, text + "job: {source: a}\n")
    assert spec_from_dict(spec_to_dict(spec), RootSpec) == spec


def test_a_field_that_older_versions_lack_is_stored_only_where_it_is_set(tmp_path: Path) -> None:
    assert "added" not in spec_to_dict(load(tmp_path, ""))
    spec = load(tmp_path, "added: here\n")
    assert spec_to_dict(spec)["added"] == "here"
    assert spec_from_dict(spec_to_dict(spec), RootSpec) == spec
