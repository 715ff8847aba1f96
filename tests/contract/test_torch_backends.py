"""What both torch backends promise, for every dtype. Real libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.networks import (
    VARIANTS,
    TinyNet,
    Untouched,
    backend_of,
    error,
    every_algorithm,
    every_torch_backend,
    every_torch_variant,
    faults_of,
    feed,
    float_size,
    fresh_tiny_net,
    images,
    outputs_in_a_new_process,
    parts,
    plan_of,
    quantize,
    quantized_tiny_net,
    rule,
    rules,
    run,
    same,
    saved_and_loaded,
    scheme,
    schemes,
    tiny_net,
)
from taoq.errors import Fault, TaoqError
from taoq.quantization.plan import verify
from taoq.quantization.types import AppliedLayer

LARGEST_ERROR = {
    ("torchao", "int8"): 0.01,
    ("torchao", "fp8_e4m3fn"): 0.05,
    ("torchao", "fp8_e5m2"): 0.10,
    ("modelopt.pytorch", "int8"): 0.03,
    ("modelopt.pytorch", "fp8_e4m3fn"): 0.08,
}
STORED = {"int8": torch.int8, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def expected_schemes(backend: str, dtype: str, *layers: str) -> dict[str, Any]:
    inputs = None if backend == "torchao" else scheme(dtype)
    return {name: (scheme(dtype, 0), inputs) for name in layers}


@every_torch_variant
def test_exactly_the_planned_layers_are_converted(backend: str, dtype: str) -> None:
    patterns = ("fc1",) if backend == "torchao" else ("Conv2d", "fc1")
    layers = ("fc1",) if backend == "torchao" else ("stem", "fc1")
    model = quantize(backend, tiny_net(), rules(backend, dtype, *patterns), feed(images()))
    assert schemes(backend, model) == expected_schemes(backend, dtype, *layers)


@every_torch_variant
def test_a_star_converts_every_layer_that_the_backend_lists_as_quantizable(backend: str, dtype: str) -> None:
    layers = ("fc1", "fc2") if backend == "torchao" else ("stem", "fc1", "fc2")
    assert schemes(backend, quantized_tiny_net(backend, dtype)) == expected_schemes(backend, dtype, *layers)


@every_torch_backend
def test_listing_the_layers_changes_nothing(backend: str) -> None:
    model = tiny_net()
    listed = backend_of(backend).layers(model, {})
    assert [(layer.name, layer.type, layer.weight_shape) for layer in listed] == [
        ("stem", "Conv2d", (16, 3, 3, 3)),
        ("norm", "BatchNorm2d", ()),
        ("fc1", "Linear", (384, 256)),
        ("fc2", "Linear", (10, 384)),
    ]
    before, after = parts(tiny_net()), parts(model)
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    assert schemes(backend, model) == {}


@every_torch_variant
def test_layers_without_a_rule_stay_bit_identical(backend: str, dtype: str) -> None:
    before = parts(tiny_net())
    after = parts(quantize(backend, tiny_net(), rules(backend, dtype, "fc1"), feed(images())))
    untouched = [key for key in before if key != "fc1.weight"]
    assert all(same(before[key], after[key]) for key in untouched)
    assert all(key.startswith("fc1.") for key in after if key not in untouched)


@every_torch_variant
@pytest.mark.parametrize("way", ["skip_names", "native"])
def test_skipped_and_native_layers_stay_bit_identical(backend: str, dtype: str, way: str) -> None:
    layers = rules(backend, dtype, "*") + (rules(backend, "native", "fc2") if way == "native" else [])
    skip = ["fc2"] if way == "skip_names" else []
    model = quantize(backend, tiny_net(), layers, feed(images()), skip_names=skip)
    before, after = parts(tiny_net()), parts(model)
    assert "fc2" not in backend_of(backend).applied(model)
    assert [key for key in after if key.startswith("fc2.")] == ["fc2.weight", "fc2.bias"]
    assert all(same(before[key], after[key]) for key in ("fc2.weight", "fc2.bias"))
    assert not ("fc1.weight" in after and same(before["fc1.weight"], after["fc1.weight"]))


@every_torch_variant
def test_a_reloaded_model_is_the_same_model(backend: str, dtype: str, tmp_path: Path) -> None:
    model = quantized_tiny_net(backend, dtype)
    loaded = saved_and_loaded(backend, model, fresh_tiny_net, tmp_path / "payload.pth")
    assert torch.equal(run(loaded, images()), run(model, images()))
    assert backend_of(backend).applied(loaded) == backend_of(backend).applied(model)
    saved_tensors, loaded_tensors = parts(model), parts(loaded)
    assert saved_tensors.keys() == loaded_tensors.keys()
    assert all(same(saved_tensors[key], loaded_tensors[key]) for key in saved_tensors)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@every_torch_backend
def test_a_reloaded_model_is_the_same_model_in_a_new_process(backend: str, tmp_path: Path) -> None:
    models = [quantized_tiny_net(backend, dtype) for name, dtype in VARIANTS if name == backend]
    assert len(models) > 1
    outputs = outputs_in_a_new_process([(backend, fresh_tiny_net, model) for model in models], tmp_path)
    assert all(torch.equal(output, run(model, images())) for output, model in zip(outputs, models, strict=True))


@every_torch_variant
def test_the_payload_loads_under_weights_only_and_is_the_small_file(backend: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "payload.pth"
    backend_of(backend).save(quantized_tiny_net(backend, dtype), path, {})
    stored = torch.load(path, weights_only=True)
    weight = (stored if backend == "torchao" else stored["model_state_dict"])["fc1.weight"]
    assert (weight.qdata if backend == "torchao" else weight).dtype == STORED[dtype]
    assert path.stat().st_size < 0.30 * float_size(backend, tiny_net())


@every_torch_variant
def test_outputs_stay_near_float(backend: str, dtype: str) -> None:
    reference = run(tiny_net().eval(), images())
    largest = LARGEST_ERROR[backend, dtype]
    assert 0.2 * largest < error(run(quantized_tiny_net(backend, dtype), images()), reference) < largest


@every_torch_variant
def test_rules_of_weights_alone_read_no_batches(backend: str, dtype: str) -> None:
    model = quantize(backend, tiny_net(), [rule("*", dtype, activations=False)], Untouched())
    assert "fc1" in backend_of(backend).applied(model)


@every_torch_variant
def test_no_module_is_left_in_train_mode_and_batch_norm_statistics_do_not_change(
    backend: str, dtype: str, tmp_path: Path
) -> None:
    model = tiny_net().train()  # as constructors leave it
    model = quantize(backend, model, rules(backend, dtype, "*"), feed(images(1), images(2)))
    loaded = saved_and_loaded(backend, model, TinyNet, tmp_path / "payload.pth")
    for quantized in (model, loaded):
        assert [name for name, module in quantized.named_modules() if module.training] == []
    before, after = parts(tiny_net()), parts(model)
    assert all(same(before[key], after[key]) for key in before if key.startswith("norm."))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_torch_variant
def test_quantizing_the_same_model_twice_gives_the_same_state(backend: str, dtype: str) -> None:
    first, second = (parts(quantized_tiny_net(backend, dtype)) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(same(first[key], second[key]) for key in first)


@every_algorithm
def test_the_batches_are_read_once(algorithm: str) -> None:
    def quantized(batches: Any) -> dict[str, torch.Tensor]:
        layers = rules("modelopt.pytorch", "int8", "*")
        return parts(quantize("modelopt.pytorch", tiny_net(), layers, batches, algorithm=algorithm))

    batches = feed(images(1), images(2))
    from_list, from_generator = quantized(batches), quantized(batch for batch in batches)
    assert all(same(from_list[key], from_generator[key]) for key in from_list)


@every_torch_variant
def test_a_layer_that_the_library_left_out_is_reported(backend: str, dtype: str) -> None:
    model = quantize(backend, tiny_net(), rules(backend, dtype, "fc1"), feed(images()))
    plan = plan_of(backend, tiny_net(), [rule("fc1", dtype), rule("fc2", dtype, activations=False)])
    with pytest.raises(TaoqError) as error:
        verify(plan, {**backend_of(backend).applied(model), "fc1": AppliedLayer(None, None)})
    hint = f"hint: put it into quantize.skip_names; this is a limit of {backend}"
    lines = [f"fc1: weights are float after quantization, the plan says {dtype} axis 0", hint]
    if backend != "torchao":
        lines += [f"fc1: activations are float after quantization, the plan says {dtype} per tensor", hint]
    lines += [f"fc2: weights are float after quantization, the plan says {dtype} axis 0", hint]
    assert str(error.value) == "\n".join(lines)


@pytest.mark.parametrize(
    ("backend", "algorithm", "options", "fault"),
    [
        (
            "torchao",
            "minmax",
            {"devise": "cpu"},
            Fault(
                "quantize.backend_kwargs.devise",
                "torchao's quantize_ has no argument 'devise'",
                "did you mean 'device'?",
            ),
        ),
        (
            "torchao",
            "minmax",
            {"filter_fn": None},
            Fault(
                "quantize.backend_kwargs.filter_fn",
                "'filter_fn' of torchao's quantize_ is set by the plan",
                "write rules in quantize.layers",
            ),
        ),
        (
            "modelopt.pytorch",
            "max",
            {"distributed_sink": True},
            Fault(
                "quantize.backend_kwargs.distributed_sink",
                "ModelOpt's MaxCalibConfig has no argument 'distributed_sink'",
                "did you mean 'distributed_sync'?",
            ),
        ),
        (
            "modelopt.pytorch",
            "entropy",
            {"percentile": 99.9},
            Fault(
                "quantize.backend_kwargs.percentile",
                "ModelOpt's HistogramCalibrator.compute_amax has no argument 'percentile'",
                "its arguments are stride, start_bin",
            ),
        ),
        (
            "modelopt.pytorch",
            "entropy",
            {"stride": 0},
            Fault("quantize.backend_kwargs.stride", "'0' is not a whole number above 0", "write for example 8"),
        ),
    ],
    ids=["torchao-unknown", "torchao-ours", "max-unknown", "entropy-unknown", "entropy-value"],
)
def test_options_that_the_library_does_not_have_are_refused(
    backend: str, algorithm: str, options: dict[str, Any], fault: Fault
) -> None:
    assert faults_of(backend, options, algorithm) == [fault]


@pytest.mark.parametrize(
    ("backend", "algorithm", "options"),
    [
        ("torchao", "minmax", {"device": "cpu"}),
        ("modelopt.pytorch", "max", {"distributed_sync": False}),
        ("modelopt.pytorch", "entropy", {"stride": 64, "start_bin": 512}),
    ],
    ids=["torchao", "max", "entropy"],
)
def test_options_that_the_library_has_are_taken(backend: str, algorithm: str, options: dict[str, Any]) -> None:
    assert faults_of(backend, options, algorithm) == []
    layers = rules(backend, "int8", "fc1")
    model = quantize(backend, tiny_net(), layers, feed(images()), options, algorithm=algorithm)
    assert list(backend_of(backend).applied(model)) == ["fc1"]


def test_the_state_in_a_file_is_sorted(tmp_path: Path) -> None:
    """Some keys of ModelOpt's state come from sets, whose order differs between processes."""

    def check_sorted(state: Any) -> None:
        if isinstance(state, dict):
            assert list(state) == sorted(state)
            state = list(state.values())
        if isinstance(state, list | tuple):
            for value in state:
                check_sorted(value)

    model = quantize("modelopt.pytorch", tiny_net(), rules("modelopt.pytorch", "int8", "*"), feed(images()))
    backend_of("modelopt.pytorch").save(model, tmp_path / "payload.pth", {})
    check_sorted(torch.load(tmp_path / "payload.pth", weights_only=True)["modelopt_state"])
