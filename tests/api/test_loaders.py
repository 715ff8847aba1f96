"""What a loader may yield: tensors, tuples and dictionaries, with and without targets."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from taoq.pipeline.loaders import Signature, open_loader, split

ONE = Signature(("pixel_values",), 1)
TWO = Signature(("image", "numbers", "mask"), 2)
"""Two inputs that the network needs, and one that it can do without."""
A, B, C, LABEL, BOXES = (torch.full((2, 3), float(number)) for number in range(5))


@pytest.mark.parametrize(
    ("item", "signature", "inputs", "targets"),
    [
        (A, ONE, {"pixel_values": A}, None),
        ((A,), ONE, {"pixel_values": A}, None),
        ([A, LABEL], ONE, {"pixel_values": A}, LABEL),
        ((A, LABEL, BOXES), ONE, {"pixel_values": A}, (LABEL, BOXES)),
        ((A, [{"boxes": BOXES}] * 2), ONE, {"pixel_values": A}, [{"boxes": BOXES}] * 2),
        ({"pixel_values": A}, ONE, {"pixel_values": A}, None),
        ({"labels": LABEL, "pixel_values": A}, ONE, {"pixel_values": A}, LABEL),
        (
            {"labels": LABEL, "pixel_values": A, "boxes": BOXES},
            ONE,
            {"pixel_values": A},
            {"labels": LABEL, "boxes": BOXES},
        ),
        (({"pixel_values": A}, LABEL), ONE, {"pixel_values": A}, LABEL),
        ((A, B), TWO, {"image": A, "numbers": B}, None),
        ((A, B, LABEL), TWO, {"image": A, "numbers": B}, LABEL),
        (((A, B), LABEL), TWO, {"image": A, "numbers": B}, LABEL),
        (((A, B, C), LABEL), TWO, {"image": A, "numbers": B, "mask": C}, LABEL),
        ({"numbers": B, "image": A, "mask": C}, TWO, {"image": A, "numbers": B, "mask": C}, None),
    ],
)
def test_inputs_and_targets(item: Any, signature: Signature, inputs: dict[str, Tensor], targets: Any) -> None:
    split_inputs, split_targets = split(item, signature, "evaluation")
    assert list(split_inputs) == list(inputs)
    assert all(split_inputs[name] is inputs[name] for name in inputs)
    assert repr(split_targets) == repr(targets)


def test_arrays_are_tensors() -> None:
    inputs, targets = split((np.ones((2, 3), np.float32), np.arange(2)), ONE, "calibration")
    assert torch.equal(inputs["pixel_values"], torch.ones(2, 3))
    assert torch.equal(targets, torch.arange(2))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(10.0).reshape(10, 1))


@pytest.mark.parametrize(
    ("loader", "samples"),
    [
        ([A, A, A[:1]], 5),
        (DataLoader(TensorDataset(torch.ones(10, 3)), batch_size=4), 10),
        (DataLoader(TensorDataset(torch.ones(10, 3)), batch_size=4, drop_last=True), 8),
        (DataLoader(TensorDataset(torch.ones(10, 3)), batch_size=4, sampler=range(6)), 6),
        (DataLoader(Stream(), batch_size=4), 10),
        (DataLoader([A, B[:1]], batch_size=None), 3),
        (DataLoader([A, B[:1]], batch_size=1, collate_fn=lambda items: items[0]), 3),
    ],
    ids=["list", "data set", "drop_last", "sampler", "stream", "batches", "collate_fn"],
)
def test_samples_are_counted(loader: Any, samples: int) -> None:
    batches = open_loader(loader, ONE, "calibration", labelled=False)
    assert batches.num_samples == samples
    assert sum(len(batch.inputs["pixel_values"]) for batch in batches) == samples
    assert sum(len(batch.inputs["pixel_values"]) for batch in batches) == samples  # a second time too


def test_what_calibration_does_not_use_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "taoq"):
        batches = open_loader([(A, LABEL), (B, LABEL)], ONE, "calibration", labelled=False)
        assert len(list(batches)) == 2
    says = "of each batch, pixel_values is used; the rest is taken for targets and not used"
    assert [str(record.msg) for record in caplog.records] == [f"calibration: {says}"]
