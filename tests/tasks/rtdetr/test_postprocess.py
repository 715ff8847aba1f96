"""Post-processing as a part of an ONNX file: the detections of `evaluate`, the same labels and boxes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from support.coco import QUERIES, detector_spec
from taoq.quantization.formats.onnx.export import export_graph
from taoq.tasks.preprocessing import fit
from taoq.tasks.rtdetr.data import Targets
from taoq.tasks.rtdetr.postprocess import POSTPROCESS
from taoq.tasks.rtdetr.predict import detections
from taoq.tasks.rtdetr.spec import RtdetrSpec

CLASSES = 7
SIZES = torch.tensor([[100, 60], [64, 64], [50, 90], [1, 500], [1333, 800], [3, 7], [4096, 3000], [96, 64]])
PADDED = {"augmentation": {"preserve_aspect_ratio": True}}
both_scalings = pytest.mark.parametrize("dataset", [{}, PADDED], ids=["stretched", "padded"])


def spec_of(folder: Path, dataset: dict[str, Any], num_select: int = 12) -> RtdetrSpec:
    return detector_spec(folder, classes=CLASSES, num_select=num_select, dataset=dataset)


def random_outputs(count: int) -> dict[str, Tensor]:
    """Outputs of a network, with boxes that reach out of the image."""
    generator = torch.Generator().manual_seed(count)
    return {
        "pred_logits": 8 * torch.rand(count, QUERIES, CLASSES, generator=generator) - 6,
        "pred_boxes": torch.rand(count, QUERIES, 4, generator=generator),
    }


class File:
    """The post-processing of a spec in onnxruntime."""

    def __init__(self, spec: RtdetrSpec, *, batch: int | None = None) -> None:
        example = {**random_outputs(batch or 1), "orig_target_sizes": SIZES[: batch or 1]}
        graph = export_graph(
            POSTPROCESS.module(spec), example, ["labels", "boxes", "scores"], opset=17, dynamic=not batch, fold=True
        )
        self.graph = graph.proto
        content = graph.model.SerializeToString()
        self._session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[Any]:
        inputs = {**outputs, "orig_target_sizes": sizes}
        return self._session.run(None, {name: value.numpy() for name, value in inputs.items()})


def assert_same_as_evaluate(spec: RtdetrSpec, file: File, outputs: dict[str, Tensor], sizes: Tensor) -> None:
    labels, boxes, scores = file.run(outputs, sizes)
    assert (labels.dtype, boxes.dtype, scores.dtype) == (np.int64, np.float32, np.float32)
    targets = Targets(tuple(range(len(sizes))), sizes.float())
    found = list(detections(spec, outputs, targets, 0.0))
    assert len(found) == len(labels)
    for row, image in enumerate(found):
        assert np.array_equal(labels[row], image.labels)
        assert np.array_equal(boxes[row], image.boxes)
        np.testing.assert_allclose(scores[row], image.scores, rtol=0, atol=2e-7)


@both_scalings
@pytest.mark.parametrize("num_select", [1, 12, QUERIES * CLASSES])
def test_the_detections_are_those_of_evaluate(tmp_path: Path, dataset: dict[str, Any], num_select: int) -> None:
    spec = spec_of(tmp_path, dataset, num_select)
    file = File(spec)
    for count in (1, 3, len(SIZES)):
        assert_same_as_evaluate(spec, file, random_outputs(count), SIZES[:count])
    assert not {"Shape", "Where", "NonZero"} & {node.op_type for node in file.graph.node}


def test_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, {}, QUERIES * CLASSES)
    outputs = random_outputs(2)
    outputs["pred_boxes"][:, 0] = torch.tensor([0.9, 0.1, 0.6, 0.6])
    outputs["pred_logits"][:, 0, 4] = 9.0
    labels, boxes, _ = File(spec).run(outputs, SIZES[:2])
    assert labels[:, 0].tolist() == [4, 4]
    np.testing.assert_allclose(boxes[:, 0], [[60, 0, 100, 24], [38.4, 0, 64, 25.6]], rtol=1e-5)


def test_a_fixed_batch(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, PADDED)
    assert_same_as_evaluate(spec, File(spec, batch=2), random_outputs(2), SIZES[:2])


@pytest.mark.parametrize("levels", [1, 3])
def test_of_equal_scores_the_first_is_selected(tmp_path: Path, levels: int) -> None:
    spec = spec_of(tmp_path, {})
    outputs = random_outputs(4)
    outputs["pred_logits"] = torch.randint(levels, (4, QUERIES, CLASSES), generator=torch.Generator().manual_seed(0))
    outputs["pred_logits"] = outputs["pred_logits"].float()
    assert_same_as_evaluate(spec, File(spec), outputs, SIZES[:4])
    (first, *_) = detections(spec, {**outputs, "pred_logits": torch.zeros(4, QUERIES, CLASSES)}, targets(4), 0.0)
    assert first.labels.tolist() == [*range(CLASSES), *range(12 - CLASSES)]


def targets(count: int) -> Targets:
    return Targets(tuple(range(count)), SIZES[:count].float())


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64), (640, 640), (544, 960)])
def test_padding_is_that_of_the_scaled_image(tmp_path: Path, size: tuple[int, int]) -> None:
    """For 42 201 sizes of images."""
    spec = detector_spec(tmp_path, size=size, num_select=1, dataset=PADDED)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.cat(
        [
            torch.randint(1, 5000, (20_000, 2), generator=generator),
            torch.cartesian_prod(torch.arange(1, 150), torch.arange(1, 150)),
        ]
    )
    outputs = {"pred_logits": torch.zeros(len(sizes), 1, 1), "pred_boxes": torch.full((len(sizes), 1, 4), 0.125)}
    _, boxes, _ = POSTPROCESS.module(spec)(**outputs, orig_target_sizes=sizes)
    height, width = size
    scaled = torch.tensor([fit(size, (w, h)) for w, h in sizes.tolist()])
    scale = sizes.float() * (torch.tensor([width, height]) / scaled)
    expected = torch.cat([0.0625 * scale, (0.1875 * scale).minimum(sizes)], 1)
    assert torch.equal(boxes[:, 0], expected.minimum(sizes.repeat(1, 2)))


def test_sides_on_a_half_are_rounded_to_even() -> None:
    assert fit((64, 96), (192, 5)) == (96, 2)  # 2.5
    assert fit((64, 96), (192, 7)) == (96, 4)  # 3.5
    assert fit((64, 96), (3, 128)) == (2, 64)  # 1.5
    assert fit((64, 96), (10_000, 1)) == (96, 1)
