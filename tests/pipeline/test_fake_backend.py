"""The pipeline on a tiny network with a backend of a few lines: plans, searches, failures, and what is left on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from support import fake_backend
from support.commands import read_json
from support.exported import files_of
from support.fake_backend import FakeBackend
from support.networks import seeded
from taoq import plugins
from taoq.errors import RequirementNotMet, SpecError, TaoqError
from taoq.pipeline.artifacts import find_artifact, read_artifact
from taoq.pipeline.evaluate import measure
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.prepare import check, prepare
from taoq.pipeline.quantize import quantize
from taoq.pipeline.results.quantize import QuantizeResult
from taoq.pipeline.supplied import supply
from taoq.pipeline.tune import tune
from taoq.plugins import BACKENDS, Row, Table
from taoq.quantization.backends.base import Backend
from taoq.quantization.spec import AccuracySpec, LayerSpec, QuantizeSpec, TensorSpec
from taoq.tasks.sections import TaskSpec

LAYERS = ("0", "2", "4")
"""Names of the linear layers of the network."""
FRAGILE = "2"
"""The layer that int8 destroys: a weight of it that no sample reaches is far larger than all others."""
ALL_INT8 = LayerSpec(module_name="Linear", weights=TensorSpec(dtype="int8"), activations=TensorSpec(dtype="int8"))
SAMPLES = 64
SEARCH = AccuracySpec(max_drop=0.1, action="search")


class Killed(BaseException):
    """The process ends here."""


def make_network() -> nn.Module:
    """Three linear layers, always the same."""
    network = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))
    with torch.no_grad():
        for name in LAYERS:
            network[int(name)].weight *= 4  # else the biases decide
        network[0].weight[3] = 0.0
        network[0].bias[3] = -1.0  # behind the ReLU it is always 0
        network[2].weight[:, 3] = 1000.0
    return network.eval()


def samples() -> Tensor:
    return torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(0))


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether each sample is classified as its target says."""
    return (outputs.argmax(1) == targets).float()


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Put a backend into the table of backends, as `fake`."""

    def use(backend: Any) -> Any:
        row = Row("fake", "support.fake_backend:BACKEND", "for tests")
        rows_of = plugins._rows

        def rows_with_fake(table: Table) -> Mapping[str, Row]:
            return {**rows_of(table), row.name: row} if table is BACKENDS else rows_of(table)

        monkeypatch.setattr(plugins, "_rows", rows_with_fake)
        monkeypatch.setattr(fake_backend, "BACKEND", backend)
        return backend

    return use


@pytest.fixture
def backend(use_backend: Callable[[Any], Any]) -> FakeBackend:
    """The fake backend; a test may change its attributes."""
    return use_backend(FakeBackend())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the artifact goes."""
    return tmp_path / "artifact"


def experiment_of(*rules: LayerSpec, **fields: Any) -> Experiment:
    """The network with its data; the float network classifies every sample as its target says."""
    network, inputs = make_network(), samples()
    with torch.inference_mode():
        targets = network(inputs).argmax(1)
    section = QuantizeSpec(backend="fake", mode="static_ptq", layers=list(rules or [ALL_INT8]), device="cpu", **fields)
    return supply(
        network,
        TaskSpec(quantize=section),
        calibration=list(inputs.split(16)),
        evaluation=list(zip(inputs.split(16), targets.split(16), strict=True)),
        metric=accuracy,
    )


def run_quantize(directory: Path, *rules: LayerSpec, **fields: Any) -> QuantizeResult:
    checked = check(experiment_of(*rules, **fields), directory)
    return quantize(prepare(checked), directory)


def run_search(directory: Path, budget: AccuracySpec = SEARCH, **fields: Any) -> QuantizeResult:
    return tune(check(experiment_of(accuracy=budget, **fields), directory), directory)


def formats_of(result: QuantizeResult) -> dict[str, str]:
    """Format of the weight of each quantized layer."""
    return {item.layer.name: item.weights.dtype.name for item in result.plan.quantized if item.weights}


def test_the_fake_backend_is_a_backend(backend: FakeBackend) -> None:
    assert isinstance(backend, Backend)


def test_prepare_plans_every_layer_before_the_backend_does_anything(backend: FakeBackend) -> None:
    head = LayerSpec(module_name="4", weights=TensorSpec(dtype="fp8_e4m3fn"))
    prepared = prepare(check(experiment_of(ALL_INT8, head, skip_names=[FRAGILE]), None))
    decided = {
        item.layer.name: (str(item.weights), str(item.activations), item.reason) for item in prepared.plan.layers
    }
    assert decided == {
        "0": ("int8 axis 0", "int8 per tensor", ""),
        "1": ("None", "None", "it has no weight matrix or kernel"),
        "2": ("None", "None", "skipped"),
        "3": ("None", "None", "it has no weight matrix or kernel"),
        "4": ("fp8_e4m3fn axis 0", "None", ""),
    }
    assert backend.steps == []


def test_quantize_calibrates_measures_and_writes_a_whole_artifact(backend: FakeBackend, directory: Path) -> None:
    result = run_quantize(directory, skip_names=[FRAGILE], evaluate=True)
    assert backend.steps == ["calibrate", "quantize", "save"]
    assert backend.samples == SAMPLES
    assert formats_of(result) == {"0": "int8", "4": "int8"}
    assert result.evaluation is not None
    assert result.evaluation.float_figures == {"accuracy": 1.0}
    assert result.evaluation.quantized_figures["accuracy"] > 0.9
    measured = {layer.name: layer for layer in result.layers}
    assert all(measured[name].output_sqnr > 30 for name in ("0", "4"))
    assert measured["0"].input_range == (-measured["0"].input_range[1], float(samples().abs().max()))
    assert measured[FRAGILE].output_sqnr is None
    artifact = read_artifact(directory)
    assert artifact.manifest.calibration == {"num_samples": SAMPLES, "seed": 0}
    assert artifact.manifest.layers_quantized == 2
    assert sorted(files_of(directory)) == [
        "experiment.yaml",
        "manifest.json",
        "quantization_report.html",
        "quantization_report.json",
        "quantized_model_fake.pth",
    ]
    reloaded = backend.load(artifact.payload, make_network)
    assert backend.applied(reloaded) == backend.applied(result.model)
    with torch.inference_mode():
        assert torch.equal(reloaded(samples()), result.model(samples()))


def test_weights_alone_are_quantized_without_calibration_data(backend: FakeBackend, directory: Path) -> None:
    result = run_quantize(directory, LayerSpec(module_name="Linear", weights=TensorSpec(dtype="int8")))
    assert backend.samples == 0
    assert result.manifest.calibration == {}


def test_corrected_biases_shift_back_what_quantization_shifts(backend: FakeBackend, directory: Path) -> None:
    def mean_error(result: QuantizeResult) -> float:
        with torch.inference_mode():
            hidden = make_network()[:2](samples())
            return float((result.model[2](hidden) - make_network()[2](hidden)).mean(0).abs().max())

    rule = LayerSpec(module_name=FRAGILE, weights=TensorSpec(dtype="int8"))
    plain, corrected = (run_quantize(directory, rule, bias_correction=flag) for flag in (False, True))
    assert mean_error(plain) > 0.05
    assert mean_error(corrected) < 1e-4


def test_layers_that_the_library_leaves_out_stay_float_and_are_named(backend: FakeBackend, directory: Path) -> None:
    backend.leaves_float = {FRAGILE: "its numbers are too far apart"}
    result = run_quantize(directory)
    assert formats_of(result) == {"0": "int8", "4": "int8"}
    assert [str(notice) for notice in result.notices] == [
        "quantize.layers[0]: 1 layer(s) stay float (2): its numbers are too far apart"
    ]
    (row,) = (row for row in read_artifact(directory).manifest.plan if row["layer"] == FRAGILE)
    assert (row["weights"], row["rule"], row["reason"]) == (
        None,
        "quantize.layers[0]",
        "its numbers are too far apart",
    )


@pytest.mark.parametrize(
    ("layers", "strict", "message"),
    [
        (
            [FRAGILE],
            True,
            "quantize.layers[0]: 2 cannot be quantized: too small\n"
            "hint: put them into quantize.skip_names, or set quantize.strict: false to leave them float",
        ),
        (
            LAYERS,
            False,
            "quantize.layers: fake quantizes none of the layers\nhint: name other layers, or choose another dtype",
        ),
    ],
    ids=["strict", "all"],
)
def test_left_out_layers_are_an_error_if_strict_or_if_nothing_is_left(
    backend: FakeBackend, directory: Path, layers: list[str], strict: bool, message: str
) -> None:
    backend.leaves_float = dict.fromkeys(layers, "too small")
    with pytest.raises(TaoqError) as error:
        run_quantize(directory, strict=strict)
    assert str(error.value) == message
    assert not directory.exists()


def test_a_search_leaves_the_fragile_layer_float(backend: FakeBackend, directory: Path) -> None:
    result = run_search(directory)
    assert formats_of(result) == {"0": "int8", "4": "int8"}
    assert result.accuracy is not None
    assert result.accuracy.met
    trials = result.search.evaluations
    assert [(trial.what, trial.within) for trial in trials][:1] == [("everything", False)]
    assert trials[0].drop > 0.3
    assert backend.steps == ["calibrate", "calibrate", "quantize", "save"]  # all trials are of one calibration
    tuned = yaml.safe_load((directory / "tuned.yaml").read_text(encoding="utf-8"))["quantize"]
    assert tuned["skip_names"] == [FRAGILE]
    assert tuned["accuracy"]["action"] == "check"
    assert read_artifact(directory).manifest.accuracy["met"] is True


def test_a_search_gives_the_fragile_layer_the_format_that_it_bears(backend: FakeBackend, directory: Path) -> None:
    budget = AccuracySpec(max_drop=0.1, action="search", dtypes=["int8", "fp8_e4m3fn"])
    result = run_search(directory, budget)
    formats = formats_of(result)
    assert set(formats) == set(LAYERS)
    assert formats[FRAGILE] == "fp8_e4m3fn"
    assert result.search.share == 1.0


def test_a_search_does_not_count_on_layers_that_the_library_leaves_out(backend: FakeBackend, directory: Path) -> None:
    backend.leaves_float = {"4": "too small"}
    result = run_search(directory)
    assert formats_of(result) == {"0": "int8"}
    assert max(trial.layers for trial in result.search.evaluations) == 2


def test_a_search_that_finds_nothing_writes_no_artifact(backend: FakeBackend, directory: Path) -> None:
    budget = AccuracySpec(max_drop=0.1, action="search", max_evaluations=1)
    with pytest.raises(RequirementNotMet) as error:
        run_search(directory, budget)
    assert str(error.value).startswith(
        "quantize.accuracy.max_drop: no plan of 1 keeps accuracy within 0.1 of 1.0000; the best found loses "
    )
    assert backend.steps == ["calibrate"]
    assert sorted(files_of(directory)) == ["analysis.json"]


def test_a_search_that_is_killed_keeps_what_it_measured_and_the_earlier_artifact(
    backend: FakeBackend, directory: Path
) -> None:
    run_quantize(directory)
    before = files_of(directory)
    backend.stops = {"quantize": Killed()}
    with pytest.raises(Killed):
        run_search(directory)
    after = files_of(directory)
    assert sorted(set(after) - set(before)) == ["analysis.json"]
    assert {name: after[name] for name in before} == before
    measured = read_json(directory / "analysis.json")["found"]
    assert len(measured["noise"][""]) == len(LAYERS)
    assert "accuracy" in measured["figure"]


@pytest.mark.parametrize("step", ["calibrate", "quantize", "save"])
@pytest.mark.parametrize("error", [RuntimeError("the library failed"), Killed()], ids=["fails", "is killed"])
def test_a_run_that_stops_in_the_middle_leaves_the_earlier_artifact_whole(
    backend: FakeBackend, directory: Path, step: str, error: BaseException
) -> None:
    run_quantize(directory)
    before = files_of(directory)
    backend.stops = {step: error}
    with pytest.raises(type(error)):
        run_quantize(directory, skip_names=[FRAGILE])
    assert files_of(directory) == before
    assert read_artifact(directory).manifest.layers_quantized == 3


def test_a_library_that_forgets_a_layer_is_caught_and_leaves_the_earlier_artifact_whole(
    backend: FakeBackend, directory: Path
) -> None:
    run_quantize(directory)
    before = files_of(directory)
    backend.forgets = (FRAGILE,)
    with pytest.raises(TaoqError) as error:
        run_quantize(directory)
    hint = "hint: put it into quantize.skip_names; this is a limit of fake"
    assert str(error.value) == (
        f"2: weights are float after quantization, the plan says int8 axis 0\n{hint}\n"
        f"2: activations are float after quantization, the plan says int8 per tensor\n{hint}"
    )
    assert files_of(directory) == before


def test_files_of_a_run_that_was_killed_are_cleared_away(backend: FakeBackend, directory: Path) -> None:
    leftover = directory / ".partial" / "quantized_model_fake.pth"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half of a file")
    run_quantize(directory)
    assert read_artifact(directory).manifest.layers_quantized == 3
    assert not leftover.parent.exists()


def test_a_run_that_is_killed_while_files_are_moved_leaves_no_artifact(
    backend: FakeBackend, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of an artifact is never taken for a whole: the manifest goes first and comes last."""
    run_quantize(directory)
    replace = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if target.name == "quantized_model_fake.pth":
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    with pytest.raises(Killed):
        run_quantize(directory, skip_names=[FRAGILE])
    assert find_artifact(str(directory)) is None


def test_what_lacks_a_method_of_a_backend_is_refused(use_backend: Callable[[Any], Any]) -> None:
    use_backend(object())
    with pytest.raises(TaoqError) as error:
        check(experiment_of(), None)
    assert str(error.value) == (
        "quantize.backend: backend fake lacks methods of a backend\nhint: see taoq.quantization.backends.base.Backend"
    )


def test_what_the_capability_excludes_is_refused_before_any_work(backend: FakeBackend) -> None:
    rule = LayerSpec(
        module_name="Linear",
        weights=TensorSpec(dtype="fp8_e5m2"),
        activations=TensorSpec(dtype="int8", quant_axis=1),
    )
    with pytest.raises(SpecError) as error:
        check(experiment_of(rule, algorithm="entropy"), None)
    assert str(error.value) == (
        "quantize.algorithm: backend fake has no algorithm entropy\n"
        "hint: write algorithm: minmax, or choose a backend that has entropy\n"
        "quantize.layers[0].weights.dtype: backend fake has no fp8_e5m2 weights\n"
        "hint: choose one of int8, fp8_e4m3fn, native\n"
        "quantize.layers[0].activations.quant_axis: fake has one scale for all of a layer's input\n"
        "hint: leave it out"
    )
    assert backend.steps == []


class Undefined:
    """A metric that its data do not define."""

    figures = ("accuracy",)

    def update(self, outputs: Any, targets: Any) -> None:
        pass

    def compute(self) -> dict[str, float]:
        return {}


def test_a_figure_that_the_data_do_not_define_is_refused() -> None:
    experiment = dataclasses.replace(experiment_of(), metric=Undefined)
    network: Any = SimpleNamespace(run=lambda _: {})
    with pytest.raises(TaoqError) as error:
        measure(experiment, [network], "accuracy")
    assert str(error.value) == (
        f"the evaluation data: accuracy has no value: nothing in these {SAMPLES} image(s) defines it\n"
        "hint: evaluate on images with something to find"
    )
