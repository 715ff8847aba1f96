# SPDX-License-Identifier: Apache-2.0
"""Refuse outputs that are not numbers: figures and predictions made of them would look like any other."""

from __future__ import annotations

import torch

from taoq.errors import Fault, TaoqError
from taoq.network import Outputs
from taoq.tasks.base import Batch


def refuse_nan(outputs: Outputs, batch: Batch, checkpoint: str) -> None:
    """Refuse outputs with NaN.

    Args:
        outputs: Outputs for a batch.
        batch: The batch.
        checkpoint: The model, for the message.

    Raises:
        TaoqError: If an output has NaN; names the first sample.
    """
    for name, values in outputs.items():
        if not values.is_floating_point():
            continue
        wrong = torch.isnan(values).flatten(1).any(1).nonzero()
        if len(wrong):
            row = int(wrong[0])
            sample = batch.paths[row] if row < len(batch.paths) else f"sample {row} of a batch"
            what = f"its output {name} is not a number (NaN) for {sample}"
            hint = "look for NaN or infinite values in the checkpoint, or in the sample"
            raise TaoqError(Fault(checkpoint or "the network", what, hint))
