"""Small torch networks, and quantizing them from rules without the command line."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from taoq.errors import SpecError
from taoq.network import Inputs
from taoq.quantization.backends import load_backend
from taoq.quantization.capability import check
from taoq.quantization.dtypes import DTYPES
from taoq.quantization.formats import load_format
from taoq.quantization.plan import resolve, verify
from taoq.quantization.ranges import RangeCache
from taoq.quantization.spec import LayerSpec, QuantizeSpec, TensorSpec
from taoq.quantization.types import LayerError, PerAxis, PerTensor, QuantizationPlan, Scheme

TESTS = Path(__file__).parents[1]
VARIANTS = (
    ("torchao", "int8"),
    ("torchao", "fp8_e4m3fn"),
    ("torchao", "fp8_e5m2"),
    ("modelopt.pytorch", "int8"),
    ("modelopt.pytorch", "fp8_e4m3fn"),
)
BACKENDS = ("torchao", "modelopt.pytorch")
every_torch_variant = pytest.mark.parametrize(
    ("backend", "dtype"), VARIANTS, ids=[" ".join(variant) for variant in VARIANTS]
)
every_torch_backend = pytest.mark.parametrize("backend", BACKENDS)
every_algorithm = pytest.mark.parametrize("algorithm", ["max", "entropy"])
every_modelopt_dtype = pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3fn"])


class TinyNet(nn.Module):
    """Convolution, batch norm, ReLU, two linear layers; the first linear layer has most of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(256, 384)
        self.fc2 = nn.Linear(384, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = functional.adaptive_avg_pool2d(torch.relu(self.norm(self.stem(image))), 4)
        return self.fc2(torch.relu(self.fc1(features.flatten(1))))


def tiny_net() -> TinyNet:
    """A TinyNet, always the same, in eval mode; its batch norm has seen data."""
    net = seeded(TinyNet).eval()
    net.norm.running_mean.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    net.norm.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return net


def fresh_tiny_net() -> TinyNet:
    """A TinyNet with random weights, which loading replaces."""
    return TinyNet().eval()


class Bare(nn.Module):
    """Layers without a bias, a grouped transposed convolution, and a linear layer with a bias that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2, bias=False)
        self.fc = nn.Linear(8, 6, bias=False)
        self.twice = nn.Linear(6, 6)

    def forward(self, image: Tensor) -> Tensor:
        features = torch.relu(self.up(torch.relu(self.norm(self.stem(image)))))
        tokens = torch.relu(self.fc(features.flatten(2).transpose(1, 2)))
        return self.twice(torch.relu(self.twice(tokens))).mean(1)


def bare() -> nn.Module:
    """A Bare, always the same, in eval mode."""
    return seeded(Bare).eval()


def fresh_bare() -> nn.Module:
    """A Bare with random weights, which loading replaces."""
    return Bare().eval()


class Tokens(nn.Module):
    """A convolution with one loud channel, two linear layers that read it, one of them without a bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Linear(16, 24, bias=False)
        self.right = nn.Linear(16, 24)
        self.out = nn.Linear(24, 10)
        with torch.no_grad():
            self.stem.weight[3] *= 30

    def forward(self, image: Tensor) -> Tensor:
        tokens = torch.relu(self.stem(image)).flatten(2).transpose(1, 2)
        return self.out(torch.relu(self.left(tokens) + self.right(tokens)).mean(1))


def tokens() -> Tokens:
    """A Tokens, always the same, in eval mode."""
    return seeded(Tokens).eval()


def fresh_tokens() -> Tokens:
    """A Tokens with random weights, which loading replaces."""
    return Tokens().eval()


def linears(*sizes: int) -> nn.Sequential:
    """Linear layers in a row, always the same, in eval mode."""
    return seeded(lambda: nn.Sequential(*itertools.starmap(nn.Linear, itertools.pairwise(sizes)))).eval()


def seeded(build: Callable[[], nn.Module]) -> Any:
    """What `build` returns, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(seed: int = 0) -> Tensor:
    return normal(16, 3, 12, 12, seed=seed)


def feed(*tensors: Tensor) -> list[Inputs]:
    return [{"image": tensor} for tensor in tensors]


class Untouched:
    """Batches that fail when they are read."""

    def __iter__(self) -> Iterator[Inputs]:
        raise AssertionError("the batches were read")


@functools.cache
def backend_of(name: str) -> Any:
    return load_backend(name)


def rule(
    pattern: str,
    dtype: str,
    *,
    activations: bool = True,
    weight_axis: int | None = None,
    input_axis: int | None = None,
) -> LayerSpec:
    """A rule with the same dtype for weights and activations, or for weights alone."""
    return LayerSpec(
        module_name=pattern,
        weights=TensorSpec(dtype=dtype, quant_axis=weight_axis),
        activations=TensorSpec(dtype=dtype, quant_axis=input_axis) if activations else None,
    )


def rules(backend: str, dtype: str, *patterns: str) -> list[LayerSpec]:
    """A rule for each pattern; with activations if the backend quantizes them."""
    return [rule(pattern, dtype, activations=backend != "torchao") for pattern in patterns]


def section_of(backend: str, layers: list[LayerSpec], **fields: Any) -> QuantizeSpec:
    """A quantize section in the first mode of a backend."""
    mode = backend_of(backend).capability.modes[0]
    return QuantizeSpec(backend=backend, mode=mode, layers=list(layers), device="cpu", **fields)


def plan_of(
    backend: str, model: Any, layers: list[LayerSpec], options: Mapping[str, Any] | None = None, **fields: Any
) -> QuantizationPlan:
    """The plan of rules for a float model, as `prepare` makes it."""
    library = backend_of(backend)
    section = section_of(backend, layers, backend_kwargs=dict(options or {}), **fields)
    notices = check(section, library.capability)
    if faults := library.check(section):
        raise SpecError(*faults)
    return resolve(section, library.layers(model, section.backend_kwargs), library.capability, notices)


def calibrate(
    backend: str,
    model: Any,
    plan: QuantizationPlan,
    batches: Iterable[Inputs],
    *,
    options: Mapping[str, Any] | None = None,
    cache: RangeCache | None = None,
) -> Any:
    """The calibrated model."""
    return backend_of(backend).calibrate(model, plan, batches, options or {}, device="cpu", cache=cache)


def quantize(
    backend: str,
    model: nn.Module,
    layers: list[LayerSpec],
    batches: Iterable[Inputs] = Untouched(),
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> nn.Module:
    """Plan, quantize, and verify that the library did what the plan says, as the pipeline does."""
    plan = plan_of(backend, model, layers, options, **fields)
    calibrated = calibrate(backend, model, plan, batches, options=options)
    assert not calibrated.left_out(plan)
    quantized = calibrated.quantize(plan)
    verify(plan, backend_of(backend).applied(quantized))
    return quantized


def quantized_tiny_net(backend: str, dtype: str) -> nn.Module:
    """A TinyNet with all the layers quantized that the backend can quantize."""
    return quantize(backend, tiny_net(), rules(backend, dtype, "*"), feed(images(1), images(2)))


def saved_and_loaded(backend: str, model: nn.Module, build: Callable[[], nn.Module], path: Path) -> nn.Module:
    backend_of(backend).save(model, path, {})
    return backend_of(backend).load(path, build)


RELOAD = """
import sys
from pathlib import Path
import torch
from support import networks
for path in Path(sys.argv[1]).glob("*.pth"):
    _, backend, build = path.stem.split()
    model = networks.backend_of(backend).load(path, getattr(networks, build))
    torch.save(networks.run(model, networks.images()), path.with_suffix(".output"))
"""


def outputs_in_a_new_process(
    models: Sequence[tuple[str, Callable[[], nn.Module], nn.Module]], folder: Path
) -> list[Tensor]:
    """Save models, load them in a new process, and compute their outputs for `images()` there.

    Args:
        models: For each, the backend, the function of this file that builds its float network, and the quantized model.
        folder: Where the payloads are written.
    """
    stems = [f"{index} {backend} {build.__name__}" for index, (backend, build, _) in enumerate(models)]
    for stem, (backend, _, model) in zip(stems, models, strict=True):
        backend_of(backend).save(model, folder / f"{stem}.pth", {})
    process = subprocess.run([sys.executable, "-c", RELOAD, str(folder)], cwd=TESTS, capture_output=True, text=True)
    # the libraries print and warn a lot: none of it reaches the screen
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    return [torch.load(folder / f"{stem}.output", weights_only=True) for stem in stems]


def run(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(*inputs)


def error(result: Tensor, reference: Tensor) -> float:
    """Relative error in the l2 norm."""
    return float((result - reference).norm() / reference.norm())


def parts(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each quantized tensor of torchao replaced by the plain tensors that it consists of."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "__tensor_flatten__"):
            tensors |= {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            tensors[name] = value.detach().clone()
    return tensors


def same(first: Tensor, second: Tensor) -> bool:
    """Whether dtype, shape and bits are equal; float8 has no `torch.equal`."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return first.contiguous().view(-1).view(torch.uint8).equal(second.contiguous().view(-1).view(torch.uint8))


def scheme(dtype: str, axis: int | None = None, *, symmetric: bool = True) -> Scheme:
    """A scheme with a single scale, or a scale for each index of an axis."""
    return Scheme(DTYPES[dtype], PerTensor() if axis is None else PerAxis(axis), symmetric)


def schemes(backend: str, model: Any) -> dict[str, tuple[Scheme | None, Scheme | None]]:
    """Schemes of the weights and inputs of the quantized layers, read from a model."""
    return {name: (layer.weights, layer.activations) for name, layer in backend_of(backend).applied(model).items()}


def ranges(backend: str, model: Any) -> dict[str, tuple[float, float]]:
    """Ranges of the quantized inputs, read from a model."""
    applied = backend_of(backend).applied(model)
    return {name: layer.input_range for name, layer in applied.items() if layer.input_range}


def format_of(backend: str) -> Any:
    return load_format(backend_of(backend).capability.format)


def float_size(backend: str, model: Any) -> int:
    """Bytes of the float model."""
    return format_of(backend).size(model)


def layer_errors(backend: str, reference: Any, model: Any, names: Any, batches: Any) -> Mapping[str, LayerError]:
    """Errors of layers of a quantized model against a float reference."""
    weight = backend_of(backend).weight
    return format_of(backend).layer_errors(reference, model, list(names), batches, weight, device="cpu")


def bias_shifts(backend: str, reference: Any, model: Any, names: Any, batches: Any) -> Mapping[str, Any]:
    """Shifts that correct the biases of layers of a quantized model."""
    return format_of(backend).bias_shifts(reference, model, list(names), batches, device="cpu")


def quantize_corrected(
    backend: str,
    build: Callable[[], Any],
    layers: list[LayerSpec],
    batches: Iterable[Inputs] = Untouched(),
    correct_on: Iterable[Inputs] | None = None,
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Any:
    """Quantize with corrected biases, as the pipeline does; `build` gives the float model each time it is called."""
    plan = plan_of(backend, build(), layers, options, **fields)
    calibrated = calibrate(backend, build(), plan, batches, options=options)
    names = [item.layer.name for item in plan.quantized]
    feed = batches if correct_on is None else correct_on
    shifts = bias_shifts(backend, build(), calibrated.with_only(plan.quantized), names, feed)
    model = calibrated.quantize(plan, shifts)
    verify(plan, backend_of(backend).applied(model))
    return model


def faults_of(backend: str, options: Mapping[str, Any], algorithm: str = "max") -> list[Any]:
    """Faults that a backend finds in `backend_kwargs`."""
    section = section_of(backend, [rule("*", "int8")], algorithm=algorithm, backend_kwargs=dict(options))
    return backend_of(backend).check(section)


def rows(plan: QuantizationPlan) -> dict[str, dict[str, Any]]:
    """The rows of a plan as manifests have them, by layer."""
    return {item.layer.name: item.to_json() for item in plan.listed}


def notices(plan: QuantizationPlan) -> list[str]:
    return [str(notice) for notice in plan.notices]
