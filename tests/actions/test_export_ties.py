"""The proof of `export` where a network decides by a tie: which images it leaves out, and what it takes instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from support.commands import Words
from support.examples import CHECKPOINTS
from taoq.actions.base import load_experiment
from taoq.errors import TaoqError
from taoq.network import Inputs
from taoq.pipeline.models import OpenedModel, start
from taoq.pipeline.proof import Proof, prove
from taoq.quantization.formats.onnx.file import read_graph
from taoq.spec.source import read_spec
from taoq.tasks import load_task
from taoq.tasks.rtdetr.export import ambiguous

pytestmark = pytest.mark.usefixtures("one_thread")

NO_IMAGES = [
    f"dataset.{name}.images_dir=nowhere" for name in ("quant_calibration_dataset", "val_dataset", "test_dataset")
]
ProveWith = Callable[..., Proof]
"""Proves the file of a classifier: (check_images, which of the images in order are ties, *overrides)."""


class Ties:
    """Which images are ties, in the order in which they come; the last entry is that of all others."""

    def __init__(self, entries: list[bool]) -> None:
        self.entries, self.seen = entries, 0

    def ambiguous(self, _: nn.Module, inputs: Inputs) -> Tensor:
        (images,) = inputs.values()
        numbers = range(self.seen, self.seen + len(images))
        self.seen += len(images)
        return torch.tensor([self.entries[min(number, len(self.entries) - 1)] for number in numbers])


@pytest.fixture
def prove_with(resnet: Path, network_words: Words) -> ProveWith:
    def run(check_images: int, ties: Ties, *overrides: str) -> Proof:
        _, _, _, spec, *fields = network_words("export", "resnet_18", *overrides)
        source = read_spec(spec, [*fields, f"export.check_images={check_images}"])
        experiment = load_experiment(load_task("classification_pyt"), source, "export")
        network = experiment.build(str(CHECKPOINTS["resnet_18"])).eval()
        opened = OpenedModel(read_graph(resnet), "onnx", resnet, False)
        runtime = start(experiment, opened, "cpu", "export.on_cpu")
        return prove(dataclasses.replace(experiment, ambiguous=ties.ambiguous), network, runtime, quantized=False)

    return run


@pytest.mark.parametrize(
    ("check_images", "ties", "left_out"),
    [
        (1, [False], 0),
        (1, [True, False], 1),
        (1, [True] * 7 + [False], 7),
        (3, [False, True, True, False], 2),
        (8, [True] * 3 + [False], 3),
        (70, [True, False], 1),
    ],
)
def test_other_images_are_compared_instead(
    prove_with: ProveWith, caplog: pytest.LogCaptureFixture, check_images: int, ties: list[bool], left_out: int
) -> None:
    proof = prove_with(check_images, Ties(ties))
    assert (proof.images, proof.left_out_for_ties) == (check_images, left_out)
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    expected = [f"export.check_images: {left_out} image(s) left out, where the network decides by a tie"]
    assert warnings == (expected if left_out else [])


@pytest.mark.parametrize("check_images", [1, 2, 8])
def test_images_that_are_all_ties_prove_nothing(prove_with: ProveWith, check_images: int) -> None:
    ties = Ties([True])
    with pytest.raises(TaoqError) as error:
        prove_with(check_images, ties)
    assert str(error.value) == (
        "export.check_images: the outputs cannot be compared on any of"
        f" {8 * check_images} images: the network decides by ties\n"
        "hint: give images like those that the network was trained on"
    )
    assert ties.seen == 8 * check_images


def test_noise_with_ties_is_replaced_by_other_noise(prove_with: ProveWith) -> None:
    proof = prove_with(2, Ties([True, False, True, False]), *NO_IMAGES)
    assert (proof.images, proof.left_out_for_ties) == (2, 2)


def test_a_quantized_network_that_finds_nothing_is_not_said_to_agree(
    resnet: Path, network_words: Words, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, _, spec, *fields = network_words("export", "resnet_18", "export.check_images=2")
    experiment = load_experiment(load_task("classification_pyt"), read_spec(spec, fields), "export")
    nothing = dataclasses.replace(experiment, significant=lambda outputs: torch.zeros(len(outputs["output"])).bool())
    network = experiment.build(str(CHECKPOINTS["resnet_18"])).eval()
    runtime = start(experiment, OpenedModel(read_graph(resnet), "onnx", resnet, False), "cpu", "export.on_cpu")
    prove(nothing, network, runtime, quantized=True)
    assert [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"] == [
        "export.check_images: the quantized network finds nothing in these 2 image(s): no outputs were compared"
    ]


class Scores(nn.Module):
    """A network that chooses queries by scores that are its input, [N, 3, positions, 1]."""

    num_queries = 2

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.enc_score_head = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.model.enc_score_head(images[:, 0])
        return result


@pytest.mark.parametrize("scale", [1e-4, 1.0, 12.0, 1e4])
def test_a_tie_is_relative_to_the_largest_score(scale: float) -> None:
    scores = torch.tensor(
        [
            [1.0, 0.5, 0.4999, 0.1],
            [1.0, 0.5, 0.49999, 0.1],
            [0.5, 0.5, 0.1, 0.0],
            [0.1, 0.5, 0.5, 0.5],
            [-1.0, -0.49999, -0.5, -0.2],
        ]
    )
    images = (scale * scores).view(5, 1, 4, 1).expand(-1, 3, -1, -1)
    assert ambiguous(Scores(), {"inputs": images}).tolist() == [False, True, False, True, True]


def test_where_all_positions_are_queries_there_is_no_tie() -> None:
    assert ambiguous(Scores(), {"inputs": torch.zeros(3, 3, 2, 1)}).tolist() == [False] * 3
